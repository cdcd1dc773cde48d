"""The figures: bytes per token by tensor class, latency, telemetry over time. Each function returns a Figure.

One row per mode, so that many modes and long names fit. The figures of the ladder and of the codecs have modules of their own.
"""

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import CARETLEFT, CARETRIGHT
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from semgap.analysis.drawing import (
    BETWEEN_IN,
    BLACK,
    BREAK_IN,
    FOOT_IN,
    GREY,
    LEGEND_IN,
    LIGHT,
    ROW_IN,
    VALUES_IN,
    WIDTH_IN,
    Box,
    axes_in,
    beside,
    byte_ticks,
    bytes_text,
    legend,
    mark,
    mode_axis,
    saying,
    styled,
    text_width_in,
)
from semgap.analysis.load import CELL, KEYS, Trials, keys_of
from semgap.analysis.stats import mean_interval

NOTE_LETTERS = 105
CLASSES: Mapping[str, tuple[str, str, str]] = {
    "weights": ("weights", "#D55E00", "s"),
    "kv": ("KV cache", "#CC79A7", "D"),
    "logits": ("logits", "#0072B2", "o"),
    "hidden": ("hidden state", "#56B4E9", "h"),
    "tokens": ("token ids", "#009E73", "^"),
    "control": ("control", "#E69F00", "v"),
    "header": ("framing", "#666666", "X"),
}
CLIENT_COLOUR, WORKER_COLOUR = "#0072B2", "#D55E00"
POINT_COLOUR, MEAN_COLOUR = "#56B4E9", "#000000"
RECOVERY_ALONE = "recovery phases alone were run: see the figure recovery"
GAP = 2.5
"""Latencies further apart than this factor get axes of their own, so that small differences stay visible."""


def bytes_by_class(trials: Trials) -> pd.DataFrame:
    """TCP payload bytes per token by tensor class and trial: `KEYS`, tensor_class, bytes_per_token.

    From the client's ledger of what crossed the network in measured steps (kinds regular and delta); class `header` is
    the framing. A mode that sent nothing has one row of class None with 0.
    """
    ledger = trials.ledger
    crossed = ledger[(ledger["side"] == "client") & (ledger["link"] == "network") & ledger["kind"].isin(["regular", "delta"])]
    sizes = crossed["payload_bytes"] + crossed["header_bytes"]
    totals = crossed.assign(size=sizes).groupby([*KEYS, "tensor_class"], as_index=False)["size"].sum()
    steps = trials.steps[trials.steps["measured"]].groupby(KEYS, sort=False).size().rename("steps").reset_index()
    joined = steps.merge(totals[totals["size"] > 0], on=KEYS, how="left")
    joined["bytes_per_token"] = joined["size"].fillna(0) / joined["steps"]
    return joined[[*KEYS, "tensor_class", "bytes_per_token"]]


def bytes_per_token(trials: Trials) -> Figure:
    """TCP payload per token on a log axis: a mark per tensor class, a bar for the total, and the total in words.

    Marks stand beside each other, not stacked: on a log axis the length of a stacked part means nothing. 0 has a place
    of its own left of the axis. Values are means over trials. Recovery phases have a figure of their own.
    """
    table = bytes_by_class(trials).groupby([*CELL, "tensor_class"], sort=False, dropna=False)["bytes_per_token"]
    means = table.mean().reset_index()
    facets = _facets(trials)
    with styled():
        if not facets:
            return saying(RECOVERY_ALONE)
        figure, boxes = _panels(facets)
        means = means[np.logical_or.reduce([facet.selects(means) for facet in facets])]
        limits = _byte_limits(means)
        for facet, box in zip(facets, boxes, strict=True):
            _draw_bytes(axes_in(figure, box), means[facet.selects(means)], facet, limits)
        present = [name for name in CLASSES if name in set(means["tensor_class"].dropna())]
        handles = [mark(*CLASSES[name]) for name in present]
        legend(figure, [*handles, Line2D([], [], color=BLACK, marker="|", ms=9, mew=1.6, ls="", label="total")])
    return figure


