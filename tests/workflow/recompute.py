"""Recomputes every number of results.csv and the tables from a run's raw files, and names each one that differs.

    python tests/workflow/recompute.py [RESULTS] [--configfile FILE ...]

It imports nothing of semgap: each formula is that of results/README.md and docs/method.md. It reads the trials, the exactness, the codecs
and the config; of the tables it reads only the numbers that it compares. Exit status 1 if one differs or a row is missing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import yaml
from scipy import optimize, stats

Row = dict[str, Any]
Series = pd.Series  # of float64
ROOT = Path(__file__).resolve().parents[2]
AT = ("model", "network", "phase", "mode")
RELATIVE, ABSOLUTE = 1e-9, 1e-12  # the second for differences of numbers that are nearly equal


@dataclass(frozen=True, eq=False)
class Trial:
    """One trial's manifest and tables. The keys of its cell (`mode`, `policy`, ...) are attributes; `steps` are the measured ones."""

    directory: Path
    manifest: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name in (cell := self.__dict__.get("manifest", {}).get("cell", {})):
            return cell[name]
        raise AttributeError(name)

    def table(self, name: str) -> pd.DataFrame:
        return pq.read_table(self.directory / f"{name}.parquet", partitioning=None).to_pandas()

    @property
    def is_local(self) -> bool:
        return bool(self.policy["placement"] == "local")

    @cached_property
    def every_step(self) -> pd.DataFrame:
        steps = self.table("steps")
        return steps.assign(compute_s=steps["worker_compute_s"] + steps["client_compute_s"])

    @cached_property
    def steps(self) -> pd.DataFrame:
        return self.every_step[self.every_step["measured"]]

    def calls(self, steps: pd.DataFrame | None = None) -> pd.DataFrame:
        """Sums over each call: a prefill, or the `window` decode steps of one request."""
        steps = self.steps if steps is None else steps
        summed = ["latency_s", "compute_s", "round_trips", "up_frame_bytes", "down_frame_bytes"]
        window = 1 if self.phase_spec["evict_fractions"] else self.policy["window"]
        by = [steps["request"], (steps["step"] + window - 1) // window]  # step 0 is the prefill
        return steps[summed].groupby(by).sum().assign(tokens=steps.groupby(by).size())

    @cached_property
    def floor_s(self) -> float | None:
        floor = self.manifest["floor"]
        return ratio(floor["step_bytes"], floor["read_bytes_per_s"])

    @cached_property
    def windows(self) -> pd.DataFrame:
        """Each window of the control: latency and compute of the mode's steps at its positions, and the undisturbed compute."""
        control = self.table("control")
        both = control.merge(self.steps, on=["request", "step"], suffixes=("_alone", ""))
        columns = {"latency_s": "latency_s", "compute_s": "compute_s", "compute_s_alone": "alone_s"}
        return both.groupby("window")[list(columns)].sum().rename(columns=columns).assign(tokens=both.groupby("window").size())

    def own(self, over: str = "compute_s", what: str = "latency_s") -> float | None:
        """The trial's own ratio: over compute of the same steps, or over the control's (`alone_s`), median over its windows."""
        if over == "compute_s":
            return ratio(self.steps[what].sum(), self.steps[over].sum())
        return float((self.windows[what] / self.windows[over]).median()) if len(self.windows) else None

    @cached_property
    def gap_s(self) -> float:
        return float((self.steps["latency_s"] - self.steps["compute_s"]).sum() / len(self.steps))


@dataclass(eq=False)
class Run:
    """Trials of the config's grid, without those kept apart, with the config's marks of modes and the other measurements."""

    results: Path
    config: dict[str, Any]

    @cached_property
    def trials(self) -> list[Trial]:
        found = []
        for model, network, mode, phase, number in self.grid():
            at = f"model={model}/network={network}/mode={mode}/phase={phase}/trial={number}"
            directory = self.results / "trials" / at
            found.append(Trial(directory, json.loads((directory / "manifest.json").read_text())))
        return [trial for trial in found if trial.manifest["apart"] is None]

    def grid(self) -> Iterator[tuple[str, str, str, str, int]]:
        """The cells: rows of modes and phases may name networks, and a mode that names no phases runs in none of kind recovery."""
        config, define = self.config, self.config["define"]
        for model, network, mode, phase in itertools.product(*(config[key] for key in ("models", "networks", "modes", "phases"))):
            row, phase_row = define["modes"][mode], define["phases"][phase]
            in_phase = phase in row["phases"] if row.get("phases") else phase_row["kind"] != "recovery"
            if in_phase and all(network in self._networks(each) for each in (row, phase_row)):
                yield from ((model, network, mode, phase, number) for number in range(1, config.get("trials", 3) + 1))

    def _networks(self, row: Mapping[str, Any]) -> list[str]:
        named = [network for network in self.config["networks"] if network in (row.get("networks") or [])]
        return named or self.config["networks"]

    def mark(self, mode: str) -> dict[str, Any]:
        return self.config["define"]["modes"][mode]

    @cached_property
    def rows(self) -> dict[Trial, Row]:
        """The row of results.csv of each trial."""
        return {trial: results_row(trial) for trial in self.trials}

    def column(self, trials: Iterable[Trial], name: str) -> list[Any]:
        return [self.rows[trial][name] for trial in trials]

    @cached_property
    def groups(self) -> dict[tuple[str, str, str], dict[str, list[Trial]]]:
        """Trials by model, network and phase, then by mode. All phases."""
        groups: dict[tuple[str, str, str], dict[str, list[Trial]]] = defaultdict(lambda: defaultdict(list))
        for trial in self.trials:
            groups[trial.model, trial.network, trial.phase][trial.mode].append(trial)
        return groups

    def cells(self, *kinds: str) -> Iterator[tuple[Row, list[Trial], dict[str, list[Trial]]]]:
        """Coordinates, trials, and the trials of all modes of the same model, network and phase."""
        for (model, network, phase), modes in self.groups.items():
            for mode, trials in modes.items():
                if trials[0].phase_spec["kind"] in kinds:
                    yield {"model": model, "network": network, "phase": phase, "mode": mode}, trials, modes

    @cached_property
    def exactness(self) -> list[Row]:
        define = self.config["define"]["modes"]
        checked = [
            m for m in self.config["modes"] if define[m].get("placement") == "local" or define[m].get("keeps", "bitwise") != "bitwise"
        ]
        ran = {trial.mode for trial in self.trials}
        files = [
            (model, mode, self.results / f"exactness/model={model}/mode={mode}.json")
            for model in self.config["models"]
            for mode in checked
            if mode in ran
        ]
        return [json.loads(path.read_text()) | {"model": model, "mode": mode} for model, mode, path in files]

    @cached_property
    def codecs(self) -> pd.DataFrame:
        files = [self.results / f"codecs/model={model}.parquet" for model in self.config["models"]]
        return pd.concat([pq.read_table(file, partitioning=None).to_pandas() for file in files], ignore_index=True)

    def locals_of(self, trial: Trial) -> list[Trial]:
        """Trials of the local mode in the same model and phase: over this network, or over the first one that has them."""
        where = [trial.network, *self.config["networks"]]
        for network in where:
            modes = self.groups.get((trial.model, network, trial.phase), {})
            if found := [each for trials in modes.values() for each in trials if each.is_local]:
                return found
        return []

    @property
    def base(self) -> str:
        """The lowest rung, run or not."""
        return next(iter(self.ladder(self.config["define"]["modes"])), "")

    def ladder(self, modes: Iterable[str]) -> list[str]:
        """Those of `modes` that are rungs, lowest first; a rung that was not run is skipped."""
        define = self.config["define"]["modes"]

        def height(mode: str | None) -> int:
            return 0 if mode is None else 1 + height(define[mode]["rung"].get("after"))

        return sorted((mode for mode in modes if define[mode].get("rung")), key=height)


# What the tables have in common: ratios, means and intervals.


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None or not b or math.isnan(a) or math.isnan(b) else float(a / b)


def is_null(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def mean(values: Sequence[Any], scale: float = 1.0) -> float | None:
    """The mean over trials; null if one trial has none."""
    return None if len(values) == 0 or any(map(is_null, values)) else float(np.mean(values)) * scale


def geometric_mean(values: Sequence[float | None]) -> float | None:
    return None if not values or any(map(is_null, values)) else float(np.exp(np.mean(np.log(np.array(values, dtype=float)))))


def half_width(values: Sequence[float]) -> float:
    """t(0.975, n - 1) s / sqrt(n)"""
    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))


