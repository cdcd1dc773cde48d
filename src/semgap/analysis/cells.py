"""What a table's cells are made of: the trials of one mode in one place, and the mean, sum or agreement of their values."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from semgap.analysis.stats import Interval, PairedRatio, mean_interval, paired_ratio

BASELINE, LOCAL, CAST = "remote_cache", "local", "remote_cache_fp16"
PAYLOAD = "payload_bytes_per_token"
PLACE = ["model", "network", "phase"]
ENDINGS = ("", "_low", "_high", "_reason")
"""What `spread` makes of a name."""


def places(rows: pd.DataFrame) -> Iterator[tuple[dict[str, str], dict[str, pd.DataFrame]]]:
    """Each (model, network, phase) with the trials of its modes, all in the order in which they first appear."""
    for keys, block in rows.groupby(PLACE, sort=False):
        modes = {str(mode): cell for mode, cell in block.groupby("mode", sort=False)}
        yield dict(zip(PLACE, map(str, keys), strict=True)), modes


def spread(name: str, interval: Interval) -> dict[str, Any]:
    """An interval as four columns: `name`, and with the endings _low, _high and _reason."""
    return {
        name: interval.value,
        f"{name}_low": interval.low,
        f"{name}_high": interval.high,
        f"{name}_reason": interval.reason,
    }


def paired_with(cell: pd.DataFrame, baseline: pd.DataFrame | None, baseline_name: str) -> PairedRatio:
    """Ratio of the latencies of paired trials (`stats.paired_ratio`); null with the reason where the baseline was not run."""
    if baseline is None:
        return PairedRatio(Interval(None, None, None, 0, f"{baseline_name} was not run"), ())
    return paired_ratio(cell, baseline)


def byte_ratio(cell: pd.DataFrame, baseline: pd.DataFrame | None, mode: str, baseline_name: str) -> Interval:
    """Payload bytes per token over those of the baseline. Bytes are counted, so trials of any session compare.

    Exact, [v, v], where all trials of both modes agree; else a t interval on the ratios of trials of the same number.
    """
    if baseline is None:
        return Interval(None, None, None, 0, f"{baseline_name} was not run")
    ours, base = cell.set_index("trial")[PAYLOAD], baseline.set_index("trial")[PAYLOAD]
    if not (base > 0).all() or ours.isna().any():
        return Interval(None, None, None, 0, f"payload bytes of {mode} or {baseline_name} were not measured")
    if ours.nunique() == 1 and base.nunique() == 1:
        ratio = float(ours.iloc[0] / base.iloc[0])
        return Interval(ratio, ratio, ratio, len(ours), "one trial: counted, not repeated" if len(ours) == 1 else None)
    return mean_interval((ours / base).dropna().tolist())


def frame_of(rows: Sequence[Mapping[str, Any]], columns: list[str] | None = None) -> pd.DataFrame:
    """Rows as a frame whose columns keep their type when all their values are null."""
    frame = pd.DataFrame(list(rows), columns=columns)
    for name in frame.columns[frame.isna().all()]:
        frame[name] = frame[name].astype("str" if name.endswith("reason") else "float64")
    return frame


def mean_of(values: pd.Series) -> float | None:
    """The mean; null where any value is, and of nothing."""
    return None if values.isna().any() or values.empty else float(values.astype("float64").mean())


SENT_ONCE = ("setup_payload_bytes", "weights_bytes", "weights_put_mb_per_s", "earlier_sessions_weights_bytes")


def means_of(cell: pd.DataFrame, names: Sequence[str]) -> dict[str, Any]:
    """Means of columns over a cell's trials. Those of `SENT_ONCE` are over the trials before which the worker's cache held nothing: what
    it held was uploaded by an earlier trial, and 0 bytes are no upload. `weights_reason` says why there is no mean of them.
    """
    uploading = cell[cell["cached_weights_bytes"].isna() | (cell["cached_weights_bytes"] == 0)]
    means: dict[str, Any] = {name: mean_of((uploading if name in SENT_ONCE else cell)[name]) for name in names}
    reason = first_of(cell["weights_put_reason"]) if uploading.empty else first_of(uploading["weights_put_reason"])
    return means | {"weights_reason": reason if means["weights_put_mb_per_s"] is None else None}


def all_of(values: pd.Series) -> bool | None:
    """False where any trial says so, null where any other trial does not know."""
    known = values.dropna()
    if not known.astype(bool).all():
        return False
    return True if len(known) == len(values) else None


def first_of(values: pd.Series) -> Any:
    """The first value that is not null, or null."""
    known = values.dropna()
    return known.iloc[0] if len(known) else None