def latency(rows: pd.DataFrame) -> Figure:
    """TTFT and ITL per mode from `load.trial_rows`: each trial's median, their mean, and its 95% t interval.

    Where modes lie more than 2.5 times apart, the axis is broken there: fast and slow modes get linear axes of their own.
    Recovery phases have a figure of their own.
    """
    facets = _row_facets(rows)
    with styled():
        if not facets:
            return saying(RECOVERY_ALONE)
        figure, boxes = _panels(facets)
        for facet, box in zip(facets, boxes, strict=True):
            _draw_latency(figure, box, rows[facet.selects(rows)], facet)
        legend(
            figure,
            [
                Line2D(
                    [],
                    [],
                    color=POINT_COLOUR,
                    marker="o",
                    ms=4,
                    ls="",
                    label="one trial (median of its steps)",
                ),
                Line2D([], [], color=MEAN_COLOUR, marker="|", ms=8, mew=1.6, lw=1.2, label="mean, 95% interval"),
            ],
        )
    return figure


def telemetry(trials: Trials, phase: str | None = None) -> Figure:
    """CPU, memory, and GPU use over time of one trial per mode (the lowest trial number), measured window shaded.

    Shows one phase (default: the first that decodes, else the first) of the first model and network. Seconds count from
    the start of the measured window, on the client's clock. Metrics without any sample
    are left out and named below with the sampler's reason.
    """
    shown = _telemetry_trials(trials, phase)
    metrics = [metric for metric in METRICS if _sampled(trials, metric, shown)]
    notes = _telemetry_notes(shown, metrics)
    with styled():
        figure, axes = _telemetry_axes(len(shown), max(len(metrics), 1), len(notes))
        for manifest, line in zip(shown, axes, strict=True):
            for metric, ax in zip(metrics, line, strict=False):
                _draw_metric(ax, _samples(trials, metric, manifest), metric, manifest)
            line[0].set_ylabel(_wrapped(manifest["cell"]["mode"]), rotation=0, ha="right", va="center")
        for metric, ax in zip(metrics, axes[0], strict=False):
            ax.set_title(metric.title)
            # Last, since a limit that is set stops the shared axis from growing with the lines.
            ax.set_ylim(bottom=0)
        _telemetry_legend(figure, notes)
    return figure


@dataclass(frozen=True)
class _Facet:
    """One panel: a model, network and phase, and the modes that were run there, in order of the grid."""

    model: str
    network: str
    phase: str
    kind: str
    modes: tuple[str, ...]
    title: str

    def selects(self, frame: pd.DataFrame) -> Any:
        return (frame["model"] == self.model) & (frame["network"] == self.network) & (frame["phase"] == self.phase)


def _facets(trials: Trials) -> list[_Facet]:
    keys = [keys_of(m) | {"phase_kind": m["cell"]["phase_spec"]["kind"]} for m in trials.manifests]
    return _row_facets(pd.DataFrame(keys))


def _row_facets(rows: pd.DataFrame) -> list[_Facet]:
    """Panels of a frame with the key columns and phase_kind, but for recovery. All have the same modes, so that rows line up."""
    rows = rows[rows["phase_kind"] != "recovery"]
    modes = tuple(dict.fromkeys(rows["mode"]))
    several = rows["model"].nunique() > 1 or rows["network"].nunique() > 1
    facets = []
    for keys, _ in rows.groupby(["model", "network", "phase", "phase_kind"], sort=False):
        model, network, phase, kind = map(str, keys)
        title = f"{phase}\n{model}, {network}" if several else phase
        facets.append(_Facet(model, network, phase, kind, modes, title))
    return facets