def interval(name: str, values: Sequence[Any], scale: float = 1.0) -> Row:
    """Mean and its 95% t interval, which needs two trials."""
    middle = mean(values, scale)
    if middle is None or len(values) < 2:
        return {name: middle, f"{name}_low": None, f"{name}_high": None}
    half = half_width(values) * scale
    return {name: middle, f"{name}_low": middle - half, f"{name}_high": middle + half}


def log_interval(name: str, values: Sequence[Any]) -> Row:
    """Geometric mean and the t interval of the logarithms."""
    if not values or any(map(is_null, values)) or min(values) <= 0:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    return {
        key: value if value is None else math.exp(value) for key, value in interval(name, np.log(np.array(values, dtype=float))).items()
    }


def median_interval(name: str, values: Sequence[float], scale: float) -> Row:
    """Median; from 6 trials on the innermost pair of order statistics x(k), x(n+1-k) whose binomial coverage is at least 95%."""
    ordered, n = np.sort(np.array(values, dtype=float)) * scale, len(values)
    row = {name: float(np.median(ordered)), f"{name}_low": None, f"{name}_high": None}
    ranks = [k for k in range(1, n // 2 + 1) if 1 - 2 * stats.binom.cdf(k - 1, n, 0.5) >= 0.95]
    return row | ({f"{name}_low": ordered[ranks[-1] - 1], f"{name}_high": ordered[n - ranks[-1]]} if ranks else {})


def welch(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Difference of the means, its standard error and Welch's degrees of freedom."""
    va, vb = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1)) if va + vb > 0 else 1.0
    return float(np.mean(a) - np.mean(b)), math.sqrt(va + vb), float(freedom)


def welch_interval(name: str, a: Sequence[Any], b: Sequence[Any], scale: float = 1.0) -> Row:
    if min(len(a), len(b)) < 2 or any(map(is_null, [*a, *b])):
        known = a and b and not any(map(is_null, [*a, *b]))
        return {name: (np.mean(a) - np.mean(b)) * scale if known else None, f"{name}_low": None, f"{name}_high": None}
    middle, error, freedom = welch(a, b)
    half = stats.t.ppf(0.975, freedom) * error if error else 0.0
    return {name: middle * scale, f"{name}_low": (middle - half) * scale, f"{name}_high": (middle + half) * scale}


def paired(a: Sequence[Trial], b: Sequence[Trial]) -> list[tuple[Trial, Trial]]:
    """Trials of one number, session and fingerprint."""

    def key(trial: Trial) -> tuple[Any, ...]:
        return trial.trial, trial.manifest["session"], trial.manifest["fingerprint"]

    others = {key(trial): trial for trial in b}
    return [(trial, others[key(trial)]) for trial in a if key(trial) in others]


def paired_ratio(name: str, a: Sequence[Trial], b: Sequence[Trial], of: Callable[[Trial], float]) -> Row:
    pairs = paired(a, b)
    return log_interval(name, [of(x) / of(y) for x, y in pairs]) | {f"{name}_pairs": len(pairs)}


def byte_ratio(name: str, run: Run, a: Sequence[Trial], b: Sequence[Trial]) -> Row:
    """Payload bytes per token: exact if all trials of both modes agree, else a mean over trials of one number."""
    ours, base = ({t.trial: run.rows[t]["payload_bytes_per_token"] for t in trials} for trials in (a, b))
    if len(set(ours.values())) == len(set(base.values())) == 1:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), next(iter(ours.values())) / next(iter(base.values())))
    return interval(name, [ours[number] / base[number] for number in ours if number in base])


def latency_s(trial: Trial) -> float:
    return float(trial.steps["latency_s"].mean())


