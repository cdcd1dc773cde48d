"""Scratch directories. A killed process leaves its own, a trial's with the secret: the next start on this machine removes it.

Its name says whose it is: semgap-PURPOSE-BOOT-NAMESPACE-PID-START-RANDOM, START as in /proc/PID/stat. A pid alone may be another process's
by now, and in another pid namespace (a container with the same /tmp) it means nothing.
"""

import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from semgap.processes.machine import boot_id

_NAME = re.compile(r"semgap-[a-z]+-(?P<machine>[0-9a-f]{8}-\d+)-(?P<pid>\d+)-(?P<start>\d+)-\w+")


@contextlib.contextmanager
def scratch_directory(purpose: str) -> Iterator[Path]:
    """A new directory of this process, which goes with the context. First sweeps those that killed processes left."""
    sweep()
    with owned_directory(purpose) as name:
        yield Path(name)


def owned_directory(purpose: str) -> tempfile.TemporaryDirectory[str]:
    """A new directory that a sweep removes once this process is gone. `purpose` is one word of small letters."""
    return tempfile.TemporaryDirectory(prefix=f"semgap-{purpose}-{_machine()}-{os.getpid()}-{_start(os.getpid())}-")


def sweep() -> None:
    """Removes this user's scratch directories whose owners are gone. Those of another user, boot or pid namespace stay."""
    machine = _machine()
    for entry in os.scandir(tempfile.gettempdir()):
        named = _NAME.fullmatch(entry.name)
        if named is None or named["machine"] != machine or _start(int(named["pid"])) == named["start"]:
            continue
        with contextlib.suppress(FileNotFoundError):  # another sweep was first
            if entry.is_dir(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_uid == os.getuid():
                shutil.rmtree(entry.path, ignore_errors=True)
                if not Path(entry.path).exists():
                    print(
                        f"semgap: removed {entry.path}, which process {named['pid']} left when it was killed", file=sys.stderr, flush=True
                    )


def _machine() -> str:
    """This boot, and this process's pid namespace."""
    return f"{boot_id()[:8]}-{Path('/proc/self/ns/pid').stat().st_ino}"


def _start(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None if it is gone, or is only waiting to be reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]
