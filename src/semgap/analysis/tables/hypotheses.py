"""Table hypotheses: the claims of modes on bytes (H1) and latency (H2), the A/A twins, and the effects that were planted."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from semgap.analysis.aggregate import PAYLOAD, SETTING, alike, by_setting, byte_ratio, first_of, latency_ratio, matching, mean_of
from semgap.analysis.columns import frame_of, interval_columns, with_endings
from semgap.analysis.gaps import difference_ms, equal_compute_logs
from semgap.analysis.marks import Claims, blind_modes, first_rungs
from semgap.analysis.power import power_notes
from semgap.analysis.results import Results
from semgap.analysis.stats import (
    LEVEL,
    Interval,
    difference_interval,
    exponentiated,
    holm,
    log_ratios,
    no_interval,
    p_difference_below,
    p_mean_below,
)
from semgap.analysis.tables.render import Column, View

SAME_WITHIN = 0.01
"""Two modes are the same if their latencies differ by less than this fraction."""
TYPICAL = "gap_median_s"
"""The gap by which modes compare: of a trial's median call."""
PAIRED, AT_EQUAL_COMPUTE = "paired latencies", "the gap, at equal compute"
COLUMNS = [
    *("hypothesis", *SETTING, "mode", "baseline", "claim", "basis", *with_endings("cut"), "threshold"),
    *("p", "p_holm", "p_holm_no", "verdict", "cast_part", "rest_part", "cast_reason"),
    *("blind", *with_endings("cut_to_blind"), "first_rung", *with_endings("cut_to_first_rung")),
    *("planted_ms", *with_endings("found_ms"), "trials", "power"),
]
_Comparison = Callable[[str], tuple[str | None, Interval]]


@dataclass(frozen=True)
class _Latencies:
    """Latencies of two modes: ln of each trial's on `basis`; by paired latencies, ln of the pairs' ratios in `ours` alone."""

    basis: str
    ours: list[float]
    base: list[float]

    def p_below(self, bound: float) -> float:
        """One-sided p value that ln of the ratio lies below `bound`; 1 - p that it lies above."""
        return p_mean_below(self.ours, bound) if self.basis == PAIRED else p_difference_below(self.ours, self.base, bound)


@dataclass(frozen=True)
class _Setting:
    """One model, network and phase (`names`): its trials by mode, and their gaps."""

    results: Results
    names: Mapping[str, str]
    modes: Mapping[str, pd.DataFrame]

    def gaps(self, mode: str) -> pd.DataFrame:
        return matching(self.results.gaps, {**self.names, "mode": mode})

    def latencies(self, mode: str, baseline: str) -> _Latencies:
        gaps = [self.gaps(name) for name in (mode, baseline)]
        if self.modes[mode]["phase_kind"].iloc[0] == "prefill" or any(own["gap_s"].isna().any() or own.empty for own in gaps):
            return _Latencies(PAIRED, log_ratios(self.modes[mode], self.modes[baseline]), [])
        return _Latencies(AT_EQUAL_COMPUTE, *equal_compute_logs(*gaps))

    def cut(self, mode: str | None, baseline: str | None) -> tuple[str | None, Interval]:
        """The basis and 1 - ratio of the latencies of two modes."""
        direct = latency_ratio(self.modes, mode or "", baseline)
        if mode not in self.modes or baseline not in self.modes:
            return None, direct
        assert mode and baseline
        found = self.latencies(mode, baseline)
        if found.basis == PAIRED:
            return PAIRED, _cut_of(direct)
        cut = _cut_of(exponentiated(difference_interval(found.ours, found.base)))
        return found.basis, cut.limited_by(self._compute_apart(mode, baseline))

    def _compute_apart(self, mode: str, baseline: str) -> str | None:
        """Says if two modes' compute, each over its trials' controls, differs by more than `SAME_WITHIN`; None if not, or without them."""
        controls = [self.gaps(name)["compute_to_control"].astype("float64") for name in (mode, baseline)]
        found = exponentiated(difference_interval(*(np.log(own.to_numpy()).tolist() for own in controls)))
        if (
            found.value is None
            or found.low is None
            or found.high is None
            or (found.low <= 1 + SAME_WITHIN and found.high >= 1 - SAME_WITHIN)
        ):
            return None
        return f"its compute is {found.value:.3f} times the baseline's, by each trial's control, which this basis leaves out"


