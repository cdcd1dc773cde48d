"""A trial of kind load: the rate of its levels, the comparison of its tokens, its tables, and its part of the manifest."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from semgap.client.report import Load, LoadLevel, Report
from semgap.client.spec import Phase
from semgap.experiment.exactness import Logits, compare
from semgap.experiment.trial_setup import TrialError
from semgap.seal import read_sealed


def with_rates(phase: Phase, capacity_per_s: float | None) -> Phase:
    """The phase with the rates of its shares of a measured capacity (requests/s). TrialError without that."""
    arrivals = phase.arrivals
    if arrivals is None or not arrivals.share:
        return phase
    if capacity_per_s is None:
        share = f"its arrivals are {', '.join(map(str, arrivals.share))} of {arrivals.of}'s capacity"
        raise TrialError(f"{share}, which the workflow measures before its trials; run snakemake, or use arrivals.per_s")
    rates = tuple(share * capacity_per_s for share in arrivals.share)
    return msgspec.structs.replace(phase, arrivals=msgspec.structs.replace(arrivals, per_s=rates))


def compare_load(reference: Path, seen: Path, margin: float) -> list[dict[str, Any]]:
    """exactness.compare's rows of all tokens that came, request by request, against each prompt's own run alone.

    A batched pass moves logits, so a token counts as the reference's own if its logit there is within `margin` of the largest.
    """
    with np.load(reference, allow_pickle=False) as alone, np.load(seen, allow_pickle=False) as load:
        planned, tokens, best = load["planned"], load["tokens"], alone["top_logits"]
        close = best > best[:, :, :1] - margin
        others = np.where(close, alone["top_tokens"], -1)
        return compare(Logits(alone["tokens"][planned], others=others[planned]), Logits(tokens), whole=False)


def load_rows(load: Load, compared: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of load.parquet: the client's, each with its comparison."""
    return [row | {name: other[name] for name in _COMPARED} for row, other in zip(load.tokens, compared, strict=True)]


_COMPARED = ("reference_token", "token_match", "edge_draw")


def batch_rows(report: Report) -> list[dict[str, Any]]:
    """The rows of batches.parquet: the engine's steps, on the client's clock, with the level in whose window they began, or null."""
    if report.load is None or report.session is None:
        return []
    offset_s = report.session.clock.offset_s
    rows = [row | {"begin_s": row["begin_s"] - offset_s} for row in report.load.batches]
    return [row | {"level": _level_at(report.load.levels, row["begin_s"])} for row in rows]


def _level_at(levels: Sequence[LoadLevel], at_s: float) -> int | None:
    return next((level.level for level in levels if level.start_s < at_s <= level.end_s), None)


def load_manifest(report: Report) -> dict[str, Any] | None:
    """The levels with their windows, and the engine; None for another kind of trial."""
    if report.load is None:
        return None
    return {"levels": msgspec.to_builtins(report.load.levels), "engine": report.load.engine}


def capacity_of(file: Path) -> float:
    """The requests per second in a file of rule measure_capacity. SealError if it was altered."""
    per_s: float = json.loads(read_sealed(file))["per_s"]
    return per_s
