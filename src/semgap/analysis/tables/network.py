"""Table network: latency of each mode over each network, and the model of `links` fitted over all networks."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from semgap.analysis.aggregate import LOCAL, SETTING, first_of, latency_ratio, matching, mean_of
from semgap.analysis.columns import frame_of, interval_columns, with_endings
from semgap.analysis.held_out import METRICS, held_out, link_of, trial_latencies
from semgap.analysis.links import separable, with_compute
from semgap.analysis.load import CELL, KEYS
from semgap.analysis.results import Results
from semgap.analysis.stats import mean_interval, no_interval
from semgap.analysis.tables.render import Column, View

FITTED = ("compute_ms", "link_ms", "fitted_ms", "residual", "priced_ms", "price_error", "link_error")
COUNTED = ("round_trips_per_token", "up_payload_bytes_per_token", "down_payload_bytes_per_token")
COLUMNS = [
    *(*CELL, "trials", "network_kind", "asked_rtt_ms", "asked_rate_mbit_per_s"),
    *("rtt_ms", "goodput_up_mbit_per_s", "goodput_down_mbit_per_s", "link_reason"),
    *with_endings(*(f"{metric.lower()}_ms" for metric in METRICS), "ratio_to_local"),
    *COUNTED,
    *(f"{metric.lower()}_{name}" for metric in METRICS for name in FITTED),
    *("priced_from", "price_reason"),
]
UNKNOWN_GOODPUT = "the probe's transfer took no longer than its round trip; raise probe.payload_bytes"


def table(results: Results) -> pd.DataFrame:
    """One row per model, network, prefill or decode phase, and mode: the configured and the probed link, latencies, and the model.

    `compute_ms` is fitted: a mode's latency per token less its link, the mean over its networks (those in `links.separable`). `link_ms` is
    known from probe, bytes and round trips. `residual` is measured / (compute + link) - 1. `priced_ms` and `price_error` come from
    `held_out`: the same fit without the network itself.
    """
    calls, rows = with_compute(results.calls), results.rows
    measured, link = (_per_cell(calls, name) for name in ("latency_s", "link_s"))
    compute = _per_cell(separable(calls), "compute_s").groupby(level=["model", "mode", "phase", "metric"]).mean()
    fitted = {at: compute.get((at[0], *at[2:]), math.nan) for at in measured.index}  # without a cell's network, its second key
    priced = held_out(results.calls).set_index([*CELL, "metric"]).to_dict("index")
    table = []
    for keys, trials in rows[rows["phase_kind"] != "recovery"].groupby(CELL, sort=False):
        cell = dict(zip(CELL, map(str, keys), strict=True))
        row = cell | _link_columns(trials, calls) | {name: mean_of(trials[name]) for name in COUNTED} | _ratio_columns(trials, rows)
        for metric in METRICS:
            at = (*cell.values(), metric)
            row |= _latency_columns(calls, cell, metric)
            if at in priced:
                row |= _model_columns(metric, measured.loc[at], fitted[at], link.loc[at], priced[at])
        table.append(row)
    return frame_of(table, COLUMNS)


def _per_cell(calls: pd.DataFrame, column: str) -> pd.Series:
    """Seconds per token of each cell and metric: the mean over trials of the medians over calls."""
    return trial_latencies(calls, calls[column]).groupby([*CELL, "metric"], sort=False)["per_token_s"].mean()


def _link_columns(trials: pd.DataFrame, calls: pd.DataFrame) -> dict[str, Any]:
    """The network by the config, and means over trials of their probes; goodput without the round trip of the transfer."""
    local = first_of(trials["placement"]) == "local"
    probed = link_of(calls.merge(trials[KEYS], on=KEYS))
    per_byte = {"up": probed.up_s_per_byte, "down": probed.down_s_per_byte}
    known = not local and all(seconds > 0 for seconds in per_byte.values())
    return {
        "trials": len(trials),
        "network_kind": first_of(trials["network_kind"]),
        "asked_rtt_ms": _scaled(first_of(trials["asked_rtt_s"]), 1e3),
        "asked_rate_mbit_per_s": _scaled(first_of(trials["asked_rate_bits_per_s"]), 1e-6),
        "rtt_ms": _scaled(mean_of(trials["probe_rtt_s"]), 1e3),
        **{f"goodput_{way}_mbit_per_s": 8e-6 / seconds if known else None for way, seconds in per_byte.items()},
        "link_reason": "local: nothing crosses a link" if local else None if known else UNKNOWN_GOODPUT,
    }


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _latency_columns(calls: pd.DataFrame, cell: Mapping[str, str], metric: str) -> dict[str, Any]:
    own = matching(calls, {**cell, "metric": metric})
    interval = no_interval(f"no {metric} in this phase")
    if len(own):
        interval = mean_interval((trial_latencies(own, own["latency_s"])["per_token_s"] * 1e3).tolist())
    return interval_columns(f"{metric.lower()}_ms", interval)


def _ratio_columns(trials: pd.DataFrame, rows: pd.DataFrame) -> dict[str, Any]:
    local = matching(rows, {**trials.iloc[0][SETTING], "mode": LOCAL})
    modes = {"own": trials, LOCAL: local} if len(local) else {"own": trials}
    return interval_columns("ratio_to_local", latency_ratio(modes, "own", LOCAL))


def _model_columns(metric: str, measured_s: float, compute_s: float, link_s: float, priced: Mapping[Any, Any]) -> dict[str, Any]:
    fitted_s = compute_s + link_s
    fit = (1e3 * compute_s, 1e3 * link_s, 1e3 * fitted_s, measured_s / fitted_s - 1)
    values = (*fit, 1e3 * priced["priced_s"], priced["error"], priced["link_error"])
    reason = {"priced_from": priced["from_networks"], "price_reason": priced["reason"]}
    return {f"{metric.lower()}_{name}": value for name, value in zip(FITTED, values, strict=True)} | reason


MODEL_NOTE = (
    "Compute: the mode's latency less the link, fitted over its networks. Link: round trips x RTT + bytes / goodput, without any fit. "
    "Residual: measured / (compute + link) - 1. Priced: compute + link with this network left out of the fit, and its error against the "
    "measured latency; in local, which has no link, the error is noise between trials. Not compute: the error that remains if the cell's "
    "own compute, measured by the worker, replaces that of the other networks."
)


def _model_view(metric: str) -> View:
    name = metric.lower()
    columns = (
        Column("network", "network"),
        Column(f"{name}_ms", f"{metric} (ms)", "digits", null="-"),
        Column(f"{name}_compute_ms", "compute (ms)", "digits", null="-"),
        Column(f"{name}_link_ms", "link (ms)", "digits", null="-"),
        Column(f"{name}_residual", "residual (%)", "signed_percent", null="-"),
        Column(f"{name}_priced_ms", "priced (ms)", "digits", reason="price_reason"),
        Column(f"{name}_price_error", "error (%)", "signed_percent", null="-"),
        Column(f"{name}_link_error", "not compute (%)", "signed_percent", null="-"),
    )
    return View(f"Model of {metric}", columns, MODEL_NOTE, by=("model", "phase", "mode"), collapses=True)


VIEWS = (
    View(
        "Network",
        (
            Column("mode", "mode"),
            Column("trials", "trials", "count"),
            Column("asked_rtt_ms", "config: round trip (ms)", "digits", null="-"),
            Column("asked_rate_mbit_per_s", "rate (Mbit/s)", "digits", null="-"),
            Column("rtt_ms", "measured: round trip (ms)", "digits", reason="link_reason", null="-"),
            Column("goodput_up_mbit_per_s", "up (Mbit/s)", "digits", null="-"),
            Column("goodput_down_mbit_per_s", "down (Mbit/s)", "digits", null="-"),
            Column("itl_ms", "ITL (ms) [95% CI]", "digits", reason="itl_ms_reason", null="-"),
            Column("ttft_ms", "TTFT (ms) [95% CI]", "digits", reason="ttft_ms_reason", null="-"),
            Column("ratio_to_local", "x local [95% CI]", "ratio", reason="ratio_to_local_reason"),
        ),
        "Measured: means over trials of the probe before each trial; round trip of 64 bytes, goodput of payload. A trial's latency is the "
        "median over its calls, per token; values are means over trials with a 95% t interval.",
        by=("model", "phase", "network"),
    ),
    *(_model_view(metric) for metric in METRICS),
)
