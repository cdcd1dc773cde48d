"""Loading trial directories, and the rows of results.csv."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from written_trials import DOWN_FRAME, GPU, NO_GPU, SEGMENT_HEADER, UP_FRAME, Trial, load, reseal, step_rows, write, write_trial

from semgap.analysis.load import KEYS, StaleTrialError, UnusableTrial, load_trials
from semgap.analysis.trial_rows import _call_latencies, trial_rows
from semgap.experiment.trial_schemas import STEPS


def test_a_stale_trial_is_refused_with_both_digests_and_the_way_out(tmp_path: Path) -> None:
    trial = Trial("remote_cache")
    directory = write_trial(tmp_path, trial)
    with pytest.raises(StaleTrialError) as refused:
        load_trials([directory], {str(directory): "current-digest"})
    assert all(text in str(refused.value) for text in (str(directory), trial.digest, "current-digest", "--forcerun"))


def test_a_trial_that_is_kept_apart_is_in_no_frame(tmp_path: Path) -> None:
    one, other = Trial("local", trial=1), Trial("local", trial=2)
    directories = [write_trial(tmp_path, trial) for trial in (one, other)]
    expected = {str(directory): trial.digest for directory, trial in zip(directories, (one, other), strict=True)}
    reseal(directories[1], apart="the link's round trip is 30 ms")
    trials = load_trials(directories, expected)
    assert [manifest["cell"]["trial"] for manifest in trials.manifests] == [1] and set(trials.steps["trial"]) == {1}
    assert [manifest["cell"]["trial"] for manifest in trials.apart] == [2]
    reseal(directories[0], apart="the same")
    with pytest.raises(UnusableTrial, match="all 2 trials are kept apart, the first since the same"):
        load_trials(directories, expected)


def test_a_trial_outside_the_current_grid_is_refused(tmp_path: Path) -> None:
    directory = write_trial(tmp_path, Trial("remote_cache"))
    with pytest.raises(StaleTrialError, match="not in the current grid"):
        load_trials([directory], {})


@pytest.mark.parametrize("name", ["steps.parquet", "dmon.parquet", "manifest.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    trial = Trial("remote_cache")
    directory = write_trial(tmp_path, trial)
    (directory / name).unlink()
    with pytest.raises(UnusableTrial, match=rf"has no {name}"):
        load_trials([directory], {str(directory): trial.digest})


@pytest.mark.parametrize("name", ["ledger.parquet", "manifest.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    trial = Trial("remote_cache")
    directory = write_trial(tmp_path, trial)
    (directory / name).write_bytes((directory / name).read_bytes()[:50])
    with pytest.raises(UnusableTrial, match=name):
        load_trials([directory], {str(directory): trial.digest})


@pytest.mark.parametrize("schema", [None, 0])
def test_a_manifest_of_another_schema_is_refused(tmp_path: Path, schema: int | None) -> None:
    trial = Trial("remote_cache")
    directory = write_trial(tmp_path, trial)
    reseal(directory, schema=schema)
    with pytest.raises(UnusableTrial, match=f"has schema {schema}, this version reads"):
        load_trials([directory], {str(directory): trial.digest})


@pytest.mark.parametrize("reconciliation", [None, {"agreed": False}, {}])
def test_a_remote_trial_that_did_not_reconcile_is_refused(tmp_path: Path, reconciliation: Any) -> None:
    trial = Trial("remote_cache")
    directory = write_trial(tmp_path, trial)
    reseal(directory, reconciliation=reconciliation)
    with pytest.raises(UnusableTrial, match="did not reconcile"):
        load_trials([directory], {str(directory): trial.digest})


def test_a_trial_listed_twice_is_refused(tmp_path: Path) -> None:
    trial = Trial("local")
    first, second = write_trial(tmp_path / "a", trial), write_trial(tmp_path / "b", trial)
    with pytest.raises(UnusableTrial, match="same trial"):
        load_trials([first, second], {str(first): trial.digest, str(second): trial.digest})


def test_a_trial_without_a_measured_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnusableTrial, match="no measured step"):
        load(tmp_path, Trial("local"), Trial("remote_cache", latency_s=()))


def test_frames_have_the_key_columns_and_keep_the_listed_order(tmp_path: Path) -> None:
    trials = load(tmp_path, Trial("remote_cache", trial=2), Trial("local"))
    assert list(trials.steps.columns[:5]) == KEYS
    assert list(trials.steps["mode"].unique()) == ["remote_cache", "local"]
    assert set(trials.ledger["trial"]) == {2}


def test_a_row_covers_measured_steps_only_and_counts_bytes_at_three_levels(tmp_path: Path) -> None:
    trials = load(tmp_path, Trial("remote_cache", latency_s=(0.05, 0.06, 0.09), delta_bytes=77))
    row = trial_rows(trials).iloc[0]
    payload = 8 + 196_608 + UP_FRAME + DOWN_FRAME + 77 / 3
    assert (row.measured_steps, row.latency_median_s) == (3, 0.06)
    assert row.latency_mean_s == pytest.approx(0.2 / 3)
    assert row.tokens_per_s == pytest.approx(3 / 0.2)
    assert row.payload_bytes_per_token == pytest.approx(payload)
    assert row.up_payload_bytes_per_token == pytest.approx(8 + UP_FRAME + 77 / 3)
    assert row.tensor_bytes_per_token == 2 * (8 + 196_608)
    assert row.wire_bytes_per_token == pytest.approx(payload + 10 * SEGMENT_HEADER)
    assert (row.round_trips_per_token, row.delta_payload_bytes) == (1, 77)
    assert row.setup_payload_bytes == 538_000_000 + 1000
    assert row.tpot_s == pytest.approx(0.2 / 3)


def test_a_value_that_was_not_measured_is_null_and_a_counted_nothing_is_zero(tmp_path: Path) -> None:
    row = trial_rows(load(tmp_path, Trial("local", phase="prefill"), Trial("remote_cache", phase="prefill"))).iloc[0]
    null = ["worker_cpu_s_per_token", "gpu_s_per_token", "probe_rtt_s", "tpot_s"]
    null += ["latency_p95_s", "gpu_util_percent", "client_start_s", "worker_peak_rss_bytes", "worker_weight_store_bytes"]
    assert row[null].isna().all()
    assert row.gpu_reason == NO_GPU
    zero = ["payload_bytes_per_token", "wire_bytes_per_token", "round_trips_per_token", "setup_payload_bytes"]
    assert (row[zero] == 0).all()


def test_the_stolen_share_is_the_one_by_which_the_trial_was_kept(tmp_path: Path) -> None:
    rows = trial_rows(load(tmp_path, Trial("local", steal_share=0.03), Trial("remote_cache")))
    assert rows["steal_share"].iloc[0] == 0.03 and pd.isna(rows["steal_share"].iloc[1])


def test_a_null_in_one_step_makes_the_trials_value_null(tmp_path: Path) -> None:
    trial = Trial("remote_cache")
    directory = write_trial(tmp_path, trial)
    steps = step_rows(trial)
    steps[-1]["worker_cpu_s"] = None
    write(directory / "steps.parquet", steps, STEPS)
    row = trial_rows(load_trials([directory], {str(directory): trial.digest})).iloc[0]
    assert pd.isna(row.worker_cpu_s_per_token)
    assert row.worker_compute_s_per_token == pytest.approx(0.05)


def test_gpu_use_is_the_mean_inside_the_measured_steps(tmp_path: Path) -> None:
    trial = Trial("remote_cache", latency_s=(0.002, 0.0001), gpu_percent=(10, 20, 30, 99))
    row = trial_rows(load(tmp_path, trial)).iloc[0]
    assert (row.gpu_util_percent, row.gpu_power_w) == (20, 300)
    assert pd.isna(row.gpu_reason)


def test_a_metric_that_the_gpu_lacks_is_null_with_the_reason(tmp_path: Path) -> None:
    trial = Trial("remote_cache")
    directory = write_trial(tmp_path, trial)
    write(directory / "gpu.parquet", [{"t_s": 100.1, "gpu_percent": 50.0, "power_w": None}], GPU)
    row = trial_rows(load_trials([directory], {str(directory): trial.digest})).iloc[0]
    assert row.gpu_util_percent == 50
    assert pd.isna(row.gpu_power_w)
    assert row.gpu_reason == "the GPU reported no gpu_power_w"


def test_a_windows_latency_is_its_whole_time_over_its_tokens() -> None:
    rows = [
        {"request": 0, "step": step, "round_trips": int(step in (1, 5)), "latency_s": 0.4 if step in (4, 8) else 0.0}
        for step in range(1, 9)
    ]
    measured = pd.DataFrame(rows).assign(**dict.fromkeys(KEYS, "x"))
    assert _call_latencies(measured).tolist() == [0.1, 0.1]
    local = measured.assign(round_trips=0)
    assert _call_latencies(local).tolist() == [0.0, 0.0, 0.0, 0.4, 0.0, 0.0, 0.0, 0.4]
