"""Writes results.csv."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from semgap.analysis.load import KEYS, load_trials
from semgap.analysis.trial_rows import trial_rows


def collect_trials(expected: Mapping[str, str], output: Path) -> None:
    """Writes one row per trial to `output`. `expected`: the trial directories with the digests of their manifests."""
    rows = trial_rows(load_trials([Path(directory) for directory in expected], expected))
    with_directories(rows, expected, output.parent).to_csv(output, index=False, lineterminator="\n")


def with_directories(rows: pd.DataFrame, directories: Iterable[str], results: Path) -> pd.DataFrame:
    """The rows of trials with `directory`, the path of each trial's files from `results`; another experiment's trials lie beside it."""
    by_name = {Path(directory).parts[-len(KEYS) :]: os.path.relpath(directory, results) for directory in directories}
    names = (tuple(f"{key}={value}" for key, value in zip(KEYS, values, strict=True)) for values in rows[KEYS].itertuples(index=False))
    return rows.assign(directory=[by_name[name] for name in names])
