"""Forks of a pristine parent: they run as programs of their own, see nothing of each other, and leave no orphan."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from semgap.processes import pristine
from semgap.processes.pristine import Forked, Pristine, start_python


@pytest.fixture
def workflow(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands for Snakemake: it lives until the test ends it."""
    with subprocess.Popen(["sleep", "600"]) as process:
        monkeypatch.setenv("SEMGAP_WORKFLOW", f"{socket.gethostname()}:{process.pid}")
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        yield process
        process.kill()


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pristine:
    """A package `toy` on PYTHONPATH: `toy.state`, which is loaded before, and the programs `toy.tell` and `toy.hang`."""
    package = tmp_path / "toy"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "state.py").write_text("import os\nseen = []\nloaded_by = os.getpid()\n\ndef note(word):\n    seen.append(word)\n")
    tell = """
        import json, os, sys
        from toy import state
        state.note(sys.argv[1])
        print(json.dumps({"seen": state.seen, "loaded_by": state.loaded_by, "pid": os.getpid(), "cwd": os.getcwd(),
                          "word": os.environ.get("WORD"), "read": sys.stdin.read(), "fds": sorted(map(int, os.listdir("/proc/self/fd")))}))
        os.environ["LEFT"] = "behind"
        sys.exit(int(sys.argv[2]))
    """
    (package / "tell.py").write_text(textwrap.dedent(tell))
    (package / "hang.py").write_text("import time\nprint('up', flush=True)\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    return Pristine(("toy.state",), (("toy.state", "note", ("loaded",)),))


def tell(programs: Pristine, word: str, status: int = 0, read: bytes = b"", **environment: str) -> tuple[int, dict]:
    command = [sys.executable, "-m", "toy.tell", word, str(status)]
    pipe = subprocess.PIPE
    process = start_python(command, programs, stdin=pipe, stdout=pipe, env=os.environ | environment)
    assert isinstance(process, Forked)
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin as stdin, process.stdout as stdout:
        stdin.write(read)
        stdin.close()
        told = json.loads(stdout.read())
    return process.wait(30), told


def test_a_fork_runs_its_program_with_its_arguments_streams_and_environment(workflow: object, programs: Pristine) -> None:
    status, told = tell(programs, "one", 7, b"input", WORD="given")
    assert (status, told["word"], told["read"], told["cwd"]) == (7, "given", "input", str(Path.cwd()))
    assert told["pid"] != told["loaded_by"]
    assert [fd for fd in told["fds"] if fd > 3] == []  # 3 is the listing's own


def test_a_fork_has_the_loaded_code_and_nothing_of_the_fork_before_it(workflow: object, programs: Pristine) -> None:
    (_, first), (_, second) = tell(programs, "one", LEFT="first"), tell(programs, "two")
    assert first["loaded_by"] == second["loaded_by"]
    assert (first["seen"], second["seen"]) == (["loaded", "one"], ["loaded", "two"])


def test_code_that_changed_gets_a_parent_of_its_own(tmp_path: Path, programs: Pristine, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "module.py").write_text("a = 1\n")
    monkeypatch.setattr(pristine, "_SOURCE", source)
    before = programs.key()
    assert programs.key() == before
    (source / "module.py").write_text("a = 12\n")
    assert programs.key() != before


def test_a_fork_ends_with_the_process_that_asked_for_it(workflow: object, programs: Pristine) -> None:
    code = f"""
import os, sys, time
from semgap.processes.pristine import Pristine, start_python
process = start_python([sys.executable, "-m", "toy.hang"], {programs!r}, stdout=open(os.devnull, "w"))
print(process.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as requester:
        assert requester.stdout is not None
        pid = int(requester.stdout.readline())
        ran = runs(pid)
        requester.send_signal(signal.SIGKILL)
    assert ran
    wait_until(lambda: not runs(pid))


def test_a_requester_whose_workflow_is_killed_while_its_parent_starts_ends_at_once(
    workflow: subprocess.Popen[bytes], programs: Pristine, tmp_path: Path
) -> None:
    (tmp_path / "toy/slow.py").write_text("import sys, time\nprint('loading', file=sys.stderr, flush=True)\ntime.sleep(5)\n")
    code = "import sys; from semgap.processes.pristine import Pristine, start_python; "
    code += "start_python([sys.executable, '-m', 'toy.slow'], Pristine(('toy.slow',)))"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as requester:
        assert requester.stderr is not None
        assert requester.stderr.readline() == "loading\n"
        workflow.kill()
        workflow.wait()
        assert requester.wait(15) == 1
        last = requester.stderr.read().splitlines()[-1]
    assert last == f"semgap.processes.lifetime.ParentGone: the snakemake with pid {workflow.pid} that started this job has ended"


def test_a_parent_that_still_loads_ends_with_its_workflow_whatever_becomes_of_its_requester(
    workflow: subprocess.Popen[bytes], programs: Pristine, tmp_path: Path
) -> None:
    (tmp_path / "toy/endless.py").write_text("import os, sys, time\nprint(os.getpid(), file=sys.stderr, flush=True)\ntime.sleep(600)\n")
    code = "import sys; from semgap.processes.pristine import Pristine, start_python; "
    code += "start_python([sys.executable, '-m', 'toy.endless'], Pristine(('toy.endless',)))"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as requester:
        assert requester.stderr is not None
        parent = int(requester.stderr.readline())
        requester.kill()
        requester.wait()
        assert runs(parent)  # others of its workflow may wait for it
        workflow.kill()
        workflow.wait()
        wait_until(lambda: not runs(parent))


def test_a_parent_that_has_loaded_has_one_thread(workflow: object, programs: Pristine) -> None:
    _, told = tell(programs, "one")
    assert psutil.Process(told["loaded_by"]).num_threads() == 1


def test_a_requester_that_is_gone_before_its_answer_harms_nobody(workflow: object, programs: Pristine) -> None:
    _, told = tell(programs, "one")
    for _ in range(5):
        sock = pristine._reached(programs)
        order = {"argv": ["toy.hang"], "env": dict(os.environ), "cwd": str(Path.cwd()), "for": os.getpid(), "patience_s": 0}
        with Path(os.devnull).open("r+b") as null:
            socket.send_fds(sock, [json.dumps(order).encode()], [null.fileno()] * 3)
        sock.close()
    assert tell(programs, "two")[1]["loaded_by"] == told["loaded_by"]
    wait_until(lambda: not psutil.Process(told["loaded_by"]).children())


def test_parent_and_forks_end_with_the_workflow(workflow: subprocess.Popen[bytes], programs: Pristine) -> None:
    _, told = tell(programs, "one")
    process = hanging(programs)
    workflow.kill()
    workflow.wait()
    assert process.wait(30) == -signal.SIGKILL
    wait_until(lambda: not runs(told["loaded_by"]))


def test_a_fork_whose_parent_was_killed_ends_too_and_the_next_one_gets_a_new_parent(workflow: object, programs: Pristine) -> None:
    _, told = tell(programs, "one")
    process = hanging(programs)
    os.kill(told["loaded_by"], signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    wait_until(lambda: not runs(process.pid))
    assert tell(programs, "two")[1]["loaded_by"] != told["loaded_by"]


def test_a_patient_fork_may_end_in_order(workflow: subprocess.Popen[bytes], programs: Pristine, tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    (tmp_path / "toy/orderly.py").write_text(
        f"import pathlib, signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(pathlib.Path({str(ended)!r}).touch()))\n"
        "print('up', flush=True)\ntime.sleep(600)\n"
    )
    process = start_python([sys.executable, "-m", "toy.orderly"], programs, stdout=subprocess.PIPE, patience_s=30)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    workflow.kill()
    workflow.wait()
    wait_until(ended.exists)


def test_code_that_cannot_be_loaded_is_named(workflow: object) -> None:
    with pytest.raises(RuntimeError, match=r"pristine parent of toy.none did not start \(exit 1\)"):
        start_python([sys.executable, "-m", "toy.none"], Pristine(("toy.none",)))


def test_outside_a_workflow_programs_start_anew(programs: Pristine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEMGAP_WORKFLOW", raising=False)
    process = start_python([sys.executable, "-c", "pass"], programs)
    assert isinstance(process, subprocess.Popen)
    assert process.wait() == 0


def hanging(programs: Pristine) -> Forked:
    process = start_python([sys.executable, "-m", "toy.hang"], programs, stdout=subprocess.PIPE)
    assert isinstance(process, Forked)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    assert process.poll() is None
    return process


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not so within {timeout_s} s"
        time.sleep(0.02)
