"""Table break_even: the bandwidth below which a codec pays."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from semgap.analysis.columns import frame_of, interval_columns, with_endings
from semgap.analysis.results import Results
from semgap.analysis.stats import Interval, geometric_mean_interval, no_interval
from semgap.analysis.tables import codecs
from semgap.analysis.tables.render import Column, View

WAYS = ("cold_encode_mb_per_s", "cold_decode_mb_per_s")
COLUMNS = [
    *("model", "tensor", "tensor_class", "dtype", "codec", "device", "exact", "kl_nats", "ratio"),
    *with_endings(*WAYS, "break_even_mb_per_s", "break_even_gbit_per_s"),
]


def table(results: Results) -> pd.DataFrame:
    """One row per model, tensor, dtype, codec but raw, and device: the bandwidth below which the codec shortens the transfer.

    Over a link of B bytes/s, n bytes take n/B raw, and n/(r B) + n/e + n/d with a codec of ratio r that encodes e and decodes d raw bytes
    a second, one after the other. The second is shorter if B < (1 - 1/r) / (1/e + 1/d). With one speed C for both, 1/C = 1/e + 1/d, a codec
    pays at bandwidth B from C = B / (1 - 1/r) on. A bound for each process that measured the cold speeds, then geometric mean and interval:
    between two transfers of a run a forward pass reads every weight, and a tensor crosses once. Null with a reason if r <= 1.
    """
    shown, measured = codecs.table(results).to_dict("records"), results.codecs.to_dict("records")
    rows = [row | _columns(_bound(lists)) for row, lists in zip(shown, measured, strict=True) if lists["codec"] != "raw"]
    return frame_of(rows, COLUMNS)


def bandwidth_mb_per_s(ratio: float, encode_mb_per_s: float | None, decode_mb_per_s: float | None) -> float | None:
    """(1 - 1/r) / (1/e + 1/d). A speed of None takes no time. None if both are None, or if r <= 1."""
    cost = sum(1 / speed for speed in (encode_mb_per_s, decode_mb_per_s) if speed is not None)
    return (1 - 1 / ratio) / cost if ratio > 1 and cost else None


def _bound(row: Mapping[Any, Any]) -> Interval:
    """The bound in MB/s, or why there is none; beside a bound, the reason says if its ratio means nothing for a trained model."""
    if pd.isna(row["ratio"]):
        return no_interval(row["reason"])
    if row["ratio"] <= 1:
        return no_interval("it does not make the tensor smaller")
    speeds = [row[way] for way in WAYS]
    if all(values is None for values in speeds):
        return no_interval("neither way takes time that could be measured")
    processes = len(next(values for values in speeds if values is not None))
    pairs = zip(*([None] * processes if values is None else values for values in speeds), strict=True)
    interval = geometric_mean_interval([bound for pair in pairs if (bound := bandwidth_mb_per_s(row["ratio"], *pair)) is not None])
    return interval.limited_by(None if row["ratio_meaningful"] else f"the ratio is not meaningful: {row['ratio_reason']}")


def _columns(bound: Interval) -> dict[str, Any]:
    in_mb = interval_columns("break_even_mb_per_s", bound)
    in_gbit = {name.replace("mb", "gbit"): value if name.endswith("reason") else value and value * 8 / 1e3 for name, value in in_mb.items()}
    return in_mb | in_gbit


VIEWS = (
    View(
        "Break-even",
        (
            Column("dtype", "dtype"),
            Column("codec", "codec"),
            Column("device", "on"),
            Column("exact", "exact", "yes_no", null="-"),
            Column("ratio", "ratio", "digits"),
            Column("cold_encode_mb_per_s", "encode (MB/s)", "digits", null="-"),
            Column("cold_decode_mb_per_s", "decode (MB/s)", "digits", null="-"),
            Column("break_even_gbit_per_s", "pays below (Gbit/s)", "digits", reason="break_even_gbit_per_s_reason"),
        ),
        "B < (1 - 1/r) / (1/e + 1/d): ratio r, encode speed e, decode speed d, one after the other, one thread or the GPU. Speeds: over "
        "cold memory, as a transfer meets it, since between two a forward pass reads every weight. Geometric mean and 95% t interval over "
        "processes.",
        by=("model", "tensor"),
    ),
)
