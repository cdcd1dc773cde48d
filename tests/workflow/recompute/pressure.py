"""Tables recovery and recovery_pairs: steps that miss KV blocks, by the fraction evicted before them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from intervals import Row, holm, interval, log_interval, ratio
from run import Run, checks_of, paired
from scipy import stats
from trials import Trial

PER_STEP = ("missing_bytes", "fetched_network_bytes", "saved_network_bytes", "copied_bytes", "saved_payload_bytes")


def steps_of(trial: Trial, fraction: float | None) -> pd.DataFrame:
    """The measured steps with the fraction; `control_s` is the median compute of the control's window at their position."""
    steps, control = trial.steps, trial.table("control")
    control = control.assign(control_s=control.groupby("window")["compute_s"].transform("median"))
    steps = steps.merge(control[["request", "step", "control_s"]], on=["request", "step"], how="left")
    steps = steps.assign(beyond_s=steps["latency_s"] - steps["control_s"])
    return steps if fraction is None else steps[steps["evict_fraction"] == fraction]


def timed(steps: pd.DataFrame) -> pd.DataFrame:
    """Those before which no restore ran alone."""
    return steps[steps["restore_alone_s"].isna()]


def typical(steps: pd.DataFrame, column: str, fraction: float | None) -> Any:
    """The median over steps; without fractions, where a window is one call, the mean."""
    return steps[column].mean() if fraction is None else steps[column].median()


def recovery(run: Run) -> list[Row]:
    """Bytes as means over all steps, times as means over trials of the trial's median over its timed steps."""
    cells = run.cells("recovery")
    return [
        at | recovery_row(run, at, trials, fraction)
        for at, trials, _ in cells
        for fraction in trials[0].phase_spec["evict_fractions"] or [None]
    ]


def recovery_s(trial: Trial, fraction: float | None) -> Any:
    """`beyond_ms` with the fraction less that of the same trial's steps with fraction 0; without a control, of the ITL."""
    if not fraction or 0 not in trial.phase_spec["evict_fractions"]:
        return None
    column = "latency_s" if trial.table("control").empty else "beyond_s"
    missed, whole = (typical(timed(steps_of(trial, each)), column, fraction) for each in (fraction, 0))
    return missed - whole


def recovery_row(run: Run, at: Row, trials: Sequence[Trial], fraction: float | None) -> Row:
    policy, phase = trials[0].policy, trials[0].phase_spec
    by_trial = [steps_of(each, fraction) for each in trials]
    steps, measured = pd.concat(by_trial), [timed(each) for each in by_trial]
    row: Row = {"evict_fraction": fraction, "kv_budget": phase["kv_budget"], "live_requests": phase["live_requests"]}
    row |= {"recovery": policy["recovery"], "keeps": policy["keeps"], "trials": len(trials)}
    row |= {"steps_per_trial": len(by_trial[0]), "timed_steps_per_trial": len(measured[0])}
    row["promise_kept"] = all([*run.column(trials, "promise_kept"), *(check["promise_kept"] for check in checks_of(run, at))])
    row |= {f"{name}_per_step": None if steps[name].isna().any() else float(steps[name].mean()) for name in PER_STEP}
    budget = trials[0].manifest["kv"]["budget_bytes"]
    caches = phase["kv_budget"] * phase["live_requests"] + (not trials[0].table("control").empty)  # one more for the control's copy
    a_position = budget and budget / (caches * trials[0].max_length)
    row["whole_bytes_per_step"] = a_position and a_position * float(steps["position"].mean())
    row["missing_share"] = ratio(row["missing_bytes_per_step"], row["whole_bytes_per_step"])
    row["fetched_to_missing"] = ratio(row["fetched_network_bytes_per_step"], row["missing_bytes_per_step"])
    row |= kv_link(trials)
    row |= interval("predicted_ms", [typical(each, "predicted_s", fraction) for each in by_trial], 1e3)
    for name in ("latency_s", "beyond_s", "stall_s"):
        row |= interval("itl_ms" if name == "latency_s" else f"{name[:-1]}ms", [typical(each, name, fraction) for each in measured], 1e3)
    row |= interval("restore_alone_ms", [each["restore_alone_s"].median() for each in by_trial], 1e3)
    row |= interval("recovery_ms", [recovery_s(each, fraction) for each in trials], 1e3) | hidden(trials, fraction)
    row |= {f"{way}_steps": int((steps["recovery"] == way).sum()) for way in ("reload", "recompute", "delta")}
    return row | {"fallback_steps": int(steps["fallback"].notna().sum())}


