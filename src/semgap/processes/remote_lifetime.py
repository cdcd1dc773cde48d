"""Ties a process to the one that started it where no kernel watches both: on another machine, or behind another program."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from typing import IO

import msgspec

SILENT_S = 15.0  # after which an attached process takes the one who started it for gone
_BEAT_S = 2.0


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first line, JSON, that an attached process reads from its standard input: one on another machine, or behind another program.

    `secret` is the link's; `lock_boot_id` names the machine whose measuring lock the starter holds already.
    """

    secret: str
    lock_boot_id: str


def attach(process: subprocess.Popen[bytes], order: Order) -> None:
    """Sends an attached process its order, and a byte now and then as long as this process lives and has not closed its input."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died; whoever waits for its address finds out why
        process.stdin.write(msgspec.json.encode(order) + b"\n")
        process.stdin.flush()
    threading.Thread(target=_beat, args=(process.stdin,), daemon=True, name="attached").start()


def detach(process: subprocess.Popen[bytes]) -> None:
    """Closes an attached process's input, which tells it to end; it may be gone already."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # what a beat could not write any more is tried again
        process.stdin.close()


def _beat(stdin: IO[bytes]) -> None:
    with contextlib.suppress(OSError, ValueError):  # the process, or its input, was ended
        while True:
            time.sleep(_BEAT_S)
            stdin.write(b"\n")
            stdin.flush()


class Attachment:
    """The attached process's end: whether whoever started it still wants it.

    What lies between the two may fail without closing anything: Slurm's step does when its node's slurmd is gone, so silence counts too.
    """

    def __init__(self) -> None:
        self.order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)
        self._heard_s = time.monotonic()

    def fileno(self) -> int:
        return sys.stdin.fileno()

    def has_ended(self, readable: bool) -> bool:
        """Whether the input is closed or has been silent for too long; `readable` as select told."""
        if readable:
            self._heard_s = time.monotonic()
            return not os.read(self.fileno(), 4096)
        return time.monotonic() - self._heard_s > SILENT_S
