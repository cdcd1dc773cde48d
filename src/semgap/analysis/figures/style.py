"""Colours, looks, texts, legends and files of all figures.

No text is below 8 points. Colour-blind readers can tell the colours apart (Okabe and Ito 2008).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

FONT_SIZE = 8.0
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": FONT_SIZE,
    "axes.titlesize": 9,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "semgap",
    "pdf.fonttype": 42,  # TrueType: publishers refuse Type 3
    "axes.unicode_minus": False,
}
FORMATS: Mapping[str, Mapping[str, Any]] = {
    "svg": {"metadata": {"Date": None, "Creator": "semgap"}},
    "png": {"dpi": 200, "metadata": {"Software": "semgap"}},
    "pdf": {"metadata": {"CreationDate": None, "Creator": "semgap"}},
}
"""The files of a figure by their endings, with the options that write them."""
BLACK, GREY, LIGHT = "#000000", "#666666", "#e4e4e4"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHED = (0, (4, 2))
POINT: dict[str, Any] = {"ms": 4.5, "mec": "white", "mew": 0.3, "zorder": 4}
"""A mark with a thin white edge."""
LineStyle = tuple[str, str]
"""A colour and a marker."""


def save(figure: Figure, stem: Path) -> list[Path]:
    """Writes {stem}.svg, .png and .pdf. Returns their paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.with_name(f"{stem.name}.{ending}") for ending in FORMATS]
    for file in files:
        save_as(figure, file)
    return files


def save_as(figure: Figure, file: Path) -> None:
    """Writes a file in the format of its ending. Equal figures give equal bytes."""
    with styled():
        figure.savefig(file, **FORMATS[require_format(file)])


def require_format(file: Path) -> str:
    """The ending of a figure's file. ValueError unless it is one of `FORMATS`."""
    ending = file.suffix.removeprefix(".").lower()
    if ending not in FORMATS:
        raise ValueError(f"figure {file} ends in none of {', '.join(f'.{each}' for each in FORMATS)}; name it e.g. {file.stem}.pdf")
    return ending


@contextmanager
def styled() -> Iterator[None]:
    """Figures within this context, or a function with this decorator, use `STYLE`."""
    with matplotlib.rc_context(STYLE):
        yield


def decade_text(value: float) -> str:
    """A short round number: 10k for 10,000."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def three_digits(value: float) -> str:
    """At least 3 digits of a value of 1 or more."""
    return f"{value:,.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"


def bytes_text(value: float) -> str:
    """Bytes with three digits and a unit."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size * 0.9995:
            return f"{three_digits(value / size)} {unit}"
    return f"{value:.0f} B"


def mode_styles(modes: Iterable[str]) -> dict[str, LineStyle]:
    """A colour and a marker for each mode."""
    return {mode: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, mode in enumerate(dict.fromkeys(modes))}


def mode_handles(styles: Mapping[str, LineStyle]) -> list[Line2D]:
    """A legend entry for each mode."""
    return [handle(mode, color=colour, lw=0.9, marker=marker, ms=5, mec="white", mew=0.3) for mode, (colour, marker) in styles.items()]


def handle(label: str, **look: Any) -> Line2D:
    """A legend entry."""
    return Line2D([], [], label=label, **look)


def legend(figure: Figure, handles: Sequence[Any], columns: int = 8) -> None:
    """A legend above all panels, with at most `columns` entries a line."""
    figure.legend(
        handles=handles,
        loc="outside upper center" if figure.get_layout_engine() else "upper center",
        ncols=min(len(handles), columns),
        frameon=False,
        handletextpad=0.3,
        columnspacing=1.2,
    )
