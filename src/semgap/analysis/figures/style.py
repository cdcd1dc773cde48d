"""Sizes, colours, boxes in inches, and axes of all figures.

A figure is as wide as a paper's page (7 inches), and no text is below 8 points. Colour-blind readers can tell the colours apart (Okabe
and Ito 2008).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import CARETLEFT, CARETRIGHT
from matplotlib.textpath import TextPath
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

FONT_SIZE = 8.0
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": FONT_SIZE,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "semgap",
    "axes.unicode_minus": False,
}
WIDTH_IN = 7.0
ROW_IN = 0.27
DPI = 200
VALUES_IN, BETWEEN_IN, BREAK_IN = 0.64, 0.1, 0.1
LEGEND_IN, FOOT_IN = 0.3, 0.45
BLACK, GREY, LIGHT = "#000000", "#666666", "#e4e4e4"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LineStyle = tuple[str, str]
"""A colour and a marker."""


def save(figure: Figure, stem: Path) -> list[Path]:
    """Writes {stem}.svg and {stem}.png. Equal figures give equal bytes. Returns both paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    svg, png = stem.with_name(f"{stem.name}.svg"), stem.with_name(f"{stem.name}.png")
    with matplotlib.rc_context(STYLE):
        figure.savefig(svg, metadata={"Date": None, "Creator": "semgap"})
        figure.savefig(png, dpi=DPI, metadata={"Software": "semgap"})
    return [svg, png]


@dataclass(frozen=True)
class Box:
    """The position of axes in a figure, in inches. `named`: with tick labels left of it."""

    left: float
    bottom: float
    width: float
    height: float
    named: bool

    def parts(self, shares: Sequence[float]) -> list["Box"]:
        """Boxes side by side, `BREAK_IN` apart, with widths in proportion to `shares`."""
        room = self.width - BREAK_IN * (len(shares) - 1)
        widths = [room * share / sum(shares) for share in shares]
        lefts = [self.left + sum(widths[:i]) + BREAK_IN * i for i in range(len(widths))]
        return [
            Box(left, self.bottom, width, self.height, self.named and i == 0)
            for i, (left, width) in enumerate(zip(lefts, widths, strict=True))
        ]


@contextmanager
def styled() -> Iterator[None]:
    """Figures within this context use `STYLE`."""
    with matplotlib.rc_context(STYLE):
        yield


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


def text_width_in(text: str) -> float:
    """The width of a text in inches."""
    return float(TextPath((0, 0), text, size=FONT_SIZE).get_extents().width) / 72


def axes_in(figure: Figure, box: Box) -> Axes:
    """Axes in a box of the figure."""
    width_in, height_in = figure.get_size_inches()
    ax = figure.add_axes((box.left / width_in, box.bottom / height_in, box.width / width_in, box.height / height_in))
    ax.tick_params(axis="y", labelleft=box.named)
    return ax


def mode_axis(ax: Axes, modes: Sequence[str]) -> None:
    """A row per mode from top to bottom, every second one shaded."""
    ax.set_ylim(len(modes) - 0.5, -0.5)
    ax.set_yticks(range(len(modes)), modes)
    ax.tick_params(axis="y", length=0)
    for row in range(0, len(modes), 2):
        ax.axhspan(row - 0.5, row + 0.5, color="#f5f5f5", lw=0, zorder=0)


def byte_ticks(ax: Axes, zero: float, low: float, high: float) -> None:
    """Decades from `low` to `high` on a log axis, and 0 at the position `zero` left of them."""
    ax.axvline(low / 10**0.25, color=GREY, lw=0.6, ls=(0, (2, 2)), zorder=1)
    ticks = log_ticks(ax, [10.0**d for d in np.arange(round(np.log10(low)), round(np.log10(high)) + 1)])
    ax.xaxis.set_major_locator(FixedLocator([zero, *ticks]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "0" if x <= zero * 1.01 else decade_text(x)))


def log_ticks(ax: Axes, ticks: Sequence[float]) -> Sequence[float]:
    """Ticks with grid lines on the x axis, evenly thinned to at most 6. Returns the chosen ones."""
    chosen = ticks[:: max(1, -(-len(ticks) // 6))]
    ax.xaxis.set_major_locator(FixedLocator(chosen))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: decade_text(x)))
    ax.xaxis.set_minor_locator(NullLocator())
    for tick in chosen:
        ax.axvline(tick, color=LIGHT, lw=0.6, zorder=1)
    return chosen


def decade_text(value: float) -> str:
    """A short round number: 10k for 10,000."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def bytes_text(value: float) -> str:
    """Bytes with three digits and a unit."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size * 0.9995:
            scaled = value / size
            return f"{scaled:.{0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2}f} {unit}"
    return f"{value:.0f} B"


def beside(ax: Axes, row: int, text: str) -> None:
    """A text right of the axis, level with a row."""
    ax.annotate(text, (1.0, row), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center_baseline")


def interval_line(ax: Axes, row: float, mean: float, low: float, high: float) -> None:
    """The mean and its interval. An end outside the axis becomes an arrow."""
    left, right = ax.get_xlim()
    ax.plot(np.clip([low, high], left, right), [row, row], color=BLACK, lw=1.2, zorder=4)
    ax.plot(mean, row, marker="|", ms=8, mew=1.6, color=BLACK, zorder=4)
    for end, outside, arrow in ((left, low < left, CARETLEFT), (right, high > right, CARETRIGHT)):
        if outside:
            ax.plot(end, row, marker=arrow, ms=4, color=BLACK, zorder=4, clip_on=False)


def mode_styles(modes: Iterable[str]) -> dict[str, LineStyle]:
    """A colour and a marker for each mode."""
    return {mode: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, mode in enumerate(dict.fromkeys(modes))}


def mode_handles(styles: Mapping[str, LineStyle]) -> Iterator[Line2D]:
    """A legend entry for each mode."""
    for mode, (colour, marker) in styles.items():
        yield Line2D([], [], color=colour, lw=0.9, marker=marker, ms=5, mec="white", mew=0.3, label=mode)


def mark(label: str, colour: str, marker: str) -> Line2D:
    """A mark for the legend."""
    return Line2D([], [], color=colour, marker=marker, ms=5, ls="", label=label)


def legend(figure: Figure, handles: Sequence[Any], columns: int = 8) -> None:
    """A legend above all panels, with at most `columns` entries a line."""
    figure.legend(
        handles=list(handles),
        loc="outside upper center" if figure.get_layout_engine() else "upper center",
        ncols=min(len(handles), columns),
        frameon=False,
        handletextpad=0.3,
        columnspacing=1.2,
    )
