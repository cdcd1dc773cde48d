"""Fetch one model, or link it from another experiment's directory."""

from pathlib import Path

from semgap.experiment.fetch_model import fetch_model
from semgap.processes.job_log import log_to

with log_to(snakemake.log[0]):
    model, name, directory = snakemake.params.model, snakemake.wildcards.model, Path(snakemake.output.digest).parent
    places = [Path("resources/models") / name, *sorted(Path("resources").glob(f"*/models/{name}"))]
    fetch_model(model["spec"], name, model["dtype"], directory, fetched=[place for place in places if place != directory])
