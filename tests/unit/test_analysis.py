"""Loading trial directories, the rows of results.csv, and the tables."""

import csv
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
from figure_texts import colliding_texts, texts, texts_outside
from matplotlib.markers import CARETLEFT, CARETRIGHT
from written_trials import (
    DOWN_FRAME,
    GPU_SCHEMA,
    NO_GPU,
    SEGMENT_HEADER,
    SHRUNK,
    STEP_SCHEMA,
    UP_FRAME,
    Trial,
    load,
    repeated,
    results_of,
    step_rows,
    write,
    write_manifest,
    write_trial,
)

from semgap.analysis.figures.bytes_per_token import bytes_by_class, bytes_per_token
from semgap.analysis.figures.latency import latency
from semgap.analysis.figures.style import save
from semgap.analysis.figures.telemetry import telemetry
from semgap.analysis.load import StaleTrialError, UnusableTrial, load_trials
from semgap.analysis.tables.hypotheses import hypotheses
from semgap.analysis.tables.make_tables import make_tables, write_table
from semgap.analysis.tables.render import Column, View, to_latex, to_markdown
from semgap.analysis.tables.summary import SUMMARY_VIEWS, summary
from semgap.analysis.trial_rows import trial_rows


def test_a_trial_with_another_cell_digest_is_refused_with_both_digests_and_the_way_out(
    tmp_path: Path,
) -> None:
    trial = Trial("remote_cache")
    directory = write_trial(tmp_path, trial)
    with pytest.raises(StaleTrialError) as refused:
        load_trials([directory], {str(directory): "current-digest"})
    assert all(text in str(refused.value) for text in (str(directory), trial.digest, "current-digest", "--forcerun"))


def test_a_trial_that_the_current_grid_does_not_have_is_refused(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("reconciliation", [None, {"agreed": False}, {}])
def test_a_remote_trial_that_did_not_reconcile_is_refused(tmp_path: Path, reconciliation: Any) -> None:
    trial = Trial("remote_cache")
    directory = write_trial(tmp_path, trial)
    write_manifest(directory, trial, reconciliation=reconciliation)
    with pytest.raises(UnusableTrial, match="did not reconcile"):
        load_trials([directory], {str(directory): trial.digest})


def test_the_same_trial_listed_twice_is_refused(tmp_path: Path) -> None:
    trial = Trial("local")
    first, second = write_trial(tmp_path / "a", trial), write_trial(tmp_path / "b", trial)
    with pytest.raises(UnusableTrial, match="same trial"):
        load_trials([first, second], {str(first): trial.digest, str(second): trial.digest})


def test_a_trial_without_a_measured_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnusableTrial, match="no measured step"):
        load(tmp_path, Trial("local"), Trial("remote_cache", latency_s=()))


def test_frames_carry_the_key_columns_and_keep_the_listed_order(tmp_path: Path) -> None:
    trials = load(tmp_path, Trial("remote_cache", trial=2), Trial("local"))
    assert list(trials.steps.columns[:5]) == ["model", "network", "mode", "phase", "trial"]
    assert list(trials.steps["mode"].unique()) == ["remote_cache", "local"]
    assert set(trials.ledger["trial"]) == {2}


def test_a_trials_row_takes_measured_steps_only_and_counts_bytes_at_three_levels(tmp_path: Path) -> None:
    trials = load(tmp_path, Trial("remote_cache", latency_s=(0.05, 0.06, 0.09), delta_bytes=77))
    row = trial_rows(trials).iloc[0]
    payload = 8 + 196_608 + UP_FRAME + DOWN_FRAME
    assert (row.measured_steps, row.latency_median_s) == (3, 0.06)
    assert row.latency_mean_s == pytest.approx(0.2 / 3)
    assert row.tokens_per_s == pytest.approx(3 / 0.2)
    assert row.payload_bytes_per_token == payload
    assert row.up_payload_bytes_per_token == 8 + UP_FRAME
    assert row.tensor_bytes_per_token == 2 * (8 + 196_608)
    assert row.wire_bytes_per_token == payload + 10 * SEGMENT_HEADER
    assert (row.round_trips_per_token, row.delta_payload_bytes) == (1, 77)
    assert row.setup_payload_bytes == 538_000_000 + 1000
    assert row.tpot_s == pytest.approx(0.2 / 3)


