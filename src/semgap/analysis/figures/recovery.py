"""Figure recovery: bytes that come back and time that a step waits, against the missing part of the cache."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from semgap.analysis.aggregate import SETTING
from semgap.analysis.figures.axes import draw_means, mode_axis, with_ends
from semgap.analysis.figures.panels import (
    BETWEEN_IN,
    ROW_IN,
    VALUES_IN,
    WIDTH_IN,
    Box,
    axes_in,
    headline,
    lines_of_panels,
    names_width_in,
    saying,
)
from semgap.analysis.figures.style import (
    BLACK,
    DASHED,
    GREY,
    LIGHT,
    POINT,
    LineStyle,
    decade_text,
    handle,
    legend,
    mode_handles,
    mode_styles,
    styled,
)
from semgap.analysis.results import Results
from semgap.analysis.tables import recovery

TICKS_IN, HEIGHT_IN, HEAD_IN, TITLE_IN, TWO_LINES_IN = 0.5, 1.5, 0.25, 0.25, 0.4
ENTRIES, LETTERS = 3, 24
BY_ITL: Mapping[str, Any] = {"lw": 0.9, "ls": (0, (1, 1.5)), "ms": 4, "mfc": "white", "mew": 0.9}
WIDEST = 3.0
"""The axis shows an interval up to this factor from the largest mean: with 2 trials it can span decades."""
LOG_FROM = 10.0
"""From this ratio of recoveries on, the axis is logarithmic except around 0: on a linear one the small ones would lie on the axis."""


@styled()
def plot(results: Results) -> Figure:
    """The table `recovery`: three panels for each model, network and phase that evicts, one for each phase that shares memory.

    Against the missing part of the cache: bytes that come back per step, with the line in proportion to the miss; recovery latency, means
    over trials with 95% intervals; and the part of the restore that compute hides, by the stall and by the ITL. In phases whose requests
    share KV memory: ITL of each mode, with its 95% interval.
    """
    table = recovery.table(results)
    groups = [rows for _, rows in table.groupby(SETTING, sort=False)]
    evicting = [rows for rows in groups if rows["evict_fraction"].notna().any()]
    sharing = [rows for rows in groups if rows["evict_fraction"].isna().all()]
    if not groups:
        return saying("no recovery phase was run")
    styles = mode_styles(mode for rows in evicting for mode in rows.loc[rows["missing_share"].notna(), "mode"])
    figure, curves, bars = _panels(evicting, sharing, len(styles))
    for rows, boxes in zip(evicting, curves, strict=True):
        _draw_curves(figure, boxes, rows, styles)
    for rows, box in zip(sharing, bars, strict=True):
        _draw_shared(axes_in(figure, box), rows)
    handles = mode_handles(styles)
    if table["itl_hidden_share"].notna().any():
        handles.append(handle("hidden, by the ITL", color=GREY, marker="o", **BY_ITL))
    if styles:
        handles.append(handle("in proportion to the miss", color=GREY, lw=1.2, ls=DASHED))
    if sharing:
        handles.append(handle("mean ITL, 95% interval", color=BLACK, marker="|", ms=8, mew=1.6, lw=1.2))
    legend(figure, handles, columns=ENTRIES)
    return figure


def _panels(evicting: Sequence[pd.DataFrame], sharing: Sequence[pd.DataFrame], modes: int) -> tuple[Figure, list[list[Box]], list[Box]]:
    """A figure, the boxes of three panels for each phase that evicts, and a box for each phase that shares, two in a line."""
    pairs = [sharing[index : index + 2] for index in range(0, len(sharing), 2)]
    heights = [max(len(rows) for rows in pair) * ROW_IN for pair in pairs]
    lines = [*[(HEAD_IN + TITLE_IN, HEIGHT_IN)] * len(evicting), *((TWO_LINES_IN, height) for height in heights)]
    figure, bottoms = lines_of_panels(-(-(modes + 3) // ENTRIES) * 0.19 + 0.12, lines)
    width = (WIDTH_IN - 3 * TICKS_IN - 0.15) / 3
    lefts = [TICKS_IN + index * (width + TICKS_IN) for index in range(3)]
    curves = [[Box(left, bottom, width, HEIGHT_IN) for left in lefts] for bottom in bottoms[: len(evicting)]]
    names_in = names_width_in(mode for rows in sharing for mode in rows["mode"])
    width = (WIDTH_IN - 2 * (names_in + VALUES_IN) - BETWEEN_IN) / 2
    bars = []
    for pair, height, bottom in zip(pairs, heights, bottoms[len(evicting) :], strict=True):
        for index, rows in enumerate(pair):
            own = len(rows) * ROW_IN
            left = names_in + index * (names_in + width + VALUES_IN + BETWEEN_IN)
            bars.append(Box(left, bottom + height - own, width, own))
    return figure, curves, bars


def _draw_curves(figure: Figure, boxes: Sequence[Box], rows: pd.DataFrame, styles: Mapping[str, LineStyle]) -> None:
    known = rows[rows["missing_share"].notna()]
    first = rows.iloc[0]
    headline(figure, boxes[0], f"{first['phase']} ({_place(first)})")
    for box, draw in zip(boxes, (_draw_bytes, _draw_recovery, _draw_hidden), strict=True):
        ax = axes_in(figure, box)
        ax.set_xlim(-5, 105)
        ax.xaxis.set_major_locator(FixedLocator([0, 25, 50, 75, 100]))
        ax.grid(color=LIGHT, lw=0.6)
        ax.set_axisbelow(True)
        ax.set_xlabel("KV cache missing (%)")
        draw(ax, known, styles)


def _draw_bytes(ax: Axes, rows: pd.DataFrame, styles: Mapping[str, LineStyle]) -> None:
    """Fetched over the network from a KV host, or copied from the worker's own memory."""
    ax.set_title("brought back (MB/step)", loc="left", fontsize=8)
    line = rows.drop_duplicates("evict_fraction")
    ax.plot(100 * line["missing_share"], line["missing_bytes_per_step"] / 1e6, color=GREY, lw=1.2, ls=DASHED, zorder=2)
    moved = rows["fetched_network_bytes_per_step"].where(rows["shadow"] != "worker", rows["copied_bytes_per_step"]) / 1e6
    for mode, own in rows.assign(moved=moved).groupby("mode", sort=False):
        _curve(ax, 100 * own["missing_share"], own["moved"], styles[str(mode)])
    ax.set_ylim(bottom=-0.04 * ax.get_ylim()[1])
    ax.yaxis.set_major_locator(MaxNLocator(4))


