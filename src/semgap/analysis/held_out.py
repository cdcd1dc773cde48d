"""Prices of recorded cells from the trials over the other networks, and how far they are from the measured latencies and gaps."""

from typing import Any

import numpy as np
import pandas as pd

from semgap.analysis.calls import ASKED
from semgap.analysis.columns import frame_of
from semgap.analysis.links import LEAST_COMPUTE, LINK, LinkModel, priced_s, separable, with_compute
from semgap.analysis.load import CELL, KEYS

METRICS = ("ITL", "TTFT")
ONE_NETWORK = "one network was run: no other one to price it from"
NOT_SEPARABLE = f"compute was less than {LEAST_COMPUTE:.0%} of the link over every network that was run: too little to separate the two"
COLUMNS = [
    *(*CELL, "metric", "measured_s", "priced_s", "error", "gap_s", "gap_priced_s", "gap_error_s", "gap_error"),
    *("gap_nominal_s", "nominal_error_s", "nominal_error", "from_networks", "reason"),
]


def trial_latencies(calls: pd.DataFrame, seconds: pd.Series) -> pd.DataFrame:
    """`per_token_s` of each trial and metric: `seconds` of its calls over their tokens, as the mean in results.csv; NaN if one is."""
    sums = calls.assign(seconds=seconds).groupby([*KEYS, "metric"], sort=False)[["seconds", "tokens"]].sum(skipna=False)
    return (sums["seconds"] / sums["tokens"]).rename("per_token_s").reset_index()


def link_of(calls: pd.DataFrame) -> LinkModel:
    """The link of a cell: means over its trials of their probes."""
    each = calls.drop_duplicates(KEYS)
    return LinkModel(*(float(each[name].mean()) for name in LINK))


def pooled_s(calls: pd.DataFrame, seconds: pd.Series) -> float:
    """Per token, the mean over networks of the means over their trials: each network counts once. Calls of one mode and metric."""
    networks, trials = (pd.factorize(calls[key])[0] for key in ("network", "trial"))
    of_trial, trial = np.unique(networks * (trials.max() + 1) + trials, return_inverse=True)
    per_token = np.bincount(trial, seconds.to_numpy(dtype="float64")) / np.bincount(trial, calls["tokens"])
    network = of_trial // (trials.max() + 1)
    return float((np.bincount(network, per_token) / np.bincount(network)).mean())


def held_out(calls: pd.DataFrame) -> pd.DataFrame:
    """Each cell and metric priced from the same mode's trials over the other networks, per token: `measured_s`, `priced_s`, `error`.

    `error` is priced / measured - 1; in local, which has no link, it is noise. The gap (latency less compute by the clocks of worker and
    client) is free of the compute that differs between trials: `gap_error_s` is priced - measured, `gap_error` that over the measured gap.
    These prices take the cell's own probe; `gap_nominal_s` and its errors take the link by the config alone, null if it sets none.
    `from_networks` names the networks behind the price; without any, the price is null and `reason` says why.
    """
    rows = []
    for keys, mode in with_compute(calls).groupby(["model", "mode", "phase", "metric"], sort=False):
        for network, cell in mode.groupby("network", sort=False):
            others = separable(mode[mode["network"] != network])
            row: dict[str, Any] = dict(zip(["model", "mode", "phase", "metric"], keys, strict=True)) | {"network": network}
            row |= {"measured_s": pooled_s(cell, cell["latency_s"]), "gap_s": _gap_s(cell, cell["latency_s"])}
            reason = None if len(others) else ONE_NETWORK if mode["network"].nunique() == 1 else NOT_SEPARABLE
            row |= _prices(cell, others, row) if len(others) else {}
            rows.append(row | {"from_networks": ", ".join(others["network"].unique()) or None, "reason": reason})
    return frame_of(rows, COLUMNS)


def _prices(cell: pd.DataFrame, others: pd.DataFrame, measured: dict[str, Any]) -> dict[str, float | None]:
    seconds = priced_s(others, link_of(cell))
    price, gap_s = pooled_s(others, seconds), _gap_s(others, seconds)
    row: dict[str, float | None] = {"priced_s": price, "error": price / measured["measured_s"] - 1}
    if (cell["round_trips"] == 0).all():
        return row
    row |= {"gap_priced_s": gap_s, "gap_error_s": gap_s - measured["gap_s"], "gap_error": gap_s / measured["gap_s"] - 1}
    asked_rtt_s, asked_s_per_byte = (float(cell[name].iloc[0]) for name in ASKED)
    nominal_s = _gap_s(others, priced_s(others, LinkModel(asked_rtt_s, asked_s_per_byte, asked_s_per_byte)))
    errors = {"nominal_error_s": nominal_s - measured["gap_s"], "nominal_error": nominal_s / measured["gap_s"] - 1}
    return row | {"gap_nominal_s": nominal_s} | errors


def _gap_s(calls: pd.DataFrame, seconds: pd.Series) -> float:
    """Seconds per token without compute; NaN if compute is not known."""
    return pooled_s(calls, seconds - calls["worker_compute"] - calls["client_compute"].astype("float64").fillna(0))
