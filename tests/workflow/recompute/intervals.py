"""What the tables have in common: means, ratios and intervals over trials, by docs/method.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize, stats

Row = dict[str, Any]


def is_null(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None or not b or math.isnan(a) or math.isnan(b) else float(a / b)


def mean(values: Sequence[Any], scale: float = 1.0) -> float | None:
    """The mean over trials; null if one trial has none."""
    return None if len(values) == 0 or any(map(is_null, values)) else float(np.mean(values)) * scale


def half_width(values: Sequence[float]) -> float:
    """t(0.975, n - 1) s / sqrt(n)"""
    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))


def interval(name: str, values: Sequence[Any], scale: float = 1.0) -> Row:
    """Mean and its 95% t interval, which needs two trials."""
    middle = mean(values, scale)
    if middle is None or len(values) < 2:
        return {name: middle, f"{name}_low": None, f"{name}_high": None}
    half = half_width(values) * scale
    return {name: middle, f"{name}_low": middle - half, f"{name}_high": middle + half}


def log_interval(name: str, values: Sequence[Any]) -> Row:
    """Geometric mean and the t interval of the logarithms."""
    if not values or any(map(is_null, values)) or min(values) <= 0:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    return {
        key: value if value is None else math.exp(value) for key, value in interval(name, np.log(np.array(values, dtype=float))).items()
    }


def median_interval(name: str, values: Sequence[float], scale: float) -> Row:
    """Median; from 6 trials on the innermost pair of order statistics x(k), x(n+1-k) whose binomial coverage is at least 95%."""
    ordered, n = np.sort(np.array(values, dtype=float)) * scale, len(values)
    row = {name: float(np.median(ordered)), f"{name}_low": None, f"{name}_high": None}
    ranks = [k for k in range(1, n // 2 + 1) if 1 - 2 * stats.binom.cdf(k - 1, n, 0.5) >= 0.95]
    return row | ({f"{name}_low": ordered[ranks[-1] - 1], f"{name}_high": ordered[n - ranks[-1]]} if ranks else {})


def welch(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Difference of the means, its standard error and Welch's degrees of freedom."""
    va, vb = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1)) if va + vb > 0 else 1.0
    return float(np.mean(a) - np.mean(b)), math.sqrt(va + vb), float(freedom)


def welch_interval(name: str, a: Sequence[Any], b: Sequence[Any], scale: float = 1.0) -> Row:
    if min(len(a), len(b)) < 2 or any(map(is_null, [*a, *b])):
        known = a and b and not any(map(is_null, [*a, *b]))
        return {name: (np.mean(a) - np.mean(b)) * scale if known else None, f"{name}_low": None, f"{name}_high": None}
    middle, error, freedom = welch(a, b)
    half = stats.t.ppf(0.975, freedom) * error if error else 0.0
    return {name: middle * scale, f"{name}_low": (middle - half) * scale, f"{name}_high": (middle + half) * scale}


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment: the k-th smallest of n times n + 1 - k, never below the one before, at most 1."""
    known = sorted((value, at) for at, value in enumerate(values) if value is not None)
    adjusted: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (value, at) in enumerate(known):
        largest = max(largest, min(1.0, value * (len(known) - rank)))
        adjusted[at] = largest
    return adjusted


def smallest_effect(groups: Sequence[Sequence[float]], samples: int) -> float | None:
    """d s sqrt(samples / n): pooled spread s, fewest trials n, and the shift d that the test finds, over quantiles of the spreads shown."""
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        return None
    freedom, n = sum(len(group) - 1 for group in groups), min(map(len, groups))
    spread = math.sqrt(sum(np.var(group, ddof=1) * (len(group) - 1) for group in groups) / freedom)
    count = 120 if samples == 2 else 2000
    shown = stats.chi2.ppf((np.arange(count) + 0.5) / count, n - 1) / (n - 1)  # variance of a sample, over the true one
    one, other = np.meshgrid(shown, shown) if samples == 2 else (shown, shown)
    degrees = (n - 1) * (one + other) ** 2 / (one**2 + other**2) if samples == 2 else n - 1
    edge = stats.t.ppf(0.975, degrees) * np.sqrt((one + other) / 2)
    shift = optimize.brentq(lambda d: np.mean(stats.norm.sf(edge - d) + stats.norm.cdf(-edge - d)) - 0.8, 0, 100, xtol=1e-13)
    return float(shift * spread * math.sqrt(samples / n))
