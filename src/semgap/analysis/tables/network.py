"""Table network: latency of each mode over each network, and the model of `links` fitted over all networks."""

import math
from typing import Any

import pandas as pd

from semgap.analysis.aggregate import alike, by_setting, first_of, mean_of, ratio_to_local
from semgap.analysis.columns import frame_of, interval_columns, mean_columns, with_endings
from semgap.analysis.held_out import trial_latencies
from semgap.analysis.links import separable, with_compute
from semgap.analysis.load import CELL, KEYS
from semgap.analysis.results import Results
from semgap.analysis.tables.render import Column, View

COUNTED = ("round_trips_per_token", "up_payload_bytes_per_token", "down_payload_bytes_per_token")
COLUMNS = [
    *(*CELL, "metric", "of_phase", "local", "trials", "network_kind", "asked_rtt_ms", "asked_rate_mbit_per_s"),
    *("rtt_ms", "goodput_up_mbit_per_s", "goodput_down_mbit_per_s", "link_reason", *with_endings("latency_ms", "ratio_to_local"), *COUNTED),
    *("compute_ms", "link_ms", "fitted_ms", "residual", "priced_ms", "price_error", "gap_ms", "gap_priced_ms", "gap_error"),
    *("gap_nominal_ms", "nominal_error", "priced_from", "price_reason"),
]
UNKNOWN_GOODPUT = "the probe's transfer took no longer than its round trip; raise probe.payload_bytes"


def table(results: Results) -> pd.DataFrame:
    """One row per model, network, prefill or decode phase, mode and metric: the configured and the probed link, latencies, and the model.

    `of_phase`: the metric that the phase measures; decode phases also have the TTFT of the prefills before. `compute_ms` is fitted: a
    mode's latency per token less its link, the mean over its networks (those in `links.separable`). `link_ms` is known from probe, bytes
    and round trips. `residual` is measured / (compute + link) - 1. Prices and errors come from `held_out`: without the network itself.
    """
    calls = with_compute(results.calls)
    measured, link = (_per_cell(calls, name) for name in ("latency_s", "link_s"))
    compute = _per_cell(separable(calls), "compute_s").groupby(level=["model", "mode", "phase", "metric"]).mean()
    priced = results.held_out.set_index([*CELL, "metric"]).to_dict("index")
    rows = []
    for setting, modes in by_setting(alike(results.rows)):
        for mode, trials in modes.items():
            cell = {key: {**setting, "mode": mode}[key] for key in CELL}
            shared = cell | _link_columns(trials, calls) | {name: mean_of(trials[name]) for name in COUNTED}
            own = calls.merge(trials[KEYS], on=KEYS)
            for metric in own["metric"].unique():
                at = (*cell.values(), metric)
                fitted_s = float(compute.get((at[0], *at[2:]), math.nan))  # without a cell's network, its second key
                of_phase = (metric == "TTFT") == (trials["phase_kind"].iloc[0] == "prefill")
                latency_s = trial_latencies(own[own["metric"] == metric], own["latency_s"])["per_token_s"]
                row = shared | {"metric": metric, "of_phase": of_phase, **mean_columns("latency_ms", 1e3 * latency_s)}
                row |= interval_columns("ratio_to_local", ratio_to_local(results.rows, setting, trials)) if of_phase else {}
                rows.append(row | _model_columns(measured.loc[at], fitted_s, link.loc[at], priced[at]))
    return frame_of(rows, COLUMNS)


def _per_cell(calls: pd.DataFrame, column: str) -> pd.Series:
    """Seconds per token of each cell and metric: the mean over trials, NaN if one is."""
    return trial_latencies(calls, calls[column]).groupby([*CELL, "metric"], sort=False)["per_token_s"].mean(skipna=False)


