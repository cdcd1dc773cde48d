"""Figure ladder: bytes and latency of each rung, and the worth of each fact over all orders."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from semgap.analysis.aggregate import PAYLOAD, SETTING
from semgap.analysis.figures.style import (
    BETWEEN_IN,
    BLACK,
    FOOT_IN,
    GREY,
    LEGEND_IN,
    LIGHT,
    ROW_IN,
    VALUES_IN,
    WIDTH_IN,
    Box,
    axes_in,
    beside,
    blank_figure,
    bytes_text,
    interval_line,
    legend,
    log_ticks,
    mode_axis,
    saying,
    styled,
    text_width_in,
)
from semgap.analysis.results import Results
from semgap.analysis.tables import facts, ladder

TENSOR, WIRE, BOUND = "#56B4E9", "#D55E00", "#009E73"
AVERAGED, PLACED = "#0072B2", "#E69F00"
TITLE_IN = 0.3
WIDEST = 1.5
"""The axis shows an interval up to this factor from its mean: with 2 trials it can span decades."""


def plot(results: Results) -> Figure:
    """The tables `ladder` and `facts`: two panels for each model, network and decode phase, then the facts' worths.

    Left: bytes per token as tensors, TCP payload and on the wire, on a log axis, with the model's entropy of the text as a line. Right:
    ITL, mean over trials with its 95% interval. Below: the factor by which a fact cuts the payload, averaged over the orders in which
    facts can be added, and at its position in the ladder.
    """
    lines: list[list[pd.DataFrame]] = [[rows, rows] for _, rows in ladder.table(results).groupby(SETTING, sort=False)]
    known = facts.table(results).dropna(subset="factor")
    panels = [rows for _, rows in known.groupby([*SETTING, "basis"], sort=False)]
    lines += [panels[index : index + 2] for index in range(0, len(panels), 2)]
    with styled():
        if not lines:
            return saying("no mode of the ladder was run in a decode phase")
        figure, boxes = _panels(lines)
        for line, own in zip(lines, boxes, strict=True):
            for index, (rows, box) in enumerate(zip(line, own, strict=True)):
                draw = _draw_facts if "fact" in rows else _draw_latency if index else _draw_bytes
                draw(axes_in(figure, box), rows)
        legend(figure, list(_handles(bool(panels))), columns=4)
    return figure


def _panels(lines: Sequence[Sequence[pd.DataFrame]]) -> tuple[Figure, list[list[Box]]]:
    """A figure and the boxes of its panels: two of equal width in a line."""
    labels = [label for line in lines for rows in line for label in _labels(rows)]
    names_in = 0.12 + max(text_width_in(label) for label in labels)
    width = (WIDTH_IN - names_in - 2 * VALUES_IN - BETWEEN_IN) / 2
    heights = [len(_labels(line[0])) * ROW_IN for line in lines]
    figure = blank_figure(1.7 * LEGEND_IN + sum(TITLE_IN + height + FOOT_IN for height in heights))
    top = figure.get_size_inches()[1] - 1.7 * LEGEND_IN
    boxes = []
    for line, height in zip(lines, heights, strict=True):
        bottom = top - TITLE_IN - height
        lefts = [names_in + index * (width + VALUES_IN + BETWEEN_IN) for index in range(len(line))]
        boxes.append([Box(left, bottom, width, height, named=index == 0) for index, left in enumerate(lefts)])
        top = bottom - FOOT_IN
    return figure, boxes


def _labels(rows: pd.DataFrame) -> list[str]:
    return rows["fact" if "fact" in rows else "mode"].tolist()


def _draw_bytes(ax: Axes, rows: pd.DataFrame) -> None:
    _rung_axis(ax, rows)
    levels = rows[["tensor_bytes_per_token", PAYLOAD, "wire_bytes_per_token"]]
    bound = rows["entropy_bytes_per_token"].iloc[0]
    low = min(levels.min().min(), bound) if pd.notna(bound) else levels.min().min()
    first, last = np.floor(np.log10(low)), np.ceil(np.log10(levels.max().max()) + 0.02)
    ax.set_xscale("log")
    ax.set_xlim(10**first, 10**last)
    for row, (tensor, payload, wire) in enumerate(levels.to_numpy(dtype=float)):
        ax.plot(tensor, row - 0.2, marker="o", ms=4.5, mfc="white", mec=TENSOR, mew=1.2, zorder=4)
        ax.plot([payload] * 2, [row - 0.42, row + 0.42], color=BLACK, lw=1.3, zorder=3)
        ax.plot(wire, row + 0.2, marker="^", ms=4.5, color=WIRE, mec="white", mew=0.3, zorder=4)
        beside(ax, row, bytes_text(payload))
    if pd.notna(bound):
        ax.axvline(bound, color=BOUND, lw=1.2, ls=(0, (4, 2)), zorder=2)
    log_ticks(ax, [10.0**decade for decade in np.arange(first, last + 1)])
    ax.set_title(_title(rows), loc="left")
    ax.set_xlabel("bytes per token")


def _draw_latency(ax: Axes, rows: pd.DataFrame) -> None:
    _rung_axis(ax, rows)
    means = rows["itl_ms"].to_numpy(dtype=float)
    lows, highs = (rows[f"itl_ms_{end}"].to_numpy(dtype=float) for end in ("low", "high"))
    lows, highs = np.where(np.isnan(lows), means, lows), np.where(np.isnan(highs), means, highs)
    left, right = np.maximum(lows, means / WIDEST).min(), np.minimum(highs, means * WIDEST).max()
    margin = max((right - left) * 0.08, right * 0.02)
    ax.set_xlim(left - margin, right + margin)
    ax.grid(axis="x", color=LIGHT, lw=0.6, zorder=1)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    for row, (mean, low, high) in enumerate(zip(means, lows, highs, strict=True)):
        interval_line(ax, row, mean, low, high)
        beside(ax, row, f"{mean:.{0 if mean >= 99.95 else 1}f} ms")
    ax.set_xlabel("ITL (ms)")


def _draw_facts(ax: Axes, rows: pd.DataFrame) -> None:
    mode_axis(ax, _labels(rows))
    factors = rows[["factor", "ladder_factor"]]
    last = max(1.0, np.ceil(np.log10(factors.max().max()) + 0.02))
    ax.set_xscale("log")
    ax.set_xlim(10**-0.15, 10**last)
    for row, (factor, in_ladder) in enumerate(factors.to_numpy(dtype=float)):
        ax.plot([1, factor], [row - 0.14] * 2, color=AVERAGED, lw=2.4, solid_capstyle="butt", zorder=3)
        ax.plot(factor, row - 0.14, marker="o", ms=4.5, color=AVERAGED, mec="white", mew=0.3, zorder=4)
        ax.plot(in_ladder, row + 0.2, marker="D", ms=4, mfc="white", mec=PLACED, mew=1.2, zorder=4)
        beside(ax, row, _factor_text(factor))
    log_ticks(ax, [10.0**decade for decade in np.arange(0, last + 1)])
    basis = "measured" if rows["basis"].iloc[0] == facts.MEASURED else "derived"
    ax.set_title(f"facts, {rows['phase'].iloc[0]} ({basis})", loc="left")
    ax.set_xlabel("payload cut by a factor of")


def _factor_text(factor: float) -> str:
    return f"{factor:,.{0 if factor >= 99.95 else 1 if factor >= 9.995 else 2}f}x"


def _rung_axis(ax: Axes, rows: pd.DataFrame) -> None:
    """The modes, and a line between the rungs and the references."""
    mode_axis(ax, _labels(rows))
    rungs = int((rows["role"] == "rung").sum())
    if 0 < rungs < len(rows):
        ax.axhline(rungs - 0.5, color=GREY, lw=0.8, zorder=2)


def _title(rows: pd.DataFrame) -> str:
    first = rows.iloc[0]
    return f"{first['phase']} ({first['model']}, {first['network']})"


def _handles(has_facts: bool) -> Iterator[Line2D]:
    yield Line2D([], [], marker="o", ms=5, mfc="white", mec=TENSOR, mew=1.2, ls="", label="tensors")
    yield Line2D([], [], marker="|", ms=9, mew=1.6, color=BLACK, ls="", label="TCP payload; mean ITL")
    yield Line2D([], [], marker="^", ms=5, color=WIRE, ls="", label="wire")
    yield Line2D([], [], color=BOUND, lw=1.2, ls=(0, (4, 2)), label="entropy of the text")
    yield Line2D([], [], color=BLACK, lw=1.2, label="95% interval of ITL")
    if has_facts:
        yield Line2D([], [], marker="o", ms=5, color=AVERAGED, lw=2.4, label="over all orders")
        yield Line2D([], [], marker="D", ms=4, mfc="white", mec=PLACED, mew=1.2, ls="", label="in the ladder")
