"""Table summary: latency, bytes and cost of each mode."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from semgap.analysis.aggregate import (
    PAYLOAD,
    SETTING,
    alike,
    all_of,
    by_setting,
    first_of,
    latency_ratio,
    mean_of,
    means_of,
    ratio_to_local,
)
from semgap.analysis.columns import frame_of, interval_columns, mean_columns, ratio_columns, with_endings
from semgap.analysis.gpu import GPM_MEANS
from semgap.analysis.marks import base_of
from semgap.analysis.results import Results
from semgap.analysis.stats import geometric_mean_interval, median_interval
from semgap.analysis.tables.render import Column, View

MEANS = (
    *("tensor_bytes_per_token", "wire_bytes_per_token", "up_payload_bytes_per_token", "down_payload_bytes_per_token"),
    *("round_trips_per_token", "client_cpu_s_per_token", "worker_cpu_s_per_token", "worker_compute_s_per_token"),
    *("gpu_s_per_token", "gpu_time_share", "gpu_util_percent", *GPM_MEANS, "gpu_power_w", "joules_per_token", "gpu_energy_check"),
    *("samplers_core_share", "setup_payload_bytes", "weights_bytes", "weights_put_mb_per_s", "weights_held_bytes"),
    *("earlier_sessions_weights_bytes", "head_bytes"),
)
FIRST_REASONS = ("gpu_time_reason", "gpu_reason", "gpm_reason", "joules_basis", "joules_reason", "samplers_reason")
COLUMNS = [
    *(*SETTING, "mode", "latency_metric", "trials", "cut_to_steps", "cut_reason", "steal_share", "keeps", "promise_kept"),
    *with_endings("latency_mean_ms", "latency_geomean_ms", "latency_median_ms"),
    *("base", *with_endings("ratio_to_base"), "ratio_to_base_pairs", *with_endings("ratio_to_local"), "ratio_to_local_pairs"),
    *(*with_endings("tokens_per_s"), "ttft_ms", "itl_ms", "tpot_ms", *with_endings(PAYLOAD)),
    *(*MEANS, "weights_reason", "worker_reason", *FIRST_REASONS, "ratios_reason"),
]


def table(results: Results) -> pd.DataFrame:
    """One row per model, network, prefill or decode phase, and mode; latencies in ms, CPU in s, bytes per token at three levels.

    Recovery phases have a table of their own: their steps are not alike. A trial's latency is the time per token of its measured steps: a
    window has no median over steps. Mean, geometric mean and median are over trials, each with its 95% interval (see `stats`). Ratios to
    `base`, the lowest rung, and to local are geometric means over paired trials.
    """
    compared = alike(results.rows)
    base = base_of(results.marks)
    rows = [_row(compared, setting, mode, modes, base) for setting, modes in by_setting(compared) for mode in modes]
    return frame_of(rows, COLUMNS)


def _row(rows: pd.DataFrame, setting: Mapping[str, str], mode: str, modes: Mapping[str, pd.DataFrame], base: str | None) -> dict[str, Any]:
    cell = modes[mode]
    prefill = cell["phase_kind"].iloc[0] == "prefill"
    latency_ms, cut = cell["latency_mean_s"] * 1e3, first_of(cell["cut_to_steps"])
    return {
        **setting,
        "mode": mode,
        "latency_metric": "TTFT" if prefill else "ITL",
        "trials": len(cell),
        "cut_to_steps": cut,
        "cut_reason": None if cut is None else f"cut to {cut:.0f} decode steps by its max_steps",
        "steal_share": None if cell["steal_share"].isna().all() else cell["steal_share"].max(),
        "keeps": first_of(cell["keeps"]),
        "promise_kept": all_of(cell["promise_kept"]),
        **mean_columns("latency_mean_ms", latency_ms),
        **interval_columns("latency_geomean_ms", geometric_mean_interval(latency_ms.tolist())),
        **interval_columns("latency_median_ms", median_interval(latency_ms.tolist())),
        "base": base,
        **ratio_columns("ratio_to_base", latency_ratio(modes, mode, base)),
        **ratio_columns("ratio_to_local", ratio_to_local(rows, setting, cell)),
        **mean_columns("tokens_per_s", cell["tokens_per_s"]),
        "ttft_ms": float(np.mean(latency_ms)) if prefill else None,
        "itl_ms": None if prefill else float(np.mean(latency_ms)),
        "tpot_ms": None if prefill else mean_of(cell["tpot_s"] * 1e3),
        **mean_columns(PAYLOAD, cell[PAYLOAD]),
        **means_of(cell, MEANS),
        "worker_reason": _worker_reason(cell),
        **{name: first_of(cell[name]) for name in FIRST_REASONS},
        "ratios_reason": first_of(cell["ratios_reason"]),
    }


def _worker_reason(cell: pd.DataFrame) -> str | None:
    if cell["worker_cpu_s_per_token"].notna().all():
        return None
    if cell["placement"].iloc[0] == "local":
        return "no worker: the model runs in the client's process"
    return "the worker reported no CPU time in some step"


LATENCY_NOTE = (
    "A trial's latency is the time per token of its measured steps. Mean and median are over trials, the mean with a 95% t interval. "
    "Columns x: ratio of paired trials (same block, session and environment), geometric mean with a 95% t interval on the log scale, not "
    "adjusted for their number; x base: to the lowest rung. What the distance alone costs is in the table gap, which is far sharper."
)
TRAFFIC_NOTE = (
    "Bytes per generated token over measured steps, both directions. Tensor: before the codec. Payload: TCP payload, framing included; up "
    "and down are its directions. Wire: payload + headers of the TCP segments, pure ACKs included."
)
SETUP_NOTE = (
    "Once, outside the measured steps, of the measured session. Frames: all its frames there. Weights: tensors uploaded before the first "
    "step; held: those that the worker had; earlier: sent in earlier sessions of the phase. Upload columns use only trials that began "
    "with an empty weight cache."
)
PROMISE_COLUMNS = (Column("keeps", "keeps"), Column("promise_kept", "kept", "yes_no"))
SETUP_COLUMNS = (
    Column("setup_payload_bytes", "frames (MB)", "digits", 1e-6),
    Column("weights_bytes", "weights (MB)", "digits", 1e-6, reason="weights_reason", null="-"),
    Column("weights_put_mb_per_s", "sent at (MB/s)", "digits", null="-"),
    Column("weights_held_bytes", "held (MB)", "digits", 1e-6, null="-"),
    Column("earlier_sessions_weights_bytes", "earlier (MB)", "digits", 1e-6, null="-"),
)
VIEWS = (
    View(
        "Latency",
        (
            Column("mode", "mode", reason="cut_reason"),
            *PROMISE_COLUMNS,
            Column("latency_mean_ms", "mean (ms)", "digits", reason="latency_mean_ms_reason"),
            Column("latency_median_ms", "median (ms)", "digits"),
            Column("ratio_to_base", "x base", "ratio", reason="ratio_to_base_reason"),
            Column("ratio_to_local", "x local", "ratio", reason="ratio_to_local_reason"),
            Column("tokens_per_s", "tokens/s", "digits"),
        ),
        LATENCY_NOTE,
        by=("model", "network", "phase", "latency_metric"),
    ),
    View(
        "Traffic",
        (
            Column("mode", "mode"),
            Column("tensor_bytes_per_token", "tensor (B/token)", "count"),
            Column(PAYLOAD, "payload (B/token)", "count", reason="ratios_reason"),
            Column("up_payload_bytes_per_token", "up (B/token)", "count"),
            Column("down_payload_bytes_per_token", "down (B/token)", "count"),
            Column("wire_bytes_per_token", "wire (B/token)", "count"),
            Column("round_trips_per_token", "round trips/token", "small"),
        ),
        TRAFFIC_NOTE,
    ),
    View("Setup", (Column("mode", "mode"), *SETUP_COLUMNS), SETUP_NOTE),
    View(
        "Cost",
        (
            Column("mode", "mode"),
            Column("trials", "trials", "count"),
            Column("client_cpu_s_per_token", "client CPU (ms/token)", "digits", 1e3),
            Column("worker_cpu_s_per_token", "worker CPU (ms/token)", "digits", 1e3, reason="worker_reason"),
            Column("tpot_ms", "TPOT (ms)", "digits", null="-"),
            Column("samplers_core_share", "samplers (% of a core)", "percent"),
            Column("steal_share", "steal (%)", "percent", null="-"),
        ),
        "Means over trials. In mode local the client's CPU time includes the model. TPOT exists only in decode phases. Samplers: CPU time "
        "over wall time, both sides; client and worker CPU do not include it. Steal: the largest share of this machine's CPU time that "
        "the hypervisor took in a trial.",
    ),
    View(
        "GPU, time and energy",
        (
            Column("mode", "mode"),
            Column("gpu_s_per_token", "GPU time (ms/token)", "digits", 1e3, reason="gpu_time_reason"),
            Column("gpu_time_share", "of the latency (%)", "percent", reason="gpu_time_reason"),
            Column("gpu_util_percent", "NVML util (%)", "digits", reason="gpu_reason"),
            Column("gpu_power_w", "power (W)", "digits", reason="gpu_reason"),
            Column("joules_per_token", "energy (J/token)", "digits", reason="joules_reason"),
            Column("joules_basis", "energy by", null="-"),
        ),
        "Means over trials, measured steps only, of the GPU that computed, all its processes. GPU time: CUDA events around the forward "
        "pass and its reply, including the stream's waits for the host. NVML util: part of the time in which any kernel ran.",
        collapses=True,
    ),
    View(
        "GPU, activity",
        (
            Column("mode", "mode"),
            Column("gpu_sm_activity_percent", "SMs active (%)", "digits", reason="gpm_reason"),
            Column("gpu_sm_occupancy_percent", "SM occupancy (%)", "digits", reason="gpm_reason"),
            Column("gpu_tensor_activity_percent", "tensor cores (%)", "digits", reason="gpm_reason"),
            Column("gpu_dram_bandwidth_percent", "DRAM (%)", "digits", reason="gpm_reason"),
            Column("gpu_pcie_rx_mib_per_s", "PCIe in (MiB/s)", "digits", reason="gpm_reason"),
            Column("gpu_pcie_tx_mib_per_s", "PCIe out (MiB/s)", "digits", reason="gpm_reason"),
        ),
        "By GPM, how much of the chip was in use: means over trials, measured steps only, all processes of the GPU that computed. PCIe in: "
        "to the GPU. DRAM: of its bandwidth.",
        collapses=True,
    ),
)
