"""The control of a trial: the executor decodes positions of a request by itself, with nobody waiting for a token."""

import time
from contextlib import closing

from semgap.engine.executor import Executor
from semgap.kv.blocks import KVCache


class DecodeAlone:
    """Decodes over `cache`, which holds a copy of one handle's contents."""

    def __init__(self, executor: Executor, cache: KVCache) -> None:
        self._executor, self._cache = executor, cache
        self._handle: int | None = None

    def holds(self, handle: int, position: int) -> bool:
        """True if the copy is of that handle and reaches `position`."""
        return self._handle == handle and self._cache.filled >= position

    def copy(self, handle: int, cache: KVCache) -> None:
        """Takes a copy of a handle's whole cache."""
        self._cache.load(cache.export())
        self._handle = handle

    def decode(self, position: int, token: int, count: int, seed: int, request: int) -> tuple[list[int], list[int]]:
        """Feeds `token` at `position`, then each drawn token; gives the drawn tokens and the nanoseconds of each step.

        ValueError for a position that the copy does not hold, and as `Executor.decode_window`.
        """
        if not 0 < position <= self._cache.filled:
            raise ValueError(f"the handle holds {self._cache.filled} positions, the client says {position}")
        self._cache.truncate(position)
        tokens, took_ns = [], []
        begin_ns = time.perf_counter_ns()
        with closing(self._executor.decode_window(token, self._cache, count, seed, request)) as steps:
            for drawn in steps:
                tokens.append(drawn.token)
                took_ns.append(time.perf_counter_ns() - begin_ns)
                begin_ns = time.perf_counter_ns()
        return tokens, took_ns
