"""Table handover: the time that a request loses when one worker computes its prompt and another goes on with it."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from semgap.analysis.aggregate import SETTING, by_setting, first_of, kept, layers_by_codec, matching, mean_of
from semgap.analysis.columns import frame_of, interval_columns, with_endings
from semgap.analysis.results import Results
from semgap.analysis.stats import Interval, mean_interval, no_interval
from semgap.analysis.tables.render import Column, View

TIMES = (
    "ttft_ms",
    "ttft_stayed_ms",
    "second_ms",
    "second_stayed_ms",
    "wait_ms",
    "wait_stayed_ms",
    "adds_ms",
    "second_adds_ms",
    "after_ms",
    "stall_ms",
)
BYTES = ("saved_tensor_bytes", "saved_payload_bytes", "sent_network_bytes", "fetched_network_bytes")
COLUMNS = [
    *(*SETTING, "mode", "recovery", "kv_codec", "kv_network", "trials", "requests_per_trial", "moved_per_trial", "keeps", "promise_kept"),
    "kv_codecs",
    *with_endings(*TIMES, "hidden_share"),
    *(*(f"{name}_per_request" for name in BYTES), "bytes_reason", "codec_ratio", "sent_to_payload", "ratios_reason"),
    *("handed_requests", "recomputed_requests", "fallback_requests"),
]
NOT_SENT = "no request's blocks were sent"
IN_LOCAL = "in local no request moves"


def table(results: Results) -> pd.DataFrame:
    """One row per model, network, handover phase and mode, from its measured requests: means over trials, with a t interval, of a trial's
    medians over the requests that moved, or stayed (`stayed`).

    `wait_ms` is the time between the first two tokens. `adds_ms` is that without the step's own compute, less the same of the requests that
    stayed. `second_adds_ms` is the time to the second token of a request that moved, less that of its neighbour that stayed; a trial counts
    by the median over its pairs. It has the prefill's slowing down, and the noise of two prefills. `after_ms` is the part of the sending
    that came after the prefill, `hidden_share` the other part. `stall_ms` is what the second worker's step waited for the blocks or
    computed anew. Bytes are means.
    """
    rows = [_row(setting, mode, requests, results) for setting, modes in by_setting(results.handovers) for mode, requests in modes.items()]
    return frame_of(rows, COLUMNS)


def _row(setting: Mapping[str, str], mode: str, requests: pd.DataFrame, results: Results) -> dict[str, Any]:
    first, trials = requests.iloc[0], matching(results.rows, {**setting, "mode": mode}).set_index("trial")
    local, count = bool(first["local"]), requests["trial"].nunique()
    moved = requests[requests["moves"] & ~requests["local"].astype(bool)]
    handed = moved[moved["handed"].fillna(False).astype(bool)]
    return {
        **setting,
        "mode": mode,
        "recovery": None if local else first["policy"],
        **{name: None if local else first[name] for name in ("kv_codec", "kv_network")},
        "kv_codecs": layers_by_codec(handed["kv_codecs"]),
        "trials": count,
        "requests_per_trial": len(requests) / count,
        "moved_per_trial": len(moved) / count,
        **kept(trials, results.exactness, setting["model"], mode),
        **{
            column: value
            for name, each in _times(requests, moved, handed).items()
            for column, value in interval_columns(name, each).items()
        },
        **_bytes(moved, handed),
        "ratios_reason": first_of(requests["ratios_reason"]),
        "handed_requests": len(handed),
        "recomputed_requests": int((moved["recovery"] == "recompute").sum()),
        "fallback_requests": int(moved["fallback"].notna().sum()),
    }


def _times(requests: pd.DataFrame, moved: pd.DataFrame, handed: pd.DataFrame) -> dict[str, Interval]:
    stayed = requests[~requests["moves"]] if len(moved) else requests
    found: dict[str, Interval] = {}
    for name, column in (("ttft", "ttft_s"), ("second", "second_s"), ("wait", "latency_s")):
        found |= {f"{name}_ms": _median(moved, column, IN_LOCAL), f"{name}_stayed_ms": _median(stayed, column, "no request stayed")}
    hidden = handed.assign(hidden=1 - (handed["sent_after_s"] / handed["sent_s"]).clip(upper=1).astype("float64"))
    return found | {
        "adds_ms": _over_trials(1e3 * (_medians(moved, "waited_s") - _medians(stayed, "waited_s")).dropna(), IN_LOCAL),
        "second_adds_ms": _over_trials(1e3 * _added_s(requests), IN_LOCAL),
        "after_ms": _median(handed, "sent_after_s", NOT_SENT),
        "stall_ms": _median(moved, "stall_s", IN_LOCAL),
        "hidden_share": _over_trials(hidden.groupby("trial")["hidden"].median(), NOT_SENT),
    }


def _added_s(requests: pd.DataFrame) -> pd.Series:
    """Of each trial, the median over its pairs: time to the second token of the request that moved, less that of the one that stayed."""
    own = requests[~requests["local"].astype(bool)]
    moved, stayed = (own[own["moves"] == moves].set_index(["trial", "pair"])["second_s"] for moves in (True, False))
    return (moved - stayed).dropna().groupby("trial").median().astype("float64")


def _median(requests: pd.DataFrame, column: str, reason: str) -> Interval:
    return _over_trials(1e3 * _medians(requests, column), reason)


def _medians(requests: pd.DataFrame, column: str) -> pd.Series:
    """Of each trial."""
    return requests.astype({column: "float64"}).groupby("trial")[column].median()


def _over_trials(values: pd.Series, reason: str) -> Interval:
    return mean_interval(values.tolist()) if len(values) else no_interval(reason)


def _bytes(moved: pd.DataFrame, handed: pd.DataFrame) -> dict[str, Any]:
    means = {name: mean_of(handed[name]) for name in BYTES}
    tensor, payload, network = (means[name] for name in BYTES[:3])
    return {
        **{f"{name}_per_request": value for name, value in means.items()},
        "bytes_reason": None if len(handed) else NOT_SENT if len(moved) else IN_LOCAL,
        "codec_ratio": tensor / payload if tensor and payload else None,
        "sent_to_payload": network / payload if network and payload else None,
    }


BY = ("model", "network", "kv_network", "phase")
VIEWS = (
    View(
        "Handover, time",
        (
            Column("mode", "mode"),
            Column("trials", "trials", "count"),
            Column("ttft_ms", "TTFT (ms)", "digits", reason="ttft_ms_reason", null="-"),
            Column("second_ms", "second token (ms)", "digits", reason="second_ms_reason", null="-"),
            Column("wait_ms", "between (ms)", "digits", reason="wait_ms_reason", null="-"),
            Column("wait_stayed_ms", "between, stayed (ms)", "digits", reason="wait_stayed_ms_reason"),
            Column("adds_ms", "adds to it (ms)", "digits", reason="adds_ms_reason", null="-"),
            Column("second_adds_ms", "adds to the second (ms)", "digits", reason="second_adds_ms_reason", null="-"),
        ),
        "Requests whose prompt one worker computes and which another one goes on with. Means over trials of a trial's median, with 95% t "
        "intervals. Between: what the client waits from the first token to the second. Adds to it: that without the step's own compute, "
        "less the same of requests that stayed. Adds to the second: the time to the second token, less the neighbour's that stayed.",
        by=BY,
    ),
    View(
        "Handover, bytes and what is hidden",
        (
            Column("mode", "mode"),
            Column("saved_tensor_bytes_per_request", "cache (MB)", "digits", 1e-6, reason="bytes_reason", null="-"),
            Column("sent_network_bytes_per_request", "sent (MB)", "digits", 1e-6, reason="bytes_reason", null="-"),
            Column("kv_codecs", "layers came in", null="-"),
            Column("after_ms", "after prefill (ms)", "digits", reason="after_ms_reason", null="-"),
            Column("hidden_share", "hidden (%)", "percent", reason="hidden_share_reason", null="-"),
            Column("stall_ms", "second's stall (ms)", "digits", reason="stall_ms_reason", null="-"),
            Column("recomputed_requests", "recomputed", "count"),
        ),
        "Sent: frames between the first worker and the KV host, which stands beside the second one. Layers came in: codecs of a request's "
        "layers, means. Hidden: the part of the sending that went on while the prefill computed.",
        by=BY,
    ),
)
