"""One finished run a session, which the tests take copies of."""

from __future__ import annotations

from pathlib import Path

import pytest
from clone import Clone, Finished


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Made with many cores, since that must change nothing. Read only by agreement."""
    clone = Clone.of_repository(tmp_path_factory.mktemp("finished") / "clone")
    return Finished(clone, clone.run("--cores", "8"))


@pytest.fixture
def finished(finished_run: Finished, tmp_path: Path) -> Clone:
    """A finished clone of the test's own."""
    return finished_run.clone.copy(tmp_path / "clone")


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone in which nothing has run, for dry runs."""
    return Clone.of_repository(tmp_path_factory.mktemp("fresh") / "clone")
