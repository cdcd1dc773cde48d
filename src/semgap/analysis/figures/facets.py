"""Panels that figures share: one per setting (model, network and phase)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from semgap.analysis.figures.style import BETWEEN_IN, FOOT_IN, LEGEND_IN, ROW_IN, VALUES_IN, WIDTH_IN, Box, blank_figure, text_width_in

RECOVERY_ALONE = "recovery phases alone were run: see the figure recovery"


@dataclass(frozen=True)
class Facet:
    """One panel: a setting, and the modes of all panels in the order of the grid."""

    model: str
    network: str
    phase: str
    kind: str
    modes: tuple[str, ...]
    title: str

    def selects(self, frame: pd.DataFrame) -> Any:
        return (frame["model"] == self.model) & (frame["network"] == self.network) & (frame["phase"] == self.phase)


def facets(rows: pd.DataFrame) -> list[Facet]:
    """The panels of rows of results.csv, without recovery phases. All panels have the same modes, so that their lines align."""
    rows = rows[rows["phase_kind"] != "recovery"]
    modes = tuple(dict.fromkeys(rows["mode"]))
    several = rows["model"].nunique() > 1 or rows["network"].nunique() > 1
    facets = []
    for keys, _ in rows.groupby(["model", "network", "phase", "phase_kind"], sort=False):
        model, network, phase, kind = map(str, keys)
        title = f"{phase}\n{model}, {network}" if several else phase
        facets.append(Facet(model, network, phase, kind, modes, title))
    return facets


def facet_panels(facets: Sequence[Facet]) -> tuple[Figure, list[Box]]:
    """A figure and the boxes of its panels, two in a line. All panels have the same width, for any names and values beside them."""
    columns = min(2, len(facets))
    lines = -(-len(facets) // columns)
    names_in = 0.12 + max(text_width_in(mode) for mode in facets[0].modes)
    width = (WIDTH_IN - names_in - columns * VALUES_IN - (columns - 1) * BETWEEN_IN) / columns
    height = len(facets[0].modes) * ROW_IN
    head = 0.1 + 0.15 * max(1 + facet.title.count("\n") for facet in facets)
    line_in = head + height + FOOT_IN
    figure = blank_figure(LEGEND_IN + lines * line_in)
    boxes = []
    for index in range(len(facets)):
        line, column = divmod(index, columns)
        left = names_in + column * (width + VALUES_IN + BETWEEN_IN)
        boxes.append(Box(left, (lines - 1 - line) * line_in + FOOT_IN, width, height, named=column == 0))
    return figure, boxes


def wrapped(mode: str) -> str:
    """A long name on two lines, broken at the underscore nearest its middle."""
    cuts = [i for i, letter in enumerate(mode) if letter == "_"]
    if len(mode) <= 14 or not cuts:
        return mode
    middle = min(cuts, key=lambda i: abs(i - len(mode) / 2))
    return f"{mode[: middle + 1]}\n{mode[middle + 1 :]}"
