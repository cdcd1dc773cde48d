"""The directory in which `semgap run` may write a trial."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from semgap.experiment.by_hand_run import require_place
from semgap.experiment.trial_schemas import TrialResult
from semgap.experiment.trial_setup import TrialError


def test_a_new_and_an_empty_directory_replace_nothing(tmp_path: Path) -> None:
    assert require_place(tmp_path) is None and require_place(tmp_path / "deep/new") is None
    assert not (tmp_path / "deep/new").exists()


def test_a_trial_that_will_be_replaced_is_told_by_its_time(tmp_path: Path) -> None:
    TrialResult({"steps": pa.table({"step": [1]})}, {"provenance": {"utc": "2026-11-23T10:00:00+00:00"}}).write(tmp_path / "trial")
    assert require_place(tmp_path / "trial") == "2026-11-23T10:00:00+00:00"
    (tmp_path / "trial/manifest.json").write_text(json.dumps([]))
    assert require_place(tmp_path / "trial") == "at a time that its damaged manifest does not tell"


def test_a_reference_that_an_earlier_version_left_beside_its_trial_is_replaced_with_it(tmp_path: Path) -> None:
    TrialResult({"steps": pa.table({"step": [1]})}, {"provenance": {"utc": "2026-11-23T10:00:00+00:00"}}).write(tmp_path / "trial")
    (tmp_path / "trial/reference.npz").write_bytes(b"")
    assert require_place(tmp_path / "trial") == "2026-11-23T10:00:00+00:00"


def test_a_directory_that_cannot_be_written_whole_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TrialError, match=rf"--output {tmp_path} holds other files \(notes\.txt\), and .*; name a new one"):
        require_place(tmp_path)
    (tmp_path / "notes.txt").unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrialError, match=r"--output \. is the working directory"):
        require_place(Path())