def test_what_a_trial_did_not_measure_stays_null_and_counted_nothing_is_zero(tmp_path: Path) -> None:
    row = trial_rows(load(tmp_path, Trial("local", phase="prefill"), Trial("remote_cache", phase="prefill"))).iloc[0]
    null = [
        "worker_cpu_s_per_token",
        "worker_compute_s_per_token",
        "gpu_s_per_token",
        "probe_rtt_s",
        "tpot_s",
    ]
    null += ["latency_p95_s", "gpu_util_percent", "client_start_s", "worker_peak_rss_bytes", "worker_weight_store_bytes"]
    assert row[null].isna().all()
    assert row.gpu_reason == NO_GPU
    zero = ["payload_bytes_per_token", "wire_bytes_per_token", "round_trips_per_token", "setup_payload_bytes"]
    assert (row[zero] == 0).all()


def test_a_null_in_one_step_makes_the_trials_figure_null(tmp_path: Path) -> None:
    trial = Trial("remote_cache")
    directory = write_trial(tmp_path, trial)
    steps = step_rows(trial)
    steps[-1]["worker_cpu_s"] = None
    write(directory / "steps.parquet", steps, STEP_SCHEMA)
    row = trial_rows(load_trials([directory], {str(directory): trial.digest})).iloc[0]
    assert pd.isna(row.worker_cpu_s_per_token)
    assert row.worker_compute_s_per_token == pytest.approx(0.05)


def test_gpu_use_is_the_mean_inside_the_measured_steps(tmp_path: Path) -> None:
    trial = Trial("remote_cache", latency_s=(0.002, 0.0001), gpu_percent=(10, 20, 30, 99))
    row = trial_rows(load(tmp_path, trial)).iloc[0]
    assert (row.gpu_util_percent, row.gpu_power_w) == (20, 300)
    assert pd.isna(row.gpu_reason)


def test_a_metric_that_the_gpu_does_not_give_is_null_with_the_reason(tmp_path: Path) -> None:
    trial = Trial("remote_cache")
    directory = write_trial(tmp_path, trial)
    write(directory / "gpu.parquet", [{"t_s": 100.1, "gpu_percent": 50.0, "power_w": None}], GPU_SCHEMA)
    row = trial_rows(load_trials([directory], {str(directory): trial.digest})).iloc[0]
    assert row.gpu_util_percent == 50
    assert pd.isna(row.gpu_power_w)
    assert row.gpu_reason == "the GPU reported no gpu_power_w"


def test_an_interval_that_leaves_the_axis_ends_in_an_arrow(tmp_path: Path) -> None:
    figure = latency(trial_rows(load(tmp_path, *repeated("local", (60, 90)), *repeated("remote_cache", (60, 61)))))
    (ax,) = figure.axes
    assert {CARETLEFT, CARETRIGHT} <= {line.get_marker() for line in ax.lines}


def test_summary_pairs_trials_of_one_session_with_both_baselines(tmp_path: Path) -> None:
    trials = load(
        tmp_path,
        *repeated("local", (50, 51, 52)),
        *repeated("remote_cache", (60, 61.2, 62.4)),
        *repeated("sys_simulated", (30, 30.6, 31.2), keeps="lossy"),
    )
    table = summary(trial_rows(trials)).set_index("mode")
    shrunk = table.loc["sys_simulated"]
    assert shrunk.ratio_to_remote_cache == pytest.approx(0.5)
    assert shrunk.ratio_to_remote_cache_low == pytest.approx(0.5)
    assert shrunk.ratio_to_local == pytest.approx(0.6)
    assert shrunk.ratio_to_local_pairs == 3
    assert (shrunk.latency_metric, shrunk.keeps, shrunk.trials) == ("ITL", "lossy", 3)
    assert shrunk.latency_mean_ms == pytest.approx(30.6)
    assert shrunk.latency_mean_ms_low < 30.6 < shrunk.latency_mean_ms_high
    assert pd.isna(shrunk.latency_median_ms_low)
    assert "75%" in shrunk.latency_median_ms_reason
    assert pd.isna(shrunk.ttft_ms)
    assert table.loc["local"].worker_reason.startswith("no worker")
    assert pd.isna(table.loc["remote_cache"].worker_reason)


