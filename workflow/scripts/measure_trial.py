"""Run one grid cell and write its tables."""

from pathlib import Path

from semgap.logs import log_to
from semgap.trial import Place, run_trial

with log_to(snakemake.log[0]):
    place = Place(Path(snakemake.input.model).parent, Path.cwd())
    result = run_trial(snakemake.params.cell, place, Path(snakemake.input.reference))
    result.write(Path(snakemake.output.manifest).parent)