def compute_s(trial: Trial) -> float:
    return float(trial.steps["compute_s"].mean())


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment: the k-th smallest of n times n + 1 - k, never below the one before, at most 1."""
    known = sorted((value, at) for at, value in enumerate(values) if value is not None)
    adjusted: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (value, at) in enumerate(known):
        largest = max(largest, min(1.0, value * (len(known) - rank)))
        adjusted[at] = largest
    return adjusted


# One function a table.


def results_row(trial: Trial) -> Row:
    """One trial: sums over its measured steps / their number, medians over requests, and its manifest's totals."""
    steps, manifest, n = trial.steps, trial.manifest, len(trial.steps)
    setup, memory, spec = manifest["setup"], manifest["memory"], trial.network_spec
    total = {name: steps[name].sum() / n for name in steps.columns if name.endswith(("_bytes", "_segments")) or name == "round_trips"}
    calls = trial.calls()
    tcp, requests = trial.table("tcp"), trial.table("requests")
    requests = requests[~requests["warmup"]]
    header = tcp.loc[(tcp["side"] == "client") & (tcp["moment"] == "end"), "segment_header_bytes"].sum()
    payload = total["up_frame_bytes"] + total["down_frame_bytes"]
    uploads, held = setup.get("weights_bytes_by_session"), setup.get("weights_held_bytes_by_session")
    frames = pd.DataFrame(trial.table("ledger")).assign(nbytes=lambda rows: rows["payload_bytes"] + rows["header_bytes"])

    def crossed(side: str, kind: str) -> int:
        return int(frames.loc[(frames["side"] == side) & (frames["link"] == "network") & (frames["kind"] == kind), "nbytes"].sum())

    def step_mean(name: str) -> float | None:
        return None if steps[name].isna().any() else float(steps[name].mean())

    row = {name: getattr(trial, name) for name in ("model", "network", "mode", "phase", "trial")}
    row |= {
        "phase_kind": trial.phase_spec["kind"],
        "session": manifest["session"],
        "fingerprint": manifest["fingerprint"],
        "device": manifest["device"],
        "cell_digest": manifest["cell_digest"],
        "placement": trial.policy["placement"],
        "keeps": trial.policy["keeps"],
        "reply_kind": trial.policy["reply"]["kind"],
        "cut_to_steps": manifest["cut"] and manifest["cut"]["steps"],
        "network_kind": spec["kind"],
        "asked_rtt_s": asked_rtt_s(spec),
        "asked_rate_bits_per_s": rate_bits_per_s(spec),
        "measured_steps": n,
        "steal_share": manifest["steal_share"],
        "latency_median_s": float((calls["latency_s"] / calls["tokens"]).median()),
        "latency_mean_s": latency_s(trial),
        "latency_p95_s": float(np.percentile(calls["latency_s"] / calls["tokens"], 95)) if len(calls) >= 20 else None,
        "tokens_per_s": n / steps["latency_s"].sum(),
        "tensor_bytes_per_token": total["up_tensor_bytes"] + total["down_tensor_bytes"],
        "payload_bytes_per_token": payload,
        "wire_bytes_per_token": payload + (total["up_segments"] + total["down_segments"]) * header,
        "up_payload_bytes_per_token": total["up_frame_bytes"],
        "down_payload_bytes_per_token": total["down_frame_bytes"],
        "up_encoded_bytes_per_token": total["up_payload_bytes"],
        "down_encoded_bytes_per_token": total["down_payload_bytes"],
        "down_tensor_bytes_per_token": total["down_tensor_bytes"],
        "round_trips_per_token": total["round_trips"],
        "ttft_s": float(requests["ttft_s"].median()),
        "tpot_s": float(requests["tpot_s"].median()),
        "setup_payload_bytes": crossed("client", "setup"),
        "delta_payload_bytes": crossed("worker_to_kv_host", "delta"),
        "cached_weights_bytes": held[0] if held else None,
        "weights_put_mb_per_s": ratio(setup.get("weights_bytes"), setup.get("weights_put_s", 0) * 1e6)
        if setup.get("weights_bytes")
        else None,
        "earlier_sessions_weights_bytes": sum(uploads[:-1]) if uploads and len(uploads) > 1 else None,
        "samplers_core_share": samplers_share(manifest["telemetry"]),
    }
    means = ("client_cpu_s", "worker_cpu_s", "worker_compute_s", "gpu_s")
    row |= {f"{name}_per_token": step_mean(name) for name in means}
    row["gpu_time_share"] = ratio(row["gpu_s_per_token"], row["latency_mean_s"])
    from_setup = ("worker_start_s", "connect_s", "weights_upload_s", "weights_put_s", "client_start_s", "head_load_s")
    row |= {name: setup.get(name) for name in (*from_setup, "weights_bytes", "head_bytes")}
    row["weights_held_bytes"] = None if setup.get("weights_held_before") else setup.get("weights_held_bytes")
    row |= {name: memory[name] for name in ("client_peak_rss_anon_bytes", "worker_peak_rss_bytes", "worker_weight_store_bytes")}
    probed = ("rtt_s", "goodput_up_bytes_per_s", "goodput_down_bytes_per_s")
    row |= {f"probe_{name}": manifest["probe"] and manifest["probe"][name] for name in probed}
    exactness = ("tokens_compared", "tokens_equal", "edge_draws", "logits_bitwise", "max_abs_diff", "max_kl_nats", "promise_kept")
    row |= {name: manifest["exactness"][name] for name in exactness}
    for source in ("host", "gpu", "dmon"):
        costs = [cost for cost in manifest["telemetry"].get(source, {}).get("cost", {}).values() if cost]
        row[f"{source}_sampler_cpu_s_per_sample"] = ratio(sum(c["cpu_s"] for c in costs), sum(c["samples"] for c in costs))
    return row | (dict.fromkeys(GPU_COLUMNS) | {"gpu_samples": 0, "gpm_windows": 0} if trial.table("gpu").empty else {})


GPU_COLUMNS = (
    *("gpu_util_percent", "gpu_power_w", "gpu_sm_activity_percent", "gpu_sm_occupancy_percent", "gpu_tensor_activity_percent"),
    *(
        "gpu_dram_bandwidth_percent",
        "gpu_pcie_tx_mib_per_s",
        "gpu_pcie_rx_mib_per_s",
        "joules_per_token",
        "gpu_energy_j",
        "gpu_energy_check",
    ),
)


def asked_rtt_s(spec: Mapping[str, Any]) -> float | None:
    if spec.get("rtt_ms") is not None:
        return float(spec["rtt_ms"]) / 1e3
    return None if spec.get("delay_ms") is None else 2 * spec["delay_ms"] / 1e3


def rate_bits_per_s(spec: Mapping[str, Any]) -> float | None:
    units = {"kbit": 1e3, "Mbit": 1e6, "Gbit": 1e9}
    rate = spec.get("rate")
    return next((float(rate.removesuffix(unit)) * factor for unit, factor in units.items() if rate.endswith(unit)), None) if rate else None


def samplers_share(telemetry: Mapping[str, Any]) -> float | None:
    """CPU time of the samplers over wall time, all sources and both sides."""
    costs = [cost for name in ("host", "gpu", "dmon") for cost in telemetry.get(name, {}).get("cost", {}).values() if cost]
    return sum(cost["core_share"] for cost in costs) if costs else None


def results(run: Run) -> list[Row]:
    return list(run.rows.values())


def gap(run: Run) -> list[Row]:
    """latency = compute + codec + link, gap = latency - compute, per token; ratios to undisturbed steps as geometric means over trials."""
    rows = []
    effects = {key: power(run, modes) for key, modes in run.groups.items()}
    for at, trials, _ in run.cells("prefill", "decode"):
        prefill = is_prefill(trials)
        part = {name: [float(t.steps[name].mean()) for t in trials] for name in ("worker_compute_s", "client_compute_s")}
        part |= {
            name: [None if t.is_local else float(t.steps[name].mean()) for t in trials] for name in ("client_codec_s", "worker_codec_s")
        }
        codec = [None if t.is_local else t.steps["client_codec_s"].mean() + t.steps["worker_codec_s"].mean() for t in trials]
        medians = [gap_per_call(t.calls()).median() for t in trials]
        floors = [None if prefill else t.floor_s for t in trials]
        row = at | {"latency_metric": "TTFT" if prefill else "ITL", "trials": len(trials), "calls_per_trial": len(trials[0].calls())}
        row |= interval("latency_ms", list(map(latency_s, trials)), 1e3) | interval("compute_ms", list(map(compute_s, trials)), 1e3)
        row |= interval("gap_ms", [t.gap_s for t in trials], 1e3) | interval("gap_median_ms", medians, 1e3)
        row |= {f"{name}ms": mean(values, 1e3) for name, values in ((key[:-1], values) for key, values in part.items())}
        row["link_ms"] = mean([None if c is None else t.gap_s - c for t, c in zip(trials, codec, strict=True)], 1e3)
        row["floor_ms"] = mean(floors, 1e3)
        row |= log_interval("compute_to_floor", [ratio(a, b) for a, b in zip(part["worker_compute_s"], floors, strict=True)])
        row |= log_interval("own_ratio", [t.own() for t in trials])
        row |= log_interval("control_ratio", [t.own("alone_s") for t in trials])
        row |= log_interval("compute_to_control", [t.own("alone_s", "compute_s") for t in trials])
        row["control_windows"] = mean([len(t.windows) for t in trials])
        row |= to_local(run, trials)
        row |= paired_ratio("compute_to_local", trials, [] if trials[0].is_local else run.locals_of(trials[0]), compute_s)
        low, high = row["compute_to_local_low"], row["compute_to_local_high"]
        if low is not None and high is not None:
            row["compute_verdict"] = "slower" if low > 1 else "faster" if high < 1 else "no difference found"
        rows.append(row | effects[at["model"], at["network"], at["phase"]])
    return rows


