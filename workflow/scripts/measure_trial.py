"""Measure one trial and write its tables and manifest."""

from pathlib import Path

from semgap.experiment.measure_capacity import capacity_of
from semgap.experiment.measure_trial import measure_trial
from semgap.experiment.trial_setup import Paths
from semgap.processes.job_log import log_to

with log_to(snakemake.log[0]):
    paths = Paths(Path(snakemake.input.model).parent, Path(snakemake.scriptdir).parents[1])
    capacity = snakemake.input.get("capacity")
    per_s = capacity_of(Path(capacity)) if capacity else None
    result = measure_trial(snakemake.params.cell, paths, Path(snakemake.input.reference), per_s)
    result.write(Path(snakemake.output.manifest).parent)
