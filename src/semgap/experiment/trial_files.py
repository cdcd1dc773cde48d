"""A trial's directory: the schemas of its tables, and the writing of it. Imports nothing of semgap, so that analysis can import it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

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

RELAY = pa.schema(
    [("t_s", pa.float64()), ("direction", pa.string()), ("late_s", pa.float64()), ("sends", pa.int64()), ("bytes", pa.int64())]
)


@dataclass(frozen=True)
class TrialResult:
    """A trial's tables, by file name without .parquet, and its manifest."""

    tables: Mapping[str, pa.Table]
    manifest: Mapping[str, Any]

    def write(self, directory: Path) -> None:
        """Writes the tables, then the manifest: a directory with a manifest is whole."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, table in self.tables.items():
            pq.write_table(table, directory / f"{name}.parquet")
        (directory / "manifest.json").write_text(json.dumps(self.manifest, indent=1, sort_keys=True) + "\n")