def gap_per_call(calls: pd.DataFrame) -> Series:
    return (calls["latency_s"] - calls["compute_s"]) / calls["tokens"]


def is_prefill(trials: Sequence[Trial]) -> bool:
    return bool(trials[0].phase_spec["kind"] == "prefill")


def to_local(run: Run, trials: Sequence[Trial]) -> Row:
    return paired_ratio("ratio_to_local", trials, run.locals_of(trials[0]), latency_s)


def power(run: Run, modes: Mapping[str, list[Trial]]) -> Row:
    """The smallest effects that a two-sided test at 5% finds in 80% of cases, of modes that are a rung, a twin or have claims."""
    marked = [mode for mode in modes if any(run.mark(mode).get(key) for key in ("rung", "twin", "claims"))]
    marked = marked or [mode for mode, trials in modes.items() if not trials[0].is_local]
    over = "alone_s" if all(len(t.windows) for mode in marked for t in modes[mode]) else "compute_s"
    gaps = [[t.gap_s * 1e3 for t in modes[mode]] for mode in marked]
    owns = [[math.log(t.own(over)) for t in modes[mode]] for mode in marked]
    base = modes.get(run.base, [])
    pairs = [[math.log(latency_s(a) / latency_s(b)) for a, b in paired(modes[mode], base)] for mode in marked if mode != run.base]
    gap_ms, own, pair = smallest_effect(gaps, 2), smallest_effect(owns, 2), smallest_effect(pairs, 1)
    return {"smallest_gap_ms": gap_ms, "smallest_ratio": own and math.expm1(own), "smallest_paired_ratio": pair and math.expm1(pair)}


def smallest_effect(groups: Sequence[Sequence[float]], samples: int) -> float | None:
    """d s sqrt(samples / n): pooled spread s, fewest trials n, and the shift d that the test finds, over quantiles of the spreads shown."""
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        return None
    freedom, n = sum(len(group) - 1 for group in groups), min(map(len, groups))
    spread = math.sqrt(sum(np.var(group, ddof=1) * (len(group) - 1) for group in groups) / freedom)
    count = 120 if samples == 2 else 2000
    shown = stats.chi2.ppf((np.arange(count) + 0.5) / count, n - 1) / (n - 1)  # variance of a sample, over the true one
    one, other = np.meshgrid(shown, shown) if samples == 2 else (shown, shown)
    degrees = (n - 1) * (one + other) ** 2 / (one**2 + other**2) if samples == 2 else n - 1
    edge = stats.t.ppf(0.975, degrees) * np.sqrt((one + other) / 2)
    shift = optimize.brentq(lambda d: np.mean(stats.norm.sf(edge - d) + stats.norm.cdf(-edge - d)) - 0.8, 0, 100, xtol=1e-13)
    return float(shift * spread * math.sqrt(samples / n))


def summary(run: Run) -> list[Row]:
    """Means over trials of the columns of results.csv."""
    rows = []
    for at, trials, modes in run.cells("prefill", "decode"):
        prefill = is_prefill(trials)

        def of(name: str, trials: Sequence[Trial] = trials) -> list[Any]:
            return run.column(trials, name)

        latency = of("latency_mean_s")
        row = at | {
            "latency_metric": "TTFT" if prefill else "ITL",
            "trials": len(trials),
            "keeps": of("keeps")[0],
            "cut_to_steps": of("cut_to_steps")[0],
        }
        row |= {
            "steal_share": max((share for share in of("steal_share") if share is not None), default=None),
            "promise_kept": all(of("promise_kept")),
        }
        row |= interval("latency_mean_ms", latency, 1e3) | median_interval("latency_median_ms", latency, 1e3)
        row |= {key: value and value * 1e3 for key, value in log_interval("latency_geomean_ms", latency).items()}
        row["base"] = run.base or None
        row |= paired_ratio("ratio_to_base", trials, modes.get(run.base, []), latency_s)
        row |= to_local(run, trials)
        row |= interval("tokens_per_s", of("tokens_per_s")) | interval("payload_bytes_per_token", of("payload_bytes_per_token"))
        row["ttft_ms"] = mean(latency, 1e3) if prefill else None
        row["itl_ms"], row["tpot_ms"] = (None, None) if prefill else (mean(latency, 1e3), mean(of("tpot_s"), 1e3))
        averaged = [*BYTES, "round_trips_per_token", "client_cpu_s_per_token", "worker_cpu_s_per_token", "worker_compute_s_per_token"]
        averaged += ["gpu_s_per_token", "gpu_time_share", "samplers_core_share", "weights_held_bytes", "head_bytes"]
        row |= {name: mean(of(name)) for name in averaged}
        rows.append(row | uploads(run, trials))
    return rows


BYTES = ("tensor_bytes_per_token", "wire_bytes_per_token", "up_payload_bytes_per_token", "down_payload_bytes_per_token")


def uploads(run: Run, trials: Sequence[Trial]) -> Row:
    """Means over the trials that began with an empty weight cache."""
    empty = [trial for trial in trials if not run.rows[trial]["cached_weights_bytes"]]
    names = ("setup_payload_bytes", "weights_bytes", "weights_put_mb_per_s", "earlier_sessions_weights_bytes")
    return {name: mean(run.column(empty, name)) for name in names}


def ladder(run: Run) -> list[Row]:
    """Each rung against the one below, the strongest blind baseline, and the model's cross entropy of the text."""
    rows = []
    for at, trials, modes in run.cells("prefill", "decode"):
        mark, rungs, prefill = run.mark(at["mode"]), run.ladder(modes), is_prefill(trials)
        if not (mark.get("rung") or mark.get("reference")):
            continue
        is_rung = at["mode"] in rungs
        payload = run.column(trials, "payload_bytes_per_token")
        kept = [*run.column(trials, "promise_kept"), *(row["promise_kept"] for row in checks_of(run, at))]
        row = at | {"role": "rung" if is_rung else "reference", "adds": mark["rung"]["adds"] if is_rung else mark["reference"]}
        row |= {"trials": len(trials), "keeps": trials[0].policy["keeps"], "promise_kept": all(kept)}
        row |= {name: mean(run.column(trials, name)) for name in (*BYTES, "round_trips_per_token", "weights_held_bytes", "head_bytes")}
        row |= interval("payload_bytes_per_token", payload) | interval(
            "ttft_ms", run.column(trials, "latency_mean_s" if prefill else "ttft_s"), 1e3
        )
        row |= interval("itl_ms", [None if prefill else latency_s(t) for t in trials], 1e3)
        row |= interval("gap_ms", [t.gap_s for t in trials], 1e3)
        before = rungs[rungs.index(at["mode"]) - 1] if is_rung and at["mode"] != rungs[0] else None
        row |= {"before": before, "latency_to_before_pairs": 0}
        if before:
            below = modes[before]
            row |= byte_ratio("bytes_to_before", run, trials, below)
            row |= welch_interval("gap_to_before_ms", [t.gap_s for t in trials], [t.gap_s for t in below], 1e3)
            row |= paired_ratio("latency_to_before", trials, below, latency_s)
        blind = strongest_blind(run, modes, lambda ts: mean(run.column(ts, "payload_bytes_per_token")))
        row["blind"] = blind
        row |= byte_ratio("bytes_to_blind", run, trials, modes[blind]) if blind else {}
        row |= entropy(run, at["model"])
        row["payload_to_entropy"] = ratio(row["payload_bytes_per_token"], row["entropy_bytes_per_token"])
        rows.append(row | uploads(run, trials))
    return rows


