"""This machine: its identity, its packages, its cores, and its one measuring lock."""

import contextlib
import fcntl
import importlib.metadata
import os
import resource
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

LOCK = Path("/tmp/semgap-measure.lock")  # one for all users
CORES_AT_START = frozenset(os.sched_getaffinity(0))  # of this process or of the one that forked it, before a trial pinned it to fewer


def boot_id() -> str:
    """The id of this boot. Processes with the same id share CLOCK_MONOTONIC, the cores and the measuring lock."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def identity() -> dict[str, str | None]:
    """This machine for a manifest: host name, Slurm node name (None outside Slurm), and `boot_id`."""
    return {"host": socket.gethostname(), "node": os.environ.get("SLURMD_NODENAME"), "boot_id": boot_id()}


def package_version(name: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def peak_rss_bytes() -> int:
    """This process's highest resident memory, from /proc/self/status (getrusage would give its parent's)."""
    return _status_bytes("VmHWM")


def memory_left_bytes() -> int:
    """Bytes that this process can still allocate: what the machine has free, or the rest of a limit (`ulimit -v`, `ulimit -d`)."""
    import psutil  # late: the samplers' starters and the relay need none of it

    left = [psutil.virtual_memory().available]
    for limit, field in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most = resource.getrlimit(limit)[0]
        if most != resource.RLIM_INFINITY:
            left.append(max(0, most - _status_bytes(field)))
    return min(left)


def out_of_memory(error: MemoryError) -> str:
    """The message for a MemoryError, which often has none: what this process holds, what it may hold, and the way out."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    may = "any amount" if limit == resource.RLIM_INFINITY else f"{limit:,} bytes (ulimit -v)"
    held = f"it holds {_status_bytes('VmSize'):,} bytes of address space and may hold {may}"
    return f"memory ran out: {str(error) or 'the error names no size'}; {held}. Raise the limit or use a smaller model, dtype or max_length"


def _status_bytes(field: str) -> int:
    """A size of this process in /proc/self/status."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(f"{field}:")))


def split_cores(threads: int, computing: tuple[int, ...] = (), thin: tuple[int, ...] = ()) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The cores for computing and for everything else: as given, or the last `threads` of this process's cores, and the rest.

    Both are the same if no core is left. ValueError for cores that this process may not use.
    """
    allowed = sorted(os.sched_getaffinity(0))
    computing = computing or tuple(allowed[-threads:])
    thin = thin or tuple(core for core in allowed if core not in computing) or computing
    absent = sorted({*computing, *thin} - set(allowed))
    if absent:
        raise ValueError(f"cores {absent} are not among this process's, {allowed}")
    return computing, thin


@contextlib.contextmanager
def measuring() -> Iterator[None]:
    """Holds the machine's measuring lock: one trial at a time, across workflows and users."""
    with contextlib.suppress(FileExistsError):
        LOCK.touch(exist_ok=False)
        LOCK.chmod(0o666)  # for other users too, despite the umask
    with LOCK.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("semgap: another trial measures on this machine; waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
