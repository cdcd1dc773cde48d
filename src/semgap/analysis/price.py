"""The table of `semgap price`: recorded trials over a link that was not run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from semgap.analysis.columns import frame_of, interval_columns, with_endings
from semgap.analysis.held_out import METRICS, NOT_SEPARABLE
from semgap.analysis.links import LINK, LinkModel, priced_s, separable, with_compute
from semgap.analysis.load import KEYS
from semgap.analysis.results import Results
from semgap.analysis.stats import REMEASURE, Interval, exponentiated, mean_interval, no_interval
from semgap.analysis.tables.render import Column, View

COLUMNS = [
    *("model", "phase", "mode", "trials"),
    *with_endings("itl_ms", "ttft_ms", "tokens_per_s", "ratio_to_local"),
    *("payload_bytes_per_token", "itl_model_error", "ttft_model_error", "from_networks"),
]
UNKNOWN_GOODPUT = (
    "a probe's transfer took no longer than its round trip, so its transfer time is priced as compute: raise probe.payload_bytes"
)


@dataclass(frozen=True)
class _Errors:
    """The largest over- and underestimate of a mode's held-out prices, as fractions of the measured value; NaN if unknown."""

    above: float = 0.0
    below: float = 0.0

    @property
    def worst(self) -> float | None:
        return None if math.isnan(self.above) else max(self.above, self.below)

    @property
    def inverse(self) -> "_Errors":
        """The same errors for the reciprocal (tokens/s): over- and underestimates swap."""
        return _Errors(1 / (1 - self.below) - 1, 1 - 1 / (1 + self.above))

    def widened(self, interval: Interval) -> Interval:
        """An interval of prices with each end moved outwards by the worst error, or with a reason if the errors are unknown."""
        if interval.value is None:
            return interval
        if math.isnan(self.above):
            return interval.limited_by("over trials alone: one network was run, so that the model's own error is not known")
        low, high = interval.low, interval.high
        low, high = low and low / (1 + self.above), high and high / (1 - self.below)
        return Interval(interval.value, low, high, interval.n, interval.reason)


UNKNOWN = _Errors(math.nan, math.nan)


def price(results: Results, link: LinkModel) -> pd.DataFrame:
    """Every recorded mode over `link`: one row per model, phase and mode.

    An interval is over trial numbers, each the mean over the recorded networks; the worst error of the mode's held-out prices moves its
    ends outwards. A ratio to local uses paired trials. Only networks whose compute is separable from the link count (`links.separable`);
    without any, the price is null with a reason.
    """
    held = results.held_out.groupby(["model", "phase", "mode", "metric"], sort=False)
    errors = {at: _errors_of(cells) for at, cells in held}
    known = separable(with_compute(results.calls))
    known = known.assign(priced_s=priced_s(known, link)).merge(results.rows[[*KEYS, "session", "fingerprint", "placement"]], on=KEYS)
    payload = results.rows.groupby(["model", "phase", "mode"], sort=False)["payload_bytes_per_token"]
    locals_ = results.rows.loc[results.rows["placement"] == "local", "mode"].unique()
    rows = []
    for (model, phase, mode), recorded in results.calls.groupby(["model", "phase", "mode"], sort=False):
        here = known[(known["model"] == model) & (known["phase"] == phase)]
        own_errors = {metric: _Errors() if mode in locals_ else errors.get((model, phase, mode, metric), UNKNOWN) for metric in METRICS}
        row = {"model": model, "phase": phase, "mode": mode}
        row |= _price_columns(recorded, here[here["mode"] == mode], here[here["mode"].isin(locals_)], own_errors)
        rows.append(row | {"payload_bytes_per_token": payload.get_group((model, phase, mode)).mean()})
    return frame_of(rows, COLUMNS)


def _errors_of(held: pd.DataFrame) -> _Errors:
    errors = held["error"].dropna()
    return _Errors(max(0.0, errors.max()), max(0.0, -errors.min())) if len(errors) else UNKNOWN


def _price_columns(recorded: pd.DataFrame, own: pd.DataFrame, local: pd.DataFrame, errors: Mapping[str, _Errors]) -> dict[str, object]:
    row: dict[str, object] = {"trials": recorded["trial"].nunique(), "from_networks": ", ".join(own["network"].unique()) or None}
    metrics = recorded["metric"].unique()
    for metric in METRICS:
        interval = _latency_ms(own[own["metric"] == metric]) if metric in metrics else no_interval(f"no {metric} in this phase")
        row |= interval_columns(f"{metric.lower()}_ms", errors[metric].widened(interval))
        row[f"{metric.lower()}_model_error"] = errors[metric].worst if metric in metrics else None
    metric = "ITL" if "ITL" in metrics else "TTFT"
    chosen = own[own["metric"] == metric]
    tokens = mean_interval(_tokens_per_s(chosen)) if len(chosen) else no_interval(NOT_SEPARABLE)
    row |= interval_columns("tokens_per_s", errors[metric].inverse.widened(tokens))
    return row | interval_columns("ratio_to_local", _ratio(chosen, local[local["metric"] == metric], errors[metric]))


def _latency_ms(calls: pd.DataFrame) -> Interval:
    if calls.empty:
        return no_interval(NOT_SEPARABLE)
    found = mean_interval((_by_trial(calls).groupby("trial", sort=False)["latency_s"].mean() * 1e3).tolist())
    unknown = (calls["placement"] != "local").any() and (calls[[*LINK[1:]]] == 0).any(axis=None)
    return found.limited_by(UNKNOWN_GOODPUT if unknown else None)


def _ratio(own: pd.DataFrame, local: pd.DataFrame, errors: _Errors) -> Interval:
    """Over trial numbers, each the geometric mean over networks of the ratios of paired trials.

    Local crosses no link: over a network without it, its trials over the first one that has it count.
    """
    if own.empty or local.empty:
        return no_interval(NOT_SEPARABLE if own.empty else "no local mode was run")
    trials = _by_trial(own)
    alone_over = set(trials["network"]) - set(local["network"])
    elsewhere = _by_trial(local[local["network"] == local["network"].iloc[0]])
    base = pd.concat([_by_trial(local), *(elsewhere.assign(network=network) for network in sorted(alone_over))])
    pairs = trials.merge(base, on=["network", "trial", "session", "fingerprint"], suffixes=("", "_local"))
    logs = pairs.assign(log=np.log(pairs["latency_s"] / pairs["latency_s_local"])).groupby("trial", sort=False)["log"].mean()
    alone = len(trials) - len(pairs)
    reason = f"{alone} of {len(trials)} trials have no local one over their network of the same session; {REMEASURE}" if alone else None
    if logs.empty:
        return no_interval(reason)
    return errors.widened(exponentiated(mean_interval(logs.tolist())).limited_by(reason))


def _by_trial(calls: pd.DataFrame) -> pd.DataFrame:
    """`latency_s`, the priced latency per token, of each network and trial number, with session and fingerprint."""
    sums = calls.groupby(["network", "trial", "session", "fingerprint"], sort=False)[["priced_s", "tokens"]].sum(skipna=False)
    return (sums["priced_s"] / sums["tokens"]).rename("latency_s").reset_index()


def _tokens_per_s(calls: pd.DataFrame) -> list[float]:
    sums = calls.groupby(["trial", "network"], sort=False)[["tokens", "priced_s"]].sum()
    return (sums["tokens"] / sums["priced_s"]).groupby(level="trial", sort=False).mean().tolist()


VIEWS = (
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
        "Intervals: 95% t intervals over trials. The model's worst error on held-out networks moves each end outwards.",
        by=("model", "phase", "from_networks"),
    ),
)
