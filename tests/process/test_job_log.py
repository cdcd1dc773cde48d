"""A job's output, and its children's, goes to its log; the reason of a failure also to the original stderr."""

import signal
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import subprocess, sys
from semgap.processes.job_log import log_to
print("before", flush=True)
with log_to({log!r}):
    print("said")
    print("complained", file=sys.stderr)
    subprocess.run([sys.executable, "-c", "import sys; print('child said'); print('child complained', file=sys.stderr)"])
    {last}
print("after")
"""


def _run(log: Path, last: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", SCRIPT.format(log=str(log), last=last)], capture_output=True, text=True, timeout=60)


def test_what_the_process_and_its_children_say_goes_to_the_log_alone(tmp_path: Path) -> None:
    done = _run(tmp_path / "new/directory/job.log", "pass")
    assert (done.returncode, done.stdout, done.stderr) == (0, "before\nafter\n", "")
    lines = (tmp_path / "new/directory/job.log").read_text().splitlines()
    assert sorted(lines) == ["child complained", "child said", "complained", "said"]


def test_a_failure_is_told_in_one_paragraph_and_its_traceback_logged(tmp_path: Path) -> None:
    done = _run(tmp_path / "job.log", "raise ValueError('mode x is wrong')")
    assert done.returncode == 1
    assert (done.stdout, done.stderr) == ("before\n", "ValueError: mode x is wrong\n")
    log = (tmp_path / "job.log").read_text()
    assert "Traceback" in log and "ValueError: mode x is wrong" in log and "child said" in log


def test_a_rerun_starts_the_log_afresh(tmp_path: Path) -> None:
    (tmp_path / "job.log").write_text("of an earlier run\n")
    _run(tmp_path / "job.log", "pass")
    assert "earlier" not in (tmp_path / "job.log").read_text()


def test_a_sigterm_ends_the_job_in_order(tmp_path: Path) -> None:
    last = "import os, signal, tempfile; d = tempfile.TemporaryDirectory(); print(d.name); os.kill(os.getpid(), signal.SIGTERM)"
    done = _run(tmp_path / "job.log", last)
    lines = (tmp_path / "job.log").read_text().splitlines()
    assert done.returncode == 128 + signal.SIGTERM and "after" not in done.stdout
    assert lines[-1] == "semgap: ended by SIGTERM"
    assert not Path(lines[-2]).exists()
