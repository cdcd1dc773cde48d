"""KV blocks on their way: a thread receives them while layers compute, and each layer waits for its own blocks."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from semgap.codecs.clock import Clock, wait_for
from semgap.kv.blocks import KVCache
from semgap.kv.handles import Recovered
from semgap.kv.shadow import Shadow, ShadowError


def pin_thread(cpus: Sequence[int]) -> None:
    """Pins the calling thread, and no other."""
    if cpus:
        os.sched_setaffinity(0, cpus)


class Arrivals:
    """Blocks on their way: another thread receives, decodes and places them, and each layer waits for its own blocks.

    On a GPU a layer waits twice: the host until the copy of the blocks is issued, then the current stream until the copy is done.
    With `patience_s` no layer waits longer than so many seconds from now.
    """

    def __init__(
        self, io: ThreadPoolExecutor, layers: Sequence[int], arriving: Iterator[int], cache: KVCache, patience_s: float | None = None
    ) -> None:
        self._here = {layer: threading.Event() for layer in layers}
        self._patience_s = patience_s
        self._begin_s = time.monotonic()
        self._cache = cache
        self._waits: list[Clock] = []
        self._failed = False
        self._done = io.submit(self._bring, arriving)
        self._done.add_done_callback(self._let_go)

    def wait(self, layer: int) -> None:
        """Returns when a layer's blocks are in their slab, or will be for later work on the current stream. ShadowError if they did not
        come.
        """
        event = self._here.get(layer)
        if event is not None:
            clock = Clock(self._cache.pool.device)
            if not event.wait(self._left_s()):
                came = sum(here.is_set() for here in self._here.values())
                raise ShadowError("late", f"{came} of {len(self._here)} layers came within {self._patience_s:.1f} s")
            self._cache.settle(layer)
            clock.stop()
            self._waits.append(clock)
        if self._failed:
            self._done.result()

    def idle_ns(self) -> int:
        """The time that layers ready to run had to wait. On a GPU it counts from the end of the stream's earlier work."""
        return sum(clock.took_ns() for clock in self._waits)

    def end(self) -> None:
        """Waits for the thread. All layers have been waited for, so it is done or about to be."""
        self._done.result()

    def give_up(self, shadow: Shadow) -> None:
        """Ends the thread after a failed step, so that it writes no more blocks."""
        if not self._done.done():
            shadow.abort()
        self._done.exception()

    def _left_s(self) -> float | None:
        return None if self._patience_s is None else max(0.0, self._begin_s + self._patience_s - time.monotonic())

    def _bring(self, arriving: Iterator[int]) -> None:
        for layer in arriving:
            self._here[layer].set()

    def _let_go(self, done: Future[None]) -> None:
        """Releases all waiting layers: the thread has ended, or never began."""
        self._failed = done.exception() is not None  # before any layer goes on
        for event in self._here.values():
            event.set()


@contextlib.contextmanager
def stall(recovered: Recovered, device: str) -> Iterator[None]:
    """Adds the time of its block to a step's stall. On a GPU the time ends when the block's work on the current stream is done."""
    wait_for(device)
    begin_ns = time.perf_counter_ns()
    try:
        yield
    finally:
        wait_for(device)
        recovered.stall_ns += time.perf_counter_ns() - begin_ns
