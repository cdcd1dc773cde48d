"""Table load: throughput, latencies, goodput, batches, bytes and energy of each mode under each load."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pandas as pd

from semgap.analysis.aggregate import SETTING, first_of, matching, mean_of
from semgap.analysis.columns import frame_of, interval_columns, with_endings
from semgap.analysis.load_levels import SHARES, level_gaps_ms, level_name, percentile
from semgap.analysis.results import Results
from semgap.analysis.stats import Interval, geometric_mean_interval, mean_interval, no_interval
from semgap.analysis.tables.render import Column, View

TIMES = tuple(f"{name}_p{share}_ms" for name in ("ttft", "itl") for share in SHARES)
RATES = ("tokens_per_s", "requests_per_s", "goodput_per_s")
MEANS = (
    *(
        "in_time_share",
        "e2e_p50_ms",
        "queue_p50_ms",
        "batch",
        "busy_share",
        "engine_overhead_share",
        "step_to_floor",
        "kv_mb",
        "kv_shared_mb",
    ),
    *("payload_bytes_per_token", "round_trips_per_token", "client_cpu_s_per_token", "joules_per_token", "steadiness", "window_s"),
)
MOST_DRIFT = 0.2
COLUMNS = [
    *(*SETTING, "mode", "level", "load", "concurrency", "rate_per_s", "share", "trials", "requests", "gaps"),
    *with_endings(*RATES, *TIMES),
    *(*MEANS, "joules_reason", "steady", "keeps", "promise_kept", "tokens_compared", "tokens_equal", "edge_draws"),
    *("blind", *with_endings("throughput_to_blind")),
    *(
        "itl_mean_ms",
        "rtt_ms",
        "priced_tokens_per_s",
        "price_error",
        "priced_itl_mean_ms",
        "itl_price_error",
        "priced_occupancy",
        "priced_from",
    ),
    "price_reason",
]


def table(results: Results) -> pd.DataFrame:
    """One row per model, network, load phase, level and mode, in the order of the config's modes.

    Geometric means over trials of rates and times, with t intervals on the log scale; an arithmetic mean of values with a 0, as of goodput.
    A percentile of ITL that a trial has too few gaps for is that of all trials' gaps, without an interval. `steady`: in each trial the two
    halves of the window gave as many tokens, within 20%. `throughput_to_blind`: tokens per second over the best of the modes that know
    nothing, over paired trials.
    """
    levels = results.load
    rows = [
        _row(results, dict(zip([*SETTING, "level"], keys, strict=True)), str(mode), own, block)
        for keys, block in levels.groupby([*SETTING, "level"], sort=False)
        for mode, own in block.groupby("mode", sort=False)
    ]
    return frame_of(rows, COLUMNS)


def _row(results: Results, at: Mapping[str, Any], mode: str, own: pd.DataFrame, block: pd.DataFrame) -> dict[str, Any]:
    first = own.iloc[0]
    setting = {key: at[key] for key in SETTING} | {"mode": mode}
    mine = [m["exactness"] for m in results.trials.manifests if all(m["cell"][key] == value for key, value in setting.items())]
    return {
        **at,
        "mode": mode,
        "load": level_name(first),
        **{name: first[name] for name in ("concurrency", "share")},
        "rate_per_s": mean_of(own["rate_per_s"]),
        "trials": len(own),
        **{name: int(own[name].sum()) for name in ("requests", "gaps", "tokens_compared", "tokens_equal", "edge_draws")},
        **_intervals(results, {**at, "mode": mode}, own),
        **{name: mean_of(own[name]) for name in MEANS},
        "joules_reason": first_of(own["joules_reason"]),
        "steady": bool(((own["steadiness"].astype("float64") - 1).abs() <= MOST_DRIFT).all()),
        "keeps": mine[0]["keeps"],
        "promise_kept": all(each["promise_kept"] for each in mine),
        **_to_blind(results, mode, block),
        "itl_mean_ms": mean_of(own["itl_mean_ms"]),
        "rtt_ms": 1e3 * float(own["rtt_s"].astype("float64").mean()),
        **_priced(results, {**at, "mode": mode}),
    }


def _priced(results: Results, at: Mapping[str, Any]) -> dict[str, Any]:
    """The level's price from other networks, and its errors."""
    held = matching(results.load_held_out, at)
    if held.empty:
        return {"price_reason": "only closed loops have a price"}
    row = held.iloc[0]
    return {
        "priced_tokens_per_s": row["priced_tokens_per_s"],
        "price_error": row["error_tokens_per_s"],
        "priced_itl_mean_ms": row["priced_itl_mean_ms"],
        "itl_price_error": row["error_itl_mean_ms"],
        "priced_occupancy": row["occupancy"],
        "priced_from": row["from_networks"],
        "price_reason": row["reason"],
    }


def _intervals(results: Results, at: Mapping[str, Any], own: pd.DataFrame) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in (*RATES, *TIMES):
        values = own[name].astype("float64")
        interval = _rate_interval(values.tolist()) if values.notna().all() else no_interval(_missing(name), len(own))
        if interval.value is None and name.startswith("itl"):
            interval = _pooled(results, at, int(name.split("_p")[1].removesuffix("_ms")))
        found |= interval_columns(name, interval)
    return found


