"""The shadow: where KV blocks lie that are not on the device. Interface, and what both shadows share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from semgap import codecs
from semgap.codecs import Encoded, device
from semgap.codecs.torch_tensors import to_wire
from semgap.kv import gpu_transfer
from semgap.kv.blocks import BLOCK, KVCache, KVPool
from semgap.tensors import DType, Tensor, TensorClass
from semgap.wire.ledger import Direction, Ledger, LinkKind
from semgap.wire.messages import Kind, Operation

Kept = TypeVar("Kept")


PROBE_BYTES = 4 << 20


class ShadowError(ValueError):
    """Blocks that could not be saved or brought back. `code` says why: gone, fenced, layout, budget, unknown, or the wire's own."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Moved:
    """Blocks that went to a shadow, and their bytes before and after the codec."""

    blocks: int = 0
    tensor_bytes: int = 0
    payload_bytes: int = 0

    def __add__(self, other: Moved) -> Moved:
        return Moved(self.blocks + other.blocks, self.tensor_bytes + other.tensor_bytes, self.payload_bytes + other.payload_bytes)


class Shadow(ABC):
    """Where a session's KV blocks lie while they are not on its device. One thread at a time."""

    @abstractmethod
    def save(self, kv_id: bytes, cache: KVCache, blocks: np.ndarray, codec: str, tokens: np.ndarray) -> Moved:
        """Takes a copy of resident blocks, true in [layers, blocks], of a cache of `tokens`. `cache.saved` tells which are, also after a
        ShadowError.
        """

    @abstractmethod
    def fetch(self, kv_id: bytes, cache: KVCache, blocks: np.ndarray) -> Iterator[int]:
        """Asks at once for saved blocks, true in [layers, blocks]; gives each layer's index when its blocks are in their slab, in order,
        or on a GPU on their way there: `cache.settle` then has a stream wait for them.

        ShadowError where one cannot be had, also midway; what has not been given then holds anything. Called by the thread that runs
        forward passes, and consumed by any.
        """

    @abstractmethod
    def forget(self, kv_id: bytes) -> None:
        """The handle is gone for good."""

    @abstractmethod
    def probe(self) -> tuple[float, float]:
        """Measures (round trip in s, bytes/s) of bringing raw blocks back."""

    @abstractmethod
    def abort(self) -> None:
        """Ends a fetch that another thread is consuming: it raises ShadowError there, or comes to its end."""

    @abstractmethod
    def reach(self) -> None:
        """ShadowError where the shadow cannot be had, before anything depends on it."""

    @abstractmethod
    def books(self) -> dict[str, Any] | None:
        """The books of the link to a KV host, `agreed` where they are reconciled, else with the reason; None where there is none."""

    @property
    @abstractmethod
    def network_bytes(self) -> tuple[int, int]:
        """Frame bytes so far, both directions, of (saving to, fetching from) a KV host."""

    @abstractmethod
    def close(self) -> None:
        """The session is over."""


def measure_codec(cache: KVCache, layer: int, block: int, codec: str) -> tuple[float, float]:
    """(tensor bytes over payload bytes, tensor bytes decoded in a second) of a KV codec on a resident block."""
    if cache.pool.copies is not None and codecs.codec_named(codec).on_device:
        return gpu_transfer.measure(cache, layer, block, codec)
    held = copied(cache.block(layer, block))
    encoded = codecs.encode(held, codec)
    _, took_ns = codecs.decode(encoded.codec, held.cls, held.dtype, held.shape, _payload(encoded))
    return held.data.nbytes / encoded.nbytes, held.data.nbytes / (took_ns / 1e9)


def warm_up(pool: KVPool, codec: str) -> None:
    """Runs the device's form of a KV codec once, which compiles it; nothing for codecs of the host."""
    named = codecs.codec_named(codec)
    if named.on_device:
        device.warm_up(named, pool.dtype, pool.shape.block(min(BLOCK, pool.shape.max_length)), pool.device)


def encoded_block(cache: KVCache, layer: int, block: int, codec: str) -> Encoded:
    """A resident block as it is to cross; raw ones in host memory are gathered from their slab without a copy."""
    pieces = cache.pieces(layer, block)
    if codec == "raw" and pieces is not None:
        begin, end = cache.bounds(block)
        dtype = DType.from_torch_name(str(cache.pool.dtype))
        return Encoded(TensorClass.KV, 0, dtype, cache.shape.block(end - begin), tuple(pieces), sum([p.nbytes for p in pieces]), 0)
    return codecs.encode(copied(cache.block(layer, block)), codec)


def copied(block: torch.Tensor) -> Tensor:
    """A copy [1, 2, heads, n, head_dim] in host memory of a block's own."""
    return to_wire(block.cpu().clone(memory_format=torch.contiguous_format)[None], TensorClass.KV)


def found(held: Mapping[tuple[int, int], Kept], layer: int, block: int) -> Kept:
    """What is held of a block; ShadowError where it is not."""
    if (layer, block) not in held:
        raise ShadowError("gone", f"block {block} of layer {layer} is not in the worker's shadow")
    return held[layer, block]


def as_bytes(encoded: Encoded) -> torch.Tensor:
    """A payload as (n,) uint8 of its own."""
    return torch.frombuffer(bytearray(b"".join(encoded.buffers)), dtype=torch.uint8)


def decoded(encoded: Encoded, ledger: Ledger, link: LinkKind) -> Tensor:
    tensor, took = codecs.decode(encoded.codec, encoded.cls, encoded.dtype, encoded.shape, _payload(encoded))
    operation = Operation.FETCH_MISSING_KV_LAYERS
    ledger.count_codec(Direction.UP, operation, Kind.DELTA, TensorClass.KV, decode_ns=took, link=link)
    return tensor


def _payload(encoded: Encoded) -> memoryview:
    return encoded.buffers[0] if len(encoded.buffers) == 1 else memoryview(b"".join(encoded.buffers))
