"""A trial's files: the schemas of its tables, their rows, and its manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from semgap.engine.model_files import verify_model
from semgap.experiment import provenance, staleness
from semgap.experiment.trial_setup import Paths, TrialError
from semgap.network.spec import Network, asked_of, measured_of
from semgap.processes import slurm
from semgap.processes.machine import identity
from semgap.telemetry import samplers

MANIFEST_SCHEMA = 1


STEPS = pa.schema(
    [
        ("request", pa.int64()),
        ("step", pa.int64()),
        ("warmup", pa.bool_()),
        ("measured", pa.bool_()),
        ("kind", pa.string()),
        ("position", pa.int64()),
        ("tokens_in", pa.int64()),
        ("begin_s", pa.float64()),
        ("latency_s", pa.float64()),
        ("client_cpu_s", pa.float64()),
        ("worker_compute_s", pa.float64()),
        ("worker_cpu_s", pa.float64()),
        ("gpu_s", pa.float64()),
        ("up_tensor_bytes", pa.int64()),
        ("up_payload_bytes", pa.int64()),
        ("up_frame_bytes", pa.int64()),
        ("down_tensor_bytes", pa.int64()),
        ("down_payload_bytes", pa.int64()),
        ("down_frame_bytes", pa.int64()),
        ("round_trips", pa.int64()),
        ("up_segments", pa.int64()),
        ("down_segments", pa.int64()),
        ("token", pa.int64()),
        ("reference_token", pa.int64()),
        ("token_match", pa.bool_()),
        ("edge_draw", pa.bool_()),
        ("logits_bitwise", pa.bool_()),
        ("logits_max_abs_diff", pa.float64()),
        ("kl_nats", pa.float64()),
        ("evict_fraction", pa.float64()),
        ("evicted_layers", pa.int64()),
        ("saved_tensor_bytes", pa.int64()),
        ("saved_payload_bytes", pa.int64()),
        ("restore_alone_s", pa.float64()),
        ("recovery", pa.string()),
        ("recovery_planned", pa.string()),
        ("missing_bytes", pa.int64()),
        ("stall_s", pa.float64()),
        ("predicted_s", pa.float64()),
        ("fetched_network_bytes", pa.int64()),
        ("saved_network_bytes", pa.int64()),
        ("copied_bytes", pa.int64()),
        ("fallback", pa.string()),
    ]
)


REQUESTS = pa.schema(
    [
        ("request", pa.int64()),
        ("warmup", pa.bool_()),
        ("prompt_tokens", pa.int64()),
        ("new_tokens", pa.int64()),
        ("ttft_s", pa.float64()),
        ("e2e_s", pa.float64()),
        ("tpot_s", pa.float64()),
    ]
)


LEDGER = pa.schema(
    [(name, pa.string()) for name in ("side", "link", "direction", "operation", "kind", "tensor_class")]
    + [(name, pa.int64()) for name in ("frames", "round_trips", "tensor_bytes", "payload_bytes", "header_bytes", "encode_ns", "decode_ns")]
)


TCP = pa.schema(
    [("side", pa.string()), ("moment", pa.string())]
    + [(name, pa.int64()) for name in ("bytes_sent", "bytes_retrans", "bytes_received", "segs_out", "segs_in", "total_retrans", "rtt_us")]
    + [("congestion", pa.string()), ("segment_header_bytes", pa.int64())]
)


@dataclass(frozen=True)
class TrialResult:
    """What a trial leaves: tables by file name without .parquet, and the manifest."""

    tables: Mapping[str, pa.Table]
    manifest: Mapping[str, Any]

    def write(self, directory: Path) -> None:
        """Writes every table and, last, the manifest: a directory with a manifest is whole."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, table in self.tables.items():
            pq.write_table(table, directory / f"{name}.parquet")
        (directory / "manifest.json").write_text(json.dumps(self.manifest, indent=1, sort_keys=True) + "\n")


@dataclass(frozen=True)
class Outcome:
    """What the roles left behind, before it is made into tables."""

    report: dict[str, Any]
    compared: list[list[dict[str, Any]]]  # exactness.compare's rows of each session; the last one is the trial
    telemetry: dict[str, pa.Table]
    telemetry_notes: dict[str, Any]
    worker_start_s: float | None


