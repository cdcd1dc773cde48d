"""Table hypotheses: claims, twins and planted waits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from intervals import Row, holm, mean, welch, welch_interval
from run import Run, byte_ratio, equal_compute_logs, is_prefill, paired, strongest_blind
from scipy import stats
from trials import Trial


@dataclass
class Compared:
    """Logarithms of a mode's latency over its baseline's: a mean, its standard error (None: one trial) and degrees of freedom."""

    basis: str
    trials: int
    log: float
    error: float | None = None
    freedom: float | None = None

    def p_below(self, edge: float) -> float | None:
        """One-sided p value for a ratio below `edge`; 1 - p for one above it."""
        return float(stats.t.cdf((self.log - math.log(edge)) / self.error, self.freedom)) if self.error else None

    def cut(self, name: str = "cut") -> Row:
        half = float(stats.t.ppf(0.975, self.freedom)) * self.error if self.error else None
        low, high = (None, None) if half is None else (1 - math.exp(self.log + half), 1 - math.exp(self.log - half))
        return {name: 1 - math.exp(self.log), f"{name}_low": low, f"{name}_high": high}


def compared(trials: Sequence[Trial], baseline: Sequence[Trial]) -> Compared | None:
    """Decode phases: latencies at equal compute, by Welch; prefill phases: latencies of paired trials."""
    if is_prefill(trials):
        logs = [math.log(a.latency_s / b.latency_s) for a, b in paired(trials, baseline)]
        spread = (float(stats.sem(logs)), len(logs) - 1) if len(logs) > 1 else ()
        return Compared("paired latencies", len(logs), float(np.mean(logs)), *spread) if logs else None
    ours, base = equal_compute_logs(trials, baseline)
    found = welch(ours, base) if min(len(ours), len(base)) > 1 else (float(np.mean(ours) - np.mean(base)),)
    return Compared("the gap, at equal compute", len(trials), *found)


def hypotheses(run: Run) -> list[Row]:
    """H1 by counted bytes, H2 by two one-sided tests at 2.5%, A/A by an equivalence test within 1%, planted by Welch's test; Holm each."""
    rows: list[Row] = []
    for at, trials, modes in run.cells("prefill", "decode"):
        mark = run.mark(at["mode"])
        claims, twin = mark.get("claims") or {}, mark.get("twin")
        if claims.get("against") in modes:
            rows += [h1(run, at, trials, modes, claims)] if claims.get("fewer_bytes") is not None else []
            rows += [h2(run, at, trials, modes, claims)] if claims.get("lower_latency") is not None else []
        if twin in modes:
            rows.append(twins(at, trials, modes[twin]))
    for row in rows:
        family = [each for each in rows if each["hypothesis"] == row["hypothesis"]]
        if row["hypothesis"] == "planted":
            family += [each for each in rows if each["hypothesis"] == "A/A"]
        judge(row, family)
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]


def judge(row: Row, family: Sequence[Row]) -> None:
    """Adds Holm's p values over the family, and the verdict."""
    at = next(i for i, each in enumerate(family) if each is row)
    kind = row["hypothesis"]
    p = "_p_found" if kind == "planted" else "p"
    row["p_holm"] = holm([each.get(p) for each in family])[at]
    row["p_holm_no"] = holm([each.get("_p_no") for each in family])[at]
    if kind == "H2" and row["p_holm"] is not None:
        row["verdict"] = "yes" if row["p_holm"] < 0.025 else "no" if row["p_holm_no"] < 0.025 else "inconclusive"
    if kind == "A/A" and row["p_holm"] is not None:
        row["verdict"] = "same" if row["p_holm"] < 0.05 else "different" if row["p_holm_no"] < 0.05 else "inconclusive"
    if kind == "planted" and row["p_holm"] is not None:
        as_planted = row["found_ms_low"] <= row["planted_ms"] <= row["found_ms_high"]
        row["verdict"] = ("found" if row["p_holm"] < 0.05 else "not found") + ("" if as_planted else ", not as planted")


