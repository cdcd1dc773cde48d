"""Groups trials by setting and mode, and reduces the trials of a mode to one value a column."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from semgap.analysis.stats import Interval, mean_interval, no_interval, paired_ratio
from semgap.phases import MOVE_KV

PAYLOAD = "payload_bytes_per_token"
SETTING = ["model", "network", "phase"]
"""A cell of the grid without its mode: modes are compared within a setting."""
SENT_ONCE = ("setup_payload_bytes", "weights_bytes", "weights_put_mb_per_s", "earlier_sessions_weights_bytes")


def alike(rows: pd.DataFrame) -> pd.DataFrame:
    """The trials of phases that move no KV blocks: their steps are alike in all modes, so that modes compare by gap and latency."""
    return rows[~rows["phase_kind"].isin(MOVE_KV)]


def by_setting(rows: pd.DataFrame) -> Iterator[tuple[dict[str, str], dict[str, pd.DataFrame]]]:
    """Each setting with its trials by mode, both in order of first appearance."""
    for keys, block in rows.groupby(SETTING, sort=False):
        modes = {str(mode): cell for mode, cell in block.groupby("mode", sort=False)}
        yield dict(zip(SETTING, map(str, keys), strict=True)), modes


def local_trials(rows: pd.DataFrame, setting: Mapping[str, str]) -> pd.DataFrame:
    """The trials without a worker that a setting compares with: its own, else those over another network, which they do not cross."""
    local = matching(rows[rows["placement"] == "local"], {key: setting[key] for key in ("model", "phase")})
    own = local[local["network"] == setting["network"]]
    return own if len(own) else local[local["network"] == first_of(local["network"])]


def ratio_to_local(rows: pd.DataFrame, setting: Mapping[str, str], trials: pd.DataFrame) -> Interval:
    """Ratio of the latencies of paired trials to local; null with a reason if no local mode was run."""
    local = local_trials(rows, setting)
    return paired_ratio(trials, local) if len(local) else no_interval("no local mode was run")


def latency_ratio(modes: Mapping[str, pd.DataFrame], mode: str, baseline: str | None) -> Interval:
    """Ratio of the latencies of paired trials (`stats.paired_ratio`); null with a reason if a mode was not run."""
    return _not_run(modes, mode, baseline) or paired_ratio(modes[mode], modes[baseline or ""])


def byte_ratio(modes: Mapping[str, pd.DataFrame], mode: str, baseline: str | None) -> Interval:
    """Payload bytes per token over those of the baseline. Bytes are counted, so trials of any session compare.

    [v, v] if all trials of each mode agree; else a t interval over the ratios of trials of the same number.
    """
    missing = _not_run(modes, mode, baseline)
    if missing:
        return missing
    ours, base = (modes[name or ""].set_index("trial")[PAYLOAD] for name in (mode, baseline))
    if not (base > 0).all() or ours.isna().any():
        return no_interval(f"payload bytes of {mode} or {baseline} were not measured")
    if ours.nunique() == 1 and base.nunique() == 1:
        ratio = float(ours.iloc[0] / base.iloc[0])
        return Interval(ratio, ratio, ratio, len(ours), "one trial: counted, not repeated" if len(ours) == 1 else None)
    return mean_interval((ours / base).dropna().tolist())


def _not_run(modes: Mapping[str, pd.DataFrame], *needed: str | None) -> Interval | None:
    return next((no_interval(f"{mode or 'no such baseline'} was not run") for mode in needed if mode not in modes), None)


def matching(frame: pd.DataFrame, keys: Mapping[str, Any]) -> pd.DataFrame:
    """The rows that have all these values."""
    for key, value in keys.items():
        frame = frame[frame[key] == value]
    return frame


def mean_of(values: pd.Series) -> float | None:
    """The mean; null if any value is null or there are no values."""
    return None if values.isna().any() or values.empty else float(values.astype("float64").mean())


def means_of(cell: pd.DataFrame, names: Sequence[str]) -> dict[str, Any]:
    """Means of columns over a cell's trials, and `weights_reason`.

    The means of `SENT_ONCE` use only trials that began with an empty weight cache: a trial that found its weights there uploaded none.
    `weights_reason` says why they are null.
    """
    uploading = cell[cell["cached_weights_bytes"].isna() | (cell["cached_weights_bytes"] == 0)]
    means: dict[str, Any] = {name: mean_of((uploading if name in SENT_ONCE else cell)[name]) for name in names}
    reason = first_of(cell["weights_put_reason"]) if uploading.empty else first_of(uploading["weights_put_reason"])
    return means | {"weights_reason": reason if means["weights_put_mb_per_s"] is None else None}


def all_of(values: pd.Series) -> bool | None:
    """False if any value is false; else null if any is null; else true."""
    every: Any = values.astype("boolean").all(skipna=False)
    return None if pd.isna(every) else bool(every)


def first_of(values: pd.Series) -> Any:
    """The first value that is not null, or null."""
    known = values.dropna()
    return known.iloc[0] if len(known) else None


def layers_by_codec(texts: pd.Series) -> str | None:
    """Layers by the codec in which they came, means over the steps that fetched, by their `kv_codecs`: `raw x 3, int8 x 9`; or null."""
    layers: dict[str, int] = {}
    for name, count in (run.rsplit(" x ", 1) for text in texts.dropna() for run in text.split(", ")):
        layers[name] = layers.get(name, 0) + int(count)
    return ", ".join(f"{name} x {count / texts.count():.3g}" for name, count in layers.items()) or None


def kept(trials: pd.DataFrame, exactness: pd.DataFrame, model: str, mode: str) -> dict[str, Any]:
    """The mode's promise, and whether all its trials and its exactness check kept it."""
    checks = matching(exactness, {"model": model, "mode": mode})
    promises = pd.Series([*trials["promise_kept"], *checks["promise_kept"]], dtype="object")
    return {"keeps": first_of(trials["keeps"]), "promise_kept": all_of(promises)}
