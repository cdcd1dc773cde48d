"""What recorded trials would take over another link, and how far such prices are from what was measured."""

from typing import Any

import numpy as np
import pandas as pd

from semgap.analysis.cells import ENDINGS, LOCAL, first_of, frame_of, spread
from semgap.analysis.links import LINK, Link, priced_s, with_compute
from semgap.analysis.load import CELL, KEYS, Results
from semgap.analysis.render import Column, View
from semgap.analysis.stats import Interval, mean_interval, paired_ratio

METRICS = ("ITL", "TTFT")
ONE_NETWORK = "one network was run: no other one to price it from"


def trial_latencies(asks: pd.DataFrame, seconds: pd.Series) -> pd.DataFrame:
    """Of each trial and metric, `seconds` per token of its asks: `per_token_s`, the median over them, as in results.csv."""
    groups = asks.assign(per_token_s=seconds / asks["tokens"]).groupby([*KEYS, "metric"], sort=False)
    return groups["per_token_s"].median().reset_index()


def link_of(asks: pd.DataFrame) -> Link:
    """The link of a cell: means over its trials of what each probed."""
    each = asks.drop_duplicates(KEYS)
    return Link(*(float(each[name].mean()) for name in LINK))


def held_out(asks: pd.DataFrame) -> pd.DataFrame:
    """Each cell and metric priced from the same mode's trials over the other networks: CELL, `metric`, `priced_s`, `measured_s`, `error`.

    Per token. `error` is priced / measured - 1; of local, which has no link, it is what noise alone makes. `link_error` is what is left of
    it where the cell's own compute, as the worker measured it, takes the place of the other networks': compute differs between trials for
    reasons that are no link's. `from_networks` names those that were priced from; null, with no price, where there was no other one.
    """
    rows = []
    computed = with_compute(asks)
    for keys, mode in computed.groupby(["model", "mode", "phase", "metric"], sort=False):
        for network, cell in mode.groupby("network", sort=False):
            others = mode[mode["network"] != network]
            measured = _pooled(trial_latencies(cell, cell["latency_s"]))
            priced = _pooled(trial_latencies(others, priced_s(others, link_of(cell)))) if len(others) else None
            row = dict(zip(["model", "mode", "phase", "metric"], keys, strict=True)) | {"network": network, "measured_s": measured}
            error = None if priced is None else priced / measured - 1
            row |= {"link_error": _link_error(cell, others, measured)}
            row |= {"priced_s": priced, "error": error, "from_networks": ", ".join(others["network"].unique()) or None}
            rows.append(row)
    return frame_of(rows, [*CELL, "metric", "measured_s", "priced_s", "error", "link_error", "from_networks"])


def _link_error(cell: pd.DataFrame, others: pd.DataFrame, measured_s: float) -> float | None:
    """Null where the worker's compute is not known, as in local."""
    if others.empty or cell["worker_s"].isna().any() or others["worker_s"].isna().any():
        return None
    around_s = _pooled(trial_latencies(others, others["compute_s"] - others["worker_s"]))
    return (around_s + _pooled(trial_latencies(cell, cell["latency_s"] - cell["compute_s"] + cell["worker_s"]))) / measured_s - 1


def _pooled(latencies: pd.DataFrame) -> float:
    """The mean over networks of the means over their trials, so that each network counts once."""
    return float(latencies.groupby("network", sort=False)["per_token_s"].mean().mean())


PRICE_COLUMNS = [
    *("model", "phase", "mode", "metric", "networks", "cells", "median_error", "worst_error", "worst_network", "worst_mode"),
    *("median_link_error", "worst_link_error", "reason"),
]
ALL_REMOTE = "all but local"


def price_errors(results: Results) -> pd.DataFrame:
    """How far prices were from what was measured on networks that they were not made from: `held_out`, as |error|, median and worst.

    One row per model, phase, mode and metric, and one over all modes but local.
    """
    errors = held_out(results.asks)
    rows = []
    for keys, cells in errors.groupby(["model", "phase", "metric"], sort=False):
        place = dict(zip(["model", "phase", "metric"], keys, strict=True))
        rows += [place | {"mode": mode} | _worst(own) for mode, own in cells.groupby("mode", sort=False)]
        remote = cells[~cells["mode"].isin(_local_modes(results))]
        if len(remote):
            rows.append(place | {"mode": ALL_REMOTE} | _worst(remote))
    return frame_of(rows, PRICE_COLUMNS)


def _local_modes(results: Results) -> list[str]:
    return results.rows.loc[results.rows["placement"] == "local", "mode"].unique().tolist()


def _worst(cells: pd.DataFrame) -> dict[str, Any]:
    errors = cells["error"].abs().dropna()
    counts: dict[str, Any] = {"networks": cells["network"].nunique(), "cells": len(errors)}
    if errors.empty:
        return counts | {"reason": ONE_NETWORK}
    worst = cells.loc[[errors.idxmax()]]
    links = cells["link_error"].abs().dropna()
    counts |= {"median_link_error": links.median(), "worst_link_error": links.max()}
    named = {f"worst_{name}": worst[name].iloc[0] for name in ("network", "mode")}
    return counts | {"median_error": float(errors.median()), "worst_error": float(errors.max())} | named


PRICED_COLUMNS = [
    *("model", "phase", "mode", "trials"),
    *(f"{name}{ending}" for name in ("itl_ms", "ttft_ms", "tokens_per_s", "ratio_to_local") for ending in ENDINGS),
    *("payload_bytes_per_token", "itl_model_error", "ttft_model_error", "from_networks"),
]


