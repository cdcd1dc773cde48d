"""Dump tensors of one model, on which codecs are measured."""

from pathlib import Path

from semgap.experiment.dump_tensors import dump_tensors
from semgap.experiment.trial_setup import Paths
from semgap.processes.job_log import log_to

with log_to(snakemake.log[0]):
    dump_tensors(
        snakemake.params.cell, Paths(Path(snakemake.input.model).parent, Path(snakemake.scriptdir).parents[1]), Path(snakemake.output[0])
    )
