"""The table of `semgap price`: recorded trials over a link that was not run."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from semgap.analysis.calls import recorded_windows, with_window
from semgap.analysis.columns import frame_of, interval_columns, with_endings
from semgap.analysis.held_out import METRICS, NOT_SEPARABLE
from semgap.analysis.link_grid import LINK_COLUMNS, LinkGrid
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
CELL = ["model", "phase", "mode"]
TRIAL = ["network", "trial", "session", "fingerprint"]


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


def price(results: Results, link: LinkModel, window: int | None = None) -> pd.DataFrame:
    """Every recorded mode over `link`: one row per model, phase and mode. `window`: as in `recorded_with`.

    An interval is over trial numbers, each the mean over the recorded networks; the worst error of the mode's held-out prices moves its
    ends outwards. A ratio to local uses paired trials. Only networks whose compute is separable from the link count (`links.separable`);
    without any, the price is null with a reason.
    """
    return frame_of(recorded_with(results, window).rows(link), COLUMNS)


def recorded_with(results: Results, window: int | None = None) -> "Recorded":
    """The recorded trials. `window`: tokens of a call in modes with windows, in place of those recorded.

    ValueError for fewer, since a call's software was recorded for more tokens.
    """
    recorded = recorded_windows(results.calls).max() if len(results.calls) else 1
    if window is not None and window < recorded:
        raise ValueError(
            f"window {window} is shorter than the {recorded} tokens of a recorded call, and would be priced too low; record it"
        )
    return Recorded.of(results, window)


@dataclass(frozen=True)
class Group:
    """Calls of one model, phase and metric, by trial: of a mode, or of all local modes."""

    at: np.ndarray  # places in `Recorded.calls`
    trial: np.ndarray  # of each call, the place of its trial in `trials`
    trials: pd.DataFrame  # the columns `TRIAL`
    tokens: np.ndarray  # of each trial
    reason: str | None  # a limit of all its prices

    @classmethod
    def of(cls, calls: pd.DataFrame) -> "Group":
        """Of rows of `Recorded.calls`, at least one."""
        trial = calls.groupby(TRIAL, sort=False).ngroup().to_numpy()
        trials = calls[TRIAL].drop_duplicates(ignore_index=True)
        unknown = (calls["placement"] != "local").any() and (calls[[*LINK[1:]]] == 0).any(axis=None)
        return cls(calls.index.to_numpy(), trial, trials, np.bincount(trial, calls["tokens"]), UNKNOWN_GOODPUT if unknown else None)

    def per_token(self, values: np.ndarray) -> np.ndarray:
        """`values`, one for each of `Recorded.calls`, per token of each trial."""
        return np.bincount(self.trial, values[self.at]) / self.tokens

    def over_networks(self, each: np.ndarray) -> list[float]:
        """Of each trial number, the mean over its networks of a value for each trial."""
        return _means(self._numbers, each)

    @cached_property
    def _numbers(self) -> np.ndarray:
        return pd.factorize(self.trials["trial"])[0]


@dataclass(frozen=True)
class _Pairs:
    """Trials of a mode with trials of local: places in their groups, and of each pair the place of its trial number."""

    own: np.ndarray
    local: np.ndarray
    number: np.ndarray
    reason: str | None

    @classmethod
    def of(cls, own: pd.DataFrame, local: pd.DataFrame) -> "_Pairs":
        """Local crosses no link: over a network without it, its trials over the first one that has it count."""
        base = local.assign(local=range(len(local)))
        first = base[base["network"] == base["network"].iloc[0]]
        elsewhere = (first.assign(network=network) for network in sorted(set(own["network"]) - set(local["network"])))
        pairs = own.assign(own=range(len(own))).merge(pd.concat([base, *elsewhere]), on=TRIAL)
        alone = len(own) - len(pairs)
        reason = f"{alone} of {len(own)} trials have no local one over their network of the same session; {REMEASURE}" if alone else None
        return cls(pairs["own"].to_numpy(), pairs["local"].to_numpy(), pd.factorize(pairs["trial"])[0], reason)


@dataclass(frozen=True)
class Cell:
    """A mode in a phase: the columns that no link changes, and what the others are made of.

    `window`: the most tokens of a call. `metrics` were recorded; `groups` has those whose compute is separable from the link. `local`: the
    local modes' calls of `metric`.
    """

    row: Mapping[str, Any]
    window: int
    metrics: frozenset[str]
    groups: Mapping[str, Group]
    errors: Mapping[str, _Errors]
    local: Group | None
    pairs: _Pairs | None

    @property
    def metric(self) -> str:
        """The metric behind rate and ratio: ITL, in prefill phases TTFT."""
        return _chosen(self.metrics)

    def priced(self, seconds: np.ndarray) -> dict[str, Any]:
        """The columns that depend on the link, over which each of `Recorded.calls` takes `seconds`."""
        each = {metric: group.per_token(seconds) for metric, group in self.groups.items()}
        row: dict[str, Any] = {}
        for metric in METRICS:
            row |= interval_columns(f"{metric.lower()}_ms", self._latency_ms(metric, each))
        row |= interval_columns("tokens_per_s", self._tokens_per_s(each))
        return row | interval_columns("ratio_to_local", self._ratio(each, seconds))

    def _latency_ms(self, metric: str, each: Mapping[str, np.ndarray]) -> Interval:
        if metric not in self.metrics:
            return no_interval(f"no {metric} in this phase")
        if metric not in each:
            return no_interval(NOT_SEPARABLE)
        found = mean_interval(self.groups[metric].over_networks(1e3 * each[metric]))
        return self.errors[metric].widened(found.limited_by(self.groups[metric].reason))

    def _tokens_per_s(self, each: Mapping[str, np.ndarray]) -> Interval:
        if self.metric not in each:
            return no_interval(NOT_SEPARABLE)
        return self.errors[self.metric].inverse.widened(mean_interval(self.groups[self.metric].over_networks(1 / each[self.metric])))

    def _ratio(self, each: Mapping[str, np.ndarray], seconds: np.ndarray) -> Interval:
        """Over trial numbers, each the geometric mean over networks of the ratios of paired trials."""
        if self.local is None or self.pairs is None:
            return no_interval("no local mode was run" if self.metric in each else NOT_SEPARABLE)
        if not len(self.pairs.own):
            return no_interval(self.pairs.reason)
        logs = np.log(each[self.metric][self.pairs.own] / self.local.per_token(seconds)[self.pairs.local])
        found = exponentiated(mean_interval(_means(self.pairs.number, logs))).limited_by(self.pairs.reason)
        return self.errors[self.metric].widened(found)


@dataclass(frozen=True)
class Recorded:
    """Recorded trials as any link needs them: `calls` whose compute is separable, and the cells that they make up."""

    calls: pd.DataFrame
    cells: tuple[Cell, ...]

    @classmethod
    def of(cls, results: Results, window: int | None = None) -> "Recorded":
        """With `window`, modes with windows are as if each call had asked for so many tokens (`calls.with_window`)."""
        recorded = with_compute(results.calls)
        shaped = recorded if window is None else with_window(recorded, window)
        trials = results.rows[[*KEYS, "session", "fingerprint", "placement"]]
        known = shaped.loc[separable(recorded).index].merge(trials, on=KEYS)
        return cls(known, tuple(_cells(results, shaped, known)))

    def seconds(self, link: LinkModel) -> np.ndarray:
        """The time of each of `calls` over `link`."""
        return priced_s(self.calls, link).to_numpy(dtype="float64")

    def rows(self, link: LinkModel) -> list[dict[str, Any]]:
        """The rows of `price`."""
        seconds = self.seconds(link)
        return [{**cell.row, **cell.priced(seconds)} for cell in self.cells]

    def over(self, grid: LinkGrid) -> pd.DataFrame:
        """The rows of `price` over each link, which the columns `LINK_COLUMNS` name."""
        rows = [{**named, **row} for named, link in grid.links() for row in self.rows(link)]
        return frame_of(rows, [*LINK_COLUMNS, *COLUMNS])


def _cells(results: Results, shaped: pd.DataFrame, known: pd.DataFrame) -> Iterator[Cell]:
    local = results.rows.loc[results.rows["placement"] == "local", "mode"].unique()
    groups = {keys: Group.of(own) for keys, own in known.groupby([*CELL, "metric"], sort=False)}
    local_calls = known[known["mode"].isin(local)].groupby(["model", "phase", "metric"], sort=False)
    local_groups = {keys: Group.of(calls) for keys, calls in local_calls}
    errors = {at: _errors_of(cells) for at, cells in results.held_out.groupby([*CELL, "metric"], sort=False)}
    for at, calls in shaped.groupby(CELL, sort=False):
        metrics = frozenset(calls["metric"])
        own = {metric: groups[*at, metric] for metric in METRICS if (*at, metric) in groups}
        own_errors = {metric: _Errors() if at[2] in local else errors.get((*at, metric), UNKNOWN) for metric in METRICS}
        base, chosen = local_groups.get((*at[:2], _chosen(metrics))), own.get(_chosen(metrics))
        pairs = None if base is None or chosen is None else _Pairs.of(chosen.trials, base.trials)
        row = {**dict(zip(CELL, at, strict=True)), **_columns(calls, own, own_errors)}
        yield Cell(row, int(calls["tokens"].max()), metrics, own, own_errors, base, pairs)


def _columns(calls: pd.DataFrame, own: Mapping[str, Group], errors: Mapping[str, _Errors]) -> dict[str, Any]:
    """The columns of a mode in a phase that no link changes."""
    metrics = frozenset(calls["metric"])
    chosen = (
        calls[calls["metric"] == _chosen(metrics)].groupby(["network", "trial"], sort=False)[["up_bytes", "down_bytes", "tokens"]].sum()
    )
    networks = dict.fromkeys(network for network in calls["network"].unique() if any(_has(group, network) for group in own.values()))
    return {
        "trials": calls["trial"].nunique(),
        "payload_bytes_per_token": ((chosen["up_bytes"] + chosen["down_bytes"]) / chosen["tokens"]).mean(),
        **{f"{metric.lower()}_model_error": errors[metric].worst if metric in metrics else None for metric in METRICS},
        "from_networks": ", ".join(networks) or None,
    }


def _has(group: Group, network: str) -> bool:
    return bool((group.trials["network"] == network).any())


def _chosen(metrics: frozenset[str]) -> str:
    return "ITL" if "ITL" in metrics else "TTFT"


def _means(of: np.ndarray, values: np.ndarray) -> list[float]:
    """The mean of the values that have each place."""
    means: list[float] = (np.bincount(of, values) / np.bincount(of)).tolist()
    return means


def _errors_of(held: pd.DataFrame) -> _Errors:
    errors = held["error"].dropna()
    return _Errors(max(0.0, errors.max()), max(0.0, -errors.min())) if len(errors) else UNKNOWN


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
VIEWS_BY_LINK = tuple(replace(view, by=("rtt", "rate", *view.by)) for view in VIEWS)
"""Of prices over several links: a block for each."""
LOAD_VIEWS = (
    View(
        "Loads, priced",
        (
            Column("mode", "mode"),
            Column("concurrency", "N", "count"),
            Column("tokens_per_s", "tokens/s", "digits"),
            Column("itl_mean_ms", "mean ITL (ms)", "digits", null="-"),
            Column("occupancy", "at the engine", "digits"),
        ),
        "Closed loops of N requests. At the engine: those that are not on their way, mean over time. Table load has the errors of such "
        "prices on networks that were run.",
        by=("rtt", "model", "phase"),
    ),
)
