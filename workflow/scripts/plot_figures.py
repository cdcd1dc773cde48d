"""Plot every figure as svg, png and pdf."""

from pathlib import Path

from semgap.analysis.figures.plot_figures import plot_figures
from semgap.analysis.results import load_results
from semgap.processes.job_log import log_to

with log_to(snakemake.log[0]):
    plot_figures(load_results(snakemake.params.analysis), Path(snakemake.output[0]).parent)
