"""Table recovery: bytes and time that each policy spends to bring back the KV blocks that a step misses."""

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from semgap.analysis.aggregate import SETTING, by_setting, kept, mean_of
from semgap.analysis.columns import frame_of, interval_columns, with_endings
from semgap.analysis.results import Results
from semgap.analysis.stats import Interval, mean_interval, no_interval
from semgap.analysis.tables.render import Column, View

OVERLAPPING = ("delta", "auto")
"""The policies that fetch while layers compute."""
TIMES = ("itl_ms", "recovery_ms", "stall_ms", "restore_alone_ms", "hidden_share", "itl_hidden_share", "predicted_ms")
STEP_MEANS = {
    "whole_bytes": "whole_bytes_per_step",
    "missing_bytes": "missing_bytes_per_step",
    "fetched_network_bytes": "fetched_network_bytes_per_step",
    "saved_network_bytes": "saved_network_bytes_per_step",
    "copied_bytes": "copied_bytes_per_step",
}
WAYS = ("reload", "recompute", "delta")
COLUMNS = [
    *(*SETTING, "mode", "evict_fraction", "kv_budget", "live_requests", "recovery", "shadow", "kv_codec", "trials", "steps_per_trial"),
    *("keeps", "promise_kept", "ratios_reason"),
    *(*STEP_MEANS.values(), "bytes_reason", "missing_share", "fetched_to_missing", "fetched_to_missing_reason"),
    *("saved_payload_bytes_per_step", "saved_payload_reason"),
    *with_endings(*TIMES),
    *(*(f"{way}_steps" for way in WAYS), "fallback_steps", "steps_reason"),
]
IN_LOCAL = "nothing is taken off the device in local"
NOTHING_EVICTED = "nothing is taken off the device in these steps"


def table(results: Results) -> pd.DataFrame:
    """One row per model, network, recovery phase, mode and evict fraction; without fractions in the phase, one per mode.

    Bytes are means over all measured steps. Times are means over trials, with a t interval, of the trial's median over its steps.
    `missing_bytes_per_step` counts evicted layers only: a recovery in proportion to the miss, uncompressed, would fetch that much.
    `recovery_ms` is the ITL less the ITL of the same trial's steps with fraction 0. `hidden_share` is 1 - stall / the same restore done
    alone, over the steps restored by delta. `itl_hidden_share` is 1 - recovery / the same restore done alone: it includes the compute that
    fetching slowed down.
    """
    rows = [
        _row(setting, mode, cell, steps, results)
        for setting, modes in by_setting(results.recovery_steps)
        for mode, cell in modes.items()
        for _, steps in cell.groupby("evict_fraction", dropna=False)
    ]
    return frame_of(rows, COLUMNS)


def _row(setting: Mapping[str, str], mode: str, cell: pd.DataFrame, steps: pd.DataFrame, results: Results) -> dict[str, Any]:
    """The row of `steps`, which have one evict fraction, out of `cell`, all steps of the mode."""
    first, trials = steps.iloc[0], _trial_rows(results, setting, mode)
    fraction = None if pd.isna(first["evict_fraction"]) else float(first["evict_fraction"])
    return {
        **setting,
        "mode": mode,
        "evict_fraction": fraction,
        **{name: first[name] for name in ("kv_budget", "live_requests", "shadow", "kv_codec", "ratios_reason")},
        "recovery": first["policy"],
        "trials": steps["trial"].nunique(),
        "steps_per_trial": float(steps.groupby("trial").size().mean()),
        **kept(trials, results.exactness, setting["model"], mode),
        **_bytes(steps),
        **_saved(steps),
        **_times(cell, steps, trials),
        **_done(steps),
    }


def _trial_rows(results: Results, setting: Mapping[str, str], mode: str) -> pd.DataFrame:
    cell = pd.Series({**setting, "mode": mode})
    return results.rows[(results.rows[cell.index] == cell).all(axis=1)].set_index("trial")


def _bytes(steps: pd.DataFrame) -> dict[str, Any]:
    means = {target: mean_of(steps[source]) for source, target in STEP_MEANS.items()}
    missing, fetched = means["missing_bytes_per_step"], means["fetched_network_bytes_per_step"]
    whole = means["whole_bytes_per_step"]
    reason = _no_ratio(steps, missing)
    return {
        **means,
        "bytes_reason": IN_LOCAL if steps["local"].iloc[0] else None,
        "missing_share": None if missing is None or not whole else missing / whole,
        "fetched_to_missing": None if reason or fetched is None or not missing else fetched / missing,
        "fetched_to_missing_reason": reason,
    }


