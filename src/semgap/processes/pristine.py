"""Starts a run's Python processes as forks of a pristine parent, which has imported their code and has computed nothing.

A run starts the same few programs in every trial, and imports are most of such a start. A pristine parent (pristine_parent.py) belongs to
one workflow on one machine, and to the code and packages of its start: after an edit a new one starts. A fork inherits modules, and
nothing of an earlier trial. It ends with the process that asked for it. Outside a workflow, and in Slurm's jobs, programs start anew.
"""

import contextlib
import hashlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from semgap.processes.lifetime import ENDS_IN_ORDER_S, ParentGone
from semgap.wire.waiting import ready

_SOURCE = Path(__file__).resolve().parents[1]
_STARTS_WITHIN_S = 300.0  # with empty caches a busy machine compiles for minutes
_PASSED_ON = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "PYTHONPATH", "SEMGAP_WORKFLOW", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME")


@dataclass(frozen=True)
class Pristine:
    """The code that the parent of a program's forks loads: modules `imports`, then the calls `loads` of (module, function, arguments)."""

    imports: tuple[str, ...]
    loads: tuple[tuple[str, str, tuple[str, ...]], ...] = ()

    def key(self) -> str:
        """A digest of all that its memory depends on: itself, the files of the code, the packages, the interpreter."""
        code = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(_SOURCE.rglob("*.py"))]
        packages = sorted(path.name for path in Path(sysconfig.get_paths()["purelib"]).glob("*-info"))
        environment = {name: os.environ.get(name) for name in _PASSED_ON}
        return hashlib.sha256(
            json.dumps([asdict(self), code, packages, environment, sys.executable, sys.flags.optimize]).encode()
        ).hexdigest()[:32]


class Forked:
    """A process that a pristine parent forked for this one: the part of subprocess.Popen that trials use."""

    def __init__(self, sock: socket.socket, pid: int, stdin: "IO[bytes] | None", stdout: "IO[bytes] | None") -> None:
        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        self.returncode: int | None = None
        self._sock = sock

    def poll(self) -> int | None:
        """Its exit status as of subprocess.Popen, or None while it runs."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status. subprocess.TimeoutExpired after `timeout` seconds."""
        status = self._ended(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(["fork", str(self.pid)], timeout or 0)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and ready([self._sock], timeout_s=timeout)[0]:
            said = _received(self._sock)
            self.returncode = said["status"] if said else -signal.SIGKILL  # its parent died, and it with it
            self._sock.close()
        return self.returncode


def start_python(
    command: Sequence[str],
    pristine: Pristine | None,
    *,
    stdin: int | IO[Any] | None = None,
    stdout: int | IO[Any] | None = None,
    stderr: int | IO[Any] | None = None,
    env: Mapping[str, str] | None = None,
    patience_s: float = 0,
) -> "subprocess.Popen[bytes] | Forked":
    """Starts `command`; as a fork if it is `[sys.executable, '-m', module, ...]` with a `pristine`, in a workflow of this machine.

    A stream is a descriptor, a file, subprocess.PIPE, or None for this process's own. If this process ends first, a fork gets SIGTERM, and
    SIGKILL `patience_s` later.
    """
    if pristine is None or list(command[:2]) != [sys.executable, "-m"] or not _workflow_is_here():
        return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, env=env)
    sock = _reached(pristine)
    theirs_in, ours_in = _end(stdin, 0, True)
    theirs_out, ours_out = _end(stdout, 1, False)
    theirs_err, _ = _end(stderr, 2, False)
    order = {
        "argv": list(command[2:]),
        "env": dict(env or os.environ),
        "cwd": str(Path.cwd()),
        "for": os.getpid(),
        "patience_s": patience_s,
    }
    try:
        socket.send_fds(sock, [json.dumps(order).encode()], [theirs_in, theirs_out, theirs_err])
        said = _received(sock)
    finally:
        for theirs, ours in ((theirs_in, ours_in), (theirs_out, ours_out)):
            if ours is not None:
                os.close(theirs)
    if said is None:
        raise RuntimeError("the pristine parent ended before it forked; its last words are above")
    return Forked(sock, said["pid"], ours_in, ours_out)


