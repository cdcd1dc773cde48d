"""Intervals over trials, differences and paired ratios of two modes, power, and Holm's correction.

The unit of replication is the trial: every function takes one value per trial.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pandas as pd
from scipy import optimize, special  # scipy.stats would take a second to import

LEVEL, POWER = 0.95, 0.8
MOST_TRIALS = 10_000
ONE_TRIAL = "one trial has no interval; set trials to 2 or more"
REMEASURE = "rerun with --config remeasure=blocks"


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its confidence interval, in the unit of the values; `n` counts the values or pairs behind it.

    If a number is None, `reason` says why. A reason beside numbers names a limit of theirs.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    reason: str | None = None

    def limited_by(self, reason: str | None) -> "Interval":
        """The same interval with one more reason."""
        return replace(self, reason="; ".join(filter(None, [self.reason, reason])) or None)


def no_interval(reason: str | None, n: int = 0) -> Interval:
    """An interval without numbers."""
    return Interval(None, None, None, n, reason)


def mean_interval(values: Sequence[float]) -> Interval:
    """Arithmetic mean with Student's t interval: mean -+ t(n-1) s / sqrt(n). [v, v] if all values are equal."""
    n = len(values)
    if n == 0 or not np.all(np.isfinite(values)):
        return _not_measured(n)
    mean = float(np.mean(values))
    if n == 1:
        return Interval(mean, None, None, 1, ONE_TRIAL)
    if min(values) == max(values):
        return Interval(float(values[0]), float(values[0]), float(values[0]), n)
    half = float(special.stdtrit(n - 1, (1 + LEVEL) / 2) * np.std(values, ddof=1) / np.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def geometric_mean_interval(values: Sequence[float]) -> Interval:
    """Geometric mean with a t interval on the log scale; values above 0.

    It never reaches below 0. If latencies are symmetric on the log scale it is also an interval for their median, and it exists for 2 to
    5 trials, unlike the one from order statistics.
    """
    return exponentiated(mean_interval([float(np.log(value)) for value in values]))


def median_interval(values: Sequence[float]) -> Interval:
    """Median with the narrowest symmetric interval of order statistics that covers `LEVEL` for any distribution.

    [x(k), x(n+1-k)] covers 1 - 2 P(Binomial(n, 1/2) < k) (Conover, Practical Nonparametric Statistics, 3.2). With fewer than 6 values
    even the whole range covers less than 95%: the interval is null with the reason.
    """
    n = len(values)
    if n == 0 or not np.all(np.isfinite(values)):
        return _not_measured(n)
    median = float(np.median(values))
    ordered = sorted(values)
    k = int(np.searchsorted(special.bdtr(np.arange(n), n, 0.5), (1 - LEVEL) / 2))
    if k == 0:
        covered = 100 * (1 - 2 * 0.5**n)
        reason = f"an order-statistic interval at {LEVEL:.0%} needs more trials; the range of {n} covers {covered:.0f}%"
        return Interval(median, None, None, n, reason)
    return Interval(median, float(ordered[k - 1]), float(ordered[n - k]), n)


def resolved(interval: Interval, within: float, values: Sequence[float], what: str) -> Interval:
    """The interval if its ends lie at most `within` from the value; else null, with the number of trials that would do.

    An interval without ends stays.
    """
    if interval.low is None or interval.high is None or interval.high - interval.low <= 2 * within:
        return interval
    sd, n = float(np.std(values, ddof=1)), interval.n
    while n < MOST_TRIALS and special.stdtrit(n - 1, (1 + LEVEL) / 2) * sd / np.sqrt(n) > within:
        n += 1
    return no_interval(f"not resolved by {interval.n} trials: {what} needs about {n:,} trials of this spread", interval.n)


def paired_ratio(mode: pd.DataFrame, baseline: pd.DataFrame) -> Interval:
    """Ratio of latencies between two modes of one model, network and phase: exp of the mean log-ratio of paired trials.

    Two trials pair if trial number, session and environment fingerprint are equal: sessions differ by more than most modes do. Null with
    the reason without a pair; one pair has no interval.
    """
    logs = log_ratios(mode, baseline)
    reason = _unpaired_reason(mode, baseline, len(logs))
    return replace(exponentiated(mean_interval(logs)), reason=reason) if logs else no_interval(reason)


def log_ratios(mode: pd.DataFrame, baseline: pd.DataFrame, column: str = "latency_mean_s") -> list[float]:
    """The log-ratio of a column, by default the latency, of each pair of trials."""
    ours, base = (trials[["trial", "session", "fingerprint", column]] for trials in (mode, baseline))
    pairs = ours.merge(base, on=["trial", "session", "fingerprint"], suffixes=("", "_baseline"))
    values, others = pairs[[column, f"{column}_baseline"]].dropna().to_numpy("float64").T
    logs: list[float] = np.log(values / others).tolist()
    return logs


def difference_interval(ours: Sequence[float], base: Sequence[float]) -> Interval:
    """Mean of `ours` less that of `base` with Welch's t interval: neither pairs nor equal spreads are needed."""
    n = min(len(ours), len(base))
    if not n or not np.all(np.isfinite([*ours, *base])):
        return _not_measured(n)
    difference = float(np.mean(ours) - np.mean(base))
    if n == 1:
        return Interval(difference, None, None, 1, ONE_TRIAL)
    error, freedom = _welch(ours, base)
    half = float(special.stdtrit(freedom, (1 + LEVEL) / 2) * error) if error else 0.0
    return Interval(difference, difference - half, difference + half, n)


def p_difference_below(ours: Sequence[float], base: Sequence[float], bound: float) -> float:
    """One-sided p value of Welch's test that mean(ours) - mean(base) lies below `bound`; 1 - p tests that it lies above.

    Takes 2 values or more of each.
    """
    distance = float(np.mean(ours) - np.mean(base)) - bound
    error, freedom = _welch(ours, base)
    if not error:
        return 0.5 if distance == 0 else float(distance > 0)
    return float(special.stdtr(freedom, distance / error))


def pooled_sd(groups: Sequence[Sequence[float]]) -> float | None:
    """The standard deviation within groups, pooled over them by degrees of freedom; None without a group of 2 values."""
    deviations = [np.asarray(group) - np.mean(group) for group in groups if len(group) > 1]
    freedom = sum(len(each) - 1 for each in deviations)
    return float(np.sqrt(sum(float((each**2).sum()) for each in deviations) / freedom)) if freedom else None


def smallest_effect(sd: float, n: int, samples: int = 1) -> float:
    """The effect that a two-sided test at 5% finds in `POWER` of cases, in the unit of `sd`, with `n` trials, 2 or more.

    `samples` 1: a t test of a mean of `n` values, or paired differences, against 0. 2: Welch's of two means of `n` values each.
    """
    return sd * float(np.sqrt(samples / n)) * _shift_found(n, samples)


def p_mean_below(values: Sequence[float], bound: float) -> float:
    """One-sided p value of Student's t test that the mean lies below `bound`; 1 - p tests that it lies above.

    Takes 2 values or more. Equal values are certain: 0 below the bound, 1 above it, 0.5 on it.
    """
    distance = float(np.mean(values)) - bound
    spread = float(np.std(values, ddof=1))
    if min(values) == max(values):
        return 0.5 if distance == 0 else float(distance > 0)
    return float(special.stdtr(len(values) - 1, distance / (spread / np.sqrt(len(values)))))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the order given (Holm 1979, Scandinavian Journal of Statistics 6:65)."""
    ranked = np.argsort(p_values, kind="stable")
    scaled = np.asarray(p_values, dtype="float64")[ranked] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[ranked] = np.maximum.accumulate(np.minimum(scaled, 1.0))
    return list(adjusted.tolist())


def exponentiated(interval: Interval) -> Interval:
    """An interval of logarithms, back on the scale of the values."""
    value, low, high = (None if x is None else float(np.exp(x)) for x in (interval.value, interval.low, interval.high))
    return replace(interval, value=value, low=low, high=high)


@cache
def _shift_found(n: int, samples: int) -> float:
    """The shift, in standard errors, that is found in `POWER` of cases: the mean over quantiles of the spreads that trials may show."""
    count = 2000 if samples == 1 else 120
    spread = 2 * special.gammaincinv((n - 1) / 2, (np.arange(count) + 0.5) / count) / (n - 1)  # chi squared over its freedom
    ours, base = np.meshgrid(spread, spread) if samples == 2 else (spread, spread)
    freedom = n - 1 if samples == 1 else (n - 1) * (ours + base) ** 2 / (ours**2 + base**2)
    ends = special.stdtrit(freedom, (1 + LEVEL) / 2) * np.sqrt((ours + base) / 2)

    def missing(shift: float) -> float:
        return float(np.mean(special.ndtr(shift - ends) + special.ndtr(-ends - shift))) - POWER

    return float(optimize.brentq(missing, 0.0, 100.0))


def _welch(ours: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """Standard error of the difference of two means, and its degrees of freedom (Welch 1947, Biometrika 34:28)."""
    parts = [0.0 if min(values) == max(values) else float(np.var(values, ddof=1)) / len(values) for values in (ours, base)]
    freedom = sum(part**2 / (len(values) - 1) for part, values in zip(parts, (ours, base), strict=True))
    return float(np.sqrt(sum(parts))), sum(parts) ** 2 / freedom if freedom else 1.0


def _not_measured(n: int) -> Interval:
    return no_interval("not measured in every trial" if n else "no trials", n)


def _unpaired_reason(mode: pd.DataFrame, baseline: pd.DataFrame, pairs: int) -> str | None:
    """Why trials have no partner, or None if every trial of `mode` has one and there are 2 or more."""
    ours, base = (trials[["trial", "session", "fingerprint"]] for trials in (mode, baseline))
    same_number = ours.merge(base, on="trial", suffixes=("", "_baseline"))
    of = f"{len(mode)} trial" + ("s" if len(mode) > 1 else "")
    for what, name in (("environment", "fingerprint"), ("session", "session")):
        other = int((same_number[name] != same_number[f"{name}_baseline"]).sum())
        if other:
            return f"{other} of {of} were measured in a different {what} than the baseline; {REMEASURE}"
    if pairs < 2:
        return f"{pairs} pair of trials has no interval; set trials to 2 or more"
    if len(same_number) < len(mode):
        return f"{len(mode) - len(same_number)} of {of} have no trial of the same number in the baseline"
    return None
