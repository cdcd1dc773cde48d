"""Table recovery_pairs: the modes of a recovery phase against each other, over the same steps of the same trials."""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from semgap.analysis.aggregate import SETTING, by_setting, first_of
from semgap.analysis.columns import frame_of, interval_columns, with_endings
from semgap.analysis.marks import NO_MARK
from semgap.analysis.results import Results
from semgap.analysis.stats import REMEASURE, Interval, exponentiated, holm, mean_interval, no_interval, p_mean_below
from semgap.analysis.tables.recovery import BY, timed, with_beyond
from semgap.analysis.tables.render import Column, View

COLUMNS = [
    *(*SETTING, "kv_network", "evict_fraction", "mode", "against", "against_baseline", "basis", "trials", "steps_per_trial"),
    *(*with_endings("difference_ms", "ratio"), "p", "p_holm"),
]
BY_CONTROL, BY_LATENCY = "each trial's control", "paired latencies"
ALONE_BEFORE = "no step of both modes directly followed its eviction"
UNPAIRED = f"no two trials of one number, session and environment; {REMEASURE}"


def table(results: Results) -> pd.DataFrame:
    """One row per model, network, recovery phase, evict fraction and pair: `mode` against `against`, which comes first or is marked blind.

    Modes see the same fractions in the same steps of trials of one number, so step pairs with step; steps that only one mode ran, or
    whose restore also ran alone, are left out. A trial counts by the median over its pairs. `difference_ms`: latency beyond the control,
    less that of `against`. `ratio`: latency over the control, over that of `against`. Without controls `ratio` compares the latencies of
    trials of one session, summed over their steps. Intervals over trials, t and on the log scale. `p` tests ratio 1, `p_holm` is
    corrected over all pairs of the phase. `against_baseline`: `against` is marked blind, or no mode of the phase is.
    """
    rows: list[dict[str, Any]] = []
    for setting, modes in by_setting(results.recovery_steps):
        blind = [mode for mode in modes if results.marks.get(mode, NO_MARK).blind]
        kv = {"kv_network": first_of(pd.concat(modes.values())["kv_network"])}
        rows += _with_holm([setting | kv | row for row in _pairs(modes, blind)])
    return frame_of(rows, COLUMNS)


def _pairs(modes: Mapping[str, pd.DataFrame], blind: list[str]) -> Iterator[dict[str, Any]]:
    fractions = pd.concat(modes.values())["evict_fraction"].drop_duplicates().sort_values()
    for fraction, (first, second) in itertools.product(fractions, itertools.combinations(modes, 2)):
        against, mode = (second, first) if second in blind and first not in blind else (first, second)
        ours, base = (_with_fraction(modes[name], fraction) for name in (mode, against))
        named = {"evict_fraction": None if pd.isna(fraction) else float(fraction), "mode": mode, "against": against}
        if len(ours) and len(base):
            yield named | {"against_baseline": against in blind or not blind} | _compared(ours, base)


def _with_fraction(steps: pd.DataFrame, fraction: float) -> pd.DataFrame:
    return steps[steps["evict_fraction"].isna() if pd.isna(fraction) else steps["evict_fraction"] == fraction]


def _compared(ours: pd.DataFrame, base: pd.DataFrame) -> dict[str, Any]:
    without = first_of(pd.concat([ours["control_reason"], base["control_reason"]]))
    pairs = _paired_steps(ours, base, ["trial", "request", "step"] + (["session", "fingerprint"] if without else []))
    if without is None:
        beyond_ms = 1e3 * (pairs["beyond_s"] - pairs["beyond_s_base"])
        logs = (pairs["latency_s"] * pairs["control_s_base"] / pairs["control_s"] / pairs["latency_s_base"]).map(math.log)
        by_trial, difference = logs.groupby(pairs["trial"]).median(), _over_trials(beyond_ms.groupby(pairs["trial"]).median(), ALONE_BEFORE)
    else:
        sums = pairs.groupby("trial")[["latency_s", "latency_s_base"]].sum()
        by_trial, difference = (sums["latency_s"] / sums["latency_s_base"]).map(math.log), no_interval(without)
    return {
        "basis": BY_LATENCY if without else BY_CONTROL,
        "trials": len(by_trial),
        "steps_per_trial": len(pairs) / len(by_trial) if len(by_trial) else 0.0,
        **interval_columns("difference_ms", difference),
        **interval_columns("ratio", exponentiated(_over_trials(by_trial, UNPAIRED if without else ALONE_BEFORE))),
        "p": _p(by_trial.tolist()) if len(by_trial) > 1 else None,
    }


def _paired_steps(ours: pd.DataFrame, base: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    columns = [*keys, "latency_s", "control_s", "beyond_s"]
    return with_beyond(timed(ours))[columns].merge(with_beyond(timed(base))[columns], on=keys, suffixes=("", "_base"))


def _over_trials(values: pd.Series, reason: str) -> Interval:
    return mean_interval(values.tolist()) if len(values) else no_interval(reason)


def _p(logs: list[float]) -> float:
    """The two-sided p value of Student's t test that the mean is 0."""
    below = p_mean_below(logs, 0.0)
    return 2 * min(below, 1 - below)


def _with_holm(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    tested = [row for row in rows if row["p"] is not None]
    for row, adjusted in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = adjusted
    return rows


VIEWS = (
    View(
        "Recovery, modes against each other",
        (
            Column("evict_fraction", "evicted (%)", "percent", null="-"),
            Column("mode", "mode"),
            Column("against", "against"),
            Column("trials", "trials", "count"),
            Column("steps_per_trial", "steps", "digits"),
            Column("difference_ms", "difference (ms)", "digits", reason="difference_ms_reason"),
            Column("ratio", "ratio", "ratio", reason="ratio_reason"),
            Column("p_holm", "p (Holm)", "small", null="-"),
        ),
        "Equal steps of trials of one number: same position, same evicted layers. Difference: ITL beyond the trial's control, less that of "
        "the other mode. Ratio: ITL over the control, over that of the other mode; without controls, of ITLs. 95% intervals over trials, "
        "not adjusted; p of a ratio of 1, adjusted by Holm over all pairs of the phase. Shown are pairs with a baseline that knows "
        "nothing, if one was run; the csv has every pair.",
        by=BY,
        only=("against_baseline", (True,)),
    ),
)
