"""A trial's processes, whatever they run: each has a log, ends with the trial, and is quoted if it fails."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from semgap.client.progress import MARK
from semgap.experiment.trial_setup import TrialError
from semgap.processes.pristine import Forked, Pristine, start_python
from semgap.processes.remote_lifetime import detach
from semgap.wire.listen import ServeError, await_address

_LOG_LINES = 20
_REASON = re.compile(r"(semgap|[\w.]+(Error|Exception|Interrupt|Exit))( \w+)?: ")
_LOOK_S = 0.5  # for lines of progress
_WORKER_ENDS_S = 2.0  # from its client's request to end
_ATTACHED_ENDS_S = 10.0  # from its input's end
_SRUN_ENDS_S = 60.0  # it waits for Slurm's KillWait, 30 s if not set
_SINGLE_THREADED = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class RoleProcess:
    """A running process, by its role in the trial: 'client', 'worker', 'KV host' or 'relay'."""

    role: str
    process: subprocess.Popen[bytes] | Forked
    log_file: Path

    def await_address(self, timeout_s: float) -> str:
        """HOST:PORT that a process of semgap prints once it takes clients. TrialError if it dies or is too slow."""
        try:
            return await_address(self.process, timeout_s)
        except ServeError as error:
            raise TrialError(f"the {self.role} {error}: {self.last_words()}") from error

    def tell(self, message: bytes) -> None:
        """Writes to its input, once, and closes it. If it has ended already, the wait for its end says why."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(message)
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def await_end(self, timeout_s: float) -> None:
        """Passes its lines of progress on to stdout. TrialError if it fails, or is still running after `timeout_s`."""
        ends_s, read = time.monotonic() + timeout_s, 0
        while self._is_running(min(_LOOK_S, max(0.0, ends_s - time.monotonic()))):
            read = self._pass_on_progress(read)
            if time.monotonic() >= ends_s:
                raise TrialError(f"the {self.role} was not done within timeouts.trial_s {timeout_s:g} s: {self.last_words()}")
        if self.process.returncode:
            raise TrialError(f"the {self.role} failed (exit {self.process.returncode}): {self.last_words()}")

    def _is_running(self, wait_s: float) -> bool:
        """True if it has not ended within `wait_s`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(wait_s)
        return self.process.returncode is None

    def _pass_on_progress(self, read: int) -> int:
        """Prints the lines of progress in its log after the first `read` bytes; gives the bytes of the lines that are whole."""
        lines = self.log_file.read_bytes()[read:].rpartition(b"\n")[0].splitlines(keepends=True)
        for line in lines:
            if line.startswith(MARK.encode()):
                print(line.decode().removeprefix(MARK).rstrip(), flush=True)
        return read + sum(map(len, lines)) + bool(lines)

    def last_words(self) -> str:
        """The end of its log: from the last exception on, or the last lines."""
        log = self.log_file.read_text().rstrip().splitlines()
        lines = [line for line in log if not line.startswith(MARK)][-_LOG_LINES:]
        begins = [number for number, line in enumerate(lines) if _REASON.match(line)]
        return "\n".join(lines[begins[-1] :] if begins else lines) or "its log is empty"


@contextlib.contextmanager
def running(
    role: str,
    command: Sequence[str],
    log_file: Path,
    threads: int,
    *,
    serves: bool = False,
    attached: bool = False,
    waits: bool = False,
    pristine: Pristine | None = None,
) -> Iterator[RoleProcess]:
    """Starts a process, and ends it with this context; then its log goes to stderr.

    `serves`: stdout is a pipe, for its address. `attached`: stdin is a pipe, whose end ends it. `waits`: stdin is a pipe, for `tell`.
    `pristine`: in a workflow it is forked from a parent with that code.
    """
    pipe = subprocess.PIPE
    with log_file.open("w+") as log:
        process = start_python(
            command,
            pristine,
            stdin=pipe if attached or waits else None,
            stdout=pipe if serves else log,
            stderr=log,
            env=os.environ | threads_environment(threads),
        )
        try:
            yield RoleProcess(role, process, log_file)
        finally:
            _end(process, _WORKER_ENDS_S if role.endswith("worker") else 0, attached)
            log.seek(0)
            for line in log:
                if not line.startswith(MARK):
                    print(f"[{role}] {line.rstrip()}", file=sys.stderr, flush=True)


def _end(process: subprocess.Popen[bytes] | Forked, patience_s: float, attached: bool) -> None:
    """Waits `patience_s` for a process that should be ending, then kills it. An attached one is asked first, then srun or ssh."""
    stops: list[tuple[Callable[[], None], float | None]] = [(lambda: None, patience_s)]
    if attached:
        stops = [(lambda: detach(process), _ATTACHED_ENDS_S), (process.terminate, _SRUN_ENDS_S)]
    for stop, wait_s in (*stops, (process.kill, None)):
        stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)
            break


def threads_environment(threads: int) -> dict[str, str]:
    """Environment variables that keep libraries to the executor's threads."""
    return _SINGLE_THREADED | {"OMP_NUM_THREADS": str(threads)}
