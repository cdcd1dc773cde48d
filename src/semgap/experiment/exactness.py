"""A mode against its reference: are the tokens equal, are the logits bitwise equal, and by how much do they differ."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from semgap.policy import Policy

MARGINS = {"float32": 1e-3, "float16": 0.1, "bfloat16": 1.0}
"""By dtype: the most by which a recompute in other shapes may move a logit, with room. In float32 SmolLM2 moved by 3e-5."""


class BrokenPromise(Exception):
    """A mode broke the promise of its `keeps`."""


@dataclass(frozen=True)
class Logits:
    """A client's tokens and logits, each array (requests, steps + 1, ...).

    `digests`: xxh3-64 of all logits of a reply; `last_digests`: of their last row; `last_logits`: that row, float32; `others`
    (requests, steps + 1, any): further tokens that the draw could as well have given, -1 for none. All None if the client saw no logits.
    `text`: the tokens fed instead of the drawn ones (teacher forcing), or None.
    """

    tokens: np.ndarray
    digests: np.ndarray | None = None
    last_digests: np.ndarray | None = None
    last_logits: np.ndarray | None = None
    others: np.ndarray | None = None
    text: np.ndarray | None = None

    @classmethod
    def read(cls, path: Path) -> Logits:
        """Reads an .npz of the client."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**{name: arrays[name] for name in arrays.files})


def margin_of(policy: Policy, dtype: str) -> float:
    """A token counts as the reference's own if its reference logit is within this margin of the largest.

    0, but for modes that compute in other shapes, so that the last bits of their logits differ: they recompute in one prefill, or begin
    with a prefix that was computed apart.
    """
    in_other_shapes = policy.recovery in ("recompute", "auto") or policy.fetches_prefixes
    return MARGINS[dtype] if in_other_shapes and not policy.replays_exactly else 0.0


def compare(reference: Logits, seen: Logits, whole: bool, margin: float = 0.0) -> list[dict[str, Any]]:
    """One row for each measured request and step: reference_token, token_match, edge_draw, logits_bitwise, logits_max_abs_diff, kl_nats.

    `seen` may have fewer steps than the reference, never other requests; its tokens of -1 were never drawn, and have no row.
    `whole`: compare the logits of all positions of a reply.
    If the tokens differ and the reference could as well have drawn the other one (sampling.py), or its logit is within `margin` of the
    largest, both are right (edge_draw), and the tokens after it in that request are not compared (token_match null).
    """
    requests, steps = seen.tokens.shape
    if reference.tokens.shape[0] != requests or reference.tokens.shape[1] < steps:
        raise ValueError(f"the reference has {reference.tokens.shape} requests and steps, the mode {seen.tokens.shape}")
    rows = []
    for request in range(requests):
        apart = False
        for step in range(np.count_nonzero(seen.tokens[request] >= 0)):
            row = _compare_step(reference, seen, (request, step), whole, margin)
            if apart:
                row |= {"token_match": None, "edge_draw": False}
            apart |= row["edge_draw"]
            rows.append(row)
    return rows


def summarise(rows: list[dict[str, Any]], keeps: str) -> dict[str, Any]:
    """Over all rows: how many tokens were compared and equal, the worst differences, and whether the promise `keeps` holds."""
    compared = [row for row in rows if row["token_match"] is not None and not row["edge_draw"]]
    tokens_equal = sum(row["token_match"] for row in compared)
    same_tokens = tokens_equal == len(compared)
    with_logits = [row for row in rows if row["logits_bitwise"] is not None]
    bitwise = all(row["logits_bitwise"] for row in with_logits) if with_logits else None
    same_tokens = same_tokens and bool(compared)  # a promise without a comparison is broken
    is_number = not any(row["not_a_number"] for row in rows)
    kept = {"bitwise": bool(bitwise) and same_tokens, "tokens": same_tokens, "lossy": is_number}
    return {
        "keeps": keeps,
        "tokens_compared": len(compared),
        "tokens_equal": tokens_equal,
        "edge_draws": sum(row["edge_draw"] for row in rows),
        "logits_bitwise": bitwise,
        "max_abs_diff": _worst([row["logits_max_abs_diff"] for row in with_logits]),
        "max_kl_nats": _worst([row["kl_nats"] for row in with_logits]),
        "promise_kept": kept[keeps],
    }


