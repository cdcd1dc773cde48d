"""Table hypotheses: H1 (bytes), H2 (latency) and the A/A pair."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from semgap.analysis.aggregate import BASELINE, CAST, SETTING, by_setting, byte_ratio, first_of, latency_ratio
from semgap.analysis.columns import frame_of, interval_columns
from semgap.analysis.results import Results
from semgap.analysis.stats import LEVEL, Interval, holm, log_ratios, p_mean_below, paired_ratio
from semgap.analysis.tables.render import Column, View

HYPOTHESIS_MODES = ("sys_simulated", "sys")
H1_FEWER_BYTES, H2_LOWER_LATENCY = 0.30, 0.15
COLUMNS = [
    *("hypothesis", *SETTING, "mode", "baseline", "claim", "cut", "cut_low", "cut_high", "threshold"),
    *("p", "p_holm", "p_holm_no", "verdict", "cast_part", "rest_part", "smallest_visible_cut"),
    *("trials", "reason", "cast_reason"),
]


def table(results: Results) -> pd.DataFrame:
    """H1, H2 and the A/A pairs, per model, network and phase; `cut` is 1 - ratio to the baseline.

    H1: at least 30% fewer TCP payload bytes per token than `remote_cache`. H2: at least 15% lower latency (geometric mean over paired
    trials of the ratio of their medians). The verdict of H2 uses one-sided t tests on both sides of the threshold, each at 2.5% and
    Holm-corrected over all H2 rows. `cast_part` is the cut of `remote_cache_fp16`, which only casts; `rest_part` is cut - cast_part.
    """
    everywhere = list(by_setting(results.rows))
    tested = [(setting, modes, mode) for setting, modes in everywhere for mode in HYPOTHESIS_MODES if mode in modes]
    h1 = [_h1_row(*each) for each in tested]
    h2 = _with_holm([_h2_row(*each) for each in tested])
    aa = [row for setting, modes in everywhere for row in _aa_rows(setting, modes)]
    return frame_of([*h1, *h2, *aa], COLUMNS)


def _h1_row(setting: Mapping[str, str], modes: Mapping[str, pd.DataFrame], mode: str) -> dict[str, Any]:
    """H1, without a verdict if the mode's bytes say nothing about a trained model."""
    cut, cast = (_cut_of(byte_ratio(modes, name, BASELINE)) for name in (mode, CAST))
    row = _hypothesis_row("H1", setting, mode, cut, H1_FEWER_BYTES) | _cast_columns(cut, cast)
    row |= {"claim": f"at least {H1_FEWER_BYTES:.0%} fewer payload bytes per token", "verdict": _verdict(cut, H1_FEWER_BYTES)}
    reason = first_of(modes[mode]["ratios_reason"])
    return row if reason is None else row | {"verdict": None, "reason": reason}


def _h2_row(setting: Mapping[str, str], modes: Mapping[str, pd.DataFrame], mode: str) -> dict[str, Any]:
    """H2 without its verdict, with the one-sided p value before correction."""
    cut, cast = (_cut_of(latency_ratio(modes, name, BASELINE)) for name in (mode, CAST))
    p = None if cut.value is None else p_mean_below(log_ratios(modes[mode], modes[BASELINE]), math.log(1 - H2_LOWER_LATENCY))
    row = _hypothesis_row("H2", setting, mode, cut, H2_LOWER_LATENCY) | _cast_columns(cut, cast)
    return row | {"claim": f"at least {H2_LOWER_LATENCY:.0%} lower latency", "p": p}


def _aa_rows(setting: Mapping[str, str], modes: Mapping[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """Latencies of one mode under two names: any difference is noise."""
    rows = []
    for first, second in itertools.combinations(modes, 2):
        if modes[first]["policy_digest"].iloc[0] == modes[second]["policy_digest"].iloc[0]:
            cut = _cut_of(paired_ratio(modes[second], modes[first]))
            claim = {"baseline": first, "claim": "the same latency: one mode under two names"}
            rows.append(_hypothesis_row("A/A", setting, second, cut, None) | claim | _agreement(cut))
    return rows


def _hypothesis_row(hypothesis: str, setting: Mapping[str, str], mode: str, cut: Interval, threshold: float | None) -> dict[str, Any]:
    named = {"hypothesis": hypothesis, **setting, "mode": mode, "baseline": BASELINE, "threshold": threshold}
    return named | interval_columns("cut", cut) | {"trials": cut.n, "reason": cut.reason}


def _cut_of(ratio: Interval) -> Interval:
    if ratio.value is None:
        return ratio
    low, high = (None if end is None else 1 - end for end in (ratio.high, ratio.low))
    return Interval(1 - ratio.value, low, high, ratio.n, ratio.reason)


def _cast_columns(cut: Interval, cast: Interval) -> dict[str, Any]:
    rest = None if cut.value is None or cast.value is None else cut.value - cast.value
    return {"cast_part": cast.value, "rest_part": rest, "cast_reason": cast.reason if cast.value is None else None}


def _verdict(cut: Interval, threshold: float) -> str | None:
    if cut.value is None or cut.low is None or cut.high is None:
        return None
    return "yes" if cut.low >= threshold else "no" if cut.high < threshold else "inconclusive"


def _agreement(cut: Interval) -> dict[str, Any]:
    if cut.low is None or cut.high is None:
        return {}
    return {"verdict": "same" if cut.low <= 0 <= cut.high else "different", "smallest_visible_cut": max(abs(cut.low), abs(cut.high))}


def _with_holm(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The H2 rows with corrected p values of both sides and the verdict. Rows without a p value stay null."""
    tested = [row for row in rows if row["p"] is not None]
    yes, no = holm([row["p"] for row in tested]), holm([1 - row["p"] for row in tested])
    alpha = (1 - LEVEL) / 2
    for row, p_yes, p_no in zip(tested, yes, no, strict=True):
        verdict = "yes" if p_yes < alpha else "no" if p_no < alpha else "inconclusive"
        row.update(p_holm=p_yes, p_holm_no=p_no, verdict=verdict)
    return rows


VIEWS = (
    View(
        "Hypotheses",
        (
            Column("hypothesis", ""),
            Column("phase", "phase"),
            Column("mode", "mode"),
            Column("baseline", "against"),
            Column("claim", "claim"),
            Column("cut", "cut (%) [95% CI]", "percent", reason="reason"),
            Column("cast_part", "an fp16 cast alone (points)", "percent", reason="cast_reason", null="-"),
            Column("rest_part", "added by the mode (points)", "percent", null="-"),
            Column("p_holm", "p for (Holm)", "small", null="-"),
            Column("p_holm_no", "p against (Holm)", "small", null="-"),
            Column("verdict", "verdict"),
        ),
        "Cut: 1 - ratio to the baseline. H2's verdict: one-sided t tests on paired log-ratios against the threshold, 2.5% a side, "
        "Holm-corrected over all H2 rows. A/A: one mode under two names; effects smaller than its interval's ends stay hidden.",
        by=("model", "network"),
    ),
)