def table(results: Results) -> pd.DataFrame:
    """One row for each claim of a mode's row, each twin and each planted wait, per model, network and phase; `cut` is 1 - ratio.

    H1: TCP payload bytes per token, counted. H2: latency at equal compute (`gaps.equal_compute_logs`), in prefill phases by paired
    latencies, since modes compute different rows there (`basis`). H2's verdict: one-sided tests on both sides of the threshold, 2.5%
    each, Holm-corrected over all H2 rows. A/A: `same` by an equivalence test within +-1% at 5%, `different` by a test of a larger
    difference at 5%, each Holm-corrected over all A/A rows. Planted: the difference of the gaps, ms per token, beside what was planted;
    `found` at 5%, Holm-corrected over planted and A/A rows.
    """
    everywhere = [_Setting(results, *each) for each in by_setting(alike(results.rows))]
    claimed = [(at, mode, c) for at in everywhere for mode in at.modes if mode in results.marks and (c := results.marks[mode].claims)]
    h1 = [_h1_row(*each) for each in claimed if each[-1].fewer_bytes is not None]
    h2 = _with_holm([_h2_row(*each) for each in claimed if each[-1].lower_latency is not None])
    twins = [row for at in everywhere for row in _twin_rows(at)]
    notes = power_notes(results)
    rows = [*h1, *h2, *_with_found(_with_sameness(twins))]
    return frame_of([row | {"power": notes.get(tuple(row[key] for key in SETTING))} for row in rows], COLUMNS)


def _h1_row(at: _Setting, mode: str, claims: Claims) -> dict[str, Any]:
    """H1, without a verdict if the mode's bytes say nothing about a trained model."""
    threshold, modes = claims.fewer_bytes or 0.0, at.modes

    def cut_to(baseline: str | None) -> tuple[str, Interval]:
        return "counted bytes", _cut_of(byte_ratio(modes, mode, baseline))

    row = _claim_row("H1", at, mode, claims, cut_to) | _beside(at, cut_to, lambda name: modes[name][PAYLOAD])
    row |= _cast_columns(row["cut"], _cut_of(byte_ratio(modes, claims.cast, claims.against)) if claims.cast else None)
    row |= {"claim": f"at least {threshold:.0%} fewer payload bytes per token", "threshold": threshold}
    reason = first_of(modes[mode]["ratios_reason"])
    if reason is not None:
        return row | {"cut_reason": reason}
    return row | {"verdict": _verdict(row["cut_low"], row["cut_high"], threshold)}


def _h2_row(at: _Setting, mode: str, claims: Claims) -> dict[str, Any]:
    """H2 without its verdict, with the one-sided p value before correction."""
    threshold, cut_to = claims.lower_latency or 0.0, partial(at.cut, mode)
    row = _claim_row("H2", at, mode, claims, cut_to) | _beside(at, cut_to, lambda name: at.gaps(name)["gap_s"])
    row |= _cast_columns(row["cut"], at.cut(claims.cast, claims.against)[1] if claims.cast else None)
    p = at.latencies(mode, claims.against).p_below(math.log(1 - threshold)) if row["cut_low"] is not None else None
    return row | {"claim": f"at least {threshold:.0%} lower latency", "threshold": threshold, "p": p}


def _claim_row(hypothesis: str, at: _Setting, mode: str, claims: Claims, cut_to: _Comparison) -> dict[str, Any]:
    basis, cut = cut_to(claims.against)
    named = {"hypothesis": hypothesis, **at.names, "mode": mode, "baseline": claims.against, "basis": basis}
    return named | interval_columns("cut", cut) | {"trials": cut.n}


