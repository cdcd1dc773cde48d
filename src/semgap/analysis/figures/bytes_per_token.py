"""Figure bytes_per_token: TCP payload per token by tensor class."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter

from semgap.analysis.figures.axes import beside, log_ticks, mode_axis
from semgap.analysis.figures.facets import KV_PHASES_ALONE, Facet, facet_panels, facets
from semgap.analysis.figures.panels import axes_in, saying
from semgap.analysis.figures.style import BLACK, GREY, POINT, bytes_text, decade_text, handle, legend, styled
from semgap.analysis.load import CELL, KEYS, Trials
from semgap.analysis.results import Results

CLASSES: Mapping[str, tuple[str, str, str]] = {
    "weights": ("weights", "#D55E00", "s"),
    "kv": ("KV cache", "#CC79A7", "D"),
    "logits": ("logits", "#0072B2", "o"),
    "hidden": ("hidden state", "#56B4E9", "h"),
    "tokens": ("token ids", "#009E73", "^"),
    "control": ("control", "#E69F00", "v"),
    "header": ("framing", "#666666", "X"),
    "tls": ("TLS", "#999999", "P"),
}


def bytes_by_class(trials: Trials) -> pd.DataFrame:
    """TCP payload bytes per token by tensor class and trial: `KEYS`, tensor_class, bytes_per_token.

    Counts the client's network ledger of measured steps (kinds regular and delta). Class `header` is the framing, `tls` the bytes
    that TLS adds. A trial that sent nothing has one row of class None with 0.
    """
    ledger = trials.ledger
    crossed = ledger[(ledger["side"] == "client") & (ledger["link"] == "network") & ledger["kind"].isin(["regular", "delta"])]
    sizes = crossed["payload_bytes"] + crossed["header_bytes"]
    totals = crossed.assign(size=sizes).groupby([*KEYS, "tensor_class"], as_index=False)["size"].sum()
    steps = trials.steps[trials.steps["measured"]].groupby(KEYS, sort=False).size().rename("steps").reset_index()
    joined = steps.merge(totals[totals["size"] > 0], on=KEYS, how="left")
    joined["bytes_per_token"] = joined["size"].fillna(0) / joined["steps"]
    return joined[[*KEYS, "tensor_class", "bytes_per_token"]]


@styled()
def plot(results: Results) -> Figure:
    """TCP payload per token on a log axis, means over trials: a mark per tensor class, a bar for the total, and the total as text.

    Marks are not stacked: on a log axis the length of a stacked part means nothing. 0 has its own position left of the axis. Recovery
    phases have another figure.
    """
    table = bytes_by_class(results.trials).groupby([*CELL, "tensor_class"], sort=False, dropna=False)["bytes_per_token"]
    means = table.mean().reset_index()
    shown = facets(results.rows)
    if not shown:
        return saying(KV_PHASES_ALONE)
    figure, boxes = facet_panels(shown)
    means = pd.concat([facet.of(means) for facet in shown])
    limits = _byte_limits(means)
    for facet, box in zip(shown, boxes, strict=True):
        _draw_bytes(axes_in(figure, box), facet.of(means), facet, limits)
    present = [look for name, look in CLASSES.items() if (means["tensor_class"] == name).any()]
    handles = [handle(label, color=colour, marker=marker, ms=5, ls="") for label, colour, marker in present]
    legend(figure, [*handles, handle("total", color=BLACK, marker="|", ms=9, mew=1.6, ls="")])
    return figure


def _byte_limits(means: pd.DataFrame) -> tuple[float, float]:
    positive = means.loc[means["bytes_per_token"] > 0, "bytes_per_token"]
    if positive.empty:
        return 1.0, 10.0
    totals = means.groupby(CELL)["bytes_per_token"].sum()
    return 10 ** np.floor(np.log10(positive.min())), 10 ** np.ceil(np.log10(totals.max()) + 0.02)


def _draw_bytes(ax: Axes, means: pd.DataFrame, facet: Facet, limits: tuple[float, float]) -> None:
    low, high = limits
    zero = low / 10**0.7
    mode_axis(ax, facet.modes)
    ax.set_xscale("log")
    ax.set_xlim(zero / 10**0.5, high)
    by_mode = dict(tuple(means.groupby("mode", sort=False)))
    for row, mode in enumerate(facet.modes):
        if mode not in by_mode:
            beside(ax, row, "not run")
            continue
        total = float(by_mode[mode]["bytes_per_token"].sum())
        _draw_classes(ax, row, by_mode[mode])
        ax.plot([total or zero] * 2, [row - 0.42, row + 0.42], color=BLACK, lw=1.3, zorder=3, clip_on=False)
        beside(ax, row, bytes_text(total))
    _byte_ticks(ax, zero, low, high)
    ax.set_title(facet.title, loc="left")
    ax.set_xlabel("TCP payload per token (bytes)")


def _byte_ticks(ax: Axes, zero: float, low: float, high: float) -> None:
    """Decades from `low` to `high` on a log axis, and 0 at the position `zero` left of them."""
    ax.axvline(low / 10**0.25, color=GREY, lw=0.6, ls=(0, (2, 2)), zorder=1)
    ticks = log_ticks(ax, [10.0**d for d in np.arange(round(np.log10(low)), round(np.log10(high)) + 1)])
    ax.xaxis.set_major_locator(FixedLocator([zero, *ticks]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "0" if x <= zero * 1.01 else decade_text(x)))


def _draw_classes(ax: Axes, row: int, sizes: pd.DataFrame) -> None:
    """A mark per class. Each class has its own height in the row, so that equal sizes stay visible."""
    known = sizes.dropna(subset="tensor_class")
    for name, size in zip(known["tensor_class"], known["bytes_per_token"], strict=True):
        _, colour, marker = CLASSES[name]
        offset = (list(CLASSES).index(name) - (len(CLASSES) - 1) / 2) * 0.095
        ax.plot(size, row + offset, marker=marker, color=colour, ls="", **POINT)
