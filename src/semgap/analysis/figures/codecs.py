"""Figure codecs: ratio and speed per tensor, with fp16 + zlib and the entropy of the byte planes as lines."""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from semgap.analysis.figures.axes import beside, log_axis, mode_axis
from semgap.analysis.figures.panels import BETWEEN_IN, FOOT_IN, LEGEND_IN, ROW_IN, WIDTH_IN, Box, axes_in, blank_figure, names_width_in
from semgap.analysis.figures.style import BLACK, GREY, POINT, handle, legend, styled
from semgap.analysis.results import Results
from semgap.analysis.tables import codecs

SHOWN: Mapping[str, str] = {
    "logits_all": "logits, all rows",
    "hidden_last": "hidden state, last row",
    "kv_prompt": "KV cache",
    "weights_sample": "weights, a sample",
}
DTYPES: Mapping[str, tuple[str, str]] = {"float32": ("#0072B2", "o"), "float16": ("#D55E00", "s"), "bfloat16": ("#009E73", "^")}
BASELINE = "fp16_zlib"
BASELINE_LINE: Mapping[str, Any] = {"lw": 0.9, "ls": (0, (5, 3))}
BOUND_LINE: Mapping[str, Any] = {"lw": 1.0, "ls": (0, (1, 1.5))}
KEPT_IN, TITLE_IN, NOTE_IN = 0.72, 0.3, 0.17
NOTE_LETTERS = 110


@styled()
def plot(results: Results) -> Figure:
    """Two panels for each model and float tensor of the table `codecs`.

    Left: ratio against the same values as raw fp16, by dtype, log axis. Lines: fp16 + zlib, and per dtype the limit by the order-0 entropy
    of the byte planes. Beside it the codec's loss on the run's dtype. Right: MB/s of raw bytes each way over cold
    memory, mean over processes, log axis.
    """
    measured = _labelled(codecs.table(results))
    groups = [rows for _, rows in measured.groupby(["model", "tensor"], sort=False) if rows["tensor"].iloc[0] in SHOWN]
    notes = _notes(groups)
    figure, boxes = _panels(groups, len(notes) * NOTE_IN)
    for rows, (left, right) in zip(groups, boxes, strict=True):
        _draw_ratios(axes_in(figure, left), rows)
        _draw_speeds(axes_in(figure, right), rows)
    for line, note in enumerate(notes):
        figure.text(0.01, (len(notes) - 1 - line + 0.3) * NOTE_IN / figure.get_size_inches()[1], note, color=GREY)
    dtypes = [handle(dtype, color=colour, marker=marker, ms=5, ls="") for dtype, (colour, marker) in DTYPES.items()]
    ways = [handle("encode", color=GREY, marker="o", ms=5, ls=""), handle("decode", mfc="white", mec=GREY, marker="o", ms=5, ls="")]
    bounds = [handle("fp16 + zlib", color=BLACK, **BASELINE_LINE), handle("order-0 entropy", color=GREY, **BOUND_LINE)]
    legend(figure, [*dtypes, *ways, *bounds], columns=4)
    return figure


def _labelled(measured: pd.DataFrame) -> pd.DataFrame:
    """The rows of codecs that were measured on any tensor. A codec measured on both CPU and GPU gets a second name for the GPU."""
    done = measured.groupby(["model", "codec"])["ratio"].transform("count") > 0
    own = measured[done]
    both = own.groupby(["model", "codec"])["device"].transform("nunique") > 1
    return own.assign(codec=own["codec"].where(~both | (own["device"] == "cpu"), own["codec"] + " (GPU)"))


def _panels(groups: Sequence[pd.DataFrame], notes_in: float) -> tuple[Figure, list[list[Box]]]:
    names_in = names_width_in(name for rows in groups for name in rows["codec"])
    width = (WIDTH_IN - names_in - KEPT_IN - BETWEEN_IN - 0.15) / 2
    heights = [rows["codec"].nunique() * ROW_IN for rows in groups]
    figure = blank_figure(1.7 * LEGEND_IN + notes_in + sum(TITLE_IN + height + FOOT_IN for height in heights))
    bottom = figure.get_size_inches()[1] - 1.7 * LEGEND_IN + FOOT_IN
    boxes = []
    for height in heights:
        bottom = bottom - FOOT_IN - TITLE_IN - height
        boxes.append(Box(names_in, bottom, width, height).repeated(2, KEPT_IN + BETWEEN_IN))
    return figure, boxes


