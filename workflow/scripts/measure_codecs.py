"""Measure every codec on the tensors of one model."""

from pathlib import Path

from semgap.codecbench import measure_codecs
from semgap.logs import log_to
from semgap.trial import Place

with log_to(snakemake.log[0]):
    place = Place(Path(snakemake.input.model).parent, Path.cwd())
    measure_codecs(snakemake.params.cell, place, Path(snakemake.input.tensors), Path(snakemake.output[0]))
