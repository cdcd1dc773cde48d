"""Prompts on which greedy decoding over fp16 logits leaves the path of local's own: lossy modes show as lossy there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from semgap.client.loop import run_requests
from semgap.client.measure import open_local
from semgap.client.prompts import load_passages, make_prompts
from semgap.engine.sampling import greedy
from semgap.experiment.cell import Cell
from semgap.experiment.config_checks import ConfigError
from semgap.experiment.trial_setup import Paths, check_model, client_spec
from semgap.policy import Policy, Reply


@dataclass(frozen=True)
class Departure:
    """The first step of a prompt at which fp16 logits draw `fp16_token` instead of `token`, whose own logit is larger by `margin`."""

    step: int
    token: int
    fp16_token: int
    margin: float


def ties(raw: Mapping[str, Any], paths: Paths) -> Iterator[tuple[int, Departure | None]]:
    """Decodes the phase of a cell after each passage of the prompts file by `local`; gives each passage's number and departure, if any.

    Up to its first departure the path over fp16 logits is local's own, so rounding local's logits finds it. Pins this process to the
    computing cores. ConfigError unless the cell decodes greedily.
    """
    cell = msgspec.structs.replace(Cell.of(raw), policy=Policy(placement="local", reply=Reply("logits_last")))
    if cell.drawing.rule.kind != "greedy":
        raise ConfigError(f"config.sampling.rule.kind is {cell.drawing.rule.kind!r}; a departure is one of greedy decoding, use greedy")
    check_model(paths.model_directory, cell)
    spec = client_spec(cell, paths, Path())
    os.sched_setaffinity(0, spec.cpus)
    runtime = open_local(spec, {})
    for passage in range(len(load_passages(paths.root / cell.prompts))):
        alone = msgspec.structs.replace(spec, phase=msgspec.structs.replace(spec.phase, passages=(passage,), requests=1))
        arrays = run_requests(runtime, alone, make_prompts(alone)[0], []).arrays()
        yield passage, first_departure(arrays["last_logits"][0])


def first_departure(logits: np.ndarray) -> Departure | None:
    """The first row of logits (steps, vocabulary), float32, whose greedy token changes in float16."""
    for step, row in enumerate(logits):
        token, fp16_token = greedy(row), greedy(row.astype(np.float16))
        if token != fp16_token:
            return Departure(step, token, fp16_token, float(row[token] - row[fp16_token]))
    return None