def checks_of(run: Run, at: Row) -> list[Row]:
    return [row for row in run.exactness if (row["model"], row["mode"]) == (at["model"], at["mode"])]


def strongest_blind(run: Run, modes: Mapping[str, Sequence[Trial]], of: Callable[[Sequence[Trial]], float | None]) -> str | None:
    """Of the modes marked `blind` the one with the least."""
    known = {mode: of(trials) for mode, trials in modes.items() if run.mark(mode).get("blind")}
    return min((mode for mode, value in known.items() if value is not None), key=lambda mode: known[mode], default=None)


def entropy(run: Run, model: str) -> Row:
    """Local's cross entropy of the text in nats / ln 2 / 8, of the check that read the most text; t interval over its prompts."""
    checks = [row for row in run.exactness if row["model"] == model and row.get("text_tokens")]
    if not checks:
        return dict.fromkeys(("entropy_bytes_per_token", "entropy_bytes_per_token_low", "entropy_bytes_per_token_high"))
    longest = max(checks, key=lambda row: row["text_tokens"])
    return interval("entropy_bytes_per_token", longest["text_reference_nats_by_prompt"], 1 / math.log(2) / 8)


def facts(run: Run) -> list[Row]:
    """Shapley's value of each fact under precedence constraints, by v(S), the payload of the cheapest exchange that S allows."""
    rungs = run.ladder(run.config["define"]["modes"])
    of = {mark["fact"]: mode for mode in rungs if (mark := run.mark(mode)["rung"]).get("fact")}
    needs = {fact: set(run.mark(mode)["rung"].get("needs", [])) for fact, mode in of.items()}
    orders = [o for o in itertools.permutations(of) if all(needs[f] <= set(o[:i]) for i, f in enumerate(o))]
    rows = []
    for (model, network, phase), modes in run.groups.items():
        if next(iter(modes.values()))[0].phase_spec["kind"] != "recovery":
            at, known = {"model": model, "network": network, "phase": phase, "orders": len(orders)}, set(of.values()) <= set(modes)
            exchanges = list(exchanges_of(run, {mode: modes[mode] for mode in run.ladder(modes)})) if known else []
            rows += [at | {"fact": fact} | (worth(fact, list(of), orders, exchanges) if known else NO_WORTH) for fact in of]
    return rows


WORTH = (
    *("log_ratio", "factor", "share", "bytes_saved", "ladder_factor", "ladder_bytes_saved"),
    *("payload_bytes_nothing_known", "payload_bytes_all_known"),
)
NO_WORTH: Row = dict.fromkeys(WORTH)
Exchanges = Sequence[tuple[frozenset[str], float]]


def worth(fact: str, climb: list[str], orders: Sequence[tuple[str, ...]], exchanges: Exchanges) -> Row:
    """ln v(S) - ln v(S + fact), averaged over the orders; and the same at the fact's place in the ladder, `climb`."""

    def value(known: Iterable[str]) -> float:
        return min(size for needed, size in exchanges if needed <= set(known))

    def added(order: Sequence[str]) -> tuple[float, float]:
        return value(order[: order.index(fact)]), value(order[: order.index(fact) + 1])

    steps, (here, there), (nothing, everything) = [added(order) for order in orders], added(climb), (value(()), value(climb))
    log = float(np.mean([math.log(a / b) for a, b in steps]))
    share, saved = log / math.log(nothing / everything), float(np.mean([a - b for a, b in steps]))
    return dict(zip(WORTH, (log, math.exp(log), share, saved, here / there, here - there, nothing, everything), strict=True))


def exchanges_of(run: Run, rungs: Mapping[str, Sequence[Trial]]) -> Iterator[tuple[frozenset[str], float]]:
    """Each rung's reply and window with any rung's codecs of token ids and reply: the facts that it needs, and its payload per token."""
    parts = {mode: parts_of(trials[0]) for mode, trials in rungs.items()}
    closed = {mode: closure(run, mode, rungs) for mode in rungs}

    def introduced(kind: int, part: Any) -> frozenset[str]:
        return closed[next(mode for mode in rungs if parts[mode][kind] == part)]

    for mode, trials in rungs.items():
        reply, window, *_ = parts[mode]
        own = sizes_of(run, trials)
        framing = own["up_payload"] + own["down_payload"] - own["up_encoded"] - own["down_encoded"]
        for tokens, codec in itertools.product({p[2] for p in parts.values()}, {p[3] for p in parts.values()}):
            up = encoded(run, rungs, mode, "up", tokens)
            down = encoded(run, rungs, mode, "down", codec)
            if up is not None and down is not None:
                needed = introduced(0, reply) | introduced(1, window) | introduced(2, tokens) | introduced(3, codec)
                yield needed, framing + up + down


def parts_of(trial: Trial) -> tuple[str, int, str, str]:
    policy = trial.policy
    return policy["reply"]["kind"], policy["window"], policy["codec"]["tokens"], policy["codec"]["reply"]


def sizes_of(run: Run, trials: Sequence[Trial]) -> dict[str, float]:
    """Bytes per token by direction: TCP payload, tensors after the codec, tensors before it."""
    sizes = {
        f"{way}_{what}": mean(run.column(trials, f"{way}_{what}_bytes_per_token"))
        for way in ("up", "down")
        for what in ("payload", "encoded")
    }
    tensor, down = (mean(run.column(trials, f"{name}_bytes_per_token")) for name in ("tensor", "down_tensor"))
    return sizes | {"up_tensor": tensor - down, "down_tensor": down}


def closure(run: Run, mode: str, rungs: Iterable[str]) -> frozenset[str]:
    """The rung's fact and those that it needs, in turn."""
    of = {run.mark(each)["rung"].get("fact"): run.mark(each)["rung"].get("needs", []) for each in rungs}
    found, open_ = set(), [run.mark(mode)["rung"].get("fact")]
    while open_:
        fact = open_.pop()
        if fact in of and fact is not None and fact not in found:
            found.add(fact)
            open_ += of[fact]
    return frozenset(found)


