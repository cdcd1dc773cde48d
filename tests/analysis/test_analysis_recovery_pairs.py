"""The table recovery_pairs, on trials with known numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from written_trials import ROWS, Pressed, Trial, load, pressed, results_of

from semgap.analysis.marks import marks_of
from semgap.analysis.stats import holm, mean_interval
from semgap.analysis.tables import recovery_pairs
from semgap.analysis.tables.render import to_markdown

FRACTIONS = (0.0, 1.0)


def trials(mode: str, *latencies_ms: tuple[float, float], control_ms: float = 30.0, **fields: Any) -> list[Trial]:
    """Trials of a step without a miss and a step with one, beside a control."""
    steps = [tuple(Pressed(ms / 1e3, f, "reload" if f else None) for ms, f in zip(each, FRACTIONS, strict=True)) for each in latencies_ms]
    return pressed(mode, *steps, control_s=((control_ms / 1e3,) * 2,), **fields)


def table_of(root: Path, *written: Trial, blind: tuple[str, ...] = ()) -> pd.DataFrame:
    marks = marks_of(ROWS | {mode: {"blind": True} for mode in blind})
    return recovery_pairs.table(replace(results_of(load(root, *written)), marks=marks))


def row_of(table: pd.DataFrame, mode: str, fraction: float = 1.0) -> Any:
    return table[(table["mode"] == mode) & (table["evict_fraction"] == fraction)].iloc[0]


def test_every_pair_of_modes_is_compared_at_every_fraction(tmp_path: Path) -> None:
    table = table_of(tmp_path, *(trial for mode in ("a", "b", "c") for trial in trials(mode, (31, 40), (31, 40))))
    assert table[["evict_fraction", "mode", "against"]].to_numpy().tolist() == [
        [fraction, *pair] for fraction in FRACTIONS for pair in (("b", "a"), ("c", "a"), ("c", "b"))
    ]


def test_a_difference_is_of_latencies_beyond_the_trials_own_controls(tmp_path: Path) -> None:
    """The machine was twice as slow in the trials of b, whose restores took 2, 3 and 4 ms less."""
    slow = trials("b", (62, 68), (62, 67), (62, 66), control_ms=60.0)
    row = row_of(table_of(tmp_path, *trials("a", (31, 40), (31, 40), (31, 40)), *slow), "b")
    expected = mean_interval([-2.0, -3.0, -4.0])
    found = (row.difference_ms, row.difference_ms_low, row.difference_ms_high)
    assert found == pytest.approx((expected.value, expected.low, expected.high))
    logs = mean_interval([float(np.log(ms / 60 / (40 / 30))) for ms in (68, 67, 66)])
    assert (row.ratio, row.ratio_low, row.ratio_high) == pytest.approx(tuple(np.exp([logs.value, logs.low, logs.high])))
    assert (row.basis, row.trials, row.steps_per_trial) == ("each trial's control", 3, 1)


def test_trials_pair_by_number_so_that_what_they_share_drops_out(tmp_path: Path) -> None:
    """Trials differ by 20 ms; the modes by 2 ms in each of them."""
    row = row_of(table_of(tmp_path, *trials("a", (31, 40), (31, 50), (31, 60)), *trials("b", (31, 42), (31, 52.1), (31, 61.9))), "b")
    assert row.difference_ms == pytest.approx(2)
    assert row.difference_ms_high - row.difference_ms_low < 1


def test_only_steps_that_both_modes_ran_right_after_their_eviction_pair(tmp_path: Path) -> None:
    """c was cut to 3 of 6 steps; before the last of these the restore also ran alone."""

    def steps(ms: float, count: int, alone_s: float | None = None) -> tuple[Pressed, ...]:
        return (*[Pressed(ms / 1e3, 1.0, "delta")] * (count - 1), Pressed(9.0 if alone_s else 0.04, 1.0, "delta", alone_s=alone_s))

    control: Any = {"control_s": ((0.03,) * 6,), "recovery": "delta"}
    whole = pressed("a", steps(40, 6), steps(40, 6), **control)
    cut = pressed("c", steps(43, 3, 0.01), steps(43, 3, 0.01), **control | {"control_s": ((0.03,) * 3,)})
    row = row_of(table_of(tmp_path, *whole, *cut), "c")
    assert (row.difference_ms, row.steps_per_trial) == (pytest.approx(3), 2)


def test_a_baseline_that_knows_nothing_is_what_the_others_are_against_and_the_view_shows_its_pairs(tmp_path: Path) -> None:
    written = [trial for mode in ("a", "b", "c") for trial in trials(mode, (31, 40), (31, 41))]
    table = table_of(tmp_path, *written, blind=("b",))
    pairs = table[table["evict_fraction"] == 1][["mode", "against", "against_baseline"]].to_numpy().tolist()
    assert pairs == [["a", "b", True], ["c", "a", False], ["c", "b", True]]
    shown = to_markdown(table, recovery_pairs.VIEWS)
    assert shown.count("| b ") == 4 and "| c    | a " not in shown


def test_p_values_are_corrected_over_all_pairs_of_the_phase(tmp_path: Path) -> None:
    written = [
        *trials("a", (31, 40), (31, 41), (32, 40)),
        *trials("b", (31, 44), (32, 46), (31, 45)),
        *trials("c", (33, 39), (33, 40), (31, 41)),
    ]
    table = table_of(tmp_path, *written)
    assert table["p_holm"].tolist() == pytest.approx(holm(table["p"].tolist()))
    assert row_of(table, "b").p < 0.05


def test_modes_without_a_control_compare_latencies_of_one_session(tmp_path: Path) -> None:
    def sharing(mode: str, ms: float, **fields: Any) -> list[Trial]:
        steps = (Pressed(2 * ms / 1e3, None, "delta"), Pressed(0.0, None))  # two tokens of one window
        return pressed(mode, steps, steps, phase="recovery-budget_1_2", live_requests=4, recovery="delta", **fields)

    table = table_of(tmp_path, *sharing("a", 50), *sharing("b", 60), *sharing("c", 60, session="s2"))
    row, other = (table[(table["mode"] == mode) & (table["against"] == "a")].iloc[0] for mode in ("b", "c"))
    assert (row.ratio, row.basis, row.trials) == (pytest.approx(1.2), "paired latencies", 2)
    assert pd.isna(row.difference_ms) and row.difference_ms_reason == "no control in this test"
    assert pd.isna(other.ratio) and "no two trials of one number, session" in other.ratio_reason and pd.isna(other.p)


def test_phases_with_and_without_a_control_stand_in_one_table(tmp_path: Path) -> None:
    sharing = [t for mode in ("a", "b") for t in pressed(mode, (Pressed(0.05),) * 2, phase="recovery-budget_1_2", live_requests=4)]
    table = table_of(tmp_path, *trials("a", (31, 40)), *trials("b", (31, 44)), *sharing)
    assert table.groupby("phase")["basis"].unique().map(list).to_dict() == {
        "recovery-budget_1_2": ["paired latencies"],
        "recovery-evict": ["each trial's control"],
    }


def test_one_pair_of_trials_has_no_interval_and_no_p_value(tmp_path: Path) -> None:
    row = row_of(table_of(tmp_path, *trials("a", (31, 40)), *trials("b", (31, 44))), "b")
    assert row.difference_ms == pytest.approx(4) and pd.isna(row.difference_ms_low) and pd.isna(row.p)
    assert row.difference_ms_reason == "one trial has no interval; set trials to 2 or more"


def test_without_a_recovery_phase_or_a_second_mode_there_is_no_pair(tmp_path: Path) -> None:
    assert table_of(tmp_path / "none", Trial("remote_cache")).empty
    assert table_of(tmp_path / "one", *trials("a", (31, 40))).empty
