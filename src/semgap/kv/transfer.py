"""How KV blocks cross between the slabs of a pool and payloads in host memory.

In place: slabs lie in host memory, and blocks are sent from them and received into them. Staged (gpu_transfer.py): slabs lie on a GPU,
and blocks cross through pinned memory.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import numpy as np

from semgap import codecs
from semgap.codecs import Encoded
from semgap.kv.blocks import KVCache
from semgap.kv.codec_choice import CodecSpeed
from semgap.kv.pool import KVPool
from semgap.tensors import DType, Tensor, TensorClass, nbytes_of
from semgap.wire.frames import Frame, Memory
from semgap.wire.ledger import LinkKind
from semgap.wire.messages import TensorHeader

LayerBlock = tuple[int, int]
Payload = TypeVar("Payload")


@dataclass(frozen=True)
class Held(Generic[Payload]):
    """A block's payload in host memory, (n,) bytes, and the codec, dtype and shape of the tensor."""

    code: int
    dtype: DType
    shape: tuple[int, ...]
    payload: Payload


Kept = tuple[dict[LayerBlock, Held[Payload]], int]
"""Payloads by place, and the nanoseconds of encoding."""


@dataclass(frozen=True)
class Leaving(Generic[Payload]):
    """A batch of blocks on its way to the wire. `staged` are its copies from a GPU to host memory; `encoded` waits for them and gives the
    payloads that cross the wire, in the order of `places`.
    """

    places: tuple[LayerBlock, ...]
    staged: Sequence[Held[Payload]]
    encoded: Callable[[], list[Encoded]]


@dataclass(frozen=True)
class Undecoded:
    """Blocks of a layer that are here, but not in their slab: payloads in memory of their own, by block."""

    layer: int
    held: Mapping[int, Held[memoryview]]


class BlockTransfer(ABC, Generic[Payload]):
    """Moves blocks of one pool. A worker's shadow calls `keep` and `forget`; a shadow in a KV host calls `leave`, `memory_for` and
    `received`; both call the others. `link` is the kind of link that a copy between slab and host memory crosses. `by_layer` names a codec
    for each layer of the model.
    """

    link: LinkKind
    is_staged: ClassVar[bool]

    @abstractmethod
    def keep(self, kv_id: bytes, cache: KVCache, places: Sequence[LayerBlock], by_layer: Sequence[str]) -> Kept[Payload]:
        """Copies resident blocks to host memory, where they stay until `forget(kv_id)`."""

    @abstractmethod
    def forget(self, kv_id: bytes) -> None:
        """Frees the memory of a handle's kept payloads."""

    @abstractmethod
    def leave(self, cache: KVCache, places: Sequence[LayerBlock], by_layer: Sequence[str]) -> Leaving[Payload]:
        """Starts to take resident blocks to the wire. At most two batches may be on their way."""

    @abstractmethod
    def begin_incoming(self) -> None:
        """Orders all that comes in from now on, on any thread, behind the current stream and all that goes out."""

    @abstractmethod
    def memory_for(self, cache: KVCache, layer: int, blocks: Sequence[int], heads: Sequence[TensorHeader]) -> list[Memory | None]:
        """Memory to receive each of a layer's payloads into; None if the link may receive it anywhere."""

    @abstractmethod
    def received(self, blocks: Sequence[int], frame: Frame) -> dict[int, Held[Payload]]:
        """The payloads of a frame that was received into `memory_for`, by block, without those that are in their slab already."""

    @abstractmethod
    def put(self, cache: KVCache, layer: int, held: Mapping[int, Held[Payload]]) -> int:
        """Decodes a layer's payloads, by block, into their slab; on a GPU `cache.settle` makes a stream wait for them. Gives the
        nanoseconds of decoding. CodecError for a damaged payload.
        """

    @abstractmethod
    def moved_bytes(self, held: Held[Payload]) -> tuple[int, int]:
        """(bytes of the tensor, bytes of the copy between slab and host memory)."""

    @abstractmethod
    def copy_s(self, nbytes: int) -> float:
        """Measures the seconds of a copy of `nbytes` from host memory to the pool's device."""

    @abstractmethod
    def measure(self, cache: KVCache, layer: int, block: int, codec: str) -> CodecSpeed:
        """Measures a codec on a resident block, copies excluded. CodecError for values that it cannot hold."""

    @abstractmethod
    def warm_up(self, pool: KVPool, codec: str) -> None:
        """Compiles a codec for the pool's device, before any step is timed."""


