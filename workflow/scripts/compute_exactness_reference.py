"""Compute the exactness reference of one model."""

from pathlib import Path

from semgap.experiment.compute_exactness_reference import compute_exactness_reference
from semgap.experiment.trial_setup import Paths
from semgap.processes.job_log import log_to

with log_to(snakemake.log[0]):
    paths = Paths(Path(snakemake.input.model).parent, Path(snakemake.scriptdir).parents[1])
    compute_exactness_reference(snakemake.params.cell, paths, Path(snakemake.output.drawn), Path(snakemake.output.text))
