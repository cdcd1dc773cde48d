"""Dump tensors of one model for measuring codecs on."""

from pathlib import Path

from semgap.logs import log_to
from semgap.tensordump import dump_tensors
from semgap.trial import Place

with log_to(snakemake.log[0]):
    dump_tensors(snakemake.params.cell, Place(Path(snakemake.input.model).parent, Path.cwd()), Path(snakemake.output[0]))
