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
from semgap.analysis.results import Results
from semgap.analysis.tables.facts import allowed_orders
from semgap.analysis.tables.render import Column, View

NEEDS: Mapping[str, frozenset[str]] = {
    "weights": frozenset(),
    "position": frozenset({"weights"}),
    "phase": frozenset({"position"}),
    "prefix": frozenset({"phase"}),
    "loop": frozenset(),
}
"""The facts in the order of the ladder, each with those that it needs. A deadline buys goodput, not throughput (table load)."""
COLUMNS = [
    *(*SETTING, "level", "load", "fact", "needs", "orders", "log_ratio", "factor", "share", "ladder_factor"),
    *("ms_per_token_nothing_known", "ms_per_token_all_known", "reason"),
]


def table(results: Results) -> pd.DataFrame:
    """One row per model, network, load phase, level and fact that a mode knew; facts that no mode told apart are one row.

    Null with a reason if the sets that the modes know, from nothing on, are in no order.
    """
    policies = {manifest["cell"]["mode"]: manifest["cell"]["policy"] for manifest in results.trials.manifests}
    rows: list[dict[str, Any]] = []
    for keys, block in results.load.groupby([*SETTING, "level"], sort=False):
        at = dict(zip([*SETTING, "level"], keys, strict=True)) | {"load": level_name(block.iloc[0])}
        throughput = block.groupby("mode", sort=False)["tokens_per_s"].mean()
        rows += _rows(at, {known_to(policies[str(mode)]): 1e3 / value for mode, value in throughput.sort_values().items()})
    return frame_of(rows, COLUMNS)


def known_to(policy: Mapping[str, Any]) -> frozenset[str]:
    """The facts that a mode with batching uses. One that waits for calls that look alike does not know that they share a model."""
    batching = policy["batching"]
    merges = batching["merges"] if not batching["wait_ms"] else "nothing"
    facts = {"nothing": (), "alike": ("weights",), "lengths": ("weights", "position"), "all": ("weights", "position", "phase")}[merges]
    return frozenset([*facts, *(["prefix"] if batching["prefix"] else []), *(["loop"] if policy["window"] > 1 else [])])


def _rows(at: Mapping[str, Any], measured: Mapping[frozenset[str], float]) -> list[dict[str, Any]]:
    """`measured`: ms per token by the set of facts; of two modes with one set the faster came last."""
    groups = groups_of(measured)
    needs = {group: frozenset(other for other in groups if other != group and _needs(group) & {*other}) for group in groups}
    allowed = allowed_orders({", ".join(g): frozenset(", ".join(o) for o in own) for g, own in needs.items()})
    orders = [order for order in allowed if all(_facts(order[:count]) in measured for count in range(len(order) + 1))]
    rows = [dict(at) | {"fact": ", ".join(g), "needs": ", ".join(sorted(_needs(g))), "orders": len(orders)} for g in groups]
    if not orders:
        return [row | {"reason": "the modes that ran are in no order by what they know; run those of the ladder"} for row in rows]
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


def groups_of(measured: Iterable[frozenset[str]]) -> list[tuple[str, ...]]:
    """The facts that a mode knew, in the order of the ladder; those that every mode knew together, or not at all, as one."""
    known = list(measured)
    groups: dict[tuple[bool, ...], tuple[str, ...]] = {}
    for fact in NEEDS:
        pattern = tuple(fact in facts for facts in known)
        if any(pattern):
            groups[pattern] = (*groups.get(pattern, ()), fact)
    return list(groups.values())


def _needs(group: Iterable[str]) -> frozenset[str]:
    """The facts of other groups that a group needs."""
    return frozenset(needed for fact in group for needed in NEEDS[fact]) - {*group}


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