def test_ratios_over_mixed_sessions_are_null_and_say_how_to_remeasure(tmp_path: Path) -> None:
    trials = load(
        tmp_path,
        *repeated("remote_cache", (60, 61, 62), session="s1"),
        *repeated("sys_simulated", (30, 31, 32), session="s2", codec=SHRUNK),
    )
    rows = trial_rows(trials)
    cell = summary(rows).set_index("mode").loc["sys_simulated"]
    assert pd.isna(cell.ratio_to_remote_cache)
    assert "3 of 3 trials were measured in a different session" in cell.ratio_to_remote_cache_reason
    h2 = hypotheses(rows).query("hypothesis == 'H2'").iloc[0]
    assert pd.isna(h2.verdict)
    assert "--config remeasure=blocks" in h2.reason
    h1 = hypotheses(rows).query("hypothesis == 'H1'").iloc[0]
    assert h1.verdict == "no", "bytes compare across sessions"


@pytest.mark.parametrize(
    ("latencies", "verdict"),
    [((45, 45.5, 45.2), "yes"), ((58, 58.4, 58.1), "no"), ((30, 51, 80), "inconclusive")],
)
def test_h2_follows_the_interval_of_paired_ratios(tmp_path: Path, latencies: tuple[float, ...], verdict: str) -> None:
    trials = load(
        tmp_path,
        *repeated("remote_cache", (60, 60.6, 60.2)),
        *repeated("sys_simulated", latencies, codec=SHRUNK),
    )
    h2 = hypotheses(trial_rows(trials)).query("hypothesis == 'H2'").iloc[0]
    assert h2.verdict == verdict
    assert h2.threshold == 0.15
    assert h2.cut_low <= h2.cut <= h2.cut_high


def test_h2_is_corrected_over_all_rows_of_the_family(tmp_path: Path) -> None:
    cells = [
        *repeated("remote_cache", (60, 60.6, 60.2)),
        *repeated("sys_simulated", (45.0, 47.3, 46.1)),
        *repeated("sys", (40.0, 41.3, 40.1)),
    ]
    rows = trial_rows(load(tmp_path, *cells))
    both = hypotheses(rows).query("hypothesis == 'H2'").set_index("mode")
    alone = hypotheses(rows[rows["mode"] != "sys"]).query("hypothesis == 'H2'").set_index("mode")
    smaller, larger = both.sort_values("p").itertuples()
    assert smaller.p_holm == pytest.approx(2 * smaller.p)
    assert larger.p_holm == pytest.approx(max(larger.p, smaller.p_holm))
    assert alone.loc["sys_simulated"].p_holm == pytest.approx(alone.loc["sys_simulated"].p)


@pytest.mark.parametrize(("logits", "verdict"), [(80_000, "yes"), (190_000, "no")])
def test_h1_of_equal_bytes_is_exact(tmp_path: Path, logits: int, verdict: str) -> None:
    sizes = {"tokens": 8, "logits": logits}
    trials = load(tmp_path, *repeated("remote_cache", (60, 61)), *repeated("sys_simulated", (60, 61), sizes=sizes))
    h1 = hypotheses(trial_rows(trials)).query("hypothesis == 'H1'").iloc[0]
    assert h1.verdict == verdict
    assert h1.cut == h1.cut_low == h1.cut_high == 1 - (logits + 78) / (196_608 + 78)


def test_h1_of_bytes_that_differ_has_a_t_interval_and_can_be_inconclusive(tmp_path: Path) -> None:
    varied = [Trial("sys_simulated", trial=n, sizes={"logits": s}) for n, s in ((1, 90_000), (2, 180_000), (3, 130_000))]
    trials = load(tmp_path, *repeated("remote_cache", (60, 60, 60)), *varied)
    h1 = hypotheses(trial_rows(trials)).query("hypothesis == 'H1'").iloc[0]
    assert h1.cut_low < 0.30 < h1.cut_high
    assert h1.verdict == "inconclusive"


