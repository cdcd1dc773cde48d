"""Utilisation, energy and the samplers' cost of a trial, from rows in the form that samplers and clients write."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from written_trials import GPU, NO_GPU, Trial, load, repeated, results

from semgap.analysis.gpu import AVERAGED, COUNTER, GPM_MEANS, INSTANT, gpu_columns, integral, measured_time
from semgap.analysis.tables import summary
from semgap.analysis.tables.make_tables import write_table
from semgap.analysis.trial_rows import trial_rows

SM = "gpm_sm_activity_percent"


def steps(*intervals: tuple[float, float], unmeasured: Sequence[tuple[float, float]] = ()) -> pd.DataFrame:
    """Rows of steps from begin to end."""
    rows = [(begin, end - begin, True) for begin, end in intervals] + [(begin, end - begin, False) for begin, end in unmeasured]
    return pd.DataFrame(rows, columns=["begin_s", "latency_s", "measured"])


def samples(*rows: dict[str, Any]) -> pd.DataFrame:
    """Rows of gpu.parquet; a missing column is null."""
    return pd.DataFrame(rows, columns=GPU.names).astype("float64")


def every(interval_s: float, begin_s: float, end_s: float, watts: float = 300.0, **more: float) -> list[dict[str, Any]]:
    count = round((end_s - begin_s) / interval_s) + 1
    return [{"t_s": begin_s + i * interval_s, "power_instant_w": watts, "power_w": 100.0, **more} for i in range(count)]


def test_consecutive_steps_are_one_interval_without_the_gaps_between_intervals() -> None:
    time = measured_time(steps((10.0, 10.2), (10.2, 10.3), (11.0, 11.5), unmeasured=[(10.4, 10.9)]))
    assert time.begins_s.tolist() == [10.0, 11.0]
    assert time.ends_s.tolist() == pytest.approx([10.3, 11.5])
    assert time.total_s == pytest.approx(0.8)
    begins, ends = np.array([9.0, 10.1, 10.5, 9.0]), np.array([9.9, 11.1, 10.9, 20.0])
    assert time.within(begins, ends).tolist() == pytest.approx([0.0, 0.3, 0.0, 0.8])
    assert time.holds(np.array([9.99, 10.0, 10.25, 10.5, 11.5, 11.6])).tolist() == [False, True, True, False, True, False]


def test_coalesced_tokens_add_no_time() -> None:
    frame = steps((10.0, 10.2), (10.2, 10.2), (10.2, 10.2), (10.2, 10.4))
    assert measured_time(frame).total_s == pytest.approx(0.4)


def test_nvml_values_are_means_of_the_samples_in_measured_steps_alone() -> None:
    rows = [{"t_s": t_s, "gpu_percent": used, "power_w": 10.0 * used} for t_s, used in ((9.9, 99), (10.1, 20), (10.2, 40), (10.6, 99))]
    found = gpu_columns(samples(*rows), steps((10.0, 10.5), unmeasured=[(10.5, 11.0)]), None)
    assert (found["gpu_util_percent"], found["gpu_power_w"], found["gpu_samples"]) == (30, 300, 2)
    assert found["gpu_reason"] is None


def test_a_gpm_window_counts_by_its_length_if_steps_fill_it() -> None:
    windows = ((10.05, 0.1, 90.0), (10.15, 0.1, 20.0), (10.45, 0.3, 40.0), (10.55, 0.1, 90.0))
    rows = [{"t_s": t_s, "gpm_window_s": length, SM: value} for t_s, length, value in windows]
    found = gpu_columns(samples(*rows), steps((10.0, 10.5)), None)
    assert found["gpm_windows"] == 2  # the first and the last lie half outside
    assert found["gpu_sm_activity_percent"] == pytest.approx((0.1 * 20 + 0.3 * 40) / 0.4)
    assert found["gpu_tensor_activity_percent"] is None
    assert found["gpm_reason"].startswith("GPM gave no gpu_sm_occupancy_percent and no gpu_tensor")


def test_gpm_is_null_with_a_reason_if_steps_are_shorter_than_a_window() -> None:
    rows = [{"t_s": 10 + 0.1 * i, "gpm_window_s": 0.1, SM: 50.0} for i in range(10)]
    found = gpu_columns(samples(*rows), steps((10.02, 10.05), (10.42, 10.46)), None)
    assert found["gpu_sm_activity_percent"] is None and found["gpm_windows"] == 0
    assert found["gpm_reason"] == "measured steps fill at most 40% of a GPM window of 0.1 s, 90% are needed"


def test_the_integral_of_a_line_through_samples_is_exact_between_them_too() -> None:
    t_s, values = np.array([0.0, 1.0, 3.0]), np.array([0.0, 2.0, 2.0])
    assert integral(t_s, values, np.array([0.0]), np.array([3.0])) == pytest.approx(5.0)
    assert integral(t_s, values, np.array([0.5, 2.5]), np.array([1.0, 3.0])) == pytest.approx(0.75 + 1.0)


def test_joules_per_token_integrate_power_over_the_steps_only() -> None:
    rows = every(0.1, 9.0, 12.0)
    for row in rows:  # an unmeasured prefill of 700 W
        row["power_instant_w"] = 700.0 if 10.55 < row["t_s"] < 10.95 else 300.0
    frame = steps((10.0, 10.25), (10.25, 10.5), (11.0, 11.25), (11.25, 11.5), unmeasured=[(10.55, 10.95)])
    found = gpu_columns(samples(*rows), frame, None)
    assert found["joules_per_token"] == pytest.approx(300 * 1.0 / 4)
    assert (found["joules_basis"], found["joules_reason"]) == (INSTANT, None)


def test_without_instantaneous_power_the_averaged_one_is_used_and_named() -> None:
    rows = [row | {"power_instant_w": None} for row in every(0.1, 9.0, 12.0)]
    found = gpu_columns(samples(*rows), steps((10.0, 11.0)), None)
    assert (found["joules_per_token"], found["joules_basis"]) == (pytest.approx(100.0), AVERAGED)


def test_the_energy_counter_is_used_if_steps_fill_the_time_between_its_readings() -> None:
    rows = every(0.1, 10.0, 20.0)
    rows[0]["energy_j"], rows[-1]["energy_j"] = 5000.0, 8500.0
    found = gpu_columns(samples(*rows), steps((10.0, 15.0), (15.02, 19.99)), None)
    assert (found["joules_per_token"], found["joules_basis"]) == (1750.0, COUNTER)
    shorter = gpu_columns(samples(*rows), steps((10.0, 15.0), (15.02, 19.5)), None)
    assert (shorter["joules_per_token"], shorter["joules_basis"]) == (pytest.approx(300 * 9.48 / 2), INSTANT)
    assert shorter["gpu_energy_j"] == 3500.0
    assert shorter["gpu_energy_check"] == pytest.approx(3000 / 3500)


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([], NO_GPU),
        (every(0.3, 9.0, 12.0), "1 power samples in measured steps, 3 are needed: more steps, or a smaller telemetry.interval_s"),
        (every(0.1, 10.1, 12.0), "the power samples do not reach over all measured steps"),
        ([{"t_s": 9.0 + i * 0.1} for i in range(30)], "power_w: NVML: Not Supported"),
    ],
)
def test_energy_without_enough_power_samples_is_null_with_the_reason(rows: list[dict[str, Any]], why: str) -> None:
    reason = "power_w: NVML: Not Supported" if rows else NO_GPU
    interval = (10.0, 10.4)
    found = gpu_columns(samples(*rows), steps(interval), reason)
    assert (found["joules_per_token"], found["joules_basis"], found["joules_reason"]) == (None, None, why)


def test_gpu_time_is_per_token_and_over_the_latency_and_null_on_a_cpu(tmp_path: Path) -> None:
    rows = trial_rows(load(tmp_path, Trial("remote_cache", latency_s=(0.05, 0.07), gpu_s=0.03), Trial("local")))
    gpu, cpu = rows.iloc[0], rows.iloc[1]
    assert (gpu.gpu_s_per_token, gpu.gpu_time_share) == (pytest.approx(0.03), pytest.approx(0.5))
    assert pd.isna(gpu.gpu_time_reason) and gpu.device == "cuda"
    assert pd.isna(cpu.gpu_s_per_token) and pd.isna(cpu.gpu_time_share)
    assert cpu.gpu_time_reason == "computed on the CPU: no CUDA events"


def test_the_samplers_cost_is_a_sum_over_sources_and_names_those_it_leaves_out(tmp_path: Path) -> None:
    row = trial_rows(load(tmp_path, Trial("local"))).iloc[0]
    assert (row.samplers_core_share, row.host_sampler_cpu_s_per_sample) == (0.005, 5e-4)
    assert pd.isna(row.gpu_sampler_cpu_s_per_sample)
    assert row.samplers_reason == f"without gpu: {NO_GPU}; without dmon: {NO_GPU}"


def test_without_a_gpu_columns_are_null_with_reasons_and_each_view_is_one_line(tmp_path: Path) -> None:
    frame = summary.table(results(tmp_path, *repeated("local", (60, 61)), *repeated("remote_cache", (70, 71))))
    assert frame[["gpu_time_share", "joules_per_token", *GPM_MEANS]].isna().all(axis=None)
    reasons = ["gpu_reason", "gpm_reason", "joules_reason"]
    assert (frame[reasons] == NO_GPU).all(axis=None)
    write_table(frame, tmp_path / "summary", summary.VIEWS)
    text = (tmp_path / "summary.md").read_text()
    before, _, gpu = text.partition("### GPU, ")
    assert f"Not measured: computed on the CPU: no CUDA events; {NO_GPU}." in gpu
    assert "|" not in gpu
    assert "Not measured" not in before
    assert "Not measured: computed on the CPU" in (tmp_path / "summary.tex").read_text()


def test_with_a_gpu_the_view_has_its_time_and_reasons_for_nulls(tmp_path: Path) -> None:
    found = results(tmp_path, Trial("local", gpu_s=0.03, gpu_percent=(10, 20, 30)))
    write_table(summary.table(found), tmp_path / "summary", summary.VIEWS)
    (line,) = [
        line for line in (tmp_path / "summary.md").read_text().partition("### GPU, time")[2].splitlines() if line.startswith("| local")
    ]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:4] == ["30.0", "50.0", "20.0"]
    assert cells[5].startswith("null (")