def encoded(run: Run, rungs: Mapping[str, Sequence[Trial]], mode: str, way: str, codec: str) -> float | None:
    """Bytes of a rung's tensors in another codec: of a rung with that codec and as many tensor bytes, or from the measured codecs."""
    place, size = (2 if way == "up" else 3), sizes_of(run, rungs[mode])[f"{way}_tensor"]
    for trials in [rungs[mode], *rungs.values()]:
        if parts_of(trials[0])[place] == codec and sizes_of(run, trials)[f"{way}_tensor"] == size:
            return sizes_of(run, trials)[f"{way}_encoded"]
    return None


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
        return calls.assign(trial=trial.trial, own_s=own_s, waited=(calls["frames"] > 1) & (own_s < frame_s))

    def per_token(self, seconds: Series) -> list[float]:
        """Of each trial: their sum over its tokens."""
        sums = self.calls.assign(seconds=seconds).groupby("trial")[["seconds", "tokens"]].sum()
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
        for metric in ("TTFT",) if is_prefill(trials) else ("ITL", "TTFT"):
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
    row = {
        "model": trial.model,
        "network": at,
        "mode": trial.mode,
        "phase": trial.phase,
        "metric": cell.metric,
        "of_phase": own,
        "local": local,
    }
    row |= {"network_kind": trial.network_spec["kind"], "asked_rtt_ms": rtt and rtt * 1e3, "asked_rate_mbit_per_s": rate and rate / 1e6}
    row |= {"trials": len(trials)} | interval("latency_ms", cell.per_token(cell.calls["latency_s"]), 1e3)
    row |= {key: value for key, value in to_local(run, trials).items() if own and not key.endswith("_pairs")}
    carried = ("round_trips_per_token", "up_payload_bytes_per_token", "down_payload_bytes_per_token")
    row |= {name: mean(run.column(trials, name)) for name in carried} | {"gap_ms": mean(cell.gap_s(), 1e3)}
    others = [other for name, other in networks.items() if name != at and other.separable()]
    link = None if local else Link.probed(trials)
    row |= {} if local else link_columns(link) | gap_columns(cell, others, link)
    compute_s = float(np.mean([np.mean(each.per_token(each.computed_s)) for each in networks.values()]))
    link_s = float(np.mean(cell.per_token(cell.calls["latency_s"] - cell.computed_s)))
    measured, priced = row["latency_ms"], mean([each.priced_s(link) for each in others], 1e3)
    row |= {"compute_ms": compute_s * 1e3, "link_ms": link_s * 1e3, "fitted_ms": (compute_s + link_s) * 1e3}
    return row | {"residual": measured / row["fitted_ms"] - 1, "priced_ms": priced, "price_error": priced and priced / measured - 1}


def link_columns(link: Link) -> Row:
    """Means over the trials' probes, of goodputs the harmonic ones."""
    goodputs = {"up": link.up and 8e-6 / link.up, "down": link.down and 8e-6 / link.down}
    return {f"goodput_{way}_mbit_per_s": value or None for way, value in goodputs.items()} | {"rtt_ms": link.rtt_s * 1e3}


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
    rows = []
    for (model, phase, metric), group in cells.groupby(["model", "phase", "metric"], sort=False):
        by_mode = [(mode, each) for mode, each in group.groupby("mode", sort=False)]
        remote = group[~group["local"].astype(bool)]
        for mode, each in [*by_mode, ("all remote modes", remote)]:
            row = {
                "model": model,
                "phase": phase,
                "mode": mode,
                "metric": metric,
                "networks": each["network"].nunique(),
                "cells": each["priced_ms"].count() or None,
            }
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


def recovery(run: Run) -> list[Row]:
    """Steps by the fraction evicted before them: bytes as means over all steps, times as means over trials of the trial's median."""
    rows = []
    for at, trials, modes in run.cells("recovery"):
        first = next(iter(modes.values()))
        for fraction in trials[0].phase_spec["evict_fractions"] or [None]:
            rows.append(at | recovery_row(run, trials, fraction) | recovery_to_first(trials, first, fraction))
    return rows


def at_fraction(trial: Trial, fraction: float | None) -> pd.DataFrame:
    return trial.steps if fraction is None else trial.steps[trial.steps["evict_fraction"] == fraction]


def recovery_s(trial: Trial, fraction: float | None) -> float | None:
    """ITL of steps with the fraction less that of the same trial's steps with fraction 0, by medians."""
    if not fraction or 0 not in trial.phase_spec["evict_fractions"]:
        return None
    return float(at_fraction(trial, fraction)["latency_s"].median() - at_fraction(trial, 0)["latency_s"].median())


def recovery_to_first(trials: Sequence[Trial], first: Sequence[Trial], fraction: float | None) -> Row:
    own, others = ([recovery_s(trial, fraction) for trial in each] for each in (trials, first))
    return welch_interval("recovery_to_first_ms", own, others, 1e3) if fraction and trials is not first else {}


def recovery_row(run: Run, trials: Sequence[Trial], fraction: float | None) -> Row:
    trial, policy, phase = trials[0], trials[0].policy, trials[0].phase_spec
    by_trial = [at_fraction(each, fraction) for each in trials]
    steps = pd.concat(by_trial)
    row: Row = {
        "evict_fraction": fraction,
        "kv_budget": phase["kv_budget"],
        "live_requests": phase["live_requests"],
        "recovery": policy["recovery"],
    }
    row |= {"trials": len(trials), "steps_per_trial": len(by_trial[0]), "keeps": policy["keeps"]}
    at = {"model": trial.model, "mode": trial.mode}
    row["promise_kept"] = all([*run.column(trials, "promise_kept"), *(check["promise_kept"] for check in checks_of(run, at))])
    for name in ("missing_bytes", "fetched_network_bytes", "saved_network_bytes", "copied_bytes", "saved_payload_bytes"):
        row[f"{name}_per_step"] = None if steps[name].isna().any() else float(steps[name].mean())
    budget = trial.manifest["kv"]["budget_bytes"]
    a_position = budget and budget / (phase["kv_budget"] * phase["live_requests"] * trial.max_length)
    row["whole_bytes_per_step"] = a_position and a_position * float(steps["position"].mean())
    row["missing_share"] = ratio(row["missing_bytes_per_step"], row["whole_bytes_per_step"])
    row["fetched_to_missing"] = ratio(row["fetched_network_bytes_per_step"], row["missing_bytes_per_step"])
    row |= interval("itl_ms", [each["latency_s"].median() for each in by_trial], 1e3)
    row |= interval("recovery_ms", [recovery_s(each, fraction) for each in trials], 1e3)
    for name in ("stall_s", "restore_alone_s", "predicted_s"):
        row |= interval(f"{name[:-1]}ms", [each[name].median() for each in by_trial], 1e3)
    row |= hidden(trials, fraction)
    ways = ("reload", "recompute", "delta")
    return (
        row
        | {f"{way}_steps": int((steps["recovery"] == way).sum()) for way in ways}
        | {"fallback_steps": int(steps["fallback"].notna().sum())}
    )


def hidden(trials: Sequence[Trial], fraction: float | None) -> Row:
    """1 - stall / restore alone, and 1 - recovery / restore alone, of the steps that `delta` restored; null if 25 points off or more."""
    shares: dict[str, list[float | None]] = {"hidden_share": [], "itl_hidden_share": []}
    for trial in trials:
        steps = at_fraction(trial, fraction)
        steps = steps[(steps["recovery"] == "delta") & steps["restore_alone_s"].notna()]
        alone, without = steps["restore_alone_s"].median(), at_fraction(trial, 0)["latency_s"].median()
        shares["hidden_share"].append(1 - steps["stall_s"].median() / alone)
        shares["itl_hidden_share"].append(1 - (steps["latency_s"].median() - without) / alone)
    row: Row = {}
    for name, values in shares.items():
        found = interval(name, values)
        low, high = found[f"{name}_low"], found[f"{name}_high"]
        row |= dict.fromkeys(found) if low is not None and high - low > 0.5 else found
    return row


