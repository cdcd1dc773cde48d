"""Scratch directories that killed processes left: the next start removes them, and nobody else's."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from semgap.processes.scratch import owned_directory, scratch_directory, sweep
from semgap.wire.messages import Operation, TelemetryRequest

if TYPE_CHECKING:
    from started_workers import StartedWorker

OWNER = (
    "import sys; from semgap.processes.scratch import owned_directory; directory = owned_directory('trial'); "
    "open(directory.name + '/secret', 'w').write('s' * 64); print(directory.name, flush=True); sys.stdin.read()"
)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory for temporary files of this process and of those that it starts."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def owner(temporary: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process with a scratch directory, in which a secret lies."""
    with subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_the_directory_of_a_killed_process_is_removed_by_the_next_start(
    owner: tuple[subprocess.Popen[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    process, left = owner
    with scratch_directory("trial"):
        assert (left / "secret").exists()  # its owner lives
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and not reaped yet
    assert (left / "secret").exists()
    with scratch_directory("trial") as own:
        assert not left.exists() and own.is_dir()
    assert not own.exists()
    assert capsys.readouterr().err == f"semgap: removed {left}, which process {process.pid} left when it was killed\n"


def test_a_directory_whose_owners_pid_is_another_process_by_now_is_removed(temporary: Path) -> None:
    with owned_directory("telemetry") as name:
        machine, pid, start, random = Path(name).name.removeprefix("semgap-telemetry-").rsplit("-", 3)
        earlier = temporary / f"semgap-telemetry-{machine}-{pid}-{int(start) - 1}-{random}"
        earlier.mkdir()
        sweep()
        assert Path(name).is_dir() and not earlier.exists()


def test_what_another_machine_or_a_container_made_stays_and_so_does_all_else(temporary: Path) -> None:
    with owned_directory("trial") as name:
        boot, namespace, *rest = Path(name).name.removeprefix("semgap-trial-").split("-")
        gone = "-".join(["999999999", *rest[1:]])
        others = [f"semgap-trial-00000000-{namespace}-{gone}", f"semgap-trial-{boot}-1-{gone}"]
        others += ["semgap-trial-abc", f"other-{boot}-{namespace}-{gone}"]
        for other in others:
            (temporary / other).mkdir()
        (temporary / f"semgap-trial-{boot}-{namespace}-{gone}").symlink_to(temporary / others[0])
        sweep()
        assert sorted(path.name for path in temporary.iterdir() if path.name != Path(name).name) == sorted(
            [*others, f"semgap-trial-{boot}-{namespace}-{gone}"]
        )


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory to another user")
def test_another_users_directory_stays(temporary: Path) -> None:
    with owned_directory("trial") as name:
        left = temporary / Path(name).name.replace(f"-{os.getpid()}-", "-999999999-")
        left.mkdir()
        os.chown(left, 54321, 54321)
        sweep()
        assert left.is_dir()
        os.chown(left, 0, 0)
        sweep()
        assert not left.exists()


def test_a_killed_sessions_telemetry_is_removed_by_the_next_worker(
    temporary: Path, start_worker: Callable[..., StartedWorker], wait_until: Callable[..., None]
) -> None:
    worker = start_worker()
    link = worker.session()
    link.request(Operation.TELEMETRY, TelemetryRequest((), "start", 0.1, ("host",)))
    (session,) = worker.sessions()
    session.kill()
    wait_until(lambda: f"session {session.pid} ended with signal 9" in worker.log.read_text(), "the worker says how its session ended")
    (left,) = temporary.glob("semgap-telemetry-*")
    start_worker()
    assert not left.exists()
    link.close()
    shutil.rmtree(left, ignore_errors=True)
