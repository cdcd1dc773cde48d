"""Table ladder: bytes, latency and exactness of each rung, and its ratio to the rung before."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pandas as pd

from semgap.analysis.aggregate import PAYLOAD, SETTING, by_setting, byte_ratio, first_of, kept, latency_ratio, mean_of, means_of
from semgap.analysis.columns import frame_of, interval_columns, mean_columns, ratio_columns, with_endings
from semgap.analysis.results import Results
from semgap.analysis.stats import no_interval
from semgap.analysis.tables.render import Column, View
from semgap.analysis.tables.summary import MEANS, PROMISE_COLUMNS, UPLOAD_COLUMNS

RUNGS: Mapping[str, str] = {
    "remote_cache": "the cache stays with the worker",
    "know_position": "only the last position is read",
    "know_layout": "floats have exponents and mantissas, ids are small",
    "know_head": "logits are a linear map that the client has",
    "know_consumer": "the client only samples",
    "know_loop": "decoding is a loop",
    "sys": "all of it, and weights by hash",
}
"""The modes of the ladder, lowest first, each with the fact that it adds."""
REFERENCES: Mapping[str, str] = {
    "remote_cache_zstd": "knows nothing: zstd on everything",
    "sys_simulated": "fp16 and zlib, as in the original experiment",
}
COLUMNS = [
    *(*SETTING, "mode", "role", "adds", "trials", "keeps", "promise_kept"),
    *("tensor_bytes_per_token", *with_endings(PAYLOAD), "wire_bytes_per_token"),
    *("up_payload_bytes_per_token", "down_payload_bytes_per_token", "round_trips_per_token"),
    *(*with_endings("ttft_ms", "itl_ms"), "before", *with_endings("bytes_to_before", "latency_to_before"), "latency_to_before_pairs"),
    *("entropy_bytes_per_token", "semantic_efficiency", "semantic_efficiency_reason"),
    *("setup_payload_bytes", "weights_bytes", "weights_put_mb_per_s", "weights_held_bytes", "weights_reason"),
    *("earlier_sessions_weights_bytes", "head_bytes", "ratios_reason"),
]


def table(results: Results) -> pd.DataFrame:
    """One row per model, network, decode phase and mode of the ladder or reference that was run, lowest rung first.

    TTFT is the prefill before the measured steps, ITL the trial's median; both are means over trials with a t interval. The ratios to the
    rung before: payload bytes (counted), and latencies (paired trials, t interval on the log scale). `semantic_efficiency` is payload bytes
    per token over `entropy_bytes_per_token`, the least that a code which shares the model needs for a token of the text. 1 is the minimum.
    """
    decoding = results.rows[results.rows["phase_kind"] == "decode"]
    rows = [
        _row(setting, mode, modes, results.exactness)
        for setting, modes in by_setting(decoding)
        for mode in (*RUNGS, *REFERENCES)
        if mode in modes
    ]
    return frame_of(rows, COLUMNS)


def entropy_bytes(exactness: pd.DataFrame, model: str) -> float | None:
    """The model's entropy of the text in bytes per token: local's cross entropy, nats / ln 2 / 8. None if no check measured it."""
    nats = first_of(exactness.loc[exactness["model"] == model, "text_reference_cross_entropy_nats"])
    return None if nats is None else float(nats) / math.log(2) / 8


def _row(setting: Mapping[str, str], mode: str, modes: Mapping[str, pd.DataFrame], exactness: pd.DataFrame) -> dict[str, Any]:
    cell = modes[mode]
    return {
        **setting,
        "mode": mode,
        "role": "rung" if mode in RUNGS else "reference",
        "adds": {**RUNGS, **REFERENCES}[mode],
        "trials": len(cell),
        **kept(cell, exactness, setting["model"], mode),
        **mean_columns(PAYLOAD, cell[PAYLOAD]),
        **mean_columns("ttft_ms", cell["ttft_s"] * 1e3),
        **mean_columns("itl_ms", cell["latency_median_s"] * 1e3),
        **_ratios_to_before(mode, modes),
        **_efficiency(cell, entropy_bytes(exactness, setting["model"])),
        **means_of(cell, MEANS),
        "ratios_reason": first_of(cell["ratios_reason"]),
    }


def _ratios_to_before(mode: str, modes: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """The ratios to the rung before; null with a reason if there is none or it was not run."""
    rung = list(RUNGS).index(mode) if mode in RUNGS else 0
    if rung == 0:
        before, size = None, no_interval("the lowest rung" if mode in RUNGS else "a reference, not a rung")
        time = size
    else:
        before = list(RUNGS)[rung - 1]
        size, time = byte_ratio(modes, mode, before), latency_ratio(modes, mode, before)
        marked = first_of(pd.concat([modes[name]["ratios_reason"] for name in (mode, before) if name in modes]))
        size = replace(size, reason=marked) if marked and size.value is not None else size
    return {"before": before, **interval_columns("bytes_to_before", size), **ratio_columns("latency_to_before", time)}


def _efficiency(cell: pd.DataFrame, bound: float | None) -> dict[str, Any]:
    payload = mean_of(cell[PAYLOAD])
    reason = "no exactness check of this model was run, which measures the text's entropy" if bound is None else None
    value = None if payload is None or not bound else payload / bound
    reason = reason or first_of(cell["ratios_reason"])
    return {"entropy_bytes_per_token": bound, "semantic_efficiency": value, "semantic_efficiency_reason": reason}


VIEWS = (
    View(
        "Ladder: bytes",
        (
            Column("mode", "mode"),
            Column("adds", "adds"),
            Column("tensor_bytes_per_token", "tensor (B/token)", "digits"),
            Column(PAYLOAD, "payload (B/token)", "digits", reason="ratios_reason"),
            Column("wire_bytes_per_token", "wire (B/token)", "digits"),
            Column("round_trips_per_token", "round trips/token", "small"),
            Column("bytes_to_before", "payload x before", "small", reason="bytes_to_before_reason"),
            Column("semantic_efficiency", "payload x entropy", "digits", reason="semantic_efficiency_reason"),
        ),
        "Means over trials of the measured steps, both directions. x before: ratio to the rung before. x entropy: payload over the "
        "model's entropy of the text, the least that any code needs; smaller is better. References stand below the rungs.",
    ),
    View(
        "Ladder: time and exactness",
        (
            Column("mode", "mode"),
            *PROMISE_COLUMNS,
            Column("ttft_ms", "TTFT (ms) [95% CI]", "digits", reason="ttft_ms_reason"),
            Column("itl_ms", "ITL (ms) [95% CI]", "digits", reason="itl_ms_reason"),
            Column("latency_to_before", "ITL x before [95% CI]", "ratio", reason="latency_to_before_reason"),
        ),
        "TTFT: the prefill before the measured steps. ITL: mean over trials of their medians. x before: paired trials, geometric mean.",
    ),
    View(
        "Ladder: setup",
        (
            Column("mode", "mode"),
            Column("setup_payload_bytes", "frames (MB)", "digits", 1e-6),
            *UPLOAD_COLUMNS,
            Column("head_bytes", "output head in the client (MB)", "digits", 1e-6, null="-"),
        ),
        "Once, before the measured steps. Frames and weights: of the measured session, the last one of the phase.",
    ),
)
