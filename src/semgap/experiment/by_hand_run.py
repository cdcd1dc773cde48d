"""A trial that is run by hand: the place of its files, its reference, the measurement."""

import json
import os
from pathlib import Path

from semgap.experiment.compute_reference import compute_reference
from semgap.experiment.config import Config, Coordinates
from semgap.experiment.measure_trial import measure_trial
from semgap.experiment.trial_schemas import TrialResult
from semgap.experiment.trial_setup import Paths, TrialError
from semgap.processes.scratch import scratch_directory

_OF_AN_EARLIER_VERSION = "reference.npz"


def require_place(output: Path) -> str | None:
    """When the trial in `output` was measured, which a new one will replace; None if there is none.

    TrialError for a directory that cannot be replaced whole: it holds other files, is a mount point or the working directory, or stands in
    one that is not writable.
    """
    place = output.resolve()
    manifest = place / "manifest.json"
    known = (manifest.name, _OF_AN_EARLIER_VERSION)
    others = sorted(file.name for file in place.iterdir() if file.suffix != ".parquet" and file.name not in known) if place.exists() else []
    place.parent.mkdir(parents=True, exist_ok=True)
    faults = {
        f"holds other files ({', '.join(others[:3])})": bool(others),
        "is the working directory": place == Path.cwd(),
        "is a mount point": place.is_mount(),
        f"lies in {place.parent}, which is not writable": not os.access(place.parent, os.W_OK),
    }
    for fault, found in faults.items():
        if found:
            raise TrialError(f"--output {output} {fault}, and a trial's directory is written whole; name a new one")
    return measured_at(output)


def measured_at(output: Path) -> str | None:
    """When the trial in `output` was measured; None if there is none."""
    manifest = output / "manifest.json"
    try:
        return str(json.loads(manifest.read_bytes())["provenance"]["utc"]) if manifest.exists() else None
    except (ValueError, KeyError, TypeError):
        return "at a time that its damaged manifest does not tell"


def run_by_hand(config: Config, at: Coordinates, paths: Paths, output: Path) -> TrialResult:
    """Measures a trial and writes its files to `output`. Prints each stage before it begins, and whether it replaces an earlier trial."""
    with scratch_directory("reference") as scratch:
        reference = Path(scratch) / "reference.npz"
        print("computing the local reference", flush=True)
        compute_reference(config.reference_cell(at.model, at.phase), paths, reference)
        print(f"measuring {at.mode}, {at.phase}", flush=True)
        result = measure_trial(config.cell(at), paths, reference)
    earlier = measured_at(output)
    if earlier:
        print(f"replacing the trial in {output}, measured {earlier}", flush=True)
    result.write(output)
    return result
