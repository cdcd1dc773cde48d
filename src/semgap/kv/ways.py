"""The ways of recovery, one object each: what an eviction saves, in which codec, what a step fetches, and the predicted time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from semgap.kv.blocks import KVCache
from semgap.kv.handles import Live
from semgap.kv.restore_costs import Costs
from semgap.policy import Policy


class Way(ABC):
    """A way to get back missing blocks. `name` is its name in policies and in the rows of trials."""

    name: ClassVar[str]
    fetches: ClassVar[bool] = True  # else all tokens run again
    moves_whole_handles: ClassVar[bool] = False  # an eviction saves all dirty blocks of the handle, raw, not only those of its layers
    overlaps: ClassVar[bool] = False  # layers may compute while blocks of later layers arrive
    compares: ClassVar[bool] = False  # chooses, or gives a fetch up, by predicted times, those of forward passes among them

    def wanted(self, cache: KVCache) -> np.ndarray:
        """[layers, blocks]: the blocks to fetch."""
        return np.zeros_like(cache.missing)

    @abstractmethod
    def predicted_s(self, live: Live, costs: Costs) -> float | None:
        """Predicted seconds; None if a cost is unknown, or if the way cannot restore this handle."""

    def codec_of(self, codec: str, costs: Costs) -> str:
        """The codec in which blocks are to be saved, given the policy's, which `costs` has measured."""
        return codec

    def hands_over(self, tokens: int, cache: KVCache, costs: Costs) -> bool:
        """True if a prefill of `tokens` is worth sending to another worker, which else computes it again."""
        return True

    def pick(self, live: Live, costs: Costs) -> tuple[Way, float | None]:
        """The way of a step, and its predicted seconds if the cost model chose it."""
        return self, None


class Delta(Way):
    """Fetches missing blocks only."""

    name = "delta"
    overlaps = True

    def wanted(self, cache: KVCache) -> np.ndarray:
        return cache.missing.copy()

    def predicted_s(self, live: Live, costs: Costs) -> float | None:
        return costs.fetch_s(live.saved_bytes(live.cache.missing))


class Reload(Way):
    """Moves a handle as one object: fetches all saved blocks, as a runtime must that does not see blocks."""

    name = "reload"
    moves_whole_handles = True

    def wanted(self, cache: KVCache) -> np.ndarray:
        return (cache.counts > 0) & (cache.saved >= cache.counts)

    def predicted_s(self, live: Live, costs: Costs) -> float | None:
        cache = live.cache
        if cache.dirty.any() or live.is_coded:
            return None
        return costs.fetch_s(live.saved_bytes(np.ones_like(cache.missing)))


@dataclass(frozen=True)
class Recompute(Way):
    """Runs all tokens of the handle again: `exactly`, in the shapes of the first time, or in one prefill."""

    exactly: bool

    name = "recompute"
    fetches = False

    def predicted_s(self, live: Live, costs: Costs) -> float | None:
        return costs.recompute_s([len(fed.tokens) for fed in live.fed] if self.exactly else [live.cache.filled])


class Auto(Delta):
    """Saves as `delta`, in the codec if it pays on this link. Each step takes the way with the lowest predicted time."""

    name = "auto"
    compares = True

    def __init__(self, *ways: Way, codecs: tuple[str, ...]) -> None:
        self._ways, self._codecs = ways, codecs

    def codec_of(self, codec: str, costs: Costs) -> str:
        return costs.quickest([codec])

    def hands_over(self, tokens: int, cache: KVCache, costs: Costs) -> bool:
        """By the time that sending takes beyond the prefill, at least that of the last layer, against another prefill."""
        layers = cache.shape.layers
        sent = {costs.quickest(self._codecs): tokens * layers * cache.position_bytes}
        sent_s, computed_s = costs.fetch_s(sent), costs.recompute_s([tokens])
        if sent_s is None or computed_s is None:
            return True
        sent_s += (layers - 1) * costs.round_trip_s  # each layer is acknowledged
        return max(sent_s - computed_s, sent_s / layers) <= computed_s

    def pick(self, live: Live, costs: Costs) -> tuple[Way, float | None]:
        predicted = {way: seconds for way in self._ways if (seconds := way.predicted_s(live, costs)) is not None}
        way = min(predicted, key=lambda way: predicted[way])
        return way, predicted[way]


def way_of(policy: Policy) -> Way:
    """The way of a policy."""
    ways = (Delta(), Reload(), Recompute(policy.replays_exactly))
    return {way.name: way for way in (*ways, Auto(*ways, codecs=policy.kv_codecs))}[policy.recovery]
