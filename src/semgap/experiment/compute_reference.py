"""The reference of a phase: the results of the local policy for its prompts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from semgap.client.report import LOGITS_FILE
from semgap.experiment.trial_client import run_locally
from semgap.experiment.trial_setup import Paths


def compute_reference(raw: Mapping[str, Any], paths: Paths, output: Path) -> None:
    """Writes tokens, digests of the replies and last rows of logits for a phase's prompts, as .npz; of a load as `load.run_alone`."""
    run_locally(raw, paths, {LOGITS_FILE: output})
