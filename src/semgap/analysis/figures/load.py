"""Figure load: throughput against the 99th percentile of ITL, one curve a mode, one mark a load."""

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from semgap.analysis.aggregate import SETTING
from semgap.analysis.figures.axes import log_log_axes
from semgap.analysis.figures.panels import WIDTH_IN, Box, axes_in, lines_of_panels, saying
from semgap.analysis.figures.style import BLACK, GREY, POINT, LineStyle, handle, legend, mode_handles, mode_styles, styled
from semgap.analysis.results import Results
from semgap.analysis.tables import load

COLUMNS, ENTRIES = 2, 5
TICKS_IN, HEIGHT_IN, HEAD_IN, LINE_IN, BETWEEN_IN = 0.6, 2.3, 0.45, 0.19, 0.65
TAILS = ("itl_p99_ms", "itl_p90_ms", "itl_p50_ms")
"""The tail that is drawn: the first that each mode of a panel has."""


@styled()
def plot(results: Results) -> Figure:
    """The table `load`: a panel for each model, network and phase. Up and left is better.

    Means over trials, with 95% intervals of both. The mark beside a point is its load: N, or the rate of an open loop.
    """
    table = load.table(results)
    groups = [rows for _, rows in table.groupby(SETTING, sort=False) if rows["itl_p50_ms"].notna().any()]
    if not groups:
        return saying("no load phase was run")
    styles = mode_styles(mode for rows in groups for mode in rows["mode"])
    figure, boxes = _panels(len(groups), len(styles))
    for rows, box in zip(groups, boxes, strict=True):
        _draw(axes_in(figure, box), rows, styles)
    legend(figure, [*mode_handles(styles), handle("95% interval", color=BLACK, lw=1.0)], columns=ENTRIES)
    return figure


def _panels(count: int, modes: int) -> tuple[Figure, list[Box]]:
    """A figure with up to two panels in a line."""
    columns = min(COLUMNS, count)
    lines = -(-count // columns)
    figure, bottoms = lines_of_panels(-(-(modes + 1) // ENTRIES) * LINE_IN + 0.12, [(HEAD_IN, HEIGHT_IN)] * lines)
    width = (WIDTH_IN - TICKS_IN - 0.1 - (columns - 1) * BETWEEN_IN) / columns
    boxes = [Box(TICKS_IN + column * (width + BETWEEN_IN), bottom, width, HEIGHT_IN) for bottom in bottoms for column in range(columns)]
    return figure, boxes[:count]


def _draw(ax: Axes, rows: pd.DataFrame, styles: Mapping[str, LineStyle]) -> None:
    tail = next(name for name in TAILS if rows[name].notna().groupby(rows["mode"]).any().all() or name == TAILS[-1])
    shown, first = rows[rows[tail].notna()], rows.iloc[0]
    ends = [shown[f"{name}{end}"].fillna(shown[name]).clip(lower=1e-3) for name in (tail, "tokens_per_s") for end in ("_low", "_high")]
    log_log_axes(ax, _range(shown[tail], ends[:2]), _range(shown["tokens_per_s"], ends[2:]))
    ax.set_title(f"{first['phase']} ({first['model']}, {first['network']})", loc="left", fontsize=8)
    ax.set_xlabel(f"ITL, {tail.split('_')[1]} (ms)")
    ax.set_ylabel("throughput (tokens/s)")
    for mode, own in shown.groupby("mode", sort=False):
        _curve(ax, own, tail, styles[str(mode)])


def _range(values: pd.Series, ends: Sequence[pd.Series]) -> tuple[float, float]:
    """All values, and their intervals up to a factor of 2."""
    low, high = float(values.min()), float(values.max())
    return max(float(ends[0].min()), low / 2), min(float(ends[1].max()), 2 * high)


def _curve(ax: Axes, rows: pd.DataFrame, tail: str, style: LineStyle) -> None:
    colour, marker = style
    ax.plot(rows[tail], rows["tokens_per_s"], color=colour, lw=0.9, marker=marker, **POINT)
    for across, along, draw in ((tail, "tokens_per_s", ax.vlines), ("tokens_per_s", tail, ax.hlines)):
        known = rows[rows[f"{along}_low"].notna()]
        draw(known[across], known[f"{along}_low"].clip(lower=1e-3), known[f"{along}_high"], color=colour, lw=1.0, zorder=3)
    for x, y, name in zip(rows[tail], rows["tokens_per_s"], rows["load"], strict=True):
        ax.annotate(name.removeprefix("N = ").removesuffix(" of capacity"), (x, y), (4, 4), textcoords="offset points", color=GREY)
