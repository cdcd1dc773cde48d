"""Table gap: where a token's time goes, and what the distance costs."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from semgap.analysis.aggregate import SETTING, alike, by_setting, first_of, local_trials, matching, mean_of, ratio_to_local
from semgap.analysis.columns import frame_of, interval_columns, mean_columns, ratio_columns, with_endings
from semgap.analysis.gaps import PARTS, compute_ratio
from semgap.analysis.power import EFFECTS, power_rows
from semgap.analysis.results import Results
from semgap.analysis.stats import Interval, geometric_mean_interval, no_interval
from semgap.analysis.tables.render import Column, View

COLUMNS = [
    *(
        *SETTING,
        "mode",
        "latency_metric",
        "trials",
        "calls_per_trial",
        *with_endings("latency_ms", "compute_ms", "gap_ms", "gap_median_ms"),
    ),
    *(*(f"{part}_ms" for part in PARTS), "gap_reason", "parts_reason", *with_endings("own_ratio", "control_ratio", "compute_to_control")),
    *("control_windows", *with_endings("ratio_to_local"), "ratio_to_local_pairs"),
    *(*with_endings("compute_to_local"), "compute_to_local_pairs", "compute_verdict", "compute_note", *EFFECTS, "power"),
    *("floor_ms", *with_endings("compute_to_floor")),
]
HEAD_NOTE = "its worker computes the logits of all rows of the prompt, local those of the last row alone"


def table(results: Results) -> pd.DataFrame:
    """One row per model, network, prefill or decode phase, and mode; milliseconds per token, means over trials (`gaps.trial_gaps`).

    `gap_ms` is latency less compute; `own_ratio` latency over compute of the same steps; `control_ratio` latency over the control's
    undisturbed compute; `ratio_to_local` pairs trials. `compute_to_local` pairs too, and `compute_verdict` flags compute that differs.
    """
    power = {tuple(row[key] for key in SETTING): row for row in power_rows(results)}
    rows = []
    for setting, modes in by_setting(alike(results.rows)):
        smallest = {name: power[tuple(setting.values())][name] for name in (*EFFECTS, "power")}
        rows += [_row(results, setting, mode, modes) | smallest for mode in modes]
    return frame_of(rows, COLUMNS)


def _row(results: Results, setting: Mapping[str, str], mode: str, modes: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    trials, gaps = modes[mode], matching(results.gaps, {**setting, "mode": mode})
    prefill, is_local = (trials[name].iloc[0] == value for name, value in (("phase_kind", "prefill"), ("placement", "local")))
    means = {name: 1e3 * gaps[f"{name}_s"].astype("float64") for name in ("latency", "compute", "gap", "gap_median")}
    all_rows = prefill and not is_local and trials["reply_kind"].iloc[0] == "logits_all"
    return {
        **setting,
        "mode": mode,
        "latency_metric": "TTFT" if prefill else "ITL",
        "trials": len(gaps),
        "calls_per_trial": mean_of(gaps["calls"]),
        **{column: value for name, values in means.items() for column, value in mean_columns(f"{name}_ms", values).items()},
        **{f"{part}_ms": mean_of(1e3 * gaps[f"{part}_s"].astype("float64")) for part in PARTS},
        "gap_reason": first_of(gaps["gap_reason"]),
        "parts_reason": _parts_reason(gaps, is_local),
        **interval_columns("own_ratio", _over_trials(gaps["own_ratio"], first_of(gaps["gap_reason"]))),
        **interval_columns("control_ratio", _over_trials(gaps["control_ratio"], first_of(gaps["control_reason"]))),
        **interval_columns("compute_to_control", _over_trials(gaps["compute_to_control"], first_of(gaps["control_reason"]))),
        "floor_ms": mean_of(1e3 * gaps["floor_s"].astype("float64")),
        **interval_columns("compute_to_floor", _over_trials(gaps["compute_to_floor"], first_of(gaps["floor_reason"]))),
        "control_windows": mean_of(gaps["control_windows"]),
        **ratio_columns("ratio_to_local", ratio_to_local(results.rows, setting, trials)),
        **_compute_check(results, setting, trials, is_local),
        "compute_note": HEAD_NOTE if all_rows else None,
    }


def _parts_reason(gaps: pd.DataFrame, local: bool) -> str | None:
    if gaps["link_s"].notna().all():
        return None
    return "local: nothing is encoded and nothing crosses; the gap is the client's own loop" if local else "codec times were not measured"


def _over_trials(ratios: pd.Series, reason: str | None) -> Interval:
    """The geometric mean over trials; null with the reason if a trial has none."""
    return no_interval(reason) if ratios.isna().any() else geometric_mean_interval(ratios.astype("float64").tolist())


def _compute_check(results: Results, setting: Mapping[str, str], trials: pd.DataFrame, is_local: bool) -> dict[str, Any]:
    """Compute over local's of paired trials, and whether it differs."""
    local = local_trials(results.rows, setting)
    if is_local or local.empty:
        return ratio_columns("compute_to_local", no_interval("local itself" if is_local else "no local mode was run"))
    ratio, verdict = compute_ratio(results.gaps, trials, local), None
    if ratio.low is not None and ratio.high is not None:
        verdict = "slower" if ratio.low > 1 else "faster" if ratio.high < 1 else "no difference found"
    return ratio_columns("compute_to_local", ratio) | {"compute_verdict": verdict}