EXACTNESS = (
    *("keeps", "promise_kept", "tokens_compared", "tokens_equal", "first_difference", "edge_draws", "logits_bitwise", "max_abs_diff"),
    *("max_kl_nats", "text_logits_bitwise", "text_max_abs_diff", "text_mean_kl_nats", "text_max_kl_nats", "text_cross_entropy_nats"),
    *("text_reference_cross_entropy_nats", "text_reference_nats_by_prompt", "text_tokens", "model", "mode"),
)


def exactness(run: Run) -> list[Row]:
    """The check's file, the difference d of the cross entropies, and exp(d) - 1."""
    rows = []
    for check in run.exactness:
        ours, locals_ = check["text_cross_entropy_nats"], check["text_reference_cross_entropy_nats"]
        change = None if ours is None or locals_ is None else ours - locals_
        row = {key: value for key, value in check.items() if key in EXACTNESS}
        rows.append(row | {"cross_entropy_change_nats": change, "perplexity_change": None if change is None else math.exp(change) - 1})
    return rows


def codecs(run: Run) -> list[Row]:
    return run.codecs.to_dict("records")


def break_even(run: Run) -> list[Row]:
    """B = (1 - 1/r) / (1/e + 1/d); null if the codec does not make the tensor smaller."""
    rows = []
    for codec in run.codecs[run.codecs["codec"] != "raw"].to_dict("records"):
        r, e, d = codec["ratio"], codec["encode_mb_per_s"], codec["decode_mb_per_s"]
        known = not any(map(is_null, (r, e, d)))
        bandwidth = (1 - 1 / r) / (1 / e + 1 / d) if known and r > 1 else None
        kept = (
            "model",
            "tensor",
            "tensor_class",
            "dtype",
            "codec",
            "device",
            "exact",
            "kl_nats",
            "ratio",
            "encode_mb_per_s",
            "decode_mb_per_s",
        )
        rows.append(
            {key: codec[key] for key in kept} | {"break_even_mb_per_s": bandwidth, "break_even_gbit_per_s": bandwidth and bandwidth * 8e-3}
        )
    return rows


@dataclass
class Compared:
    """Logarithms of a mode's latency over its baseline's: a mean, its standard error and degrees of freedom."""

    basis: str
    log: float
    error: float
    freedom: float
    trials: int

    def p_above(self, edge: float) -> float:
        """One-sided p value for a ratio below `edge`."""
        return float(stats.t.cdf((self.log - math.log(edge)) / self.error, self.freedom))

    def cut(self, name: str = "cut") -> Row:
        half = float(stats.t.ppf(0.975, self.freedom)) * self.error
        return {name: 1 - math.exp(self.log), f"{name}_low": 1 - math.exp(self.log + half), f"{name}_high": 1 - math.exp(self.log - half)}


def compared(trials: Sequence[Trial], baseline: Sequence[Trial]) -> Compared | None:
    """Decode phases: each trial's own ratio, by Welch; prefill phases: latencies of paired trials."""
    if is_prefill(trials):
        logs = [math.log(latency_s(a) / latency_s(b)) for a, b in paired(trials, baseline)]
        if len(logs) < 2:
            return None
        return Compared("paired latencies", float(np.mean(logs)), float(stats.sem(logs)), len(logs) - 1, len(logs))
    over = "alone_s" if all(len(t.windows) for t in [*trials, *baseline]) else "compute_s"
    if min(len(trials), len(baseline)) < 2:
        return None
    log, error, freedom = welch([math.log(t.own(over)) for t in trials], [math.log(t.own(over)) for t in baseline])
    basis = "each trial's control" if over == "alone_s" else "each trial's own compute"
    return Compared(basis, log, error, freedom, len(trials))


def hypotheses(run: Run) -> list[Row]:
    """H1 by counted bytes, H2 by two one-sided tests at 2.5%, A/A by an equivalence test within 1%, planted by Welch's test; Holm each."""
    rows: list[Row] = []
    for at, trials, modes in run.cells("prefill", "decode"):
        mark = run.mark(at["mode"])
        claims, twin = mark.get("claims") or {}, mark.get("twin")
        if claims.get("against") in modes:
            rows += [h1(run, at, trials, modes, claims)] if claims.get("fewer_bytes") is not None else []
            rows += [h2(run, at, trials, modes, claims)] if claims.get("lower_latency") is not None else []
        if twin in modes:
            rows.append(twins(at, trials, modes[twin]))
    for row in rows:
        family = [each for each in rows if each["hypothesis"] == row["hypothesis"]]
        if row["hypothesis"] == "planted":
            family += [each for each in rows if each["hypothesis"] == "A/A"]
        judge(row, family)
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]


def judge(row: Row, family: Sequence[Row]) -> None:
    """Adds Holm's p values over the family, and the verdict."""
    at = next(i for i, each in enumerate(family) if each is row)
    kind = row["hypothesis"]
    p = "_p_found" if kind == "planted" else "p"
    row["p_holm"] = holm([each.get(p) for each in family])[at]
    row["p_holm_no"] = holm([each.get("_p_no") for each in family])[at]
    if kind == "H2" and row["p_holm"] is not None:
        row["verdict"] = "yes" if row["p_holm"] < 0.025 else "no" if row["p_holm_no"] < 0.025 else "inconclusive"
    if kind == "A/A" and row["p_holm"] is not None:
        outside = row["cut_low"] > 0.01 or row["cut_high"] < -0.01
        row["verdict"] = "same" if row["p_holm"] < 0.05 else "different" if outside else "inconclusive"
    if kind == "planted" and row["p_holm"] is not None:
        as_planted = row["found_ms_low"] <= row["planted_ms"] <= row["found_ms_high"]
        row["verdict"] = ("found" if row["p_holm"] < 0.05 else "not found") + ("" if as_planted else ", not as planted")


def h1(run: Run, at: Row, trials: Sequence[Trial], modes: Mapping[str, Sequence[Trial]], claims: Row) -> Row:
    """The cut in counted bytes: yes or no if its interval lies on one side of the threshold."""
    threshold = claims["fewer_bytes"]
    row = at | {"hypothesis": "H1", "baseline": claims["against"], "basis": "counted bytes", "threshold": threshold, "trials": len(trials)}
    blind, first = strongest_blind(run, modes, lambda ts: mean(run.column(ts, "payload_bytes_per_token"))), first_rung(run, modes)
    row |= {"blind": blind, "first_rung": first}
    for name, mode in (("cut", claims["against"]), ("cut_to_blind", blind), ("cut_to_first_rung", first)):
        row |= cut_of(name, byte_ratio("r", run, trials, modes[mode])) if mode else {}
    if (cast := claims.get("cast")) in modes:
        row["cast_part"] = 1 - byte_ratio("r", run, modes[cast], modes[claims["against"]])["r"]
        row["rest_part"] = row["cut"] - row["cast_part"]
    low, high = row["cut_low"], row["cut_high"]
    row["verdict"] = None if low is None else "yes" if low > threshold else "no" if high < threshold else "inconclusive"
    return row


