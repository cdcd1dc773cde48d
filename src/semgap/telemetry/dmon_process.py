"""`nvidia-smi dmon` as a child that ends with its parent."""

import contextlib
import functools
import os
import pty
import signal
import subprocess
import tty
from dataclasses import dataclass, field

from semgap.processes.lifetime import end_with_parent
from semgap.telemetry.dmon import DmonFormatError, DmonParser
from semgap.telemetry.samples import Row

DMON_METRICS = "pucvmet"
_READ_BYTES = 65536


@dataclass(frozen=True)
class DmonProcess:
    """A running dmon, the file descriptor of its output, and one that becomes readable when dmon ends.

    The end of the output is no sign of that: a child of dmon may hold it open.
    """

    process: "subprocess.Popen[bytes]"
    output_fd: int
    ended_fd: int

    def read(self) -> bytes:
        """Reads output; blocks until there is some. b'' at its end."""
        try:
            return os.read(self.output_fd, _READ_BYTES)
        except OSError:
            # A pseudo-terminal gives EIO at its end; a pipe would give b"".
            return b""

    def end(self, grace_s: float = 2.0) -> int:
        """Ends dmon and its children, waits, and gives its exit status (negative: the signal)."""
        for number in (signal.SIGTERM, signal.SIGKILL):  # the second ends children that outlive it, too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace_s)
        os.close(self.output_fd)
        os.close(self.ended_fd)
        return self.process.wait()


def start_dmon(executable: str, gpu_index: int) -> DmonProcess:
    """Runs `nvidia-smi dmon -d 1` (it takes whole seconds only) on one GPU (NVML's index), in its own process group.

    Its output is a pseudo-terminal: in a pipe, lines would wait in dmon's buffer and get late stamps, or be lost at the end.
    """
    output_fd, terminal_fd = pty.openpty()
    tty.setraw(terminal_fd)
    command = [executable, "dmon", "-s", DMON_METRICS, "-d", "1", "-i", str(gpu_index)]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=terminal_fd,
            stderr=terminal_fd,
            process_group=0,
            # Runs between fork and exec, which a sampler process may use: it has one thread. The tie survives exec.
            preexec_fn=functools.partial(end_with_parent, os.getpid()),
        )
    finally:
        os.close(terminal_fd)
    return DmonProcess(process, output_fd, os.pidfd_open(process.pid))


@dataclass
class DmonLines:
    """Turns chunks of dmon's output into samples. A line with an error goes to `problems`."""

    parser: DmonParser = field(default_factory=DmonParser)
    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    _rest: bytes = b""

    def feed(self, chunk: bytes, t_s: float) -> None:
        """Takes a chunk that arrived at `t_s`. A line counts when its end has arrived."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            try:
                row = self.parser.feed(line.decode(errors="replace"))
            except DmonFormatError as error:
                self.problems.append(str(error))
                continue
            if row is not None:
                self.rows.append({"t_s": t_s, **row})
