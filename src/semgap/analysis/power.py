"""The smallest effects that a run finds in 80% of cases, from the spread between trials, pooled over the modes that are compared."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from semgap.analysis.aggregate import SETTING, alike, by_setting, matching
from semgap.analysis.gaps import equal_compute_logs
from semgap.analysis.marks import base_of
from semgap.analysis.results import Results
from semgap.analysis.stats import POWER, log_ratios, pooled_sd, smallest_effect

EFFECTS = ("smallest_gap_ms", "smallest_ratio", "smallest_paired_ratio")


def power_rows(results: Results) -> list[dict[str, Any]]:
    """One row per model, network, and prefill or decode phase.

    `smallest_gap_ms`: a difference between two modes' gaps per token; `smallest_ratio`: of their latencies at equal compute, as a fraction;
    `smallest_paired_ratio`: of a latency ratio to the lowest rung over paired trials. Null without 2 trials. `power` says it in words.
    """
    return [setting | _effects(results, setting, modes) for setting, modes in by_setting(alike(results.rows))]


def power_notes(results: Results) -> dict[tuple[str, ...], str | None]:
    """The words of `power_rows` by setting."""
    return {tuple(row[key] for key in SETTING): row["power"] for row in power_rows(results)}


def _effects(results: Results, setting: dict[str, str], modes: dict[str, pd.DataFrame]) -> dict[str, Any]:
    base = base_of(results.marks)
    compared = [mode for mode in modes if _is_compared(results, mode)] or [m for m in modes if (modes[m]["placement"] != "local").all()]
    gaps = [matching(results.gaps, {**setting, "mode": mode}) for mode in compared]
    paired = [log_ratios(modes[mode], modes[base]) for mode in compared if base in modes and mode != base] if base else []
    smallest = {
        "smallest_gap_ms": _smallest([(1e3 * own["gap_s"].astype("float64")).tolist() for own in gaps], 2),
        "smallest_ratio": _as_ratio(_smallest(equal_compute_logs(*gaps), 2)),
        "smallest_paired_ratio": _as_ratio(_smallest(paired, 1)),
    }
    trials = min((len(own) for own in gaps if len(own) > 1), default=min(1, len(gaps)))
    return {"trials": trials, **smallest, "power": _words(trials, smallest)}


def _is_compared(results: Results, mode: str) -> bool:
    mark = results.marks.get(mode)
    return mark is not None and bool(mark.rung or mark.twin or mark.claims)


def _smallest(groups: Sequence[Sequence[float]], samples: int) -> float | None:
    known = [group for group in groups if len(group) > 1 and np.all(np.isfinite(group))]
    sd = pooled_sd(known)
    return None if sd is None else smallest_effect(sd, min(map(len, known)), samples)


def _as_ratio(logarithm: float | None) -> float | None:
    return None if logarithm is None else float(np.expm1(logarithm))


def _words(trials: int, smallest: dict[str, float | None]) -> str | None:
    gap_ms, ratio, paired = smallest.values()
    found = [
        gap_ms is not None and f"a difference of {gap_ms:.2g} ms between two gaps",
        ratio is not None and f"{_change(ratio)} between two latencies at equal compute",
        paired is not None and f"{_change(paired)} in paired latencies",
    ]
    if not any(found):
        return "Power: not known, since one trial shows no spread." if trials else None
    named = ", ".join(words for words in found if words)
    return f"With {trials} trials a mode this run finds, in {POWER:.0%} of cases: {named} (spread pooled over the compared modes)."


def _change(ratio: float) -> str:
    return f"{100 * ratio:.2g}%" if ratio < 1 else f"a factor of {1 + ratio:,.0f}"
