"""Figure codecs: ratio and speed per tensor, with fp16 + zlib and the entropy of the byte planes as lines."""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from semgap.analysis.figures.style import (
    BETWEEN_IN,
    BLACK,
    FOOT_IN,
    GREY,
    LEGEND_IN,
    ROW_IN,
    WIDTH_IN,
    Box,
    axes_in,
    beside,
    blank_figure,
    legend,
    log_ticks,
    mode_axis,
    styled,
    text_width_in,
)
from semgap.analysis.results import Results

SHOWN: Mapping[str, str] = {
    "logits_all": "logits, all rows",
    "hidden_last": "hidden state, last row",
    "kv_prompt": "KV cache",
    "weights_sample": "weights, a sample",
}
DTYPES: Mapping[str, tuple[str, str]] = {"float32": ("#0072B2", "o"), "float16": ("#D55E00", "s"), "bfloat16": ("#009E73", "^")}
BASELINE = "fp16_zlib"
KEPT_IN, TITLE_IN, NOTE_IN = 0.72, 0.3, 0.17
NOTE_LETTERS = 110


def plot(results: Results) -> Figure:
    """Two panels for each model and float tensor of the table `codecs`.

    Left: ratio against the same values as raw fp16, by dtype, log axis. Lines: fp16 + zlib, and per dtype the limit by the order-0 entropy
    of the byte planes. Beside it the codec's loss on the run's dtype. Right: MB/s of raw bytes each way, log axis.
    """
    measured = _labelled(results.codecs)
    groups = [rows for _, rows in measured.groupby(["model", "tensor"], sort=False) if rows["tensor"].iloc[0] in SHOWN]
    notes = _notes(groups)
    with styled():
        figure, boxes = _panels(groups, len(notes))
        for rows, (left, right) in zip(groups, boxes, strict=True):
            _draw_ratios(axes_in(figure, left), rows)
            _draw_speeds(axes_in(figure, right), rows)
        for line, note in enumerate(notes):
            figure.text(0.01, (len(notes) - 1 - line + 0.3) * NOTE_IN / figure.get_size_inches()[1], note, color=GREY)
        legend(figure, list(_handles()), columns=4)
    return figure


def _labelled(measured: pd.DataFrame) -> pd.DataFrame:
    """The rows of codecs that were measured on any tensor. A codec measured on both CPU and GPU gets a second name for the GPU."""
    done = measured.groupby(["model", "codec"])["ratio"].transform("count") > 0
    own = measured[done]
    both = own.groupby(["model", "codec"])["device"].transform("nunique") > 1
    return own.assign(codec=own["codec"].where(~both | (own["device"] == "cpu"), own["codec"] + " (GPU)"))


def _panels(groups: Sequence[pd.DataFrame], notes: int) -> tuple[Figure, list[tuple[Box, Box]]]:
    names_in = 0.12 + max((text_width_in(name) for rows in groups for name in rows["codec"]), default=0.0)
    width = (WIDTH_IN - names_in - KEPT_IN - BETWEEN_IN - 0.15) / 2
    heights = [rows["codec"].nunique() * ROW_IN for rows in groups]
    figure = blank_figure(1.7 * LEGEND_IN + notes * NOTE_IN + sum(TITLE_IN + height + FOOT_IN for height in heights))
    top = figure.get_size_inches()[1] - 1.7 * LEGEND_IN
    boxes = []
    for height in heights:
        bottom = top - TITLE_IN - height
        right = names_in + width + KEPT_IN + BETWEEN_IN
        boxes.append((Box(names_in, bottom, width, height, True), Box(right, bottom, width, height, False)))
        top = bottom - FOOT_IN
    return figure, boxes


