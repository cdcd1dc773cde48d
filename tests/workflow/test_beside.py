"""Experiments beside each other: each with its own directory, equal results shared, and runs in another directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from clone import AFTERWARDS, CONFIG, FETCH, MODES, REFERENCE, Clone, Finished, blocks, trials

pytestmark = pytest.mark.alone

NAMED = ("--config", "name=mine")
MINE = ("--configfile", CONFIG, "mine.yaml")
OFFLOADED = {"name": "mine", "define": {"modes": {"remote_cache": {"kv_cache": "offloaded"}}}}


def manifest_of(clone: Clone, mode: str, experiment: str = "results") -> dict[str, Any]:
    trial = clone.trial(mode, 1).relative_to(clone.root / "results")
    manifest: dict[str, Any] = json.loads((clone.root / experiment / trial / "manifest.json").read_text())
    return manifest


@pytest.fixture(scope="module")
def both(finished_run: Finished, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A finished clone, and in it a finished mine.yaml, which defines one of its modes differently. Read only by agreement."""
    clone = finished_run.clone.copy(tmp_path_factory.mktemp("both") / "clone")
    (clone.root / "mine.yaml").write_text(yaml.safe_dump(OFFLOADED))
    assert clone.planned(*MINE) == trials(["remote_cache"], [1, 2]) | blocks([1, 2]) | {REFERENCE, FETCH} | AFTERWARDS
    clone.run(*MINE)
    return clone


def test_a_named_experiment_makes_its_own_tables_over_the_trials_that_are_there(finished_run: Finished, named_run: Clone) -> None:
    clone = finished_run.clone
    assert clone.planned(*NAMED) == AFTERWARDS
    assert clone.planned(*NAMED, "trials=3") > trials(["local"], [3])
    own = named_run.root / "results/mine"
    assert {path.name for path in own.iterdir()} == {"results.csv", "tables", "figures", "explorer.html", "logs"}
    assert "sys_simulated" not in (own / "results.csv").read_text() and "remote_cache" in (own / "results.csv").read_text()
    before, now = ((each.root / "results/results.csv").stat().st_mtime_ns for each in (clone, named_run))  # copies keep time stamps
    assert before == now and named_run.planned() == set()


def test_two_experiments_that_define_a_mode_differently_keep_their_trials_and_share_the_others(both: Clone, finished_run: Finished) -> None:
    theirs, mine = manifest_of(both, "remote_cache"), manifest_of(both, "remote_cache", "results/mine")
    assert theirs == manifest_of(finished_run.clone, "remote_cache")
    assert (mine["cell"]["policy"]["kv_cache"], theirs["cell"]["policy"]["kv_cache"]) == ("offloaded", "resident")
    assert {path.name for path in (both.root / "results/mine/trials/model=tiny/network=loopback").iterdir()} == {"mode=remote_cache"}
    rows = pd.read_csv(both.root / "results/mine/results.csv").set_index(["mode", "trial"])["directory"]
    assert rows["remote_cache", 1].startswith("trials/") and rows["local", 1].startswith("../trials/")


def test_a_second_run_of_each_experiment_has_nothing_to_do(both: Clone) -> None:
    assert (both.planned(), both.planned(*MINE)) == (set(), set())


def test_a_block_that_is_measured_again_takes_no_trial_from_another_experiment(both: Clone) -> None:
    """Its own trial is of a later session than the shared ones."""
    again = both.planned(*MINE, "--config", "remeasure=blocks")
    assert again == trials(MODES, [1, 2]) | blocks([1, 2]) | AFTERWARDS


def test_a_model_that_is_defined_differently_is_fetched_beside_the_first_one(finished: Clone) -> None:
    changed = {"name": "mine", "define": {"models": {"tiny": {"seed": 8}}}}
    (finished.root / "mine.yaml").write_text(yaml.safe_dump(changed))
    first = (finished.root / "resources/models/tiny/digest.json").read_bytes()
    finished.run(*MINE, "--", "resources/mine/models/tiny/digest.json")
    own = json.loads((finished.root / "resources/mine/models/tiny/digest.json").read_text())
    assert (own["source"]["seed"], json.loads(first)["source"]["seed"]) == (8, 7)
    assert (finished.root / "resources/models/tiny/digest.json").read_bytes() == first and finished.planned() == set()


def test_what_a_named_experiment_measured_first_is_not_measured_again_without_a_name(finished: Clone) -> None:
    """As after a run with the name alone: its results lie under results/mine."""
    (finished.root / "results/mine").mkdir()
    for name in ("trials", "exactness", "codecs", "blocks", "reference"):
        shutil.move(finished.root / "results" / name, finished.root / "results/mine" / name)
    assert finished.planned() == AFTERWARDS
    finished.append("workflow/scripts/measure_trial.py", "\n# changed\n")
    stale = trials(MODES, [1, 2]) | blocks([1, 2]) | {REFERENCE} | AFTERWARDS
    assert finished.planned() == stale, "each experiment measures stale trials in its own directory"


def test_a_run_in_another_directory_leaves_its_results_there(fresh: Clone, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    trial = "results/trials/model=tiny/network=loopback/mode=remote_cache/phase=decode/trial=1/manifest.json"
    fresh.run("--directory", str(elsewhere), trial)
    manifest = json.loads((elsewhere / trial).read_text())
    assert manifest["exactness"]["promise_kept"] and (elsewhere / "resources/models/tiny/digest.json").exists()
    assert not (fresh.root / "results/trials").exists()
