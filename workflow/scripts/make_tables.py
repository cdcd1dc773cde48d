"""Write every table as csv, parquet, md and tex."""

from pathlib import Path

from semgap.analysis.load import load_trials, trial_rows
from semgap.analysis.tables import write_tables
from semgap.logs import log_to

with log_to(snakemake.log[0]):
    expected = snakemake.params.analysis["trials"]
    rows = trial_rows(load_trials([Path(directory) for directory in expected], expected))
    write_tables(rows, Path(snakemake.output[0]).parent)