def _link_columns(trials: pd.DataFrame, calls: pd.DataFrame) -> dict[str, Any]:
    """The network by the config, and means over trials of their probes; goodput without the round trip of the transfer.

    A goodput is the mean of the seconds a byte, turned over; null if the probe of one trial could not tell them.
    """
    local = first_of(trials["placement"]) == "local"
    probes = calls.merge(trials[KEYS], on=KEYS).drop_duplicates(KEYS)
    per_byte = {way: mean_of(probes[f"{way}_s_per_byte"].where(lambda seconds: seconds > 0)) for way in ("up", "down")}
    return {
        "local": local,
        "trials": len(trials),
        "network_kind": first_of(trials["network_kind"]),
        "asked_rtt_ms": _scaled(first_of(trials["asked_rtt_s"]), 1e3),
        "asked_rate_mbit_per_s": _scaled(first_of(trials["asked_rate_bits_per_s"]), 1e-6),
        "rtt_ms": _scaled(mean_of(trials["probe_rtt_s"]), 1e3),
        **{f"goodput_{way}_mbit_per_s": 8e-6 / seconds if seconds else None for way, seconds in per_byte.items()},
        "link_reason": "local: nothing crosses a link" if local else None if all(per_byte.values()) else UNKNOWN_GOODPUT,
    }


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _model_columns(measured_s: float, compute_s: float, link_s: float, priced: dict[Any, Any]) -> dict[str, Any]:
    fitted_s = compute_s + link_s
    known = {"compute": compute_s, "link": link_s, "fitted": fitted_s, **{n: priced[f"{n}_s"] for n in ("priced", "gap", "gap_priced")}}
    return {
        **{f"{name}_ms": 1e3 * seconds for name, seconds in known.items()},
        "residual": measured_s / fitted_s - 1,
        "price_error": priced["error"],
        "gap_error": priced["gap_error"],
        "gap_nominal_ms": 1e3 * priced["gap_nominal_s"],
        "nominal_error": priced["nominal_error"],
        "priced_from": priced["from_networks"],
        "price_reason": priced["reason"],
    }


MODEL = ("model", "phase", "metric")
VIEWS = (
    View(
        "Network",
        (
            Column("mode", "mode"),
            Column("asked_rtt_ms", "set RTT (ms)", "digits", null="-"),
            Column("asked_rate_mbit_per_s", "set rate (Mbit/s)", "digits", null="-"),
            Column("rtt_ms", "RTT (ms)", "digits", reason="link_reason", null="-"),
            Column("goodput_up_mbit_per_s", "up (Mbit/s)", "digits", null="-"),
            Column("goodput_down_mbit_per_s", "down (Mbit/s)", "digits", null="-"),
            Column("latency_ms", "latency (ms)", "digits", reason="latency_ms_reason"),
            Column("ratio_to_local", "x local", "ratio", reason="ratio_to_local_reason"),
        ),
        "Set: by the config. RTT, up, down: means over trials of the probe before each trial; round trip of 64 bytes, goodput of payload. "
        "Latency: time per token, mean over trials with a 95% t interval, not adjusted for the number of rows.",
        by=("model", "phase", "network", "metric"),
        only=("of_phase", (True,)),
    ),
    View(
        "Network, fit of the model",
        (
            Column("mode", "mode"),
            Column("network", "network"),
            Column("latency_ms", "measured (ms)", "digits"),
            Column("compute_ms", "compute (ms)", "digits", null="-"),
            Column("link_ms", "link (ms)", "digits", null="-"),
            Column("residual", "residual (%)", "signed_percent", null="-"),
        ),
        "Compute: the mode's latency less the link, fitted over its networks. Link: round trips x RTT + bytes / goodput, without any "
        "fit. Residual: measured / (compute + link) - 1.",
        by=MODEL,
        only=("of_phase", (True,)),
    ),
    View(
        "Network, gaps measured and priced",
        (
            Column("mode", "mode"),
            Column("network", "network"),
            Column("gap_ms", "gap (ms)", "digits", null="-"),
            Column("gap_priced_ms", "priced (ms)", "digits", reason="price_reason", null="-"),
            Column("gap_error", "error (%)", "signed_percent", null="-"),
            Column("gap_nominal_ms", "by the set link (ms)", "digits", null="-"),
        ),
        "Gap: latency less compute by the clocks of worker and client. Priced: with this network left out, from its probe, or from the "
        "round trip and rate that the config sets.",
        by=MODEL,
        only=("of_phase", (True,)),
    ),
)
