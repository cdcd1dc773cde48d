"""Writes results.csv."""

from collections.abc import Mapping
from pathlib import Path

from semgap.analysis.load import load_trials
from semgap.analysis.trial_rows import trial_rows


def collect_trials(expected: Mapping[str, str], output: Path) -> None:
    """Writes one row per trial to `output`. `expected`: the trial directories with the digests of their manifests."""
    rows = trial_rows(load_trials([Path(directory) for directory in expected], expected))
    rows.to_csv(output, index=False, lineterminator="\n")
