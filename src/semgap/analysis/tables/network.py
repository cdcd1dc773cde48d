"""The table of networks: latency of each mode over each network, and the model of `price` fitted over all of them."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from semgap.analysis.cells import ENDINGS, LOCAL, first_of, frame_of, mean_of, paired_with, spread
from semgap.analysis.links import told, with_compute
from semgap.analysis.load import CELL, KEYS
from semgap.analysis.results import Results
from semgap.analysis.stats import Interval, mean_interval
from semgap.analysis.tables.price import METRICS, held_out, link_of, trial_latencies
from semgap.analysis.tables.render import Column, View

FITTED = ("compute_ms", "link_ms", "fitted_ms", "residual", "priced_ms", "price_error", "link_error")


COUNTED = ("round_trips_per_token", "up_payload_bytes_per_token", "down_payload_bytes_per_token")


NETWORK_COLUMNS = [
    *(*CELL, "trials", "network_kind", "asked_rtt_ms", "asked_rate_mbit_per_s"),
    *("rtt_ms", "goodput_up_mbit_per_s", "goodput_down_mbit_per_s", "link_reason"),
    *(f"{metric.lower()}_ms{ending}" for metric in METRICS for ending in ENDINGS),
    *(f"ratio_to_local{ending}" for ending in ENDINGS),
    *COUNTED,
    *(f"{metric.lower()}_{name}" for metric in METRICS for name in FITTED),
    *("priced_from", "price_reason"),
]


def network(results: Results) -> pd.DataFrame:
    """One row per model, network, prefill or decode phase, and mode: what was asked of the link, what it was, latencies, and the model.

    `compute_ms` is what is fitted: a mode's latency per token less what the link takes, the mean over its networks (those of
    `links.told`). `link_ms` is known, from the probe, the bytes and the round trips. `residual` is measured / their sum - 1. `priced_ms`
    and `price_error` are of `price.held_out`: the same with the network itself left out of the fit.
    """
    asks, rows = with_compute(results.asks), results.rows
    measured, link = (_per_cell(asks, name) for name in ("latency_s", "link_s"))
    compute = _per_cell(told(asks), "compute_s").groupby(level=["model", "mode", "phase", "metric"]).mean()
    fitted = {at: compute.get((at[0], *at[2:]), math.nan) for at in measured.index}  # a cell's network stands second
    priced = held_out(results.asks).set_index([*CELL, "metric"]).to_dict("index")
    table = []
    for keys, cell in rows[rows["phase_kind"] != "recovery"].groupby(CELL, sort=False):
        place = dict(zip(CELL, map(str, keys), strict=True))
        row = place | _link_columns(cell, asks) | {name: mean_of(cell[name]) for name in COUNTED} | _ratio_columns(cell, rows)
        for metric in METRICS:
            at = (*place.values(), metric)
            row |= _interval_columns(asks, place, metric)
            if at in priced:
                row |= _model_columns(metric, measured.loc[at], fitted[at], link.loc[at], priced[at])
        table.append(row)
    return frame_of(table, NETWORK_COLUMNS)


def _per_cell(asks: pd.DataFrame, column: str) -> pd.Series:
    """Seconds per token of a cell and metric: the mean over trials of the medians over asks."""
    return trial_latencies(asks, asks[column]).groupby([*CELL, "metric"], sort=False)["per_token_s"].mean()


def _link_columns(cell: pd.DataFrame, asks: pd.DataFrame) -> dict[str, Any]:
    """What was asked of the network, and the means over trials of what each probed before it began; goodput without the round trip."""
    local = first_of(cell["placement"]) == "local"
    probed = link_of(asks.merge(cell[KEYS], on=KEYS))
    per_byte = {"up": probed.up_s_per_byte, "down": probed.down_s_per_byte}
    known = not local and all(seconds > 0 for seconds in per_byte.values())
    untold = "the probe's transfer took no longer than its round trip; raise probe.payload_bytes"
    return {
        "trials": len(cell),
        "network_kind": first_of(cell["network_kind"]),
        "asked_rtt_ms": _scaled(first_of(cell["asked_rtt_s"]), 1e3),
        "asked_rate_mbit_per_s": _scaled(first_of(cell["asked_rate_bits_per_s"]), 1e-6),
        "rtt_ms": _scaled(mean_of(cell["probe_rtt_s"]), 1e3),
        **{f"goodput_{way}_mbit_per_s": 8e-6 / seconds if known else None for way, seconds in per_byte.items()},
        "link_reason": "local: nothing crosses a link" if local else None if known else untold,
    }


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _interval_columns(asks: pd.DataFrame, place: Mapping[str, str], metric: str) -> dict[str, Any]:
    own = asks[(asks[CELL] == pd.Series(place)).all(axis=1) & (asks["metric"] == metric)]
    interval = Interval(None, None, None, 0, f"no {metric} in this phase")
    if len(own):
        interval = mean_interval((trial_latencies(own, own["latency_s"])["per_token_s"] * 1e3).tolist())
    return spread(f"{metric.lower()}_ms", interval)


def _ratio_columns(cell: pd.DataFrame, rows: pd.DataFrame) -> dict[str, Any]:
    place = cell.iloc[0]
    local = rows[(rows["mode"] == LOCAL) & (rows[["model", "network", "phase"]] == place[["model", "network", "phase"]]).all(axis=1)]
    return spread("ratio_to_local", paired_with(cell, local if len(local) else None, LOCAL).ratio)


def _model_columns(metric: str, measured_s: float, compute_s: float, link_s: float, priced: Mapping[Any, Any]) -> dict[str, Any]:
    fitted_s = compute_s + link_s
    fit = (1e3 * compute_s, 1e3 * link_s, 1e3 * fitted_s, measured_s / fitted_s - 1)
    values = (*fit, 1e3 * priced["priced_s"], priced["error"], priced["link_error"])
    reason = {"priced_from": priced["from_networks"], "price_reason": priced["reason"]}
    return {f"{metric.lower()}_{name}": value for name, value in zip(FITTED, values, strict=True)} | reason


MODEL_NOTE = (
    "Compute: all of a mode's latency that is not the link, fitted over its networks. Link: round trips x RTT + bytes / goodput, of which "
    "nothing is fitted. Residual: measured / (compute + link) - 1. Priced: the same without this network in the fit, and its error "
    "against what was measured; of local, which has no link, that is noise between trials. Not compute: the error that is left where the "
    "worker's own compute in this cell, as it measured it, takes the place of that of the other networks."
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
        Column(f"{name}_link_error", "of it not compute (%)", "signed_percent", null="-"),
    )
    return View(f"Model of {metric}", columns, ("model", "phase", "mode"), MODEL_NOTE, collapses=True)


NETWORK_VIEWS = (
    View(
        "Network",
        (
            Column("mode", "mode"),
            Column("trials", "trials", "count"),
            Column("asked_rtt_ms", "asked: round trip (ms)", "digits", null="-"),
            Column("asked_rate_mbit_per_s", "rate (Mbit/s)", "digits", null="-"),
            Column("rtt_ms", "measured: round trip (ms)", "digits", reason="link_reason", null="-"),
            Column("goodput_up_mbit_per_s", "up (Mbit/s)", "digits", null="-"),
            Column("goodput_down_mbit_per_s", "down (Mbit/s)", "digits", null="-"),
            Column("itl_ms", "ITL (ms) [95% CI]", "digits", reason="itl_ms_reason", null="-"),
            Column("ttft_ms", "TTFT (ms) [95% CI]", "digits", reason="ttft_ms_reason", null="-"),
            Column("ratio_to_local", "x local [95% CI]", "ratio", reason="ratio_to_local_reason"),
        ),
        ("model", "phase", "network"),
        "Measured: by the probe of each trial before it began, means over trials; round trip of 64 bytes, goodput of payload. Latencies: "
        "a trial's is the median over what its client asked for, per token; means over trials with a 95% t interval.",
    ),
    *(_model_view(metric) for metric in METRICS),
)