def _rate_interval(values: list[float]) -> Interval:
    """Over trials; no end lies below 0."""
    if min(values) > 0:
        return geometric_mean_interval(values)
    interval = mean_interval(values)
    return replace(interval, low=None if interval.low is None else max(interval.low, 0.0))


def _pooled(results: Results, at: Mapping[str, Any], share: int) -> Interval:
    gaps = level_gaps_ms(results.trials, at)
    value, needed = percentile(gaps, share), 100 // (100 - share)
    if value is None:
        return no_interval(f"{len(gaps)} gaps, {needed} are needed; raise the phase's requests")
    return Interval(value, None, None, 1, f"of the gaps of all trials: one trial has fewer than {needed}")


def _missing(name: str) -> str:
    if name == "goodput_per_s":
        return "the phase has no deadlines"
    return "too few requests for this percentile; raise the phase's requests"


def _to_blind(results: Results, mode: str, block: pd.DataFrame) -> dict[str, Any]:
    """Throughput over that of the blind mode with the most."""
    blind = [name for name, mark in results.load_marks.items() if mark.blind and name in set(block["mode"])]
    if not blind:
        return {"blind": None, **interval_columns("throughput_to_blind", no_interval("no blind mode was run"))}
    strongest = max(blind, key=lambda name: float(block.loc[block["mode"] == name, "tokens_per_s"].mean()))
    ours, base = (matching(block, {"mode": name}).set_index("trial")["tokens_per_s"] for name in (mode, strongest))
    return {"blind": strongest, **interval_columns("throughput_to_blind", geometric_mean_interval((ours / base).dropna().tolist()))}


FIRST = (Column("load", "load"), Column("mode", "mode"))
BY = ("model", "network", "phase")
VIEWS = (
    View(
        "Load: throughput",
        (
            *FIRST,
            Column("tokens_per_s", "tokens/s", "digits", reason="tokens_per_s_reason"),
            Column("throughput_to_blind", "x blind", "ratio", reason="throughput_to_blind_reason"),
            Column("goodput_per_s", "in time (requests/s)", "digits", reason="goodput_per_s_reason"),
            Column("in_time_share", "in time (%)", "percent", null="-"),
            Column("steady", "steady", "yes_no"),
        ),
        "Over the measured windows, without ramp and drain; means over trials (geometric, but of values with a 0), with 95% t intervals. "
        "x blind: throughput over the best mode that knows only bytes and shapes, paired trials. In time: requests "
        "whose TTFT and mean ITL kept the phase's deadlines. "
        "Steady: both halves of each window gave as many tokens, within 20%.",
        by=BY,
    ),
    View(
        "Load: latency",
        (
            *FIRST,
            Column("ttft_p50_ms", "TTFT p50 (ms)", "digits", reason="ttft_p50_ms_reason"),
            Column("ttft_p90_ms", "TTFT p90 (ms)", "digits", reason="ttft_p90_ms_reason"),
            Column("itl_p50_ms", "ITL p50 (ms)", "digits", reason="itl_p50_ms_reason"),
            Column("itl_p90_ms", "ITL p90 (ms)", "digits", reason="itl_p90_ms_reason"),
            Column("itl_p99_ms", "ITL p99 (ms)", "digits", reason="itl_p99_ms_reason"),
        ),
        "Geometric means over trials, with 95% t intervals. TTFT from the arrival. ITL: the gaps between tokens of a request.",
        by=BY,
    ),
    View(
        "Load: the engine",
        (
            *FIRST,
            Column("batch", "requests a step", "digits"),
            Column("busy_share", "busy (%)", "percent"),
            Column("engine_overhead_share", "not compute (%)", "percent"),
            Column("step_to_floor", "x floor", "ratio", null="-"),
            Column("kv_mb", "KV held (MB)", "digits"),
            Column("kv_shared_mb", "KV shared (MB)", "digits"),
        ),
        "Means over the engine's steps in the measured windows. Busy: the part of the window in which it ran a step. Not compute: the part "
        "of its steps that scheduling and replying took. x floor: a step that only decodes, over reading the weights once.",
        by=BY,
    ),
    View(
        "Load: measured and priced from other networks",
        (
            *FIRST,
            Column("tokens_per_s", "tokens/s", "digits", reason="tokens_per_s_reason"),
            Column("priced_tokens_per_s", "priced", "digits", reason="price_reason", null="-"),
            Column("price_error", "rate error (%)", "signed_percent", null="-"),
            Column("itl_mean_ms", "mean ITL (ms)", "digits", null="-"),
            Column("priced_itl_mean_ms", "priced (ms)", "digits", null="-"),
            Column("itl_price_error", "ITL error (%)", "signed_percent", null="-"),
        ),
        "Priced: with this network left out, from the mode's levels over the others and this network's round trip.",
        by=BY,
        collapses=True,
    ),
    View(
        "Load: cost and tokens",
        (
            *FIRST,
            Column("payload_bytes_per_token", "payload (B/token)", "digits"),
            Column("round_trips_per_token", "round trips/token", "small"),
            Column("joules_per_token", "GPU (J/token)", "digits", reason="joules_reason"),
            Column("tokens_compared", "tokens compared", "count"),
            Column("tokens_equal", "equal", "count"),
            Column("edge_draws", "within the margin", "count"),
        ),
        "Tokens: of all requests, compared with each request's run alone; within the margin: the reference's own logit was as large, by "
        "rounding.",
        by=BY,
    ),
)
