"""Table load_facts: the worth of each fact about requests, in time per token under load, averaged over the orders of adding them.

As table facts, over v(S): the time per token of the mode that knows the set S. An order counts if a mode ran for each set on its way.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from semgap.analysis.aggregate import SETTING
from semgap.analysis.columns import frame_of
from semgap.analysis.load_levels import level_name
from semgap.analysis.marks import Marks, rungs
from semgap.analysis.results import Results
from semgap.analysis.tables.facts import Needs, allowed_orders, needs_of
from semgap.analysis.tables.render import Column, View

COLUMNS = [
    *(*SETTING, "level", "load", "fact", "needs", "orders", "log_ratio", "factor", "share", "ladder_factor"),
    *("ms_per_token_nothing_known", "ms_per_token_all_known", "reason"),
]


def table(results: Results) -> pd.DataFrame:
    """One row per model, network, load phase, level and fact that a mode knew; facts that no mode told apart are one row.

    Null with a reason if the sets that the modes know, from nothing on, are in no order.
    """
    needs = needs_of({mode: rung for mode in rungs(results.load_marks) if (rung := results.load_marks[mode].rung)})
    rows: list[dict[str, Any]] = []
    for keys, block in results.load.groupby([*SETTING, "level"], sort=False):
        at = dict(zip([*SETTING, "level"], keys, strict=True)) | {"load": level_name(block.iloc[0])}
        throughput = block.groupby("mode", sort=False)["tokens_per_s"].mean().sort_values()
        rows += _rows(at, {known_to(str(mode), results.load_marks): 1e3 / value for mode, value in throughput.items()}, needs)
    return frame_of(rows, COLUMNS)


def known_to(mode: str, marks: Marks) -> frozenset[str]:
    """The facts of a mode's rung and of all rungs below it; none for a mode without a rung."""
    rung = marks[mode].rung if mode in marks else None
    if rung is None:
        return frozenset()
    below = known_to(rung.after, marks) if rung.after else frozenset[str]()
    return below | {rung.fact} if rung.fact else below


def _rows(at: Mapping[str, Any], measured: Mapping[frozenset[str], float], needs: Needs) -> list[dict[str, Any]]:
    """`measured`: ms per token by the set of facts; of two modes with one set the faster came last."""
    groups = groups_of(measured, needs)
    others = {group: _needs(group, needs) for group in groups}
    needed = {", ".join(group): frozenset(", ".join(each) for each in groups if others[group] & {*each}) for group in groups}
    orders = [order for order in allowed_orders(needed) if all(_facts(order[:count]) in measured for count in range(len(order) + 1))]
    rows = [dict(at) | {"fact": ", ".join(g), "needs": ", ".join(sorted(others[g])), "orders": len(orders)} for g in groups]
    if not orders:
        return [row | {"reason": "the modes that ran are in no order by the facts of their rungs; run those of the ladder"} for row in rows]
    nothing_ms, all_ms = measured[frozenset()], measured[_facts(orders[0])]
    ends = {"ms_per_token_nothing_known": nothing_ms, "ms_per_token_all_known": all_ms}
    whole = math.log(nothing_ms / all_ms)
    found = []
    for row in rows:
        logs = [_log_ratio(measured, order, row["fact"]) for order in orders]
        mean = math.fsum(logs) / len(logs)
        worth = {"log_ratio": mean, "factor": math.exp(mean), "share": mean / whole if whole else None}
        found.append(row | ends | worth | {"ladder_factor": math.exp(logs[0])})
    return found


def groups_of(measured: Iterable[frozenset[str]], needs: Needs) -> list[tuple[str, ...]]:
    """The facts that a mode knew, in the order of the ladder; those that every mode knew together, or not at all, as one."""
    known = list(measured)
    groups: dict[tuple[bool, ...], tuple[str, ...]] = {}
    for fact in needs:
        pattern = tuple(fact in facts for facts in known)
        if any(pattern):
            groups[pattern] = (*groups.get(pattern, ()), fact)
    return list(groups.values())


def _needs(group: Iterable[str], needs: Needs) -> frozenset[str]:
    """The facts of other groups that a group needs."""
    return frozenset(needed for fact in group for needed in needs[fact]) - {*group}


def _facts(order: Iterable[str]) -> frozenset[str]:
    return frozenset(fact for group in order for fact in group.split(", "))


def _log_ratio(measured: Mapping[frozenset[str], float], order: Sequence[str], group: str) -> float:
    """ln of the time per token before a group of facts over that after it."""
    index = order.index(group)
    return math.log(measured[_facts(order[:index])] / measured[_facts(order[: index + 1])])


VIEWS = (
    View(
        "Facts about requests",
        (
            Column("load", "load"),
            Column("fact", "fact"),
            Column("needs", "needs", null="-"),
            Column("factor", "averaged (x)", "digits", reason="reason"),
            Column("share", "share of all (%)", "percent", reason="reason"),
            Column("ladder_factor", "in the ladder (x)", "digits", reason="reason"),
        ),
        "How much throughput grows. Averaged: geometric mean of v(S) / v(S + fact) over the orders in which each fact comes after those "
        "that it needs, and for each set of which a mode ran; the ladder gives one. v(S): time per token of the mode that knows S. Facts "
        "not told apart stand together. The factors multiply to v(nothing) / v(everything).",
    ),
)
