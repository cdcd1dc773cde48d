"""Table recovery: bytes and time that each policy spends to bring back the KV blocks that a step misses."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from semgap.analysis.aggregate import SETTING, by_setting, first_of, kept, layers_by_codec, matching, mean_of
from semgap.analysis.columns import frame_of, interval_columns, with_endings
from semgap.analysis.results import Results
from semgap.analysis.stats import Interval, mean_interval, no_interval, resolved
from semgap.analysis.tables.render import Column, View

OVERLAPPING = ("delta", "auto")
"""The policies that fetch while layers compute."""
WITHIN = 0.25
"""The parts that are hidden are shown if their interval reaches at most this far."""
TIMES = ("itl_ms", "beyond_ms", "recovery_ms", "stall_ms", "restore_alone_ms", "hidden_share", "itl_hidden_share", "predicted_ms")
STEP_BYTES = ("whole_bytes", "missing_bytes", "fetched_network_bytes", "saved_network_bytes", "copied_bytes")
WAYS = ("reload", "recompute", "delta")
COLUMNS = [
    *(*SETTING, "mode", "evict_fraction", "kv_budget", "live_requests", "recovery", "shadow", "kv_codec", "trials", "steps_per_trial"),
    *("timed_steps_per_trial", "kv_network", "kv_rtt_ms", "kv_goodput_up_mbit_per_s", "kv_goodput_down_mbit_per_s", "kv_link_reason"),
    "kv_codecs",
    "kv_link",
    *("keeps", "promise_kept", "ratios_reason"),
    *(*(f"{name}_per_step" for name in STEP_BYTES), "bytes_reason", "missing_share", "fetched_to_missing", "fetched_to_missing_reason"),
    *("saved_payload_bytes_per_step", "saved_payload_reason"),
    *with_endings(*TIMES),
    *(*(f"{way}_steps" for way in WAYS), "fallback_steps", "steps_reason"),
]
IN_LOCAL = "nothing is taken off the device in local"
NOTHING_EVICTED = "nothing is taken off the device in these steps"
BESIDE = "the network has no kv: the link to the KV host, which a local worker has beside it, was not probed"
NO_KV_HOST = "the mode has no KV host"
UNKNOWN_GOODPUT = "a probe's transfer took no longer than its round trip; raise probe.payload_bytes"
ONLY_ONE = "no trial has two steps with this fraction, of which one would run its restore alone"


def table(results: Results) -> pd.DataFrame:
    """One row per model, network, recovery phase, mode and evict fraction; without fractions in the phase, one per mode.

    Bytes are means over all measured steps. Times are means over trials, with a t interval, of the trial's median over its steps, or in
    phases without fractions, where a window is one call, of its mean. A step whose restore also ran alone counts in `restore_alone_ms`
    only. `missing_bytes_per_step` counts evicted layers only: a recovery in proportion to the miss, uncompressed, would fetch that much.
    `beyond_ms` is the latency less the control's compute of the same positions. `recovery_ms` is that, less the same of the trial's steps
    with fraction 0. `hidden_share` is 1 - stall / restore alone, over the steps restored by delta. `itl_hidden_share` is 1 - recovery /
    restore alone: it includes the compute that fetching slowed down. Both are null, with the number of trials that would do, if their
    interval reaches more than 25 points from them.
    """
    rows = [
        _row(setting, mode, cell, steps, results)
        for setting, modes in by_setting(results.recovery_steps)
        for mode, cell in modes.items()
        for _, steps in cell.groupby("evict_fraction", dropna=False)
    ]
    return frame_of(rows, COLUMNS)


def _row(setting: Mapping[str, str], mode: str, cell: pd.DataFrame, steps: pd.DataFrame, results: Results) -> dict[str, Any]:
    """The row of `steps`, which have one evict fraction, of all steps of a mode."""
    first, trials = steps.iloc[0], matching(results.rows, {**setting, "mode": mode}).set_index("trial")
    in_local = IN_LOCAL if first["local"] else None
    return {
        **setting,
        "mode": mode,
        "evict_fraction": None if pd.isna(first["evict_fraction"]) else float(first["evict_fraction"]),
        **{name: first[name] for name in ("kv_budget", "live_requests", "shadow", "kv_codec", "ratios_reason")},
        "recovery": first["policy"],
        "kv_codecs": layers_by_codec(steps["kv_codecs"]),
        "trials": steps["trial"].nunique(),
        "steps_per_trial": float(steps.groupby("trial").size().mean()),
        "timed_steps_per_trial": len(timed(steps)) / steps["trial"].nunique(),
        **kv_link(mode, steps.drop_duplicates("trial")),
        **kept(trials, results.exactness, setting["model"], mode),
        **_bytes(steps, in_local),
        **_times(cell, steps, in_local),
        **_ways(steps, in_local),
    }


def kv_link(mode: str, trials: pd.DataFrame) -> dict[str, Any]:
    """The network between worker and KV host, and means over trials of its probes; goodput without the round trip of the transfer."""
    network, rtt_s = first_of(trials["kv_network"]), mean_of(trials["kv_rtt_s"])
    per_byte = {way: mean_of(trials[f"kv_{way}_s_per_byte"].where(lambda seconds: seconds > 0)) for way in ("up", "down")}
    no_network = BESIDE if first_of(trials["shadow"]) == "kvhost" and network is None else None if rtt_s else NO_KV_HOST
    speeds = {way: 8e-6 / seconds if seconds else None for way, seconds in per_byte.items()}
    shown = ", ".join(f"{speed:,.0f} Mbit/s {way}" for way, speed in speeds.items() if speed)
    return {
        "kv_network": network,
        "kv_rtt_ms": None if rtt_s is None else 1e3 * rtt_s,
        **{f"kv_goodput_{way}_mbit_per_s": speed for way, speed in speeds.items()},
        "kv_link_reason": no_network or (None if all(speeds.values()) else UNKNOWN_GOODPUT),
        "kv_link": rtt_s
        and f"Link to the KV host, {mode}: round trip {1e3 * rtt_s:.2f} ms, {shown or 'goodput not known'} (probes, mean).",
    }


def _bytes(steps: pd.DataFrame, in_local: str | None) -> dict[str, Any]:
    """Means over steps. The saved payload is that of the eviction before the step, by its own count."""
    means = {f"{name}_per_step": mean_of(steps[name]) for name in STEP_BYTES}
    missing, fetched = means["missing_bytes_per_step"], means["fetched_network_bytes_per_step"]
    whole, saved = means["whole_bytes_per_step"], mean_of(steps["saved_payload_bytes"])
    reason = in_local or _no_ratio(steps.iloc[0], missing)
    unsaved = NOTHING_EVICTED if steps["evicts"].iloc[0] else "saved within steps of other requests, and counted there"
    return {
        **means,
        "bytes_reason": in_local,
        "missing_share": None if missing is None or not whole else missing / whole,
        "fetched_to_missing": None if reason or fetched is None or not missing else fetched / missing,
        "fetched_to_missing_reason": reason,
        "saved_payload_bytes_per_step": saved,
        "saved_payload_reason": (in_local or unsaved) if saved is None else None,
    }


def _no_ratio(first: pd.Series, missing: float | None) -> str | None:
    """Why fetched and missing bytes do not compare, or None."""
    if not missing:
        return "nothing was missing"
    if first["policy"] == "recompute":
        return "recompute fetches nothing"
    return None if first["shadow"] == "kvhost" else "nothing crosses the network: the shadow is the worker's own memory"


def _times(cell: pd.DataFrame, steps: pd.DataFrame, in_local: str | None) -> dict[str, Any]:
    plain, by_delta = timed(steps), steps[steps["recovery"] == "delta"]
    no_recovery, not_alone = in_local or _no_recovery(cell, steps), in_local or _not_alone(steps)
    not_hidden = not_alone or ("no step got its blocks back by delta" if by_delta.empty else None)
    alone_s, trial = _typical(by_delta[by_delta["restore_alone_s"] > 0], "restore_alone_s"), steps["trial"].unique()
    hidden = 1 - _typical(timed(by_delta), "stall_s") / alone_s
    hidden_in_itl = 1 - _recovery_s(cell, timed(by_delta)) / alone_s
    found = {
        "itl_ms": _over_trials(1e3 * _typical(plain, "latency_s")),
        "beyond_ms": _over_trials(1e3 * _typical(with_beyond(plain), "beyond_s"), first_of(steps["control_reason"])),
        "recovery_ms": _over_trials(1e3 * _recovery_s(cell, plain), no_recovery),
        "stall_ms": _over_trials(1e3 * _typical(plain, "stall_s"), in_local),
        "restore_alone_ms": _over_trials(1e3 * _typical(steps, "restore_alone_s"), not_alone),
        "hidden_share": _share(hidden.reindex(trial), not_hidden),
        "itl_hidden_share": _share(hidden_in_itl.reindex(trial), not_hidden or no_recovery),
        "predicted_ms": _over_trials(1e3 * _typical(steps, "predicted_s"), in_local or _not_predicted(steps)),
    }
    return {column: value for name, interval in found.items() for column, value in interval_columns(name, interval).items()}


def timed(steps: pd.DataFrame) -> pd.DataFrame:
    """The steps that directly followed their eviction: no restore had run alone before them, which would leave its blocks warm."""
    return steps[steps["restore_alone_s"].isna()]


def with_beyond(steps: pd.DataFrame) -> pd.DataFrame:
    """The steps with `beyond_s`: the latency less the control's compute, or the whole latency if the trial has no control."""
    return steps.assign(beyond_s=steps["latency_s"] - steps["control_s"].astype("float64").fillna(0))


