"""Fetch one model into resources/models/NAME/."""

from pathlib import Path

from semgap.experiment.fetch_model import fetch_model
from semgap.processes.job_log import log_to

with log_to(snakemake.log[0]):
    model = snakemake.params.model
    fetch_model(model["spec"], snakemake.wildcards.model, model["dtype"], Path(snakemake.output.digest).parent)