def _beside(at: _Setting, cut_to: _Comparison, cost: Callable[[str], pd.Series]) -> dict[str, Any]:
    """The same cut against the strongest baseline that knows nothing, by mean `cost`, and against the cheapest first rung."""
    row: dict[str, Any] = {}
    for name, names in (("blind", blind_modes(at.results.marks)), ("first_rung", first_rungs(at.results.marks))):
        costs = {mode: known for mode in names if mode in at.modes and (known := mean_of(cost(mode))) is not None}
        cheapest = min(costs, key=lambda mode: costs[mode], default=None)
        cut = cut_to(cheapest)[1] if cheapest else no_interval("none was run")
        row |= {name: cheapest} | interval_columns(f"cut_to_{name}", cut)
    return row


def _twin_rows(at: _Setting) -> Iterator[dict[str, Any]]:
    """One mode under two names (A/A), or with a wait planted in each of the worker's steps."""
    for mode, mark in at.results.marks.items():
        if mode not in at.modes or mark.twin is None:
            continue
        basis, cut = at.cut(mode, mark.twin)
        found = difference_ms(at.results.gaps, at.names, mode, mark.twin, TYPICAL)
        planted = f"a wait of {mark.plant_us / 1e3:g} ms in each step"
        yield {
            "hypothesis": "planted" if mark.plant_us else "A/A",
            **at.names,
            "mode": mode,
            "baseline": mark.twin,
            "basis": basis,
            "claim": planted if mark.plant_us else f"the same latency, within {SAME_WITHIN:.0%}",
            "planted_ms": mark.plant_us / 1e3,
            **interval_columns("cut", cut),
            **interval_columns("found_ms", found),
            "trials": found.n,
            "threshold": None if mark.plant_us else SAME_WITHIN,
            **(_twin_tests(at.latencies(mode, mark.twin)) if cut.low is not None and not mark.plant_us else {"p": None}),
            "p_found": _p_found(at, mode, mark.twin) if found.low is not None else None,
        }


def _twin_tests(twins: _Latencies) -> dict[str, float]:
    """The p values that twins differ by less than `SAME_WITHIN` (`p`, two one-sided tests), and by more, either way (`p_no`)."""
    under, below = (twins.p_below(math.log(1 + end)) for end in (-SAME_WITHIN, SAME_WITHIN))
    return {"p": max(1 - under, below), "p_no": min(1.0, 2 * min(under, 1 - below))}


def _p_found(at: _Setting, mode: str, twin: str) -> float:
    """The two-sided p value that the gaps differ."""
    ours, base = (at.gaps(name)[TYPICAL].astype("float64").tolist() for name in (mode, twin))
    below = p_difference_below(ours, base, 0.0)
    return 2 * min(below, 1 - below)


def _cut_of(ratio: Interval) -> Interval:
    if ratio.value is None:
        return ratio
    low, high = (None if end is None else 1 - end for end in (ratio.high, ratio.low))
    return Interval(1 - ratio.value, low, high, ratio.n, ratio.reason)


def _cast_columns(cut: float | None, cast: Interval | None) -> dict[str, Any]:
    if cast is None:
        return {"cast_reason": "the claim names no mode that only casts"}
    rest = None if cut is None or cast.value is None else cut - cast.value
    return {"cast_part": cast.value, "rest_part": rest, "cast_reason": cast.reason if cast.value is None else None}


def _verdict(low: float | None, high: float | None, threshold: float) -> str | None:
    if low is None or high is None:
        return None
    return "yes" if low >= threshold else "no" if high < threshold else "inconclusive"


