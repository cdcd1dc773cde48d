"""Write every table as csv, parquet, md and tex."""

from pathlib import Path

from semgap.analysis.load import load_results
from semgap.analysis.tables import write_tables
from semgap.logs import log_to

with log_to(snakemake.log[0]):
    write_tables(load_results(snakemake.params.analysis)[1], Path(snakemake.output[0]).parent)