def _draw_recovery(ax: Axes, rows: pd.DataFrame, styles: Mapping[str, LineStyle]) -> None:
    ax.set_title("recovery latency (ms)", loc="left", fontsize=8)
    timed = rows[rows["recovery_ms"].notna()]
    if timed.empty:
        _nothing(ax, rows["recovery_ms_reason"])
        return
    _latency_axis(ax, timed)
    for own, shifted, style in _beside_each_other(timed, styles):
        _curve(ax, shifted, own["recovery_ms"], style)
        _draw_intervals(ax, shifted, own["recovery_ms_low"], own["recovery_ms_high"], style[0])


def _latency_axis(ax: Axes, timed: pd.DataFrame) -> None:
    """Linear; or, if recoveries lie far apart, logarithmic except around 0, which noise may cross."""
    means = timed["recovery_ms"].to_numpy(dtype=float)
    least, most = np.abs(means[means != 0]).min(initial=np.inf), max(np.abs(means).max(), 1e-3)
    lowest = min(0.0, means.min(), float(np.nan_to_num(timed["recovery_ms_low"].to_numpy(dtype=float)).min()))
    highest = max(means.max(), float(np.nan_to_num(timed["recovery_ms_high"].to_numpy(dtype=float)).max()))
    low, high = max(lowest, -WIDEST * most), min(highest, WIDEST * most)
    if not most > LOG_FROM * least:
        margin = 0.06 * (high - low)
        ax.set_ylim(low - margin, high + margin)
        ax.yaxis.set_major_locator(MaxNLocator(4))
        return
    first = 10.0 ** np.floor(np.log10(max(least, most / 1e4)))
    low = max(low, min(-first, means.min() * WIDEST))
    ax.set_title(f"recovery latency (ms), log from {decade_text(first)} on", loc="left", fontsize=8)
    ax.set_yscale("symlog", linthresh=first, linscale=0.6)
    ax.set_ylim(low * 1.2 if low < 0 else -0.2 * first, high * 1.5)
    decades = 10.0 ** np.arange(round(np.log10(first)), np.floor(np.log10(high * 1.5)) + 1)
    ax.yaxis.set_major_locator(FixedLocator([0, *decades[:: max(1, -(-len(decades) // 4))]]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: decade_text(y)))


def _draw_hidden(ax: Axes, rows: pd.DataFrame, styles: Mapping[str, LineStyle]) -> None:
    ax.set_title("hidden under compute (%)", loc="left", fontsize=8)
    hidden = rows[rows["hidden_share"].notna()]
    if hidden.empty:
        _nothing(ax, rows["hidden_share_reason"])
        return
    low = min(-4.0, 125 * hidden[["hidden_share", "itl_hidden_share"]].min().min())
    ax.set_ylim(low, 104)
    for own, shifted, style in _beside_each_other(hidden, styles):
        _curve(ax, shifted, 100 * own["hidden_share"], style)
        colour, marker = style
        ax.plot(shifted, 100 * own["itl_hidden_share"], color=colour, marker=marker, zorder=3, **BY_ITL)
        _draw_intervals(ax, shifted, 100 * own["hidden_share_low"], 100 * own["hidden_share_high"], colour)
    step = 25 if low >= -25 else 50 if low >= -100 else 100 * np.ceil(-low / 400)
    ax.yaxis.set_major_locator(FixedLocator(np.arange(100, low, -step).tolist()))


def _draw_intervals(ax: Axes, x: pd.Series, low: pd.Series, high: pd.Series, colour: str) -> None:
    """Vertical intervals. An end outside the axis becomes an arrow."""
    bottom, top = ax.get_ylim()
    ax.vlines(x, low.clip(bottom, top), high.clip(bottom, top), color=colour, lw=1.0, zorder=3)
    for end, marker, outside in ((bottom, "v", low < bottom), (top, "^", high > top)):
        ax.scatter(x[outside], [end] * int(outside.sum()), marker=marker, s=16, color=colour, zorder=4, clip_on=False)


def _beside_each_other(rows: pd.DataFrame, styles: Mapping[str, LineStyle]) -> Iterator[tuple[pd.DataFrame, pd.Series, LineStyle]]:
    """Each mode's rows, with x positions in percent of the cache, slightly shifted, so that intervals stay visible."""
    modes = rows["mode"].nunique()
    for number, (mode, own) in enumerate(rows.groupby("mode", sort=False)):
        yield own, 100 * own["missing_share"] + min(1.2, 7 / modes) * (number - (modes - 1) / 2), styles[str(mode)]


def _curve(ax: Axes, x: pd.Series, y: pd.Series, style: LineStyle) -> None:
    colour, marker = style
    ax.plot(x, y, color=colour, lw=0.9, marker=marker, **POINT)


def _nothing(ax: Axes, reasons: pd.Series) -> None:
    ax.set_yticks([])
    lines = [line for reason in dict.fromkeys(reasons.dropna()) for line in textwrap.wrap(str(reason), LETTERS)]
    text = "\n".join(lines) if 0 < len(lines) <= 8 else "not measured"
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=GREY)


def _draw_shared(ax: Axes, rows: pd.DataFrame) -> None:
    mode_axis(ax, rows["mode"].tolist())
    draw_means(ax, with_ends(rows, "itl_ms").clip(lower=0.0), 1.5, "ITL (ms)", bins=4)
    first = rows.iloc[0]
    ax.set_title(f"{first['phase']}\n{_place(first)}", loc="left")


def _place(row: pd.Series) -> str:
    """Model and network of a row, and the network of its KV host, if that is another."""
    kv = "" if pd.isna(row["kv_network"]) else f", KV host over {row['kv_network']}"
    return f"{row['model']}, {row['network']}{kv}"
