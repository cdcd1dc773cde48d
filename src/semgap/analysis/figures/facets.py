"""Panels that figures share: one per setting (model, network and phase)."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from semgap.analysis.aggregate import SETTING, alike, matching
from semgap.analysis.figures.panels import LEGEND_IN, Box, panels_with_names

KV_PHASES_ALONE = "only phases that move KV blocks were run: they have figures of their own"


@dataclass(frozen=True)
class Facet:
    """One panel: a setting, and the modes of all panels in the order of the grid."""

    model: str
    network: str
    phase: str
    kind: str
    modes: tuple[str, ...]
    title: str

    def of(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The rows of this setting."""
        return matching(frame, {"model": self.model, "network": self.network, "phase": self.phase})


def facets(rows: pd.DataFrame) -> list[Facet]:
    """The panels of rows of results.csv, of phases that move no KV blocks. All panels have the same modes, so that their lines align."""
    rows = alike(rows)
    modes = tuple(dict.fromkeys(rows["mode"]))
    several = rows["model"].nunique() > 1 or rows["network"].nunique() > 1
    facets = []
    for keys, _ in rows.groupby([*SETTING, "phase_kind"], sort=False):
        model, network, phase, kind = map(str, keys)
        title = f"{phase}\n{model}, {network}" if several else phase
        facets.append(Facet(model, network, phase, kind, modes, title))
    return facets


def facet_panels(facets: Sequence[Facet]) -> tuple[Figure, list[Box]]:
    """A figure and the boxes of its panels, two in a line. All panels have the same width, for any names and values beside them."""
    columns = min(2, len(facets))
    head = 0.1 + 0.15 * max(1 + facet.title.count("\n") for facet in facets)
    lines = [(head, len(facets[0].modes))] * -(-len(facets) // columns)
    figure, boxes = panels_with_names(facets[0].modes, columns, LEGEND_IN, lines)
    return figure, [box for line in boxes for box in line][: len(facets)]


def wrapped(mode: str) -> str:
    """A long name on two lines, broken at the underscore nearest its middle."""
    cuts = [i for i, letter in enumerate(mode) if letter == "_"]
    if len(mode) <= 14 or not cuts:
        return mode
    middle = min(cuts, key=lambda i: abs(i - len(mode) / 2))
    return f"{mode[: middle + 1]}\n{mode[middle + 1 :]}"
