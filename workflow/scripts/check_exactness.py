"""Compare one mode with the exactness reference."""

from pathlib import Path

from semgap.experiment.check_exactness import check_exactness
from semgap.experiment.trial_setup import Paths
from semgap.processes.job_log import log_to
from semgap.seal import write_sealed_json

with log_to(snakemake.log[0]):
    paths = Paths(Path(snakemake.input.model).parent, Path(snakemake.scriptdir).parents[1])
    result = check_exactness(snakemake.params.cell, paths, Path(snakemake.input.drawn), Path(snakemake.input.text))
    write_sealed_json(Path(snakemake.output[0]), result)