def _panels(facets: Sequence[_Facet]) -> tuple[Figure, list[Box]]:
    """A figure and, two beside each other, the places of its panels.

    Placed by hand: every panel is equally wide, whatever names and values stand beside it, so they compare by eye.
    """
    columns = min(2, len(facets))
    lines = -(-len(facets) // columns)
    names_in = 0.12 + max(text_width_in(mode) for mode in facets[0].modes)
    width = (WIDTH_IN - names_in - columns * VALUES_IN - (columns - 1) * BETWEEN_IN) / columns
    height = len(facets[0].modes) * ROW_IN
    head = 0.1 + 0.15 * max(1 + facet.title.count("\n") for facet in facets)
    line_in = head + height + FOOT_IN
    figure = Figure(figsize=(WIDTH_IN, LEGEND_IN + lines * line_in))
    FigureCanvasAgg(figure)
    boxes = []
    for index in range(len(facets)):
        line, column = divmod(index, columns)
        left = names_in + column * (width + VALUES_IN + BETWEEN_IN)
        boxes.append(Box(left, (lines - 1 - line) * line_in + FOOT_IN, width, height, named=column == 0))
    return figure, boxes


def _byte_limits(means: pd.DataFrame) -> tuple[float, float]:
    positive = means.loc[means["bytes_per_token"] > 0, "bytes_per_token"]
    if positive.empty:
        return 1.0, 10.0
    totals = means.groupby(CELL)["bytes_per_token"].sum()
    return 10 ** np.floor(np.log10(positive.min())), 10 ** np.ceil(np.log10(totals.max()) + 0.02)


def _draw_bytes(ax: Axes, means: pd.DataFrame, facet: _Facet, limits: tuple[float, float]) -> None:
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
    byte_ticks(ax, zero, low, high)
    ax.set_title(facet.title, loc="left")
    ax.set_xlabel("TCP payload per token (bytes)")


def _draw_classes(ax: Axes, row: int, sizes: pd.DataFrame) -> None:
    """A mark per class; each class has its own height within the row, so that equal sizes do not hide each other."""
    known = sizes.dropna(subset="tensor_class")
    for name, size in zip(known["tensor_class"], known["bytes_per_token"], strict=True):
        _, colour, marker = CLASSES[name]
        offset = (list(CLASSES).index(name) - (len(CLASSES) - 1) / 2) * 0.095
        ax.plot(size, row + offset, marker=marker, ms=4.5, color=colour, mec="white", mew=0.3, ls="", zorder=4)


def _milliseconds(rows: pd.DataFrame) -> dict[str, list[float]]:
    """Each mode's trial medians in ms, in order of the trials."""
    cells = rows.sort_values("trial").groupby("mode", sort=False)["latency_median_s"]
    return {str(mode): (values * 1e3).tolist() for mode, values in cells}


def _extent(values: Sequence[float]) -> tuple[float, float]:
    """What a mode needs of the axis, in ms: its trials, and its interval within reason (n = 2 can span decades)."""
    interval = mean_interval(values)
    low, high = min(values), max(values)
    if interval.low is None or interval.high is None:
        return low, high
    return max(min(low, interval.low), low / 1.5), min(max(high, interval.high), high * 1.5)


def _clusters(rows: pd.DataFrame) -> list[tuple[float, float]]:
    """Ranges of ms that hold all modes: broken at gaps wider than a factor of `GAP`, the two widest of them at most."""
    extents = sorted(_extent(values) for values in _milliseconds(rows).values())
    reaches = list(itertools.accumulate((high for _, high in extents), max))
    gaps = sorted((extents[i + 1][0] / reaches[i], i + 1) for i in range(len(extents) - 1))
    cuts = sorted(i for width, i in gaps[-2:] if width > GAP)
    starts, ends = [0, *cuts], [*cuts, len(extents)]
    return [(extents[start][0], reaches[end - 1]) for start, end in zip(starts, ends, strict=True)]


def _share(rows: pd.DataFrame, cluster: tuple[float, float]) -> float:
    """The width of a part of a broken axis: more for more modes, but never less than what a tick takes."""
    low, high = cluster
    inside = sum(low <= _extent(values)[0] <= high for values in _milliseconds(rows).values())
    return float(np.clip(inside, 1.2, 4))


def _draw_latency(figure: Figure, box: Box, rows: pd.DataFrame, facet: _Facet) -> None:
    measured, clusters = _milliseconds(rows), _clusters(rows)
    shares = [_share(rows, cluster) for cluster in clusters]
    boxes = box.parts(shares)
    parts = [axes_in(figure, part) for part in boxes]
    for ax, part, (low, high) in zip(parts, boxes, clusters, strict=True):
        margin = max((high - low) * 0.08, high * 0.02)
        limits = (low - margin, high + margin)
        mode_axis(ax, facet.modes)
        ax.grid(axis="x", color=LIGHT, lw=0.6, zorder=1)
        _latency_ticks(ax, limits, part.width)
        for row, mode in enumerate(facet.modes):
            if mode in measured and low <= float(np.mean(measured[mode])) <= high:
                _draw_trials(ax, row, measured[mode], limits)
    for row, mode in enumerate(facet.modes):
        beside(parts[-1], row, _latency_text(measured.get(mode, [])))
    for left, right in itertools.pairwise(parts):
        _mark_break(left, right)
    parts[0].set_title(facet.title, loc="left")
    parts[int(np.argmax(shares))].set_xlabel(f"{'TTFT' if facet.kind == 'prefill' else 'ITL'} (ms)")


def _latency_ticks(ax: Axes, limits: tuple[float, float], width_in: float) -> None:
    """As many round ticks as fit, one at least."""
    low, high = limits
    ticks = [float(f"{(low + high) / 2:.2g}")]
    for bins in range(6, 0, -1):
        edges = np.asarray(MaxNLocator(bins, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
        inside = _without_overlap(edges.tolist(), limits, width_in)
        if inside:
            ticks = inside
            break
    ax.set_xlim(low, high)
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tick_text(x)))


def _without_overlap(ticks: Sequence[float], limits: tuple[float, float], width_in: float) -> list[float]:
    """The ticks whose labels lie within the axis, or none if two of those would touch."""
    low, high = limits
    places = [((tick - low) / (high - low) * width_in, text_width_in(_tick_text(tick)) / 2, tick) for tick in ticks]
    inside = [p for p in places if p[1] <= p[0] + BREAK_IN / 3 and p[0] + p[1] <= width_in + BREAK_IN / 3]
    touching = any(b[0] - b[1] - (a[0] + a[1]) < 0.08 for a, b in itertools.pairwise(inside))
    return [] if touching else [tick for _, _, tick in inside]


def _tick_text(milliseconds: float) -> str:
    return f"{milliseconds:,.5g}" if milliseconds < 1e4 else f"{milliseconds:,.0f}"


def _draw_trials(ax: Axes, row: int, values: Sequence[float], limits: tuple[float, float]) -> None:
    """A mode's trials, their mean, and its interval; an end that lies outside the axis becomes an arrow."""
    heights = row + (np.linspace(0.12, 0.3, len(values)) if len(values) > 1 else np.array([0.2]))
    ax.plot(values, heights, marker="o", ms=3, color=POINT_COLOUR, ls="", zorder=3)
    interval, height = mean_interval(values), row - 0.1
    ax.plot(float(np.mean(values)), height, marker="|", ms=8, mew=1.6, color=MEAN_COLOUR, zorder=4)
    if interval.low is None or interval.high is None:
        return
    ends = np.clip([interval.low, interval.high], *limits)
    ax.plot(ends, [height, height], color=MEAN_COLOUR, lw=1.2, zorder=4)
    for end, outside, arrow in (
        (0, interval.low < limits[0], CARETLEFT),
        (1, interval.high > limits[1], CARETRIGHT),
    ):
        if outside:
            ax.plot(ends[end], height, marker=arrow, ms=4, color=MEAN_COLOUR, zorder=4, clip_on=False)


def _latency_text(values: Sequence[float]) -> str:
    if not values:
        return "not run"
    mean = float(np.mean(values))
    return f"{mean:,.{0 if mean >= 99.95 else 1 if mean >= 9.995 else 2}f} ms"


def _mark_break(left: Axes, right: Axes) -> None:
    right.spines["left"].set_visible(False)
    right.tick_params(axis="y", labelleft=False)
    slash: dict[str, Any] = {
        "marker": [(-0.5, -1), (0.5, 1)],
        "ms": 6,
        "ls": "",
        "color": BLACK,
        "mew": 0.8,
        "clip_on": False,
    }
    left.plot([1], [0], transform=left.transAxes, **slash)
    right.plot([0], [0], transform=right.transAxes, **slash)


@dataclass(frozen=True)
class _Metric:
    """A column of a telemetry source as a panel; `sides` are the processes drawn, none for the GPU."""

    source: str
    column: str
    title: str
    scale: float
    sides: tuple[str, ...] = ()


METRICS = (
    _Metric("host", "cpu_percent", "CPU (%)", 1.0, ("client", "worker")),
    _Metric("host", "rss_bytes", "RSS (MB)", 1e-6, ("client", "worker")),
    _Metric("gpu", "gpu_percent", "GPU in use (%)", 1.0),
    _Metric("gpu", "gpm_sm_activity_percent", "SM activity (%)", 1.0),
    _Metric("gpu", "power_w", "GPU power (W)", 1.0),
)


def _telemetry_trials(trials: Trials, phase: str | None) -> list[Mapping[str, Any]]:
    """The manifests shown: one per mode, of one model, network and phase."""
    first = trials.manifests[0]["cell"]
    here = [m for m in trials.manifests if (m["cell"]["model"], m["cell"]["network"]) == (first["model"], first["network"])]
    phases = {m["cell"]["phase"]: m["cell"]["phase_spec"]["kind"] for m in here}
    if phase is not None and phase not in phases:
        raise ValueError(f"phase {phase!r} has no trials; those that do are {', '.join(phases)}")
    chosen = phase or next((name for name, kind in phases.items() if kind == "decode"), first["phase"])
    best: dict[str, Mapping[str, Any]] = {}
    for manifest in (m for m in here if m["cell"]["phase"] == chosen):
        held = best.get(manifest["cell"]["mode"])
        if held is None or manifest["cell"]["trial"] < held["cell"]["trial"]:
            best[manifest["cell"]["mode"]] = manifest
    return list(best.values())


def _samples(trials: Trials, metric: _Metric, manifest: Mapping[str, Any]) -> pd.DataFrame:
    frame = trials.host if metric.source == "host" else trials.gpu
    wanted = np.ones(len(frame), dtype=bool)
    for key, value in keys_of(manifest).items():
        wanted &= (frame[key] == value).to_numpy()
    return frame[wanted].dropna(subset=metric.column).sort_values("t_s")


def _sampled(trials: Trials, metric: _Metric, shown: Sequence[Mapping[str, Any]]) -> bool:
    return any(len(_samples(trials, metric, manifest)) for manifest in shown)


def _telemetry_notes(shown: Sequence[Mapping[str, Any]], metrics: Sequence[_Metric]) -> list[str]:
    notes = []
    for source, name in (("host", "CPU and memory"), ("gpu", "GPU utilisation and power")):
        if not any(metric.source == source for metric in metrics):
            reasons = dict.fromkeys(m["telemetry"][source].get("reason") or "no samples" for m in shown)
            notes += textwrap.wrap(f"{name}: not measured ({'; '.join(reasons)})", NOTE_LETTERS)
    return notes


def _telemetry_axes(lines: int, columns: int, notes: int) -> tuple[Figure, Any]:
    # A full page holds 14 modes.
    height_in = (0.78 if lines <= 8 else 0.6) * lines + 0.75 + 0.18 * notes
    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(lines, columns, squeeze=False, sharex="row", sharey="col")


def _draw_metric(ax: Axes, samples: pd.DataFrame, metric: _Metric, manifest: Mapping[str, Any]) -> None:
    start_s, end_s = manifest["measured"]["start_s"], manifest["measured"]["end_s"]
    ax.axvspan(0, end_s - start_s, color="#f0e442", alpha=0.35, lw=0, zorder=0)
    ax.grid(axis="y", color=LIGHT, lw=0.6)
    ax.yaxis.set_major_locator(MaxNLocator(3, min_n_ticks=2))
    if samples.empty:
        ax.text(0.5, 0.5, "no samples", transform=ax.transAxes, ha="center", va="center", color=GREY)
    for side, colour in (("client", CLIENT_COLOUR), ("worker", WORKER_COLOUR)):
        own = samples[samples["side"] == side] if metric.sides else samples
        if metric.sides or side == "worker":
            ax.plot(own["t_s"] - start_s, own[metric.column] * metric.scale, color=colour, lw=1.0)


def _telemetry_legend(figure: Figure, notes: Sequence[str]) -> None:
    label = "time from the start of the measured window (s)"
    figure.supxlabel("\n".join([label, *notes]), fontsize=8)
    shaded = Patch(color="#f0e442", alpha=0.35, label="measured window")
    client = Line2D([], [], color=CLIENT_COLOUR, label="client")
    worker = Line2D([], [], color=WORKER_COLOUR, label="worker (and its GPU)")
    legend(figure, [client, worker, shaded])


def _wrapped(mode: str) -> str:
    """A long name on two lines, broken at the underscore nearest its middle."""
    cuts = [i for i, letter in enumerate(mode) if letter == "_"]
    if len(mode) <= 14 or not cuts:
        return mode
    middle = min(cuts, key=lambda i: abs(i - len(mode) / 2))
    return f"{mode[: middle + 1]}\n{mode[middle + 1 :]}"
