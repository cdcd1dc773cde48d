"""The handles of a session, and what happens to them under pressure: eviction, and recovery of the blocks that a step misses.

`LiveCaches.forward` is the only way to run tokens over a handle. It restores missing blocks first (restoring.py), by the policy's way:
`reload`, `recompute`, `delta`, or `auto`, the cheapest of them (ways.py).
"""

import itertools
import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from semgap.kv.arrivals import stall
from semgap.kv.blocks import KVCache
from semgap.kv.following import Following
from semgap.kv.handing import Handed, Handing
from semgap.kv.handles import Fed, Live, Recovered, TooManyHandles, UnknownHandle
from semgap.kv.host_shadow import KVHostShadow
from semgap.kv.pool import KVBudgetError, KVPool
from semgap.kv.prefixes import Prefixes
from semgap.kv.restoring import Restorer, Restoring, Run
from semgap.kv.shadow import Moved, Shadow, ShadowError
from semgap.kv.transfer import Undecoded
from semgap.policy import Policy
from semgap.tensors import Array
from semgap.wire.ledger import Ledger


class LiveCaches:
    """The handles of one session over one pool. `shadow` keeps the blocks that are not in the pool; None if nothing is ever saved.

    A thread on cores `io_cpus` (empty: those of the process) receives blocks while layers compute. Fetches with a prediction shorter than
    `overlap_from_s` (None: the device's usual limit) are waited for instead. At most `most_handles` (None: any number) are open at a time.
    `prefixes` (or None: no prefix is known) begin new handles.
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
        prefixes: Prefixes | None = None,
    ) -> None:
        self.pool, self.shadow, self._most_handles = pool, shadow, most_handles
        self.prefixes = prefixes
        self.restorer = Restorer(pool, policy, shadow, run, ledger, io_cpus, overlap_from_s)
        self._live: dict[int, Live] = {}
        self._promised: bytes | None = None  # the name, in the KV host, of the next new handle
        self._handing: tuple[int, Handing] | None = None  # the handle whose prefill goes to the KV host
        self._following: Following | None = None  # a handle that another worker computes for this one
        self._dropped: Recovered | None = None  # the bytes that moved for such handles and in vain, until a handle's record has them
        self._uses = itertools.count(1)
        self._numbers = itertools.count(1)

    def open(self, request: int) -> Live:
        """A new, empty handle. KVBudgetError if the pool has no room for it beside the handle in use; TooManyHandles."""
        self.quiet()
        pressed = self.pool.free_slabs < self.pool.shape.layers
        room, moved_before = Recovered(None, None), self.restorer.moved()
        with stall(room, self.pool.device):
            promised, self._promised = self._promised, None
            live = Live(next(self._numbers), self._new_cache(), request, promised or os.urandom(16), hands_over=promised is not None)
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
        self.quiet()
        live = self.get(number)
        del self._live[number]
        live.cache.release()
        if self.shadow is not None:
            self.shadow.forget(live.kv_id)

    def close(self) -> None:
        """Drops everything, here and in the shadow, but what another worker took over."""
        if self._handing and self.shadow is not None:
            self.shadow.abort()  # or a slow link would hold the end up
            self.quiet()
        if self._following:
            self._following.end()
            self._following = None
        for live in self._live.values():
            live.cache.release()
        self._live.clear()
        if self.prefixes is not None:
            self.prefixes.close()
        self.restorer.close()

    def rewind(self, live: Live, position: int) -> None:
        """Drops all beyond `position`. ValueError for a position that the handle does not hold."""
        self.quiet()
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
        self.quiet()
        live.used = next(self._uses)
        position = live.cache.filled
        recovered, live.room = live.room, None
        try:
            if self.prefixes is not None and not position:
                self._admit(live)
                hidden, recovered = self.prefixes.forward(live, tokens, recovered)
            elif live.hands_over:
                self._admit(live)
                hidden = self._run_handing_over(live, tokens)
            elif live.cache.is_whole:
                hidden = self.restorer.run_timed(tokens, live.cache)
            elif live.cache.missing.any():
                hidden, restored = self._restoring(live).run(tokens)
                recovered = restored if recovered is None else restored.after(recovered)
            else:
                self._admit(live)  # another handle took its slabs before it held anything
                hidden = self.restorer.run_timed(tokens, live.cache)
        except BaseException:
            self.quiet()
            live.cache.truncate(position)
            live.cache.blank_missing()
            if not position:  # nobody knows its number yet
                del self._live[live.number]
                live.cache.release()
            raise
        begun = sum(fed.kept for fed in live.fed) - position  # a prefix that was fetched
        live.fed.append(Fed(np.array(tokens[begun:]), len(tokens) - begun))
        return hidden, recovered

    def _run_handing_over(self, live: Live, tokens: np.ndarray) -> Array:
        """The pass of a handle that another worker is to have: its blocks go to the KV host, under way or with `flush`."""
        handing = Handing(self.restorer, live, tokens, self.restorer.io)
        live.hands_over, self._handing = False, (live.number, handing)
        live.cache.computed = handing.computed
        try:
            return self.restorer.run_timed(tokens, live.cache)
        finally:
            live.cache.computed = None

    def quiet(self) -> None:
        """Waits until no blocks are on their way to or from the KV host. Nothing else may use the shadow before."""
        if self._handing:
            self._handing[1].wait()
        if self._following:
            self._following.stop()

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
        self.quiet()
        live.used = next(self._uses)
        return self._restoring(live).bring_back() if live.cache.missing.any() else None

    def evict(self, live: Live, layers: Sequence[int]) -> tuple[int, Moved]:
        """Takes layers of a handle off the device: saves dirty blocks, drops the others. Gives the number of freed slabs, and the saved
        blocks.

        Under `reload` it saves all dirty blocks of the handle: a runtime that sees one object can save and load only that. ValueError for
        layers that the model does not have.
        """
        self.quiet()
        count = live.cache.shape.layers
        wrong = [layer for layer in layers if not 0 <= layer < count]
        if wrong or len(set(layers)) != len(layers):
            raise ValueError(f"layers {list(layers)[:8]} of a model of {count}; name layers 0..{count - 1}, each once")
        held = [layer for layer in layers if live.cache.layers[layer].number is not None]
        moved = self.restorer.save(live, None if self.restorer.way.moves_whole_handles else held)
        for layer in held:
            live.cache.drop(layer)
        return len(held), moved

    def hand_over(self) -> bytes:
        """Promises the next new handle to another worker; gives its name in the KV host, which drops its blocks if this session ends before
        another one opens them. ValueError without a KV host or with prefixes, ShadowError if that refuses.
        """
        host = self._kv_host()
        if self.prefixes is not None:
            raise ValueError("this session fetches prefixes, which do not go to another worker; open it with prefix: recompute")
        self.quiet()
        self._promised = os.urandom(16)
        host.promise(self._promised)
        return self._promised

    def publish(self, live: Live) -> tuple[int, int]:
        """Keeps a handle's whole blocks in the KV host by their content; gives how many can be found now, and how many there are.

        RecoveryError, or ValueError for a session without prefixes, or for missing blocks.
        """
        if self.prefixes is None:
            raise ValueError("this session fetches no prefixes; open it with prefix: fetch_blocks, fetch_whole or auto")
        self.quiet()
        if live.cache.missing.any():
            raise ValueError(f"handle {live.number} misses blocks; restore it before it is published")
        return self.prefixes.publish(live)

    def flush(self, live: Live) -> Handed:
        """Waits until the KV host has the blocks of a prefill that was to be handed over, or sends them now. ValueError, RecoveryError."""
        if self._handing is None or self._handing[0] != live.number:
            raise ValueError(f"handle {live.number} was not to be handed over, or was already")
        handing, self._handing = self._handing[1], None
        return handing.finish()

    def expect(self, kv_id: bytes, positions: int) -> None:
        """Fetches blocks of `kv_id`, which another worker has promised and will compute, layer by layer as they reach the KV host: those of
        its first `positions`, for `attach`. Anything else that this session does ends that, but for what came; another one drops it.

        ValueError without a KV host, for positions beyond the cache, or if the policy moves whole handles. KVBudgetError, TooManyHandles.
        """
        host = self._kv_host()
        if self.restorer.way.moves_whole_handles or not self.restorer.way.fetches:
            raise ValueError(f"this session's recovery {self.restorer.way.name} fetches no layers; open it with recovery: delta or auto")
        if not 0 < positions <= self.pool.shape.max_length:
            raise ValueError(f"{positions} positions are expected in a cache of 1 to {self.pool.shape.max_length}")
        self.quiet()
        self._follow_no_more()
        live = Live(next(self._numbers), self._new_cache(), 0, kv_id)
        try:
            self._following = Following(self.restorer, host, live, positions)
        except ShadowError as error:  # `attach` asks again
            live.cache.release()
            self.restorer.lose(live, error)

    def _follow_no_more(self) -> None:
        """Drops what is expected; the record of the next handle has the bytes that moved for it. Call `quiet` before."""
        following, self._following = self._following, None
        if following:
            following.end()
            moved = replace(following.stop(), how=None, planned=None, kv_codecs=None)
            self._dropped = moved if self._dropped is None else moved.after(self._dropped)

    def attach(self, kv_id: bytes | None, request: int, tokens: np.ndarray) -> tuple[Live, int]:
        """A handle of `tokens`, all of which are missing here, over the KV host's blocks of `kv_id`, with this session as their only writer
        from now on; and its number of missing blocks. The next pass restores them, or computes them again if `kv_id` is None.

        Blocks that came since `expect` are here already. Blocks that were computed from other tokens do not count. The shapes of the first
        passes are unknown here, so that a replay is one prefill. ShadowError if the KV host refuses and the mode allows no recompute, or if
        a recompute would hide the fault.
        """
        if not 0 < len(tokens) <= self.pool.shape.max_length:
            raise ValueError(f"{len(tokens)} tokens came for a cache of 1 to {self.pool.shape.max_length} positions")
        self.quiet()
        live = self._expected(kv_id, request)
        positions, here = np.zeros(live.cache.missing.shape, dtype=np.int64), np.zeros(live.cache.missing.shape, dtype=bool)
        undecoded: list[Undecoded] = []
        try:
            if kv_id is not None:
                positions = self._kv_host().take_over(kv_id, tokens)
                came, undecoded = self._kv_host().followed(kv_id)
                here = ~live.cache.missing & came
        except ShadowError as error:
            if not self.restorer.may_fall_back(error):
                live.cache.release()
                raise
            self.restorer.ledger.fallbacks.append(f"{error.code}: {error}")
        live.cache.stand_for(len(tokens), positions, here)
        if live.room is not None:  # what came for it
            live.room.missing_bytes = live.cache.bytes_of(live.cache.resident)
        live.fed, live.undecoded = [Fed(np.array(tokens), len(tokens))], undecoded
        return self._add(live), int(live.cache.missing.sum())

    def _expected(self, kv_id: bytes | None, request: int) -> Live:
        """The handle that was expected under this name, with what came of it, or a new one."""
        if self._following and self._following.live.kv_id == kv_id:
            live, came = self._following.live, self._following.stop()
            live.request, live.room, self._following = request, came, None
            return live
        self._follow_no_more()
        return Live(next(self._numbers), self._new_cache(), request, kv_id or os.urandom(16), recomputes=kv_id is None)

    def _kv_host(self) -> KVHostShadow:
        if not isinstance(self.shadow, KVHostShadow):
            raise ValueError("this session has no KV host; open it with shadow: kvhost on a worker that was started with --kv-host")
        return self.shadow

    def _add(self, live: Live) -> Live:
        live.used = next(self._uses)
        if self._dropped is not None:
            live.room = self._dropped if live.room is None else live.room.after(self._dropped)
            self._dropped = None
        self._live[live.number] = live
        return live

    def _new_cache(self) -> KVCache:
        if self._most_handles is not None and len(self._live) + 1 >= self._most_handles:
            self._follow_no_more()  # or its `attach` would make one too many
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
        """Frees slabs until `slabs` are free: of what is expected, then of the least recently used handles except `keep`, the first layers
        first.
        """
        if slabs > self.pool.free_slabs:
            self._follow_no_more()
        others = sorted((live for live in self._live.values() if live is not keep), key=lambda live: live.used)
        for live in others:
            lacking = slabs - self.pool.free_slabs
            if lacking <= 0:
                return
            held = [index for index, layer in enumerate(live.cache.layers) if layer.number is not None]
            self.evict(live, held[:lacking])
        if slabs > self.pool.free_slabs:
            raise KVBudgetError(f"{slabs} slabs are needed and {self.pool.free_slabs} of the KV pool can be freed; raise kv_budget")
