"""Write results.csv, one row a trial."""

from pathlib import Path

from semgap.analysis.load import load_trials, trial_rows
from semgap.logs import log_to

with log_to(snakemake.log[0]):
    expected = snakemake.params.analysis["trials"]
    rows = trial_rows(load_trials([Path(directory) for directory in expected], expected))
    rows.to_csv(snakemake.output[0], index=False, lineterminator="\n")
