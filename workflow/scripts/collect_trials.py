"""Write results.csv, one row a trial."""

from pathlib import Path

from semgap.analysis.collect_trials import collect_trials
from semgap.processes.job_log import log_to

with log_to(snakemake.log[0]):
    collect_trials(snakemake.params.analysis["trials"], Path(snakemake.output[0]))
