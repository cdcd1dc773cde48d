"""Table load_facts: a mode knows the facts of its rung and of those below, and a fact is worth its mean over the orders that were run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from written_trials import Trial, results

from semgap.analysis.marks import marks_of
from semgap.analysis.stats import geometric_mean_interval
from semgap.analysis.tables import load_facts

SERIAL = {"rung": {"adds": "one after the other"}, "batching": {}}
BATCHED = {"rung": {"after": "serial", "adds": "one model", "fact": "weights"}, "batching": {}}
WINDOWS = {"rung": {"after": "batched", "adds": "a loop", "fact": "loop"}, "batching": {}}
SERIAL_WINDOWS = {"rung": {"after": "serial", "adds": "a loop", "fact": "loop"}, "batching": {}}
MARKS = marks_of({"serial": SERIAL, "batched": BATCHED, "windows": WINDOWS, "serial_windows": SERIAL_WINDOWS})


def facts(directory: Path, tokens_per_s: dict[str, float | list[float]]) -> pd.DataFrame:
    """Of modes that gave so many tokens a second, in one trial or in each of several."""
    at = {"model": "smollm2", "network": "loopback", "phase": "load", "level": 0, "concurrency": 4, "share": None, "rate_per_s": None}
    each = {mode: value if isinstance(value, list) else [value] for mode, value in tokens_per_s.items()}
    load = pd.DataFrame([at | {"mode": m, "trial": t, "tokens_per_s": one} for m, rates in each.items() for t, one in enumerate(rates)])
    return load_facts.table(replace(results(directory, Trial("local")), load=load, load_marks=MARKS)).set_index("fact")


def test_a_mode_knows_the_facts_of_its_rung_and_of_all_below() -> None:
    assert load_facts.known_to("windows", MARKS) == {"weights", "loop"}
    assert load_facts.known_to("serial", MARKS) == load_facts.known_to("a mode without a rung", MARKS) == frozenset()


def test_with_a_mode_for_each_set_a_fact_is_worth_its_mean_over_both_orders(tmp_path: Path) -> None:
    table = facts(tmp_path, {"serial": 10, "batched": 20, "windows": 60, "serial_windows": 15})
    assert (table["orders"] == 2).all()
    assert table.loc["weights", "factor"] == pytest.approx((2 * 4) ** 0.5)
    assert table.loc["loop", "factor"] == pytest.approx((3 * 1.5) ** 0.5)
    assert table.loc["weights", "ladder_factor"] == pytest.approx(2)


def test_facts_that_no_mode_told_apart_are_one(tmp_path: Path) -> None:
    table = facts(tmp_path, {"serial": 10, "windows": 60})
    assert list(table.index) == ["weights, loop"]
    assert table.loc["weights, loop", "factor"] == pytest.approx(6)


def test_facts_that_every_mode_knew_are_given_and_the_others_are_counted_from_there(tmp_path: Path) -> None:
    table = facts(tmp_path, {"batched": 20, "windows": 60})
    assert list(table.index) == ["loop"] and list(table["given"]) == ["weights"]
    assert table.loc["loop", "factor"] == pytest.approx(3) and table.loc["loop", "ms_per_token_nothing_known"] == pytest.approx(50)


def test_without_a_mode_for_each_set_on_the_way_there_is_no_order_and_the_row_says_so(tmp_path: Path) -> None:
    table = facts(tmp_path, {"batched": 20, "serial_windows": 60})
    assert len(table) == 2 and table["factor"].isna().all() and table["reason"].str.contains("run those of the ladder").all()


def test_a_factor_has_an_interval_over_trials_that_are_paired(tmp_path: Path) -> None:
    table = facts(tmp_path, {"serial": [10, 11, 14], "windows": [20, 23, 28]})  # the machine's speed differs, the ratio hardly
    interval = geometric_mean_interval([2, 23 / 11, 2])
    row = table.loc["weights, loop"]
    assert [row["factor"], row["factor_low"], row["factor_high"]] == pytest.approx([interval.value, interval.low, interval.high])
    assert row["factor_high"] - row["factor_low"] < 0.3 and row["share"] == pytest.approx(1)


def test_a_share_of_a_difference_that_trials_do_not_tell_from_nothing_is_null(tmp_path: Path) -> None:
    table = facts(tmp_path, {"serial": [10, 11, 12], "batched": [12, 11, 10], "windows": [11, 10, 12.5]})
    assert table["share"].isna().all() and table["share_reason"].str.contains("3 trials do not tell it from 1").all()
    assert table["factor"].notna().all()
