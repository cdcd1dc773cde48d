"""Figures and the boxes of their panels, in inches. A figure is as wide as a paper's page."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath

from semgap.analysis.figures.style import FONT_SIZE, GREY

WIDTH_IN = 7.0
ROW_IN = 0.27
VALUES_IN, BETWEEN_IN, BREAK_IN = 0.64, 0.1, 0.1
LEGEND_IN, FOOT_IN = 0.3, 0.45


@dataclass(frozen=True)
class Box:
    """The position of axes in a figure, in inches. `named`: with tick labels left of it."""

    left: float
    bottom: float
    width: float
    height: float
    named: bool = True

    def parts(self, shares: Sequence[float]) -> list["Box"]:
        """Boxes side by side, `BREAK_IN` apart, with widths in proportion to `shares`."""
        room = self.width - BREAK_IN * (len(shares) - 1)
        widths = [room * share / sum(shares) for share in shares]
        lefts = [self.left + sum(widths[:i]) + BREAK_IN * i for i in range(len(widths))]
        return [Box(lefts[i], self.bottom, width, self.height, self.named and i == 0) for i, width in enumerate(widths)]

    def repeated(self, count: int, gap_in: float) -> list["Box"]:
        """`count` such boxes side by side. The first alone has tick labels."""
        return [Box(self.left + i * (self.width + gap_in), self.bottom, self.width, self.height, i == 0) for i in range(count)]


def blank_figure(height_in: float, **options: Any) -> Figure:
    """An empty figure of `WIDTH_IN` inches."""
    figure = Figure(figsize=(WIDTH_IN, height_in), **options)
    FigureCanvasAgg(figure)
    return figure


def saying(text: str) -> Figure:
    """A figure with only the reason why it is empty."""
    figure = blank_figure(1)
    figure.text(0.5, 0.5, text, ha="center", va="center", color=GREY)
    return figure


def names_width_in(names: Iterable[str]) -> float:
    """The width in inches of the widest name, with a margin."""
    return 0.12 + max(map(text_width_in, names), default=0.0)


def text_width_in(text: str) -> float:
    """The width of a text in inches."""
    return float(TextPath((0, 0), text, size=FONT_SIZE).get_extents().width) / 72


def lines_of_panels(top_in: float, lines: Sequence[tuple[float, float]]) -> tuple[Figure, list[float]]:
    """A figure for lines of panels, and the bottom of each line. A line is the room above its panels and their height."""
    sizes = [head + height + FOOT_IN for head, height in lines]
    return blank_figure(top_in + sum(sizes)), [sum(sizes[i + 1 :]) + FOOT_IN for i in range(len(sizes))]


def panels_with_names(
    names: Iterable[str], columns: int, top_in: float, lines: Sequence[tuple[float, int]]
) -> tuple[Figure, list[list[Box]]]:
    """As `lines_of_panels`, with the boxes of each line: named rows, and a value beside each. All are equally wide, for any names.

    A line is the room above its panels and their number of rows.
    """
    names_in = names_width_in(names)
    width = (WIDTH_IN - names_in - columns * VALUES_IN - (columns - 1) * BETWEEN_IN) / columns
    figure, bottoms = lines_of_panels(top_in, [(head, rows * ROW_IN) for head, rows in lines])
    first = [Box(names_in, bottom, width, rows * ROW_IN) for bottom, (_, rows) in zip(bottoms, lines, strict=True)]
    return figure, [box.repeated(columns, VALUES_IN + BETWEEN_IN) for box in first]


def axes_in(figure: Figure, box: Box) -> Axes:
    """Axes in a box of the figure."""
    width_in, height_in = figure.get_size_inches()
    ax = figure.add_axes((box.left / width_in, box.bottom / height_in, box.width / width_in, box.height / height_in))
    ax.tick_params(axis="y", labelleft=box.named)
    return ax


def headline(figure: Figure, box: Box, text: str) -> None:
    """A title above the titles of a line of panels that begins with `box`."""
    width_in, height_in = figure.get_size_inches()
    figure.text(0.12 / width_in, (box.bottom + box.height + 0.33) / height_in, text, fontsize=9)