def _draw_ratios(ax: Axes, rows: pd.DataFrame) -> None:
    names = list(dict.fromkeys(rows["codec"]))
    mode_axis(ax, names)
    ratios = rows["ratio_to_fp16"].dropna()
    low, high = math.floor(math.log2(ratios.min()) - 0.1), math.ceil(math.log2(ratios.max()) + 0.1)
    ax.set_xscale("log")
    ax.set_xlim(2.0**low, 2.0**high)
    log_ticks(ax, [2.0**power for power in range(low, high + 1)])
    for dtype, (colour, marker) in DTYPES.items():
        own = rows[rows["dtype"] == dtype]
        heights = [names.index(name) + _offset(dtype) for name in own["codec"]]
        ax.plot(own["ratio_to_fp16"], heights, marker=marker, ms=4.5, color=colour, mec="white", mew=0.3, ls="", zorder=4)
        for bound in (own["entropy_ratio"] * own["ratio_to_fp16"] / own["ratio"]).dropna().head(1):
            ax.axvline(bound, color=colour, lw=1.0, ls=(0, (1, 1.5)), zorder=2)
    for baseline in rows.loc[rows["codec"] == BASELINE, "ratio_to_fp16"].dropna().head(1):
        ax.axvline(baseline, color=BLACK, lw=0.9, ls=(0, (5, 3)), zorder=2)
    own = rows[rows["run_dtype"]]
    for codec, exact, kl in zip(own["codec"], own["exact"], own["kl_nats"], strict=True):
        beside(ax, names.index(codec), _kept(exact, kl))
    ax.set_title(_title(rows), loc="left")
    ax.set_xlabel("ratio against raw fp16")


def _draw_speeds(ax: Axes, rows: pd.DataFrame) -> None:
    names = list(dict.fromkeys(rows["codec"]))
    mode_axis(ax, names)
    speeds = rows[["encode_mb_per_s", "decode_mb_per_s"]].to_numpy(dtype=float)
    low, high = math.floor(math.log10(np.nanmin(speeds))), math.ceil(math.log10(np.nanmax(speeds)))
    ax.set_xscale("log")
    ax.set_xlim(10.0**low, 10.0**high)
    log_ticks(ax, [10.0**power for power in range(low, high + 1)])
    for dtype, (colour, marker) in DTYPES.items():
        own = rows[rows["dtype"] == dtype]
        heights = [names.index(name) + _offset(dtype) for name in own["codec"]]
        ax.plot(own["encode_mb_per_s"], heights, marker=marker, ms=4.5, color=colour, mec="white", mew=0.3, ls="", zorder=4)
        ax.plot(own["decode_mb_per_s"], heights, marker=marker, ms=4.5, mfc="white", mec=colour, mew=1.0, ls="", zorder=3)
    for row, name in enumerate(names):
        if rows.loc[rows["codec"] == name, ["encode_mb_per_s", "decode_mb_per_s"]].isna().all(axis=None):
            ax.annotate("no copy", (0.5, row), xycoords=("axes fraction", "data"), ha="center", va="center_baseline", color=GREY)
    ax.set_xlabel("speed (MB/s of raw bytes)")


def _offset(dtype: str) -> float:
    """Each dtype has its own height in a row, so that equal values stay visible."""
    return (list(DTYPES).index(dtype) - 1) * 0.24


def _kept(exact: bool | None, kl_nats: float) -> str:
    if exact is None or pd.isna(exact):
        return "refused"
    if exact:
        return "exact"
    return "lossy" if np.isnan(kl_nats) else f"KL {kl_nats:.0e}".replace("e-0", "e-")


def _title(rows: pd.DataFrame) -> str:
    first = rows.iloc[0]
    meaning = "" if first["ratio_meaningful"] else " (not meaningful)"
    return f"{SHOWN[first['tensor']]}{meaning}: {first['model']}"


def _notes(groups: Sequence[pd.DataFrame]) -> list[str]:
    reasons = dict.fromkeys(reason for rows in groups for reason in rows["ratio_reason"].dropna())
    return [line for reason in reasons for line in textwrap.wrap(f"not meaningful: {reason}", NOTE_LETTERS)]


def _handles() -> Iterator[Line2D]:
    for dtype, (colour, marker) in DTYPES.items():
        yield Line2D([], [], color=colour, marker=marker, ms=5, ls="", label=dtype)
    yield Line2D([], [], color=GREY, marker="o", ms=5, ls="", label="encode")
    yield Line2D([], [], mfc="white", mec=GREY, marker="o", ms=5, ls="", label="decode")
    yield Line2D([], [], color=BLACK, lw=0.9, ls=(0, (5, 3)), label="fp16 + zlib")
    yield Line2D([], [], color=GREY, lw=1.0, ls=(0, (1, 1.5)), label="order-0 entropy")
