"""Table codecs: ratio, speed and loss of each codec on tensors of the real model."""

from typing import Any

import pandas as pd

from semgap.analysis.columns import interval_columns
from semgap.analysis.results import Results
from semgap.analysis.stats import geometric_mean_interval, no_interval
from semgap.analysis.tables.render import Column, View

SPEEDS = tuple(f"{memory}_{way}_mb_per_s" for memory in ("cold", "warm") for way in ("encode", "decode"))


def table(results: Results) -> pd.DataFrame:
    """The measured codecs (`results.load_codecs`): one row per model, tensor, dtype, codec and device. Speeds are means over processes."""
    return pd.DataFrame([_with_intervals(row) for row in results.codecs.to_dict("records")])


def _with_intervals(row: dict[Any, Any]) -> dict[Any, Any]:
    """The row, with four columns for each list of speeds."""
    made: dict[Any, Any] = {}
    for name, value in row.items():
        if name in SPEEDS:
            made |= interval_columns(name, no_interval(row["speed_reason"]) if value is None else geometric_mean_interval(value))
        else:
            made[name] = value
    return made


FIRST = (Column("dtype", "dtype"), Column("codec", "codec"), Column("device", "on"))
BY = ("model", "tensor")
VIEWS = (
    View(
        "Codecs, size",
        (
            *FIRST,
            Column("payload_bytes", "payload (B)", "count", reason="reason"),
            Column("ratio", "ratio", "digits", reason="ratio_reason"),
            Column("ratio_to_fp16", "x fp16", "digits", null="-"),
            Column("ratio_to_fp16_zlib", "x fp16 + zlib", "digits", null="-"),
            Column("entropy_ratio", "order-0 ratio", "digits", null="-"),
        ),
        "Ratio: raw bytes of the same dtype / payload. x fp16: fp16 bytes / payload. x fp16 + zlib: payload of the original experiment's "
        "codec / payload. Order-0 ratio: the limit of a coder without context, by the entropy of the byte planes.",
        by=BY,
    ),
    View(
        "Codecs, speed",
        (
            *FIRST,
            Column("cold_encode_mb_per_s", "encode, cold (MB/s)", "digits", reason="cold_encode_mb_per_s_reason", null="-"),
            Column("cold_decode_mb_per_s", "decode, cold (MB/s)", "digits", reason="cold_decode_mb_per_s_reason", null="-"),
            Column("warm_encode_mb_per_s", "encode, warm (MB/s)", "digits", reason="warm_encode_mb_per_s_reason", null="-"),
            Column("warm_decode_mb_per_s", "decode, warm (MB/s)", "digits", reason="warm_decode_mb_per_s_reason", null="-"),
        ),
        "Raw bytes, one thread or the GPU, without copies over PCIe; geometric mean and 95% t interval over fresh processes. Cold: caches "
        "evicted, output to memory never touched before. Warm: the same buffers again.",
        by=BY,
    ),
    View(
        "Codecs, loss",
        (
            *FIRST,
            Column("exact", "exact", "yes_no", null="-"),
            Column("kl_nats", "mean KL (nats)", "small", reason="kl_reason", null="-"),
            Column("max_abs_diff", "largest difference", "small", null="-"),
        ),
        "Exact: all bytes came back. KL and largest absolute difference: logits against those of the untouched tensor in the run's dtype, "
        "row by row; for KV, logits of the text that follows.",
        by=BY,
    ),
)
