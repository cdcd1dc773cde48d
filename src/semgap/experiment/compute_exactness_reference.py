"""What `local` gives for the exactness check: drawn tokens, and logits over the text."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from semgap.experiment.trial_processes import run_client
from semgap.experiment.trial_setup import Paths, check_model, client_spec
from semgap.policy import Policy
from semgap.processes.lifetime import end_with_workflow
from semgap.processes.machine import measuring


def compute_exactness_reference(cell: Mapping[str, Any], place: Paths, drawn: Path, text: Path) -> None:
    """What local gives when it goes on from its own tokens (`drawn`), and when it is fed the text (`text`), each as .npz."""
    end_with_workflow()
    with measuring(), tempfile.TemporaryDirectory(prefix="semgap-reference-") as scratch:
        check_model(place.model_directory, cell)
        spec = msgspec.structs.replace(client_spec(cell, Policy(placement="local"), place, Path(scratch)), text_pass=True)
        run_client(spec, cell, Path(scratch))
        for name, output in (("logits.npz", drawn), ("text.npz", text)):
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_bytes((Path(scratch) / name).read_bytes())
