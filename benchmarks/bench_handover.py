"""A prefill of 512 tokens on one worker that another goes on with, over 1 Gbit and 1 ms, by trials as the workflow runs them, in turns.

`python benchmarks/bench_handover.py --repeats 2` prints these lines alone; `make bench` prints them too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from bench_executor import MODEL, Promise, print_ratios

from semgap.experiment.compute_reference import compute_reference
from semgap.experiment.config import Config, Coordinates, read_config
from semgap.experiment.measure_trial import measure_trial
from semgap.experiment.trial_schemas import TrialResult
from semgap.experiment.trial_setup import Paths

ROOT = Path(__file__).resolve().parents[1]
MODES = ("handover_opaque", "handover_layers", "handover_planes")
PROMISES = {
    "layers": Promise("handover of 512 tokens adds, layers / opaque", 0.5),
    "planes": Promise("handover of 512 tokens adds, planes_zstd / opaque", 0.5),
    "codec": Promise("handover of 512 tokens adds, planes_zstd / raw layers", 1.0),
    "bytes": Promise("handover, bytes sent x codec ratio / cache", 1.01),
}


def main() -> None:
    """Prints the lines, and what each mode added in each repeat."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    print_ratios(handover_ratios(parser.parse_args().repeats), PROMISES)


def handover_ratios(repeats: int) -> dict[str, list[float]]:
    """A ratio for each of PROMISES and repeat. Takes the machine's lock for each trial."""
    config, place = _config(), Paths(MODEL, ROOT)
    found: dict[str, list[float]] = {name: [] for name in PROMISES}
    with tempfile.TemporaryDirectory() as scratch:
        reference = Path(scratch) / "reference.npz"
        compute_reference(config.reference_cell(config["models"][0], "handover"), place, reference)
        for repeat in range(1, repeats + 1):
            order = MODES if repeat % 2 else MODES[::-1]
            trials = {mode: _trial(config, mode, repeat, place, reference) for mode in order}
            added = {mode: _added_s(trial) for mode, trial in trials.items()}
            spent = ", ".join(f"{mode} {1e3 * seconds:.1f} ms" for mode, seconds in added.items())
            print(f"handover: repeat {repeat}, adds: {spent}", file=sys.stderr, flush=True)
            found["layers"].append(added["handover_layers"] / added["handover_opaque"])
            found["planes"].append(added["handover_planes"] / added["handover_opaque"])
            found["codec"].append(added["handover_planes"] / added["handover_layers"])
            found["bytes"].append(max(map(_bytes, trials.values())))
    return found


def _config() -> Config:
    """That of config/kv.yaml, with more requests a trial."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write("define: {phases: {handover: {requests: 6}}}")
        file.flush()
        return read_config([ROOT / "config/kv.yaml", Path(file.name)], ROOT)


def _trial(config: Config, mode: str, repeat: int, place: Paths, reference: Path) -> TrialResult:
    cell = config.cell(Coordinates(config["models"][0], "kv_1gbit_1ms", mode, "handover", repeat))
    return measure_trial(cell, place, reference)


def _added_s(result: TrialResult) -> float:
    """The client's wait between the first two tokens, without the step's compute: of requests that moved, less of those that stayed."""
    steps = [row for row in result.tables["steps"].to_pylist() if row["measured"] and row["step"] == 1]
    waited = {moves: [_waited_s(row) for row in steps if row["moves"] is moves] for moves in (True, False)}
    return float(np.median(waited[True]) - np.median(waited[False]))


def _waited_s(step: dict[str, Any]) -> float:
    waited: float = step["latency_s"] - (step["worker_compute_s"] - step["stall_s"])
    return waited


def _bytes(result: TrialResult) -> float:
    """Frame bytes over payload bytes of the blocks that were sent: what framing adds to tensors / ratio."""
    rows = [row for row in result.tables["steps"].to_pylist() if row["handed"] and not row["warmup"]]
    return sum(row["sent_network_bytes"] for row in rows) / sum(row["saved_payload_bytes"] for row in rows)


if __name__ == "__main__":
    main()