def _share(values: pd.Series, reason: str | None) -> Interval:
    found = _over_trials(values, reason)
    return found if found.value is None else resolved(found, WITHIN, values.tolist(), f"+-{100 * WITHIN:.0f} points")


def _over_trials(values: pd.Series, reason: str | None = None) -> Interval:
    """The mean over trials, or null for `reason`."""
    return no_interval(reason) if reason else mean_interval(values.astype("float64").tolist())


def _typical(steps: pd.DataFrame, column: str) -> pd.Series:
    """Each trial's median over the steps with a value, or its mean in a phase without fractions; null if it has none."""
    values = steps.astype({column: "float64"}).groupby("trial")[column]
    return values.median() if steps["evicts"].all() else values.mean()


def _recovery_s(cell: pd.DataFrame, steps: pd.DataFrame) -> pd.Series:
    """Each trial's time beyond the control with this fraction, less that without a miss: a trial is its own baseline."""
    whole = cell[cell["evict_fraction"] == 0]
    return _typical(with_beyond(steps), "beyond_s") - _typical(with_beyond(whole), "beyond_s")


def _no_recovery(cell: pd.DataFrame, steps: pd.DataFrame) -> str | None:
    if not steps["evicts"].iloc[0]:
        return "the phase has no evict_fractions, and so no step without pressure to compare with"
    if steps["evict_fraction"].iloc[0] == 0:
        return "the steps without a miss, which the others are compared with"
    return None if (cell["evict_fraction"] == 0).any() else "evict_fractions has no 0 to compare with"


