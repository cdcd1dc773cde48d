"""Ties a process to the one that started it, so that whatever is killed leaves no orphan behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

import msgspec

_PR_SET_PDEATHSIG = 1
SILENT_S = 15.0  # after which an attached process takes the one who started it for gone
_BEAT_S = 2.0
_ENDS_IN_ORDER_S = 5.0


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


class ParentGone(RuntimeError):
    """The process that was to be the parent had ended before this one could tie itself to it."""


def end_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process (SIGKILL) when its parent ends.

    The kernel watches the *thread* that started this process (prctl(2), PR_SET_PDEATHSIG), so a parent starts
    it from a thread that outlives it. Raises `ParentGone` if the parent is already another one than
    `parent_pid`, OSError if prctl fails.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
    # A parent that ended before the call sends no signal any more.
    if os.getppid() != parent_pid:
        raise ParentGone(f"parent {parent_pid} has ended; this process now belongs to {os.getppid()}")


def end_with_workflow() -> None:
    """Has this process end at once when the Snakemake that wants its result is gone, killed even, so that a resumed run finds no rival.

    Watches every ancestor that is a snakemake, and the top one, which the Snakefile names in SEMGAP_WORKFLOW as HOST:PID,
    since that may be gone before this begins. Children that called `end_with_parent` go along. Does nothing outside a workflow.
    """
    watched = _workflow_pids()
    if not watched:
        return
    poller = select.poll()
    for pid in watched:
        try:
            poller.register(os.pidfd_open(pid), select.POLLIN)
        except ProcessLookupError:
            raise ParentGone(f"the snakemake with pid {pid} that started this job has ended") from None
    threading.Thread(target=_exit_when_one_ends, args=(poller,), daemon=True, name="end-with-workflow").start()


def _workflow_pids() -> set[int]:
    pids = {pid for pid in _ancestors() if _is_snakemake(pid)}
    host, _, pid = os.environ.get("SEMGAP_WORKFLOW", "").rpartition(":")
    return pids | {int(pid)} if host == socket.gethostname() else pids


def _ancestors() -> list[int]:
    """Pids from the parent up to init's child, as proc_pid_stat(5) gives them."""
    pids, pid = [], os.getppid()
    while pid > 1:
        pids.append(pid)
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except FileNotFoundError:
            break  # it ended while we looked; end_with_workflow's own look at SEMGAP_WORKFLOW decides
        pid = int(stat.rpartition(")")[2].split()[1])
    return pids


def _is_snakemake(pid: int) -> bool:
    try:
        return b"snakemake" in b" ".join(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:4])
    except FileNotFoundError:
        return False


def _exit_when_one_ends(poller: select.poll) -> None:
    poller.poll()
    print("semgap: the snakemake that started this job has ended; so does the job", file=sys.stderr, flush=True)
    if callable(signal.getsignal(signal.SIGTERM)):  # it can end in order
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_ENDS_IN_ORDER_S)
    os._exit(1)
