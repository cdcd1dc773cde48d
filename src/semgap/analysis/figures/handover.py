"""Figure handover: the time that a request loses when another worker goes on with it, by mode."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from semgap.analysis.aggregate import SETTING
from semgap.analysis.figures.axes import draw_means, mode_axis, with_ends
from semgap.analysis.figures.panels import BETWEEN_IN, ROW_IN, VALUES_IN, WIDTH_IN, Box, axes_in, lines_of_panels, names_width_in, saying
from semgap.analysis.figures.style import BLACK, handle, legend, styled
from semgap.analysis.results import Results
from semgap.analysis.tables import handover

HEAD_IN = 0.4
WIDEST = 1.5
"""The axis shows an interval up to this factor from the largest mean."""


@styled()
def plot(results: Results) -> Figure:
    """The table `handover`, a panel for each model, network and phase: the time that each mode adds between the first two tokens."""
    table = handover.table(results)
    table = table[table["adds_ms"].notna()]
    groups = [rows for _, rows in table.groupby(SETTING, sort=False)]
    if not groups:
        return saying("no request moved: no handover phase was run, or in local alone")
    figure, boxes = _panels(groups)
    for rows, box in zip(groups, boxes, strict=True):
        ax = axes_in(figure, box)
        mode_axis(ax, rows["mode"].tolist())
        draw_means(ax, with_ends(rows, "adds_ms"), WIDEST, "added between two tokens (ms)", bins=4)
        first = rows.iloc[0]
        ax.set_title(f"{first['phase']}\n{first['model']}, KV host over {first['kv_network'] or 'loopback'}", loc="left")
    legend(figure, [handle("mean, 95% interval", color=BLACK, marker="|", ms=8, mew=1.6, lw=1.2)], columns=1)
    return figure


def _panels(groups: Sequence[pd.DataFrame]) -> tuple[Figure, list[Box]]:
    """A figure, and a box for each group, two in a line."""
    pairs = [groups[index : index + 2] for index in range(0, len(groups), 2)]
    heights = [max(len(rows) for rows in pair) * ROW_IN for pair in pairs]
    figure, bottoms = lines_of_panels(0.31, [(HEAD_IN, height) for height in heights])
    names_in = names_width_in(mode for rows in groups for mode in rows["mode"])
    width = (WIDTH_IN - 2 * (names_in + VALUES_IN) - BETWEEN_IN) / 2
    boxes = []
    for pair, height, bottom in zip(pairs, heights, bottoms, strict=True):
        for index, rows in enumerate(pair):
            own = len(rows) * ROW_IN
            left = names_in + index * (names_in + width + VALUES_IN + BETWEEN_IN)
            boxes.append(Box(left, bottom + height - own, width, own))
    return figure, boxes
