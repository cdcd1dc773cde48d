"""Many requests at once, by trials as the workflow runs them: ratios of two modes of config.yaml, whose trials alternate.

`python benchmarks/bench_load.py --repeats 2` prints these lines alone; `make bench` prints them too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from bench_executor import MODEL, Promise, print_ratios

from semgap.experiment.compute_reference import compute_reference
from semgap.experiment.config import Config, Coordinates, read_config
from semgap.experiment.measure_trial import measure_trial
from semgap.experiment.trial_schemas import TrialResult
from semgap.experiment.trial_setup import Paths

ROOT = Path(__file__).resolve().parents[1]
_LONG = [{"prompt_length": 64, "weight": 3}, {"prompt_length": 448, "steps": 3}]
PHASES: dict[str, dict[str, Any]] = {
    "bench-many": {"prompt_lengths": [8], "steps": 7, "requests": 12, "concurrency": [1, 4, 16]},
    "bench-long": {"classes": _LONG, "steps": 15, "requests": 20, "concurrency": [8]},
    "bench-prefix": {"prompt_lengths": [288], "shared_prefix": 256, "steps": 3, "requests": 16, "concurrency": [16]},
    "bench-far": {"prompt_lengths": [8], "steps": 15, "requests": 16, "concurrency": [16], "networks": ["bench-50ms"]},
}
FAR = {"kind": "relay", "rtt_ms": 50, "tolerance": {"lateness_ms": 20, "rtt_ms": 10}}


@dataclass(frozen=True)
class _Pair:
    """Two modes in a phase, and the number that each of their trials gives. `against` None: the number of the first one alone."""

    phase: str
    mode: str
    against: str | None
    number: Callable[[TrialResult], float]


def _rate(result: TrialResult, level: int) -> float:
    own = result.manifest["load"]["levels"][level]
    return own["tokens"] / (own["end_s"] - own["start_s"])


def _gap_p99_s(result: TrialResult) -> float:
    return float(np.percentile([row["gap_s"] for row in result.tables["load"].to_pylist() if row["measured"] and row["gap_s"]], 99))


def _ttft_s(result: TrialResult) -> float:
    return float(np.median([row["ttft_s"] for row in result.tables["requests"].to_pylist() if row["measured"]]))


def _overhead(result: TrialResult) -> float:
    """Scheduling and replying over the whole step, of the last level, in which 16 requests are alive."""
    steps = [row for row in result.tables["batches"].to_pylist() if row["level"] == 2]
    spent = sum(row["schedule_s"] + row["reply_s"] for row in steps)
    return spent / (spent + sum(row["compute_s"] for row in steps))


def _client_mb(result: TrialResult) -> float:
    mb: float = result.manifest["memory"]["client_peak_rss_anon_bytes"] / 1e6
    return mb


PAIRS = {
    "at 16": _Pair("bench-many", "loop", "serial", lambda result: _rate(result, 2)),
    "at 4": _Pair("bench-many", "loop", "serial", lambda result: _rate(result, 1)),
    "overhead": _Pair("bench-many", "loop", None, _overhead),
    "clients": _Pair("bench-many", "loop", None, _client_mb),
    "chunks": _Pair("bench-long", "phase", "position", _gap_p99_s),
    "shared": _Pair("bench-prefix", "prefix", "phase", _ttft_s),
    "far": _Pair("bench-far", "loop", "prefix", lambda result: _rate(result, 0)),
}
PROMISES = {
    "at 16": Promise("throughput of 16 requests, loop / serial", 3.5, at_least=True),
    "at 4": Promise("throughput of 4 requests, loop / serial", 2.2, at_least=True),
    "overhead": Promise("scheduling and replying / step, 16 requests", 0.03),
    "clients": Promise("16 thin clients, peak anonymous memory (MB)", 400),
    "chunks": Promise("p99 ITL beside long prefills, in chunks / whole", 1 / 3),
    "shared": Promise("TTFT of 16 with a shared prefix, kept / computed", 1 / 3),
    "far": Promise("throughput of 16 over 50 ms, loop / prefix", 1.4, at_least=True),
}


def main() -> None:
    """Prints the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(PAIRS), choices=list(PAIRS))
    options = parser.parse_args()
    print_ratios(load_ratios(options.repeats, options.only), PROMISES)


def load_ratios(repeats: int, only: Sequence[str] = tuple(PAIRS)) -> dict[str, list[float]]:
    """A ratio, or a number, for each of PROMISES and repeat. Takes the machine's lock for each trial."""
    config = _config()
    chosen = {name: PAIRS[name] for name in only}
    found: dict[str, list[float]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(1, repeats + 1):
            trials = dict(_trials(config, chosen.values(), repeat, Path(scratch)))
            for name, pair in chosen.items():
                base = pair.number(trials[pair.phase, pair.against]) if pair.against else 1.0
                found[name].append(pair.number(trials[pair.phase, pair.mode]) / base)
    return found


def _trials(config: Config, pairs: Any, repeat: int, scratch: Path) -> Iterator[tuple[tuple[str, str], TrialResult]]:
    """One trial of each phase and mode of `pairs`, the modes of a phase in turns."""
    place = Paths(MODEL, ROOT)
    for phase, mode in dict.fromkeys((pair.phase, mode) for pair in pairs for mode in (pair.against, pair.mode) if mode):
        print(f"loads: repeat {repeat}, {phase}, {mode}", file=sys.stderr, flush=True)
        network, reference = PHASES[phase].get("networks", ["loopback"])[0], scratch / f"{phase}.npz"
        at = Coordinates(config["models"][0], network, mode, phase, repeat)
        if not reference.exists():
            compute_reference(config.reference_cell(at.model, phase), place, reference)
        yield (phase, mode), measure_trial(config.cell(at), place, reference)


def _config() -> Config:
    """The default config with these phases and the far network."""
    phases = {name: {"kind": "load", "networks": ["loopback"], **phase} for name, phase in PHASES.items()}
    modes = {
        pair_mode: {"networks": None, "phases": None} for pair in PAIRS.values() for pair_mode in (pair.mode, pair.against) if pair_mode
    }
    over = {
        "modes": list(modes),
        "phases": list(phases),
        "networks": ["loopback", "bench-50ms"],
        "max_length": 512,
        "define": {"phases": phases, "modes": modes, "networks": {"bench-50ms": FAR}},
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(yaml.safe_dump(over))
        file.flush()
        return read_config([Path(file.name)], ROOT)


if __name__ == "__main__":
    main()
