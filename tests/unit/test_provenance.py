"""Digests depend on contents alone; what cannot be known is null with a reason."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semgap.experiment import staleness
from semgap.experiment.provenance import describe_machine, describe_run, fingerprint, package_versions, session_id
from semgap.experiment.staleness import code_digest, content_digest

TEXT = st.text("ab_é☃", max_size=4)  # of all of Unicode, hypothesis first makes a table, for seconds
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=20,
)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A little package in semgap's place."""
    (tmp_path / "codecs").mkdir()
    (tmp_path / "wire.py").write_text("A = 1\n")
    (tmp_path / "codecs/raw.py").write_text("B = 2\n")
    (tmp_path / "codecs/notes.txt").write_text("no code\n")
    monkeypatch.setattr(staleness, "_SOURCE", tmp_path)
    return tmp_path


def test_a_touched_module_changes_no_digest(package: Path) -> None:
    before = code_digest(["wire.py", "codecs"])
    os.utime(package / "wire.py", (1, 1))
    (package / "codecs/notes.txt").write_text("still no code\n")
    assert code_digest(["wire.py", "codecs"]) == before


@pytest.mark.parametrize("file", ["wire.py", "codecs/raw.py"])
def test_an_edited_module_changes_the_digest_even_under_its_old_time(package: Path, file: str) -> None:
    before, times = code_digest(["wire.py", "codecs"]), (package / file).stat()
    (package / file).write_text((package / file).read_text().replace("=", "=="))
    os.utime(package / file, (times.st_atime, times.st_mtime))
    assert code_digest(["wire.py", "codecs"]) != before


def test_a_new_module_in_a_package_changes_the_digest(package: Path) -> None:
    before = code_digest(["codecs"])
    (package / "codecs/more.py").write_text("")
    assert code_digest(["codecs"]) != before


def test_text_that_moves_from_one_module_to_the_next_changes_the_digest(package: Path) -> None:
    before = code_digest(["wire.py", "codecs"])
    (package / "wire.py").write_text("A = 1\nB = ")
    (package / "codecs/raw.py").write_text("2\n")
    assert code_digest(["wire.py", "codecs"]) != before


def test_a_module_that_was_not_asked_for_does_not_count(package: Path) -> None:
    before = code_digest(["wire.py"])
    (package / "codecs/raw.py").write_text("B = 3\n")
    assert code_digest(["wire.py"]) == before


def test_the_same_files_elsewhere_have_the_same_digest(package: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    script = package / "script.py"
    script.write_text("run()\n")
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "script.py"
    elsewhere.write_text("run()\n")
    assert code_digest(["wire.py"], script) == code_digest(["wire.py"], elsewhere) != code_digest(["wire.py"])


@given(st.dictionaries(TEXT, JSON, max_size=5))
def test_the_order_of_keys_does_not_count(value: dict) -> None:  # type: ignore[type-arg]
    assert content_digest(value) == content_digest(dict(reversed(value.items())))


def test_swapped_values_count() -> None:
    assert content_digest({"seed": 1, "reps": 2}) != content_digest({"seed": 2, "reps": 1})
    assert content_digest({"a": 1}) != content_digest({"a": "1"}) != content_digest({"a": [1]})


def test_git_tells_the_commit_and_whether_the_tree_was_clean(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        return subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", ".")
    git("commit", "-qm", "one")
    assert describe_run(tmp_path)["git"] == {"commit": git("rev-parse", "HEAD").strip(), "dirty": False, "reason": None}
    (tmp_path / "file").write_text("two")
    assert describe_run(tmp_path)["git"]["dirty"] is True


def test_outside_a_repository_the_commit_is_null_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    told = describe_run(tmp_path)["git"]
    assert told["commit"] is None and told["dirty"] is None and "git does not answer here" in told["reason"]


def test_the_machine_is_described_and_a_missing_gpu_has_a_reason() -> None:
    machine = describe_machine()
    assert machine["cpus"] == os.cpu_count() and machine["host"]
    assert (machine["gpus"] is None) == (machine["gpu_reason"] is not None)


def test_the_fingerprint_changes_with_packages_machine_and_device_alone(tmp_path: Path) -> None:
    run = describe_run(tmp_path)
    same = run | {"utc": "2000-01-01T00:00:00+00:00", "command": ["other"], "git": None}
    assert fingerprint(run, "cpu") == fingerprint(same, "cpu")
    assert fingerprint(run, "cpu") != fingerprint(run, "cuda")
    assert fingerprint(run, "cpu") != fingerprint(run | {"packages": run["packages"] | {"torch": "0.1"}}, "cpu")


def test_versions_of_what_shapes_a_result_are_told() -> None:
    versions = package_versions()
    assert versions["torch"] and versions["transformers"] and versions["python"]


def test_a_workflows_session_is_kept_and_a_run_by_hand_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMGAP_SESSION", "monday")
    assert session_id() == "monday"
    monkeypatch.delenv("SEMGAP_SESSION")
    assert str(os.getpid()) in session_id()
