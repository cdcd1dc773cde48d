"""`semgap.results.load`: a finished run as typed frames, and the directories that it refuses."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from written_trials import Trial, reseal, write_trial

from semgap import results
from semgap.analysis.collect_trials import collect_trials
from semgap.analysis.load import KEYS, TRIAL_TABLES, UnusableTrial
from semgap.analysis.tables import make_tables

TRIALS = (Trial("local"), Trial("remote_cache", delta_bytes=77))
TABLE = pd.DataFrame({"mode": ["local"], "trials": [1], "promise_kept": [True], "gap_ms": [0.5]})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run of two trials; its tables have one row each."""
    directory = tmp_path_factory.mktemp("finished") / "results"
    written = {str(write_trial(directory / "trials", trial)): trial.digest for trial in TRIALS}
    collect_trials(written, directory / "results.csv")
    (directory / "tables").mkdir()
    for table in make_tables.TABLES:
        TABLE.to_parquet(directory / "tables" / f"{make_tables.name_of(table)}.parquet", index=False)
    return directory


@pytest.fixture
def own(run: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(run, tmp_path / "results"))


def trial_of(run: Path, mode: str) -> Path:
    (directory,) = run.glob(f"trials/*/*/mode={mode}/*/trial=1")
    return directory


def refusal(directory: Path) -> str:
    with pytest.raises(UnusableTrial) as refused:
        results.load(directory)
    return str(refused.value)


def test_every_frame_of_trials_begins_with_their_coordinates_in_the_order_of_results_csv(run: Path) -> None:
    loaded = results.load(str(run))
    for name in ("trials", *TRIAL_TABLES):
        frame = getattr(loaded, name)
        assert list(frame.columns[: len(KEYS)]) == KEYS, name
        assert [str(kind) for kind in frame.dtypes[KEYS]] == ["string"] * 4 + ["Int64"], name
    assert loaded.trials["mode"].tolist() == loaded.steps["mode"].unique().tolist() == ["local", "remote_cache"]
    assert [manifest["cell"]["mode"] for manifest in loaded.manifests] == ["local", "remote_cache"]
    assert loaded.trials.merge(loaded.steps, on=KEYS)["latency_mean_s"].notna().all()


def test_types_are_those_of_the_files_whatever_is_null(run: Path) -> None:
    steps = results.load(run).steps
    kinds = {name: str(steps[name].dtype) for name in ("request", "measured", "kind", "latency_s", "evicted_layers", "recovery", "gpu_s")}
    assert steps[["evicted_layers", "recovery", "gpu_s"]].isna().all(axis=None)
    assert list(kinds.values()) == ["Int64", "boolean", "string", "float64", "Int64", "string", "float64"]
    rows = results.load(run).trials
    kinds = {name: str(rows[name].dtype) for name in ("measured_steps", "promise_kept", "keeps", "latency_mean_s", "ratios_reason")}
    assert rows["ratios_reason"].isna().all()
    assert list(kinds.values()) == ["Int64", "boolean", "string", "float64", "string"]


def test_tables_are_there_by_name(run: Path) -> None:
    tables = results.load(run).tables
    assert list(tables) == [make_tables.name_of(table) for table in make_tables.TABLES]
    assert [str(kind) for kind in tables["gap"].dtypes] == ["string", "Int64", "boolean", "float64"]


def test_a_trial_beside_the_run_that_results_csv_does_not_list_is_left_out(own: Path) -> None:
    write_trial(own / "trials", Trial("naive"))
    assert set(results.load(own).steps["mode"]) == {"local", "remote_cache"}


def test_a_named_experiment_takes_the_trials_that_it_shares(own: Path) -> None:
    rows = pd.read_csv(own / "results.csv")
    shutil.copytree(own / "tables", own / "mine/tables")
    rows.assign(directory="../" + rows["directory"]).to_csv(own / "mine/results.csv", index=False)
    assert len(results.load(own / "mine").steps) == len(results.load(own).steps)