def _draw_ratios(ax: Axes, rows: pd.DataFrame) -> None:
    names = list(dict.fromkeys(rows["codec"]))
    mode_axis(ax, names)
    ratios = rows["ratio_to_fp16"].dropna()
    log_axis(ax, math.floor(math.log2(ratios.min()) - 0.1), math.ceil(math.log2(ratios.max()) + 0.1), base=2)
    for own, heights, colour, marker in _by_dtype(rows, names):
        ax.plot(own["ratio_to_fp16"], heights, marker=marker, color=colour, ls="", **POINT)
        for bound in (own["entropy_ratio"] * own["ratio_to_fp16"] / own["ratio"]).dropna().head(1):
            ax.axvline(bound, color=colour, zorder=2, **BOUND_LINE)
    for baseline in rows.loc[rows["codec"] == BASELINE, "ratio_to_fp16"].dropna().head(1):
        ax.axvline(baseline, color=BLACK, zorder=2, **BASELINE_LINE)
    own = rows[rows["run_dtype"]]
    for codec, exact, kl in zip(own["codec"], own["exact"], own["kl_nats"], strict=True):
        beside(ax, names.index(codec), _kept(exact, kl))
    first = rows.iloc[0]
    meaning = "" if first["ratio_meaningful"] else " (not meaningful)"
    ax.set_title(f"{SHOWN[first['tensor']]}{meaning}: {first['model']}", loc="left")
    ax.set_xlabel("ratio against raw fp16")


def _draw_speeds(ax: Axes, rows: pd.DataFrame) -> None:
    names = list(dict.fromkeys(rows["codec"]))
    mode_axis(ax, names)
    speeds = rows.set_index("codec")[["cold_encode_mb_per_s", "cold_decode_mb_per_s"]].astype("float64")
    log_axis(ax, math.floor(math.log10(speeds.min().min())), math.ceil(math.log10(speeds.max().max())))
    for own, heights, colour, marker in _by_dtype(rows, names):
        ax.plot(own["cold_encode_mb_per_s"], heights, marker=marker, color=colour, ls="", **POINT)
        ax.plot(own["cold_decode_mb_per_s"], heights, marker=marker, ms=4.5, mfc="white", mec=colour, mew=1.0, ls="", zorder=3)
    for row, name in enumerate(names):
        if speeds.loc[[name]].isna().all(axis=None):
            ax.annotate("no copy", (0.5, row), xycoords=("axes fraction", "data"), ha="center", va="center_baseline", color=GREY)
    ax.set_xlabel("speed, cold memory (MB/s of raw bytes)")


def _by_dtype(rows: pd.DataFrame, names: Sequence[str]) -> Iterator[tuple[pd.DataFrame, list[float], str, str]]:
    """The rows of each dtype, with their heights, a colour and a marker. Heights differ by dtype, so that equal values stay visible."""
    for place, (dtype, (colour, marker)) in enumerate(DTYPES.items()):
        own = rows[rows["dtype"] == dtype]
        yield own, [names.index(name) + (place - 1) * 0.24 for name in own["codec"]], colour, marker


def _kept(exact: bool | None, kl_nats: float) -> str:
    if exact is None or pd.isna(exact):
        return "refused"
    if exact:
        return "exact"
    return "lossy" if np.isnan(kl_nats) else f"KL {kl_nats:.0e}".replace("e-0", "e-")


def _notes(groups: Sequence[pd.DataFrame]) -> list[str]:
    reasons = dict.fromkeys(reason for rows in groups for reason in rows["ratio_reason"].dropna())
    return [line for reason in reasons for line in textwrap.wrap(f"not meaningful: {reason}", NOTE_LETTERS)]
