"""The reference of a phase: what `local` gives for its prompts."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from semgap.experiment.trial_processes import run_client
from semgap.experiment.trial_setup import Paths, check_model, client_spec
from semgap.policy import Policy
from semgap.processes.lifetime import end_with_workflow
from semgap.processes.machine import measuring


def compute_reference(cell: Mapping[str, Any], place: Paths, output: Path) -> None:
    """Writes what local gives for a phase's prompts: tokens, digests of its replies and last rows of logits, as .npz."""
    end_with_workflow()
    with measuring(), tempfile.TemporaryDirectory(prefix="semgap-reference-") as scratch:
        check_model(place.model_directory, cell)
        spec = client_spec(cell, Policy(placement="local"), place, Path(scratch))
        run_client(spec, cell, Path(scratch))
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes((Path(scratch) / "logits.npz").read_bytes())
