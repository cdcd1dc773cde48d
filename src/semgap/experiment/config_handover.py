"""Checks of phases whose requests move from one worker to another."""

from collections.abc import Iterator, Mapping
from typing import Any


def handover_faults(values: Mapping[str, Any], mode: str, phase: str) -> Iterator[str]:
    """The faults of a mode in handover phase `phase`, as texts that follow the mode's name."""
    row, spec = values["define"]["modes"][mode], values["define"]["phases"][phase]
    where = f"runs in handover phase {phase!r}"
    if row["placement"] == "local":
        return
    if row["recovery"] != "recompute" and row["shadow"] != "kvhost":
        yield f"{where} with shadow {row['shadow']}; a request moves through a KV host, use shadow: kvhost, or recovery: recompute"
    if row["prefix"] != "recompute":
        yield f"{where} with prefix {row['prefix']}; the first worker computes all that it hands over, use prefix: recompute"
    if values["worker"]["launch"] != "local":
        launch = values["worker"]["launch"]
        yield f"{where} with config.worker.launch {launch!r}; a trial starts both workers itself, use launch: local"
    if len(spec["prompt_lengths"]) > 1:
        yield f"{where} with several prompt_lengths; a request that moves is compared with its neighbour, so give each a phase"
    if spec["requests"] % 2:
        yield f"{where} with requests: {spec['requests']}; every second request stays, to compare with, set requests to an even number"