def _no_ratio(steps: pd.DataFrame, missing: float | None) -> str | None:
    """Why fetched and missing bytes do not compare, or None."""
    if steps["local"].iloc[0]:
        return IN_LOCAL
    if not missing:
        return "nothing was missing"
    if steps["policy"].iloc[0] == "recompute":
        return "recompute fetches nothing"
    return None if steps["shadow"].iloc[0] == "kvhost" else "nothing crosses the network: the shadow is the worker's own memory"


def _saved(steps: pd.DataFrame) -> dict[str, Any]:
    """Bytes that the eviction before the step saved, by its own count."""
    saved = mean_of(steps["saved_payload_bytes"])
    reason = None
    if saved is None:
        evicts = steps["evicts"].iloc[0]
        reason = NOTHING_EVICTED if evicts else "saved within steps of other requests, and counted there"
        reason = IN_LOCAL if steps["local"].iloc[0] else reason
    return {"saved_payload_bytes_per_step": saved, "saved_payload_reason": reason}


def _times(cell: pd.DataFrame, steps: pd.DataFrame, trials: pd.DataFrame) -> dict[str, Any]:
    # With fractions each step is a call. Without, a window is one call, so the ITL is that of results.csv.
    itl_s = _medians(steps, "latency_s") if steps["evicts"].iloc[0] else trials["latency_median_s"]
    found = {
        "itl_ms": _over_trials(itl_s, 1e3),
        "recovery_ms": _unless(_no_recovery(cell, steps), lambda: _over_trials(_recovery_s(cell, steps), 1e3)),
        "stall_ms": _unless(IN_LOCAL if steps["local"].iloc[0] else None, lambda: _over_trials(_medians(steps, "stall_s"), 1e3)),
        "restore_alone_ms": _unless(_not_alone(steps), lambda: _over_trials(_medians(steps, "restore_alone_s"), 1e3)),
        "hidden_share": _unless(_not_alone(steps) or _not_hidden(steps), lambda: _over_trials(_hidden(steps))),
        "itl_hidden_share": _unless(
            _not_alone(steps) or _not_hidden(steps) or _no_recovery(cell, steps), lambda: _over_trials(_hidden_in_itl(cell, steps))
        ),
        "predicted_ms": _unless(_not_predicted(steps), lambda: _over_trials(_medians(steps, "predicted_s"), 1e3)),
    }
    return {column: value for name in TIMES for column, value in interval_columns(name, found[name]).items()}


def _unless(reason: str | None, interval: Callable[[], Interval]) -> Interval:
    return interval() if reason is None else no_interval(reason)


def _over_trials(values: pd.Series, scale: float = 1.0) -> Interval:
    return mean_interval((values.astype("float64") * scale).tolist())


def _medians(steps: pd.DataFrame, column: str) -> pd.Series:
    """Each trial's median over the steps with a value; null if it has none."""
    return steps.astype({column: "float64"}).groupby("trial")[column].median()


def _recovery_s(cell: pd.DataFrame, steps: pd.DataFrame) -> pd.Series:
    """Each trial's median with this fraction less its median without a miss: a trial is its own baseline."""
    whole = cell[cell["evict_fraction"] == 0]
    return _medians(steps, "latency_s") - _medians(whole, "latency_s")


def _hidden(steps: pd.DataFrame) -> pd.Series:
    overlapped = _by_delta(steps)
    medians = overlapped.groupby("trial")[["stall_s", "restore_alone_s"]].median().reindex(steps["trial"].unique())
    return 1 - medians["stall_s"] / medians["restore_alone_s"]


def _hidden_in_itl(cell: pd.DataFrame, steps: pd.DataFrame) -> pd.Series:
    overlapped = _by_delta(steps)
    shares = 1 - _recovery_s(cell, overlapped) / _medians(overlapped, "restore_alone_s")
    return shares.reindex(steps["trial"].unique())


def _by_delta(steps: pd.DataFrame) -> pd.DataFrame:
    return steps[(steps["recovery"] == "delta") & (steps["restore_alone_s"] > 0)]


def _no_recovery(cell: pd.DataFrame, steps: pd.DataFrame) -> str | None:
    if steps["local"].iloc[0]:
        return IN_LOCAL
    if not steps["evicts"].iloc[0]:
        return "the phase has no evict_fractions, and so no step without pressure to compare with"
    if steps["evict_fraction"].iloc[0] == 0:
        return "the steps without a miss, which the others are compared with"
    return None if (cell["evict_fraction"] == 0).any() else "evict_fractions has no 0 to compare with"


def _not_alone(steps: pd.DataFrame) -> str | None:
    """Why the restore was not also done alone, or None."""
    policy = steps["policy"].iloc[0]
    if steps["local"].iloc[0]:
        return IN_LOCAL
    if policy not in OVERLAPPING:
        return f"{policy} does not overlap: the step waits for all of it"
    if not steps["evicts"].iloc[0]:
        return "a restore is done alone only in phases with evict_fractions"
    return NOTHING_EVICTED if steps["restore_alone_s"].isna().all() else None


