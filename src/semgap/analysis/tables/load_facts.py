"""Table load_facts: the worth of each fact about requests, in time per token under load, averaged over the orders of adding them.

As table facts, over v(S): the time per token of the mode that knows the set S. An order counts if a mode ran for each set on its way.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from semgap.analysis.aggregate import SETTING
from semgap.analysis.columns import frame_of, interval_columns, with_endings
from semgap.analysis.load_levels import level_name
from semgap.analysis.marks import Marks, rungs
from semgap.analysis.results import Results
from semgap.analysis.stats import Interval, exponentiated, mean_interval
from semgap.analysis.tables.facts import Needs, allowed_orders, needs_of
from semgap.analysis.tables.render import Column, View

COLUMNS = [
    *(
        *SETTING,
        "level",
        "load",
        "fact",
        "needs",
        "given",
        "trials",
        "orders",
        "log_ratio",
        *with_endings("factor"),
        "share",
        "share_reason",
    ),
    *(*with_endings("ladder_factor"), "ms_per_token_nothing_known", "ms_per_token_all_known", "reason"),
]
_Measured = Mapping[frozenset[str], pd.Series]
"""ln of the ms per token, over the trials' numbers, by the set of facts."""


def table(results: Results) -> pd.DataFrame:
    """One row per model, network, load phase, level and fact that some mode knew and some did not; facts not told apart are one row.

    Means over trials of the logarithms, with t intervals: each trial's modes had the same requests. Null with a reason if the sets that the
    modes know are in no order. A share is null where trials do not resolve that the modes differ at all.
    """
    needs = needs_of({mode: rung for mode in rungs(results.load_marks) if (rung := results.load_marks[mode].rung)})
    rows: list[dict[str, Any]] = []
    for keys, block in results.load.groupby([*SETTING, "level"], sort=False):
        at = dict(zip([*SETTING, "level"], keys, strict=True)) | {"load": level_name(block.iloc[0])}
        modes = block.groupby("mode", sort=False)["tokens_per_s"].mean().sort_values().index
        own = {mode: block[block["mode"] == mode].set_index("trial")["tokens_per_s"].astype("float64") for mode in modes}
        rows += _rows(at, {known_to(str(mode), results.load_marks): np.log(1e3 / rates) for mode, rates in own.items()}, needs)
    return frame_of(rows, COLUMNS)


def known_to(mode: str, marks: Marks) -> frozenset[str]:
    """The facts of a mode's rung and of all rungs below it; none for a mode without a rung."""
    rung = marks[mode].rung if mode in marks else None
    if rung is None:
        return frozenset()
    below = known_to(rung.after, marks) if rung.after else frozenset[str]()
    return below | {rung.fact} if rung.fact else below


def _rows(at: Mapping[str, Any], measured: _Measured, needs: Needs) -> list[dict[str, Any]]:
    """The rows of a level. Of two modes with one set the faster came last."""
    given, groups = frozenset.intersection(*measured), groups_of(measured, needs)
    others = {group: _needs(group, needs) - given for group in groups}
    needed = {", ".join(group): frozenset(", ".join(each) for each in groups if others[group] & {*each}) for group in groups}
    orders = [
        order for order in allowed_orders(needed) if all(given | _facts(order[:count]) in measured for count in range(len(order) + 1))
    ]
    same = {"given": ", ".join(fact for fact in needs if fact in given) or None, "orders": len(orders)}
    rows = [dict(at) | same | {"fact": ", ".join(g), "needs": ", ".join(fact for fact in needs if fact in others[g])} for g in groups]
    if not orders:
        return [row | {"reason": "the modes that ran are in no order by the facts of their rungs; run those of the ladder"} for row in rows]
    nothing, everything = measured[given], measured[given | _facts(orders[0])]
    whole = (nothing - everything).dropna().tolist()
    ends = {"ms_per_token_nothing_known": math.exp(nothing.mean()), "ms_per_token_all_known": math.exp(everything.mean())}
    found = []
    for row in rows:
        steps = pd.concat([_gained(measured, given, order, row["fact"]) for order in orders], axis=1).dropna()
        mean = mean_interval(steps.mean(axis=1).tolist())
        worth = {"trials": len(steps), "log_ratio": mean.value, **interval_columns("factor", exponentiated(mean)), **_share(mean, whole)}
        found.append(row | ends | worth | interval_columns("ladder_factor", exponentiated(mean_interval(steps.iloc[:, 0].tolist()))))
    return found


def _share(mean: Interval, whole: Sequence[float]) -> dict[str, Any]:
    """A fact's part of what all facts are worth, which trials must tell from nothing."""
    all_facts = mean_interval(whole)
    if all_facts.low is not None and all_facts.high is not None and all_facts.low <= 0 <= all_facts.high:
        times = "{:.2f} [{:.2f} to {:.2f}]".format(*(math.exp(x or 0) for x in (all_facts.value, all_facts.low, all_facts.high)))
        return {"share": None, "share_reason": f"all facts together are worth {times}: {all_facts.n} trials do not tell it from 1"}
    return {"share": mean.value / all_facts.value if mean.value is not None and all_facts.value else None, "share_reason": all_facts.reason}


def groups_of(measured: Iterable[frozenset[str]], needs: Needs) -> list[tuple[str, ...]]:
    """The facts that some modes knew and some did not, in the order of the ladder; those that each mode knew all or none of are one."""
    known = list(measured)
    groups: dict[tuple[bool, ...], tuple[str, ...]] = {}
    for fact in needs:
        pattern = tuple(fact in facts for facts in known)
        if any(pattern) and not all(pattern):
            groups[pattern] = (*groups.get(pattern, ()), fact)
    return list(groups.values())


def _needs(group: Iterable[str], needs: Needs) -> frozenset[str]:
    """The facts of other groups that a group needs."""
    return frozenset(needed for fact in group for needed in needs[fact]) - {*group}


def _facts(order: Iterable[str]) -> frozenset[str]:
    return frozenset(fact for group in order for fact in group.split(", "))


def _gained(measured: _Measured, given: frozenset[str], order: Sequence[str], group: str) -> pd.Series:
    """ln of the time per token before a group of facts over that after it, over trials."""
    index = order.index(group)
    return measured[given | _facts(order[:index])] - measured[given | _facts(order[: index + 1])]


VIEWS = (
    View(
        "Facts about requests",
        (
            Column("load", "load"),
            Column("fact", "fact"),
            Column("needs", "needs", null="-"),
            Column("given", "given", null="-"),
            Column("factor", "averaged (x)", "ratio", reason="reason"),
            Column("share", "share of all (%)", "percent", reason="share_reason"),
            Column("ladder_factor", "in the ladder (x)", "ratio", reason="reason"),
        ),
        "How much throughput grows. Averaged: geometric mean of v(S) / v(S + fact) over the orders in which each fact comes after those "
        "that it needs, and for each set of which a mode ran; the ladder gives one. v(S): time per token of the mode that knows S. Facts "
        "not told apart stand together; given: facts that all modes that ran knew. Geometric means over trials with 95% t "
        "intervals. The factors multiply to v(nothing) / v(everything).",
    ),
)
