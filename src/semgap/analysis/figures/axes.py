"""Axes with rows, round ticks and intervals."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.markers import CARETLEFT, CARETRIGHT
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from semgap.analysis.figures.style import BLACK, LIGHT, decade_text

FAR = 8.0
"""A value above this factor of its panel's median is not drawn to scale."""
MARGIN = 1.35
"""The factor between the outermost points and the ends of a log axis."""


def mode_axis(ax: Axes, modes: Sequence[str]) -> None:
    """A row per mode from top to bottom, every second one shaded."""
    ax.set_ylim(len(modes) - 0.5, -0.5)
    ax.set_yticks(range(len(modes)), modes)
    ax.tick_params(axis="y", length=0)
    for row in range(0, len(modes), 2):
        ax.axhspan(row - 0.5, row + 0.5, color="#f5f5f5", lw=0, zorder=0)


def log_axis(ax: Axes, low: float, high: float, base: float = 10) -> None:
    """A log axis from base ** `low` to base ** `high`, with ticks at the whole powers."""
    ax.set_xscale("log")
    ax.set_xlim(base**low, base**high)
    log_ticks(ax, [float(base) ** power for power in np.arange(np.ceil(low), high + 1)])


def log_ticks(ax: Axes, ticks: Sequence[float]) -> Sequence[float]:
    """Ticks with grid lines on the x axis, evenly thinned to at most 6. Returns the chosen ones."""
    chosen = ticks[:: max(1, -(-len(ticks) // 6))]
    ax.xaxis.set_major_locator(FixedLocator(chosen))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: decade_text(x)))
    ax.xaxis.set_minor_locator(NullLocator())
    for tick in chosen:
        ax.axvline(tick, color=LIGHT, lw=0.6, zorder=1)
    return chosen


def log_log_axes(ax: Axes, across: tuple[float, float], heights: tuple[float, float]) -> None:
    """Log axes with a grid, for points between these lowest and highest values."""
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(across[0] / MARGIN, across[1] * MARGIN)
    ax.set_ylim(heights[0] / MARGIN, heights[1] * MARGIN)
    _round_ticks(ax)
    ax.grid(color=LIGHT, lw=0.6)
    ax.set_axisbelow(True)


def _round_ticks(ax: Axes) -> None:
    """Decades, and as many steps between them as there is room for. A range within one decade gets at least three ticks."""
    for axis, most in ((ax.xaxis, 6), (ax.yaxis, 8)):
        low, high = axis.get_view_interval()
        decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
        finer = [np.concatenate([decades * factor for factor in factors]) for factors in ((1, 2, 5), (1, 3), (1,))]
        inside = [ticks[(ticks >= low) & (ticks <= high)] for ticks in (*finer, decades[::2])]
        chosen = next((ticks for ticks in inside if len(ticks) <= most), inside[-1])
        within = (np.concatenate([decades * factor for factor in np.arange(1, 10, step)]) for step in (1, 0.5, 0.2, 0.1, 0.05))
        candidates = [chosen, *(ticks[(ticks >= low) & (ticks <= high)] for ticks in within)]
        axis.set_major_locator(FixedLocator(sorted(next((ticks for ticks in candidates if len(ticks) > 2), chosen))))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value < 1e4 else f"{value / 1e3:g}k"))


def beside(ax: Axes, row: int, text: str) -> None:
    """A text right of the axis, level with a row."""
    ax.annotate(text, (1.0, row), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center_baseline")


def with_ends(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    """`mean`, `low` and `high` of a column with an interval; ends that are null lie at the mean."""
    found = rows[[name, f"{name}_low", f"{name}_high"]].astype("float64").set_axis(["mean", "low", "high"], axis=1)
    return found.assign(low=found["low"].fillna(found["mean"]), high=found["high"].fillna(found["mean"]))


def draw_means(ax: Axes, means: pd.DataFrame, widest: float, label: str, bins: int = 5) -> None:
    """Means in ms (`with_ends`), one a row, on a linear axis: the mean, its interval, and the mean as text.

    The axis shows intervals up to a factor `widest` from the largest mean. An arrow stands for a mean above `FAR` times the median.
    """
    known = means.dropna(subset="mean")
    near = known[known["mean"] <= FAR * known["mean"].median()]
    most = near["mean"].abs().max()
    left, right = max(near["low"].min(), -(widest - 1) * most), min(near["high"].max(), widest * most)
    margin = max((right - left) * 0.08, most * 0.02)
    limits = (left - margin, right + margin)
    ax.set_xlim(*limits)
    ax.grid(axis="x", color=LIGHT, lw=0.6, zorder=1)
    ax.xaxis.set_major_locator(MaxNLocator(bins))
    for row, (mean, low, high) in enumerate(means.itertuples(index=False)):
        if np.isnan(mean):
            beside(ax, row, "not known")
            continue
        ax.plot(np.clip([low, high], *limits), [row, row], color=BLACK, lw=1.2, zorder=4)
        if limits[0] <= mean <= limits[1]:
            ax.plot(mean, row, marker="|", ms=8, mew=1.6, color=BLACK, zorder=4)
        draw_arrows(ax, row, (low, high), limits)
        beside(ax, row, milliseconds_text(mean))
    ax.set_xlabel(label)


def milliseconds_text(value: float) -> str:
    """Milliseconds with about three digits."""
    return f"{value:.{0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2}f} ms"


def draw_arrows(ax: Axes, height: float, interval: tuple[float, float], limits: tuple[float, float]) -> None:
    """An arrow for each end of an interval outside the axis."""
    left, right = limits
    for end, outside, arrow in ((left, interval[0] < left, CARETLEFT), (right, interval[1] > right, CARETRIGHT)):
        if outside:
            ax.plot(end, height, marker=arrow, ms=4, color=BLACK, zorder=4, clip_on=False)
