"""Figure telemetry: samples of host and GPU over the time of a trial."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from semgap.analysis.aggregate import matching
from semgap.analysis.figures.facets import wrapped
from semgap.analysis.figures.panels import blank_figure
from semgap.analysis.figures.style import GREY, LIGHT, handle, legend, styled
from semgap.analysis.load import Trials, keys_of
from semgap.analysis.results import Results

CLIENT_COLOUR, WORKER_COLOUR = "#0072B2", "#D55E00"
SHADED: Mapping[str, Any] = {"color": "#f0e442", "alpha": 0.35}
NOTE_LETTERS = 105


@styled()
def plot(results: Results) -> Figure:
    """CPU, memory, and GPU use over time of one trial per mode (the lowest trial number), with the measured window shaded.

    Shows the first model and network, and their first decode phase, or else their first phase. Seconds count from the start of the
    measured window, on the client's clock. A note below names metrics without samples, with the sampler's reason.
    """
    trials = results.trials
    shown = _telemetry_trials(trials)
    metrics = [metric for metric in METRICS if any(len(_samples(trials, metric, manifest)) for manifest in shown)]
    notes = _telemetry_notes(shown, metrics)
    height_in = (0.78 if len(shown) <= 8 else 0.6) * len(shown) + 0.75 + 0.18 * len(notes)  # a full page holds 14 modes
    figure = blank_figure(height_in, layout="constrained")
    axes = figure.subplots(len(shown), max(len(metrics), 1), squeeze=False, sharex="row", sharey="col")
    for manifest, line in zip(shown, axes, strict=True):
        for metric, ax in zip(metrics, line, strict=False):
            _draw_metric(ax, _samples(trials, metric, manifest), metric, manifest)
        line[0].set_ylabel(wrapped(manifest["cell"]["mode"]), rotation=0, ha="right", va="center")
    for metric, ax in zip(metrics, axes[0], strict=False):
        ax.set_title(metric.title)
        # Last: a fixed limit stops the shared axis from growing with the lines.
        ax.set_ylim(bottom=0)
    figure.supxlabel("\n".join(["time from the start of the measured window (s)", *notes]), fontsize=8)
    sides = [handle("client", color=CLIENT_COLOUR), handle("worker (and its GPU)", color=WORKER_COLOUR)]
    legend(figure, [*sides, Patch(label="measured window", **SHADED)])
    return figure


@dataclass(frozen=True)
class _Metric:
    """A column of a telemetry source as a panel. The source `host` samples client and worker, `gpu` the worker's GPU."""

    source: str
    column: str
    title: str
    scale: float


METRICS = (
    _Metric("host", "cpu_percent", "CPU (%)", 1.0),
    _Metric("host", "rss_bytes", "RSS (MB)", 1e-6),
    _Metric("gpu", "gpu_percent", "GPU in use (%)", 1.0),
    _Metric("gpu", "gpm_sm_activity_percent", "SM activity (%)", 1.0),
    _Metric("gpu", "power_w", "GPU power (W)", 1.0),
)


def _telemetry_trials(trials: Trials) -> list[Mapping[str, Any]]:
    """The manifests to show: one per mode of one setting."""
    first = trials.manifests[0]["cell"]
    here = [m for m in trials.manifests if (m["cell"]["model"], m["cell"]["network"]) == (first["model"], first["network"])]
    phases = {m["cell"]["phase"]: m["cell"]["phase_spec"]["kind"] for m in here}
    chosen = next((name for name, kind in phases.items() if kind == "decode"), first["phase"])
    by_trial = sorted((m for m in here if m["cell"]["phase"] == chosen), key=lambda m: int(m["cell"]["trial"]), reverse=True)
    lowest = {m["cell"]["mode"]: m for m in by_trial}
    return [lowest[mode] for mode in dict.fromkeys(m["cell"]["mode"] for m in here) if mode in lowest]


def _samples(trials: Trials, metric: _Metric, manifest: Mapping[str, Any]) -> pd.DataFrame:
    frame = trials.host if metric.source == "host" else trials.gpu
    return matching(frame, keys_of(manifest)).dropna(subset=metric.column).sort_values("t_s")


def _telemetry_notes(shown: Sequence[Mapping[str, Any]], metrics: Sequence[_Metric]) -> list[str]:
    notes = []
    for source, name in (("host", "CPU and memory"), ("gpu", "GPU utilisation and power")):
        if not any(metric.source == source for metric in metrics):
            reasons = dict.fromkeys(m["telemetry"][source].get("reason") or "no samples" for m in shown)
            notes += textwrap.wrap(f"{name}: not measured ({'; '.join(reasons)})", NOTE_LETTERS)
    return notes


def _draw_metric(ax: Axes, samples: pd.DataFrame, metric: _Metric, manifest: Mapping[str, Any]) -> None:
    start_s, end_s = manifest["measured"]["start_s"], manifest["measured"]["end_s"]
    ax.axvspan(0, end_s - start_s, lw=0, zorder=0, **SHADED)
    ax.grid(axis="y", color=LIGHT, lw=0.6)
    ax.yaxis.set_major_locator(MaxNLocator(3, min_n_ticks=2))
    if samples.empty:
        ax.text(0.5, 0.5, "no samples", transform=ax.transAxes, ha="center", va="center", color=GREY)
    for side, colour in (("client", CLIENT_COLOUR), ("worker", WORKER_COLOUR)):
        own = samples[samples["side"] == side] if metric.source == "host" else samples
        if metric.source == "host" or side == "worker":
            ax.plot(own["t_s"] - start_s, own[metric.column] * metric.scale, color=colour, lw=1.0)
