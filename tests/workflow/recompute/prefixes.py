"""Table prefix: prefills whose beginning was computed before, by its length."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from intervals import Row, interval, is_null, log_interval, ratio
from pressure import kv_link
from run import Run, checks_of
from trials import Trial


def prefix(run: Run) -> list[Row]:
    """A row for each length; crossings by each trial's own request without a prefix, and by the predictions."""
    return [
        at | {"prefix_tokens": length} | row_of(run, at, trials, modes, length)
        for at, trials, modes in run.cells("prefix")
        for length in sorted(trials[0].phase_spec["prefix_lengths"])
    ]


def with_length(trial: Trial, length: int) -> pd.DataFrame:
    return trial.steps[trial.steps["prefix_tokens"] == length]


def row_of(run: Run, at: Row, trials: Sequence[Trial], modes: dict[str, list[Trial]], length: int) -> Row:
    way, by_trial = trials[0].policy.get("prefix", "recompute"), [with_length(trial, length) for trial in trials]
    steps, local, fetches = pd.concat(by_trial), trials[0].is_local, way != "recompute"
    row: Row = {"prompt_tokens": int(steps["tokens_in"].iloc[0]), "policy": way, "trials": len(trials)}
    row |= {"requests_per_trial": len(by_trial[0]), "keeps": trials[0].policy["keeps"]}
    row["promise_kept"] = all([*run.column(trials, "promise_kept"), *(check["promise_kept"] for check in checks_of(run, at))])
    row["max_kl_nats"] = None if steps["kl_nats"].isna().any() else float(steps["kl_nats"].max())
    row |= interval("ttft_ms", [each["latency_s"].median() for each in by_trial], 1e3)
    row |= interval("stall_ms", [None if local else each["stall_s"].median() for each in by_trial], 1e3)
    found = fetches and length > 0
    for name, column in (("predicted_fetch_ms", "predicted_fetch_s"), ("predicted_recompute_ms", "predicted_recompute_s")):
        known = found and not steps["predicted_fetch_s"].isna().any()
        row[name] = 1e3 * float(steps[column].mean()) if known else None
    for name, column in (("missing_bytes", "missing_bytes"), ("fetched_bytes", "fetched_network_bytes")):
        row[name] = float(steps[column].mean()) if fetches and not local else None
    row["fetched_to_missing"] = ratio(row["fetched_bytes"], row["missing_bytes"]) if found else None
    counts = {"fetch": steps["recovery"].isin(["fetch_whole", "fetch_blocks"]), "recompute": steps["recovery"] == "recompute"}
    counts["fallback"] = steps["fallback"].notna()
    row |= {f"{name}_requests": int(taken.sum()) if fetches and not local else None for name, taken in counts.items()}
    row |= kv_link(trials) if fetches else {"kv_network": None, "kv_rtt_ms": None}
    computing = computing_of(run, at)
    row |= ratio_to("ratio_to_recompute", by_trial, trials, [] if local else [(each, each.steps) for each in computing])
    row |= to_better(by_trial, trials, modes, computing, length)
    row |= crossing("crossing_tokens", trials, None if fetches and way != "auto" and not local else ())
    row |= crossing("predicted_crossing_tokens", trials, "predicted_fetch_s" if fetches and not local else ())
    return row


def computing_of(run: Run, at: Row) -> list[Trial]:
    """The trials of the mode that computes all, over this network or the first other one."""
    found: dict[tuple[str, str], list[Trial]] = {}
    for (model, network, phase), modes in run.groups.items():
        for mode, trials in modes.items():
            computes = trials[0].policy.get("prefix", "recompute") == "recompute" and not trials[0].is_local
            if (model, phase) == (at["model"], at["phase"]) and computes:
                found[network, mode] = trials
    own = [trials for (network, _), trials in found.items() if network == at["network"]]
    return (own or list(found.values()) or [[]])[0]


def ratio_to(name: str, ours: Sequence[pd.DataFrame], trials: Sequence[Trial], base: Sequence[tuple[Trial, pd.DataFrame]]) -> Row:
    """Of medians of trials of one number, session and environment."""

    def key(trial: Trial) -> tuple[Any, ...]:
        return trial.trial, trial.manifest["session"], trial.manifest["fingerprint"]

    others = {key(trial): float(steps["latency_s"].median()) for trial, steps in base}
    known = [(trial, steps) for trial, steps in zip(trials, ours, strict=True) if key(trial) in others]
    return log_interval(name, [float(steps["latency_s"].median()) / others[key(trial)] for trial, steps in known])


def to_better(
    ours: Sequence[pd.DataFrame], trials: Sequence[Trial], modes: dict[str, list[Trial]], computing: Sequence[Trial], length: int
) -> Row:
    codec = trials[0].policy["codec"]["kv"]
    fetching = [each for each in modes.values() if (each[0].policy.get("prefix"), each[0].policy["codec"]["kv"]) == ("fetch_blocks", codec)]
    if trials[0].policy.get("prefix") != "auto" or not fetching or not computing:
        return log_interval("ratio_to_better", [])
    ways = [[(each, each.steps) for each in computing], [(each, with_length(each, length)) for each in fetching[0]]]
    return ratio_to("ratio_to_better", ours, trials, min(ways, key=lambda way: np.mean([each["latency_s"].median() for _, each in way])))


def crossing(name: str, trials: Sequence[Trial], column: str | tuple[()] | None) -> Row:
    """Where the difference to computing changes its sign, between two lengths, linearly; null unless every trial has one."""
    found = [] if column == () else [crossing_of(trial, column) for trial in trials]
    return interval(name, [each for each in found if not is_null(each)] if found and not any(map(is_null, found)) else [None])


def crossing_of(trial: Trial, column: Any) -> float | None:
    steps = trial.steps
    lengths = [length for length in sorted(set(steps["prefix_tokens"])) if length > 0]
    points = []
    for length in lengths:
        own = with_length(trial, int(length))
        if column is None:
            without = with_length(trial, 0)["latency_s"].median()
            points.append((length, own["latency_s"].median() - without))
        elif own[column].notna().any():
            points.append((length, (own[column] - own["predicted_recompute_s"]).median()))
    for (x, y), (x2, y2) in itertools.pairwise(points):
        if math.copysign(1, y) != math.copysign(1, y2):
            return float(x - y * (x2 - x) / (y2 - y))
    return None
