"""Limits of CPU time and memory while a library builds a model of a config that a client sent: it may say anything."""

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from semgap.engine.architecture import ModelError

MOST_CPU_S = 10.0
MOST_BYTES = 2 << 30
_AGAIN_S = 0.5  # a signal whose exception got lost in a callback comes again


class _TooLong(BaseException):
    """Raised in the middle of a build; no library catches it."""


@contextlib.contextmanager
def build_limits() -> Iterator[None]:
    """ModelError once the code within has taken MOST_CPU_S of CPU time, or MOST_BYTES beyond the address space that this process has.

    Time is watched in a process's main thread alone, where signals arrive: a session builds its model there.
    """
    try:
        with _memory_limit(), _time_limit():
            yield
    except _TooLong:
        raise ModelError(f"the model's config takes more than {MOST_CPU_S:g} s of CPU time to build; use a smaller one") from None
    except MemoryError:
        raise ModelError(f"the model's config takes more than {MOST_BYTES:,} bytes of memory to build; use a smaller one") from None


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, MOST_CPU_S, _AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def _memory_limit() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    wanted = (pages * resource.getpagesize() + MOST_BYTES, soft, hard)
    resource.setrlimit(resource.RLIMIT_AS, (min(limit for limit in wanted if limit != resource.RLIM_INFINITY), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
