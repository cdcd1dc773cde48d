"""Everything that tables are made of: trials, exactness, codecs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from semgap.analysis.load import CELL, KEYS, StaleTrialError, Trials, UnusableTrial, load_trials
from semgap.analysis.trial_rows import asks, recovery_steps, trial_rows

REDO = "delete it and run snakemake again"


CODECS_DIGEST = b"semgap.cell_digest"  # of the Parquet schema's metadata


EXACTNESS_COLUMNS = (
    *("model", "mode", "keeps", "promise_kept", "tokens_compared", "tokens_equal", "first_difference", "edge_draws"),
    *("logits_bitwise", "max_abs_diff", "max_kl_nats", "text_logits_bitwise", "text_max_abs_diff", "text_mean_kl_nats"),
    *("text_max_kl_nats", "text_cross_entropy_nats", "text_reference_cross_entropy_nats", "text_reason"),
)


@dataclass(frozen=True)
class Results:
    """What tables are made of: `trial_rows`, `load_exactness`, `load_codecs`, `recovery_steps` and `asks`."""

    rows: pd.DataFrame
    exactness: pd.DataFrame
    codecs: pd.DataFrame
    recovery_steps: pd.DataFrame
    asks: pd.DataFrame


def load_results(expected: Mapping[str, Mapping[str, str]]) -> tuple[Trials, Results]:
    """Everything that `expected` names: under `trials`, `exactness` and `codecs`, the files or directories with their digests."""
    trials = load_trials([Path(directory) for directory in expected["trials"]], expected["trials"])
    exactness = load_exactness([Path(file) for file in expected["exactness"]], expected["exactness"])
    codecs = load_codecs([Path(file) for file in expected["codecs"]], expected["codecs"])
    return trials, Results(trial_rows(trials), exactness, codecs, recovery_steps(trials), asks(trials))


def recorded_cells(results: Path) -> pd.DataFrame:
    """The trials that the last run collected, out of its results.csv: `KEYS` and `cell_digest`. UnusableTrial where there are none."""
    file = results / "results.csv"
    if not file.is_file():
        raise UnusableTrial(
            f"{results} has no results.csv, so it holds no results; name the directory that a finished run left, e.g. results/"
        )
    try:
        return pd.read_csv(file, dtype=dict.fromkeys((*CELL, "cell_digest"), "str"))[[*KEYS, "cell_digest"]]
    except (ValueError, KeyError) as error:
        raise UnusableTrial(f"{file} names no trials with their digests ({error}); run snakemake again") from error


def load_recorded(results: Path, cells: pd.DataFrame) -> Results:
    """The trials that `recorded_cells` named. UnusableTrial for one that is missing, or that was measured again since."""
    places = [results.joinpath("trials", *(f"{key}={cell[key]}" for key in KEYS)) for _, cell in cells.iterrows()]
    try:
        trials = load_trials(places, dict(zip(map(str, places), cells["cell_digest"], strict=True)))
    except StaleTrialError as error:
        raise UnusableTrial(f"{results}/results.csv and the trials are of two configurations: {error}") from error
    return Results(trial_rows(trials), load_exactness([], {}), load_codecs([], {}), recovery_steps(trials), asks(trials))


def load_exactness(files: Sequence[Path], expected: Mapping[str, str]) -> pd.DataFrame:
    """One row for each results/exactness/model=M/mode=X.json, in the order listed, with the columns of `EXACTNESS_COLUMNS`.

    `expected` maps str(file) to the digest of its cell in the current configuration. Raises StaleTrialError for another digest,
    UnusableTrial for a missing or damaged file.
    """
    rows = []
    for file in files:
        try:
            row = json.loads(file.read_text(encoding="utf-8"))
            rows.append([row[name] for name in EXACTNESS_COLUMNS])
        except (OSError, ValueError, KeyError) as error:
            raise UnusableTrial(f"{file} cannot be read ({error!r}); {REDO}") from error
        _refuse_stale(file, row["cell_digest"], expected.get(str(file)))
    frame = pd.DataFrame(rows, columns=list(EXACTNESS_COLUMNS))
    integers = ("tokens_compared", "tokens_equal", "first_difference", "edge_draws")
    numbers = [name for name in EXACTNESS_COLUMNS if name.endswith(("_nats", "_diff"))]
    return frame.astype({**dict.fromkeys(integers, "Int64"), **dict.fromkeys(numbers, "float64")})


def load_codecs(files: Sequence[Path], expected: Mapping[str, str]) -> pd.DataFrame:
    """The rows of every results/codecs/model=M.parquet. `expected` and errors as for `load_exactness`."""
    tables = []
    for file in files:
        try:
            table = pq.read_table(file, partitioning=None)
        except (pa.ArrowInvalid, OSError) as error:
            raise UnusableTrial(f"{file} cannot be read ({error}); {REDO}") from error
        _refuse_stale(file, (table.schema.metadata or {}).get(CODECS_DIGEST, b"").decode(), expected.get(str(file)))
        tables.append(table)
    return pa.concat_tables(tables).to_pandas() if tables else pd.DataFrame()


def _refuse_stale(file: Path, found: str, expected: str | None) -> None:
    if found != expected:
        raise StaleTrialError(
            f"{file} is stale: it was made with cell digest {found}, the current configuration and code have {expected}; " + REDO
        )