def test_the_part_of_the_cut_that_is_only_the_cast_is_stated_apart(tmp_path: Path) -> None:
    halves = {"tokens": 8, "logits": 98_304}
    trials = load(
        tmp_path,
        *repeated("remote_cache", (60, 60)),
        *repeated("remote_cache_fp16", (59, 59), sizes=halves),
        *repeated("sys_simulated", (70, 70), sizes={"tokens": 8, "logits": 80_000}),
    )
    h1 = hypotheses(trial_rows(trials)).query("hypothesis == 'H1'").iloc[0]
    assert h1.cast_part == pytest.approx(98_304 / 196_686)
    assert h1.rest_part == pytest.approx((98_304 - 80_000) / 196_686)


def test_without_the_cast_mode_its_part_is_null_with_the_reason(tmp_path: Path) -> None:
    rows = trial_rows(load(tmp_path, *repeated("remote_cache", (60, 60)), *repeated("sys_simulated", (70, 70))))
    for row in hypotheses(rows).query("mode == 'sys_simulated' and hypothesis != 'A/A'").itertuples():
        assert pd.isna(row.cast_part)
        assert pd.isna(row.rest_part)
        assert row.cast_reason == "remote_cache_fp16 was not run"


def test_without_remote_cache_every_verdict_is_null_with_the_reason(tmp_path: Path) -> None:
    table = hypotheses(trial_rows(load(tmp_path, *repeated("local", (60, 60)), *repeated("sys", (70, 70)))))
    assert list(table["hypothesis"]) == ["H1", "H2"]
    assert table["verdict"].isna().all()
    assert set(table["reason"]) == {"remote_cache was not run"}


def test_a_mode_under_two_names_gives_an_a_a_row_with_the_smallest_visible_cut(tmp_path: Path) -> None:
    trials = load(tmp_path, *repeated("remote_cache", (60, 61, 60)), *repeated("remote_cache_again", (61, 60, 60)))
    row = hypotheses(trial_rows(trials)).query("hypothesis == 'A/A'").iloc[0]
    assert (row["mode"], row.baseline, row.verdict) == ("remote_cache_again", "remote_cache", "same")
    assert row.smallest_visible_cut == max(-row.cut_low, row.cut_high)


def test_modes_with_unlike_policies_are_no_a_a_pair(tmp_path: Path) -> None:
    trials = load(tmp_path, *repeated("remote_cache", (60, 61)), *repeated("remote_cache_fp16", (61, 60), codec=SHRUNK))
    assert hypotheses(trial_rows(trials)).empty


def test_csv_and_parquet_are_unrounded_and_null_is_not_zero(tmp_path: Path) -> None:
    frame = pd.DataFrame({"mode": ["a", "b"], "latency_ms": [1 / 3, None], "latency_ms_reason": [None, "not run"]})
    paths = write_table(frame, tmp_path / "tables" / "t")
    assert [path.name for path in paths] == ["t.csv", "t.parquet", "t.md", "t.tex"]
    with paths[0].open(newline="") as file:
        assert [row["latency_ms"] for row in csv.DictReader(file)] == [repr(1 / 3), ""]
    assert pq.read_table(paths[1])["latency_ms"].to_pylist() == [1 / 3, None]


def test_readable_tables_have_separators_intervals_and_numbered_reasons() -> None:
    frame = pd.DataFrame(
        {
            "mode": ["remote_cache", "sys"],
            "size": [1_234_567.8, 10.0],
            "ratio": [0.12345, None],
            "ratio_low": [0.1, None],
            "ratio_high": [0.15, None],
            "why": [None, "50% & not run"],
        }
    )
    columns = (
        Column("mode", "mode"),
        Column("size", "size (B)", "count"),
        Column("ratio", "ratio", "ratio", reason="why"),
    )
    view = View("Sizes", columns)
    markdown = to_markdown(frame, [view])
    assert "| remote_cache | 1,234,568 | 0.123 [0.100 to 0.150] |" in markdown
    assert "null (1)" in markdown
    assert "(1) 50% & not run" in markdown
    latex = to_latex(frame, [view])
    assert r"remote\_cache & 1,234,568 & 0.123 [0.100 to 0.150] \\" in latex
    assert r"(1) 50\% \& not run" in latex


