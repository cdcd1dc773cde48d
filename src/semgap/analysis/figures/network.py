"""Figure network: latency of each mode over the round trip, a panel for each rate, with the fitted model as lines."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from semgap.analysis.aggregate import LOCAL
from semgap.analysis.figures.axes import with_ends
from semgap.analysis.figures.panels import WIDTH_IN, Box, axes_in, headline, lines_of_panels, saying
from semgap.analysis.figures.style import BLACK, DASHED, GREY, LIGHT, LineStyle, handle, legend, mode_handles, mode_styles, styled
from semgap.analysis.results import Results
from semgap.analysis.tables import network

COLUMNS, ENTRIES = 3, 4
TICKS_IN, HEIGHT_IN, HEAD_IN, TITLE_IN, LINE_IN, BETWEEN_IN = 0.6, 1.75, 0.28, 0.25, 0.19, 0.15
MARGIN = 1.35
"""The factor between the outermost points and the ends of an axis."""


@styled()
def plot(results: Results) -> Figure:
    """The table `network`: for each model and phase, latency over the measured round trip, one panel for each configured rate.

    ITL in decode phases, TTFT in prefill phases; means over trials with 95% intervals. Thin lines: compute + link as fitted.
    """
    groups = [rows for _, rows in network.table(results).groupby(["model", "phase"], sort=False) if rows["rtt_ms"].notna().any()]
    groups = [rows for rows in groups if rows["network"].nunique() > 1]
    if not groups:
        return saying("fewer than two networks were run; the table network has their cells")
    styles = mode_styles(mode for rows in groups for mode in rows["mode"] if mode != LOCAL)
    figure, boxes = _panels(groups, len(styles))
    for rows, own in zip(groups, boxes, strict=True):
        _draw_group(figure, own, rows, styles)
    has_local = any((rows["mode"] == LOCAL).any() for rows in groups)
    local = [handle("local", color=GREY, lw=1.2, ls=DASHED)] if has_local else []
    fitted = handle("fitted: compute + link", color=BLACK, lw=0.9)
    interval = handle("95% interval", color=BLACK, marker="|", ms=8, mew=1.2, ls="")
    legend(figure, [*mode_handles(styles), *local, fitted, interval], columns=ENTRIES)
    return figure


def _rates(rows: pd.DataFrame) -> list[float | None]:
    """The configured rates, lowest first; None, for networks without a rate, comes last."""
    rates = rows.loc[rows["rtt_ms"].notna(), "asked_rate_mbit_per_s"]
    return [*sorted(rates.dropna().unique()), *([None] if rates.isna().any() else [])]


def _panels(groups: Sequence[pd.DataFrame], modes: int) -> tuple[Figure, list[list[Box]]]:
    """A figure and the boxes of its panels: up to three in a line, the first one with tick labels."""
    lines = [-(-len(_rates(rows)) // COLUMNS) for rows in groups]
    heads = [HEAD_IN * (line == 0) + TITLE_IN for count in lines for line in range(count)]
    figure, bottoms = lines_of_panels(-(-(modes + 3) // ENTRIES) * LINE_IN + 0.12, [(head, HEIGHT_IN) for head in heads])
    width = (WIDTH_IN - TICKS_IN - 0.1 - (COLUMNS - 1) * BETWEEN_IN) / COLUMNS
    below = iter(bottoms)
    boxes = []
    for rows, count in zip(groups, lines, strict=True):
        own = [box for _ in range(count) for box in Box(TICKS_IN, next(below), width, HEIGHT_IN).repeated(COLUMNS, BETWEEN_IN)]
        boxes.append(own[: len(_rates(rows))])
    return figure, boxes


def _draw_group(figure: Figure, boxes: Sequence[Box], rows: pd.DataFrame, styles: Mapping[str, LineStyle]) -> None:
    first = rows.iloc[0]
    metric = "itl" if rows["itl_ms"].notna().any() else "ttft"
    shown = rows.join(with_ends(rows, f"{metric}_ms")).assign(fitted=rows[f"{metric}_fitted_ms"])
    headline(figure, boxes[0], f"{metric.upper()}, {first['phase']} ({first['model']})")
    for box, rate in zip(boxes, _rates(rows), strict=True):
        rates = shown["asked_rate_mbit_per_s"]
        ax = axes_in(figure, box)
        _axes(ax, shown, rate, metric, box.named)
        _draw_panel(ax, shown[rates.isna() if rate is None else rates == rate], shown, styles)


def _axes(ax: Axes, shown: pd.DataFrame, rate: float | None, metric: str, named: bool) -> None:
    """Log axes, the same for all panels of a group."""
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(shown["rtt_ms"].min() / MARGIN, shown["rtt_ms"].max() * MARGIN)
    ax.set_ylim(shown["mean"].min() / MARGIN, shown["mean"].max() * MARGIN)
    _ticks(ax)
    ax.grid(color=LIGHT, lw=0.6)
    ax.set_axisbelow(True)
    title = "no rate set" if rate is None else f"{rate / 1e3:g} Gbit/s" if rate >= 1e3 else f"{rate:g} Mbit/s"
    ax.set_title(title, loc="left", fontsize=8)
    ax.set_xlabel("round trip (ms)")
    if named:
        ax.set_ylabel(f"{metric.upper()} (ms)")


def _ticks(ax: Axes) -> None:
    """Decades, and as many steps between them as there is room for. A range within one decade gets at least three ticks."""
    for axis, most in ((ax.xaxis, 6), (ax.yaxis, 8)):
        low, high = axis.get_view_interval()
        decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
        finer = [np.concatenate([decades * factor for factor in factors]) for factors in ((1, 2, 5), (1, 3), (1,))]
        inside = [ticks[(ticks >= low) & (ticks <= high)] for ticks in (*finer, decades[::2])]
        chosen = next((ticks for ticks in inside if len(ticks) <= most), inside[-1])
        within = (np.concatenate([decades * factor for factor in np.arange(1, 10, step)]) for step in (1, 0.5, 0.2, 0.1, 0.05))
        candidates = [chosen, *(ticks[(ticks >= low) & (ticks <= high)] for ticks in within)]
        axis.set_major_locator(FixedLocator(sorted(next((ticks for ticks in candidates if len(ticks) > 2), chosen))))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value < 1e4 else f"{value / 1e3:g}k"))


def _draw_panel(ax: Axes, here: pd.DataFrame, shown: pd.DataFrame, styles: Mapping[str, LineStyle]) -> None:
    local = shown.loc[shown["mode"] == LOCAL, "mean"]
    if len(local):
        ax.axhline(local.mean(), color=GREY, lw=1.2, ls=DASHED, zorder=2)
    for mode, own in here[here["rtt_ms"].notna()].groupby("mode", sort=False):
        colour, marker = styles[str(mode)]
        points = own.sort_values("rtt_ms")
        _draw_fit(ax, points, colour)
        ax.vlines(points["rtt_ms"], points["low"].clip(lower=1e-6), points["high"], color=colour, lw=1.0, zorder=3)
        # Later marks are smaller, so that marks below them stay visible.
        size = 6.5 - 3 * list(styles).index(str(mode)) / len(styles)
        ax.plot(points["rtt_ms"], points["mean"], color=colour, marker=marker, ms=size, mec="white", mew=0.3, ls="", zorder=4)


def _draw_fit(ax: Axes, points: pd.DataFrame, colour: str) -> None:
    """The fitted model between the networks that were run. It is linear in the round trip; a log axis bends it."""
    trips = points["rtt_ms"].to_numpy(dtype=float)
    between = np.geomspace(trips[0], trips[-1], 60)
    ax.plot(between, np.interp(between, trips, points["fitted"].to_numpy(dtype=float)), color=colour, lw=0.9, zorder=2)
