"""Plot every figure as svg and png."""

from pathlib import Path

from semgap.analysis import figures
from semgap.analysis.load import load_trials, trial_rows
from semgap.logs import log_to

with log_to(snakemake.log[0]):
    expected = snakemake.params.analysis["trials"]
    trials = load_trials([Path(directory) for directory in expected], expected)
    directory = Path(snakemake.output[0]).parent
    figures.save(figures.bytes_per_token(trials), directory / "bytes_per_token")
    figures.save(figures.latency(trial_rows(trials)), directory / "latency")
    figures.save(figures.telemetry(trials), directory / "telemetry")
