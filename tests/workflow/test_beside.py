"""Experiments beside each other: tables of their own over shared trials, and runs in another directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from clone import AFTERWARDS, Clone, trials

pytestmark = pytest.mark.alone


def test_a_named_experiment_makes_its_own_tables_over_the_trials_that_are_there(finished: Clone) -> None:
    assert finished.planned("--config", "name=mine") == AFTERWARDS
    assert finished.planned("--config", "name=mine", "trials=3") > trials(["local"], [3])
    before = (finished.root / "results/results.csv").stat().st_mtime_ns
    finished.run("--config", "name=mine", "modes=local,remote_cache")
    own = finished.root / "results/mine"
    assert {path.name for path in own.iterdir()} == {"results.csv", "tables", "figures", "logs"}
    assert "sys_simulated" not in (own / "results.csv").read_text() and "remote_cache" in (own / "results.csv").read_text()
    assert (finished.root / "results/results.csv").stat().st_mtime_ns == before
    assert finished.planned() == set()


def test_a_run_in_another_directory_leaves_its_results_there(fresh: Clone, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    trial = "results/trials/model=tiny/network=loopback/mode=remote_cache/phase=decode/trial=1/manifest.json"
    fresh.run("--directory", str(elsewhere), trial)
    manifest = json.loads((elsewhere / trial).read_text())
    assert manifest["exactness"]["promise_kept"] and (elsewhere / "resources/models/tiny/digest.json").exists()
    assert not (fresh.root / "results/trials").exists()
