"""Triton's kernels compiled side by side, each with its launcher: C that Triton builds for a kernel's signature, one by one on its own.

Triton 3.6 has a launcher for each signature, Triton 3.7 one for all kernels. Both are kept in Triton's cache, by their source.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import triton
from triton.runtime import driver

from semgap.processes.machine import CORES_AT_START


@contextlib.contextmanager
def compiling_threads() -> Iterator[None]:
    """Launches with `warmup` within only compile their kernels, in a thread for each core. The end waits for all of them.

    The threads run on all cores that this process had as it started: a side of a trial is pinned to the few that it computes on.
    """
    with ThreadPoolExecutor(len(CORES_AT_START), initializer=_spread) as pool, _WithLaunchers(pool):
        yield


def _spread() -> None:
    with contextlib.suppress(OSError):  # cores that were taken away since
        os.sched_setaffinity(0, CORES_AT_START)


class _WithLaunchers(triton.AsyncCompileMode):
    """A kernel's thread builds its launcher too. A session that launches the kernel then finds it in the cache."""

    def submit(self, key: Any, compile_fn: Callable[[], Any], finalize_fn: Callable[[Any], None]) -> Any:
        return super().submit(key, lambda: _with_launcher(compile_fn()), finalize_fn)


def _with_launcher(kernel: Any) -> Any:
    driver.active.launcher_cls(kernel.src, kernel.metadata)
    return kernel
