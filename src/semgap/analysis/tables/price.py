"""What recorded trials would take over another link, and how far such prices are from what was measured."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from semgap.analysis.cells import ENDINGS, LOCAL, first_of, frame_of, spread
from semgap.analysis.links import LEAST_COMPUTE, LINK, LinkModel, priced_s, told, with_compute
from semgap.analysis.load import CELL, KEYS
from semgap.analysis.results import Results
from semgap.analysis.stats import REMEASURE, Interval, exponentiated, mean_interval
from semgap.analysis.tables.render import Column, View

METRICS = ("ITL", "TTFT")


_TRIAL = ("network", "trial")


ONE_NETWORK = "one network was run: no other one to price it from"


NOT_TOLD = f"over every network that was run, compute was less than {LEAST_COMPUTE:.0%} of the link, and cannot be told from it"


NO_GOODPUT = "not every trial's probe could tell the goodput of its link"


UNTOLD_GOODPUT = (
    "a probe's transfer took no longer than its round trip, and what bytes took is priced as compute: raise probe.payload_bytes"
)


def trial_latencies(asks: pd.DataFrame, seconds: pd.Series) -> pd.DataFrame:
    """Of each trial and metric, `seconds` per token of its asks: `per_token_s`, the median over them, as in results.csv."""
    groups = asks.assign(per_token_s=seconds / asks["tokens"]).groupby([*KEYS, "metric"], sort=False)
    return groups["per_token_s"].agg(lambda values: values.median(skipna=False)).reset_index()


def link_of(asks: pd.DataFrame) -> LinkModel:
    """The link of a cell: means over its trials of what each probed."""
    each = asks.drop_duplicates(KEYS)
    return LinkModel(*(float(each[name].mean()) for name in LINK))


def held_out(asks: pd.DataFrame) -> pd.DataFrame:
    """Each cell and metric priced from the same mode's trials over the other networks: CELL, `metric`, `priced_s`, `measured_s`, `error`.

    Per token. `error` is priced / measured - 1; of local, which has no link, it is what noise alone makes. `link_error` is what is left of
    it where the cell's own compute, as the worker measured it, takes the place of the other networks': compute differs between trials for
    reasons that are no link's. `from_networks` names those that were priced from; null, with no price, where there was no other one, or
    none over which compute can be told from the link.
    """
    rows = []
    computed = with_compute(asks)
    for keys, mode in computed.groupby(["model", "mode", "phase", "metric"], sort=False):
        for network, cell in mode.groupby("network", sort=False):
            others = told(mode[mode["network"] != network])
            measured = _pooled(trial_latencies(cell, cell["latency_s"]))
            priced = _pooled(trial_latencies(others, priced_s(others, link_of(cell)))) if len(others) else None
            row = dict(zip(["model", "mode", "phase", "metric"], keys, strict=True)) | {"network": network, "measured_s": measured}
            error = None if priced is None else priced / measured - 1
            row |= {"link_error": _link_error(cell, others, measured)}
            row |= {"priced_s": priced, "error": error, "from_networks": ", ".join(others["network"].unique()) or None}
            reason = None if len(others) else ONE_NETWORK if mode["network"].nunique() == 1 else NOT_TOLD
            rows.append(row | {"reason": reason})
    return frame_of(rows, [*CELL, "metric", "measured_s", "priced_s", "error", "link_error", "from_networks", "reason"])


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
        return counts | {"reason": cells["reason"].iloc[0]}
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


@dataclass(frozen=True)
class _Errors:
    """By how much a mode's held-out prices were too high and too low at the most, as fractions of what was measured; NaN: none was."""

    above: float = 0.0
    below: float = 0.0

    @property
    def worst(self) -> float | None:
        return None if math.isnan(self.above) else max(self.above, self.below)

    @property
    def inverse(self) -> "_Errors":
        """Of one over it, at which what is too high is too low."""
        return _Errors(1 / (1 - self.below) - 1, 1 - 1 / (1 + self.above))

    def widened(self, interval: Interval) -> Interval:
        """An interval of prices that would hold what was measured where the prices were off the most. Also where no error is known."""
        if interval.value is None:
            return interval
        if not math.isnan(self.above):
            low, high = interval.low, interval.high
            low, high = low and low / (1 + self.above), high and high / (1 - self.below)
            return Interval(interval.value, low, high, interval.n, interval.reason)
        reason = "over trials alone: one network was run, so that the model's own error is not known"
        return Interval(interval.value, interval.low, interval.high, interval.n, "; ".join(filter(None, [interval.reason, reason])))


def _errors_of(held: pd.DataFrame) -> _Errors:
    errors = held["error"].dropna()
    return _Errors(max(0.0, errors.max()), max(0.0, -errors.min())) if len(errors) else _Errors(math.nan, math.nan)