def test_an_empty_table_is_written_in_all_formats(tmp_path: Path) -> None:
    results = results_of(load(tmp_path, Trial("local")))
    paths = make_tables(results, tmp_path / "tables", ["hypotheses"])
    assert paths[2].read_text() == "No rows.\n"
    assert "verdict" in paths[0].read_text()


def test_the_same_trials_give_the_same_bytes_in_every_table_and_figure(tmp_path: Path) -> None:
    trials = load(tmp_path, *repeated("local", (60, 61, 62)), *repeated("remote_cache", (61, 62, 61)))
    written = []
    for attempt in ("a", "b"):
        rows = trial_rows(trials)
        paths = make_tables(results_of(trials), tmp_path / attempt, ["summary", "ladder", "hypotheses"])
        for name, figure in (("b", bytes_per_token(trials)), ("l", latency(rows)), ("t", telemetry(trials))):
            paths += save(figure, tmp_path / attempt / name)
        written.append({path.name: path.read_bytes() for path in paths})
    assert written[0] == written[1]
    assert len(written[0]) == 3 * 4 + 3 * 2


def test_bytes_by_class_come_from_the_clients_network_rows_of_measured_steps(tmp_path: Path) -> None:
    trials = load(tmp_path, Trial("remote_cache", delta_bytes=400), Trial("local"))
    table = bytes_by_class(trials).set_index(["mode", "tensor_class"])["bytes_per_token"]
    assert table["remote_cache"].to_dict() == {"header": 70, "kv": 100, "logits": 196_608, "tokens": 8}
    assert table["local"].tolist() == [0]


def test_no_bytes_are_marked_as_0_on_the_log_axis(tmp_path: Path) -> None:
    shown = texts(bytes_per_token(load(tmp_path, Trial("local"), Trial("remote_cache"))))
    assert "0 B" in shown
    assert "0" in shown
    assert "197 kB" in shown


def test_a_mode_that_was_not_run_in_a_phase_says_so(tmp_path: Path) -> None:
    trials = load(tmp_path, Trial("local"), Trial("local", phase="prefill"), Trial("naive"))
    assert "not run" in texts(bytes_per_token(trials))
    assert "not run" in texts(latency(trial_rows(trials)))


def test_slow_modes_get_an_axis_of_their_own(tmp_path: Path) -> None:
    trials = load(tmp_path, *repeated("local", (60, 61)), *repeated("naive", (1200, 1210)))
    fast, slow = latency(trial_rows(trials)).axes
    assert fast.get_xlim()[1] < 100
    assert slow.get_xlim()[0] > 500


def test_telemetry_names_the_reason_for_missing_gpu_samples(tmp_path: Path) -> None:
    shown = texts(telemetry(load(tmp_path, Trial("local"), Trial("remote_cache"))))
    assert any(NO_GPU in text for text in shown)
    assert "GPU power (W)" not in shown


def test_telemetry_draws_gpu_panels_where_there_are_samples(tmp_path: Path) -> None:
    trials = load(tmp_path, Trial("remote_cache", gpu_percent=(10, 20, 30)), Trial("local"))
    shown = texts(telemetry(trials))
    assert "GPU power (W)" in shown
    assert "no samples" in shown


def test_every_telemetry_line_lies_within_its_axis(tmp_path: Path) -> None:
    figure = telemetry(load(tmp_path, Trial("local"), Trial("remote_cache")))
    lines = [(ax.get_ylim(), line.get_ydata()) for ax in figure.axes for line in ax.lines]
    assert sum(len(values) > 0 for _, values in lines) == 6, "CPU and RSS of local's client and of both sides"
    assert all(low <= value <= high for (low, high), values in lines for value in values)


