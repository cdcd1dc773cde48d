"""The reference of the exactness check: the tokens that the local policy draws, and its logits over the text."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from semgap.client.report import LOGITS_FILE, TEXT_FILE
from semgap.experiment.trial_client import run_locally
from semgap.experiment.trial_setup import Paths


def compute_exactness_reference(raw: Mapping[str, Any], paths: Paths, drawn: Path, text: Path) -> None:
    """Writes each request's results when it is fed its own tokens (`drawn`) and when it is fed the text (`text`), as .npz."""
    run_locally(raw, paths, {LOGITS_FILE: drawn, TEXT_FILE: text})
