"""Threads that run one compiled function together, each its share of every phase. Between phases they meet."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from semgap.engine import kernel_cache

FLAGS: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy", "cache": kernel_cache.is_usable()}
_SPINS = 2000  # some microseconds; then a thread that waits offers its core to others
_FAILED = 8  # in the memory of a run: 1 once a thread failed. Number 0 counts arrivals; each has a cache line of its own
_INT = ir.IntType(64)


class Team:
    """The calling thread and `threads` - 1 more, which start with the first run of a process, so that a fork needs none."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._process = 0

    def run(self, function: Callable[..., object], *arguments: object) -> None:
        """Calls the compiled `function(*arguments, own)` in every thread; `own` is for `share` and `meet`. It must end with a `meet`.

        If a thread fails, the others leave their meetings, and the error is raised.
        """
        memory, others = np.zeros(16, np.int64), list[Future[None]]()

        def run(thread: int) -> None:
            try:
                function(*arguments, (thread, self.threads, memory))
            except BaseException:
                memory[_FAILED] = 1
                raise

        try:
            for thread in range(1, self.threads):
                others.append(self._started().submit(run, thread))
            run(0)
        except BaseException:
            memory[_FAILED] = 1
            wait(others)
            raise
        if memory[_FAILED]:
            for other in wait(others).done:
                other.result()

    def _started(self) -> ThreadPoolExecutor:
        if self._pool is None or self._process != os.getpid():
            self._pool, self._process = ThreadPoolExecutor(self.threads - 1, "kernels"), os.getpid()
        return self._pool


ALONE = Team(1)


@numba.njit(**FLAGS)
def share(count, own, unit):
    """(begin, end) of this thread's part of `count` pieces of work, in whole units where they divide."""
    thread, threads, _ = own
    units = -(-count // unit)
    return min(count, units * thread // threads * unit), min(count, units * (thread + 1) // threads * unit)


@numba.njit(**FLAGS)
def meet(own, met):
    """Waits until all threads are here, or one failed. `met`: 0, then what the last meeting returned. Nothing for a single thread."""
    _, threads, memory = own
    if threads > 1:
        arrivals, failed, spins = types.intp(memory.ctypes.data), types.intp(memory.ctypes.data) + 8 * _FAILED, 0
        met += threads
        _arrive(arrivals)
        while _read(arrivals) < met and not _read(failed):
            spins += 1
            if spins > _SPINS:
                _yield_core()
    return met


@intrinsic
def _arrive(context, address):
    """Adds 1 to the int64 at an address: what this thread wrote before is there for whoever reads it."""

    def generate(context, builder, signature, arguments):
        builder.atomic_rmw("add", builder.inttoptr(arguments[0], _INT.as_pointer()), _INT(1), "seq_cst")
        return context.get_dummy_value()

    return types.void(types.intp), generate


@intrinsic
def _read(context, address):
    """The int64 at an address, before anything that follows is read."""

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(builder.inttoptr(arguments[0], _INT.as_pointer()), "seq_cst", 8)

    return types.int64(types.intp), generate


@intrinsic
def _yield_core(context):
    """sched_yield(2)."""

    def generate(context, builder, signature, arguments):
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.IntType(32), ()), "sched_yield")
        builder.call(function, ())
        return context.get_dummy_value()

    return types.void(), generate
