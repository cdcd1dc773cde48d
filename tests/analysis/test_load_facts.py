"""Table load_facts: a mode knows the facts of its rung and of those below, and a fact is worth its mean over the orders that were run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from written_trials import Trial, results

from semgap.analysis.marks import marks_of
from semgap.analysis.tables import load_facts

SERIAL = {"rung": {"adds": "one after the other"}, "batching": {}}
BATCHED = {"rung": {"after": "serial", "adds": "one model", "fact": "weights"}, "batching": {}}
WINDOWS = {"rung": {"after": "batched", "adds": "a loop", "fact": "loop"}, "batching": {}}
SERIAL_WINDOWS = {"rung": {"after": "serial", "adds": "a loop", "fact": "loop"}, "batching": {}}
MARKS = marks_of({"serial": SERIAL, "batched": BATCHED, "windows": WINDOWS, "serial_windows": SERIAL_WINDOWS})


def facts(directory: Path, tokens_per_s: dict[str, float]) -> pd.DataFrame:
    at = {"model": "smollm2", "network": "loopback", "phase": "load", "level": 0, "concurrency": 4, "share": None, "rate_per_s": None}
    load = pd.DataFrame([at | {"mode": mode, "tokens_per_s": value} for mode, value in tokens_per_s.items()])
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


def test_without_a_mode_that_knows_nothing_there_is_no_order_and_the_row_says_so(tmp_path: Path) -> None:
    table = facts(tmp_path, {"batched": 20, "windows": 60})
    assert table["factor"].isna().all() and table["reason"].str.contains("run those of the ladder").all()