class InPlaceTransfer(BlockTransfer[memoryview]):
    """For slabs in host memory."""

    link = LinkKind.MEMORY
    is_staged = False

    def keep(self, kv_id: bytes, cache: KVCache, places: Sequence[LayerBlock], by_layer: Sequence[str]) -> Kept[memoryview]:
        encoded = [codecs.encode(_copied(cache, *place), by_layer[place[0]]) for place in places]
        held = [Held(one.codec, one.dtype, one.shape, joined(one.buffers)) for one in encoded]
        return dict(zip(places, held, strict=True)), sum(one.encode_ns for one in encoded)

    def forget(self, kv_id: bytes) -> None:
        pass

    def leave(self, cache: KVCache, places: Sequence[LayerBlock], by_layer: Sequence[str]) -> Leaving[memoryview]:
        return Leaving(tuple(places), (), lambda: [_encoded(cache, *place, by_layer[place[0]]) for place in places])

    def begin_incoming(self) -> None:
        pass

    def memory_for(self, cache: KVCache, layer: int, blocks: Sequence[int], heads: Sequence[TensorHeader]) -> list[Memory | None]:
        fits = [head.codec == 0 and head.shape == cache.block_shape(block) for block, head in zip(blocks, heads, strict=True)]
        return [cache.pieces(layer, block) if fit else None for block, fit in zip(blocks, fits, strict=True)]

    def received(self, blocks: Sequence[int], frame: Frame) -> dict[int, Held[memoryview]]:
        arrived = zip(blocks, frame.header.tensors, frame.payloads, strict=True)
        return {block: Held(head.codec, head.dtype, head.shape, payload) for block, head, payload in arrived if payload or not head.nbytes}

    def put(self, cache: KVCache, layer: int, held: Mapping[int, Held[memoryview]]) -> int:
        decode_ns = 0
        for block, one in held.items():
            tensor, took_ns = codecs.decode(one.code, TensorClass.KV, one.dtype, one.shape, one.payload)
            _place(cache, layer, block, tensor)
            decode_ns += took_ns
        return decode_ns

    def moved_bytes(self, held: Held[memoryview]) -> tuple[int, int]:
        return nbytes_of(held.dtype, held.shape), held.payload.nbytes

    def copy_s(self, nbytes: int) -> float:
        source, target = np.zeros(nbytes, dtype=np.uint8), np.empty(nbytes, dtype=np.uint8)
        for _ in range(2):  # the first one pages in
            begin = time.perf_counter()
            target[:] = source
        return time.perf_counter() - begin

    def measure(self, cache: KVCache, layer: int, block: int, codec: str) -> CodecSpeed:
        return measure_on_host(_copied(cache, layer, block), codec)

    def warm_up(self, pool: KVPool, codec: str) -> None:
        pass


def measure_on_host(tensor: Tensor, codec: str) -> CodecSpeed:
    """`BlockTransfer.measure` of a codec that works on the host."""
    encoded = codecs.encode(tensor, codec)
    _, took_ns = codecs.decode(encoded.codec, tensor.cls, tensor.dtype, tensor.shape, joined(encoded.buffers))
    nbytes = tensor.data.nbytes
    return CodecSpeed(nbytes / encoded.nbytes, 1e9 * nbytes / max(1, encoded.encode_ns), 1e9 * nbytes / max(1, took_ns))


def joined(buffers: Sequence[memoryview]) -> memoryview:
    """A payload in one piece."""
    return buffers[0] if len(buffers) == 1 else _copy(buffers)


def _copy(pieces: Iterable[memoryview]) -> memoryview:
    return memoryview(bytearray().join(pieces))


def _copied(cache: KVCache, layer: int, block: int) -> Tensor:
    """A copy [1, 2, heads, n, head_dim] of a resident block."""
    return Tensor(TensorClass.KV, cache.pool.dtype, cache.block_shape(block), _copy(cache.pieces(layer, block)))


def _encoded(cache: KVCache, layer: int, block: int, codec: str) -> Encoded:
    """A resident block for the wire. Raw bytes are gathered from the slab without a copy."""
    if codec != "raw":
        return codecs.encode(_copied(cache, layer, block), codec)
    pieces, shape = tuple(cache.pieces(layer, block)), cache.block_shape(block)
    return Encoded(TensorClass.KV, 0, cache.pool.dtype, shape, pieces, sum([piece.nbytes for piece in pieces]), 0)


def _place(cache: KVCache, layer: int, block: int, tensor: Tensor) -> None:
    """Puts a tensor into its block; if the tensor has more positions than the block holds now, the first ones."""
    pieces = cache.pieces(layer, block)
    rows = np.frombuffer(tensor.data, dtype=np.uint8).reshape(len(pieces), -1)
    for piece, row in zip(pieces, rows, strict=True):
        piece[:] = row[: piece.nbytes]
