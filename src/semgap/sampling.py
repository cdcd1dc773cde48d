"""The sampling rule: which token follows from a row of logits. The same code on whichever side samples, in numpy alone.

A draw depends on (logits, rule, seed, request, position) and on nothing else: no state, no order of calls, no process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec
import numpy as np

from semgap.selection import no_less

EDGE = 1e-5  # two sides whose logits differ in their last bits may draw different tokens no further than this from an edge
_U64 = 1 << 64


class SamplingRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a token is chosen: `greedy`, or `sample` after temperature, then top_k (0: off), then top_p (1: off).

    ValueError (msgspec.ValidationError out of config) names the field, the value and the way out.
    """

    kind: str = "greedy"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("greedy", "sample"):
            raise ValueError(f"sampling kind {self.kind!r} is not known; use greedy or sample")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"sampling temperature is {self.temperature}; use a number above 0, or kind: greedy for none")
        if self.top_k < 0:
            raise ValueError(f"sampling top_k is {self.top_k}; use 1 or more, or 0 for the whole vocabulary")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling top_p is {self.top_p}; use a number above 0 and up to 1, which keeps every token")
        if self.kind == "greedy" and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise ValueError("sampling kind greedy takes no temperature, top_k or top_p; leave them out, or use kind: sample")


@dataclass(frozen=True, slots=True)
class Draw:
    """A token, and how far the draw was from another one, as a probability; infinite where there was no other."""

    token: int
    edge_distance: float


@dataclass(frozen=True, slots=True)
class _Kept:
    """The tokens that may be drawn: ids, ascending (None: all), their weights, and the weight of those that near ties may replace."""

    ids: np.ndarray | None
    weights: np.ndarray
    unsure: float


def greedy(logits: np.ndarray) -> int:
    """The index of the largest of `logits` (vocab,), the lowest one among equals."""
    return int(np.argmax(logits))


def draw(logits: np.ndarray, rule: SamplingRule, seed: int, request: int, position: int) -> Draw:
    """The token at `position` of `request` from one row of logits, float32 (vocab,).

    top_k and top_p keep the largest logits, the lowest ids among equals. The kept tokens then stand in the order of their ids, not of
    their logits: where two logits nearly tie, an error in their last bits moves an edge of the cumulative distribution by as much,
    instead of making two tokens change places. Weights and sums are float64.
    `edge_distance` is from the uniform to the nearest edge between two tokens. Where a near tie (EDGE) at the border of the kept set
    leaves open which tokens are in it, all edges may move by their probability: that is taken off, down to 0, and 0 and 1 are edges too.
    ValueError for NaN, +infinity or no finite logit.
    """
    if rule.kind == "greedy":
        return Draw(greedy(logits), math.inf)
    kept = _kept(logits, rule)
    edges = np.cumsum(kept.weights)
    total = edges[-1]
    target = uniform(seed, request, position) * total
    last = int(np.searchsorted(edges, total))  # the last token with any weight
    index = min(int(np.searchsorted(edges, target, side="right")), last)
    token = index if kept.ids is None else int(kept.ids[index])
    begin = edges[index - 1] if index else 0.0
    below = target - begin if begin > 0 or kept.unsure else math.inf
    above = edges[index] - target if index < last or kept.unsure else math.inf
    return Draw(token, max(0.0, float((min(below, above) - kept.unsure) / total)))


def uniform(seed: int, request: int, position: int) -> float:
    """The one number in [0, 1) of a draw: the top 53 bits of the first word of Philox4x64-10 (Salmon et al., SC 2011).

    Key (seed, request), counter position + 1. ValueError for numbers outside 0..2^64 - 1.
    """
    for name, value in (("seed", seed), ("request", request), ("position", position)):
        if not 0 <= value < _U64:
            raise ValueError(f"sampling {name} is {value}; use 0..2^64 - 1")
    # numpy counts up before it makes a block, so its counter starts at `position`
    generator = np.random.Philox(key=seed | request << 64, counter=position)
    return (int(generator.random_raw()) >> 11) * 2.0**-53


def _kept(logits: np.ndarray, rule: SamplingRule) -> _Kept:
    top = float(logits.max())
    if not math.isfinite(top):
        raise ValueError(f"the largest of the logits is {top}: there is no distribution to sample from")
    ids, unsure = None, 0.0
    if 0 < rule.top_k < logits.size:
        border = logits.size - rule.top_k
        dropped, smallest = np.partition(logits, (border - 1, border))[border - 1 : border + 1]
        ids = no_less(logits[None], smallest[None], rule.top_k)[0]
        logits = logits[ids]
        unsure = _near_tie(logits, dropped, top, rule)
    weights = _weights(logits, top, rule)
    if rule.top_p == 1:
        return _Kept(ids, weights, unsure)
    chosen, unsure_too = _top_p(logits, weights, top, rule)
    return _Kept(chosen if ids is None else ids[chosen], weights[chosen], unsure + unsure_too)


def _weights(logits: np.ndarray, top: float, rule: SamplingRule) -> np.ndarray:
    weights = np.subtract(logits, top, dtype=np.float64)
    with np.errstate(over="ignore", under="ignore"):  # a far logit over a low temperature has no weight
        weights /= rule.temperature
        return np.exp(weights, out=weights)


def _near_tie(kept: np.ndarray, dropped: np.floating, top: float, rule: SamplingRule) -> float:
    """The weight of the tokens among `kept` (their logits) that lie within EDGE of the largest dropped one."""
    near = np.count_nonzero(kept < float(dropped) + EDGE * rule.temperature)
    return near * math.exp((float(dropped) - top) / rule.temperature)


def _top_p(logits: np.ndarray, weights: np.ndarray, top: float, rule: SamplingRule) -> tuple[np.ndarray, float]:
    """Indices, ascending, of the smallest set of likeliest tokens that holds top_p of the weight, and the weight that is unsure."""
    total = weights.sum()
    # The tokens from the last kept one down hold more than 1 - top_p of the weight and none of them weighs more than it does, so it
    # weighs at least their mean. Half of that lets every near tie in as well, and leaves few tokens to sort.
    likely = logits[weights >= 0.5 * (1 - rule.top_p) * total / weights.size]
    falling = np.sort(likely)[::-1]
    sums = np.cumsum(_weights(falling, top, rule)) / total
    count = min(int(np.searchsorted(sums, rule.top_p)) + 1, falling.size)
    chosen = no_less(logits[None], falling[count - 1 : count], count)[0]
    unsure = _near_tie(logits[chosen], falling[count], top, rule) if count < falling.size else 0.0
    if np.abs(sums[max(count - 2, 0) : count] - rule.top_p).min() < EDGE:  # one token more or one less would do
        unsure += float(_weights(falling[count - 1 : count], top, rule)[0])
    return chosen, unsure
