"""The summary of a load that was run by hand."""

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from semgap.experiment.trial_schemas import TrialResult

_EXACTNESS = ("keeps", "promise_kept", "tokens_compared", "tokens_equal", "edge_draws")


def load_summary(result: TrialResult, directory: Path) -> dict[str, Any]:
    """The trial's coordinates, and for each level throughput and medians over its measured window."""
    manifest, cell = result.manifest, result.manifest["cell"]
    requests, tokens = (result.tables[name].to_pylist() for name in ("requests", "load"))
    return {
        **{key: cell[key] for key in ("model", "network", "mode", "phase", "trial")},
        "levels": [_level(level, requests, tokens) for level in manifest["load"]["levels"]],
        "exactness": {name: manifest["exactness"][name] for name in _EXACTNESS},
        "apart": manifest["apart"],
        "files": [str(directory / name) for name in sorted([*(f"{table}.parquet" for table in result.tables), "manifest.json"])],
    }


def load_screen(summary: Mapping[str, Any]) -> str:
    """The summary as a few lines."""
    found = summary["exactness"]
    lines = [f"{summary['mode']}, {summary['phase']}: {summary['model']} over {summary['network']}"]
    for level in summary["levels"]:
        load = f"N = {level['concurrency']}" if level["concurrency"] else f"{level['rate_per_s']:.3g}/s"
        gap = "none" if level["itl_median_ms"] is None else f"{level['itl_median_ms']:.1f} ms"
        lines.append(f"{load:<9} {level['tokens_per_s']:.1f} tokens/s, TTFT {level['ttft_median_ms']:.0f} ms, ITL {gap} (medians)")
    equal = f"{found['tokens_equal']} of {found['tokens_compared']} tokens equal"
    lines.append(f"exactness {equal}, and {found['edge_draws']} within the margin")
    if summary["apart"]:
        lines.append(f"apart     tables would leave this trial out: {summary['apart']}")
    return "\n".join([*lines, f"files     {Path(summary['files'][0]).parent}"])


def _level(level: Mapping[str, Any], requests: list[dict[str, Any]], tokens: list[dict[str, Any]]) -> dict[str, Any]:
    number = level["level"]
    first = [row["ttft_s"] for row in requests if row["level"] == number and row["measured"]]
    gaps = [row["gap_s"] for row in tokens if row["level"] == number and row["measured"] and row["gap_s"] is not None]
    return {
        **{name: level[name] for name in ("concurrency", "rate_per_s", "share", "requests", "tokens")},
        "tokens_per_s": level["tokens"] / (level["end_s"] - level["start_s"]),
        "ttft_median_ms": 1e3 * median(first),
        "itl_median_ms": 1e3 * median(gaps) if gaps else None,
        "bytes_per_token": (level["up_frame_bytes"] + level["down_frame_bytes"]) / level["tokens"] if level["tokens"] else None,
    }
