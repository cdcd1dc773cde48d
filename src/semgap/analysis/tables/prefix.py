"""Table prefix: time to the first token of requests whose beginning another session has computed, and where fetching it begins to pay."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from semgap.analysis.aggregate import SETTING, by_setting, first_of, kept, layers_by_codec, matching, mean_of
from semgap.analysis.columns import frame_of, interval_columns, with_endings
from semgap.analysis.results import Results
from semgap.analysis.stats import REMEASURE, Interval, exponentiated, mean_interval, no_interval
from semgap.analysis.tables.recovery import kv_link
from semgap.analysis.tables.render import Column, View

TIMES = ("ttft_ms", "stall_ms", "ratio_to_recompute", "ratio_to_better")
CROSSINGS = ("crossing_tokens", "predicted_crossing_tokens")
COLUMNS = [
    *(*SETTING, "mode", "prefix_tokens", "prompt_tokens", "policy", "kv_codec", "kv_codecs", "trials", "requests_per_trial"),
    *("kv_network", "kv_rtt_ms", "kv_goodput_up_mbit_per_s", "kv_goodput_down_mbit_per_s", "kv_link_reason", "kv_link"),
    *("keeps", "promise_kept", "max_kl_nats", "ratios_reason"),
    *with_endings(*TIMES),
    *("predicted_fetch_ms", "predicted_recompute_ms", "predicted_reason"),
    *("missing_bytes", "fetched_bytes", "fetched_to_missing", "bytes_reason"),
    *("fetch_requests", "recompute_requests", "fallback_requests", "requests_reason"),
    *with_endings(*CROSSINGS),
]
IN_LOCAL = "local fetches no prefix"
COMPUTES = "the mode computes every prefix"
NOT_PREDICTED = "no request found a prefix of which a prediction was made"
NOTHING_KNOWN = "nothing was computed before"
NO_RECOMPUTE = "no mode with prefix: recompute was run in this phase"
UNPAIRED = f"no two trials of one number, session and environment; {REMEASURE}"
CHOOSES = "auto takes either way; its choices are counted beside"
ALWAYS, NEVER = "fetching is quicker at every length", "fetching is slower at every length"


def table(results: Results) -> pd.DataFrame:
    """One row per model, network, prefix phase, mode and prefix length. Times are means over trials, with a t interval, of trials' medians.

    `ratio_to_recompute`: TTFT over that of the mode that computes all, whose trials over another network serve too, since they do not cross
    it: geometric mean over trials of one number. `ratio_to_better`, of `auto`: over the quicker of that mode and of the one that always
    fetches blocks in its codec. `crossing_tokens`: the length at which fetching becomes as slow as computing, or as quick, between two
    lengths where TTFT less that of the trial's requests without a prefix changes its sign, interpolated; `predicted_crossing_tokens` the
    same by the predictions of the worker's cost model. `max_kl_nats` is of the first token's distribution against local's.
    """
    rows = []
    for setting, modes in by_setting(results.prefix_steps):
        computing = _computing(results, setting)
        for mode, cell in modes.items():
            rest = _of_mode(results, setting, mode, cell)
            for length, steps in cell.groupby("prefix_tokens", sort=True):
                rows.append(setting | {"mode": mode, "prefix_tokens": int(float(str(length)))} | rest | _row(steps, modes, computing))
    return frame_of(rows, COLUMNS)


def _of_mode(results: Results, setting: Mapping[str, str], mode: str, cell: pd.DataFrame) -> dict[str, Any]:
    """The columns that are equal for all lengths of a mode."""
    first, trials = cell.iloc[0], matching(results.rows, {**setting, "mode": mode}).set_index("trial")
    computes = IN_LOCAL if first["local"] else COMPUTES if first["policy"] == "recompute" else None
    predicted = computes or (NOT_PREDICTED if cell["predicted_fetch_s"].isna().all() else None)
    link = kv_link(mode, cell.drop_duplicates("trial"))
    return {
        **{name: first[name] for name in ("policy", "kv_codec", "ratios_reason")},
        "trials": cell["trial"].nunique(),
        **(link if computes is None else dict.fromkeys(link) | {"kv_link_reason": computes}),
        **kept(trials, results.exactness, setting["model"], mode),
        **interval_columns("crossing_tokens", _crossing(cell, None, computes or (CHOOSES if first["policy"] == "auto" else None))),
        **interval_columns("predicted_crossing_tokens", _crossing(cell, "predicted_fetch_s", predicted)),
    }


def _row(steps: pd.DataFrame, modes: Mapping[str, pd.DataFrame], computing: pd.DataFrame) -> dict[str, Any]:
    first = steps.iloc[0]
    in_local, computes = (IN_LOCAL if first["local"] else None), first["policy"] == "recompute"
    reason = in_local or (COMPUTES if computes else None) or (NOTHING_KNOWN if first["prefix_tokens"] == 0 else None)
    missing, fetched = (mean_of(steps[name]) for name in ("missing_bytes", "fetched_network_bytes"))
    predicted = {way: mean_of(steps[f"predicted_{way}_s"]) for way in ("fetch", "recompute")}
    unknown = reason or (NOT_PREDICTED if predicted["fetch"] is None else None)
    found = {
        "ttft_ms": mean_interval((1e3 * _typical(steps)).tolist()),
        "stall_ms": no_interval(in_local) if in_local else mean_interval((1e3 * _typical(steps, "stall_s")).tolist()),
        "ratio_to_recompute": _ratio(steps, computing, in_local),
        "ratio_to_better": _to_better(steps, modes, computing),
    }
    ways = {"fetch": steps["recovery"].isin(("fetch_whole", "fetch_blocks")), "recompute": steps["recovery"] == "recompute"}
    counts = {f"{way}_requests": int(taken.sum()) for way, taken in ways.items()} | {
        "fallback_requests": int(steps["fallback"].notna().sum())
    }
    return {
        "prompt_tokens": int(first["tokens_in"]),
        "kv_codecs": layers_by_codec(steps["kv_codecs"]),
        "requests_per_trial": float(steps.groupby("trial").size().mean()),
        "max_kl_nats": None if steps["kl_nats"].isna().any() else float(steps["kl_nats"].max()),
        **{column: value for name, interval in found.items() for column, value in interval_columns(name, interval).items()},
        **{f"predicted_{way}_ms": None if unknown or seconds is None else 1e3 * seconds for way, seconds in predicted.items()},
        "predicted_reason": unknown,
        "missing_bytes": None if in_local or computes else missing,
        "fetched_bytes": None if in_local or computes else fetched,
        "fetched_to_missing": None if reason or not missing or fetched is None else fetched / missing,
        "bytes_reason": reason,
        **(dict.fromkeys(counts) if in_local or computes else counts),
        "requests_reason": in_local or (COMPUTES if computes else None),
    }


def _typical(steps: pd.DataFrame, column: str = "latency_s") -> pd.Series:
    """Each trial's median over its requests."""
    return steps.groupby("trial")[column].median()


