"""Figure prefix: time to the first token against the part of a request that another session has computed, for each link of the KV host."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from semgap.analysis.figures.panels import WIDTH_IN, Box, axes_in, headline, lines_of_panels, saying
from semgap.analysis.figures.style import BLACK, DASHED, GREY, LIGHT, POINT, LineStyle, handle, legend, mode_handles, mode_styles, styled
from semgap.analysis.results import Results
from semgap.analysis.tables import prefix

ACROSS = 3
TICKS_IN, HEIGHT_IN, HEAD_IN = 0.5, 1.7, 0.5
ENTRIES = 4
CROSSES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "crossing_tokens": ("crossing", {"marker": "x"}),
    "predicted_crossing_tokens": ("crossing, predicted", {"marker": "o", "mfc": "white"}),
}


@styled()
def plot(results: Results) -> Figure:
    """The table `prefix`: a line of panels for each model and phase, a panel for each network over which prefixes are fetched.

    TTFT of each mode against the length of the known prefix, means over trials with 95% intervals; dashed the mode that computes all. A
    cross stands where fetching becomes slower or quicker than computing, a hollow one where the cost model says so.
    """
    table = prefix.table(results)
    table = table[table["ttft_ms"].notna() & ~table["policy"].isna()]
    fetching = table[table["policy"] != "recompute"]
    if fetching.empty:
        return saying("no prefix was fetched: see the table prefix" if len(table) else "no prefix phase was run")
    styles = mode_styles(dict.fromkeys(fetching["mode"]))
    lines = [
        (group, networks[first : first + ACROSS])
        for group, rows in fetching.groupby(["model", "phase"], sort=False)
        for networks in [list(dict.fromkeys(rows["network"]))]
        for first in range(0, len(networks), ACROSS)
    ]
    figure, bottoms = lines_of_panels(-(-(len(styles) + 3) // ENTRIES) * 0.19 + 0.12, [(HEAD_IN, HEIGHT_IN)] * len(lines))
    width = (WIDTH_IN - ACROSS * TICKS_IN - 0.15) / ACROSS
    for ((model, phase), networks), bottom in zip(lines, bottoms, strict=True):
        own = table[(table["model"] == model) & (table["phase"] == phase)]
        boxes = [Box(TICKS_IN + index * (width + TICKS_IN), bottom, width, HEIGHT_IN) for index in range(len(networks))]
        headline(figure, boxes[0], f"TTFT (ms), {phase} ({model})")
        for network, box in zip(networks, boxes, strict=True):
            _draw(axes_in(figure, box), own, network, styles)
    computed = handle("computed (its mean)", color=GREY, lw=1.2, ls=DASHED)
    crosses = [handle(name, color=BLACK, ls="", **look) for name, look in CROSSES.values()]
    legend(figure, [*mode_handles(styles), computed, *crosses], columns=ENTRIES)
    return figure


def _draw(ax: Axes, rows: pd.DataFrame, network: str, styles: Mapping[str, LineStyle]) -> None:
    here = rows[rows["network"] == network]
    first = here[here["policy"] != "recompute"].iloc[0]
    ax.set_title(network if pd.isna(first["kv_network"]) else f"KV host over {first['kv_network']}", loc="left", fontsize=8)
    ax.grid(color=LIGHT, lw=0.6)
    ax.set_axisbelow(True)
    computing = rows[(rows["policy"] == "recompute") & rows["promise_kept"].notna() & (rows["mode"] != "local")]
    own = computing[computing["network"] == network]
    base_ms = (own if len(own) else computing)["ttft_ms"].mean()
    if pd.notna(base_ms):
        ax.axhline(base_ms, color=GREY, lw=1.2, ls=DASHED, zorder=2)
    lengths = sorted(here["prefix_tokens"].unique())
    step = (lengths[-1] - lengths[0] or 1) * 0.012
    modes = [mode for mode in styles if (here["mode"] == mode).any()]
    for number, mode in enumerate(modes):
        _draw_mode(ax, here[here["mode"] == mode], step * (number - (len(modes) - 1) / 2), styles[mode])
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(FixedLocator(_apart(lengths)))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.set_xlabel("known prefix (tokens)")


def _draw_mode(ax: Axes, rows: pd.DataFrame, shift: float, style: LineStyle) -> None:
    colour, marker = style
    x = rows["prefix_tokens"] + shift
    ax.plot(x, rows["ttft_ms"], color=colour, lw=0.9, marker=marker, **POINT)
    ax.vlines(x, rows["ttft_ms_low"], rows["ttft_ms_high"], color=colour, lw=1.0, zorder=3)
    first, means = rows.iloc[0], rows.set_index("prefix_tokens")["ttft_ms"]
    for column, (_, look) in CROSSES.items():
        length = first[column]
        if pd.notna(length):
            height = pd.concat([means, pd.Series({length: float("nan")})]).sort_index().interpolate(method="index")[length]
            ax.plot([length], [height], color=colour, ls="", ms=7, mew=1.4, zorder=5, **look)


def _apart(lengths: Sequence[int]) -> list[int]:
    """The lengths that can stand below an axis without touching each other."""
    kept = [lengths[-1]]
    for length in reversed(lengths):
        if kept[-1] - length >= (lengths[-1] - lengths[0]) * 0.13:
            kept.append(length)
    return kept[::-1]
