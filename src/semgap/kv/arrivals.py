"""KV blocks on their way: a thread receives them while layers compute, and each layer waits for its own."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from semgap.kv.blocks import KVCache
from semgap.kv.handles import Recovered
from semgap.kv.shadow import Shadow


def pin_thread(cpus: Sequence[int]) -> None:
    if cpus:
        os.sched_setaffinity(0, cpus)  # of the calling thread alone


class Arrivals:
    """Blocks on their way: a thread of its own receives, decodes and places them, and each layer waits for its own.

    On a GPU it waits twice: the host until the copy of the layer's blocks was issued, and the current stream until it is done.
    """

    def __init__(self, io: ThreadPoolExecutor, layers: Sequence[int], arriving: Iterator[int], cache: KVCache) -> None:
        self._here = {layer: threading.Event() for layer in layers}
        self._cache = cache
        self._idle = _Idle(cache.pool.device)
        self._failed = False
        self._done = io.submit(self._bring, arriving)
        self._done.add_done_callback(self._let_go)

    def wait(self, layer: int) -> None:
        """Returns once a layer's blocks are in their slab, or will be for what the current stream is given. ShadowError where they did
        not come.
        """
        event = self._here.get(layer)
        if event is not None:
            with self._idle:
                event.wait()
                self._cache.settle(layer)
        if self._failed:
            self._done.result()

    def idle_ns(self) -> int:
        """For how long layers that were ready to run had to wait."""
        return self._idle.took_ns()

    def end(self) -> None:
        """All layers have been waited for, so the thread is done, or about to be."""
        self._done.result()

    def give_up(self, shadow: Shadow) -> None:
        """The step failed: whatever still comes must not be written any more."""
        if not self._done.done():
            shadow.abort()
        self._done.exception()

    def _bring(self, arriving: Iterator[int]) -> None:
        for layer in arriving:
            self._here[layer].set()

    def _let_go(self, done: Future[None]) -> None:
        """The thread has ended, or never began: no layer is to wait any more."""
        self._failed = done.exception() is not None  # before any layer that waits is let go
        for event in self._here.values():
            event.set()


class Stall:
    """Adds the time of its block to a step's stall, on a GPU until what the current stream was given in it is done."""

    def __init__(self, recovered: Recovered, device: torch.device) -> None:
        self._recovered, self._device = recovered, device

    def __enter__(self) -> None:
        _synchronise(self._device)
        self._begin = time.perf_counter_ns()

    def __exit__(self, *_: object) -> None:
        _synchronise(self._device)
        self._recovered.stall_ns += time.perf_counter_ns() - self._begin


class _Idle:
    """The time that the current stream of a GPU stands still in its blocks, or the thread where there is none.

    A host that waits while its GPU still computes loses nothing: so the time counts from when the stream has done all that it was
    given, by events, to when it goes on.
    """

    def __init__(self, device: torch.device) -> None:
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._is_cuda = device.type == "cuda"
        self._host_ns = 0

    def __enter__(self) -> None:
        self._begin_ns = time.perf_counter_ns()
        if self._is_cuda:
            self._before = torch.cuda.Event(enable_timing=True)
            self._before.record()

    def __exit__(self, *_: object) -> None:
        if self._is_cuda:
            after = torch.cuda.Event(enable_timing=True)
            after.record()
            self._events.append((self._before, after))
        else:
            self._host_ns += time.perf_counter_ns() - self._begin_ns

    def took_ns(self) -> int:
        """The sum so far. Waits for the stream."""
        if self._events:
            self._events[-1][1].synchronize()
        return self._host_ns + sum(int(1e6 * before.elapsed_time(after)) for before, after in self._events)


def _synchronise(device: torch.device) -> None:
    """Waits for what the current stream was given."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