def cut_of(name: str, ratios: Row) -> Row:
    low, high = ratios.get("r_high"), ratios.get("r_low")
    return {name: 1 - ratios["r"], f"{name}_low": None if low is None else 1 - low, f"{name}_high": None if high is None else 1 - high}


def first_rung(run: Run, modes: Iterable[str]) -> str | None:
    """The rung directly above the lowest."""
    rungs = run.ladder(modes)
    return rungs[1] if len(rungs) > 1 else None


def h2(run: Run, at: Row, trials: Sequence[Trial], modes: Mapping[str, Sequence[Trial]], claims: Row) -> Row:
    threshold = claims["lower_latency"]
    row = at | {"hypothesis": "H2", "baseline": claims["against"], "threshold": threshold}
    if found := compared(trials, modes[claims["against"]]):
        p = found.p_above(1 - threshold)
        row |= {"basis": found.basis, "trials": found.trials, "p": p, "_p_no": 1 - p} | found.cut()
    blind, first = strongest_blind(run, modes, lambda ts: mean([t.gap_s for t in ts])), first_rung(run, modes)
    row |= {"blind": blind, "first_rung": first}
    for name, mode in (("cut_to_blind", blind), ("cut_to_first_rung", first)):
        row |= other.cut(name) if mode and (other := compared(trials, modes[mode])) else {}
    if (cast := claims.get("cast")) in modes and found and (other := compared(modes[cast], modes[claims["against"]])):
        row["cast_part"] = 1 - math.exp(other.log)
        row["rest_part"] = row["cut"] - row["cast_part"]
    return row


def beyond_control_s(trial: Trial) -> float | None:
    windows = trial.windows
    return float(((windows["latency_s"] - windows["alone_s"]) / windows["tokens"]).median()) if len(windows) else None


def twins(at: Row, trials: Sequence[Trial], twin: Sequence[Trial]) -> Row:
    planted = trials[0].policy["plant_us"] / 1e3
    row = at | {"hypothesis": "planted" if planted else "A/A", "baseline": twin[0].mode, "planted_ms": planted}
    controlled = all(len(t.windows) for t in [*trials, *twin])
    found = [[beyond_control_s(t) if controlled else t.gap_s for t in each] for each in (trials, twin)]
    if controlled or not planted:
        row |= welch_interval("found_ms", *found, 1e3) | {"found_by": "latency beyond the control" if controlled else "gap"}
        if min(map(len, found)) > 1:
            difference, error, freedom = welch(*found)
            row["_p_found"] = 2 * float(stats.t.sf(abs(difference) / error, freedom))
    if same := compared(trials, twin):
        row |= {"basis": same.basis, "trials": same.trials} | same.cut()
        row |= {} if planted else {"threshold": 0.01, "p": max(same.p_above(1.01), 1 - same.p_above(0.99))}
    return row | ({"p": row.get("_p_found"), "trials": len(trials)} if planted else {})


# Comparison.

TABLES: dict[str, tuple[Callable[[Run], list[Row]], tuple[str, ...]]] = {
    "results": (results, ("model", "network", "mode", "phase", "trial")),
    "gap": (gap, AT),
    "summary": (summary, AT),
    "ladder": (ladder, AT),
    "facts": (facts, ("model", "network", "phase", "fact")),
    "network": (network, ("model", "network", "mode", "phase", "metric")),
    "price": (price, ("model", "phase", "mode", "metric")),
    "recovery": (recovery, (*AT, "evict_fraction")),
    "exactness": (exactness, ("model", "mode")),
    "codecs": (codecs, ("model", "tensor", "dtype", "codec", "device")),
    "break_even": (break_even, ("model", "tensor", "dtype", "codec", "device")),
    "hypotheses": (hypotheses, ("hypothesis", *AT)),
}


def equal(theirs: Any, ours: Any) -> bool:
    if isinstance(ours, list):
        theirs = json.loads(theirs)
        return len(theirs) == len(ours) and all(map(equal, theirs, ours))
    if is_null(theirs) or is_null(ours):
        return is_null(theirs) and is_null(ours)
    if isinstance(ours, (bool | np.bool_, str)):
        return str(theirs) == str(ours)
    return math.isclose(float(theirs), float(ours), rel_tol=RELATIVE, abs_tol=ABSOLUTE)


def compare(table: str, theirs: pd.DataFrame, ours: list[Row], keys: Sequence[str]) -> tuple[int, list[str], list[str]]:
    """Compared values, a line for each mismatch, and the numeric columns that no function recomputes."""

    def key_of(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple("" if is_null(row[key]) else f"{row[key]:g}" if isinstance(row[key], float) else str(row[key]) for key in keys)

    found, wanted = ({key_of(row): row for row in rows} for rows in (theirs.to_dict("records"), ours))
    lines = [f"{table}: {' '.join(key)}: theirs: no row" for key in wanted if key not in found]
    lines += [f"{table}: {' '.join(key)}: ours: no row" for key in found if key not in wanted]
    columns = {column for row in ours for column in row}
    lines += [f"{table}: theirs: no column {column}" for column in columns - set(theirs.columns)]
    values = 0
    for key, column in itertools.product(found, [name for name in theirs.columns if name in columns]):
        if key in wanted:
            values += 1
            one, other = found[key][column], wanted[key].get(column)
            if not equal(one, other):
                lines.append(f"{table}: {' '.join(key)}: {column}: theirs {one!r}, ours {other!r}")
    numeric = [name for name in theirs.columns if pd.api.types.is_numeric_dtype(theirs[name]) and theirs[name].notna().any()]
    return values, lines, [name for name in numeric if name not in columns]


def read_config(files: Iterable[Path]) -> dict[str, Any]:
    """The files merged key by key, later ones over earlier ones."""
    config: dict[str, Any] = {}
    for file in files:
        config = merged(config, yaml.safe_load(file.read_text()))
    for key in ("models", "networks", "modes", "phases"):
        chosen = config.get(key, list(config["define"][key]))
        config[key] = chosen.split(",") if isinstance(chosen, str) else chosen
    return config


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: merged(below[key], above[key]) for key in above if isinstance(above[key], dict) and isinstance(below.get(key), dict)}
    return {**below, **above, **both}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", default=ROOT / "results", help="the directory of the run's results")
    parser.add_argument("--configfile", type=Path, nargs="*", default=[], help="as the run's: merged over config/config.yaml")
    parser.add_argument("--tables", nargs="*", default=list(TABLES), choices=list(TABLES), metavar="TABLE", help="only these")
    arguments = parser.parse_args()
    config = read_config([ROOT / "config/config.yaml", *arguments.configfile])
    run, own = Run(arguments.results, config), arguments.results / (config.get("name") or "")
    status = 0
    for table in arguments.tables:
        make, keys = TABLES[table]
        file = own / ("results.csv" if table == "results" else f"tables/{table}.csv")
        values, lines, left = compare(table, pd.read_csv(file), make(run), keys)
        print(*lines, sep="\n", end="\n" if lines else "")
        print(f"{table}: {values} values compared, {len(lines)} mismatches" + (f"; not recomputed: {', '.join(left)}" if left else ""))
        status |= bool(lines)
    return status


if __name__ == "__main__":
    sys.exit(main())
