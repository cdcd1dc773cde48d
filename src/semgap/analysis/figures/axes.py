"""Axes with rows, round ticks and intervals."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.markers import CARETLEFT, CARETRIGHT
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from semgap.analysis.figures.style import BLACK, LIGHT, decade_text


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


def beside(ax: Axes, row: int, text: str) -> None:
    """A text right of the axis, level with a row."""
    ax.annotate(text, (1.0, row), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center_baseline")


def with_ends(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    """`mean`, `low` and `high` of a column with an interval; ends that are null lie at the mean."""
    found = rows[[name, f"{name}_low", f"{name}_high"]].astype("float64").set_axis(["mean", "low", "high"], axis=1)
    return found.assign(low=found["low"].fillna(found["mean"]), high=found["high"].fillna(found["mean"]))


def draw_itls(ax: Axes, itls: pd.DataFrame, limits: tuple[float, float], bins: int) -> None:
    """ITLs in ms (`with_ends`) on a linear axis, one a row: the mean, its interval, and the mean as text."""
    ax.set_xlim(*limits)
    ax.grid(axis="x", color=LIGHT, lw=0.6, zorder=1)
    ax.xaxis.set_major_locator(MaxNLocator(bins))
    for row, (mean, low, high) in enumerate(itls.itertuples(index=False)):
        ends = np.clip([low, high], *limits)
        ax.plot(ends, [row, row], color=BLACK, lw=1.2, zorder=4)
        ax.plot(mean, row, marker="|", ms=8, mew=1.6, color=BLACK, zorder=4)
        draw_arrows(ax, row, (low, high), limits)
        beside(ax, row, f"{mean:.{0 if mean >= 99.95 else 1}f} ms")
    ax.set_xlabel("ITL (ms)")


def draw_arrows(ax: Axes, height: float, interval: tuple[float, float], limits: tuple[float, float]) -> None:
    """An arrow for each end of an interval outside the axis."""
    left, right = limits
    for end, outside, arrow in ((left, interval[0] < left, CARETLEFT), (right, interval[1] > right, CARETRIGHT)):
        if outside:
            ax.plot(end, height, marker=arrow, ms=4, color=BLACK, zorder=4, clip_on=False)
