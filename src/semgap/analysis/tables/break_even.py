"""Table break_even: the bandwidth below which a codec pays."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from semgap.analysis.columns import frame_of
from semgap.analysis.results import Results
from semgap.analysis.tables.render import Column, View

COLUMNS = [
    *("model", "tensor", "tensor_class", "dtype", "codec", "device", "exact", "kl_nats", "ratio", "encode_mb_per_s", "decode_mb_per_s"),
    *("break_even_mb_per_s", "break_even_gbit_per_s", "reason"),
]


def table(results: Results) -> pd.DataFrame:
    """One row per model, tensor, dtype, codec but raw, and device: the bandwidth below which the codec shortens the transfer.

    Over a link of B bytes/s, n bytes take n/B raw, and n/(r B) + n/e + n/d with a codec of ratio r that encodes e and decodes d raw bytes
    a second, one after the other. The second is shorter if B < (1 - 1/r) / (1/e + 1/d). With one speed C for both, 1/C = 1/e + 1/d, a codec
    pays at bandwidth B from C = B / (1 - 1/r) on. Null with a reason if r <= 1.
    """
    return frame_of([row | _bound(row) for row in results.codecs.to_dict("records") if row["codec"] != "raw"], COLUMNS)


def bandwidth_mb_per_s(ratio: float, encode_mb_per_s: float | None, decode_mb_per_s: float | None) -> float | None:
    """(1 - 1/r) / (1/e + 1/d). A speed of None takes no time. None if both are None, or if r <= 1."""
    cost = sum(1 / speed for speed in (encode_mb_per_s, decode_mb_per_s) if speed is not None)
    return (1 - 1 / ratio) / cost if ratio > 1 and cost else None


def _bound(row: Mapping[Any, Any]) -> dict[str, Any]:
    """The bound, or why there is none; beside a bound, `reason` says if its ratio means nothing for a trained model."""
    bound, reason = None, row["reason"]
    if pd.notna(row["ratio"]):
        speeds = [None if pd.isna(row[name]) else row[name] for name in ("encode_mb_per_s", "decode_mb_per_s")]
        bound = bandwidth_mb_per_s(row["ratio"], *speeds)
        reason = None if row["ratio_meaningful"] else f"the ratio is not meaningful: {row['ratio_reason']}"
        if bound is None:
            reason = "it does not make the tensor smaller" if row["ratio"] <= 1 else "neither way takes time that could be measured"
    return {"break_even_mb_per_s": bound, "break_even_gbit_per_s": bound and bound * 8 / 1e3, "reason": reason}


VIEWS = (
    View(
        "Break-even",
        (
            Column("dtype", "dtype"),
            Column("codec", "codec"),
            Column("device", "on"),
            Column("exact", "exact", "yes_no", null="-"),
            Column("ratio", "ratio", "digits"),
            Column("encode_mb_per_s", "encode (MB/s)", "digits", null="-"),
            Column("decode_mb_per_s", "decode (MB/s)", "digits", null="-"),
            Column("break_even_mb_per_s", "pays below (MB/s)", "digits", reason="reason"),
            Column("break_even_gbit_per_s", "pays below (Gbit/s)", "digits", reason="reason"),
        ),
        "B < (1 - 1/r) / (1/e + 1/d): ratio r, encode speed e, decode speed d, one after the other, one thread or the GPU.",
        by=("model", "tensor"),
    ),
)
