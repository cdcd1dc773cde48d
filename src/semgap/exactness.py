"""What a mode kept of the reference: its tokens, its logits bitwise, and by how much they differ."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


class BrokenPromise(Exception):
    """A mode did not keep what its `keeps` says."""


@dataclass(frozen=True)
class Logits:
    """What a client saw, request by request and step by step: (requests, steps + 1) and the vocabulary last.

    `digests` are xxh3-64 of each whole reply's bytes, `last_logits` the row of the last position, float32.
    """

    tokens: np.ndarray
    digests: np.ndarray
    last_logits: np.ndarray

    @classmethod
    def read(cls, path: Path) -> Logits:
        """Of an .npz as the client writes it."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["tokens"], arrays["digests"], arrays["last_logits"])


def compare(reference: Logits, seen: Logits) -> list[dict[str, Any]]:
    """One row a measured request and step: reference_token, token_match, logits_bitwise, logits_max_abs_diff, kl_nats.

    `seen` may have fewer steps than the reference, never other requests.
    """
    requests, steps = seen.tokens.shape
    if reference.tokens.shape[0] != requests or reference.tokens.shape[1] < steps:
        raise ValueError(f"a reference of {reference.tokens.shape} requests and steps for {seen.tokens.shape}")
    return [_compare_step(reference, seen, request, step) for request in range(requests) for step in range(steps)]


def summarise(rows: list[dict[str, Any]], keeps: str) -> dict[str, Any]:
    """Over all rows: what was compared, what was equal, the worst differences, and whether `keeps` was kept."""
    tokens_equal = sum(row["token_match"] for row in rows)
    bitwise = all(row["logits_bitwise"] for row in rows)
    kept = {"bitwise": bitwise and tokens_equal == len(rows), "tokens": tokens_equal == len(rows), "lossy": True}
    return {
        "keeps": keeps,
        "tokens_compared": len(rows),
        "tokens_equal": tokens_equal,
        "logits_bitwise": bitwise,
        "max_abs_diff": max(row["logits_max_abs_diff"] for row in rows),
        "max_kl_nats": None if any(row["kl_nats"] is None for row in rows) else max(row["kl_nats"] for row in rows),
        "promise_kept": kept[keeps],
    }


def require_promise(summary: dict[str, Any], mode: str) -> None:
    """BrokenPromise when the mode did not keep what it says."""
    if not summary["promise_kept"]:
        raise BrokenPromise(
            f"mode {mode!r} says keeps: {summary['keeps']}, but {summary['tokens_equal']} of {summary['tokens_compared']} tokens are "
            f"equal to local's and its logits differ by up to {summary['max_abs_diff']:.3g}; say keeps: lossy, or find out why"
        )


def kl_nats(reference: np.ndarray, other: np.ndarray) -> float | None:
    """KL(softmax(reference) || softmax(other)) of two rows of logits (vocab,), in nats, computed in float64.

    None where a logit is not finite (a cast that overflowed): there is no such number then.
    """
    if not (np.isfinite(reference).all() and np.isfinite(other).all()):
        return None
    p, q = _log_softmax(reference), _log_softmax(other)
    return max(0.0, float(np.sum(np.exp(p) * (p - q))))


def _compare_step(reference: Logits, seen: Logits, request: int, step: int) -> dict[str, Any]:
    at = (request, step)
    theirs, ours = reference.last_logits[at], seen.last_logits[at]
    return {
        "reference_token": int(reference.tokens[at]),
        "token_match": bool(reference.tokens[at] == seen.tokens[at]),
        "logits_bitwise": bool(reference.digests[at] == seen.digests[at]),
        "logits_max_abs_diff": float(np.max(np.abs(theirs.astype(np.float64) - ours))),
        "kl_nats": kl_nats(theirs, ours),
    }


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.sum(np.exp(shifted)))
