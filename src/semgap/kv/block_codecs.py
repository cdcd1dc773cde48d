"""The codecs in which a session saves its blocks: the policy's, or with AUTO one for each layer, by the session's own measurements."""

from collections.abc import Mapping, Sequence

import numpy as np

from semgap.codecs import CodecError, codec_named
from semgap.kv.blocks import KVCache
from semgap.kv.codec_choice import CodecSpeed, Coming, choose
from semgap.kv.handles import Live
from semgap.kv.pool import BLOCK
from semgap.kv.restore_costs import Costs
from semgap.kv.transfer import BlockTransfer
from semgap.kv.ways import Way
from semgap.policy import AUTO, Policy

FOLLOWING = BLOCK
"""The tokens that are taken to follow a prefix: when it is published, nobody knows how many the requests that fetch it will add."""

LEAST_GAIN = 0.05
"""A lossy codec is not taken to save a smaller part of the bytes that cross: where old blocks come in the codec that they have, the few new
ones would change for nothing."""


class BlockCodecs:
    """Gives the codec of each layer for blocks that are saved now: `evicted`, `sent` to another worker, or `published` by content.

    `transfer` measures codecs on a session's blocks, `costs` has these and the session's other measurements. A choice needs the link's
    bandwidth and the time of a layer: while one of them is unknown all layers get the exact codec that is quickest, or raw.
    """

    def __init__(self, policy: Policy, way: Way, transfer: BlockTransfer, costs: Costs) -> None:
        self._policy, self._way, self._transfer, self._costs = policy, way, transfer, costs

    def evicted(self, live: Live, cache: KVCache, blocks: np.ndarray, layers: Sequence[int]) -> Sequence[str]:
        """Of blocks, true in [layers, blocks], of `layers` that a step of one token will miss, with all that are missing already."""
        fixed = self._fixed(live, cache, blocks)
        if fixed:
            return fixed
        absent = sorted({*layers, *np.flatnonzero(cache.missing.any(axis=1)).tolist()})
        layer_s = self._layer_s(1, cache)
        if layer_s is None or self._costs.bytes_per_s is None:
            return self._unplanned(cache)
        clean = (cache.counts > 0) & ~blocks
        coming = [
            Coming(cache.bytes_of(_only(layer, blocks)), layer * layer_s, fixed_s=self._fetched_s(live.saved_bytes(_only(layer, clean))))
            for layer in absent
        ]
        clean[np.setdiff1d(np.arange(len(clean)), absent)] = False
        names = self._worth(cache.bytes_of(blocks), live.saved_bytes(clean))
        chosen = choose(coming, self._s_per_byte(names), self._costs.round_trip_s, layer_s)
        return _by_layer(cache, dict(zip(absent, chosen, strict=True)))

    def sent(self, live: Live, cache: KVCache, blocks: np.ndarray, layer: int, elapsed_s: float) -> Sequence[str]:
        """Of one layer's blocks, which leave `elapsed_s` after their prefill began: they are to be gone before the next layer's are there,
        but for the round trip in which the KV host answers.
        """
        fixed = self._fixed(live, cache, blocks)
        if fixed:
            return fixed
        layer_s, trip_s = self._layer_s(cache.filled, cache), self._costs.round_trip_s
        if layer_s is None or self._costs.bytes_per_s is None:
            return self._unplanned(cache)
        leaving = Coming(cache.bytes_of(blocks), (layer + 2) * layer_s + trip_s - elapsed_s, fixed_s=trip_s)
        names = self._worth(leaving.tensor_bytes, {})
        return _by_layer(cache, {layer: choose([leaving], self._s_per_byte(names, sent=True), 0.0, 0.0)[0]})

    def published(self, cache: KVCache, blocks: np.ndarray) -> Sequence[str]:
        """Of a prefix of whole blocks, true in [layers, blocks], that a request with FOLLOWING more tokens will fetch."""
        if self._policy.codec.kv != AUTO or self._way.moves_whole_handles:
            return ("raw" if self._way.moves_whole_handles else self._policy.codec.kv,) * cache.shape.layers
        self.measure(cache, *np.argwhere(blocks)[0].tolist())
        layer_s, layers = self._layer_s(FOLLOWING, cache), range(cache.shape.layers)
        if layer_s is None or self._costs.bytes_per_s is None:
            return self._unplanned(cache)
        coming = [Coming(cache.bytes_of(_only(layer, blocks)), layer * layer_s) for layer in layers]
        return choose(coming, self._s_per_byte(self._worth(cache.bytes_of(blocks), {})), self._costs.round_trip_s, layer_s)

    def measure(self, cache: KVCache, layer: int, block: int) -> None:
        """Measures all codecs of the policy on a resident block. With AUTO one that cannot hold its values counts as raw."""
        for codec in self._policy.kv_codecs:
            if codec == "raw":
                continue
            try:
                self._costs.learn_codec(codec, self._transfer.measure(cache, layer, block, codec))
            except CodecError:
                if self._policy.codec.kv != AUTO:
                    raise
                self._costs.codecs[codec] = CodecSpeed()

    def _fixed(self, live: Live, cache: KVCache, blocks: np.ndarray) -> Sequence[str] | None:
        """One codec for all layers, which is chosen once for each handle, by one of its blocks; None with AUTO, whose codecs are measured
        then."""
        codec = self._policy.codec.kv
        if self._way.moves_whole_handles or codec == "raw":  # an opaque object crosses raw
            return ("raw",) * cache.shape.layers
        if live.codec is None:
            self.measure(cache, *np.argwhere(blocks)[0].tolist())
            live.codec = codec if codec == AUTO else self._way.codec_of(codec, self._costs)
        return None if codec == AUTO else (live.codec,) * cache.shape.layers

    def _unplanned(self, cache: KVCache) -> Sequence[str]:
        exact = [codec for codec in self._policy.kv_codecs if codec_named(codec).exact]
        return (self._costs.quickest(exact),) * cache.shape.layers

    def _layer_s(self, tokens: int, cache: KVCache) -> float | None:
        """Seconds of one layer in a pass of `tokens`; None if no such pass was timed."""
        pass_s = self._costs.recompute_s([tokens])
        return None if pass_s is None else pass_s / cache.shape.layers

    def _worth(self, tensor_bytes: int, others: Mapping[str, int]) -> list[str]:
        """The codecs for `tensor_bytes` that cross beside `others`, by codec, without lossy ones that save less than LEAST_GAIN of all."""
        ratios = {codec: speed.ratio for codec, speed in self._costs.codecs.items()}
        fixed = sum(nbytes / ratios.get(codec, 1.0) for codec, nbytes in others.items())
        before, names = fixed + tensor_bytes, list[str]()
        for codec in self._policy.kv_codecs:
            payload = fixed + tensor_bytes / ratios.get(codec, 1.0)
            if codec_named(codec).exact or payload < (1 - LEAST_GAIN) * before:
                names.append(codec)
                before = min(before, payload)
        return names

    def _s_per_byte(self, names: Sequence[str], sent: bool = False) -> dict[str, float]:
        of = self._costs.sent_s_per_byte if sent else self._costs.fetched_s_per_byte
        return {codec: of(codec) or 0.0 for codec in names}

    def _fetched_s(self, tensor_bytes: Mapping[str, int]) -> float:
        return sum(nbytes * (self._costs.fetched_s_per_byte(codec) or 0.0) for codec, nbytes in tensor_bytes.items())


def _only(layer: int, blocks: np.ndarray) -> np.ndarray:
    """`blocks` of one layer."""
    own = np.zeros_like(blocks)
    own[layer] = blocks[layer]
    return own


def _by_layer(cache: KVCache, chosen: Mapping[int, str]) -> Sequence[str]:
    """A codec for each layer of the model: of layers that are not saved, raw, which nobody reads."""
    return [chosen.get(layer, "raw") for layer in range(cache.shape.layers)]
