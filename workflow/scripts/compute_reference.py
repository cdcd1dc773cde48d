"""Compute the reference of one phase of one model."""

from pathlib import Path

from semgap.experiment.compute_reference import compute_reference
from semgap.experiment.trial_setup import Paths
from semgap.processes.job_log import log_to

with log_to(snakemake.log[0]):
    compute_reference(
        snakemake.params.cell, Paths(Path(snakemake.input.model).parent, Path(snakemake.scriptdir).parents[1]), Path(snakemake.output[0])
    )
