"""A trial that fails says why on the terminal, and leaves its log and nothing else."""

from __future__ import annotations

import socket

import pytest
from clone import Clone

pytestmark = pytest.mark.alone


def test_a_taken_port_is_named_on_the_terminal_and_the_log_is_kept(finished: Clone) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        finished.configure({"worker": {"address": address}})
        trial = finished.trial("remote_cache", 1)
        done = finished.snakemake(str(trial.relative_to(finished.root) / "manifest.json"))
    assert done.returncode == 1
    told = [line for line in done.stdout.splitlines() if address in line]
    assert any("is taken by another process" in line for line in told), done.stdout
    log = finished.root / "results/logs/measure_trial" / trial.relative_to(finished.root / "results/trials").with_suffix(".log")
    assert address in log.read_text()
    assert not (trial / "manifest.json").exists()


def test_a_cache_longer_than_the_models_context_fails_before_any_trial(finished: Clone) -> None:
    finished.configure({"max_length": 129})
    done = finished.snakemake()
    assert done.returncode == 1
    assert "config.max_length 129 is more than the context of model 'tiny', 128 positions" in done.stdout
    assert "measuring" not in done.stdout