def _with_holm(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The H2 rows with corrected p values of both sides and the verdict. Rows without a p value stay null."""
    tested = [row for row in rows if row["p"] is not None]
    yes, no = holm([row["p"] for row in tested]), holm([1 - row["p"] for row in tested])
    alpha = (1 - LEVEL) / 2
    for row, p_yes, p_no in zip(tested, yes, no, strict=True):
        verdict = "yes" if p_yes < alpha else "no" if p_no < alpha else "inconclusive"
        row.update(p_holm=p_yes, p_holm_no=p_no, verdict=verdict)
    return rows


def _with_sameness(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The A/A rows with corrected p values of both tests and the verdict."""
    tested = [row for row in rows if row["p"] is not None]
    same, apart = (holm([row[name] for row in tested]) for name in ("p", "p_no"))
    for row, p_same, p_apart in zip(tested, same, apart, strict=True):
        verdict = "same" if p_same < 1 - LEVEL else "different" if p_apart < 1 - LEVEL else "inconclusive"
        row.update(p_holm=p_same, p_holm_no=p_apart, verdict=verdict)
    return rows


def _with_found(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The planted rows with their verdict: is a difference found, and does its interval hold what was planted?"""
    tested = [row for row in rows if row["p_found"] is not None]
    for row, p in zip(tested, holm([row["p_found"] for row in tested]), strict=True):
        if row["hypothesis"] == "planted":
            holds = row["found_ms_low"] <= row["planted_ms"] <= row["found_ms_high"]
            found = "found" if p < 1 - LEVEL and row["found_ms"] > 0 else "not found"
            row.update(p=row["p_found"], p_holm=p, verdict=found if holds else f"{found}, not as planted")
    return rows


CUT = (Column("hypothesis", "test"), Column("phase", "phase"), Column("mode", "mode"), Column("baseline", "against"))
BY = ("model", "network")
CLAIMED = ("hypothesis", ("H1", "H2"))
VIEWS = (
    View(
        "Hypotheses",
        (*CUT, Column("claim", "claim"), Column("cut", "cut (%)", "percent", reason="cut_reason"), Column("verdict", "verdict")),
        "Cut: 1 - ratio to the baseline, with its 95% interval, not adjusted.",
        by=BY,
        notes=("power",),
    ),
    View(
        "Hypotheses, tests",
        (
            *CUT,
            Column("basis", "by", null="-"),
            Column("p_holm", "p for (Holm)", "small", null="-"),
            Column("p_holm_no", "p against (Holm)", "small", null="-"),
        ),
        "H2: latencies at equal compute, the gap of each trial's median call added to the mean compute of both modes; in prefill phases "
        "paired latencies. Verdict: one-sided tests against the threshold, 2.5% a side, Holm-corrected over all H2 rows. A/A: an "
        "equivalence test within +-1%, and against it a two-sided test of a larger difference, at 5% each, Holm-corrected over the A/A "
        "rows.",
        by=BY,
    ),
    View(
        "Claims beside a cast",
        (
            *CUT,
            Column("cut", "cut (%)", "percent"),
            Column("cast_part", "a cast alone (points)", "percent", reason="cast_reason", null="-"),
            Column("rest_part", "beyond it (points)", "percent", null="-"),
        ),
        "The part of a cut that the cast to fp16 has alone, and what the mode adds.",
        by=BY,
        only=CLAIMED,
    ),
    View(
        "Claims beside fair baselines",
        (
            *CUT[:3],
            Column("blind", "strongest blind", null="-"),
            Column("cut_to_blind", "cut to it (%)", "percent", reason="cut_to_blind_reason", null="-"),
            Column("first_rung", "first rung", null="-"),
            Column("cut_to_first_rung", "cut to that (%)", "percent", reason="cut_to_first_rung_reason", null="-"),
        ),
        "Strongest blind: of the baselines that know nothing, that with the fewest bytes (H1) or the smallest gap (H2). The first rung "
        "knows one fact: what a claim is worth beyond it. 95% intervals, not adjusted.",
        by=BY,
        only=CLAIMED,
    ),
    View(
        "Planted effects",
        (
            *CUT,
            Column("planted_ms", "planted (ms/token)", "digits"),
            Column("found_ms", "found (ms/token)", "digits", reason="found_ms_reason"),
            Column("p_holm", "p (Holm)", "small", null="-"),
            Column("verdict", "verdict"),
        ),
        "A busy wait planted in each step of the worker, against the same mode without it; the A/A twins have none. Found: the "
        "difference of the median calls' gaps per token, with a 95% interval, not adjusted; Welch's t test at 5%, Holm-corrected over "
        "these rows. p and verdict of a twin are its equivalence test.",
        by=BY,
        only=("hypothesis", ("A/A", "planted")),
    ),
)
