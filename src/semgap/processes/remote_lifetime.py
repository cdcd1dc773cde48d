"""Ties a process to its starter without a common kernel: on another machine, or behind another program (ssh, srun)."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from typing import IO

import msgspec

from semgap.processes.pristine import Forked

SILENT_S = 15.0  # after this silence an attached process takes its starter for dead
_BEAT_S = 2.0


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first line, JSON, on an attached process's standard input.

    `secret` is the link's; `lock_boot_id` is that of the machine whose measuring lock the starter holds.
    """

    secret: str
    lock_boot_id: str


def attach(process: subprocess.Popen[bytes] | Forked, order: Order) -> None:
    """Sends an attached process its order, and then a byte every _BEAT_S while this process lives, until `detach`."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died; the wait for its address reports why
        process.stdin.write(msgspec.json.encode(order) + b"\n")
        process.stdin.flush()
    threading.Thread(target=_beat, args=(process.stdin,), daemon=True, name="attached").start()


def detach(process: subprocess.Popen[bytes] | Forked) -> None:
    """Ends an attached process by closing its input; it may have ended already."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # close flushes the beat that failed
        process.stdin.close()


def _beat(stdin: IO[bytes]) -> None:
    with contextlib.suppress(OSError, ValueError):  # the process ended, or `detach` closed its input
        while True:
            time.sleep(_BEAT_S)
            stdin.write(b"\n")
            stdin.flush()


class Attachment:
    """The attached process's side: reads the order, and watches the starter.

    Silence counts as an end too: the connection may fail without closing anything, e.g. a Slurm step when its node's slurmd dies.
    """

    def __init__(self) -> None:
        self.order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)
        self._heard_s = time.monotonic()

    def fileno(self) -> int:
        return sys.stdin.fileno()

    def has_ended(self, readable: bool) -> bool:
        """True if the input is closed, or silent for too long; `readable` as select found it."""
        if readable:
            self._heard_s = time.monotonic()
            return not os.read(self.fileno(), 4096)
        return time.monotonic() - self._heard_s > SILENT_S
