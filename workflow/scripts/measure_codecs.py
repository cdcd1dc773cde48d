"""Measure every codec on the tensors of one model."""

from pathlib import Path

from semgap.experiment.measure_codecs import measure_codecs
from semgap.experiment.trial_setup import Paths
from semgap.processes.job_log import log_to

with log_to(snakemake.log[0]):
    paths = Paths(Path(snakemake.input.model).parent, Path(snakemake.scriptdir).parents[1])
    measure_codecs(snakemake.params.cell, paths, Path(snakemake.input.tensors), Path(snakemake.output[0]))
