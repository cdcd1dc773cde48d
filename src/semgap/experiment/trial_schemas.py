"""A trial's directory: the schemas of its tables, and the writing of it. It imports the seals alone, so that analysis can import it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from semgap.seal import sealed_json, sha256, whole_directory

MANIFEST_SCHEMA = 2


STEPS = pa.schema(
    [(name, pa.int64()) for name in ("request", "step")]
    + [("warmup", pa.bool_()), ("measured", pa.bool_()), ("kind", pa.string()), ("position", pa.int64()), ("tokens_in", pa.int64())]
    + [(name, pa.float64()) for name in ("begin_s", "latency_s", "client_cpu_s", "worker_compute_s", "worker_cpu_s", "gpu_s")]
    + [(name, pa.float64()) for name in ("client_compute_s", "client_codec_s", "worker_codec_s")]
    + [(name, pa.int64()) for name in ("up_tensor_bytes", "up_payload_bytes", "up_frame_bytes")]
    + [(name, pa.int64()) for name in ("down_tensor_bytes", "down_payload_bytes", "down_frame_bytes")]
    + [(name, pa.int64()) for name in ("round_trips", "up_segments", "down_segments", "token", "reference_token")]
    + [(name, pa.bool_()) for name in ("token_match", "edge_draw", "logits_bitwise")]
    + [(name, pa.float64()) for name in ("logits_max_abs_diff", "kl_nats", "evict_fraction")]
    + [(name, pa.int64()) for name in ("evicted_layers", "saved_tensor_bytes", "saved_payload_bytes")]
    + [("restore_alone_s", pa.float64()), ("recovery", pa.string()), ("recovery_planned", pa.string()), ("missing_bytes", pa.int64())]
    + [("stall_s", pa.float64()), ("predicted_s", pa.float64())]
    + [(name, pa.int64()) for name in ("fetched_network_bytes", "saved_network_bytes", "copied_bytes")]
    + [("kv_codecs", pa.string()), ("fallback", pa.string()), ("prefix_tokens", pa.int64())]
    + [(name, pa.float64()) for name in ("predicted_fetch_s", "predicted_recompute_s")]
    + [
        ("moves", pa.bool_()),
        ("handed", pa.bool_()),
        ("sent_network_bytes", pa.int64()),
        ("sent_s", pa.float64()),
        ("sent_after_s", pa.float64()),
    ]
)


REQUESTS = pa.schema(
    [("request", pa.int64()), ("warmup", pa.bool_()), ("prompt_tokens", pa.int64()), ("new_tokens", pa.int64())]
    + [(name, pa.float64()) for name in ("ttft_s", "e2e_s", "tpot_s")]
    + [(name, pa.int64()) for name in ("level", "class", "connection")]
    + [("measured", pa.bool_()), ("arrived_s", pa.float64()), ("late_s", pa.float64()), ("queue_s", pa.float64()), ("in_time", pa.bool_())]
)


LOAD = pa.schema(
    [("request", pa.int64()), ("level", pa.int64()), ("step", pa.int64()), ("measured", pa.bool_())]
    + [(name, pa.float64()) for name in ("came_s", "gap_s", "queued_s", "compute_s")]
    + [("token", pa.int64()), ("reference_token", pa.int64()), ("token_match", pa.bool_()), ("edge_draw", pa.bool_())]
)


BATCHES = pa.schema(
    [("level", pa.int64()), ("begin_s", pa.float64())]
    + [(name, pa.int64()) for name in ("requests", "decodes", "prefill_tokens", "drawn", "live", "queued", "kv_blocks", "kv_shared")]
    + [(name, pa.float64()) for name in ("schedule_s", "compute_s", "reply_s")]
)


LEDGER = pa.schema(
    [("connection", pa.int64())]
    + [(name, pa.string()) for name in ("side", "link", "direction", "operation", "kind", "tensor_class")]
    + [(name, pa.int64()) for name in ("frames", "round_trips", "tensor_bytes", "payload_bytes", "header_bytes", "encode_ns", "decode_ns")]
)


TCP = pa.schema(
    [("connection", pa.int64()), ("side", pa.string()), ("moment", pa.string())]
    + [(name, pa.int64()) for name in ("bytes_sent", "bytes_retrans", "bytes_received", "segs_out", "segs_in", "total_retrans", "rtt_us")]
    + [("congestion", pa.string()), ("segment_header_bytes", pa.int64())]
)


RELAY = pa.schema(
    [("side", pa.string()), ("t_s", pa.float64()), ("direction", pa.string()), ("late_s", pa.float64())]
    + [(name, pa.int64()) for name in ("sends", "bytes")]
)


CONTROL = pa.schema(
    [(name, pa.int64()) for name in ("request", "step", "position", "window")] + [(name, pa.float64()) for name in ("begin_s", "compute_s")]
)


@dataclass(frozen=True)
class TrialResult:
    """A trial's tables, by file name without .parquet, and its manifest."""

    tables: Mapping[str, pa.Table]
    manifest: Mapping[str, Any]

    def write(self, directory: Path) -> None:
        """Writes the directory whole, in place of an earlier one, or leaves it as it was."""
        with whole_directory(directory) as new:
            self.write_into(new)

    def write_into(self, directory: Path) -> None:
        """Writes the tables into a directory, then the manifest, which seals them."""
        for name, table in self.tables.items():
            pq.write_table(table, directory / f"{name}.parquet", write_page_checksum=True)
        (directory / "manifest.json").write_bytes(sealed_manifest(self.manifest, directory))


def sealed_manifest(manifest: Mapping[str, Any], directory: Path) -> bytes:
    """The bytes of manifest.json. It seals the tables in `directory`: `files` has their sha256."""
    files = {file.name: sha256(file.read_bytes()) for file in sorted(directory.glob("*.parquet"))}
    return sealed_json({**manifest, "files": files})
