"""Ties a process to the one that started it: a killed process leaves no orphans."""

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1
ENDS_IN_ORDER_S = 75.0  # srun alone may take a minute to end a step


_forked_for: int | None = None  # in a fork of a pristine parent: the process that asked for it


class ParentGone(RuntimeError):
    """The parent ended before this process could tie itself to it."""


def tie_fork(requester: int) -> None:
    """In a fork of a pristine parent: ends with that parent by the kernel, and with `requester` by the parent, which watches it."""
    global _forked_for
    end_with_parent(os.getppid())
    _forked_for = requester


def end_with_parent(parent_pid: int) -> None:
    """Makes the kernel kill this process (SIGKILL) when its parent ends.

    The kernel watches the *thread* that started this process (prctl(2), PR_SET_PDEATHSIG), so that thread must live as long as the
    parent. ParentGone if the parent is no longer `parent_pid`, OSError if prctl fails. A fork of a pristine parent is tied already.
    """
    if _forked_for == parent_pid:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
    # A parent that ended before the call sends no signal.
    if os.getppid() != parent_pid:
        raise ParentGone(f"parent {parent_pid} has ended; this process now belongs to {os.getppid()}")


def end_with_workflow() -> None:
    """Ends this process when its Snakemake ends, even if killed: a resumed run finds no rival. Does nothing outside a workflow.

    Watches every ancestor that is a snakemake, and the top one by its HOST:PID in SEMGAP_WORKFLOW (set by the Snakefile): it may have
    ended already. Children that called `end_with_parent` end too. ParentGone if a snakemake has ended already.
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
    import psutil  # late: only jobs of a workflow need it

    pids = set()
    with contextlib.suppress(psutil.NoSuchProcess):  # an ancestor has just ended; SEMGAP_WORKFLOW decides
        for ancestor in psutil.Process().parents():
            if "snakemake" in " ".join(ancestor.cmdline()[:4]):
                pids.add(ancestor.pid)
    host, _, pid = os.environ.get("SEMGAP_WORKFLOW", "").rpartition(":")
    return pids | {int(pid)} if host == socket.gethostname() else pids


def _exit_when_one_ends(poller: select.poll) -> None:
    poller.poll()
    print("semgap: the snakemake that started this job has ended; so does the job", file=sys.stderr, flush=True)
    if callable(signal.getsignal(signal.SIGTERM)):  # the job can end in order
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ENDS_IN_ORDER_S)
    os._exit(1)