def _not_hidden(steps: pd.DataFrame) -> str | None:
    return "no step got its blocks back by delta" if _by_delta(steps).empty else None


def _not_predicted(steps: pd.DataFrame) -> str | None:
    policy = steps["policy"].iloc[0]
    if steps["local"].iloc[0]:
        return IN_LOCAL
    if policy != "auto":
        return f"no cost model: the mode's recovery is {policy}"
    return "no step missed a block" if steps["predicted_s"].isna().all() else None


def _done(steps: pd.DataFrame) -> dict[str, Any]:
    """The number of steps, over all trials, that took each way, and that fell back to another way than planned."""
    if steps["local"].iloc[0]:
        return {**{f"{way}_steps": None for way in WAYS}, "fallback_steps": None, "steps_reason": IN_LOCAL}
    counts = {f"{way}_steps": int((steps["recovery"] == way).sum()) for way in WAYS}
    return {**counts, "fallback_steps": int(steps["fallback"].notna().sum()), "steps_reason": None}


FIRST = (Column("mode", "mode"), Column("evict_fraction", "evicted (%)", "percent", null="-"))
VIEWS = (
    View(
        "Recovery: bytes",
        (
            *FIRST,
            Column("kv_budget", "KV memory (%)", "percent"),
            Column("live_requests", "live", "count"),
            Column("whole_bytes_per_step", "whole cache (MB)", "digits", 1e-6, reason="bytes_reason"),
            Column("missing_bytes_per_step", "missing (MB/step)", "digits", 1e-6, reason="bytes_reason"),
            Column("fetched_network_bytes_per_step", "fetched (MB/step)", "digits", 1e-6, reason="bytes_reason"),
            Column("fetched_to_missing", "fetched x missing", "digits", reason="fetched_to_missing_reason"),
            Column("copied_bytes_per_step", "copied (MB/step)", "digits", 1e-6, reason="bytes_reason"),
            Column("saved_payload_bytes_per_step", "saved before (MB/step)", "digits", 1e-6, reason="saved_payload_reason"),
            Column("saved_network_bytes_per_step", "saved within (MB/step)", "digits", 1e-6, reason="bytes_reason"),
        ),
        "Means over the measured steps of all trials. Evicted: the part of the layers taken off the device before a step. KV memory: as a "
        "part of the caches of the live requests. Missing: filled KV bytes that were not on the device, uncompressed; a recovery in "
        "proportion to the miss would fetch that much. Fetched: frames between worker and KV host. Copied: to and from the worker's "
        "shadow. Saved before: by the eviction, after the codec. Saved within: to make room in the step.",
    ),
    View(
        "Recovery: time",
        (
            *FIRST,
            Column("trials", "trials", "count"),
            Column("steps_per_trial", "steps", "count"),
            Column("itl_ms", "ITL (ms) [95% CI]", "digits", reason="itl_ms_reason"),
            Column("recovery_ms", "recovery (ms) [95% CI]", "digits", reason="recovery_ms_reason"),
            Column("stall_ms", "stall (ms) [95% CI]", "digits", reason="stall_ms_reason"),
            Column("restore_alone_ms", "restore alone (ms)", "digits", reason="restore_alone_ms_reason"),
            Column("hidden_share", "hidden (%) [95% CI]", "percent", reason="hidden_share_reason"),
            Column("itl_hidden_share", "hidden in ITL (%) [95% CI]", "percent", reason="itl_hidden_share_reason"),
            Column("predicted_ms", "predicted (ms)", "digits", null="-"),
        ),
        "Means over trials of the median over a trial's steps. Recovery: ITL less the ITL of the same trial's steps without a miss. Stall: "
        "time of the step without compute. Restore alone: the same restore done before the step, with nothing to hide it. Hidden: "
        "1 - stall / restore alone; in ITL: 1 - recovery / restore alone, lower if fetching slows down compute. Predicted: by the cost "
        "model of auto.",
    ),
    View(
        "Recovery: ways",
        (
            *FIRST,
            Column("recovery", "recovery"),
            Column("shadow", "shadow", null="-"),
            Column("kv_codec", "KV codec", reason="ratios_reason", null="-"),
            Column("keeps", "keeps"),
            Column("promise_kept", "kept", "yes_no"),
            *(Column(f"{way}_steps", f"{way} (steps)", "count", reason="steps_reason") for way in WAYS),
            Column("fallback_steps", "fallbacks (steps)", "count", reason="steps_reason"),
        ),
        "Measured steps of all trials. A fallback is a recompute instead of the planned way.",
    ),
)
