"""Processes end with their owners, however these end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

WATCHER = """
import sys, time
from semgap.processes.lifetime import ParentGone, end_with_parent, end_with_workflow
{begin}
print("watching", flush=True)
time.sleep(60)
"""
Wait = Callable[..., None]


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def _watch(begin: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WATCHER.format(begin=begin)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "SEMGAP_WORKFLOW"} | environment,
    )


def _finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    process.kill()
    _, err = process.communicate()
    return process.returncode, err


def test_a_job_ends_when_its_workflow_is_killed(sleeper: subprocess.Popen[bytes]) -> None:
    job = _watch("end_with_workflow()", SEMGAP_WORKFLOW=f"{socket.gethostname()}:{sleeper.pid}")
    assert job.stdout is not None and job.stdout.readline() == "watching\n"
    assert job.poll() is None
    sleeper.kill()
    sleeper.wait()
    assert job.wait(10) == 1
    assert "the snakemake that started this job has ended" in _finish(job)[1]


def test_a_job_whose_workflow_has_ended_already_does_not_begin(sleeper: subprocess.Popen[bytes]) -> None:
    sleeper.kill()
    sleeper.wait()
    job = _watch("end_with_workflow()", SEMGAP_WORKFLOW=f"{socket.gethostname()}:{sleeper.pid}")
    assert job.wait(20) == 1
    assert f"ParentGone: the snakemake with pid {sleeper.pid}" in _finish(job)[1]


@pytest.mark.parametrize("workflow", ["", "another-host:1", "another-host:4194000"])
def test_a_job_of_another_host_or_of_no_workflow_goes_on(workflow: str) -> None:
    job = _watch("end_with_workflow()", SEMGAP_WORKFLOW=workflow)
    assert job.stdout is not None and job.stdout.readline() == "watching\n"
    assert _finish(job)[0] == -signal.SIGKILL


def test_a_job_ends_with_an_ancestor_that_is_a_snakemake(tmp_path: Path, wait_until: Wait) -> None:
    """The test's own process stands above a script whose name is snakemake, which starts a shell, which starts the job."""
    job = tmp_path / "job.py"
    job.write_text(WATCHER.format(begin="import os; print(os.getpid(), flush=True); end_with_workflow()"))
    script = tmp_path / "snakemake"
    script.write_text(f"import subprocess, sys\nsubprocess.run(['sh', '-c', '{sys.executable} {job}; true'])\n")
    workflow = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert workflow.stdout is not None
    pid = int(workflow.stdout.readline())
    assert workflow.stdout.readline() == "watching\n"
    workflow.kill()
    workflow.wait()
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, "the job ends")
    workflow.stdout.close()


def test_a_child_ends_with_its_parent(tmp_path: Path, wait_until: Wait) -> None:
    child = WATCHER.format(begin="import os; end_with_parent(int(sys.argv[1])); print(os.getpid(), flush=True)")
    (tmp_path / "child.py").write_text(child)
    parent_script = f"import os, subprocess, sys; subprocess.run([sys.executable, {str(tmp_path / 'child.py')!r}, str(os.getpid())])"
    parent = subprocess.Popen([sys.executable, "-c", parent_script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, "the child ends")
    parent.stdout.close()


def test_a_child_whose_parent_is_another_process_does_not_begin() -> None:
    child = _watch("end_with_parent(1 << 21)")
    assert child.wait(20) == 1
    assert "ParentGone: parent 2097152 has ended" in _finish(child)[1]