def kv_link(trials: Sequence[Trial]) -> Row:
    """The network between worker and KV host, and means over the trials of its measured round trip and seconds a byte."""
    found = [(trial.manifest["network"] or {}).get("kv") for trial in trials]
    row: Row = {"kv_network": trials[0].network_spec.get("kv"), "kv_rtt_ms": None}
    row |= {f"kv_goodput_{way}_mbit_per_s": None for way in ("up", "down")}
    if all(found):
        row["kv_rtt_ms"] = 1e3 * float(np.mean([each["measured"]["rtt_s"] for each in found]))
        for way in ("up", "down"):
            speeds = [each["measured"][f"goodput_{way}_bytes_per_s"] for each in found]
            row[f"kv_goodput_{way}_mbit_per_s"] = 8e-6 / float(np.mean([1 / each for each in speeds])) if all(speeds) else None
    return row


def hidden(trials: Sequence[Trial], fraction: float | None) -> Row:
    """1 - stall / restore alone, and 1 - recovery / restore alone, of the steps that `delta` restored; null if 25 points off or more."""
    shares: dict[str, list[float | None]] = {"hidden_share": [], "itl_hidden_share": []}
    for trial in trials:
        steps = steps_of(trial, fraction)
        steps = steps[steps["recovery"] == "delta"]
        alone, whole = steps["restore_alone_s"].median(), timed(steps_of(trial, 0))
        column = "latency_s" if trial.table("control").empty else "beyond_s"
        shares["hidden_share"].append(1 - timed(steps)["stall_s"].median() / alone)
        shares["itl_hidden_share"].append(1 - (timed(steps)[column].median() - whole[column].median()) / alone)
    row: Row = {}
    for name, values in shares.items():
        found = interval(name, values)
        low, high = found[f"{name}_low"], found[f"{name}_high"]
        row |= dict.fromkeys(found) if low is not None and high - low > 0.5 else found
    return row


def recovery_pairs(run: Run) -> list[Row]:
    """Each two modes over the steps that both ran at the same position, after the same eviction; Holm over the phase's pairs."""
    rows: list[Row] = []
    for (model, network, phase), modes in run.groups.items():
        kind = next(iter(modes.values()))[0].phase_spec
        if kind["kind"] == "recovery":
            at = {"model": model, "network": network, "phase": phase}
            at |= {"kv_network": next(iter(modes.values()))[0].network_spec.get("kv")}
            pairs = [ordered(run, *pair) for pair in itertools.combinations(modes, 2)]
            blind = any(run.mark(mode).get("blind") for mode in modes)
            found = [
                at
                | {"evict_fraction": fraction, "mode": mode, "against": against}
                | {"against_baseline": bool(run.mark(against).get("blind")) or not blind}
                | pair_row(modes[mode], modes[against], fraction)
                for fraction in kind["evict_fractions"] or [None]
                for mode, against in pairs
            ]
            adjusted = holm([row["p"] for row in found])
            rows += [row | {"p_holm": p} for row, p in zip(found, adjusted, strict=True)]
    return rows


def ordered(run: Run, first: str, second: str) -> tuple[str, str]:
    """The mode and the one it is set against: that marked `blind`, or the first in the config."""
    only_second = bool(run.mark(second).get("blind")) and not run.mark(first).get("blind")
    return (first, second) if only_second else (second, first)


def pair_row(mode: Sequence[Trial], against: Sequence[Trial], fraction: float | None) -> Row:
    controlled = not any(trial.table("control").empty for trial in (*mode, *against))
    if controlled:
        numbers = {trial.trial: trial for trial in against}
        pairs = [(trial, numbers[trial.trial]) for trial in mode if trial.trial in numbers]
    else:
        pairs = paired(mode, against)
    both = [
        timed(steps_of(one, fraction)).merge(timed(steps_of(other, fraction)), on=["request", "step"], suffixes=("", "_against"))
        for one, other in pairs
    ]
    row: Row = {"basis": "each trial's control" if controlled else "paired latencies", "trials": len(both)}
    row["steps_per_trial"] = len(both[0]) if both else None
    if controlled:
        row |= interval("difference_ms", [(each["beyond_s"] - each["beyond_s_against"]).median() for each in both], 1e3)
        ours, theirs = ([each[f"latency_s{end}"] / each[f"control_s{end}"] for each in both] for end in ("", "_against"))
        ratios = [math.exp(np.log(one / other).median()) for one, other in zip(ours, theirs, strict=True)]
    else:
        ratios = [each["latency_s"].sum() / each["latency_s_against"].sum() for each in both]
    p = float(stats.ttest_1samp(np.log(ratios), 0).pvalue) if len(ratios) > 1 else None
    return row | log_interval("ratio", ratios) | {"p": p}
