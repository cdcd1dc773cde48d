"""Table ladder: bytes, latency, gap and exactness of each rung, and its ratio to the rung below."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pandas as pd

from semgap.analysis.aggregate import (
    PAYLOAD,
    SETTING,
    alike,
    by_setting,
    byte_ratio,
    first_of,
    kept,
    latency_ratio,
    matching,
    mean_of,
    means_of,
)
from semgap.analysis.columns import frame_of, interval_columns, mean_columns, ratio_columns, with_endings
from semgap.analysis.gaps import difference_ms
from semgap.analysis.marks import NO_MARK, blind_modes, rungs
from semgap.analysis.power import power_notes
from semgap.analysis.results import Results
from semgap.analysis.stats import Interval, mean_interval, no_interval
from semgap.analysis.tables.render import Column, View
from semgap.analysis.tables.summary import MEANS, PROMISE_COLUMNS, SETUP_COLUMNS, SETUP_NOTE

COLUMNS = [
    *(*SETTING, "mode", "role", "adds", "trials", "keeps", "promise_kept"),
    *("tensor_bytes_per_token", *with_endings(PAYLOAD), "wire_bytes_per_token"),
    *("up_payload_bytes_per_token", "down_payload_bytes_per_token", "round_trips_per_token"),
    *(*with_endings("ttft_ms", "itl_ms", "gap_ms"), "before", *with_endings("bytes_to_before", "gap_to_before_ms", "latency_to_before")),
    *("latency_to_before_pairs", "blind", *with_endings("bytes_to_blind", "entropy_bytes_per_token"), "payload_to_entropy"),
    *("payload_to_entropy_reason", "setup_payload_bytes", "weights_bytes", "weights_put_mb_per_s", "weights_held_bytes", "weights_reason"),
    *("earlier_sessions_weights_bytes", "head_bytes", "ratios_reason", "power"),
]


def table(results: Results) -> pd.DataFrame:
    """One row per model, network, prefill or decode phase, and mode of the ladder or reference that was run, lowest rung first.

    The modes' rows say which they are (`rung`, `reference`). TTFT is the prefill (also that before measured decode steps), ITL the time per
    decode token; both and the gap are means over trials with a t interval. Against the rung below: payload bytes (counted), the gap
    (Welch's t interval), and latencies (paired trials). `bytes_to_blind`: against the blind mode with the fewest bytes.
    `payload_to_entropy` is payload bytes per token over `entropy_bytes_per_token`, the model's cross entropy of a token of the text.
    """
    order = [*rungs(results.marks), *(mode for mode, mark in results.marks.items() if mark.reference)]
    compared = alike(results.rows)
    notes = power_notes(results)
    rows = [
        _row(results, setting, mode, modes) | {"power": notes[tuple(setting.values())]}
        for setting, modes in by_setting(compared)
        for mode in order
        if mode in modes
    ]
    return frame_of(rows, COLUMNS)


def entropy_bytes(exactness: pd.DataFrame, model: str) -> Interval:
    """The model's cross entropy of the text in bytes per token (local's, nats / ln 2 / 8), with a t interval over prompts.

    Of the check that read the most text; null without a check.
    """
    checks = exactness[(exactness["model"] == model) & exactness["text_tokens"].notna()]
    if checks.empty:
        return no_interval("no exactness check of this model was run, which measures the text's cross entropy")
    longest = checks.sort_values("text_tokens", ascending=False, kind="stable")["text_reference_nats_by_prompt"].iloc[0]
    found = mean_interval([nats / math.log(2) / 8 for nats in longest])
    return found if found.n > 1 else replace(found, reason="one prompt has no interval; set exactness.prompts to 2 or more")


def _row(results: Results, setting: Mapping[str, str], mode: str, modes: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    cell, mark, exactness = modes[mode], results.marks.get(mode, NO_MARK), results.exactness
    gaps = matching(results.gaps, {**setting, "mode": mode})
    latency_ms = cell["latency_mean_s"] * 1e3
    prefill = cell["phase_kind"].iloc[0] == "prefill"
    return {
        **setting,
        "mode": mode,
        "role": "rung" if mark.rung else "reference",
        "adds": mark.rung.adds if mark.rung else mark.reference,
        "trials": len(cell),
        **kept(cell, exactness, setting["model"], mode),
        **mean_columns(PAYLOAD, cell[PAYLOAD]),
        **mean_columns("ttft_ms", latency_ms if prefill else cell["ttft_s"] * 1e3),
        **(interval_columns("itl_ms", no_interval("a prefill has no ITL")) if prefill else mean_columns("itl_ms", latency_ms)),
        **(mean_columns("gap_ms", gaps["gap_s"].astype("float64") * 1e3)),
        **_to_before(results, setting, mode, modes),
        **_to_blind(results, mode, modes),
        **_to_entropy(cell, entropy_bytes(exactness, setting["model"])),
        **means_of(cell, MEANS),
        "ratios_reason": first_of(cell["ratios_reason"]),
    }


def _to_before(results: Results, setting: Mapping[str, str], mode: str, modes: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """The comparison with the next lower rung that was run; null with a reason if there is none."""
    rung = results.marks.get(mode, NO_MARK).rung
    before = rung.after if rung else None
    while before is not None and before not in modes:
        lower = results.marks.get(before, NO_MARK).rung
        before = lower.after if lower else None
    if before is None:
        size = time = gap = no_interval("the lowest rung" if rung else "a reference, not a rung")
    else:
        size, time = byte_ratio(modes, mode, before), latency_ratio(modes, mode, before)
        gap = difference_ms(results.gaps, setting, mode, before)
        marked = first_of(pd.concat([modes[name]["ratios_reason"] for name in (mode, before) if name in modes]))
        size = replace(size, reason=marked) if marked and size.value is not None else size
    columns = interval_columns("bytes_to_before", size) | interval_columns("gap_to_before_ms", gap)
    return {"before": before, **columns, **ratio_columns("latency_to_before", time)}


def _to_blind(results: Results, mode: str, modes: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """Payload bytes against the strongest baseline that knows nothing, by measurement."""
    blind = [name for name in blind_modes(results.marks) if name in modes]
    strongest = min(blind, key=lambda name: mean_of(modes[name][PAYLOAD]) or math.inf, default=None)
    ratio = byte_ratio(modes, mode, strongest) if strongest else no_interval("no blind baseline was run")
    return {"blind": strongest, **interval_columns("bytes_to_blind", ratio)}


def _to_entropy(cell: pd.DataFrame, bound: Interval) -> dict[str, Any]:
    payload = mean_of(cell[PAYLOAD])
    value = None if payload is None or not bound.value else payload / bound.value
    reason = (bound.reason if bound.value is None else None) or first_of(cell["ratios_reason"])
    return interval_columns("entropy_bytes_per_token", bound) | {"payload_to_entropy": value, "payload_to_entropy_reason": reason}


VIEWS = (
    View(
        "Ladder, bytes",
        (
            Column("mode", "mode"),
            Column("adds", "adds"),
            Column("tensor_bytes_per_token", "tensor (B/token)", "digits"),
            Column(PAYLOAD, "payload (B/token)", "digits", reason="ratios_reason"),
            Column("bytes_to_before", "x before", "small", reason="bytes_to_before_reason"),
            Column("bytes_to_blind", "x blind", "small", reason="bytes_to_blind_reason"),
            Column("payload_to_entropy", "x entropy", "digits", reason="payload_to_entropy_reason"),
            Column("round_trips_per_token", "round trips/token", "small"),
        ),
        "Means over trials of the measured steps, both directions. x: of the payload. x before: ratio to the rung below. x blind: to the "
        "baseline of those that know nothing that sent the fewest bytes. x entropy: payload over the model's cross entropy of the text, "
        "which a code that shares the model needs for a token of it. It is a scale, not a bound: drawn tokens are likelier than the "
        "text's, and a code that shares the rule of drawing needs nothing. References stand below the rungs.",
    ),
    View(
        "Ladder, time and exactness",
        (
            Column("mode", "mode"),
            *PROMISE_COLUMNS,
            Column("ttft_ms", "TTFT (ms)", "digits", reason="ttft_ms_reason"),
            Column("itl_ms", "ITL (ms)", "digits", reason="itl_ms_reason", null="-"),
            Column("gap_ms", "gap (ms)", "digits", reason="gap_ms_reason"),
            Column("gap_to_before_ms", "gap - before (ms)", "digits", reason="gap_to_before_ms_reason"),
            Column("latency_to_before", "latency x before", "ratio", reason="latency_to_before_reason"),
        ),
        "TTFT: the prefill, in decode phases that before the measured steps. ITL: time per token. Gap: latency less compute, per token. "
        "Gap - before: less the gap of the rung below. x before: paired trials, geometric mean. 95% intervals, not adjusted for their "
        "number.",
        notes=("power",),
    ),
    View(
        "Ladder, setup",
        (Column("mode", "mode"), *SETUP_COLUMNS, Column("head_bytes", "client's head (MB)", "digits", 1e-6, null="-")),
        f"{SETUP_NOTE} Client's head: the output head in the client.",
    ),
)