def prices(results: Results, link: Link) -> pd.DataFrame:
    """What every recorded mode would take over `link`: one row per model, phase and mode.

    Intervals are over trials (means over the recorded networks of trials of one number), and each end is moved outwards by the worst
    error of the mode's prices on held-out networks. A ratio to local is of paired trials.
    """
    worst = price_errors(results).set_index(["model", "phase", "mode", "metric"])["worst_error"]
    asks = with_compute(results.asks)
    asks = asks.assign(priced_s=priced_s(asks, link)).merge(results.rows[[*KEYS, "session", "fingerprint", "placement"]], on=KEYS)
    payload = results.rows.groupby(["model", "phase", "mode"], sort=False)["payload_bytes_per_token"]
    rows = []
    for (model, phase), place in asks.groupby(["model", "phase"], sort=False):
        local = place[place["mode"] == LOCAL]
        for mode, own in place.groupby("mode", sort=False):
            errors = {metric: worst.get((model, phase, mode, metric), np.nan) for metric in METRICS}
            row = {"model": model, "phase": phase, "mode": mode} | _priced_row(own, local, errors)
            rows.append(row | {"payload_bytes_per_token": payload.get_group((model, phase, mode)).mean()})
    return frame_of(rows, PRICED_COLUMNS)


def _priced_row(own: pd.DataFrame, local: pd.DataFrame, errors: dict[str, float]) -> dict[str, Any]:
    is_local = first_of(own["placement"]) == "local"
    row: dict[str, Any] = {"trials": own["trial"].nunique(), "from_networks": ", ".join(own["network"].unique())}
    for metric in METRICS:
        error = 0.0 if is_local else errors[metric]
        values = by_trial(own, metric)["latency_s"] * 1e3
        interval = mean_interval(values.tolist()) if len(values) else Interval(None, None, None, 0, f"no {metric} in this phase")
        row |= spread(f"{metric.lower()}_ms", _widened(interval, error))
        row[f"{metric.lower()}_model_error"] = None if np.isnan(error) else error
    metric = "ITL" if (own["metric"] == "ITL").any() else "TTFT"
    error = 0.0 if is_local else errors[metric]
    row |= spread("tokens_per_s", _widened(mean_interval(_tokens_per_s(own[own["metric"] == metric])), error))
    return row | spread("ratio_to_local", _ratio(own, local, metric, error))


def _ratio(own: pd.DataFrame, local: pd.DataFrame, metric: str, error: float) -> Interval:
    if local.empty:
        return Interval(None, None, None, 0, f"{LOCAL} was not run")
    return _widened(paired_ratio(by_trial(own, metric), by_trial(local, metric), "latency_s").ratio, error)


def by_trial(asks: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One row per trial number, session and fingerprint: `latency_s`, the mean over networks of the trials' priced latencies."""
    keys = ["trial", "session", "fingerprint"]
    chosen = asks[asks["metric"] == metric]
    per_token = (chosen["priced_s"] / chosen["tokens"]).groupby([chosen[key] for key in ["network", *keys]], sort=False).median()
    return per_token.groupby(level=keys, sort=False).mean().rename("latency_s").reset_index()


def _tokens_per_s(asks: pd.DataFrame) -> list[float]:
    sums = asks.groupby(["trial", "network"], sort=False)[["tokens", "priced_s"]].sum()
    return (sums["tokens"] / sums["priced_s"]).groupby(level="trial", sort=False).mean().tolist()


def _widened(interval: Interval, error: float) -> Interval:
    """An interval with both ends moved outwards by the model's error, a fraction; NaN where that is not known, which is the reason."""
    if interval.value is None:
        return interval
    if not np.isnan(error):
        low, high = (None if end is None else end * by for end, by in ((interval.low, 1 - error), (interval.high, 1 + error)))
        return Interval(interval.value, low, high, interval.n, interval.reason)
    reason = "over trials alone: one network was run, so that the model's own error is not known"
    return Interval(interval.value, interval.low, interval.high, interval.n, "; ".join(filter(None, [interval.reason, reason])))


PRICE_VIEWS = (
    View(
        "Prices against what was measured",
        (
            Column("mode", "mode"),
            Column("metric", "metric"),
            Column("networks", "networks", "count"),
            Column("cells", "cells", "count"),
            Column("median_error", "median error (%)", "percent", reason="reason"),
            Column("worst_error", "worst error (%)", "percent"),
            Column("worst_network", "worst on", null="-"),
            Column("worst_mode", "worst mode", null="-"),
            Column("median_link_error", "not compute: median (%)", "percent", null="-"),
            Column("worst_link_error", "worst (%)", "percent", null="-"),
        ),
        ("model", "phase"),
        "Each network was left out once, and its cells priced from the same mode's trials over the other networks. Error: |priced / "
        "measured - 1|. What local shows has no link in it: it is noise between trials. Not compute: the error that is left where the "
        "worker's own compute in the cell, as it measured it, takes the place of that over the other networks.",
    ),
)
PRICED_VIEWS = (
    View(
        "Priced",
        (
            Column("mode", "mode"),
            Column("trials", "trials", "count"),
            Column("itl_ms", "ITL (ms) [interval]", "digits", reason="itl_ms_reason"),
            Column("ttft_ms", "TTFT (ms) [interval]", "digits", reason="ttft_ms_reason"),
            Column("tokens_per_s", "tokens/s", "digits"),
            Column("payload_bytes_per_token", "payload (B/token)", "count"),
            Column("ratio_to_local", "x local [interval]", "ratio", reason="ratio_to_local_reason"),
            Column("itl_model_error", "model's worst error, ITL (%)", "percent", null="not known"),
            Column("ttft_model_error", "TTFT (%)", "percent", null="not known"),
        ),
        ("model", "phase", "from_networks"),
        "Intervals: 95% t intervals over trials, each end moved outwards by the model's worst error on networks that were left out.",
    ),
)
