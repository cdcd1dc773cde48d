"""The ways of a known prefix: fetched as one object, fetched block by block while later layers compute, or computed again."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from semgap.kv.blocks import KVCache
from semgap.kv.handles import Live
from semgap.kv.restore_costs import Costs
from semgap.kv.ways import Auto, Delta, Recompute, Way
from semgap.policy import Policy


@dataclass(frozen=True)
class FetchBlocks(Delta):
    """Fetches the blocks that are missing, which are in any of `codecs`; each layer computes once its own are here."""

    codecs: tuple[str, ...]

    name = "fetch_blocks"
    compares = True

    def predicted_s(self, live: Live, costs: Costs) -> float | None:
        """Arrivals and the layers' compute as two conveyors: the slower one, and one layer of the other."""
        fetch_s, rest_s = fetch_of(live, costs, self.codecs), costs.recompute_s([live.coming])
        if fetch_s is None or rest_s is None:
            return fetch_s
        layers = live.cache.shape.layers
        return max(fetch_s + rest_s / layers, fetch_s / layers + rest_s)


class FetchWhole(Way):
    """Fetches the prefix as one opaque object, raw, before anything computes."""

    name = "fetch_whole"
    moves_whole_handles = True
    compares = True

    def wanted(self, cache: KVCache) -> np.ndarray:
        return cache.missing.copy()

    def predicted_s(self, live: Live, costs: Costs) -> float | None:
        fetch_s, rest_s = fetch_of(live, costs, ("raw",)), costs.recompute_s([live.coming])
        return None if fetch_s is None or rest_s is None else fetch_s + rest_s


class ComputeAll(Recompute):
    """Computes the prefix together with the tokens that follow it."""

    def predicted_s(self, live: Live, costs: Costs) -> float | None:
        return costs.recompute_s([live.cache.filled + live.coming])


def fetch_of(live: Live, costs: Costs, codecs: Iterable[str]) -> float | None:
    """Predicted seconds of a prefix's blocks on their way; None if the bandwidth is unknown."""
    return costs.fetch_payload_s(live.payload_bytes, live.cache.bytes_of(live.cache.missing), codecs)


def prefix_ways(policy: Policy) -> Mapping[str, Way]:
    """The ways by name, as `Policy.prefix` names them."""
    ways = (FetchBlocks(policy.kv_codecs), FetchWhole(), ComputeAll(policy.replays_exactly))
    return {way.name: way for way in (*ways, Auto(ways[0], ways[2], codecs=policy.kv_codecs))}
