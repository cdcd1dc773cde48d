"""The sampling rule: which token follows from a row of logits. Client and worker run the same code, in numpy alone.

A draw depends on (logits, rule, seed, request, position) alone: no state, no order of calls, no process.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from semgap.codecs.largest import no_less
from semgap.policy import SamplingRule

EDGE = 1e-5  # sides whose logits differ in their last bits draw the same token unless the uniform is this close to an edge
_U64 = 1 << 64


@dataclass(frozen=True, slots=True)
class Draw:
    """A token, and the others that a side with other last bits in its logits may draw instead: only near an edge (EDGE)."""

    token: int
    others: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Kept:
    """The tokens that may be drawn: ids, ascending (None: all), and their weights.

    Near ties at the border of the set leave open which tokens are kept. `unsure` is the weight by which they may move an edge;
    `entering` are the ids, ascending, of tokens that another side may keep in addition, with their weights.
    """

    ids: np.ndarray | None
    weights: np.ndarray
    unsure: float = 0.0
    entering: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    entering_weights: np.ndarray = field(default_factory=lambda: np.empty(0))


def greedy(logits: np.ndarray) -> int:
    """The index of the largest of `logits` (vocab,), the lowest index among equals."""
    return int(np.argmax(logits))


def draw(logits: np.ndarray, rule: SamplingRule, seed: int, request: int, position: int) -> Draw:
    """The token at `position` of `request` from one row of logits, float32 (vocab,).

    top_k and top_p keep the largest logits, the lowest ids among equals. The kept tokens are in the order of their ids, not of their
    logits: if two logits nearly tie, an error in their last bits moves an edge of the cumulative distribution by that error, instead of
    swapping two tokens. Weights and sums are float64.
    `others` are the tokens whose part of the distribution lies within EDGE of the uniform. Near ties (EDGE) at the border of the kept
    set may move all edges by their probability; `others` then includes the tokens that may enter the set.
    ValueError for NaN, +infinity or no finite logit.
    """
    if rule.kind == "greedy":
        return Draw(greedy(logits))
    kept = _kept(logits, rule)
    edges = np.cumsum(kept.weights)
    total = edges[-1]
    target = uniform(seed, request, position) * total
    last = int(np.searchsorted(edges, total))  # the last token with any weight
    index = min(int(np.searchsorted(edges, target, side="right")), last)
    token = index if kept.ids is None else int(kept.ids[index])
    return Draw(token, tuple(other for other in _within_reach(kept, edges, target) if other != token))


def uniform(seed: int, request: int, position: int) -> float:
    """The number in [0, 1) of a draw: the top 53 bits of the first word of Philox4x64-10 (Salmon et al., SC 2011).

    Key (seed, request), counter position + 1. ValueError for numbers outside 0..2^64 - 1.
    """
    for name, value in (("seed", seed), ("request", request), ("position", position)):
        if not 0 <= value < _U64:
            raise ValueError(f"sampling {name} is {value}; use 0..2^64 - 1")
    # numpy increments its counter before each block, so it starts at `position`
    generator = np.random.Philox(key=seed | request << 64, counter=position)
    return (int(generator.random_raw()) >> 11) * 2.0**-53


def _within_reach(kept: _Kept, edges: np.ndarray, target: float) -> list[int]:
    """Ids of the tokens whose interval meets `target`, within EDGE of the total plus the unsure weight."""
    slack = EDGE * edges[-1] + kept.unsure
    low, high = target - slack, target + slack
    met = np.arange(np.searchsorted(edges, low), min(np.searchsorted(edges, high, side="right") + 1, edges.size))
    met = met[kept.weights[met] > 0]
    if kept.ids is None:
        return met.tolist()
    begins = np.append(0.0, edges)[np.searchsorted(kept.ids, kept.entering)]
    may_enter = kept.entering[(begins <= high) & (begins + kept.entering_weights >= low)]
    return [*kept.ids[met].tolist(), *may_enter.tolist()]


def _kept(logits: np.ndarray, rule: SamplingRule) -> _Kept:
    top, vocabulary = float(logits.max()), logits
    if not math.isfinite(top):
        raise ValueError(f"the largest of the logits is {top}: there is no distribution to sample from")
    ids, unsure, lowest = None, 0.0, -math.inf
    if 0 < rule.top_k < logits.size:
        border = logits.size - rule.top_k
        dropped, smallest = np.partition(logits, (border - 1, border))[border - 1 : border + 1]
        ids = no_less(logits[None], smallest[None], rule.top_k)[0]
        logits, lowest = logits[ids], float(smallest)
        unsure = _near_tie(logits, dropped, top, rule)
    weights = _weights(logits, top, rule)
    if rule.top_p < 1:
        chosen, unsure_too, lowest = _top_p(logits, weights, top, rule)
        ids, weights, unsure = chosen if ids is None else ids[chosen], weights[chosen], unsure + unsure_too
    if ids is None or not unsure:
        return _Kept(ids, weights)
    entering = np.setdiff1d(np.flatnonzero(vocabulary > np.float64(lowest) - EDGE * rule.temperature), ids)
    return _Kept(ids, weights, unsure, entering, _weights(vocabulary[entering], top, rule))


def _weights(logits: np.ndarray, top: float, rule: SamplingRule) -> np.ndarray:
    weights = np.subtract(logits, top, dtype=np.float64)
    with np.errstate(over="ignore", under="ignore"):  # a far logit over a low temperature has no weight
        weights /= rule.temperature
        return np.exp(weights, out=weights)


def _near_tie(kept: np.ndarray, dropped: np.floating, top: float, rule: SamplingRule) -> float:
    """The weight of those tokens among `kept` (their logits) that lie within EDGE of the largest dropped logit."""
    near = np.count_nonzero(kept < np.float64(dropped) + EDGE * rule.temperature)  # in float32 the sum may round to `dropped`
    return near * math.exp((float(dropped) - top) / rule.temperature)


def _top_p(logits: np.ndarray, weights: np.ndarray, top: float, rule: SamplingRule) -> tuple[np.ndarray, float, float]:
    """Indices, ascending, of the smallest set of likeliest tokens with top_p of the weight; the unsure weight; and the lowest logit that
    may be in the set. A sum within EDGE of top_p leaves the size of the set open.
    """
    total = weights.sum()
    # The last token that may be kept and all below it hold more than 1 - top_p - EDGE of the weight, and none weighs more than that token:
    # so it weighs at least their mean. Half of the mean includes every near tie as well, and leaves few tokens to sort.
    likely = logits[weights >= 0.5 * max(0.0, 1 - rule.top_p - EDGE) * total / weights.size]
    falling = np.sort(likely)[::-1]
    sums = np.cumsum(_weights(falling, top, rule)) / total
    counts = np.searchsorted(sums, (rule.top_p - EDGE, rule.top_p, rule.top_p + EDGE)) + 1
    fewest, count, most = (min(int(each), falling.size) for each in counts)
    chosen = no_less(logits[None], falling[count - 1 : count], count)[0]
    tied = _near_tie(logits[chosen], falling[count], top, rule) if count < falling.size else 0.0
    return chosen, tied + float(_weights(falling[fewest:most], top, rule).sum()), float(falling[most - 1])
