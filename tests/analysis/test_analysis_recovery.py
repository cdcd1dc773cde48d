"""The table recovery and its figure, on trials with known numbers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from figure_texts import texts, unreadable_texts
from matplotlib.collections import PathCollection
from written_trials import LAYER_BYTES, LAYERS, RAW, Pressed, Trial, load, pressed, results, results_of

from semgap.analysis.figures import bytes_per_token, latency
from semgap.analysis.figures import recovery as recovery_figure
from semgap.analysis.figures.style import COLOURS, GREY
from semgap.analysis.results import EXACTNESS_COLUMNS
from semgap.analysis.stats import mean_interval
from semgap.analysis.tables import recovery, summary
from semgap.analysis.tables.render import to_latex, to_markdown

POSITION = 129  # filled before the first measured step
EVICTED = (0.0, 0.25, 1.0)


def by_delta(without_ms: float, quarter_ms: float, all_ms: float) -> tuple[Pressed, ...]:
    """A trial's steps restored by delta: 80% hidden for a quarter of the cache, 50% for all of it."""
    return (
        Pressed(without_ms / 1e3, 0.0),
        Pressed(quarter_ms / 1e3, 0.25, "delta", stall_s=0.0004, fetched=200_000),
        Pressed(all_ms / 1e3, 1.0, "delta", stall_s=0.004, fetched=800_000),
        Pressed(9.0, 0.25, "delta", stall_s=9.0, alone_s=0.002, fetched=200_000),  # a step after a lone restore counts in no other time
        Pressed(9.0, 1.0, "delta", stall_s=9.0, alone_s=0.008, fetched=800_000),
    )


def by(how: str, without_ms: float, *others_ms: float, fetched: int = 0) -> tuple[Pressed, ...]:
    """A trial's steps that wait for their whole restore."""
    missing = [
        Pressed(ms / 1e3, part, how, (ms - without_ms) / 1e3, fetched=fetched) for part, ms in zip(EVICTED[1:], others_ms, strict=True)
    ]
    return (Pressed(without_ms / 1e3, 0.0), *missing)


def deltas(*trials: tuple[float, float, float]) -> list[Trial]:
    return pressed("sys_delta", *(by_delta(*ms) for ms in trials), recovery="delta", codec=RAW | {"kv": "planes_zstd"}, keeps="tokens")


def reloads(*trials: tuple[float, float, float]) -> list[Trial]:
    return pressed("remote_cache_reload", *(by("reload", *ms, fetched=1_032_100) for ms in trials), codec=RAW | {"kv": "zstd"})


def recomputes(*trials: tuple[float, float, float]) -> list[Trial]:
    return pressed(
        "remote_cache_recompute", *(by("recompute", *ms) for ms in trials), recovery="recompute", shadow="worker", keeps="tokens"
    )


def sharing(mode: str = "sys_delta", *latencies_ms: float, **fields: Any) -> list[Trial]:
    """Trials of four requests that share KV memory for two; a step of each latency finds its whole cache gone."""
    how = fields.setdefault("recovery", "delta")
    steps = [(Pressed(ms / 1e3, None, how, stall_s=0.01, fetched=900_000),) * 4 for ms in latencies_ms or (50, 52)]
    return pressed(mode, *steps, phase="recovery-budget_1_2", kv_budget=0.5, live_requests=4, **fields)


def table_of(root: Path, *trials: Trial, exactness: pd.DataFrame | None = None) -> pd.DataFrame:
    return recovery.table(results_of(load(root, *trials), exactness))


def row_of(table: pd.DataFrame, mode: str, fraction: float) -> Any:
    return table[(table["mode"] == mode) & (table["evict_fraction"] == fraction)].iloc[0]


def test_there_is_one_row_for_each_mode_and_evict_fraction(tmp_path: Path) -> None:
    table = table_of(tmp_path, *reloads((40, 45, 46)), *deltas((40, 41, 44), (40, 41, 45)))
    assert table[["mode", "evict_fraction"]].to_numpy().tolist() == [
        [mode, fraction] for mode in ("remote_cache_reload", "sys_delta") for fraction in EVICTED
    ]
    assert table["trials"].tolist() == [1, 1, 1, 2, 2, 2]
    assert table["steps_per_trial"].tolist() == [1, 1, 1, 1, 2, 2]
    assert set(table["timed_steps_per_trial"]) == {1}