def test_no_texts_of_a_figure_overlap_even_with_modes_decades_apart(tmp_path: Path) -> None:
    cells = [
        *repeated("local", (60.3, 61, 62)),
        *repeated("naive", (1200, 1210, 1290)),
        *repeated("sys", (3, 3.2, 3.1)),
    ]
    cells += repeated("remote_cache_with_a_rather_long_name", (61, 62, 99))
    cells += repeated("local", (310, 300, 305), phase="prefill")
    trials = load(tmp_path, *cells)
    for figure in (latency(trial_rows(trials)), bytes_per_token(trials), telemetry(trials)):
        assert colliding_texts(figure) == []
        assert texts_outside(figure) == []


def test_telemetry_of_an_unknown_phase_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'prefil' has no trials; those that do are decode"):
        telemetry(load(tmp_path, Trial("local")), phase="prefil")


def test_readable_summary_has_one_block_for_each_phase(tmp_path: Path) -> None:
    trials = load(tmp_path, *repeated("local", (60, 61)), *repeated("local", (200, 210), phase="prefill"))
    markdown = to_markdown(summary(trial_rows(trials)), SUMMARY_VIEWS)
    assert "phase prefill, latency metric TTFT" in markdown
    assert "phase decode, latency metric ITL" in markdown
    assert NO_GPU in markdown


def test_a_windows_latency_is_its_whole_time_over_its_tokens_however_they_arrive() -> None:
    from semgap.analysis.load import KEYS
    from semgap.analysis.trial_rows import _latency_per_request_of_tokens

    rows = [
        {"request": 0, "step": step, "round_trips": int(step in (1, 5)), "latency_s": 0.4 if step in (4, 8) else 0.0}
        for step in range(1, 9)
    ]
    measured = pd.DataFrame(rows).assign(**dict.fromkeys(KEYS, "x"))
    assert _latency_per_request_of_tokens(measured).tolist() == [0.1, 0.1]
    local = measured.assign(round_trips=0)
    assert _latency_per_request_of_tokens(local).tolist() == [0.0, 0.0, 0.0, 0.4, 0.0, 0.0, 0.0, 0.4]


def test_a_trial_whose_weights_lay_in_the_workers_cache_is_not_averaged_into_uploads(tmp_path: Path) -> None:
    uploaded = Trial("remote_cache", trial=1, uploads=(500_000_000,), held=(0,))
    held = [Trial("remote_cache", trial=number, uploads=(0,), held=(500_000_000,)) for number in (2, 3)]
    rows = trial_rows(load(tmp_path, uploaded, *held))
    assert rows["weights_put_mb_per_s"].isna().tolist() == [False, True, True]
    assert rows["weights_put_reason"].tolist()[1:] == ["held by the worker's cache"] * 2
    row = summary(rows).iloc[0]
    assert (row["weights_bytes"], row["weights_put_mb_per_s"]) == (500_000_000, 2500.0)
    assert pd.isna(row["weights_reason"])
    alone = summary(rows[rows["trial"] > 1]).iloc[0]
    assert pd.isna(alone["weights_bytes"]) and pd.isna(alone["setup_payload_bytes"]) and pd.isna(alone["weights_put_mb_per_s"])
    assert alone["weights_reason"] == "held by the worker's cache" and alone["weights_held_bytes"] == 500_000_000


def test_bytes_that_a_codec_made_of_what_random_weights_compute_are_marked_and_give_no_verdict(tmp_path: Path) -> None:
    zlib = {"tokens": "raw", "weights": "raw", "kv": "raw", "reply": "fp16_zlib"}
    trials = load(
        tmp_path,
        *(Trial("remote_cache", trial=n, source="random") for n in (1, 2)),
        *(Trial("sys_simulated", trial=n, source="random", codec=zlib, sizes={"tokens": 8, "logits": 50_000}) for n in (1, 2)),
    )
    rows = trial_rows(trials)
    marked = dict(zip(rows["mode"], rows["ratios_reason"], strict=True))
    assert pd.isna(marked["remote_cache"]) and "random" in marked["sys_simulated"]
    table = summary(rows).set_index("mode")["ratios_reason"]
    assert pd.isna(table["remote_cache"]) and "not meaningful" in table["sys_simulated"]
    h1 = hypotheses(rows).set_index("hypothesis").loc["H1"]
    assert h1["cut"] > 0 and pd.isna(h1["verdict"]) and "not meaningful" in h1["reason"]
