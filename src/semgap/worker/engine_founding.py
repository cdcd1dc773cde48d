"""The founding file of an engine: its spec and its weights, in memory; a session writes it and the engine reads it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from semgap.engine.memory_check import require_free
from semgap.engine.weights import Weights
from semgap.kv.pool import BLOCK, KVBudgetError, KVShape
from semgap.policy import Batching
from semgap.tensors import bytes_view
from semgap.wire.messages import WeightSpec

KEY_BYTES = 16
_LENGTH_BYTES = 8
_ENCODER = msgspec.json.Encoder(order="deterministic")


class EngineSpec(msgspec.Struct, frozen=True):
    """All that the sessions of an engine have in common, but for the content of the weights. `kv_blocks` of 64 positions each."""

    model: dict[str, Any]
    weights: tuple[WeightSpec, ...]
    dtype: str
    device: str
    executor: str
    threads: int
    max_length: int
    batching: Batching
    kv_blocks: int

    def key(self, digests: Sequence[bytes]) -> bytes:
        """Names the engine of this spec and of weights with these xxh3-128 hashes."""
        return xxhash.xxh3_128_digest(_ENCODER.encode(self) + b"".join(digests))


def kv_blocks(shape: KVShape, requests: int, budget: float) -> int:
    """The KV blocks of so many requests times the fraction `budget`. KVBudgetError if one request of max_length does not fit."""
    blocks = int(budget * requests * shape.blocks)
    if blocks < shape.blocks:
        raise KVBudgetError(
            f"a KV budget of {blocks} blocks of {BLOCK} positions is less than one request of {shape.max_length} positions needs, "
            f"{shape.blocks}; raise kv_budget or handles"
        )
    return blocks


def digests_of(weights: Weights) -> list[bytes]:
    """xxh3-128 of each weight, in order; `weights` are in host memory, as those of `write_founding`."""
    return [xxhash.xxh3_128_digest(part) for part in _parts(weights)]


def write_founding(spec: EngineSpec, weights: Weights) -> int:
    """A file in memory: the weights back to back, the spec in JSON, and its length. ModelError if memory has no room for it."""
    require_free("the weights on their way to an engine need", weights.nbytes, "cpu")
    encoded = _ENCODER.encode(spec)
    fd = os.memfd_create("semgap-engine", os.MFD_CLOEXEC)
    for part in (*_parts(weights), memoryview(encoded), memoryview(len(encoded).to_bytes(_LENGTH_BYTES, "little"))):
        done = 0
        while done < part.nbytes:
            done += os.write(fd, part[done:])
    return fd


def read_founding(fd: int) -> tuple[EngineSpec, Weights]:
    """The spec and the weights of a file, on their device. The file is closed then: its memory is free.

    ModelError if the device has no room for the weights.
    """
    end = os.fstat(fd).st_size - _LENGTH_BYTES
    length = int.from_bytes(os.pread(fd, _LENGTH_BYTES, end), "little")
    spec = msgspec.json.decode(os.pread(fd, length, end - length), type=EngineSpec)
    weights = Weights(spec.weights, spec.device)
    weights.read_file(Path(f"/proc/self/fd/{fd}"), [0, *accumulate(weights.sizes)][:-1])
    os.close(fd)
    return spec, weights


def _parts(weights: Weights) -> Iterator[memoryview]:
    for array in weights.arrays().values():
        yield bytes_view(array)
