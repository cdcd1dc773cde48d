"""A trial's second worker that is killed in its midst."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator

import psutil


@contextlib.contextmanager
def second_worker_killed(by: int) -> Iterator[None]:
    """Kills the second worker that this process starts within the context, once it has a session."""
    killer = threading.Thread(target=_kill, args=(by,))
    killer.start()
    yield
    killer.join()


def _kill(by: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        workers = []
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):  # ended meanwhile
                if "serve" in child.cmdline() and "--kv-host" in child.cmdline() and child.parent() == psutil.Process():
                    workers.append(child)
        second = min(workers, key=lambda child: child.create_time(), default=None)
        if second is not None and second.children():
            os.kill(second.pid, by)
            return
        time.sleep(0.02)
