"""A change reruns just what depends on it, by content: one test a row of that table, as dry runs over a finished run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from clone import AFTERWARDS, CODECS, COMPARED, DUMP, MODES, REFERENCE, Clone, blocks, checks, trials

REMOTE = ("remote_cache", "sys_simulated")
CHECKED = ("local", "sys_simulated")  # the trials of the other mode compare every bit
COMMENT = "\n# changed\n"
EVERY_TRIAL = {REFERENCE, COMPARED} | checks(CHECKED) | trials(MODES, [1, 2])


def test_a_finished_run_has_nothing_to_do(finished: Clone) -> None:
    assert finished.planned() == set()


@pytest.mark.parametrize("touched", ["", "resources", "results"])
def test_touched_files_of_the_same_content_rerun_nothing(finished: Clone, touched: str) -> None:
    """All at once: scripts, modules, Snakefile, rules, prompts and config; the model; what trials and blocks left."""
    files = [path for path in (finished.root / touched).rglob("*") if path.is_file()]
    parts = {".snakemake", *({"resources", "results"} if touched == "" else ())}
    for path in files:
        if not parts & set(path.relative_to(finished.root).parts):
            path.touch()
    assert finished.planned() == set()


def test_results_copied_to_a_fresh_clone_with_snakemakes_memory_rerun_nothing(finished: Clone, tmp_path: Path) -> None:
    clone = finished.fresh(tmp_path / "fresh")
    for name in ("results", ".snakemake", "resources/models"):  # the model last, so that it is newer than what was made of it
        shutil.copytree(finished.root / name, clone.root / name, copy_function=shutil.copyfile)
    assert clone.planned() == set()


def test_without_snakemakes_memory_aggregation_refuses_a_trial_of_another_policy(finished: Clone) -> None:
    shutil.rmtree(finished.root / ".snakemake")
    (finished.root / "results/results.csv").unlink()
    finished.configure({"define": {"modes": {"sys_simulated": {"codec": {"reply": "fp16"}}}}})
    assert finished.planned("results/results.csv") == {"collecting the trials"}
    done = finished.snakemake("results/results.csv")
    stale = finished.trial("sys_simulated", 1).relative_to(finished.root)
    assert done.returncode == 1
    assert f"StaleTrialError: trial {stale} is stale" in done.stdout
    assert not (finished.root / "results/results.csv").exists()


@pytest.mark.parametrize(
    ("changed", "stale"),
    [
        ("src/semgap/analysis/figures/latency.py", {"plotting the figures"}),
        ("workflow/scripts/plot_figures.py", {"plotting the figures"}),
        ("src/semgap/analysis/explorer/page.js", {"making the explorer"}),
        ("src/semgap/analysis/tables/summary.py", {"making the tables", "plotting the figures"}),
        ("src/semgap/analysis/tables/ladder.py", {"making the tables", "plotting the figures"}),
        ("src/semgap/analysis/load.py", AFTERWARDS),
        ("src/semgap/experiment/measure_codecs.py", {CODECS, "making the tables", "plotting the figures"}),
        ("src/semgap/experiment/dump_tensors.py", {DUMP, CODECS, "making the tables", "plotting the figures"}),
        ("src/semgap/codecs/base.py", {CODECS} | checks(["sys_simulated"]) | trials(REMOTE, [1, 2]) | AFTERWARDS),
        ("src/semgap/codecs/cast.py", {CODECS} | checks(["sys_simulated"]) | trials(["sys_simulated"], [1, 2]) | AFTERWARDS),
        ("src/semgap/codecs/zstd.py", {CODECS, "making the tables", "plotting the figures"}),
        ("src/semgap/telemetry/samples.py", EVERY_TRIAL | AFTERWARDS),
        ("workflow/scripts/measure_trial.py", trials(MODES, [1, 2]) | AFTERWARDS),
        ("workflow/scripts/check_exactness.py", checks(CHECKED) | {"making the tables", "plotting the figures"}),
        ("resources/prompts/english.txt", EVERY_TRIAL | {DUMP, CODECS} | AFTERWARDS),
        ("src/semgap/cli.py", set()),
    ],
)
def test_changed_code_or_text_under_an_old_time_stamp_reruns_what_depends_on_it(finished: Clone, changed: str, stale: set[str]) -> None:
    finished.append(changed, COMMENT)
    assert finished.planned() == stale


def test_a_changed_policy_reruns_the_trials_of_its_mode(finished: Clone) -> None:
    finished.configure({"define": {"modes": {"remote_cache": {"kv_cache": "offloaded"}}}})
    assert finished.planned() == trials(["remote_cache"], [1, 2]) | AFTERWARDS


def test_two_values_swapped_inside_a_policy_are_noticed(finished: Clone) -> None:
    finished.configure({"define": {"modes": {"sys_simulated": {"codec": {"tokens": "fp16_zlib", "reply": "raw"}}}}})
    assert finished.planned() == checks(["sys_simulated"]) | trials(["sys_simulated"], [1, 2]) | AFTERWARDS


def test_one_trial_more_measures_one_trial_more_of_each_cell(finished: Clone) -> None:
    finished.configure({"trials": 3})
    assert finished.planned() == blocks([3]) | trials(MODES, [3]) | AFTERWARDS


def test_one_trial_less_only_aggregates_anew(finished: Clone) -> None:
    finished.configure({"trials": 1})
    assert finished.planned() == AFTERWARDS


@pytest.mark.parametrize(
    "changes",
    [
        {"define": {"modes": {"unused": {"placement": "local"}}}},
        {"define": {"phases": {"prefill": {"requests": 2}}}},
        {"seed": 1},
        {"define": {"modes": {"sys_simulated": {"codec": {"reply": "fp16_zlib", "tokens": "raw"}}}}},  # the same in another order
    ],
)
def test_an_unrelated_key_reruns_nothing(finished: Clone, changes: dict) -> None:
    finished.configure(changes)
    assert finished.planned() == set()


def test_one_deleted_file_of_a_trial_reruns_that_trial(finished: Clone) -> None:
    (finished.trial("remote_cache", 2) / "steps.parquet").unlink()
    assert finished.planned() == trials(["remote_cache"], [2]) | AFTERWARDS
