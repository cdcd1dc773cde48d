"""Figure ladder: bytes and gap of each rung, and the worth of each fact over all orders."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from semgap.analysis.aggregate import PAYLOAD, SETTING
from semgap.analysis.figures.axes import beside, draw_means, log_axis, mode_axis, with_ends
from semgap.analysis.figures.panels import LEGEND_IN, axes_in, panels_with_names, saying
from semgap.analysis.figures.style import BLACK, DASHED, GREY, POINT, bytes_text, handle, legend, styled, three_digits
from semgap.analysis.results import Results
from semgap.analysis.tables import facts, ladder

TENSOR, WIRE, BOUND = "#56B4E9", "#D55E00", "#009E73"
AVERAGED, PLACED = "#0072B2", "#E69F00"
TITLE_IN = 0.3
WIDEST = 1.5
"""The axis shows an interval up to this factor from its mean: with 2 trials it can span decades."""


@styled()
def plot(results: Results) -> Figure:
    """The tables `ladder` and `facts`: two panels for each model, network and phase, then the facts' worths.

    Left: bytes per token as tensors, TCP payload and on the wire, on a log axis, with the model's cross entropy of the text as a line.
    Right: the gap per token, mean over trials with its 95% interval. Below: the factor by which a fact cuts the payload, averaged over
    the orders in which facts can be added, and at its position in the ladder.
    """
    lines: list[list[pd.DataFrame]] = [[rows, rows] for _, rows in ladder.table(results).groupby(SETTING, sort=False)]
    known = facts.table(results).dropna(subset="factor")
    panels = [rows for _, rows in known.groupby(SETTING, sort=False)]
    lines += [panels[index : index + 2] for index in range(0, len(panels), 2)]
    if not lines:
        return saying("no mode of the ladder was run in a prefill or decode phase")
    labels = [label for line in lines for rows in line for label in _labels(rows)]
    sizes = [(TITLE_IN, len(_labels(line[0]))) for line in lines]
    figure, boxes = panels_with_names(labels, 2, 1.7 * LEGEND_IN, sizes)
    for line, own in zip(lines, boxes, strict=True):
        for index, (rows, box) in enumerate(zip(line, own, strict=False)):
            draw = _draw_facts if "fact" in rows else _draw_gap if index else _draw_bytes
            draw(axes_in(figure, box), rows)
    legend(figure, _handles(bool(panels)), columns=4)
    return figure


def _labels(rows: pd.DataFrame) -> list[str]:
    return rows["fact" if "fact" in rows else "mode"].tolist()


def _draw_bytes(ax: Axes, rows: pd.DataFrame) -> None:
    _rung_axis(ax, rows)
    levels = rows[["tensor_bytes_per_token", PAYLOAD, "wire_bytes_per_token"]]
    bound = rows["entropy_bytes_per_token"].iloc[0]
    low = np.nanmin([levels.min().min(), bound])
    log_axis(ax, np.floor(np.log10(low)), np.ceil(np.log10(levels.max().max()) + 0.02))
    for row, (tensor, payload, wire) in enumerate(levels.to_numpy(dtype=float)):
        ax.plot(tensor, row - 0.2, marker="o", ms=4.5, mfc="white", mec=TENSOR, mew=1.2, zorder=4)
        ax.plot([payload] * 2, [row - 0.42, row + 0.42], color=BLACK, lw=1.3, zorder=3)
        ax.plot(wire, row + 0.2, marker="^", color=WIRE, **POINT)
        beside(ax, row, bytes_text(payload))
    if pd.notna(bound):
        ax.axvline(bound, color=BOUND, lw=1.2, ls=DASHED, zorder=2)
    first = rows.iloc[0]
    ax.set_title(f"{first['phase']} ({first['model']}, {first['network']})", loc="left")
    ax.set_xlabel("bytes per token")


def _draw_gap(ax: Axes, rows: pd.DataFrame) -> None:
    _rung_axis(ax, rows)
    if rows["gap_ms"].isna().all():
        ax.set_xticks([])
        ax.text(0.5, 0.5, "compute was not measured", transform=ax.transAxes, ha="center", va="center", color=GREY)
        return
    draw_means(ax, with_ends(rows, "gap_ms"), WIDEST, "gap per token (ms)")


def _draw_facts(ax: Axes, rows: pd.DataFrame) -> None:
    mode_axis(ax, _labels(rows))
    factors = rows[["factor", "ladder_factor"]]
    log_axis(ax, -0.15, max(1.0, np.ceil(np.log10(factors.max().max()) + 0.02)))
    for row, (factor, in_ladder) in enumerate(factors.to_numpy(dtype=float)):
        ax.plot([1, factor], [row - 0.14] * 2, color=AVERAGED, lw=2.4, solid_capstyle="butt", zorder=3)
        ax.plot(factor, row - 0.14, marker="o", color=AVERAGED, **POINT)
        ax.plot(in_ladder, row + 0.2, marker="D", ms=4, mfc="white", mec=PLACED, mew=1.2, zorder=4)
        beside(ax, row, f"{three_digits(factor)}x")
    ax.set_title(f"facts, {rows['phase'].iloc[0]} ({rows['network'].iloc[0]})", loc="left")
    ax.set_xlabel("payload cut by a factor of")


def _rung_axis(ax: Axes, rows: pd.DataFrame) -> None:
    """The modes, and a line between the rungs and the references."""
    mode_axis(ax, _labels(rows))
    rungs = int((rows["role"] == "rung").sum())
    if 0 < rungs < len(rows):
        ax.axhline(rungs - 0.5, color=GREY, lw=0.8, zorder=2)


def _handles(has_facts: bool) -> list[Line2D]:
    handles = [
        handle("tensors", marker="o", ms=5, mfc="white", mec=TENSOR, mew=1.2, ls=""),
        handle("TCP payload; mean gap", marker="|", ms=9, mew=1.6, color=BLACK, ls=""),
        handle("wire", marker="^", ms=5, color=WIRE, ls=""),
        handle("cross entropy of the text", color=BOUND, lw=1.2, ls=DASHED),
        handle("95% interval of the gap", color=BLACK, lw=1.2),
    ]
    if has_facts:
        handles.append(handle("over all orders", marker="o", ms=5, color=AVERAGED, lw=2.4))
        handles.append(handle("in the ladder", marker="D", ms=4, mfc="white", mec=PLACED, mew=1.2, ls=""))
    return handles
