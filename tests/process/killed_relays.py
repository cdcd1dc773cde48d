"""A trial's relay that is killed in its midst."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import psutil


@contextlib.contextmanager
def relay_killed_once_connected() -> Iterator[None]:
    """Kills the first relay that this process starts within the context, as soon as it has a connection."""
    killer = threading.Thread(target=_kill)
    killer.start()
    yield
    killer.join()


def _kill() -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):  # ended meanwhile
                if "relay" in child.cmdline() and any(each.status == psutil.CONN_ESTABLISHED for each in child.net_connections("tcp")):
                    child.kill()
                    return
        time.sleep(0.02)
