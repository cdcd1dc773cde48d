"""Plot every figure as svg and png."""

from pathlib import Path

from semgap.analysis import codec_figure, figures, ladder_figure, network_figure, recovery_figure
from semgap.analysis.drawing import save
from semgap.analysis.facts import facts
from semgap.analysis.ladder import ladder
from semgap.analysis.load import load_results
from semgap.analysis.network import network
from semgap.analysis.recovery import recovery
from semgap.logs import log_to

with log_to(snakemake.log[0]):
    trials, results = load_results(snakemake.params.analysis)
    directory = Path(snakemake.output[0]).parent
    save(figures.bytes_per_token(trials), directory / "bytes_per_token")
    save(figures.latency(results.rows), directory / "latency")
    save(figures.telemetry(trials), directory / "telemetry")
    save(ladder_figure.ladder(ladder(results), facts(results)), directory / "ladder")
    save(network_figure.network(network(results)), directory / "network")
    save(recovery_figure.recovery(recovery(results)), directory / "recovery")
    save(codec_figure.codecs(results.codecs), directory / "codecs")
