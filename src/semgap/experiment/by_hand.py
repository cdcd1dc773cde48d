"""The summary of a trial that was run by hand: one JSON object for programs, one screen for people."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from semgap.experiment.by_hand_load import load_screen, load_summary
from semgap.experiment.trial_schemas import TrialResult
from semgap.phases import KINDS

NO_CLOCK = "the step's compute was not measured"
NO_GAP = "a phase that moves KV blocks has no gap: its latency holds the wait for them"
EXACTNESS = ("keeps", "promise_kept", "tokens_compared", "tokens_equal", "edge_draws", "logits_bitwise", "max_abs_diff", "max_kl_nats")


def summary_of(result: TrialResult, directory: Path) -> dict[str, Any]:
    """The trial's coordinates, and means over its measured steps; `directory` holds its files. A value that was not measured is None.

    `latency_ms` is per token, ITL or TTFT by `metric`. `gap_ms` = `latency_ms` - `compute_ms`; `codec_ms` is a part of it. Bytes per token
    are TCP payload.
    """
    manifest, cell = result.manifest, result.manifest["cell"]
    if manifest["load"]:
        return load_summary(result, directory)
    steps = [step for step in result.tables["steps"].to_pylist() if step["measured"]]
    first = [each["ttft_s"] for each in result.tables["requests"].to_pylist() if not each["warmup"]]
    return {
        **{key: cell[key] for key in ("model", "network", "mode", "phase", "trial")},
        "metric": "TTFT" if KINDS[cell["phase_spec"]["kind"]].measures == "prefill" else "ITL",
        "steps": len(steps),
        **_times(steps, cell["phase_spec"]["kind"]),
        "ttft_median_ms": 1e3 * median(first),
        **{f"{way}_bytes_per_token": sum(step[f"{way}_frame_bytes"] for step in steps) / len(steps) for way in ("up", "down")},
        "round_trips_per_token": sum(step["round_trips"] for step in steps) / len(steps),
        "exactness": {name: manifest["exactness"][name] for name in EXACTNESS},
        "recovery": _recovery(steps),
        "fallbacks": manifest["kv"]["fallbacks"],
        "apart": manifest["apart"],
        "files": [str(directory / name) for name in sorted([*(f"{table}.parquet" for table in result.tables), "manifest.json"])],
    }


def screen(summary: Mapping[str, Any]) -> str:
    """The summary as a few lines."""
    if "levels" in summary:
        return load_screen(summary)
    coordinates = f"{summary['mode']}, {summary['phase']}: {summary['model']} over {summary['network']}, {summary['steps']} measured steps"
    up, down = summary["up_bytes_per_token"], summary["down_bytes_per_token"]
    lines = [
        coordinates,
        f"latency   {_latency(summary)}",
        f"traffic   {up + down:,.0f} bytes per token (TCP payload: {up:,.0f} up, {down:,.0f} down)",
        f"exactness {_exactness(summary['exactness'])}",
    ]
    recovery, fallbacks = summary["recovery"], summary["fallbacks"]
    if recovery:
        lines.append(f"recovery  {recovery['steps']} steps missed KV blocks, {recovery['bytes']:,.0f} bytes brought back in each, mean")
    if fallbacks:
        lines.append(f"fallbacks {len(fallbacks)}: KV blocks that could not be saved or restored, the first: {fallbacks[0]}")
    if summary["apart"]:
        lines.append(f"apart     tables would leave this trial out: {summary['apart']}")
    return "\n".join([*lines, f"files     {Path(summary['files'][0]).parent}"])


def _times(steps: Sequence[Mapping[str, Any]], kind: str) -> dict[str, Any]:
    latency_ms, worker_ms = _mean_ms(steps, "latency_s"), _mean_ms(steps, "worker_compute_s")
    compute_ms = None if worker_ms is None else worker_ms + (_mean_ms(steps, "client_compute_s") or 0)
    reason = NO_GAP if KINDS[kind].moves_kv else NO_CLOCK if compute_ms is None else None
    return {
        "latency_ms": latency_ms,
        "compute_ms": compute_ms,
        "codec_ms": _mean_ms(steps, "client_codec_s", "worker_codec_s"),
        "gap_ms": None if reason or latency_ms is None or compute_ms is None else latency_ms - compute_ms,
        "gap_reason": reason,
    }


def _mean_ms(steps: Sequence[Mapping[str, Any]], *columns: str) -> float | None:
    """The mean over steps of the sum of these columns, or None if a value is null."""
    values = [step[name] for step in steps for name in columns]
    return None if None in values else 1e3 * sum(values) / len(steps)


def _recovery(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The steps that missed KV blocks, and the mean of the bytes that came back; None if none did."""
    missed = [step for step in steps if step["missing_bytes"]]
    back = [step["fetched_network_bytes"] + step["copied_bytes"] for step in missed]
    return {"steps": len(missed), "bytes": sum(back) / len(back)} if missed else None


def _latency(summary: Mapping[str, Any]) -> str:
    latency = f"{summary['metric']} {summary['latency_ms']:.2f} ms"
    if summary["gap_ms"] is None:
        return f"{latency} ({summary['gap_reason']})"
    codec = f", {summary['codec_ms']:.2f} of it codecs" if summary["codec_ms"] else ""
    return f"{latency} = {summary['compute_ms']:.2f} ms compute + {summary['gap_ms']:.2f} ms gap{codec}"


def _exactness(found: Mapping[str, Any]) -> str:
    logits = "logits bitwise equal" if found["logits_bitwise"] else "the client saw no logits"
    if found["max_abs_diff"]:
        logits = f"logits differ by up to {found['max_abs_diff']:.3g}"
    kept = "kept" if found["promise_kept"] else "not kept"
    return f"{found['tokens_equal']} of {found['tokens_compared']} tokens equal, {logits}; keeps: {found['keeps']}, {kept}"