def run_program(module: str, order: Mapping[str, Any]) -> None:
    """Runs `python -m module` with `order` on its standard input as JSON, and `parent`, this process; ends this process if it fails.

    In a workflow it is a fork. SIGTERM goes on to it: it ends in order.
    """
    process = start_python([sys.executable, "-m", module], Pristine((module,)), stdin=subprocess.PIPE, patience_s=ENDS_IN_ORDER_S)
    signal.signal(signal.SIGTERM, lambda *_: _terminate(process.pid))  # not process.terminate, which `wait` below is in the middle of
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
        stdin.write(json.dumps({**order, "parent": os.getpid()}).encode())
    status = process.wait()
    if status:
        sys.exit(status if status > 0 else 128 - status)


def _terminate(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


def _workflow_is_here() -> bool:
    """True in a job of a Snakemake on this machine that lives. A Slurm job is one trial alone: nothing to share a parent with."""
    host, _, pid = os.environ.get("SEMGAP_WORKFLOW", "").rpartition(":")
    return host == socket.gethostname() and "SLURM_JOB_ID" not in os.environ and Path(f"/proc/{pid}").exists()


def _reached(pristine: Pristine) -> socket.socket:
    """A connection to the pristine parent, which is started if it is not there. ParentGone if the workflow ends meanwhile."""
    workflow = os.environ["SEMGAP_WORKFLOW"].rpartition(":")[2]
    address = f"\0semgap-pristine/{os.getuid()}/{workflow}/{pristine.key()}"
    deadline = time.monotonic() + _STARTS_WITHIN_S
    started: subprocess.Popen[bytes] | None = None
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.connect(address)
        except ConnectionRefusedError:
            sock.close()
        else:
            _require_own(sock)
            return sock
        if started is None:
            started = _start_parent(address, int(workflow), pristine)
        if (started.poll() or 0) != 0 or time.monotonic() > deadline:
            raise RuntimeError(
                f"the pristine parent of {', '.join(pristine.imports)} did not start (exit {started.poll()}); its words are above"
            )
        if not _workflow_is_here():  # a parent that starts now ends by itself
            raise ParentGone(f"the snakemake with pid {workflow} that started this job has ended")
        time.sleep(0.005)


def _start_parent(address: str, workflow: int, pristine: Pristine) -> "subprocess.Popen[bytes]":
    """Starts a parent, single-threaded and out of reach of Ctrl-C; its words go to this process's stderr.

    Of two that start at once, one takes the address and the other ends.
    """
    order = {"address": address, "workflow": workflow, **asdict(pristine)}
    single = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "semgap.processes.pristine_parent", json.dumps(order)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, env=os.environ | single, process_group=0)


def _require_own(sock: socket.socket) -> None:
    """RuntimeError if another user's process listens at the address."""
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid != os.getuid():
        sock.close()
        raise RuntimeError(f"a process of user {uid} listens where this user's pristine parent should; end it")


def _end(stream: int | IO[Any] | None, inherited: int, reads: bool) -> "tuple[int, IO[bytes] | None]":
    """The fork's descriptor of a stream, and this side of it if it is a pipe."""
    if stream == subprocess.PIPE:
        read, write = os.pipe()
        return (read, os.fdopen(write, "wb")) if reads else (write, os.fdopen(read, "rb"))
    if stream is None:
        return inherited, None
    return (stream if isinstance(stream, int) else stream.fileno()), None


def _received(sock: socket.socket) -> dict[str, Any] | None:
    """The parent's next word, or None if it is gone."""
    try:
        data = sock.recv(4096)
    except ConnectionResetError:
        return None
    return json.loads(data) if data else None
