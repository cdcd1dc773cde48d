"""Table load, from load.parquet, requests.parquet, batches.parquet and the levels in the manifests."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from intervals import Row, interval, log_interval
from run import Run
from trials import Trial


def load(run: Run) -> list[Row]:
    groups: dict[tuple[Any, ...], list[tuple[Trial, dict[str, Any]]]] = defaultdict(list)
    for trial in run.loads:
        for level in trial.manifest["load"]["levels"]:
            groups[trial.model, trial.network, trial.phase, trial.mode, level["level"]].append((trial, level))
    return [
        dict(zip(("model", "network", "phase", "mode", "level"), key, strict=True)) | row_of([level_of(*each) for each in own], own[0][1])
        for key, own in groups.items()
    ]


def rate(name: str, values: list[float | None]) -> Row:
    """Geometric mean and interval of values above 0; with a 0 among them arithmetic ones, not below 0."""
    if None in values or min(values) > 0:
        return log_interval(name, values)
    found = interval(name, values)
    return found | {f"{name}_low": None if found[f"{name}_low"] is None else max(0.0, found[f"{name}_low"])}


def row_of(levels: list[dict[str, Any]], first: dict[str, Any]) -> Row:
    row: Row = {"trials": len(levels), "concurrency": first["concurrency"]}
    for name in ("tokens_per_s", "requests_per_s", "goodput_per_s", "ttft_p50_ms"):
        row |= rate(name, [level[name] for level in levels])
    for share in (50, 90, 99):
        own = [percentile(level["gaps_ms"], share) for level in levels]
        pooled = percentile(np.concatenate([level["gaps_ms"] for level in levels]), share)
        row[f"itl_p{share}_ms"] = pooled if None in own else rate("", own)[""]
    for name in (
        "itl_mean_ms",
        "rtt_ms",
        "engine_overhead_share",
        "step_to_floor",
        "in_time_share",
        "batch",
        "busy_share",
        "payload_bytes_per_token",
        "round_trips_per_token",
        "steadiness",
        "kv_mb",
    ):
        values = [level[name] for level in levels]
        row[name] = None if None in values else float(np.mean(values))
    return row | {name: sum(level[name] for level in levels) for name in ("requests", "gaps")}


def level_of(trial: Trial, level: dict[str, Any]) -> dict[str, Any]:
    """One level of one trial, from its rows: only the window's ends come from the manifest."""
    start_s, end_s = level["start_s"], level["end_s"]
    window_s, number = end_s - start_s, level["level"]
    tokens, requests, batches = (trial.table(name) for name in ("load", "requests", "batches"))
    inside = tokens[(tokens["level"] == number) & (tokens["came_s"] > start_s) & (tokens["came_s"] <= end_s)]
    measured = requests[(requests["level"] == number) & (requests["measured"] == True)]  # noqa: E712
    steps = batches[(batches["begin_s"] > start_s) & (batches["begin_s"] <= end_s)]
    gaps, late_half = inside["gap_s"].dropna().to_numpy() * 1e3, int((inside["came_s"] > (start_s + end_s) / 2).sum())
    in_time = [None if value is None else bool(value) for value in measured["in_time"]]
    kept = None if None in in_time or not in_time else sum(map(bool, in_time))
    per_s = len(inside) / window_s / float(measured["new_tokens"].mean())
    spent = float((steps["schedule_s"] + steps["compute_s"] + steps["reply_s"]).sum())
    compute_s, floor = float(steps["compute_s"].sum()), trial.manifest["floor"]
    decoding_s = steps.loc[steps["prefill_tokens"] == 0, "compute_s"].median()
    return {
        "itl_mean_ms": float(gaps.mean()),
        "rtt_ms": 1e3 * trial.manifest["probe"]["rtt_s"],
        "engine_overhead_share": 1 - compute_s / spent,
        "step_to_floor": None if np.isnan(decoding_s) else decoding_s * floor["read_bytes_per_s"] / floor["step_bytes"],
        "tokens_per_s": len(inside) / window_s,
        "requests_per_s": per_s,
        "goodput_per_s": None if kept is None else kept / len(measured) * per_s,
        "in_time_share": None if kept is None else kept / len(measured),
        "ttft_p50_ms": percentile(measured["ttft_s"].to_numpy() * 1e3, 50),
        "gaps_ms": gaps,
        "gaps": len(gaps),
        "requests": len(measured),
        "batch": float(steps["requests"].mean()) if len(steps) else None,
        "busy_share": spent / window_s,
        "kv_mb": float(steps["kv_blocks"].mean()) * trial.manifest["load"]["engine"]["kv_block_bytes"] / 1e6,
        "payload_bytes_per_token": (level["up_frame_bytes"] + level["down_frame_bytes"]) / len(inside),
        "round_trips_per_token": level["round_trips"] / len(inside),
        "steadiness": late_half / (len(inside) - late_half),
    }


def percentile(values: np.ndarray, share: int) -> float | None:
    return float(np.percentile(values, share)) if len(values) * (100 - share) >= 100 else None
