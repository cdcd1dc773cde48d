"""A shadow: the place of KV blocks while the device does not hold them. The interface of both shadows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from semgap.codecs import CODECS, codec_of
from semgap.kv.blocks import KVCache
from semgap.kv.pool import KVPool
from semgap.kv.transfer import BlockTransfer, InPlaceTransfer

PROBE_BYTES = 4 << 20


class ShadowError(ValueError):
    """Blocks that could not be saved or fetched. `code` gives the reason: gone, fenced, layout, budget, unknown, or one of the wire's."""

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
    """Keeps blocks of a session's caches, saved and fetched by `transfer`, and counts the bytes that this moves. It knows a handle by its
    `kv_id` only. One thread at a time.
    """

    transfer: BlockTransfer[Any]
    came: list[str]
    """The codec in which each layer came of the last fetch, in their order; of a layer whose blocks came in several, `raw+int8`."""

    @abstractmethod
    def save(self, kv_id: bytes, cache: KVCache, blocks: np.ndarray, by_layer: Sequence[str], tokens: np.ndarray) -> Moved:
        """Copies resident blocks, true in [layers, blocks], of a cache of `tokens`, each layer's in its codec of `by_layer`. `cache.saved`
        says which are saved, also after a ShadowError.
        """

    @abstractmethod
    def fetch(self, kv_id: bytes, cache: KVCache, blocks: np.ndarray, patience_s: float | None = None) -> Iterator[int]:
        """Requests saved blocks, true in [layers, blocks], at once. Gives each layer's index, in order, when its blocks are in their slab,
        or on a GPU on their way there: then `cache.settle` makes a stream wait for them.

        With `patience_s` no layer of a KV host is waited for much longer than so many seconds from now: a frame may take its own length
        at 1 MiB/s more. ShadowError if a block is lost, also midway; layers not given yet then hold anything. Call it on the thread that
        runs forward passes; any thread may consume it.
        """

    @abstractmethod
    def forget(self, kv_id: bytes) -> None:
        """Drops a handle for good."""

    @abstractmethod
    def probe(self) -> tuple[float, float]:
        """Measures (round trip in s, bytes/s) of fetching raw blocks."""

    @abstractmethod
    def abort(self) -> None:
        """Ends a fetch that another thread consumes: it raises ShadowError there, or comes to its end."""

    @abstractmethod
    def books(self) -> dict[str, Any] | None:
        """The ledgers of the link to a KV host: `agreed`, or the reason why they do not agree. None without a KV host."""

    @property
    def network_bytes(self) -> tuple[int, int]:
        """Frame bytes so far, both directions, of (saving to, fetching from) a KV host."""
        return 0, 0

    @abstractmethod
    def close(self) -> None:
        """Ends the session."""


def codecs_of(codes: Iterable[int]) -> str:
    """The names of wire codes, each once."""
    return "+".join(sorted({codec_of(code).name for code in codes}, key=list(CODECS).index))


def transfer_of(pool: KVPool) -> BlockTransfer[Any]:
    """The transfer for a pool's device."""
    if pool.streams is None:
        return InPlaceTransfer()
    from semgap.kv.gpu_transfer import StagedTransfer

    return StagedTransfer(pool, pool.streams)