def step_rows(outcome: Outcome) -> list[dict[str, Any]]:
    """The client's rows, with the worker's costs (one a step, as they came) and the comparison (one a measured request's step)."""
    steps = outcome.report["steps"]
    costs = outcome.report.get("worker_steps")
    if costs and len(costs) != len(steps):
        raise TrialError(f"the client saw {len(steps)} steps, the worker {len(costs)}")
    compared = iter(outcome.compared[-1])
    rows = []
    for step in steps:
        row = step | {"kind": "prefill" if step["step"] == 0 else "decode"}
        if costs:
            row |= _cost_columns(costs[step["order"]])
        rows.append(row if step["warmup"] else row | next(compared))
    return rows


def _cost_columns(cost: Mapping[str, Any]) -> dict[str, Any]:
    """What a step took on the worker; what it took to restore KV blocks is 0 where none was missing."""
    columns = {"worker_compute_s": cost["compute_ns"] / 1e9, "worker_cpu_s": cost["cpu_ns"] / 1e9}
    columns["gpu_s"] = None if cost["gpu_ns"] is None else cost["gpu_ns"] / 1e9
    recovered = cost["recovered"]
    if recovered is None:
        nothing = ("missing_bytes", "fetched_network_bytes", "saved_network_bytes", "copied_bytes")
        return columns | dict.fromkeys(nothing, 0) | {"stall_s": 0.0}
    predicted = recovered["predicted_ns"]
    columns |= {name: recovered[name] for name in ("missing_bytes", "fetched_network_bytes", "saved_network_bytes", "copied_bytes")}
    columns |= {"recovery": recovered["how"], "recovery_planned": recovered["planned"], "fallback": recovered["fallback"]}
    return columns | {"stall_s": recovered["stall_ns"] / 1e9, "predicted_s": None if predicted is None else predicted / 1e9}


def ledger_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Both sides of the client's link to the worker, and of the worker's to its KV host, where it has one."""
    host = report.get("kv_host") or {"rows": [], "peer_rows": []}
    sides = {"client": report.get("client_rows", []), "worker": report.get("worker_rows", [])}
    sides |= {"worker_to_kv_host": host["rows"], "kv_host": host["peer_rows"]}
    return [{"side": side, **row} for side, rows in sides.items() for row in rows]


def tcp_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    if "client_tcp" not in report:
        return []
    moments = (("client", "start", "start_tcp"), ("client", "end", "client_tcp"), ("worker", "end", "worker_tcp"))
    congestion = {"client": report["congestion"], "worker": report["granted"]["congestion"]}
    return [{"side": side, "moment": moment, "congestion": congestion[side], **report[key]} for side, moment, key in moments]


def merge_telemetry(
    scratch: Path, local: Mapping[str, samplers.SourceResult], remote: Mapping[str, dict[str, Any]], worker_offset_s: float
) -> tuple[dict[str, pa.Table], dict[str, Any]]:
    """One table a source, over both hosts, and a note on each: rows, reason for what is missing, what the samplers cost.

    The worker's stamps are put on the client's clock, from which `worker_offset_s` tells that of its host.
    """
    tables: dict[str, pa.Table] = {}
    notes: dict[str, Any] = {}
    for source in samplers.SOURCES:
        parts = {}
        if source in local:
            cost = local[source].cost
            parts["client"] = (_read_samples(local[source].path), local[source].reason, cost and cost.describe())
        if source in remote:
            samples = _shifted(_read_samples(scratch / f"worker-{source}.parquet"), -worker_offset_s)
            parts["worker"] = (samples, remote[source]["reason"], remote[source]["cost"])
        if not parts:
            unasked = samplers.empty(source, scratch / f"no-{source}.parquet", "not in config.telemetry.sources")
            parts["client"] = (_read_samples(unasked.path), unasked.reason, None)
        tables[source] = pa.concat_tables([part[0] for part in parts.values()])
        reasons = [f"{side}: {part[1]}" for side, part in parts.items() if part[1]]
        notes[source] = {
            "rows": tables[source].num_rows,
            "reason": "; ".join(reasons) or None,
            "cost": {side: part[2] for side, part in parts.items()},
        }
    return tables, notes


def _shifted(samples: pa.Table, by_s: float) -> pa.Table:
    """The samples with `by_s` added to their stamps."""
    if not by_s:
        return samples
    index = samples.schema.get_field_index("t_s")
    return samples.set_column(index, samples.schema.field(index), pc.add(samples["t_s"], by_s))


def _read_samples(path: Path) -> pa.Table:
    """A Parquet file's table. pq.read_table would import pandas, which a trial does without."""
    with pq.ParquetFile(path) as file:
        return file.read()


