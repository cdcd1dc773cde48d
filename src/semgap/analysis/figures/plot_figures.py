"""The figures, each as svg and png."""

from pathlib import Path

from semgap.analysis.figures.bytes_per_token import bytes_per_token
from semgap.analysis.figures.codecs import codecs
from semgap.analysis.figures.ladder import ladder as ladder_figure
from semgap.analysis.figures.latency import latency
from semgap.analysis.figures.network import network as network_figure
from semgap.analysis.figures.recovery import recovery as recovery_figure
from semgap.analysis.figures.style import save
from semgap.analysis.figures.telemetry import telemetry
from semgap.analysis.load import Trials
from semgap.analysis.results import Results
from semgap.analysis.tables.facts import facts
from semgap.analysis.tables.ladder import ladder
from semgap.analysis.tables.network import network
from semgap.analysis.tables.recovery import recovery


def plot_figures(trials: Trials, results: Results, directory: Path) -> None:
    """Plots every figure and saves it under its name in `directory`."""
    figures = {
        "bytes_per_token": bytes_per_token(trials),
        "latency": latency(results.rows),
        "telemetry": telemetry(trials),
        "ladder": ladder_figure(ladder(results), facts(results)),
        "network": network_figure(network(results)),
        "recovery": recovery_figure(recovery(results)),
        "codecs": codecs(results.codecs),
    }
    for name, figure in figures.items():
        save(figure, directory / name)
