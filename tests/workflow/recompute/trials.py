"""One trial: its files, and its row of results.csv."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from intervals import Row, ratio

Series = pd.Series  # of float64


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
    def latency_s(self) -> float:
        return float(self.steps["latency_s"].mean())

    @cached_property
    def compute_s(self) -> float:
        return float(self.steps["compute_s"].mean())

    @cached_property
    def gap_s(self) -> float:
        return float((self.steps["latency_s"] - self.steps["compute_s"]).sum() / len(self.steps))

    @cached_property
    def typical_gap_s(self) -> float:
        """Of the median call."""
        calls = self.calls()
        return float(((calls["latency_s"] - calls["compute_s"]) / calls["tokens"]).median())


def results_row(trial: Trial) -> Row:
    """One trial: sums over its measured steps / their number, medians over requests, and its manifest's totals."""
    steps, manifest, n = trial.steps, trial.manifest, len(trial.steps)
    setup, memory, spec = manifest["setup"], manifest["memory"], trial.network_spec
    sent = {} if setup.get("weights_held_before") else setup  # the trial itself gave the worker its weights: no figures of the mode
    total = {name: steps[name].sum() / n for name in steps.columns if name.endswith(("_bytes", "_segments")) or name == "round_trips"}
    calls = trial.calls()
    tcp, requests = trial.table("tcp"), trial.table("requests")
    requests = requests[~requests["warmup"]]
    own = tcp[(tcp["side"] == "client") & (tcp["moment"] == "end") & (tcp["connection"] == 0)]  # others publish prefixes
    header = own["segment_header_bytes"].sum()
    payload = total["up_frame_bytes"] + total["down_frame_bytes"]
    uploads, held = setup.get("weights_bytes_by_session"), setup.get("weights_held_bytes_by_session")
    frames = trial.table("ledger").assign(nbytes=lambda rows: rows["payload_bytes"] + rows["header_bytes"])

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
        "latency_mean_s": trial.latency_s,
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
        "weights_put_mb_per_s": ratio(sent.get("weights_bytes") or None, sent.get("weights_put_s", 0) * 1e6),
        "earlier_sessions_weights_bytes": sum(uploads[:-1]) if uploads and len(uploads) > 1 else None,
        "samplers_core_share": samplers_share(manifest["telemetry"]),
    }
    means = ("client_cpu_s", "worker_cpu_s", "worker_compute_s", "gpu_s")
    row |= {f"{name}_per_token": step_mean(name) for name in means}
    row["gpu_time_share"] = ratio(row["gpu_s_per_token"], row["latency_mean_s"])
    row |= {name: setup.get(name) for name in ("worker_start_s", "connect_s", "client_start_s", "head_load_s", "head_bytes")}
    row |= {name: sent.get(name) for name in ("weights_upload_s", "weights_put_s", "weights_bytes", "weights_held_bytes")}
    row |= {name: memory[name] for name in ("client_peak_rss_anon_bytes", "worker_peak_rss_bytes")}
    row["worker_weight_store_bytes"] = memory["worker_weight_store_bytes"] if sent else None
    probed = ("rtt_s", "goodput_up_bytes_per_s", "goodput_down_bytes_per_s")
    row |= {f"probe_{name}": manifest["probe"] and manifest["probe"][name] for name in probed}
    kv, kv_spec = (manifest["network"] or {}).get("kv"), manifest["cell"].get("kv_network_spec")
    row |= {"kv_network": spec.get("kv"), "kv_network_kind": kv_spec and kv_spec["kind"]}
    row |= {"kv_asked_rtt_s": kv_spec and asked_rtt_s(kv_spec), "kv_asked_rate_bits_per_s": kv_spec and rate_bits_per_s(kv_spec)}
    row |= {f"kv_probe_{name}": kv and kv["probe"][name] for name in probed}
    exactness = ("tokens_compared", "tokens_equal", "edge_draws", "logits_bitwise", "max_abs_diff", "max_kl_nats", "promise_kept")
    row |= {name: manifest["exactness"][name] for name in exactness}
    for source in ("host", "gpu", "dmon"):
        costs = [cost for cost in manifest["telemetry"].get(source, {}).get("cost", {}).values() if cost]
        row[f"{source}_sampler_cpu_s_per_sample"] = ratio(sum(c["cpu_s"] for c in costs), sum(c["samples"] for c in costs))
    return row | (dict.fromkeys(GPU_COLUMNS) | {"gpu_samples": 0, "gpm_windows": 0} if trial.table("gpu").empty else {})


GPU_COLUMNS = (
    *("gpu_util_percent", "gpu_power_w", "gpu_sm_activity_percent", "gpu_sm_occupancy_percent", "gpu_tensor_activity_percent"),
    *("gpu_dram_bandwidth_percent", "gpu_pcie_tx_mib_per_s", "gpu_pcie_rx_mib_per_s", "joules_per_token"),
    *("gpu_energy_j", "gpu_energy_check"),
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