def manifest_of(cell: Mapping[str, Any], place: Paths, outcome: Outcome, summary: dict[str, Any]) -> dict[str, Any]:
    report = outcome.report
    run = provenance.describe_run(place.root)
    digest = verify_model(place.model_directory)
    return {
        "schema": MANIFEST_SCHEMA,
        "cell": cell,
        "cell_digest": staleness.content_digest(cell),
        "model": {"sha256": digest.sha256, "ratios_meaningful": digest.ratios_meaningful, "ratios_reason": digest.ratios_reason},
        "session": provenance.session_id(),
        "fingerprint": provenance.fingerprint(run, report["device"], _worker_node(cell)),
        "provenance": run,
        "hosts": _hosts(report),
        "device": report["device"],
        "executor": report["executor"],
        "probe": report.get("probe"),
        "network": _network(cell, report),
        "setup": report["setup"] | {"worker_start_s": outcome.worker_start_s},
        "memory": {
            "client_peak_rss_anon_bytes": report["client_peak_rss_anon_bytes"],
            "worker_peak_rss_bytes": report.get("worker_peak_rss_bytes"),
            "worker_weight_store_bytes": report.get("worker_weight_store_bytes"),
        },
        "reconciliation": _reconciliation(report),
        "exactness": summary,
        "measured": report["measured"],
        "telemetry": outcome.telemetry_notes | {"worker_clock": report.get("worker_clock")},
        "pcie_reason": report.get("pcie_reason", "local: the cache never leaves the device"),
        "kv": {"budget_bytes": report.get("kv_budget_bytes"), "fallbacks": report.get("fallbacks", [])},
    }


def _network(cell: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the link was asked to be and what was measured of it, and what a relay did. None in local, which has no link."""
    if "probe" not in report:
        return None
    asked, relayed = asked_of(msgspec.convert(cell["network_spec"], Network)), report.get("relay")
    return {
        "asked": {"rtt_s": asked.rtt_s, "goodput_bytes_per_s": asked.goodput_bytes_per_s},
        "measured": measured_of(report["probe"]),
        "relay": relayed and {key: value for key, value in relayed.items() if key != "lateness"},
    }


def _hosts(report: Mapping[str, Any]) -> dict[str, Any]:
    """Where the two sides ran; the worker is null in local."""
    return {"client": identity(), "worker": report["granted"]["machine"] if "granted" in report else None}


def _worker_node(cell: Mapping[str, Any]) -> str | None:
    """The node on which this allocation's workers run, in local trials too, so that their latencies pair with the others'."""
    if cell["worker"]["launch"] != "srun":
        return None
    try:
        return slurm.allocation().other
    except slurm.AllocationError:  # a local trial in a job of one node
        return None


def _require_steps_to_add_up(report: Mapping[str, Any]) -> None:
    """The measured steps' own byte counts must be all that the ledger holds as regular or delta."""
    for direction in ("up", "down"):
        in_steps = sum(step[f"{direction}_frame_bytes"] for step in report["steps"] if step["measured"])
        rows = [row for row in report["client_rows"] if row["direction"] == direction and row["link"] == "network"]
        in_ledger = sum(row["payload_bytes"] + row["header_bytes"] for row in rows if row["kind"] != "setup")
        if in_steps != in_ledger:
            raise TrialError(f"measured steps hold {in_steps} bytes {direction}, the ledger's regular and delta frames {in_ledger}")


def _reconciliation(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """What agreed to the byte; a trial where it did not never gets here. None in local, which has no socket."""
    if "client_rows" not in report:
        return None
    _require_steps_to_add_up(report)
    return {
        "agreed": True,
        "frame_bytes_by_kind": report["frame_bytes_by_kind"],
        "closing_frame_bytes": report["closing_frame_bytes"],
        "kernel_bytes_sent": report["client_tcp"]["bytes_sent"] - report["client_tcp"]["bytes_retrans"],
        "kernel_bytes_received": report["client_tcp"]["bytes_received"],
        "retransmitted_bytes": report["client_tcp"]["bytes_retrans"] + report["worker_tcp"]["bytes_retrans"],
        "kv_host": report["kv_host"]
        and {
            "agreed": report["kv_host"]["agreed"],
            "frame_bytes_by_kind": report["kv_host"]["peer"]["frame_bytes_by_kind"],
            "kernel_bytes_sent": report["kv_host"]["tcp"]["bytes_sent"] - report["kv_host"]["tcp"]["bytes_retrans"],
            "kernel_bytes_received": report["kv_host"]["tcp"]["bytes_received"],
        },
    }