def _computing(results: Results, setting: Mapping[str, str]) -> pd.DataFrame:
    """The prefills of the mode that computes every prefix: of the setting, else over the first other network."""
    all_steps = matching(results.prefix_steps, {key: setting[key] for key in ("model", "phase")})
    steps = all_steps[(all_steps["policy"] == "recompute") & ~all_steps["local"].astype(bool)]
    own = matching(steps, {"network": setting["network"]})
    chosen = own if len(own) else matching(steps, {"network": first_of(steps["network"])})
    return matching(chosen, {"mode": first_of(chosen["mode"])})


def _ratio(steps: pd.DataFrame, base: pd.DataFrame, in_local: str | None) -> Interval:
    """TTFT over that of `base`, whose prefills all do the same work: over trials of one number, session and environment."""
    if in_local or base.empty:
        return no_interval(in_local or NO_RECOMPUTE)
    keys = ["trial", "session", "fingerprint"]
    ours, theirs = (each.groupby(keys)["latency_s"].median() for each in (steps, base))
    logs = (ours / theirs).dropna().map(math.log).tolist()
    return exponentiated(mean_interval(logs)) if logs else no_interval(UNPAIRED)


def _to_better(steps: pd.DataFrame, modes: Mapping[str, pd.DataFrame], computing: pd.DataFrame) -> Interval:
    """Of `auto`: TTFT over that of the quicker of computing and of fetching blocks, by their means."""
    first = steps.iloc[0]
    if first["policy"] != "auto":
        return no_interval("the mode does not choose")
    wanted = ("fetch_blocks", first["kv_codec"])
    fetching = [cell for cell in modes.values() if (cell["policy"].iloc[0], cell["kv_codec"].iloc[0]) == wanted]
    if computing.empty or not fetching:
        return no_interval("a mode that computes and one that fetches blocks in the same codec were not both run")
    ways = (computing, matching(fetching[0], {"prefix_tokens": first["prefix_tokens"]}))
    return _ratio(steps, min(ways, key=lambda way: float(_typical(way).mean())), None)


