"""Tables network and price: latencies taken apart on one link and put together on another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
from intervals import Row, interval, mean
from run import Run, is_prefill, to_local
from trials import Series, Trial, asked_rtt_s, rate_bits_per_s


@dataclass(frozen=True)
class Link:
    """Round trip, and seconds a byte each way once the round trip of a transfer is taken off; 0 if it took no longer."""

    rtt_s: float
    up: float
    down: float

    @classmethod
    def probed(cls, trials: Sequence[Trial]) -> Link:
        """The mean over the trials' probes."""
        measured = [trial.manifest["network"]["measured"] for trial in trials]
        goodputs = [[each[f"goodput_{way}_bytes_per_s"] for each in measured] for way in ("up", "down")]
        a_byte = [float(np.mean([1 / each if each else 0.0 for each in goodput])) for goodput in goodputs]
        return cls(float(np.mean([each["rtt_s"] for each in measured])), *a_byte)

    @classmethod
    def nominal(cls, trial: Trial) -> Link | None:
        """By the network's row alone; None if it sets neither round trip nor rate."""
        rtt_s, goodput = (trial.manifest["network"]["asked"][key] for key in ("rtt_s", "goodput_bytes_per_s"))
        a_byte = 1 / goodput if goodput else 0.0
        return None if rtt_s is None and goodput is None else cls(rtt_s or 0.0, a_byte, a_byte)

    def frame_s(self, calls: pd.DataFrame) -> Series:
        return calls["down_frame_bytes"] * self.down / calls["frames"]

    def lead_s(self, calls: pd.DataFrame) -> Series:
        return calls["round_trips"] * self.rtt_s + calls["up_frame_bytes"] * self.up

    def call_s(self, calls: pd.DataFrame) -> Series:
        """RTT, bytes up, then c + (frames - 1) max(c, f) + f for a frame's compute c and its time f on the line."""
        frame = self.frame_s(calls)
        return self.lead_s(calls) + calls["own_s"] + (calls["frames"] - 1) * np.maximum(calls["own_s"], frame) + frame

    def own_s(self, calls: pd.DataFrame) -> Series:
        """A frame's compute, if none waited for the line: `call_s` the other way round."""
        return (calls["latency_s"] - self.lead_s(calls) - self.frame_s(calls)) / calls["frames"]


class Priced:
    """The calls of one metric of one mode over one network, each taken apart on its trial's own link."""

    def __init__(self, trials: Sequence[Trial], metric: str) -> None:
        self.trials, self.metric = trials, metric
        self.calls = pd.concat([self._calls(trial) for trial in trials])

    def _calls(self, trial: Trial) -> pd.DataFrame:
        kind = "prefill" if self.metric == "TTFT" else "decode"
        calls = trial.calls(trial.every_step.query("not warmup and kind == @kind"))
        calls["frames"] = np.ceil(calls["tokens"] / trial.policy["coalesce"]) if trial.policy["window"] > 1 and kind == "decode" else 1.0
        link = None if trial.is_local else Link.probed([trial])
        own_s, frame_s = (link.own_s(calls), link.frame_s(calls)) if link else (calls["latency_s"], 0.0)
        waited = (calls["frames"] > 1) & (own_s < frame_s)  # such a call does not show compute
        return calls.assign(trial=trial.trial, own_s=own_s.mask(waited), waited=waited)

    def per_token(self, seconds: Series) -> list[float]:
        """Of each trial: their sum over its tokens."""
        sums = self.calls.assign(seconds=seconds).groupby("trial")[["seconds", "tokens"]].sum(skipna=False)
        return list(sums["seconds"] / sums["tokens"])

    @property
    def computed_s(self) -> Series:
        """Everything but the link."""
        return self.calls["own_s"] * self.calls["frames"]

    def separable(self) -> bool:
        """True if no frame of a window waited for the line, and compute is at least a tenth of the link, by medians over the calls."""
        link_s = self.calls["latency_s"] - self.computed_s
        return bool(not self.calls["waited"].any() and self.computed_s.median() >= 0.1 * link_s.median())

    def gap_s(self) -> list[float]:
        return self.per_token(self.calls["latency_s"] - self.calls["compute_s"])

    def priced_s(self, link: Link | None, gap: bool = False) -> float:
        calls_s = link.call_s(self.calls) if link else self.calls["own_s"]
        return float(np.mean(self.per_token(calls_s - self.calls["compute_s"] if gap else calls_s)))


@cache
def network(run: Run) -> list[Row]:
    """Latency over each network, taken apart and priced from the others: t = compute + round trips x RTT + bytes / goodput.

    Without modes with `ahead`, whose windows overlap.
    """
    cells = {}
    for at, trials, _ in run.cells("prefill", "decode"):
        for metric in () if trials[0].policy["ahead"] else ("TTFT",) if is_prefill(trials) else ("ITL", "TTFT"):
            cells[at["model"], at["mode"], at["phase"], metric, at["network"]] = Priced(trials, metric)
    rows = []
    for (*same, at_network), cell in cells.items():
        others = {key[-1]: other for key, other in cells.items() if list(key[:-1]) == same}
        rows.append(network_row(run, cell, at_network, others))
    return rows


