"""The figures, each as svg, png and pdf."""

from pathlib import Path
from typing import Protocol

from matplotlib.figure import Figure

from semgap.analysis.figures import (
    bytes_per_token,
    codecs,
    gap,
    handover,
    ladder,
    latency,
    load,
    network,
    prefix,
    price,
    recovery,
    telemetry,
)
from semgap.analysis.figures.style import save
from semgap.analysis.results import Results


class FigureModule(Protocol):
    """A module of this package: `plot` draws its figure."""

    __name__: str

    def plot(self, results: Results) -> Figure: ...


FIGURES: tuple[FigureModule, ...] = (
    *(gap, bytes_per_token, latency, telemetry, ladder, network),
    *(price, recovery, prefix, handover, load, codecs),
)


def plot_figures(results: Results, directory: Path) -> None:
    """Plots every figure and saves it in `directory` under the name of its module."""
    for each in FIGURES:
        save(each.plot(results), directory / each.__name__.rpartition(".")[2])