def h1(run: Run, at: Row, trials: Sequence[Trial], modes: Mapping[str, Sequence[Trial]], claims: Row) -> Row:
    """The cut in counted bytes: yes or no if its interval lies on one side of the threshold."""
    threshold = claims["fewer_bytes"]
    row = at | {"hypothesis": "H1", "baseline": claims["against"], "basis": "counted bytes", "threshold": threshold, "trials": len(trials)}
    blind, first = strongest_blind(run, modes, lambda ts: mean(run.column(ts, "payload_bytes_per_token"))), first_rung(run, modes)
    row |= {"blind": blind, "first_rung": first}
    for name, mode in (("cut", claims["against"]), ("cut_to_blind", blind), ("cut_to_first_rung", first)):
        row |= cut_of(name, byte_ratio("r", run, trials, modes[mode])) if mode else {}
    if (cast := claims.get("cast")) in modes:
        row["cast_part"] = 1 - byte_ratio("r", run, modes[cast], modes[claims["against"]])["r"]
        row["rest_part"] = row["cut"] - row["cast_part"]
    low, high = row["cut_low"], row["cut_high"]
    decided = low is not None and not any(depends_on_random_weights(t) for t in [*trials, *modes[claims["against"]]])
    row["verdict"] = ("yes" if low > threshold else "no" if high < threshold else "inconclusive") if decided else None
    return row


def depends_on_random_weights(trial: Trial) -> bool:
    """True if the weights are random and a codec's payload depends on values: its bytes say nothing of a trained model."""
    compressed = any(method in codec for codec in trial.policy["codec"].values() for method in ("zlib", "zstd", "ans"))
    return trial.model_spec["source"] == "random" and compressed


def cut_of(name: str, ratios: Row) -> Row:
    low, high = ratios.get("r_high"), ratios.get("r_low")
    return {name: 1 - ratios["r"], f"{name}_low": None if low is None else 1 - low, f"{name}_high": None if high is None else 1 - high}


def first_rung(run: Run, modes: Iterable[str]) -> str | None:
    """The rung directly above the lowest."""
    return next((rung for rung in run.ladder(run.config["define"]["modes"])[1:2] if rung in modes), None)


def h2(run: Run, at: Row, trials: Sequence[Trial], modes: Mapping[str, Sequence[Trial]], claims: Row) -> Row:
    threshold = claims["lower_latency"]
    row = at | {"hypothesis": "H2", "baseline": claims["against"], "threshold": threshold}
    if found := compared(trials, modes[claims["against"]]):
        p = found.p_below(1 - threshold)
        row |= {"basis": found.basis, "trials": found.trials, "p": p, "_p_no": None if p is None else 1 - p} | found.cut()
    blind, first = strongest_blind(run, modes, lambda ts: mean([t.gap_s for t in ts])), first_rung(run, modes)
    row |= {"blind": blind, "first_rung": first}
    for name, mode in (("cut_to_blind", blind), ("cut_to_first_rung", first)):
        row |= other.cut(name) if mode and (other := compared(trials, modes[mode])) else {}
    if (cast := claims.get("cast")) in modes and found and (other := compared(modes[cast], modes[claims["against"]])):
        row["cast_part"] = 1 - math.exp(other.log)
        row["rest_part"] = row["cut"] - row["cast_part"]
    return row


def twins(at: Row, trials: Sequence[Trial], twin: Sequence[Trial]) -> Row:
    """A/A and planted: the difference of the gaps, and of the latencies at equal compute."""
    planted, gaps = trials[0].policy["plant_us"] / 1e3, [[t.typical_gap_s for t in each] for each in (trials, twin)]
    row = at | {"hypothesis": "planted" if planted else "A/A", "baseline": twin[0].mode, "planted_ms": planted, "trials": len(trials)}
    row |= welch_interval("found_ms", *gaps, 1e3) | ({} if planted else {"threshold": 0.01})
    if same := compared(trials, twin):
        row |= {"basis": same.basis, "trials": same.trials} | same.cut()
        if same.error:
            difference, error, freedom = welch(*gaps)
            row["_p_found"] = 2 * float(stats.t.sf(abs(difference) / error, freedom))
            row["p"] = row["_p_found"] if planted else max(same.p_below(1.01), 1 - same.p_below(0.99))
            row["_p_no"] = None if planted else min(1.0, 2 * min(1 - same.p_below(1.01), same.p_below(0.99)))
    return row