def prices(results: Results, link: LinkModel) -> pd.DataFrame:
    """What every recorded mode would take over `link`: one row per model, phase and mode.

    Intervals are over trials (means over the recorded networks of trials of one number), and each end is moved outwards by the worst
    error of the mode's prices on held-out networks. A ratio to local is of paired trials. From networks over which compute can be told from
    the link (`links.told`); null with a reason where there is none.
    """
    held = held_out(results.asks).groupby(["model", "phase", "mode", "metric"], sort=False)
    errors = {at: _errors_of(cells) for at, cells in held}
    known = told(with_compute(results.asks))
    known = known.assign(priced_s=priced_s(known, link)).merge(results.rows[[*KEYS, "session", "fingerprint", "placement"]], on=KEYS)
    payload = results.rows.groupby(["model", "phase", "mode"], sort=False)["payload_bytes_per_token"]
    rows = []
    for (model, phase, mode), recorded in results.asks.groupby(["model", "phase", "mode"], sort=False):
        place = known[(known["model"] == model) & (known["phase"] == phase)]
        own, local = place[place["mode"] == mode], place[place["mode"] == LOCAL]
        local_itself = first_of(results.rows.loc[results.rows["mode"] == mode, "placement"]) == "local"
        of = {
            metric: _Errors() if local_itself else errors.get((model, phase, mode, metric), _Errors(math.nan, math.nan))
            for metric in METRICS
        }
        row = {"model": model, "phase": phase, "mode": mode} | _priced_row(recorded, own, local, of)
        rows.append(row | {"payload_bytes_per_token": payload.get_group((model, phase, mode)).mean()})
    return frame_of(rows, PRICED_COLUMNS)


def _priced_row(recorded: pd.DataFrame, own: pd.DataFrame, local: pd.DataFrame, errors: Mapping[str, _Errors]) -> dict[str, Any]:
    row: dict[str, Any] = {"trials": recorded["trial"].nunique(), "from_networks": ", ".join(own["network"].unique()) or None}
    asked = recorded["metric"].unique()
    for metric in METRICS:
        name = metric.lower()
        interval = _latency_ms(recorded, own, metric) if metric in asked else Interval(None, None, None, 0, f"no {metric} in this phase")
        row |= spread(f"{name}_ms", errors[metric].widened(interval))
        row[f"{name}_model_error"] = errors[metric].worst if metric in asked else None
    metric = "ITL" if "ITL" in asked else "TTFT"
    chosen = own[own["metric"] == metric]
    tokens = mean_interval(_tokens_per_s(chosen)) if len(chosen) else Interval(None, None, None, 0, NOT_TOLD)
    row |= spread("tokens_per_s", errors[metric].inverse.widened(tokens))
    return row | spread("ratio_to_local", _ratio(chosen, local[local["metric"] == metric], errors[metric]))


def _latency_ms(recorded: pd.DataFrame, own: pd.DataFrame, metric: str) -> Interval:
    chosen = own[own["metric"] == metric]
    if chosen.empty:
        return Interval(None, None, None, 0, NO_GOODPUT if recorded[[*LINK]].isna().any(axis=None) else NOT_TOLD)
    found = mean_interval((_by_trial(chosen).groupby("trial", sort=False)["latency_s"].mean() * 1e3).tolist())
    untold = UNTOLD_GOODPUT if (chosen["placement"] != "local").any() and (chosen[[*LINK[1:]]] == 0).any(axis=None) else None
    return Interval(found.value, found.low, found.high, found.n, "; ".join(filter(None, [found.reason, untold])) or None)


def _ratio(own: pd.DataFrame, local: pd.DataFrame, errors: _Errors) -> Interval:
    """Over trial numbers, each the geometric mean over networks of the ratios of trials that pair."""
    if own.empty or local.empty:
        return Interval(None, None, None, 0, NOT_TOLD if own.empty else f"{LOCAL} was not run")
    trials = _by_trial(own)
    pairs = trials.merge(_by_trial(local), on=[*_TRIAL, "session", "fingerprint"], suffixes=("", "_local"))
    logs = pairs.assign(log=np.log(pairs["latency_s"] / pairs["latency_s_local"])).groupby("trial", sort=False)["log"].mean()
    alone = len(trials) - len(pairs)
    reason = f"{alone} of {len(trials)} trials have no {LOCAL} over their network of the same session; {REMEASURE}" if alone else None
    if logs.empty:
        return Interval(None, None, None, 0, reason)
    found = exponentiated(mean_interval(logs.tolist()))
    return errors.widened(Interval(found.value, found.low, found.high, found.n, "; ".join(filter(None, [found.reason, reason])) or None))


def _by_trial(asks: pd.DataFrame) -> pd.DataFrame:
    """One row per network and trial number, with its session and fingerprint: `latency_s`, the priced latency per token."""
    per_token = (asks["priced_s"] / asks["tokens"]).groupby([asks[key] for key in (*_TRIAL, "session", "fingerprint")], sort=False)
    return per_token.median().rename("latency_s").reset_index()


def _tokens_per_s(asks: pd.DataFrame) -> list[float]:
    sums = asks.groupby(["trial", "network"], sort=False)[["tokens", "priced_s"]].sum()
    return (sums["tokens"] / sums["priced_s"]).groupby(level="trial", sort=False).mean().tolist()


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