NOTE = (
    "Milliseconds per token over all measured calls; means over trials, 95% t intervals. Gap: latency less compute (worker and client). "
    "Median call: the gap of a trial's median call."
)
PARTS_NOTE = (
    "Milliseconds per token, means over trials. Codec: encoding and decoding. Link: the rest (framing, wire, waiting). The parts add up to "
    "the latency."
)
RATIO_NOTE = (
    "x own compute: latency over compute of the same steps. x control: latency over undisturbed steps of the same positions in the same "
    "trial. x local: paired trials, which also hold what the machine did between trials. 95% intervals, each of its row by itself, not "
    "adjusted for their number."
)
COMPUTE_NOTE = (
    "x local: paired; a mode whose compute differs from local's is flagged, and then its ratio to local is no cost of the distance alone. "
    "x control: over undisturbed steps of the same positions. Floor: reading a step's weights once on the worker's cores, as each trial "
    "measured it; x floor: the worker's compute over that. 95% intervals, not adjusted."
)
BY = ("model", "network", "phase", "latency_metric")
VIEWS = (
    View(
        "Gap",
        (
            Column("mode", "mode"),
            Column("trials", "trials", "count"),
            Column("latency_ms", "latency (ms)", "digits"),
            Column("compute_ms", "compute (ms)", "digits", reason="gap_reason"),
            Column("gap_ms", "gap (ms)", "digits", reason="gap_ms_reason"),
            Column("gap_median_ms", "median call (ms)", "digits", null="-"),
        ),
        NOTE,
        by=BY,
        notes=("power",),
    ),
    View(
        "Gap, parts of a token's time",
        (
            Column("mode", "mode"),
            Column("latency_ms", "latency (ms)", "digits"),
            Column("worker_compute_ms", "worker compute (ms)", "digits", null="-"),
            Column("client_compute_ms", "client compute (ms)", "digits", null="-"),
            Column("client_codec_ms", "client codec (ms)", "digits", reason="parts_reason", null="-"),
            Column("worker_codec_ms", "worker codec (ms)", "digits", null="-"),
            Column("link_ms", "link (ms)", "digits", null="-"),
        ),
        PARTS_NOTE,
        by=BY,
    ),
    View(
        "Gap, ratios",
        (
            Column("mode", "mode"),
            Column("own_ratio", "x own compute", "ratio", reason="own_ratio_reason"),
            Column("control_ratio", "x control", "ratio", reason="control_ratio_reason"),
            Column("ratio_to_local", "x local", "ratio", reason="ratio_to_local_reason"),
        ),
        RATIO_NOTE,
        by=BY,
        notes=("power",),
    ),
    View(
        "Gap, compute",
        (
            Column("mode", "mode"),
            Column("compute_to_local", "x local", "ratio", reason="compute_note", null="-"),
            Column("compute_verdict", "against local", null="-"),
            Column("compute_to_control", "x control", "ratio", null="-"),
            Column("floor_ms", "floor (ms)", "digits", reason="compute_to_floor_reason"),
            Column("compute_to_floor", "x floor", "ratio", null="-"),
        ),
        COMPUTE_NOTE,
        by=BY,
    ),
)
