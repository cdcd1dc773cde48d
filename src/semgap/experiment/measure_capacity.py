"""The capacity of a mode in a load phase: the most requests per second that it serves, of which the phase's arrivals are shares."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from semgap.experiment.measure_trial import measure_trial
from semgap.experiment.staleness import content_digest
from semgap.experiment.trial_setup import Paths
from semgap.seal import write_sealed_json


def measure_capacity(raw: Mapping[str, Any], paths: Paths, reference: Path, output: Path) -> None:
    """Writes the requests per second that the cell's mode ends in a closed loop, whose live requests keep it busy. As `measure_trial`."""
    (level,) = measure_trial(raw, paths, reference).manifest["load"]["levels"]
    per_s = level["requests"] / (level["end_s"] - level["start_s"])
    write_sealed_json(output, {"mode": raw["mode"], "per_s": per_s, "cell_digest": content_digest(raw)})
