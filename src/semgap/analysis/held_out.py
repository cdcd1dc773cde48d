"""Prices of recorded cells from the trials over the other networks, and how far they are from the measured latencies."""

import pandas as pd

from semgap.analysis.columns import frame_of
from semgap.analysis.links import LEAST_COMPUTE, LINK, LinkModel, priced_s, separable, with_compute
from semgap.analysis.load import CELL, KEYS

METRICS = ("ITL", "TTFT")
ONE_NETWORK = "one network was run: no other one to price it from"
NOT_SEPARABLE = f"compute was less than {LEAST_COMPUTE:.0%} of the link over every network that was run: too little to separate the two"


def trial_latencies(calls: pd.DataFrame, seconds: pd.Series) -> pd.DataFrame:
    """`per_token_s` of each trial and metric: the median over its calls of `seconds` per token, as in results.csv."""
    groups = calls.assign(per_token_s=seconds / calls["tokens"]).groupby([*KEYS, "metric"], sort=False)
    return groups["per_token_s"].agg(lambda values: values.median(skipna=False)).reset_index()


def link_of(calls: pd.DataFrame) -> LinkModel:
    """The link of a cell: means over its trials of their probes."""
    each = calls.drop_duplicates(KEYS)
    return LinkModel(*(float(each[name].mean()) for name in LINK))


def held_out(calls: pd.DataFrame) -> pd.DataFrame:
    """Each cell and metric priced from the same mode's trials over the other networks, per token: `measured_s`, `priced_s`, `error`.

    `error` is priced / measured - 1; in local, which has no link, it is noise. `link_error` is the error that remains if the cell's own
    compute, measured by the worker, replaces that of the other networks: compute differs between trials for reasons other than the link.
    `from_networks` names the networks behind the price; without any, the price is null and `reason` says why.
    """
    rows = []
    for keys, mode in with_compute(calls).groupby(["model", "mode", "phase", "metric"], sort=False):
        for network, cell in mode.groupby("network", sort=False):
            others = separable(mode[mode["network"] != network])
            measured = _pooled(trial_latencies(cell, cell["latency_s"]))
            priced = _pooled(trial_latencies(others, priced_s(others, link_of(cell)))) if len(others) else None
            row = dict(zip(["model", "mode", "phase", "metric"], keys, strict=True)) | {"network": network, "measured_s": measured}
            row |= {"priced_s": priced, "error": priced and priced / measured - 1, "link_error": _link_error(cell, others, measured)}
            reason = None if len(others) else ONE_NETWORK if mode["network"].nunique() == 1 else NOT_SEPARABLE
            rows.append(row | {"from_networks": ", ".join(others["network"].unique()) or None, "reason": reason})
    return frame_of(rows, [*CELL, "metric", "measured_s", "priced_s", "error", "link_error", "from_networks", "reason"])


def _link_error(cell: pd.DataFrame, others: pd.DataFrame, measured_s: float) -> float | None:
    """Null if the worker's compute is unknown, as in local."""
    if others.empty or cell["worker_s"].isna().any() or others["worker_s"].isna().any():
        return None
    around_s = _pooled(trial_latencies(others, others["compute_s"] - others["worker_s"]))
    return (around_s + _pooled(trial_latencies(cell, cell["latency_s"] - cell["compute_s"] + cell["worker_s"]))) / measured_s - 1


def _pooled(latencies: pd.DataFrame) -> float:
    """The mean over networks of the means over their trials: each network counts once."""
    return float(latencies.groupby("network", sort=False)["per_token_s"].mean().mean())
