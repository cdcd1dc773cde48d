"""Measure the capacity of a mode in a load phase, of which the phase's arrivals are shares."""

from pathlib import Path

from semgap.experiment.measure_capacity import measure_capacity
from semgap.experiment.trial_setup import Paths
from semgap.processes.job_log import log_to

with log_to(snakemake.log[0]):
    paths = Paths(Path(snakemake.input.model).parent, Path(snakemake.scriptdir).parents[1])
    measure_capacity(snakemake.params.cell, paths, Path(snakemake.input.reference), Path(snakemake.output[0]))
