"""Compute what local gives for the exactness check of one model."""

from pathlib import Path

from semgap.logs import log_to
from semgap.trial import Place, run_exactness_reference

with log_to(snakemake.log[0]):
    place = Place(Path(snakemake.input.model).parent, Path.cwd())
    run_exactness_reference(snakemake.params.cell, place, Path(snakemake.output.drawn), Path(snakemake.output.text))
