"""Write every table as csv, parquet, html, md and tex."""

from pathlib import Path

from semgap.analysis.results import load_results
from semgap.analysis.tables.make_tables import make_tables
from semgap.processes.job_log import log_to

with log_to(snakemake.log[0]):
    make_tables(load_results(snakemake.params.analysis), Path(snakemake.output[0]).parent)
