"""Figure network: latency of each mode over the round trip, a panel for each rate, with the prices of all recorded trials as lines."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from semgap.analysis.figures.axes import log_log_axes, with_ends
from semgap.analysis.figures.panels import WIDTH_IN, Box, axes_in, headline, lines_of_panels, saying
from semgap.analysis.figures.style import BLACK, DASHED, GREY, LineStyle, handle, legend, mode_handles, mode_styles, styled
from semgap.analysis.held_out import pooled_s
from semgap.analysis.links import LinkModel, priced_s, separable, with_compute
from semgap.analysis.results import Results
from semgap.analysis.tables import network

COLUMNS, ENTRIES = 3, 4
TICKS_IN, HEIGHT_IN, HEAD_IN, TITLE_IN, LINE_IN, BETWEEN_IN = 0.6, 1.75, 0.28, 0.25, 0.19, 0.15
PRICED_MS = (0.05, 100.0)
"""Round trips over which modes are priced at least."""
POINTS = 30


@styled()
def plot(results: Results) -> Figure:
    """The table `network`: for each model and phase, latency over the measured round trip, one panel for each configured rate.

    ITL in decode phases, TTFT in prefill phases; means over trials with 95% intervals. Thin lines: prices from all recorded trials, at the
    goodput that the panel's trials measured.
    """
    table = network.table(results)
    groups = [
        rows for _, rows in table[table["of_phase"].astype("bool")].groupby(["model", "phase"], sort=False) if rows["rtt_ms"].notna().any()
    ]
    if not groups:
        return saying("no mode crossed a network")
    styles = mode_styles(mode for rows in groups for mode in rows.loc[~rows["local"], "mode"])
    known = separable(with_compute(results.calls))
    figure, boxes = _panels(groups, len(styles))
    for rows, own in zip(groups, boxes, strict=True):
        _draw_group(figure, own, rows, styles, known.merge(rows[["model", "phase", "mode", "metric"]].drop_duplicates()))
    local = [handle("local", color=GREY, lw=1.2, ls=DASHED)] if table["local"].any() else []
    priced = handle("priced", color=BLACK, lw=0.9)
    interval = handle("95% interval", color=BLACK, marker="|", ms=8, mew=1.2, ls="")
    legend(figure, [*mode_handles(styles), *local, priced, interval], columns=ENTRIES)
    return figure


def _rates(rows: pd.DataFrame) -> list[float | None]:
    """The configured rates, lowest first; None, for networks without a rate, comes last."""
    rates = rows.loc[rows["rtt_ms"].notna(), "asked_rate_mbit_per_s"]
    return [*sorted(rates.dropna().unique()), *([None] if rates.isna().any() else [])]


def _panels(groups: Sequence[pd.DataFrame], modes: int) -> tuple[Figure, list[list[Box]]]:
    """A figure and the boxes of its panels: up to three in a line, the first one with tick labels."""
    columns = min(COLUMNS, max(len(_rates(rows)) for rows in groups))
    lines = [-(-len(_rates(rows)) // columns) for rows in groups]
    heads = [HEAD_IN * (line == 0) + TITLE_IN for count in lines for line in range(count)]
    figure, bottoms = lines_of_panels(-(-(modes + 3) // ENTRIES) * LINE_IN + 0.12, [(head, HEIGHT_IN) for head in heads])
    width = (WIDTH_IN - TICKS_IN - 0.1 - (columns - 1) * BETWEEN_IN) / columns
    below = iter(bottoms)
    boxes = []
    for rows, count in zip(groups, lines, strict=True):
        own = [box for _ in range(count) for box in Box(TICKS_IN, next(below), width, HEIGHT_IN).repeated(columns, BETWEEN_IN)]
        boxes.append(own[: len(_rates(rows))])
    return figure, boxes


def _draw_group(figure: Figure, boxes: Sequence[Box], rows: pd.DataFrame, styles: Mapping[str, LineStyle], calls: pd.DataFrame) -> None:
    first = rows.iloc[0]
    shown = rows.join(with_ends(rows, "latency_ms"))
    trips = (min(PRICED_MS[0], shown["rtt_ms"].min()), max(PRICED_MS[1], shown["rtt_ms"].max()))
    rates = [(rate, _of_rate(shown, rate)) for rate in _rates(rows)]
    prices = [_prices(calls, here, np.geomspace(*trips, POINTS)) for _, here in rates]
    heights = [*shown["mean"], *(value for each in prices for line in each.values() for value in line if np.isfinite(value))]
    headline(figure, boxes[0], f"{first['metric']}, {first['phase']} ({first['model']})")
    for box, (rate, here), lines in zip(boxes, rates, prices, strict=True):
        ax = axes_in(figure, box)
        _axes(ax, trips, (min(heights), max(heights)), rate)
        if box.named:
            ax.set_ylabel(f"{first['metric']} (ms)")
        for mode, line in lines.items():
            ax.plot(np.geomspace(*trips, POINTS), line, color=styles[mode][0], lw=0.9, zorder=2)
        _draw_panel(ax, here, shown, styles)


def _of_rate(rows: pd.DataFrame, rate: float | None) -> pd.DataFrame:
    rates = rows["asked_rate_mbit_per_s"]
    return rows[rates.isna() if rate is None else rates == rate]


def _prices(calls: pd.DataFrame, here: pd.DataFrame, trips_ms: np.ndarray) -> dict[str, list[float]]:
    """Milliseconds per token of each mode of a panel, over these round trips, from the trials over all networks."""
    up, down = (8e-6 / here[f"goodput_{way}_mbit_per_s"].mean() for way in ("up", "down"))
    per_byte = [0.0 if np.isnan(seconds) else float(seconds) for seconds in (up, down)]
    found = {}
    for mode, own in calls[calls["mode"].isin(here.loc[~here["local"], "mode"])].groupby("mode", sort=False):
        seconds = (priced_s(own, LinkModel(float(trip) / 1e3, *per_byte)) for trip in trips_ms)
        found[str(mode)] = [1e3 * pooled_s(own, priced) for priced in seconds]
    return found


def _axes(ax: Axes, trips: tuple[float, float], heights: tuple[float, float], rate: float | None) -> None:
    """Log axes, the same for all panels of a group."""
    log_log_axes(ax, trips, heights)
    ax.set_title("no rate set" if rate is None else f"{rate / 1e3:g} Gbit/s" if rate >= 1e3 else f"{rate:g} Mbit/s", loc="left", fontsize=8)
    ax.set_xlabel("round trip (ms)")


def _draw_panel(ax: Axes, here: pd.DataFrame, shown: pd.DataFrame, styles: Mapping[str, LineStyle]) -> None:
    local = shown.loc[shown["local"], "mean"]
    if len(local):
        ax.axhline(local.mean(), color=GREY, lw=1.2, ls=DASHED, zorder=2)
    for mode, own in here[here["rtt_ms"].notna()].groupby("mode", sort=False):
        colour, marker = styles[str(mode)]
        points = own.sort_values("rtt_ms")
        ax.vlines(points["rtt_ms"], points["low"].clip(lower=1e-6), points["high"], color=colour, lw=1.0, zorder=3)
        # Later marks are smaller, so that marks below them stay visible.
        size = 6.5 - 3 * list(styles).index(str(mode)) / len(styles)
        ax.plot(points["rtt_ms"], points["mean"], color=colour, marker=marker, ms=size, mec="white", mew=0.3, ls="", zorder=4)
