"""Table handover: requests that move to another worker after their prefill, beside requests that stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from intervals import Row, interval, ratio
from run import Run, checks_of
from trials import Trial

SENT = ("saved_tensor_bytes", "saved_payload_bytes", "sent_network_bytes", "fetched_network_bytes")


def handover(run: Run) -> list[Row]:
    """Times are means over trials, with a t interval, of the trial's median over its requests; bytes are means over requests."""
    return [at | handover_row(run, at, trials) for at, trials, _ in run.cells("handover")]


def requests_of(trial: Trial) -> pd.DataFrame:
    """A row for each request after the warm-up, with the columns of its first step, in order."""
    steps = trial.every_step[~trial.every_step["warmup"]]
    rows = steps[steps["step"] == 1].merge(
        steps.loc[steps["step"] == 0, ["request", "latency_s"]].rename(columns={"latency_s": "ttft_s"}), on="request"
    )
    rows = rows.sort_values("request", ignore_index=True)
    compute_s, stall_s = (rows[name].astype("float64").fillna(0) for name in ("worker_compute_s", "stall_s"))
    moved = rows["moves"].astype(bool) & (not trial.is_local)
    return rows.assign(
        moved=moved,
        handed=moved & rows["handed"].fillna(False).astype(bool),
        second_s=rows["ttft_s"] + rows["latency_s"],
        waited_s=rows["latency_s"] - (compute_s - stall_s),
        hidden=1 - np.minimum(rows["sent_after_s"].astype("float64") / rows["sent_s"].astype("float64"), 1),
    )


def medians(by_trial: Sequence[pd.DataFrame], column: str) -> list[float]:
    """Of each trial with such requests."""
    return [float(each[column].astype("float64").median()) for each in by_trial if len(each)]


def pairs_s(requests: pd.DataFrame) -> list[float]:
    """Of each two neighbours, one of which moved: the time to its second token less the other's."""
    found = []
    for first in range(0, len(requests) - 1, 2):
        two = requests.iloc[first : first + 2]
        moved, stayed = two[two["moved"]], two[~two["moved"]]
        if len(moved) == len(stayed) == 1:
            found.append(float(moved["second_s"].iloc[0] - stayed["second_s"].iloc[0]))
    return found


def handover_row(run: Run, at: Row, trials: Sequence[Trial]) -> Row:
    by_trial = [requests_of(trial) for trial in trials]
    moved, handed = ([each[each[name]] for each in by_trial] for name in ("moved", "handed"))
    some_moved = any(map(len, moved))
    stayed = [each[~each["moves"].astype(bool)] for each in by_trial] if some_moved else by_trial
    policy, local = trials[0].policy, trials[0].is_local
    sends = {"reload": "raw", "recompute": None}.get(policy["recovery"], policy["codec"]["kv"])
    row: Row = {"recovery": None if local else policy["recovery"], "kv_codec": None if local else sends}
    row |= {"kv_network": None if local else trials[0].network_spec.get("kv"), "trials": len(trials), "keeps": policy["keeps"]}
    row["promise_kept"] = all([*run.column(trials, "promise_kept"), *(check["promise_kept"] for check in checks_of(run, at))])
    row |= {"requests_per_trial": sum(map(len, by_trial)) / len(trials), "moved_per_trial": sum(map(len, moved)) / len(trials)}
    for name, column in (("ttft", "ttft_s"), ("second", "second_s"), ("wait", "latency_s")):
        row |= interval(f"{name}_ms", medians(moved, column), 1e3) | interval(f"{name}_stayed_ms", medians(stayed, column), 1e3)
    both = [(one, other) for one, other in zip(moved, stayed, strict=True) if some_moved and len(one) and len(other)]
    row |= interval("adds_ms", [float(one["waited_s"].median() - other["waited_s"].median()) for one, other in both], 1e3)
    row |= interval("second_adds_ms", [float(np.median(pairs)) for each in by_trial if (pairs := pairs_s(each))], 1e3)
    row |= interval("after_ms", medians(handed, "sent_after_s"), 1e3) | interval("stall_ms", medians(moved, "stall_s"), 1e3)
    row |= interval("hidden_share", medians(handed, "hidden"))
    return row | counted(pd.concat(moved), pd.concat(handed))


def counted(moved: pd.DataFrame, handed: pd.DataFrame) -> Row:
    """Bytes a request whose blocks were sent, and how many requests went which way."""
    each: dict[str, Any] = {name: None if handed[name].isna().any() or handed.empty else float(handed[name].mean()) for name in SENT}
    tensor, payload, network, _ = each.values()
    row: Row = {f"{name}_per_request": value for name, value in each.items()}
    row |= {"codec_ratio": ratio(tensor, payload), "sent_to_payload": ratio(network, payload)}
    row |= {"handed_requests": len(handed), "recomputed_requests": int((moved["recovery"] == "recompute").sum())}
    return row | {"fallback_requests": int(moved["fallback"].notna().sum())}