def _worst(values: list[float | None]) -> float | None:
    """The largest value, or None if there are none or one is not a number."""
    numbers = [value for value in values if value is not None]
    return max(numbers) if numbers and len(numbers) == len(values) else None


def cross_entropies_nats(seen: Logits, steps: int | None = None) -> list[float]:
    """Each request's mean negative log-likelihood of the text under `seen`'s logits, in nats per token; its exp is the perplexity.

    Over the first `steps` of each request, or all. ValueError without text or logits.
    """
    if seen.text is None or seen.last_logits is None:
        raise ValueError("cross entropy needs logits of a run that was fed text")
    requests, steps = len(seen.text), steps or seen.text.shape[1]
    losses = [[-_log_softmax(seen.last_logits[r, s])[seen.text[r, s]] for s in range(steps)] for r in range(requests)]
    return [float(np.mean(request)) for request in losses]


def require_promise(summary: dict[str, Any], mode: str, where: str = "") -> None:
    """BrokenPromise if the mode broke its promise. `where` follows its name in the message: ' in session 1 of 2'."""
    if not summary["promise_kept"]:
        who = f"mode {mode!r}{where}"
        if summary["max_abs_diff"] is None and summary["keeps"] == "lossy":
            raise BrokenPromise(f"{who} gave logits that are not numbers, and local's are numbers: it read memory before writing it")
        differ = "" if summary["max_abs_diff"] is None else f" and its logits differ by up to {summary['max_abs_diff']:.3g}"
        raise BrokenPromise(
            f"{who} says keeps: {summary['keeps']}, but {summary['tokens_equal']} of {summary['tokens_compared']} tokens are "
            f"equal to local's{differ}; say keeps: lossy, or find out why"
        )


def kl_nats(reference: np.ndarray, other: np.ndarray) -> float | None:
    """KL(softmax(reference) || softmax(other)) of two rows of logits (vocab,), in nats, computed in float64.

    None if a logit is not finite, as after a cast that overflowed.
    """
    if not (np.isfinite(reference).all() and np.isfinite(other).all()):
        return None
    p, q = _log_softmax(reference), _log_softmax(other)
    return max(0.0, float(np.sum(np.exp(p) * (p - q))))


def _compare_step(reference: Logits, seen: Logits, at: tuple[int, int], whole: bool, margin: float) -> dict[str, Any]:
    match = bool(reference.tokens[at] == seen.tokens[at])
    excused = reference.others is not None and bool(seen.tokens[at] in reference.others[at])
    if margin and reference.last_logits is not None:
        row_of_logits = reference.last_logits[at]
        excused |= bool(row_of_logits[seen.tokens[at]] > row_of_logits.max() - margin)
    row: dict[str, Any] = {
        "step": at[1],
        "reference_token": int(reference.tokens[at]),
        "token_match": match,
        "edge_draw": excused and not match,
    }
    if seen.last_logits is None or reference.last_logits is None:
        return row | {"logits_bitwise": None, "logits_max_abs_diff": None, "kl_nats": None, "not_a_number": False}
    theirs, ours = reference.last_logits[at], seen.last_logits[at]
    difference = float(np.max(np.abs(theirs.astype(np.float64) - ours)))
    return row | {
        "logits_bitwise": _same(reference.last_digests, seen.last_digests, at)
        and (not whole or _same(reference.digests, seen.digests, at)),
        "logits_max_abs_diff": difference if np.isfinite(difference) else None,
        "not_a_number": bool(np.isnan(ours).any() and not np.isnan(theirs).any()),
        "kl_nats": kl_nats(theirs, ours),
    }


def _same(reference: np.ndarray | None, seen: np.ndarray | None, at: tuple[int, int]) -> bool:
    return reference is not None and seen is not None and bool(reference[at] == seen[at])


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.sum(np.exp(shifted)))
