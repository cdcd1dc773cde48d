"""Finished runs, made once for all of pytest's processes, which the tests take copies of."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from clone import Clone, Finished


def _made_once(temporary: pytest.TempPathFactory, name: str, make: Callable[[Path], str]) -> tuple[Path, str]:
    """A directory that the first of pytest's processes to ask makes, and the output of that. Read only by agreement."""
    own = temporary.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name
    shared.mkdir(exist_ok=True)
    output = shared / "output"
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            shutil.rmtree(shared / "clone", ignore_errors=True)  # of a process whose run failed
            output.write_text(make(shared / "clone"))
    return shared / "clone", output.read_text()


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Made with many cores, since that must change nothing."""
    root, output = _made_once(tmp_path_factory, "finished", lambda root: Clone.of_repository(root).run("--cores", "8"))
    return Finished(Clone(root), output)


@pytest.fixture(scope="session")
def named_run(finished_run: Finished, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A finished clone, and in it the experiment mine over two of its modes."""
    own = "--config", "name=mine", "modes=local,remote_cache"
    return Clone(_made_once(tmp_path_factory, "named", lambda root: finished_run.clone.copy(root).run(*own))[0])


@pytest.fixture
def finished(finished_run: Finished, tmp_path: Path) -> Clone:
    """A finished clone of the test's own."""
    return finished_run.clone.copy(tmp_path / "clone")


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone in which nothing has run, for dry runs."""
    return Clone.of_repository(tmp_path_factory.mktemp("fresh") / "clone")
