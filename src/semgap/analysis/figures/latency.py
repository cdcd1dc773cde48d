"""Figure latency: TTFT and ITL of each mode, one row per mode."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from semgap.analysis.figures.axes import beside, draw_arrows, mode_axis
from semgap.analysis.figures.facets import KV_PHASES_ALONE, Facet, facet_panels, facets
from semgap.analysis.figures.panels import BREAK_IN, Box, axes_in, saying, text_width_in
from semgap.analysis.figures.style import BLACK, LIGHT, handle, legend, styled, three_digits
from semgap.analysis.results import Results
from semgap.analysis.stats import mean_interval

POINT_COLOUR = "#56B4E9"
GAP = 2.5
"""Latencies further apart than this factor get separate axes, so that small differences stay visible."""


@styled()
def plot(results: Results) -> Figure:
    """TTFT and ITL per mode: each trial's time per token, their mean, and its 95% t interval.

    The axis is broken between modes more than 2.5 times apart: fast and slow modes get separate linear axes. Recovery phases have another
    figure.
    """
    rows = results.rows
    shown = facets(rows)
    if not shown:
        return saying(KV_PHASES_ALONE)
    figure, boxes = facet_panels(shown)
    for facet, box in zip(shown, boxes, strict=True):
        _draw_latency(figure, box, facet.of(rows), facet)
    point = handle("one trial (time per token)", color=POINT_COLOUR, marker="o", ms=4, ls="")
    legend(figure, [point, handle("mean, 95% interval", color=BLACK, marker="|", ms=8, mew=1.6, lw=1.2)])
    return figure


def _milliseconds(rows: pd.DataFrame) -> dict[str, list[float]]:
    """Each mode's trials in ms per token, in order of the trials."""
    cells = rows.sort_values("trial").groupby("mode", sort=False)["latency_mean_s"]
    return {str(mode): (values * 1e3).tolist() for mode, values in cells}


def _extent(values: Sequence[float]) -> tuple[float, float]:
    """The range of the axis for a mode, in ms: its trials, and its interval up to a factor of 1.5 (with n = 2 it can span decades)."""
    interval = mean_interval(values)
    low, high = min(values), max(values)
    if interval.low is None or interval.high is None:
        return low, high
    return max(min(low, interval.low), low / 1.5), min(max(high, interval.high), high * 1.5)


def _clusters(modes: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """Ranges of ms around all modes, split between trials more than a factor of `GAP` apart, at most at the two widest such places.

    Intervals widen a range, at most half way to the next one.
    """
    ordered = sorted(modes, key=min)
    reaches = list(itertools.accumulate((max(values) for values in ordered), max))
    gaps = sorted((min(ordered[i + 1]) / reaches[i], i + 1) for i in range(len(ordered) - 1))
    cuts = [0, *sorted(i for width, i in gaps[-2:] if width > GAP), len(ordered)]
    parts = [[_extent(values) for values in ordered[start:end]] for start, end in itertools.pairwise(cuts)]
    between = [(reaches[cut - 1] * min(ordered[cut])) ** 0.5 for cut in cuts[1:-1]]
    limits = itertools.pairwise([0.0, *between, float("inf")])
    return [
        (max(min(low for low, _ in part), floor), min(max(high for _, high in part), ceiling))
        for part, (floor, ceiling) in zip(parts, limits, strict=True)
    ]


def _draw_latency(figure: Figure, box: Box, rows: pd.DataFrame, facet: Facet) -> None:
    measured = _milliseconds(rows)
    clusters = _clusters(list(measured.values()))
    # A part of a broken axis is wider for more modes, and wide enough for a tick.
    shares = [float(np.clip(sum(low <= np.mean(values) <= high for values in measured.values()), 1.2, 4)) for low, high in clusters]
    boxes = box.parts(shares)
    parts = [axes_in(figure, part) for part in boxes]
    for ax, part, (low, high) in zip(parts, boxes, clusters, strict=True):
        margin = max((high - low) * 0.08, high * 0.02)
        limits = (low - margin, high + margin)
        mode_axis(ax, facet.modes)
        ax.grid(axis="x", color=LIGHT, lw=0.6, zorder=1)
        _latency_ticks(ax, limits, part.width)
        for row, mode in enumerate(facet.modes):
            if mode in measured and low <= float(np.mean(measured[mode])) <= high:
                _draw_trials(ax, row, measured[mode], limits)
    for row, mode in enumerate(facet.modes):
        beside(parts[-1], row, f"{three_digits(float(np.mean(measured[mode])))} ms" if mode in measured else "not run")
    for left, right in itertools.pairwise(parts):
        _mark_break(left, right)
    parts[0].set_title(facet.title, loc="left")
    parts[int(np.argmax(shares))].set_xlabel(f"{'TTFT' if facet.kind == 'prefill' else 'ITL'} (ms)")


def _latency_ticks(ax: Axes, limits: tuple[float, float], width_in: float) -> None:
    """As many round ticks as fit, at least one."""
    low, high = limits
    locators = (MaxNLocator(bins, steps=[1, 2, 2.5, 5, 10]) for bins in range(6, 0, -1))
    tried = (_without_overlap(np.asarray(each.tick_values(low, high)).tolist(), limits, width_in) for each in locators)
    ticks = next(filter(None, tried), [float(f"{(low + high) / 2:.2g}")])
    ax.set_xlim(low, high)
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tick_text(x)))


def _without_overlap(ticks: Sequence[float], limits: tuple[float, float], width_in: float) -> list[float]:
    """The ticks whose labels fit the axis, or none if two labels would touch."""
    low, high = limits
    labels = [((tick - low) / (high - low) * width_in, text_width_in(_tick_text(tick)) / 2, tick) for tick in ticks]
    inside = [p for p in labels if p[1] <= p[0] + BREAK_IN / 3 and p[0] + p[1] <= width_in + BREAK_IN / 3]
    touching = any(b[0] - b[1] - (a[0] + a[1]) < 0.08 for a, b in itertools.pairwise(inside))
    return [] if touching else [tick for _, _, tick in inside]


def _tick_text(milliseconds: float) -> str:
    return f"{milliseconds:,.5g}" if milliseconds < 1e4 else f"{milliseconds:,.0f}"


def _draw_trials(ax: Axes, row: int, values: Sequence[float], limits: tuple[float, float]) -> None:
    """A mode's trials, their mean, and its interval. An end outside the axis becomes an arrow."""
    heights = row + (np.linspace(0.12, 0.3, len(values)) if len(values) > 1 else np.array([0.2]))
    ax.plot(values, heights, marker="o", ms=3, color=POINT_COLOUR, ls="", zorder=3)
    interval, height = mean_interval(values), row - 0.1
    ax.plot(float(np.mean(values)), height, marker="|", ms=8, mew=1.6, color=BLACK, zorder=4)
    if interval.low is None or interval.high is None:
        return
    ax.plot(np.clip([interval.low, interval.high], *limits), [height, height], color=BLACK, lw=1.2, zorder=4)
    draw_arrows(ax, height, (interval.low, interval.high), limits)


def _mark_break(left: Axes, right: Axes) -> None:
    right.spines["left"].set_visible(False)
    right.tick_params(axis="y", labelleft=False)
    slash: dict[str, Any] = {"marker": [(-0.5, -1), (0.5, 1)], "ms": 6, "ls": "", "color": BLACK, "mew": 0.8, "clip_on": False}
    left.plot([1], [0], transform=left.transAxes, **slash)
    right.plot([0], [0], transform=right.transAxes, **slash)
