"""A finished run as typed pandas frames, for notebooks and scripts: `semgap.results.load("results")`."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

REDO = "run snakemake again"
TEXT = ("model", "network", "mode", "phase", "session", "fingerprint", "cell_digest", "directory")
"""Columns of results.csv that are text even if they look like numbers."""


@dataclass(frozen=True)
class Run:
    """The trials that the run's results.csv lists, and the run's tables. results/README.md explains every column and key.

    Each frame begins with the coordinates `model`, `network`, `mode`, `phase` and `trial`, so that frames join on them; those of `tables`
    have the columns of their files. Text is `string`, integers `Int64`, booleans `boolean`, floats `float64`; null if not measured. A
    column of `trials` that is null in every trial is `float64`, or `string` if its name ends in `reason`.
    """

    trials: pd.DataFrame
    """One row per trial: results.csv."""
    requests: pd.DataFrame
    steps: pd.DataFrame
    control: pd.DataFrame
    load: pd.DataFrame
    batches: pd.DataFrame
    ledger: pd.DataFrame
    tcp: pd.DataFrame
    relay: pd.DataFrame
    host: pd.DataFrame
    gpu: pd.DataFrame
    dmon: pd.DataFrame
    manifests: tuple[dict[str, Any], ...]
    """manifest.json of each trial, in the order of `trials`; its `cell` has the coordinates."""
    tables: dict[str, pd.DataFrame]
    """tables/*.parquet by name, unrounded."""


def load(results: str | PathLike[str]) -> Run:
    """The finished run in the directory `results`: `results`, or `results/NAME` of a named experiment.

    Reads the trials that its results.csv lists, and no older ones beside them. Raises `semgap.analysis.load.UnusableTrial`, which names
    the fault and the way out, for a directory without a finished run, a missing or damaged file, trials of another configuration than
    results.csv's, trials that another version of semgap wrote, and trials that are not as they were measured.
    """
    from semgap.analysis.load import TRIAL_TABLES, table_of
    from semgap.analysis.results import recorded_cells, recorded_trials
    from semgap.analysis.tables import make_tables

    directory = Path(results)
    trials = recorded_trials(directory, recorded_cells(directory))
    return Run(
        trials=_rows(directory / "results.csv"),
        manifests=tuple(trial.manifest for trial in trials),
        tables={name: _table(directory / "tables" / f"{name}.parquet") for name in map(make_tables.name_of, make_tables.TABLES)},
        **{name: _typed(table_of(name, trials)) for name in TRIAL_TABLES},
    )


def _rows(file: Path) -> pd.DataFrame:
    import pandas as pd

    from semgap.analysis.load import KEYS

    rows = pd.read_csv(file, dtype=dict.fromkeys(TEXT, "string"), dtype_backend="numpy_nullable", keep_default_na=False, na_values=[""])
    floats = {name: "float64" for name in rows.columns if rows[name].dtype == "Float64"}
    unknown = {name: "string" if name.endswith("reason") else "float64" for name in rows.columns[rows.isna().all()]}
    return rows.astype(floats | unknown)[[*KEYS, *rows.columns.drop(KEYS)]]


def _table(file: Path) -> pd.DataFrame:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from semgap.analysis.load import UnusableTrial

    try:
        return _typed(pq.read_table(file, partitioning=None, page_checksum_verification=True))
    except (pa.ArrowInvalid, OSError) as error:
        raise UnusableTrial(f"{file} cannot be read ({error}); {REDO}") from error


def _typed(table: pa.Table) -> pd.DataFrame:
    """A frame whose types come from the file's schema: a null changes none."""
    import pandas as pd
    import pyarrow as pa

    text = pd.StringDtype()
    types = {pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype(), pa.string(): text, pa.large_string(): text}
    return table.to_pandas(types_mapper=types.get)