def test_a_directory_that_is_none_or_holds_no_finished_run_is_refused_by_name(tmp_path: Path) -> None:
    assert f"{tmp_path}/nowhere is no directory; name the directory of a finished run" in refusal(tmp_path / "nowhere")
    assert f"{tmp_path} has no results.csv; name the directory of a finished run" in refusal(tmp_path)


def test_half_a_run_is_refused_with_the_trial_or_table_that_is_missing(own: Path) -> None:
    (own / "tables/gap.parquet").rename(own / "gap.parquet")
    assert f"{own}/tables/gap.parquet cannot be read" in refusal(own)
    (own / "gap.parquet").rename(own / "tables/gap.parquet")
    gone = trial_of(own, "remote_cache")
    (gone / "relay.parquet").unlink()
    assert f"trial {gone} has no relay.parquet; rerun it" in refusal(own)
    shutil.rmtree(gone)
    assert f"trial {gone} has no manifest.json; rerun it" in refusal(own)


def test_a_results_csv_that_was_cut_short_is_refused(own: Path) -> None:
    head, first, second = (own / "results.csv").read_text().splitlines()
    for text in (head, f"{head}\n{first}\n{second[:200]}", f"{head}\n{first}\n{second[: second.index(',')]}"):
        (own / "results.csv").write_text(text + "\n")
        assert f"{own}/results.csv is cut short: it has no row, or one without digest and directory" in refusal(own)
    (own / "results.csv").write_text("")
    assert f"{own}/results.csv names no trials with their digests and directories" in refusal(own)


def test_an_altered_trial_and_a_damaged_page_of_a_table_are_refused(own: Path) -> None:
    make_tables.write_table(TABLE, own / "tables/gap", ())
    file = own / "tables/gap.parquet"
    results.load(own)
    data = file.read_bytes()
    file.write_bytes(data.replace(b"local", b"lokal", 1))
    assert f"{file} cannot be read" in refusal(own) and "checksum" in refusal(own)
    file.write_bytes(data)
    steps = trial_of(own, "remote_cache") / "steps.parquet"
    steps.write_bytes(steps.read_bytes() + b" ")
    assert f"trial {steps.parent} is not as it was measured: its manifest says sha256" in refusal(own)


def test_two_configurations_are_refused_with_both_digests(own: Path) -> None:
    reseal(trial_of(own, "remote_cache"), cell_digest="another")
    said = refusal(own)
    assert said.startswith(f"{own}/results.csv and the trials are of two configurations: trial {trial_of(own, 'remote_cache')} is stale")
    assert "another" in said and TRIALS[1].digest in said


def test_results_of_another_version_are_refused_by_name_even_if_they_have_other_files(own: Path) -> None:
    reseal(trial_of(own, "local"), schema=0)
    (trial_of(own, "local") / "control.parquet").unlink()
    said = refusal(own)
    assert said.startswith(f"{own} was written by another version of semgap: ")
    assert "has schema 0, this version reads 2" in said


@pytest.mark.parametrize(("table", "column"), [("ledger", "encode_ns"), ("steps", "gpu_s"), ("relay", "late_s")])
def test_a_trial_without_a_column_of_this_version_is_refused_by_name(own: Path, table: str, column: str) -> None:
    file = trial_of(own, "remote_cache") / f"{table}.parquet"
    found = pq.read_table(file, partitioning=None)
    assert column in found.column_names
    pq.write_table(found.drop_columns([column]), file)
    reseal(file.parent)
    assert refusal(own).startswith(f"{file} was written by another version of semgap: this one also reads the columns {column}; rerun it")


def test_a_manifest_that_is_no_object_is_refused_by_name(own: Path) -> None:
    file = trial_of(own, "remote_cache") / "manifest.json"
    file.write_text("[]")
    assert f"{file} has schema None, this version reads 2" in refusal(own)


def test_importing_it_loads_no_library() -> None:
    code = "import sys, semgap.results; assert not {'pandas', 'pyarrow', 'numpy', 'torch'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