def _not_alone(steps: pd.DataFrame) -> str | None:
    """Why the restore was not also done alone, or None."""
    policy = steps["policy"].iloc[0]
    if policy not in OVERLAPPING:
        return f"{policy} does not overlap: the step waits for all of it"
    if not steps["evicts"].iloc[0]:
        return "a restore is done alone only in phases with evict_fractions"
    if steps["restore_alone_s"].notna().any():
        return None
    return ONLY_ONE if (steps["evict_fraction"] > 0).any() else NOTHING_EVICTED


def _not_predicted(steps: pd.DataFrame) -> str | None:
    policy = steps["policy"].iloc[0]
    if policy != "auto":
        return f"no cost model: the mode's recovery is {policy}"
    return "no step missed a block" if steps["predicted_s"].isna().all() else None


def _ways(steps: pd.DataFrame, in_local: str | None) -> dict[str, Any]:
    """The number of steps, over all trials, that took each way, and that fell back to another way than planned."""
    counts = {f"{way}_steps": int((steps["recovery"] == way).sum()) for way in WAYS}
    counts["fallback_steps"] = int(steps["fallback"].notna().sum())
    return {**(dict.fromkeys(counts) if in_local else counts), "steps_reason": in_local}


FIRST = (Column("mode", "mode"), Column("evict_fraction", "evicted (%)", "percent", null="-"))
BY = ("model", "network", "kv_network", "phase")
VIEWS = (
    View(
        "Recovery, bytes",
        (
            *FIRST,
            Column("whole_bytes_per_step", "cache (MB)", "digits", 1e-6, reason="bytes_reason"),
            Column("missing_bytes_per_step", "missing (MB/step)", "digits", 1e-6, reason="bytes_reason"),
            Column("fetched_network_bytes_per_step", "fetched (MB/step)", "digits", 1e-6, reason="bytes_reason"),
            Column("fetched_to_missing", "fetched x missing", "digits", reason="fetched_to_missing_reason"),
        ),
        "Means over the measured steps of all trials. Evicted: the part of the layers taken off the device before a step. Cache: all of a "
        "request's. Missing: filled KV bytes that were not on the device, uncompressed; a recovery in proportion to the miss would fetch "
        "that much. Fetched: frames between worker and KV host.",
        by=BY,
    ),
    View(
        "Recovery, copied and saved",
        (
            *FIRST,
            Column("kv_budget", "KV memory (%)", "percent"),
            Column("live_requests", "live", "count"),
            Column("copied_bytes_per_step", "copied (MB/step)", "digits", 1e-6, reason="bytes_reason"),
            Column("saved_payload_bytes_per_step", "saved before (MB/step)", "digits", 1e-6, reason="saved_payload_reason"),
            Column("saved_network_bytes_per_step", "saved within (MB/step)", "digits", 1e-6, reason="bytes_reason"),
        ),
        "KV memory: as a part of the caches of the live requests. Copied: to and from the worker's shadow. Saved before: by the eviction, "
        "after the codec. Saved within: to make room in the step.",
        by=BY,
    ),
    View(
        "Recovery, time",
        (
            *FIRST,
            Column("trials", "trials", "count"),
            Column("timed_steps_per_trial", "steps", "digits"),
            Column("itl_ms", "ITL (ms)", "digits", reason="itl_ms_reason"),
            Column("beyond_ms", "beyond control (ms)", "digits", reason="beyond_ms_reason"),
            Column("recovery_ms", "recovery (ms)", "digits", reason="recovery_ms_reason"),
            Column("stall_ms", "stall (ms)", "digits", reason="stall_ms_reason"),
        ),
        "Means over trials, with 95% t intervals, of the median over a trial's steps (mean, if requests share memory); steps: those of a "
        "trial, without the ones whose restore also ran alone. Beyond control: ITL less the compute of the same positions, decoded by the "
        "worker itself, undisturbed. Recovery: that, less the same of the trial's steps without a miss. Stall: time of the step without "
        "compute.",
        by=BY,
        notes=("kv_link",),
    ),
    View(
        "Recovery, hidden behind compute",
        (
            *FIRST,
            Column("restore_alone_ms", "restore alone (ms)", "digits", reason="restore_alone_ms_reason"),
            Column("hidden_share", "hidden (%)", "percent", reason="hidden_share_reason"),
            Column("itl_hidden_share", "hidden in ITL (%)", "percent", reason="itl_hidden_share_reason"),
            Column("predicted_ms", "predicted (ms)", "digits", null="-"),
        ),
        "Restore alone: a restore of that size, done before another step, with nothing to hide it. Hidden: 1 - stall / restore alone; in "
        "ITL: 1 - recovery / restore alone, lower if fetching slows down compute. Predicted: by the cost model of auto.",
        by=BY,
    ),
    View(
        "Recovery, policies",
        (
            *FIRST,
            Column("recovery", "recovery"),
            Column("shadow", "shadow", null="-"),
            Column("kv_codec", "KV codec", reason="ratios_reason", null="-"),
            Column("kv_codecs", "layers came in", null="-"),
            Column("keeps", "keeps"),
            Column("promise_kept", "kept", "yes_no"),
        ),
        "Layers came in: codecs of the layers that a step fetched, means.",
        by=BY,
    ),
    View(
        "Recovery, ways",
        (
            *FIRST,
            *(Column(f"{way}_steps", f"{way} (steps)", "count", reason="steps_reason") for way in WAYS),
            Column("fallback_steps", "fallbacks (steps)", "count", reason="steps_reason"),
        ),
        "Measured steps of all trials. A fallback is a recompute instead of the planned way.",
        by=BY,
    ),
)