def test_a_phase_in_which_requests_share_memory_has_one_row_a_mode_with_its_budget(tmp_path: Path) -> None:
    table = table_of(tmp_path, *sharing())
    row = table.iloc[0]
    assert len(table) == 1
    assert pd.isna(row.evict_fraction)
    assert (row.kv_budget, row.live_requests, row.trials, row.steps_per_trial) == (0.5, 4, 2, 4)
    assert row.itl_ms == pytest.approx(51)


def test_missing_bytes_are_in_proportion_to_evicted_layers_and_compare_with_fetched_bytes(tmp_path: Path) -> None:
    table = table_of(tmp_path, *reloads((40, 45, 46)), *deltas((40, 41, 44)))
    layers = LAYERS // 4
    # The second measured step has a quarter, and by delta the fourth one too.
    for mode, fetched, position in (("remote_cache_reload", 1_032_100, POSITION + 1), ("sys_delta", 200_000, POSITION + 2)):
        row = row_of(table, mode, 0.25)
        assert row.missing_bytes_per_step == layers * LAYER_BYTES * position
        assert row.whole_bytes_per_step == LAYERS * LAYER_BYTES * position
        assert row.missing_share == 0.25
        assert row.fetched_network_bytes_per_step == fetched
        assert row.fetched_to_missing == pytest.approx(fetched / (layers * LAYER_BYTES * position))


def test_the_whole_cache_is_known_if_requests_share_memory(tmp_path: Path) -> None:
    row = table_of(tmp_path, *sharing()).iloc[0]
    assert row.whole_bytes_per_step == row.missing_bytes_per_step > 0


def test_bytes_that_are_not_fetched_have_no_ratio_and_say_why(tmp_path: Path) -> None:
    table = table_of(tmp_path, *recomputes((40, 340, 350)), *pressed("sys_delta", by_delta(40, 41, 44), recovery="delta", shadow="worker"))
    assert table["fetched_to_missing"].isna().all()
    assert row_of(table, "remote_cache_recompute", 0.25).fetched_to_missing_reason == "recompute fetches nothing"
    assert row_of(table, "sys_delta", 0.0).fetched_to_missing_reason == "nothing was missing"
    assert "nothing crosses the network" in row_of(table, "sys_delta", 1.0).fetched_to_missing_reason


def test_shadow_and_codec_are_null_unless_the_policy_uses_them(tmp_path: Path) -> None:
    table = table_of(tmp_path, *reloads((40, 45, 46)), *recomputes((40, 340, 350)), *deltas((40, 41, 44)))
    used = table.drop_duplicates("mode").set_index("mode")[["recovery", "shadow", "kv_codec"]]
    assert used.loc["remote_cache_reload"].tolist() == ["reload", "kvhost", "raw"]
    assert used.loc["sys_delta"].tolist() == ["delta", "kvhost", "planes_zstd"]
    assert used.loc["remote_cache_recompute", "recovery"] == "recompute"
    assert used.loc["remote_cache_recompute", ["shadow", "kv_codec"]].isna().all()


def test_saved_bytes_stand_with_the_evicted_fraction_and_are_null_with_a_reason_elsewhere(tmp_path: Path) -> None:
    table = table_of(tmp_path, *deltas((40, 41, 44)), *sharing())
    assert row_of(table, "sys_delta", 0.25).saved_payload_bytes_per_step == 1000
    nothing, shared = row_of(table, "sys_delta", 0.0), table[table["evict_fraction"].isna()].iloc[0]
    assert pd.isna(nothing.saved_payload_bytes_per_step) and pd.isna(shared.saved_payload_bytes_per_step)
    assert nothing.saved_payload_reason == "nothing is taken off the device in these steps"
    assert shared.saved_payload_reason == "saved within steps of other requests, and counted there"


