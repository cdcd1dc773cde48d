"""Write the explorer, one page."""

from pathlib import Path

from semgap.analysis.explorer.make_explorer import make_explorer
from semgap.analysis.results import load_results
from semgap.processes.job_log import log_to

with log_to(snakemake.log[0]):
    make_explorer(load_results(snakemake.params.analysis), Path(snakemake.output[0]))
