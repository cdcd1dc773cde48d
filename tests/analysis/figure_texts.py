"""The texts of a drawn figure, and whether they overlap or are cut."""

import itertools
from typing import Any

from matplotlib.text import Text


def texts(figure: Any) -> list[str]:
    """Texts of the panels and of the common axis."""
    figure.draw_without_rendering()
    panels = [text.get_text() for ax in figure.axes for text in (*ax.texts, ax.title, *ax.get_xticklabels())]
    return [*panels, figure.get_supxlabel()]


def unreadable_texts(figure: Any) -> list[tuple[str, ...]]:
    """Pairs of texts that overlap, and texts that the figure's edges cut."""
    boxes, whole = _text_boxes(figure), figure.bbox
    colliding = [(a, b) for (a, x), (b, y) in itertools.combinations(boxes, 2) if x.overlaps(y)]
    cut = [(text,) for text, box in boxes if box.x0 < whole.x0 or box.x1 > whole.x1 or box.y0 < whole.y0 or box.y1 > whole.y1]
    return [*colliding, *cut]


def _text_boxes(figure: Any) -> list[tuple[str, Any]]:
    """Every drawn text with its extent in pixels, without ticks outside the limits of their axis."""
    figure.draw_without_rendering()
    found = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for ax in figure.axes:
        found += [*ax.get_children(), ax.xaxis.label, ax.yaxis.label]
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            shown = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            found += [tick.label1 for tick in shown if tick.label1.get_visible()]
    texts = {id(text): text for text in found if isinstance(text, Text) and text.get_text()}
    return [(text.get_text(), text.get_window_extent()) for text in texts.values()]
