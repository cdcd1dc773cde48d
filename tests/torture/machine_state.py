"""This machine around a campaign: its processes by a mark in their environment, and file systems and a lock of the campaign's own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Iterator
from pathlib import Path

from semgap.processes import machine

MARK = "TORTURE_CAMPAIGN"
"""In the environment of all that a campaign starts; a process hands it down to those that it starts."""
ENDS_WITHIN_S = 15.0
_CLONE_NEWNS, _MS_BIND, _MS_REC, _MS_PRIVATE, _MS_REMOUNT, _MS_RDONLY, _MNT_DETACH = 0x20000, 0x1000, 0x4000, 1 << 18, 32, 1, 2
Process = tuple[int, str]
"""A pid and its start time, as in /proc/PID/stat."""


def marked(mark: str) -> dict[Process, str]:
    """The live processes with this mark, but for this one, with their command lines. The forks of a marked process are marked too."""
    found = {}
    wanted = f"{MARK}={mark}".encode()
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # ended meanwhile
            place = Path(entry.path)
            if wanted not in (place / "environ").read_bytes().split(b"\0"):
                continue
            fields = (place / "stat").read_text(errors="replace").rpartition(")")[2].split()
            if fields[0] not in "ZX":
                found[int(entry.name), fields[19]] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return found


def orphans(mark: str, before: dict[Process, str], within_s: float = ENDS_WITHIN_S, workflow_lives: bool = True) -> list[str]:
    """The marked processes that are not of `before` and do not end in time. Ends them. A live workflow keeps its pristine parents."""
    deadline = time.monotonic() + within_s
    while True:
        left = {at: words for at, words in marked(mark).items() if at not in before}
        left = {at: words for at, words in left.items() if not (workflow_lives and is_pristine_parent(at[0], words))}
        if not left or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    for pid, _ in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)
    return [f"process {pid} was left behind: {words[:120]}" for (pid, _), words in left.items()]


def is_pristine_parent(pid: int, words: str) -> bool:
    """True for a pristine parent that a live workflow keeps. Its forks have its command line too, and its process group."""
    if "semgap.processes.pristine_parent" not in words:
        return False
    with contextlib.suppress(ProcessLookupError):
        return os.getpgid(pid) == pid
    return False


def mounts_are_mine() -> bool:
    """Gives this process file systems of its own to mount, which go with it, and a measuring lock of its own. False without the right to.

    The trials of a campaign so neither wait for other trials of this machine nor hold them up.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None):
        return False
    with contextlib.suppress(FileExistsError):
        machine.LOCK.touch(exist_ok=False)
        machine.LOCK.chmod(0o666)
    own = Path(os.environ.get("TMPDIR", "/tmp")) / f"semgap-torture-{os.getpid()}.lock"
    own.touch()
    own.chmod(0o666)
    bound = libc.mount(bytes(own), bytes(machine.LOCK), None, _MS_BIND, None) == 0
    own.unlink()
    return bound


@contextlib.contextmanager
def small_disk(place: Path, size_bytes: int) -> Iterator[Path]:
    """A tmpfs of this size. OSError without the right to mount."""
    place.mkdir(parents=True, exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", bytes(place), b"tmpfs", 0, f"size={max(4096, size_bytes)},mode=755".encode()):
        raise OSError(ctypes.get_errno(), f"cannot mount a tmpfs at {place}")
    try:
        yield place
    finally:
        libc.umount2(bytes(place), _MNT_DETACH)


def write_protect(place: Path, protect: bool) -> bool:
    """Makes the tmpfs at `place` read-only, or writable again. False while a file is open for writing."""
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.mount(b"tmpfs", bytes(place), b"tmpfs", _MS_REMOUNT | (_MS_RDONLY if protect else 0), None) == 0
