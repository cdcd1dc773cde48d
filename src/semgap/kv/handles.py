"""A handle: its cache, what it was fed, and what a step did about blocks that it missed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from semgap.kv.blocks import KVCache


class UnknownHandle(ValueError):
    """A handle that is not open in this session. `code` travels in error frames."""

    code = "handle"


@dataclass
class Fed:
    """Tokens that one forward pass was fed, of which the first `kept` still count: a replay in the same shapes is bitwise the same."""

    tokens: np.ndarray
    kept: int


@dataclass
class Live:
    """A handle: its cache, the request that it serves, what it was fed, and when it was last used (a count of uses)."""

    number: int
    cache: KVCache
    request: int
    kv_id: bytes
    fed: list[Fed] = field(default_factory=list)
    used: int = 0
    room: Recovered | None = None  # what it took to make room for it, which its first step accounts for

    def tokens(self) -> np.ndarray:
        """All tokens that the cache stands for, in order."""
        return np.concatenate([fed.tokens[: fed.kept] for fed in self.fed])


@dataclass
class Recovered:
    """What a step that missed blocks, or had to make room, did about it. Times in ns, bytes of both directions between worker and KV
    host or host memory.

    `how` is what was done in the end (None: nothing was missing); `planned` what was begun, and `predicted_ns` what it was to take,
    where a cost model chose.
    `stall_ns` is the time that the step did not compute: making room, waiting for blocks, or recomputing.
    `missing_bytes` are filled bytes before any codec; `saved` are blocks of this or other handles that had to go to the shadow for it.
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
