"""Bring one model into resources/models/NAME/."""

from pathlib import Path

from semgap.logs import log_to
from semgap.sources import fetch_model

with log_to(snakemake.log[0]):
    model = snakemake.params.model
    fetch_model(model["spec"], snakemake.wildcards.model, model["dtype"], Path(snakemake.output.digest).parent)