def network_row(run: Run, cell: Priced, at: str, networks: Mapping[str, Priced]) -> Row:
    trial, trials, local = cell.trials[0], cell.trials, cell.trials[0].is_local
    own = is_prefill(trials) == (cell.metric == "TTFT")
    rate, rtt = rate_bits_per_s(trial.network_spec), asked_rtt_s(trial.network_spec)
    row = {name: getattr(trial, name) for name in ("model", "network", "mode", "phase")}
    row |= {"metric": cell.metric, "of_phase": own, "local": local}
    row |= {"network_kind": trial.network_spec["kind"], "asked_rtt_ms": rtt and rtt * 1e3, "asked_rate_mbit_per_s": rate and rate / 1e6}
    row |= {"trials": len(trials)} | interval("latency_ms", cell.per_token(cell.calls["latency_s"]), 1e3)
    row |= {key: value for key, value in to_local(run, trials).items() if own and not key.endswith("_pairs")}
    carried = ("round_trips_per_token", "up_payload_bytes_per_token", "down_payload_bytes_per_token")
    row |= {name: mean(run.column(trials, name)) for name in carried} | {"gap_ms": mean(cell.gap_s(), 1e3)}
    others = [other for name, other in networks.items() if name != at and other.separable()]
    link = None if local else Link.probed(trials)
    row |= {} if local else link_columns(trials) | gap_columns(cell, others, link)
    compute_s = mean([float(np.mean(each.per_token(each.computed_s))) for each in networks.values() if each.separable()])
    link_s = mean(cell.per_token(cell.calls["latency_s"] - cell.computed_s))
    measured, priced = row["latency_ms"], mean([each.priced_s(link) for each in others], 1e3)
    fitted = None if compute_s is None or link_s is None else (compute_s + link_s) * 1e3
    row |= {
        "compute_ms": compute_s and compute_s * 1e3,
        "link_ms": None if link_s is None else link_s * 1e3,
        "fitted_ms": fitted,
        "priced_ms": priced,
    }
    return row | {"residual": fitted and measured / fitted - 1, "price_error": priced and priced / measured - 1}


def link_columns(trials: Sequence[Trial]) -> Row:
    """Means over the trials' probes, of goodputs the harmonic ones; null if one probe measured none."""
    measured, link = [trial.manifest["network"]["measured"] for trial in trials], Link.probed(trials)
    known = {way: all(each[f"goodput_{way}_bytes_per_s"] for each in measured) for way in ("up", "down")}
    return {"rtt_ms": link.rtt_s * 1e3} | {f"goodput_{way}_mbit_per_s": 8e-6 / getattr(link, way) for way in known if known[way]}


def gap_columns(cell: Priced, others: Sequence[Priced], link: Link) -> Row:
    """The gap's price from other networks over the cell's own link and over the one that the config names."""
    gap_s, nominal = float(np.mean(cell.gap_s())), Link.nominal(cell.trials[0])
    row: Row = {}
    for name, error, over in (("gap_priced_ms", "gap_error", link), ("gap_nominal_ms", "nominal_error", nominal)):
        priced = mean([each.priced_s(over, gap=True) for each in others]) if over else None
        row |= {name: priced and priced * 1e3, error: priced and priced / gap_s - 1}
    return row


def price(run: Run) -> list[Row]:
    """Median and worst absolute errors of the held-out prices of table network, by mode and over all remote modes."""
    cells = pd.DataFrame(network(run)).sort_index()
    if cells.empty:
        return []  # a run of loads alone
    rows = []
    for (model, phase, metric), group in cells.groupby(["model", "phase", "metric"], sort=False):
        by_mode = [(mode, each) for mode, each in group.groupby("mode", sort=False)]
        remote = group[~group["local"].astype(bool)]
        for mode, each in [*by_mode, ("all remote modes", remote)]:
            row = {"model": model, "phase": phase, "mode": mode, "metric": metric}
            row |= {"networks": each["network"].nunique(), "cells": each["priced_ms"].count() or None}
            rows.append(row | errors_of(each))
    return rows


def errors_of(cells: pd.DataFrame) -> Row:
    errors = {
        "error": cells["price_error"],
        "gap_error": cells["gap_error"],
        "gap_error_s": (cells["gap_priced_ms"] - cells["gap_ms"]) / 1e3,
        "nominal_error": cells["nominal_error"],
        "nominal_error_s": (cells["gap_nominal_ms"] - cells["gap_ms"]) / 1e3,
    }
    errors = {name: pd.to_numeric(values).abs() for name, values in errors.items()}
    row: Row = {
        f"{part}_{name}": getattr(values, how)()
        for name, values in errors.items()
        for part, how in (("median", "median"), ("worst", "max"))
    }
    ranked = (errors["gap_error_s"] if errors["gap_error_s"].notna().any() else errors["error"]).round(12)
    worst = cells.loc[ranked.idxmax()] if ranked.notna().any() else {"network": None, "mode": None}
    return row | {"worst_network": worst["network"], "worst_mode": worst["mode"]}
