"""The figure of the codecs: ratio and speed per tensor, against fp16 + zlib and the entropy of the byte planes."""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from semgap.analysis.figures.style import (
    BETWEEN_IN,
    BLACK,
    FOOT_IN,
    GREY,
    LEGEND_IN,
    LIGHT,
    ROW_IN,
    WIDTH_IN,
    Box,
    axes_in,
    beside,
    decade_text,
    legend,
    mode_axis,
    styled,
    text_width_in,
)

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


def codecs(measured: pd.DataFrame) -> Figure:
    """Of the table `codecs`: a line of two panels for each model and tensor that is of floats.

    Left: ratio against the same values as raw fp16, by dtype, log axis; lines: fp16 + zlib, and per dtype what the order-0 entropy
    of the byte planes allows. Beside it what the codec keeps of the run's dtype. Right: MB/s of raw bytes each way, log axis.
    """
    measured = _labelled(measured)
    groups = [rows for _, rows in measured.groupby(["model", "tensor"], sort=False) if rows["tensor"].iloc[0] in SHOWN]
    notes = _notes(groups)
    with styled():
        figure, places = _panels(groups, len(notes))
        for rows, boxes in zip(groups, places, strict=True):
            _draw_ratios(axes_in(figure, boxes[0]), rows)
            _draw_speeds(axes_in(figure, boxes[1]), rows)
        for line, note in enumerate(notes):
            figure.text(0.01, (len(notes) - 1 - line + 0.3) * NOTE_IN / figure.get_size_inches()[1], note, color=GREY)
        legend(figure, list(_handles()), columns=4)
    return figure


def _labelled(measured: pd.DataFrame) -> pd.DataFrame:
    """Codecs by name, and apart where they worked on a GPU beside the CPU; without those that could not be measured on any tensor."""
    done = measured.groupby(["model", "codec"])["ratio"].transform("count") > 0
    own = measured[done]
    both = own.groupby(["model", "codec"])["device"].transform("nunique") > 1
    return own.assign(codec=own["codec"].where(~both | (own["device"] == "cpu"), own["codec"] + " (GPU)"))


def _panels(groups: Sequence[pd.DataFrame], notes: int) -> tuple[Figure, list[tuple[Box, Box]]]:
    names_in = 0.12 + max((text_width_in(name) for rows in groups for name in rows["codec"]), default=0.0)
    width = (WIDTH_IN - names_in - KEPT_IN - BETWEEN_IN - 0.15) / 2
    heights = [rows["codec"].nunique() * ROW_IN for rows in groups]
    figure = Figure(figsize=(WIDTH_IN, 1.7 * LEGEND_IN + notes * NOTE_IN + sum(TITLE_IN + height + FOOT_IN for height in heights)))
    FigureCanvasAgg(figure)
    top = figure.get_size_inches()[1] - 1.7 * LEGEND_IN
    places = []
    for height in heights:
        bottom = top - TITLE_IN - height
        right = names_in + width + KEPT_IN + BETWEEN_IN
        places.append((Box(names_in, bottom, width, height, True), Box(right, bottom, width, height, False)))
        top = bottom - FOOT_IN
    return figure, places


def _draw_ratios(ax: Axes, rows: pd.DataFrame) -> None:
    names = list(dict.fromkeys(rows["codec"]))
    mode_axis(ax, names)
    ratios = rows["ratio_to_fp16"].dropna()
    low, high = math.floor(math.log2(ratios.min()) - 0.1), math.ceil(math.log2(ratios.max()) + 0.1)
    ax.set_xscale("log")
    ax.set_xlim(2.0**low, 2.0**high)
    _ticks(ax, [2.0**power for power in range(low, high + 1)])
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
    _ticks(ax, [10.0**power for power in range(low, high + 1)])
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
    """Each dtype has its own height within a row, so that equal values do not hide each other."""
    return (list(DTYPES).index(dtype) - 1) * 0.24


def _ticks(ax: Axes, ticks: Sequence[float]) -> None:
    chosen = ticks[:: max(1, -(-len(ticks) // 6))]
    ax.xaxis.set_major_locator(FixedLocator(chosen))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: decade_text(x)))
    ax.xaxis.set_minor_locator(NullLocator())
    for tick in chosen:
        ax.axvline(tick, color=LIGHT, lw=0.6, zorder=1)


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
