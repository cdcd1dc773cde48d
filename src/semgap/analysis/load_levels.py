"""The levels of load trials: throughput, latencies and their percentiles, goodput, batches, bytes and energy of each measured window."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from semgap.analysis.aggregate import matching
from semgap.analysis.columns import frame_of
from semgap.analysis.gpu import window_energy
from semgap.analysis.load import KEYS, Trials, keys_of

SHARES = (50, 90, 99)
"""The percentiles, of 1 / (1 - share) values or more."""
LATENCIES = ("ttft", "itl", "e2e", "queue")
COLUMNS = [
    *(*KEYS, "level", "concurrency", "rate_per_s", "share", "window_s", "requests", "tokens", "gaps"),
    *("tokens_per_s", "requests_per_s", "steadiness", "live_start", "live_end"),
    *(f"{name}_p{share}_ms" for name in LATENCIES for share in SHARES),
    *("in_time_share", "goodput_per_s", "engine_steps", "batch", "busy_share", "engine_overhead_share", "step_to_floor"),
    *("itl_mean_ms", "calls_per_token", "inner_calls_per_token", "calls_per_gap", "rtt_s", "turns"),
    *("kv_mb", "kv_shared_mb", "payload_bytes_per_token", "round_trips_per_token", "client_cpu_s_per_token"),
    *("joules_per_token", "joules_reason", "late_p95_ms", "late_max_ms", "tokens_compared", "tokens_equal", "edge_draws"),
]


def load_levels(trials: Trials) -> pd.DataFrame:
    """One row per level of each load trial, over its measured window (`COLUMNS`; results/README.md explains each)."""
    gpu = dict(tuple(trials.gpu.groupby(KEYS, sort=False))) if len(trials.gpu) else {}
    rows = []
    for manifest in trials.manifests:
        load = manifest.get("load")
        if load is None:
            continue
        keys = keys_of(manifest)
        own = {name: matching(getattr(trials, name), keys) for name in ("requests", "load", "batches")}
        samples = gpu.get(tuple(keys.values()), trials.gpu.iloc[:0])
        for level in load["levels"]:
            energy = window_energy(samples, level["start_s"], level["end_s"], level["tokens"], manifest["telemetry"]["gpu"]["reason"])
            of_level = {name: rows[rows["level"] == level["level"]] for name, rows in own.items()}
            rows.append(keys | _level(level, load["engine"], **of_level) | _calls(manifest, of_level["requests"]) | energy)
    return frame_of(rows, COLUMNS)


def level_gaps_ms(trials: Trials, row: Mapping[str, Any]) -> np.ndarray:
    """The gaps between tokens of a level in the measured windows of all trials of a mode (n,), in ms."""
    own = matching(trials.load, {key: row[key] for key in ("model", "network", "mode", "phase", "level")})
    return _ms(own.loc[own["measured"].astype("bool"), "gap_s"])


def percentile(values: np.ndarray, share: int) -> float | None:
    """The percentile by linear interpolation; None of fewer values than it cuts off one of."""
    return float(np.percentile(values, share)) if len(values) * (100 - share) >= 100 else None


def _level(
    level: Mapping[str, Any], engine: Mapping[str, Any], requests: pd.DataFrame, load: pd.DataFrame, batches: pd.DataFrame
) -> dict[str, Any]:
    window_s, tokens = level["end_s"] - level["start_s"], level["tokens"]
    measured, compared = requests[requests["measured"].fillna(False).astype("bool")], load[load["token_match"].notna()]
    gaps = _ms(load.loc[load["measured"].astype("bool"), "gap_s"])
    timed = {"ttft": measured["ttft_s"], "e2e": measured["e2e_s"], "queue": measured["queue_s"]}
    latencies = {name: _ms(values) for name, values in timed.items()} | {"itl": gaps}
    first, second = level["half_tokens"]
    return {
        **{name: level[name] for name in ("level", "concurrency", "rate_per_s", "share", "requests", "tokens", "live_start", "live_end")},
        "window_s": window_s,
        "gaps": len(gaps),
        "itl_mean_ms": float(gaps.mean()) if len(gaps) else None,
        "tokens_per_s": tokens / window_s,
        "steadiness": second / first if first else None,
        **{f"{name}_p{share}_ms": percentile(latencies[name], share) for name in LATENCIES for share in SHARES},
        **_requests(measured, tokens / window_s),
        **_engine(batches, engine, window_s),
        "payload_bytes_per_token": _over(level["up_frame_bytes"] + level["down_frame_bytes"], tokens),
        "round_trips_per_token": _over(level["round_trips"], tokens),
        "client_cpu_s_per_token": _over(level["client_cpu_s"], tokens),
        **{f"late_{name}_ms": 1e3 * level[f"late_{name}_s"] for name in ("p95", "max")},
        "tokens_compared": int((~compared["edge_draw"].astype("bool")).sum()),
        "tokens_equal": int(compared["token_match"].astype("bool").sum()),
        "edge_draws": int(load["edge_draw"].fillna(False).astype("bool").sum()),
    }


def _calls(manifest: Mapping[str, Any], requests: pd.DataFrame) -> dict[str, Any]:
    """Calls per token, calls but the last per token, calls per gap between tokens, the probed round trip, and the mode's turns."""
    policy = manifest["cell"]["policy"]
    tokens = requests.loc[requests["measured"].fillna(False).astype("bool"), "new_tokens"]
    calls = -(-tokens // policy["window"])
    return {
        "calls_per_token": _over(float(calls.sum()), int(tokens.sum())),
        "inner_calls_per_token": _over(float((calls - 1).sum()), int(tokens.sum())),
        "calls_per_gap": float((calls - 1).sum()) / max(1, int((tokens - 1).sum())),
        "rtt_s": manifest["probe"]["rtt_s"],
        "turns": policy["batching"]["turns"],
    }


def _requests(measured: pd.DataFrame, tokens_per_s: float) -> dict[str, float | None]:
    """Requests a second, the share that kept their deadlines, and how many a second did.

    By the tokens of a measured request: ends come in bunches, so that a count of them depends on where the window begins and ends.
    """
    per_s = tokens_per_s / float(measured["new_tokens"].mean())
    known = measured["in_time"].dropna().astype("bool")
    if len(known) < len(measured) or known.empty:
        return {"requests_per_s": per_s, "in_time_share": None, "goodput_per_s": None}
    return {"requests_per_s": per_s, "in_time_share": float(known.mean()), "goodput_per_s": float(known.mean()) * per_s}


def _engine(batches: pd.DataFrame, engine: Mapping[str, Any], window_s: float) -> dict[str, float | int | None]:
    """The engine's steps in the window: requests in a step, its busy part, what scheduling and replying took, and its KV memory."""
    if batches.empty:
        return {"engine_steps": 0}
    times = batches[["schedule_s", "compute_s", "reply_s"]].sum()
    block_mb = engine["kv_block_bytes"] / 1e6
    return {
        "engine_steps": len(batches),
        "batch": float(batches["requests"].mean()),
        "busy_share": float(times.sum() / window_s),
        "engine_overhead_share": float((times["schedule_s"] + times["reply_s"]) / times.sum()),
        "step_to_floor": _to_floor(batches.loc[batches["prefill_tokens"] == 0, "compute_s"], engine["floor"]),
        "kv_mb": float(batches["kv_blocks"].mean() * block_mb),
        "kv_shared_mb": float(batches["kv_shared"].mean() * block_mb),
    }


def _to_floor(seconds: pd.Series, floor: Mapping[str, Any]) -> float | None:
    """The median of steps that only decode over the time to read their weights once."""
    if floor["read_bytes_per_s"] is None or seconds.empty:
        return None
    return float(seconds.median() / (floor["step_bytes"] / floor["read_bytes_per_s"]))


def _ms(values: pd.Series) -> np.ndarray:
    known: np.ndarray = 1e3 * values.dropna().to_numpy("float64")
    return known


def _over(value: float, count: int) -> float | None:
    return value / count if count else None


def level_name(row: "Mapping[str, Any] | pd.Series[Any]") -> str:
    """`N = 4`, `80% of capacity`, or `1.5/s`."""
    if not pd.isna(row["concurrency"]):
        return f"N = {int(row['concurrency'])}"
    return f"{100 * row['share']:g}% of capacity" if not pd.isna(row["share"]) else f"{row['rate_per_s']:.3g}/s"
