"""Everything that tables and figures show: trials, exactness, codecs."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from semgap.analysis.beside import CODECS_DIGEST
from semgap.analysis.calls import calls
from semgap.analysis.gaps import trial_gaps
from semgap.analysis.handovers import handovers
from semgap.analysis.held_out import held_out
from semgap.analysis.load import (
    CELL,
    KEYS,
    AlteredError,
    CheckedTrial,
    OtherVersionError,
    StaleTrialError,
    Trials,
    UnusableTrial,
    checked_trials,
    load_trials,
    trials_of,
)
from semgap.analysis.load_levels import load_levels
from semgap.analysis.load_price import load_held_out
from semgap.analysis.marks import Marks, marks_of
from semgap.analysis.prefix_steps import prefix_steps
from semgap.analysis.restores import restores, restores_held_out
from semgap.analysis.trial_rows import recovery_steps, trial_rows
from semgap.seal import REDO, SealError, read_sealed

RECORDED = ("cell_digest", "directory")
EXACTNESS_COLUMNS = (
    *("model", "mode", "keeps", "promise_kept", "tokens_compared", "tokens_equal", "first_difference", "edge_draws"),
    *("logits_bitwise", "max_abs_diff", "max_kl_nats", "text_logits_bitwise", "text_max_abs_diff", "text_mean_kl_nats"),
    *("text_max_kl_nats", "text_cross_entropy_nats", "text_reference_cross_entropy_nats", "text_reference_nats_by_prompt", "text_tokens"),
    "text_reason",
)


@dataclass(frozen=True)
class Results:
    """Trials, with `trial_rows`, `recovery_steps`, `calls` and `trial_gaps` of them, `load_exactness` and `load_codecs`, and marks.

    Load trials have `load_levels` and `load_marks` instead, apart from the others.
    """

    trials: Trials
    rows: pd.DataFrame
    recovery_steps: pd.DataFrame
    calls: pd.DataFrame
    gaps: pd.DataFrame
    exactness: pd.DataFrame
    codecs: pd.DataFrame
    marks: Marks
    load: pd.DataFrame
    load_marks: Marks

    @classmethod
    def of(cls, trials: Trials, exactness: pd.DataFrame, codecs: pd.DataFrame, marks: Marks) -> "Results":
        rows, made = trial_rows(trials), calls(trials)
        others, batched = ({mode: mark for mode, mark in marks.items() if bool(mark.batching) is each} for each in (False, True))
        measured = (rows[rows["phase_kind"] != "load"], recovery_steps(trials), made, trial_gaps(trials, made))
        return cls(trials, *measured, exactness, codecs, others, load_levels(trials), batched)

    @cached_property
    def prefix_steps(self) -> pd.DataFrame:
        """`prefix_steps.prefix_steps` of the trials."""
        return prefix_steps(self.trials)

    @cached_property
    def held_out(self) -> pd.DataFrame:
        """`held_out.held_out` of the calls."""
        return held_out(self.calls)

    @cached_property
    def handovers(self) -> pd.DataFrame:
        """`handovers.handovers` of the trials."""
        return handovers(self.trials)

    @cached_property
    def restores(self) -> pd.DataFrame:
        """`restores.restores` of the recovery steps."""
        return restores(self.recovery_steps)

    @cached_property
    def restores_held_out(self) -> pd.DataFrame:
        """`restores.restores_held_out` of them."""
        return restores_held_out(self.restores)

    @cached_property
    def load_held_out(self) -> pd.DataFrame:
        """`load_price.load_held_out` of the levels."""
        return load_held_out(self.load)


def load_results(expected: Mapping[str, Mapping[str, Any]]) -> Results:
    """The results that `expected` lists: under `trials`, `exactness` and `codecs`, directories or files with their digests.

    `modes` has the marks in the modes' rows.
    """
    return Results.of(
        load_trials([Path(directory) for directory in expected["trials"]], expected["trials"]),
        load_exactness([Path(file) for file in expected["exactness"]], expected["exactness"]),
        load_codecs([Path(file) for file in expected["codecs"]], expected["codecs"]),
        marks_of(expected["modes"]),
    )


def recorded_cells(results: Path) -> pd.DataFrame:
    """`KEYS`, `cell_digest` and `directory` of the trials that the last run collected in its results.csv. UnusableTrial if it has none."""
    file = results / "results.csv"
    if not file.is_file():
        fault = f"{results} has no results.csv" if results.is_dir() else f"{results} is no directory"
        raise UnusableTrial(f"{fault}; name the directory of a finished run, e.g. results/")
    try:
        cells = pd.read_csv(file, dtype=dict.fromkeys((*CELL, *RECORDED), "str"), keep_default_na=False)[[*KEYS, *RECORDED]]
    except (ValueError, KeyError) as error:
        raise UnusableTrial(f"{file} names no trials with their digests and directories ({error}); run snakemake again") from error
    if cells.empty or cells.isin([""]).any(axis=None) or cells.isna().any(axis=None):
        raise UnusableTrial(f"{file} is cut short: it has no row, or one without digest and directory; run snakemake again")
    return cells


def recorded_trials(results: Path, cells: pd.DataFrame) -> list[CheckedTrial]:
    """The trials of `recorded_cells`, in order. UnusableTrial for a missing or remeasured trial, and one of another version of semgap."""
    directories = [Path(os.path.normpath(results / directory)) for directory in cells["directory"]]
    try:
        return checked_trials(directories, dict(zip(map(str, directories), cells["cell_digest"], strict=True)))
    except StaleTrialError as error:
        raise UnusableTrial(f"{results}/results.csv and the trials are of two configurations: {error}") from error
    except OtherVersionError as error:
        raise UnusableTrial(f"{results} was written by another version of semgap: {error}") from error


def load_recorded(results: Path, cells: pd.DataFrame) -> Results:
    """The trials of `recorded_cells`, without exactness and codecs. Errors as of `recorded_trials`, or for a damaged file."""
    return Results.of(trials_of(recorded_trials(results, cells)), load_exactness([], {}), load_codecs([], {}), {})


def load_exactness(files: Sequence[Path], expected: Mapping[str, str]) -> pd.DataFrame:
    """One row for each results/exactness/model=M/mode=X.json, in the order listed, with the columns of `EXACTNESS_COLUMNS`.

    `expected` maps str(file) to the cell's digest under the current configuration and code. Raises StaleTrialError for another digest,
    AlteredError for a file that is not as it was written, UnusableTrial for a missing or damaged one.
    """
    rows = []
    for file in files:
        try:
            row = json.loads(_sealed(file))
            rows.append([row[name] for name in EXACTNESS_COLUMNS])
        except (OSError, ValueError, KeyError) as error:
            raise UnusableTrial(f"{file} cannot be read ({error!r}); {REDO}") from error
        _refuse_stale(file, row["cell_digest"], expected.get(str(file)))
    frame = pd.DataFrame(rows, columns=list(EXACTNESS_COLUMNS))
    integers = ("tokens_compared", "tokens_equal", "first_difference", "edge_draws", "text_tokens")
    numbers = [name for name in EXACTNESS_COLUMNS if name.endswith(("_nats", "_diff"))]
    return frame.astype({**dict.fromkeys(integers, "Int64"), **dict.fromkeys(numbers, "float64")})


def load_codecs(files: Sequence[Path], expected: Mapping[str, str]) -> pd.DataFrame:
    """The rows of every results/codecs/model=M.parquet. `expected` and errors as for `load_exactness`."""
    tables = []
    for file in files:
        try:
            table = pq.read_table(pa.BufferReader(_sealed(file)))
        except (pa.ArrowInvalid, OSError) as error:
            raise UnusableTrial(f"{file} cannot be read ({error}); {REDO}") from error
        _refuse_stale(file, (table.schema.metadata or {}).get(CODECS_DIGEST, b"").decode(), expected.get(str(file)))
        tables.append(table)
    return pa.concat_tables(tables).to_pandas() if tables else pd.DataFrame()


def _sealed(file: Path) -> bytes:
    try:
        return read_sealed(file)
    except SealError as error:
        raise AlteredError(str(error)) from error


def _refuse_stale(file: Path, found: str, expected: str | None) -> None:
    if found != expected:
        digests = f"it was made with cell digest {found}, the current configuration and code have {expected}"
        raise StaleTrialError(f"{file} is stale: {digests}; {REDO}")
