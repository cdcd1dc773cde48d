"""Panels that figures share: one a model, network and phase."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from semgap.analysis.figures.style import BETWEEN_IN, FOOT_IN, LEGEND_IN, ROW_IN, VALUES_IN, WIDTH_IN, Box, text_width_in
from semgap.analysis.load import Trials, keys_of

RECOVERY_ALONE = "recovery phases alone were run: see the figure recovery"


@dataclass(frozen=True)
class Facet:
    """One panel: a model, network and phase, and the modes that were run there, in order of the grid."""

    model: str
    network: str
    phase: str
    kind: str
    modes: tuple[str, ...]
    title: str

    def selects(self, frame: pd.DataFrame) -> Any:
        return (frame["model"] == self.model) & (frame["network"] == self.network) & (frame["phase"] == self.phase)


def facets(trials: Trials) -> list[Facet]:
    keys = [keys_of(m) | {"phase_kind": m["cell"]["phase_spec"]["kind"]} for m in trials.manifests]
    return row_facets(pd.DataFrame(keys))


def row_facets(rows: pd.DataFrame) -> list[Facet]:
    """Panels of a frame with the key columns and phase_kind, but for recovery. All have the same modes, so that rows line up."""
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
    """A figure and, two beside each other, the places of its panels.

    Placed by hand: every panel is equally wide, whatever names and values stand beside it, so they compare by eye.
    """
    columns = min(2, len(facets))
    lines = -(-len(facets) // columns)
    names_in = 0.12 + max(text_width_in(mode) for mode in facets[0].modes)
    width = (WIDTH_IN - names_in - columns * VALUES_IN - (columns - 1) * BETWEEN_IN) / columns
    height = len(facets[0].modes) * ROW_IN
    head = 0.1 + 0.15 * max(1 + facet.title.count("\n") for facet in facets)
    line_in = head + height + FOOT_IN
    figure = Figure(figsize=(WIDTH_IN, LEGEND_IN + lines * line_in))
    FigureCanvasAgg(figure)
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
