"""The exactness of a mode, apart from any timing."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import msgspec
import numpy as np

from semgap.client.report import LOGITS_FILE, TEXT_FILE
from semgap.experiment import exactness
from semgap.experiment.cell import Cell
from semgap.experiment.check_exactness_local import by_transformers
from semgap.experiment.exactness import Logits
from semgap.experiment.staleness import content_digest
from semgap.experiment.trial_client import run_client
from semgap.experiment.trial_setup import Paths, check_model, client_spec, require_runnable
from semgap.experiment.trial_worker import start_worker
from semgap.processes.lifetime import end_with_workflow
from semgap.processes.machine import measuring
from semgap.processes.scratch import scratch_directory
from semgap.seal import require_sealed

LOCAL_SHARE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""By dtype: the most by which local's logits may differ from transformers', as a share of their range."""


def check_exactness(raw: Mapping[str, Any], paths: Paths, drawn: Path, text: Path) -> dict[str, Any]:
    """Compares a mode with the exactness reference: its tokens if it is fed its own, its logits if it is fed the text.

    The reference is local's. A local mode is therefore compared with transformers itself, and must keep its tokens and, within
    `LOCAL_SHARE` of their range, its logits. Gives the row of the table exactness. BrokenPromise if the mode breaks its `keeps`,
    SealError for a reference that was altered.
    """
    end_with_workflow()
    cell = Cell.of(raw)
    require_runnable(cell)
    for reference in (drawn, text):
        require_sealed(reference)
    with measuring(), scratch_directory("exactness") as scratch:
        check_model(paths.model_directory, cell)
        local = cell.policy.is_local
        spec = client_spec(cell, paths, scratch)
        free, fed = by_transformers(spec, Logits.read(drawn), Logits.read(text)) if local else _run(cell, paths, scratch)
    whole, keeps = cell.policy.reply.kind == "logits_all", "tokens" if local else cell.policy.keeps
    margin = exactness.MARGINS[cell.dtype] if local else exactness.margin_of(cell.policy, cell.dtype)
    own = exactness.compare(Logits.read(drawn), free, whole, margin)
    while_alike = exactness.summarise(_until_apart(own), "lossy")
    first_difference = min((row["step"] for row in own if row["token_match"] is False), default=None)
    result = exactness.summarise(own, keeps) | {"first_difference": first_difference}
    result |= {name: while_alike[name] for name in ("logits_bitwise", "max_abs_diff", "max_kl_nats")}
    result |= _teacher_forced(Logits.read(text), fed, whole, cell.mode)
    exactness.require_promise(result, cell.mode)
    if local:
        _require_close(Logits.read(text), result["text_max_abs_diff"], cell)
    return {"model": cell.model, "mode": cell.mode, "cell_digest": content_digest(raw), **result}


def _run(cell: Cell, paths: Paths, scratch: Path) -> tuple[Logits, Logits | None]:
    """What the mode gives when it is fed its own tokens, and when it is fed the text; the latter is None if its client sees no logits.

    The worker is on loopback: no network changes a token.
    """
    sees_logits = cell.policy.reply.kind != "token"
    with contextlib.ExitStack() as stack:
        worker = start_worker(cell, paths.root, scratch, stack).side
        spec = msgspec.structs.replace(client_spec(cell, paths, scratch, text_pass=sees_logits), worker=worker)
        run_client(spec, cell, scratch)
    return Logits.read(scratch / LOGITS_FILE), Logits.read(scratch / TEXT_FILE) if sees_logits else None


def _require_close(text: Logits, difference: float | None, cell: Cell) -> None:
    """BrokenPromise if local's logits over the text are too far from transformers'."""
    assert text.last_logits is not None
    most = LOCAL_SHARE[cell.dtype] * float(np.ptp(text.last_logits))
    if difference is None or not difference <= most:
        raise exactness.BrokenPromise(
            f"mode {cell.mode!r}: the executor's logits differ from transformers' by up to {difference}, more than {most:.3g}; say "
            "executor: eager, or find out why"
        )


def _until_apart(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each request's rows up to and with its first differing token. The rows after it belong to another text."""
    kept, apart = [], False
    for row in rows:
        apart &= row["step"] > 0
        if not apart:
            kept.append(row)
        apart |= row["token_match"] is not True
    return kept


def _teacher_forced(reference: Logits, fed: Logits | None, whole: bool, mode: str) -> dict[str, Any]:
    """Differences of logits over the text, and the cross entropies. Null for a mode whose client sees no logits."""
    steps = fed.tokens.shape[1] if fed else None  # fewer than the reference's with max_steps: both cross entropies cover the same tokens
    by_prompt = exactness.cross_entropies_nats(reference, steps)
    names = ("text_logits_bitwise", "text_max_abs_diff", "text_max_kl_nats", "text_mean_kl_nats", "text_cross_entropy_nats")
    row = dict.fromkeys(names) | {"text_tokens": len(by_prompt) * (steps or reference.tokens.shape[1])}
    row |= {"text_reference_cross_entropy_nats": mean(by_prompt), "text_reference_nats_by_prompt": by_prompt}
    row |= {"text_reason": "the client sees tokens, no logits"}
    if fed is None:
        return row
    rows = exactness.compare(reference, fed, whole)
    summary = exactness.summarise(rows, "lossy")
    exactness.require_promise(summary, mode)
    row |= {f"text_{name}": summary[name] for name in ("logits_bitwise", "max_abs_diff", "max_kl_nats")}
    finite = summary["max_kl_nats"] is not None
    row["text_mean_kl_nats"] = sum(each["kl_nats"] for each in rows) / len(rows) if finite else None
    return row | {"text_cross_entropy_nats": mean(exactness.cross_entropies_nats(fed)), "text_reason": None}
