"""How exact a mode is, apart from any timing."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from semgap.experiment import exactness, staleness
from semgap.experiment.exactness import Logits
from semgap.experiment.trial_processes import run_client, start_worker
from semgap.experiment.trial_setup import Paths, check_model, client_spec, require_other_node, runnable_policy
from semgap.processes.lifetime import end_with_workflow
from semgap.processes.machine import measuring


def check_exactness(cell: Mapping[str, Any], place: Paths, drawn: Path, text: Path) -> dict[str, Any]:
    """How exact a mode is, apart from any timing: its tokens when it goes on from them, and its logits when it is fed the text.

    BrokenPromise when it does not keep what its `keeps` says.
    """
    end_with_workflow()
    policy = runnable_policy(cell)
    require_other_node(cell, policy)
    with measuring(), tempfile.TemporaryDirectory(prefix="semgap-exactness-") as scratch, contextlib.ExitStack() as stack:
        check_model(place.model_directory, cell)
        worker, _ = start_worker(cell, place.root, Path(scratch), stack)  # on this machine's loopback: the network changes no token
        sees_logits = policy.reply.kind != "token"
        spec = msgspec.structs.replace(client_spec(cell, policy, place, Path(scratch)), worker=worker, text_pass=sees_logits)
        run_client(spec, cell, Path(scratch))
        free = Logits.read(Path(scratch) / "logits.npz")
        fed = Logits.read(Path(scratch) / "text.npz") if sees_logits else None
    whole = policy.reply.kind == "logits_all"
    own = exactness.compare(Logits.read(drawn), free, whole, exactness.margin_of(policy, cell["dtype"]))
    while_alike = exactness.summarise(_until_apart(own), "lossy")
    result = exactness.summarise(own, policy.keeps) | {"first_difference": _first_difference(own)}
    result |= {name: while_alike[name] for name in ("logits_bitwise", "max_abs_diff", "max_kl_nats")}
    result |= _teacher_forced(Logits.read(text), fed, whole, cell["mode"])
    exactness.require_promise(result, cell["mode"])
    return {"model": cell["model"], "mode": cell["mode"], "cell_digest": staleness.content_digest(cell), **result}


def _until_apart(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows up to and with each request's first differing token; what follows it was computed from another text."""
    kept, apart = [], False
    for row in rows:
        apart &= row["step"] > 0
        if not apart:
            kept.append(row)
        apart |= row["token_match"] is not True
    return kept


def _first_difference(rows: list[dict[str, Any]]) -> int | None:
    """The earliest step of any request at which another token was drawn than local's; None where there is none."""
    return min((row["step"] for row in rows if row["token_match"] is False), default=None)


def _teacher_forced(reference: Logits, fed: Logits | None, whole: bool, mode: str) -> dict[str, Any]:
    """Differences of logits over the text, and of its cross entropy. Null for a mode whose client sees no logits."""
    steps = fed.tokens.shape[1] if fed else None  # a mode's max_steps may have cut it short: like is compared with like
    reference_nats = exactness.cross_entropy_nats(reference, steps)
    names = ("text_logits_bitwise", "text_max_abs_diff", "text_max_kl_nats", "text_mean_kl_nats", "text_cross_entropy_nats")
    if fed is None:
        nulls = dict.fromkeys(names)
        return nulls | {"text_reference_cross_entropy_nats": reference_nats, "text_reason": "the client sees tokens, no logits"}
    rows = exactness.compare(reference, fed, whole)
    summary = exactness.summarise(rows, "lossy")
    exactness.require_promise(summary, mode)
    finite = summary["max_kl_nats"] is not None
    mean_kl = sum(row["kl_nats"] for row in rows) / len(rows) if finite else None
    values = (summary["logits_bitwise"], summary["max_abs_diff"], summary["max_kl_nats"], mean_kl, exactness.cross_entropy_nats(fed))
    return dict(zip(names, values, strict=True)) | {"text_reference_cross_entropy_nats": reference_nats, "text_reason": None}