def _crossing(cell: pd.DataFrame, column: str | None, reason: str | None) -> Interval:
    """The crossing over trials: of the measured times, or of the predictions in `column`."""
    if reason:
        return no_interval(reason)
    found = [_crossing_of(steps, column) for _, steps in cell.groupby("trial")]
    lengths = [each for each in found if isinstance(each, float)]
    if len(lengths) == len(found):
        return mean_interval(lengths)
    sides = [str(each) for each in found if not isinstance(each, float)]
    return no_interval(sides[0] if len(set(sides)) == 1 and not lengths else "trials differ: " + ", ".join(map(str, found)))


def _crossing_of(steps: pd.DataFrame, column: str | None) -> float | str:
    """The crossing of one trial, or on which side of it all lengths lie."""
    known = steps[steps["prefix_tokens"] > 0]
    if known.empty:
        return "no prefix was published"
    if column is None:
        without = steps.loc[steps["prefix_tokens"] == 0, "latency_s"]
        if without.empty:
            return "prefix_lengths has no 0 to compare with"
        slower_by = known.groupby("prefix_tokens")["latency_s"].median() - without.median()
    else:
        slower_by = (known[column] - known["predicted_recompute_s"]).groupby(known["prefix_tokens"]).median().dropna()
        if slower_by.empty:
            return NOT_PREDICTED
    x, y = slower_by.index.to_numpy("float64"), slower_by.to_numpy("float64")
    changes = np.flatnonzero(np.sign(y[1:]) != np.sign(y[:-1]))
    if not len(changes):
        return ALWAYS if (y < 0).all() else NEVER
    at = int(changes[0])
    return float(x[at] - y[at] * (x[at + 1] - x[at]) / (y[at + 1] - y[at]))


FIRST = (Column("mode", "mode"), Column("prefix_tokens", "prefix", "count"))
BY = ("model", "network", "phase")
VIEWS = (
    View(
        "Prefix, time to first token",
        (
            *FIRST,
            Column("ttft_ms", "TTFT (ms)", "digits", reason="ttft_ms_reason"),
            Column("stall_ms", "stall (ms)", "digits", reason="stall_ms_reason"),
            Column("ratio_to_recompute", "x recompute", "ratio", reason="ratio_to_recompute_reason"),
            Column("ratio_to_better", "x better way", "ratio", null="-"),
            Column("predicted_fetch_ms", "fetch, predicted (ms)", "digits", null="-"),
            Column("predicted_recompute_ms", "compute, predicted (ms)", "digits", null="-"),
        ),
        "Prefix: the first tokens of a request that another session has computed. Means over trials, with 95% t intervals, of the median "
        "over a trial's requests; ratios are geometric means over trials. Stall: time of the prefill without compute. Better way: the "
        "quicker one of computing all and of fetching blocks. Predicted: by the worker's cost model.",
        by=BY,
        notes=("kv_link",),
    ),
    View(
        "Prefix, where fetching crosses computing",
        (
            Column("mode", "mode"),
            Column("prefix_tokens", "prefix", "count"),
            Column("fetch_requests", "fetched (requests)", "count", reason="requests_reason"),
            Column("recompute_requests", "computed (requests)", "count", reason="requests_reason"),
            Column("fallback_requests", "fallbacks (requests)", "count", reason="requests_reason"),
            Column("crossing_tokens", "crossing (tokens)", "digits", reason="crossing_tokens_reason"),
            Column("predicted_crossing_tokens", "predicted (tokens)", "digits", reason="predicted_crossing_tokens_reason"),
        ),
        "Requests of all trials, by the way that their prefix came. Crossing: the length of a prefix, of equal prompts, from which on "
        "fetching is slower than computing, or quicker; one for all lengths of a mode.",
        by=BY,
    ),
    View(
        "Prefix, bytes",
        (
            *FIRST,
            Column("kv_codecs", "layers came in", reason="ratios_reason", null="-"),
            Column("missing_bytes", "missing (MB)", "digits", 1e-6, reason="bytes_reason"),
            Column("fetched_bytes", "fetched (MB)", "digits", 1e-6, reason="bytes_reason"),
            Column("fetched_to_missing", "fetched x missing", "digits", reason="bytes_reason"),
            Column("promise_kept", "kept", "yes_no"),
            Column("max_kl_nats", "max KL (nats)", "small", null="-"),
        ),
        "Per request. Layers came in: codecs of the fetched layers, means. Missing: KV bytes of the prefix, uncompressed. Fetched: frames "
        "between worker and KV host, with the question which blocks it has.",
        by=BY,
    ),
)
