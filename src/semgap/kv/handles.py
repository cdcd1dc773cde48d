"""A handle: its cache, the tokens of its passes, and the record of a step that missed blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from semgap.kv.blocks import KVCache


class UnknownHandle(ValueError):
    """A handle that is not open in this session. `code` travels in error frames."""

    code = "handle"


class RecoveryError(ValueError):
    """Blocks that could be neither restored nor recomputed. The handle stays as it was. `code` travels in error frames."""

    code = "recovery"


@dataclass
class Fed:
    """The tokens of one forward pass; the first `kept` still count. A replay in the same shapes is bitwise the same."""

    tokens: np.ndarray
    kept: int


@dataclass
class Live:
    """An open handle: its cache, its request, the tokens of its passes, and its last use (a count of uses).

    `codec` is the codec of its saved blocks, or None until a block is saved in one. `room` is the record of the room that was made for
    it, until its first step.
    """

    number: int
    cache: KVCache
    request: int
    kv_id: bytes
    fed: list[Fed] = field(default_factory=list)
    used: int = 0
    codec: str | None = None
    room: Recovered | None = None

    @property
    def is_coded(self) -> bool:
        """True if its blocks are saved in a codec other than raw."""
        return self.codec not in (None, "raw")

    def tokens(self) -> np.ndarray:
        """All tokens of the cache, in order."""
        return np.concatenate([fed.tokens[: fed.kept] for fed in self.fed])


@dataclass
class Recovered:
    """The record of a step that missed blocks or made room. Times in ns; bytes of both directions.

    `planned` is the way that was begun, `how` the way that was taken in the end (None: no block was missing), and `predicted_ns` the
    prediction of a cost model, if one chose the way. `stall_ns` is the time without compute: making room, waiting for blocks, recomputing.
    `missing_bytes` are filled bytes before any codec. `saved_network_bytes` are blocks of this or other handles, saved to make room.
    """

    how: str | None
    planned: str | None
    missing_bytes: int = 0
    stall_ns: int = 0
    predicted_ns: int | None = None
    fetched_network_bytes: int = 0
    saved_network_bytes: int = 0
    copied_bytes: int = 0
    fallback: str | None = None
