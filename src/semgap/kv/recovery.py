"""The handles of a session, and what happens to them under pressure: eviction, and recovery of the blocks that a step misses.

`LiveCaches.forward` is the only way to run tokens over a handle. It restores missing blocks first (restoring.py), by the policy's way:
`reload`, `recompute`, `delta`, or `auto`, the cheapest of them (ways.py).
"""

import itertools
import os
from collections.abc import Sequence

import numpy as np

from semgap.kv.arrivals import stall
from semgap.kv.blocks import KVCache
from semgap.kv.handles import Fed, Live, Recovered, RecoveryError, TooManyHandles, UnknownHandle
from semgap.kv.host_shadow import KVHostShadow
from semgap.kv.pool import KVBudgetError, KVPool
from semgap.kv.restoring import Restorer, Restoring, Run
from semgap.kv.shadow import Moved, Shadow, ShadowError
from semgap.policy import Policy
from semgap.tensors import Array
from semgap.wire.ledger import Ledger


class LiveCaches:
    """The handles of one session over one pool. `shadow` keeps the blocks that are not in the pool; None if nothing is ever saved.

    A thread on cores `io_cpus` (empty: those of the process) receives blocks while layers compute. Fetches with a prediction shorter than
    `overlap_from_s` (None: the device's usual limit) are waited for instead. At most `most_handles` (None: any number) are open at a time.
    """

    def __init__(
        self,
        pool: KVPool,
        policy: Policy,
        shadow: Shadow | None,
        run: Run,
        ledger: Ledger,
        io_cpus: Sequence[int] = (),
        overlap_from_s: float | None = None,
        most_handles: int | None = None,
    ) -> None:
        self.pool, self.shadow, self._most_handles = pool, shadow, most_handles
        self.restorer = Restorer(pool, policy, shadow, run, ledger, io_cpus, overlap_from_s)
        self._live: dict[int, Live] = {}
        self._uses = itertools.count(1)
        self._numbers = itertools.count(1)

    def open(self, request: int) -> Live:
        """A new, empty handle. KVBudgetError if the pool has no room for it beside the handle in use; TooManyHandles."""
        pressed = self.pool.free_slabs < self.pool.shape.layers
        room, moved_before = Recovered(None, None), self.restorer.moved()
        with stall(room, self.pool.device):
            live = Live(next(self._numbers), self._new_cache(), request, os.urandom(16))
        if pressed:
            self.restorer.note_moved(room, moved_before)
            live.room = room
        return self._add(live)

    def get(self, number: int) -> Live:
        """The handle of that number. UnknownHandle."""
        if number not in self._live:
            raise UnknownHandle(f"handle {number} is not open in this session; it was released or never given")
        return self._live[number]

    def release(self, number: int) -> None:
        """Drops a handle and its blocks, here and in the shadow."""
        live = self.get(number)
        del self._live[number]
        live.cache.release()
        if self.shadow is not None:
            self.shadow.forget(live.kv_id)

    def close(self) -> None:
        """Drops everything here. A KV host keeps its blocks for the next session that attaches them."""
        for live in self._live.values():
            live.cache.release()
        self._live.clear()
        self.restorer.close()

    def rewind(self, live: Live, position: int) -> None:
        """Drops all beyond `position`. ValueError for a position that the handle does not hold."""
        if not 0 < position <= live.cache.filled:
            raise ValueError(f"handle {live.number} holds {live.cache.filled} positions, the client says {position}")
        excess = live.cache.filled - position
        live.cache.truncate(position)
        while excess:
            last = live.fed[-1]
            cut = min(excess, last.kept)
            last.kept -= cut
            excess -= cut
            if not last.kept:
                live.fed.pop()

    def forward(self, live: Live, tokens: np.ndarray) -> tuple[Array, Recovered | None]:
        """Final hidden states of `tokens` after the handle's contents. The record is None if no block was missing and no other handle made
        room.

        After a RecoveryError the handle stands at its old position and misses the same blocks.
        """
        live.used = next(self._uses)
        position = live.cache.filled
        recovered, live.room = live.room, None
        try:
            if live.cache.is_whole:
                hidden = self.restorer.run_timed(tokens, live.cache)
            elif live.cache.missing.any():
                hidden, recovered = self._restoring(live).run(tokens)
            else:
                self._admit(live)  # another handle took its slabs before it held anything
                hidden = self.restorer.run_timed(tokens, live.cache)
        except BaseException:
            live.cache.truncate(position)
            live.cache.blank_missing()
            raise
        live.fed.append(Fed(np.array(tokens), len(tokens)))
        return hidden, recovered

    def is_whole(self, live: Live) -> bool:
        """True if its next step has nothing to restore, no room to make, and no room to account for."""
        return live.room is None and live.cache.is_whole

    def fed(self, live: Live, token: int, took_s: float) -> None:
        """Notes a step that ran over a whole handle without `forward`."""
        live.used = next(self._uses)
        live.fed.append(Fed(np.array([token]), 1))
        self.restorer.costs.learn_pass(1, took_s)

    def restore(self, live: Live) -> Recovered | None:
        """Restores missing blocks and waits for them; None if no block is missing."""
        live.used = next(self._uses)
        return self._restoring(live).bring_back() if live.cache.missing.any() else None

    def evict(self, live: Live, layers: Sequence[int]) -> tuple[int, Moved]:
        """Takes layers of a handle off the device: saves dirty blocks, drops the others. Gives the number of freed slabs, and the saved
        blocks.

        Under `reload` it saves all dirty blocks of the handle: a runtime that sees one object can save and load only that. ValueError for
        layers that the model does not have.
        """
        count = live.cache.shape.layers
        wrong = [layer for layer in layers if not 0 <= layer < count]
        if wrong or len(set(layers)) != len(layers):
            raise ValueError(f"layers {list(layers)[:8]} of a model of {count}; name layers 0..{count - 1}, each once")
        held = [layer for layer in layers if live.cache.layers[layer].number is not None]
        moved = self.restorer.save(live, None if self.restorer.way.moves_whole_handles else held)
        for layer in held:
            live.cache.drop(layer)
        return len(held), moved

    def flush(self, live: Live) -> None:
        """Saves in the KV host, for another worker, all blocks that are here and not (or no longer) there.

        RecoveryError, or ValueError without a KV host.
        """
        host = self._kv_host()
        if not live.cache.filled:
            raise ValueError(f"handle {live.number} holds nothing yet")
        try:
            host.look_again(live.kv_id, live.cache)
        except ShadowError as error:
            raise RecoveryError(f"handle {live.number} could not be saved: {error}") from error
        self.restorer.save(live, None, required=True)

    def attach(self, kv_id: bytes, request: int, tokens: np.ndarray) -> tuple[Live, int]:
        """A handle over the KV host's blocks of `kv_id`, with this session as their only writer from now on; and its number of missing
        blocks. If this session held the handle before, only blocks that are newer at the KV host are missing.

        `tokens` are all tokens of the handle, for a recompute; blocks that were computed from other tokens do not count. The shapes of the
        first passes are unknown here, so that a replay is one prefill. ShadowError if the KV host refuses.
        """
        host = self._kv_host()
        if not 0 < len(tokens) <= self.pool.shape.max_length:
            raise ValueError(f"{len(tokens)} tokens came for a cache of 1 to {self.pool.shape.max_length} positions")
        positions, here = host.take_over(kv_id, tokens)
        live = next((live for live in self._live.values() if live.kv_id == kv_id), None)
        if live is None:
            live, here = Live(next(self._numbers), self._new_cache(), request, kv_id), np.zeros(positions.shape, dtype=bool)
        else:
            here = here & live.cache.resident & ~live.cache.dirty
            live.request = request
        live.cache.stand_for(len(tokens), positions, here)
        live.fed = [Fed(np.array(tokens), len(tokens))]
        return self._add(live), int(live.cache.missing.sum())

    def _kv_host(self) -> KVHostShadow:
        if not isinstance(self.shadow, KVHostShadow):
            raise ValueError("this session has no KV host; open it with shadow: kvhost on a worker that was started with --kv-host")
        return self.shadow

    def _add(self, live: Live) -> Live:
        live.used = next(self._uses)
        self._live[live.number] = live
        return live

    def _new_cache(self) -> KVCache:
        if self._most_handles is not None and len(self._live) >= self._most_handles:
            raise TooManyHandles(f"{len(self._live)} handles are open, the most that this session may hold; release one")
        self._make_room(self.pool.shape.layers, None)
        return KVCache(self.pool)

    def _restoring(self, live: Live) -> Restoring:
        """The restoring of one step, with room for its blocks, which are on their way."""
        restoring = Restoring(self.restorer, live)
        with restoring.stall():
            self._admit(live)
        restoring.begin()
        return restoring

    def _admit(self, live: Live) -> None:
        """Gives all layers of a handle a slab."""
        self._make_room(len(live.cache.without_slab()), live)
        live.cache.admit()

    def _make_room(self, slabs: int, keep: Live | None) -> None:
        """Frees slabs until `slabs` are free: of the least recently used handles except `keep`, the first layers first."""
        others = sorted((live for live in self._live.values() if live is not keep), key=lambda live: live.used)
        for live in others:
            lacking = slabs - self.pool.free_slabs
            if lacking <= 0:
                return
            held = [index for index, layer in enumerate(live.cache.layers) if layer.number is not None]
            self.evict(live, held[:lacking])
        if slabs > self.pool.free_slabs:
            raise KVBudgetError(f"{slabs} slabs are needed and {self.pool.free_slabs} of the KV pool can be freed; raise kv_budget")
