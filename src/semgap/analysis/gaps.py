"""The gap of each trial: what is left of a call's latency without compute, per token, and its parts.

latency = compute (worker + client) + codec (client + worker) + link; gap = latency - compute. The link is what is left: framing, wire,
waiting, and the client's own loop. Every trial is its own pair, so the machine's speed between trials plays no part.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from semgap.analysis.aggregate import matching
from semgap.analysis.calls import SPENT, with_call_numbers
from semgap.analysis.columns import frame_of
from semgap.analysis.load import KEYS, Trials, keys_of
from semgap.analysis.stats import Interval, difference_interval, exponentiated, log_ratios, mean_interval, no_interval

PARTS = ("worker_compute", "client_compute", "client_codec", "worker_codec", "link")
"""The parts of a latency; columns of `trial_gaps` with the ending _s."""
COLUMNS = [
    *(*KEYS, "calls", "tokens", "latency_s", *(f"{part}_s" for part in PARTS), "compute_s", "gap_s", "gap_median_s", "own_ratio"),
    *("control_windows", "control_ratio", "compute_to_control", "gap_reason", "control_reason"),
    *("floor_s", "compute_to_floor", "floor_reason"),
]
NO_CLOCK = "the step's compute was not measured"
NO_CONTROL = "the trial has no control steps"


def trial_gaps(trials: Trials, calls: pd.DataFrame) -> pd.DataFrame:
    """One row per trial of a prefill or decode phase: its measured calls, seconds per token (`COLUMNS`).

    Means are over all measured calls, so that the parts add up; `gap_median_s` is the median over calls. `own_ratio` is latency over
    compute of the same steps. `control_ratio` is the median over the control's windows of the latency per token of the calls at its
    positions over its own compute, `compute_to_control` the same of the calls' compute. `floor_s` is the time to read a step's weights
    once. A part that was not measured is null.
    """
    kinds = {tuple(keys_of(m).values()): m["cell"]["phase_spec"]["kind"] for m in trials.manifests}
    controls, floors = _controls(trials), {tuple(keys_of(m).values()): m["floor"] for m in trials.manifests}
    rows = []
    for keys, own in calls.groupby(KEYS, sort=False):
        measured = own[own["metric"] == ("TTFT" if kinds[keys] == "prefill" else "ITL")]
        if len(measured):
            gap = _gap(measured)
            rows.append(dict(zip(KEYS, keys, strict=True)) | gap | controls[keys] | _floor(floors[keys], kinds[keys], gap))
    return frame_of(rows, COLUMNS)


def equal_compute_logs(*modes: pd.DataFrame) -> list[list[float]]:
    """ln of each trial's latency per token at equal compute: its median call's gap, added to the mean over `modes` of their mean compute.

    What the machine did to compute between two trials plays no part, nor does a call that it held up. NaN if compute was not measured.
    """
    compute_s = pd.Series([gaps["compute_s"].astype("float64").mean() for gaps in modes]).mean()
    return [np.log(compute_s + gaps["gap_median_s"].astype("float64").to_numpy()).tolist() for gaps in modes]


def difference_ms(gaps: pd.DataFrame, setting: Mapping[str, str], mode: str, base: str, column: str = "gap_s") -> Interval:
    """`column`, by default the gap, per token of a mode less that of another, in ms, by Welch's t interval: trials need not pair."""
    ours, theirs = (matching(gaps, {**setting, "mode": name}) for name in (mode, base))
    missing = next((name for name, rows in ((mode, ours), (base, theirs)) if rows.empty), None)
    if missing:
        return no_interval(f"{missing} was not run")
    found = difference_interval(*((1e3 * rows[column].astype("float64")).tolist() for rows in (ours, theirs)))
    return found if found.value is not None else no_interval(NO_CLOCK)


def compute_ratio(gaps: pd.DataFrame, trials: pd.DataFrame, base: pd.DataFrame) -> Interval:
    """Compute per token of trials over that of others, paired. Anything but 1 is no cost of the distance."""
    own, other = (each[[*KEYS, "session", "fingerprint"]].merge(gaps[[*KEYS, "compute_s"]], on=KEYS) for each in (trials, base))
    logs = log_ratios(own, other, "compute_s")
    return exponentiated(mean_interval(logs)) if logs else no_interval("compute was not measured, or no trials pair")


def _gap(calls: pd.DataFrame) -> dict[str, Any]:
    tokens, latency_s = calls["tokens"].sum(), calls["latency_s"].sum()
    spent = {name: calls[name].sum(skipna=False) / tokens for name in SPENT}
    compute_s = (calls["worker_compute"] + calls["client_compute"].fillna(0)).sum(skipna=False) / tokens
    gap_s = latency_s / tokens - compute_s
    each_s = (calls["latency_s"] - calls["worker_compute"] - calls["client_compute"].fillna(0)) / calls["tokens"]
    return {
        "calls": len(calls),
        "tokens": int(tokens),
        "latency_s": latency_s / tokens,
        **{f"{name}_s": value for name, value in spent.items()},
        "link_s": gap_s - spent["client_codec"] - spent["worker_codec"],
        "compute_s": compute_s,
        "gap_s": gap_s,
        "gap_median_s": each_s.median(skipna=False),
        "own_ratio": latency_s / tokens / compute_s if compute_s > 0 else None,
        "gap_reason": NO_CLOCK if np.isnan(gap_s) else None,
    }


def _floor(floor: Mapping[str, Any], kind: str, gap: Mapping[str, Any]) -> dict[str, Any]:
    """The least time of a decode step on the worker's cores, and its compute there over it."""
    reason = "a prefill computes more than it reads" if kind == "prefill" else floor["reason"]
    if reason:
        return {"floor_s": None, "compute_to_floor": None, "floor_reason": reason}
    floor_s = floor["step_bytes"] / floor["read_bytes_per_s"]
    return {"floor_s": floor_s, "compute_to_floor": gap["worker_compute_s"] / floor_s, "floor_reason": None}


def _controls(trials: Trials) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The control's columns of each trial."""
    names = ("control_windows", "control_ratio", "compute_to_control", "control_reason")
    reasons = {tuple(keys_of(m).values()): (m.get("control") or {}).get("reason") or NO_CONTROL for m in trials.manifests}
    found = {keys: dict(zip(names, (0, None, None, reason), strict=True)) for keys, reason in reasons.items()}
    if trials.control.empty:
        return found
    for keys, ratios in _window_ratios(trials).groupby(KEYS, sort=False):
        medians = np.median(ratios[["latency", "compute"]].to_numpy(), axis=0).tolist()
        found[keys] = dict(zip(names, (len(ratios), *medians, None), strict=True))
    return found


def _window_ratios(trials: Trials) -> pd.DataFrame:
    """A row for each window of each control, with `KEYS`: latency and compute per token of the calls at its positions, over its compute."""
    steps, windows = with_call_numbers(trials.steps), [*KEYS, "window"]
    steps = steps.assign(compute_s=steps["worker_compute_s"] + steps["client_compute_s"].astype("float64").fillna(0))
    own = trials.control[[*windows, "request", "step"]].merge(steps[[*KEYS, "request", "step", "call"]], on=[*KEYS, "request", "step"])
    calls = own.drop(columns="step").drop_duplicates().merge(steps, on=[*KEYS, "request", "call"])
    means = calls.groupby(windows, sort=False)[["latency_s", "compute_s"]].mean()
    ratios = means.div(trials.control.groupby(windows, sort=False)["compute_s"].mean(), axis=0)
    return ratios.rename(columns={"latency_s": "latency", "compute_s": "compute"}).reset_index()
