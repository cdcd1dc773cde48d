"""Table load_facts: the worth of each fact about requests, in time per token under load, averaged over the orders of adding them.

As table facts, over v(S): the least time per token of the measured modes that know no more than the set S.
"""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from semgap.analysis.aggregate import SETTING
from semgap.analysis.columns import frame_of
from semgap.analysis.load_levels import level_name
from semgap.analysis.results import Results
from semgap.analysis.tables.facts import allowed_orders, worths
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
    """One row per model, network, load phase, level and fact that a mode knew. Null with a reason if no mode that knows nothing ran."""
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
    needs = {fact: own for fact, own in NEEDS.items() if any(fact in known for known in measured)}
    named = [dict(at) | {"fact": fact, "needs": ", ".join(sorted(needs[fact] & needs.keys()))} for fact in needs]
    if frozenset() not in measured:
        return [row | {"orders": 0, "reason": "no mode that knows none of the facts was run"} for row in named]
    within = {fact: own & needs.keys() for fact, own in needs.items()}

    def least_ms(known: frozenset[str]) -> float:
        return min(value for facts, value in measured.items() if facts <= known)

    found, orders = worths(least_ms, within), len(allowed_orders(within))
    ends = {"ms_per_token_nothing_known": least_ms(frozenset()), "ms_per_token_all_known": least_ms(frozenset(needs))}
    whole = math.log(ends["ms_per_token_nothing_known"] / ends["ms_per_token_all_known"])
    return [
        row
        | ends
        | {"orders": orders, "log_ratio": found[row["fact"]].log_ratio, "factor": math.exp(found[row["fact"]].log_ratio)}
        | {"share": found[row["fact"]].log_ratio / whole if whole else None}
        | {"ladder_factor": math.exp(found[row["fact"]].ladder_log_ratio)}
        for row in named
    ]


VIEWS = (
    View(
        "Facts about requests",
        (
            Column("load", "load"),
            Column("fact", "fact"),
            Column("needs", "needs", null="-"),
            Column("factor", "throughput, averaged (x)", "digits", reason="reason"),
            Column("share", "share of all (%)", "percent", reason="reason"),
            Column("ladder_factor", "at its position in the ladder (x)", "digits", reason="reason"),
        ),
        "Geometric mean of v(S) / v(S + fact) over all orders in which each fact comes after those that it needs. v(S): the least time per "
        "token of the modes that know no more than S, of those that ran: a set that no mode knows counts as its best part, so run more "
        "modes to tell facts apart. The factors multiply to v(nothing) / v(everything).",
    ),
)