def test_recovery_is_the_itl_less_that_of_the_same_trials_steps_without_a_miss(tmp_path: Path) -> None:
    """The trials are 30 ms apart; their recoveries are not."""
    row = row_of(table_of(tmp_path, *deltas((40, 41, 44), (70, 71.5, 74), (100, 102, 104))), "sys_delta", 0.25)
    expected = mean_interval([1.0, 1.5, 2.0])
    assert row.recovery_ms == pytest.approx(expected.value)
    assert (row.recovery_ms_low, row.recovery_ms_high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert row.itl_ms_high - row.itl_ms_low > 100


def test_intervals_are_over_trials_and_a_trial_counts_by_its_median(tmp_path: Path) -> None:
    """Steps of one trial differ widely; their medians are 40 and 42."""
    steps = [tuple(Pressed(ms / 1e3, 0.0) for ms in (median - 5, median, median + 90)) for median in (40, 42)]
    row = table_of(tmp_path, *pressed("sys_delta", *steps, recovery="delta")).iloc[0]
    expected = mean_interval([40.0, 42.0])
    assert (row.itl_ms, row.itl_ms_low, row.itl_ms_high) == pytest.approx((expected.value, expected.low, expected.high))
    assert (row.trials, row.steps_per_trial) == (2, 3)


def test_one_trial_has_values_without_intervals_and_says_so(tmp_path: Path) -> None:
    row = row_of(table_of(tmp_path, *deltas((40, 41, 44))), "sys_delta", 1.0)
    assert (row.recovery_ms, row.stall_ms, row.hidden_share) == pytest.approx((4, 4, 0.5))
    assert pd.isna(row.recovery_ms_low) and pd.isna(row.hidden_share_high)
    assert row.recovery_ms_reason == row.hidden_share_reason == "one trial has no interval; set trials to 2 or more"


def test_recovery_is_null_with_a_reason_if_every_step_misses(tmp_path: Path) -> None:
    table = table_of(tmp_path, *sharing(), *pressed("sys_delta", by_delta(40, 41, 44)[1:], recovery="delta"))
    assert table["recovery_ms"].isna().all()
    assert "no evict_fractions" in table[table["evict_fraction"].isna()].iloc[0].recovery_ms_reason
    assert row_of(table, "sys_delta", 0.25).recovery_ms_reason == "evict_fractions has no 0 to compare with"


def test_the_steps_without_a_miss_have_an_itl_and_no_recovery(tmp_path: Path) -> None:
    row = row_of(table_of(tmp_path, *deltas((40, 41, 44), (42, 43, 44))), "sys_delta", 0.0)
    assert (row.itl_ms, row.stall_ms) == (pytest.approx(41), 0)
    assert row[["recovery_ms", "restore_alone_ms", "hidden_share"]].isna().all()
    assert row.recovery_ms_reason == "the steps without a miss, which the others are compared with"


def test_the_hidden_share_is_1_less_stall_over_the_restore_alone(tmp_path: Path) -> None:
    table = table_of(tmp_path, *deltas((40, 41, 44), (40, 41, 44)))
    assert row_of(table, "sys_delta", 0.25).hidden_share == pytest.approx(0.8)
    row = row_of(table, "sys_delta", 1.0)
    assert (row.restore_alone_ms, row.stall_ms, row.hidden_share) == pytest.approx((8, 4, 0.5))


def test_the_share_hidden_in_the_itl_includes_compute_that_fetching_slowed_down(tmp_path: Path) -> None:
    """A quarter: 1 ms more of ITL against 2 ms alone. All: the step took 12 ms more, though it stalled for 4 of 8 ms alone."""
    table = table_of(tmp_path, *deltas((40, 41, 52), (50, 51, 62)))
    assert row_of(table, "sys_delta", 0.25).itl_hidden_share == pytest.approx(0.5)
    row = row_of(table, "sys_delta", 1.0)
    assert (row.hidden_share, row.itl_hidden_share) == pytest.approx((0.5, -0.5))
    assert row_of(table, "sys_delta", 0.0).itl_hidden_share_reason == "nothing is taken off the device in these steps"


@pytest.mark.parametrize("make", [reloads, recomputes])
def test_policies_that_do_not_overlap_have_no_hidden_share_and_say_so(tmp_path: Path, make: Any) -> None:
    table = table_of(tmp_path, *make((40, 45, 46), (40, 45, 47)))
    assert table["hidden_share"].isna().all() and table["restore_alone_ms"].isna().all()
    assert table["hidden_share_reason"].str.contains("does not overlap").all()
    assert table["stall_ms"].tolist() == pytest.approx([0, 5, 6.5])


def test_a_restore_that_was_not_done_alone_is_null_with_the_reason(tmp_path: Path) -> None:
    row = table_of(tmp_path, *sharing()).iloc[0]
    assert pd.isna(row.restore_alone_ms) and pd.isna(row.hidden_share)
    assert row.hidden_share_reason == row.restore_alone_ms_reason == "a restore is done alone only in phases with evict_fractions"


def test_only_steps_restored_by_delta_count_for_the_hidden_share(tmp_path: Path) -> None:
    """Under auto a reload hides nothing by design."""
    steps = (
        Pressed(0.040, 0.0),
        Pressed(0.044, 0.5, "delta", stall_s=0.001, predicted_s=0.005),
        Pressed(0.044, 0.5, "delta", stall_s=9.0, alone_s=0.004, predicted_s=0.005),
        Pressed(0.048, 0.5, "reload", stall_s=0.008, predicted_s=0.007),
        Pressed(0.048, 0.5, "reload", stall_s=0.008, alone_s=0.008, predicted_s=0.007),
    )
    row = row_of(table_of(tmp_path, *pressed("sys_auto", steps, steps, recovery="auto")), "sys_auto", 0.5)
    assert row.hidden_share == pytest.approx(0.75)
    assert (row.delta_steps, row.reload_steps, row.recompute_steps) == (4, 4, 0)


def test_the_predicted_time_stands_beside_the_measured_one_or_has_a_reason(tmp_path: Path) -> None:
    lone = Pressed(9.0, 0.5, "delta", stall_s=9.0, alone_s=0.004, predicted_s=0.005)
    steps = (Pressed(0.040, 0.0), Pressed(0.044, 0.5, "delta", stall_s=0.001, predicted_s=0.005), lone)
    table = table_of(tmp_path, *pressed("sys_auto", steps, steps, recovery="auto"), *deltas((40, 41, 44)))
    row = row_of(table, "sys_auto", 0.5)
    assert (row.predicted_ms, row.restore_alone_ms, row.stall_ms) == pytest.approx((5, 4, 1))
    assert row_of(table, "sys_auto", 0.0).predicted_ms_reason == "no step missed a block"
    assert row_of(table, "sys_delta", 1.0).predicted_ms_reason == "no cost model: the mode's recovery is delta"


def test_fallbacks_are_counted_with_the_way_that_the_step_took(tmp_path: Path) -> None:
    delta = (Pressed(0.045, 1.0, "delta"), Pressed(0.045, 1.0, "delta", alone_s=0.008))
    lost = (Pressed(0.4, 1.0, "recompute", stall_s=0.35, fallback="gone: 8 blocks"), *delta)
    row = row_of(table_of(tmp_path, *pressed("sys_delta", lost, lost[:1], recovery="delta")), "sys_delta", 1.0)
    assert (row.recompute_steps, row.delta_steps, row.fallback_steps) == (2, 2, 2)
    assert row.hidden_share_reason == "not measured in every trial"


def test_in_local_nothing_is_missing_and_nothing_is_zero(tmp_path: Path) -> None:
    steps = tuple(Pressed(0.04, fraction) for fraction in EVICTED)
    table = table_of(tmp_path, *pressed("local", steps, steps))
    assert table["itl_ms"].tolist() == pytest.approx([40, 40, 40])
    nulls = ["missing_bytes_per_step", "whole_bytes_per_step", "missing_share", "copied_bytes_per_step", "saved_payload_bytes_per_step"]
    nulls += ["recovery_ms", "stall_ms", "restore_alone_ms", "hidden_share", "itl_hidden_share", "predicted_ms"]
    nulls += ["delta_steps", "fallback_steps"]
    assert table[nulls].isna().all(axis=None)
    reasons = ["bytes_reason", "fetched_to_missing_reason", "saved_payload_reason", "recovery_ms_reason", "stall_ms_reason", "steps_reason"]
    assert (table[reasons] == "nothing is taken off the device in local").all(axis=None)


def test_a_promise_counts_as_kept_only_if_the_exactness_check_says_so_too(tmp_path: Path) -> None:
    broken = dict.fromkeys(EXACTNESS_COLUMNS) | {"model": "smollm2", "mode": "sys_delta", "promise_kept": False}
    table = table_of(tmp_path, *reloads((40, 45, 46)), *deltas((40, 41, 44)), exactness=pd.DataFrame([broken]))
    assert table.groupby("mode")["promise_kept"].first().to_dict() == {"remote_cache_reload": True, "sys_delta": False}
    assert table.groupby("mode")["keeps"].first().to_dict() == {"remote_cache_reload": "bitwise", "sys_delta": "tokens"}


def test_a_hidden_share_that_trials_cannot_resolve_is_null_with_the_number_that_would(tmp_path: Path) -> None:
    """80% is hidden of a quarter in every trial; the ITL of its steps varies by 10 ms around that."""
    row = row_of(table_of(tmp_path, *deltas((40, 42, 44), (40, 52, 44), (40, 32, 44))), "sys_delta", 0.25)
    assert row.hidden_share == pytest.approx(0.8)
    assert pd.isna(row.itl_hidden_share)
    assert "not resolved by 3 trials: +-25 points needs about" in row.itl_hidden_share_reason


def test_time_beyond_the_control_is_the_itl_less_the_median_of_the_window_at_its_positions(tmp_path: Path) -> None:
    """One control step of each window was disturbed."""
    controls = [((0.030, 0.030, 0.090),), ((0.032, 0.032, 0.099),)]
    trials = [replace(trial, control_s=control) for trial, control in zip(reloads((31, 36, 39), (34, 37, 42)), controls, strict=True)]
    table = table_of(tmp_path, *trials, *sharing())
    assert [row_of(table, "remote_cache_reload", f).beyond_ms for f in EVICTED] == pytest.approx([1.5, 5.5, 9.5])
    expected = mean_interval([6.0, 5.0])
    row = row_of(table, "remote_cache_reload", 0.25)
    assert (row.beyond_ms_low, row.beyond_ms_high) == pytest.approx((expected.low, expected.high))


def test_recovery_leaves_out_a_machine_that_slowed_down_between_the_steps(tmp_path: Path) -> None:
    """The steps without a miss ran at 30 ms, those with one at 60 ms, and so did the control beside them. The restore took 5 ms."""
    steps = [Pressed(0.031, 0.0)] * 2 + [Pressed(0.066, 1.0, "reload", 0.005)] * 2
    trials = pressed("remote_cache_reload", tuple(steps), tuple(steps), control_s=((0.030, 0.030), (0.060, 0.060)))
    row = row_of(table_of(tmp_path, *trials), "remote_cache_reload", 1.0)
    assert row.recovery_ms == pytest.approx(5)
    assert row.itl_ms == pytest.approx(66)


def test_without_a_control_there_is_no_time_beyond_it_and_recovery_compares_latencies(tmp_path: Path) -> None:
    row = row_of(table_of(tmp_path, *reloads((40, 45, 46), (40, 45, 46))), "remote_cache_reload", 1.0)
    assert pd.isna(row.beyond_ms) and row.beyond_ms_reason == "no control in this test"
    assert row.recovery_ms == pytest.approx(6)


def test_the_controls_cache_is_no_part_of_the_whole_cache(tmp_path: Path) -> None:
    trials = pressed("sys_delta", by_delta(40, 41, 44), recovery="delta", control_s=((0.03,) * 5,))
    row = row_of(table_of(tmp_path, *trials), "sys_delta", 1.0)
    assert row.missing_share == 1 and row.whole_bytes_per_step == row.missing_bytes_per_step


def test_a_restore_that_had_no_second_step_to_run_before_says_so(tmp_path: Path) -> None:
    table = table_of(tmp_path, *pressed("sys_delta", by_delta(40, 41, 44)[:3], recovery="delta"))
    assert "no trial has two steps with this fraction" in row_of(table, "sys_delta", 1.0).hidden_share_reason
    assert row_of(table, "sys_delta", 0.0).hidden_share_reason == "nothing is taken off the device in these steps"


def test_a_window_of_requests_that_share_memory_counts_by_its_mean(tmp_path: Path) -> None:
    """A median would show the tokens that arrived with another one."""
    window = (Pressed(0.2, None, "delta", stall_s=0.06), *[Pressed(0.0, None)] * 3)
    row = table_of(tmp_path, *pressed("sys", window, window, recovery="delta", live_requests=4)).iloc[0]
    assert (row.itl_ms, row.stall_ms) == pytest.approx((50, 15))


def test_without_a_recovery_phase_the_table_is_empty_and_the_figure_says_so(tmp_path: Path) -> None:
    found = results(tmp_path, Trial("remote_cache"))
    table = recovery.table(found)
    assert found.recovery_steps.empty and table.empty
    assert "promise_kept" in table.columns
    assert to_markdown(table, recovery.VIEWS) == "No rows.\n"
    assert [text.get_text() for text in recovery_figure.plot(found).texts] == ["no recovery phase was run"]


def test_each_null_that_a_reader_sees_stands_with_its_reason(tmp_path: Path) -> None:
    table = table_of(tmp_path, *reloads((40, 45, 46)), *recomputes((40, 340, 350)), *deltas((40, 41, 44)), *sharing())
    shown = to_markdown(table, recovery.VIEWS)
    assert "null |" not in shown
    assert "null (1)" in shown
    assert ") reload does not overlap: the step waits for all of it" in shown
    assert "\\toprule" in to_latex(table, recovery.VIEWS)


def test_recovery_phases_appear_only_in_their_own_table_and_figure(tmp_path: Path) -> None:
    found = results(tmp_path, Trial("remote_cache"), *deltas((40, 41, 44)))
    assert found.rows["phase_kind"].tolist() == ["decode", "recovery"]
    assert summary.table(found)["mode"].tolist() == ["remote_cache"]
    for figure in (latency.plot(found), bytes_per_token.plot(found)):
        assert [ax.get_title(loc="left") for ax in figure.axes] == ["decode"]
        assert "not run" not in texts(figure)


def test_with_recovery_phases_alone_the_summary_is_empty_and_figures_say_so(tmp_path: Path) -> None:
    found = results(tmp_path, *deltas((40, 41, 44)))
    assert summary.table(found).empty and "latency_mean_ms" in summary.table(found).columns
    for figure in (latency.plot(found), bytes_per_token.plot(found)):
        assert [text.get_text() for text in figure.texts] == ["only phases that move KV blocks were run: they have figures of their own"]


def drawn(root: Path, *trials: Trial) -> Any:
    return recovery_figure.plot(results(root, *trials))


def lines_of(ax: Any) -> dict[str, list[tuple[float, float]]]:
    return {line.get_color(): list(zip(*(map(float, data) for data in line.get_data()), strict=True)) for line in ax.lines}


def test_the_figure_draws_bytes_and_the_line_in_proportion_to_the_miss(tmp_path: Path) -> None:
    figure = drawn(tmp_path, *reloads((40, 45, 46), (40, 45, 46)), *deltas((40, 41, 44), (40, 41, 44.2)))
    bytes_ax, recovery_ax, hidden_ax = figure.axes
    lines = lines_of(bytes_ax)
    assert [x for x, _ in lines[GREY]] == [0, 25, 100]
    assert [y for _, y in lines[COLOURS[0]]] == pytest.approx([0, 1.0321, 1.0321])
    assert [y for _, y in lines[COLOURS[1]]] == pytest.approx([0, 0.2, 0.8])
    assert [y for _, y in lines_of(recovery_ax)[COLOURS[1]]] == pytest.approx([1, 4.1])
    by_stall, by_itl = ([float(y) for y in line.get_ydata()] for line in hidden_ax.lines)
    assert (by_stall, by_itl) == (pytest.approx([80, 50]), pytest.approx([50, 48.75]))


def test_copies_stand_in_for_fetched_bytes_where_the_shadow_is_the_workers_memory(tmp_path: Path) -> None:
    steps = (Pressed(0.04, 0.0), Pressed(0.041, 1.0, "delta", 0.001, copied=1_000_000))
    bytes_ax = drawn(tmp_path, *pressed("sys_delta_worker", steps, recovery="delta", shadow="worker")).axes[0]
    assert [y for _, y in lines_of(bytes_ax)[COLOURS[0]]] == pytest.approx([0, 1.0])


@pytest.mark.parametrize(("slowest_ms", "scale"), [(50, "linear"), (390, "symlog")])
def test_recoveries_far_apart_have_a_logarithmic_axis_that_reaches_zero(tmp_path: Path, slowest_ms: float, scale: str) -> None:
    trials = [*recomputes((40, slowest_ms, slowest_ms), (40, slowest_ms, slowest_ms + 1)), *deltas((40, 42, 44), (40, 41.9, 44))]
    ax = drawn(tmp_path, *trials).axes[1]
    assert ax.get_yscale() == scale
    assert ax.get_ylim()[0] < 0 < slowest_ms - 40 < ax.get_ylim()[1]


def test_a_logarithmic_axis_is_announced_and_intervals_beyond_an_axis_end_in_arrows(tmp_path: Path) -> None:
    figure = drawn(tmp_path, *reloads((40, 41, 42), (40, 41, 90)), *deltas((40, 40.1, 40.2), (40, 40.1, 40.3)))
    recovery_ax = figure.axes[1]
    assert "log from" in recovery_ax.get_title(loc="left") and recovery_ax.get_yscale() == "symlog"
    assert [points for points in recovery_ax.collections if isinstance(points, PathCollection) and len(points.get_offsets())]


@pytest.mark.parametrize("stall_ms", [1, 20, 90])
def test_all_of_a_restore_is_a_tick_however_little_was_hidden(tmp_path: Path, stall_ms: int) -> None:
    step = Pressed(0.05, 1.0, "delta", stall_s=stall_ms / 1e3, alone_s=0.01)
    steps = (Pressed(0.04, 0.0), replace(step, alone_s=None), step)
    figure = drawn(tmp_path, *pressed("sys_delta", steps, steps, recovery="delta"))
    assert 100 in figure.axes[2].get_yticks()


def test_the_panel_says_why_nothing_could_be_hidden(tmp_path: Path) -> None:
    figure = drawn(tmp_path, *reloads((40, 45, 46)))
    assert "reload does not overlap" in " ".join(figure.axes[2].texts[0].get_text().split())


def test_phases_in_which_requests_share_memory_show_the_itl_of_each_mode(tmp_path: Path) -> None:
    figure = drawn(tmp_path, *sharing("remote_cache_reload", 48, 49, recovery="reload"), *sharing("sys_delta", 52, 53))
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["remote_cache_reload", "sys_delta"]
    assert {"48.5 ms", "52.5 ms"} <= set(texts(figure))


@pytest.mark.parametrize("trials", [1, 2, 3])
def test_every_text_of_the_figure_can_be_read(tmp_path: Path, trials: int) -> None:
    noise = [0, 1.7, -2.4][:trials]
    everything = [
        *reloads(*((40, 45 + n, 46) for n in noise)),
        *recomputes(*((40, 340 + n, 350) for n in noise)),
        *deltas(*((40, 40.1 + n, 44 + n) for n in noise)),
        *(
            t
            for name in "abcdefg"
            for t in pressed(f"sys_simulated_delta_{name}", *(by_delta(40, 41 + n, 44) for n in noise), recovery="delta")
        ),
        *sharing("remote_cache_reload", *(48 + n for n in noise), recovery="reload"),
        *sharing("sys_delta", *(150 + 20 * n for n in noise)),
        *(Trial(t.mode, "recovery-budget_1_4", **{k: v for k, v in vars(t).items() if k not in ("mode", "phase")}) for t in sharing()),
    ]
    figure = drawn(tmp_path, *everything)
    assert unreadable_texts(figure) == []
