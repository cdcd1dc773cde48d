"""Compute what local gives for one phase of one model."""

from pathlib import Path

from semgap.logs import log_to
from semgap.trial import Place, run_reference

with log_to(snakemake.log[0]):
    run_reference(snakemake.params.cell, Place(Path(snakemake.input.model).parent, Path.cwd()), Path(snakemake.output[0]))
