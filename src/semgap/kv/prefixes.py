"""New handles that begin with what the KV host knows of their tokens, and the publishing of what a handle holds."""

from __future__ import annotations

import numpy as np

from semgap.kv.arrivals import stall
from semgap.kv.handles import Fed, Live, Recovered, RecoveryError
from semgap.kv.pool import BLOCK
from semgap.kv.prefix_shadow import PrefixShadow
from semgap.kv.prefix_ways import prefix_ways
from semgap.kv.restoring import LATE, Restorer, Restoring, longest_wait_s
from semgap.kv.shadow import ShadowError
from semgap.policy import Policy
from semgap.tensors import Array
from semgap.wire.messages import PrefixFound


class Prefixes:
    """Runs the first tokens of new handles: finds their longest known prefix in the KV host, and takes the policy's way to it.

    `restorer` has that way, and `shadow` as its own. A failure turns into computing all, and says so; RecoveryError if the mode does not
    allow that.
    """

    def __init__(self, restorer: Restorer, shadow: PrefixShadow, policy: Policy) -> None:
        assert restorer.codecs is not None
        self._restorer, self._shadow, self._policy, self._codecs = restorer, shadow, policy, restorer.codecs
        self._ways = prefix_ways(policy)

    def forward(self, live: Live, tokens: np.ndarray, room: Recovered | None = None) -> tuple[Array, Recovered]:
        """Final hidden states of `tokens` without those of a fetched prefix, and the record of the step; `room`: of room made for it."""
        recovered, moved_before = Recovered(), self._restorer.moved()
        recovered.how = recovered.planned = self._ways["recompute"].name
        with stall(recovered, self._restorer.device):
            found = self._find(tokens, recovered)
        if not found.blocks:
            hidden = self._compute(live, tokens)
            self._measure_codec(live)
        else:
            hidden = self._begin(live, tokens, found, recovered)
        self._restorer.note_moved(recovered, moved_before)
        return hidden, recovered if room is None else recovered.after(room)

    def publish(self, live: Live) -> tuple[int, int]:
        """Keeps a handle's whole blocks by content; gives how many can be found now, and how many there are. RecoveryError."""
        cache = live.cache
        whole = np.broadcast_to(cache.counts == BLOCK, cache.missing.shape)
        if not whole.any():
            return 0, 0
        try:
            moved = self._shadow.save(live.kv_id, cache, whole, self._codecs.published(cache, whole), live.tokens())
        except ShadowError as error:
            raise RecoveryError(f"handle {live.number} could not be published: {error}") from error
        return moved.blocks, cache.filled // BLOCK

    def close(self) -> None:
        """Ends the thread and the link."""
        self._restorer.close()

    def _find(self, tokens: np.ndarray, recovered: Recovered) -> PrefixFound:
        try:
            return self._shadow.find(tokens[:-1])  # the last one is computed: its logits are wanted
        except ShadowError as error:
            if not self._restorer.may_fall_back(error):
                raise RecoveryError(f"no prefix could be looked for: {error}") from error
            self._say(recovered, f"{error.code}: {error}")
            return PrefixFound()

    def _begin(self, live: Live, tokens: np.ndarray, found: PrefixFound, recovered: Recovered) -> Array:
        """Runs `tokens` over a handle whose first blocks are to be fetched, if that pays."""
        cache, costs, positions = live.cache, self._restorer.costs, found.blocks * BLOCK
        cache.expect(positions)
        live.payload_bytes, live.coming = found.payload_bytes, len(tokens) - positions
        way, predicted_s = self._restorer.way.pick(live, costs)
        fetch_s = (way if way.fetches else self._ways["fetch_blocks"]).predicted_s(live, costs)
        compute_s = self._ways["recompute"].predicted_s(live, costs)
        recovered.planned, recovered.missing_bytes = way.name, cache.bytes_of(cache.missing)
        recovered.predicted_ns, recovered.predicted_fetch_ns, recovered.predicted_recompute_ns = map(_ns, (predicted_s, fetch_s, compute_s))
        slow = self._restorer.too_slow(fetch_s, compute_s) if way.fetches else None
        if slow:
            self._say(recovered, slow)
        if slow or not way.fetches:
            cache.expect(0)
            return self._compute(live, tokens)
        return self._fetch(live, tokens, longest_wait_s(compute_s), recovered)

    def _fetch(self, live: Live, tokens: np.ndarray, patience_s: float, recovered: Recovered) -> Array:
        positions = live.cache.filled
        live.fed = [Fed(np.array(tokens[:positions]), positions)]
        restoring = Restoring(self._restorer, live, patience_s)
        restoring.begin()
        hidden, came = restoring.run(tokens[positions:])
        live.cache.saved[:] = 0  # not in this handle's own shadow
        recovered.how, recovered.fallback, recovered.kv_codecs = came.how, came.fallback, came.kv_codecs
        recovered.stall_ns += came.stall_ns
        if came.fallback and came.fallback.startswith(LATE):
            self._restorer.came_late(live.payload_bytes, patience_s)
        return hidden

    def _compute(self, live: Live, tokens: np.ndarray) -> Array:
        return self._restorer.run_timed(tokens, live.cache)

    def _measure_codec(self, live: Live) -> None:
        """Measures the policy's codecs on a first whole block, once."""
        known = self._restorer.costs.codecs.keys() >= {*self._policy.kv_codecs}
        if not known and not self._restorer.way.moves_whole_handles and live.cache.filled >= BLOCK:
            self._codecs.measure(live.cache, 0, 0)

    def _say(self, recovered: Recovered, why: str) -> None:
        recovered.fallback = why
        self._restorer.ledger.fallbacks.append(why)


def _ns(seconds: float | None) -> int | None:
    return None if seconds is None else int(1e9 * seconds)
