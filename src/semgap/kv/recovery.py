"""What happens to KV blocks under pressure: eviction, and the policies by which a step gets back what it misses.

`LiveCaches` holds the handles of one session. `forward` is the one way in which tokens run over a handle: it restores what the step
misses (`reload`, `recompute`, `delta`, or `auto`, the cheapest of them), and falls back to a recompute where a restore fails.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from semgap.codecs.gpu_clock import Clock
from semgap.kv.arrivals import Arrivals, Stall, pin_thread
from semgap.kv.blocks import KVBudgetError, KVCache, KVPool
from semgap.kv.handles import Fed, Live, Recovered, UnknownHandle
from semgap.kv.host_shadow import KVHostShadow
from semgap.kv.restore_costs import Costs
from semgap.kv.shadow import Moved, Shadow, ShadowError, measure_codec, warm_up
from semgap.policy import Policy
from semgap.wire.ledger import Ledger

OVERLAP_FROM_S = 1.5e-3
"""A fetch that is predicted to take less is done in one go before the step: handing it to another thread, which places blocks out of the
computing core's reach, costs a step more than it hides (0.9 ms against 0.6 ms for 0.8 MB of raw blocks over loopback)."""


OVERLAP_FROM_ON_GPU_S = 0.5e-3
"""The same on a GPU, where blocks are placed by copy engines and a stream of their own, so that the thread takes nothing from what
computes. What is left is the hand-over to the thread, and that a step with a miss is launched layer by layer: tens of microseconds each,
derived, not measured. Copies out of pinned memory (55 GB/s, so 10 MB in 0.2 ms) stay below it, fetches over a network are above it."""


_FINAL = ("fenced", "layout", "version", "auth", "role")  # faults of a KV host that a recompute would hide


Run = Callable[[np.ndarray, KVCache], torch.Tensor]
"""A forward pass: tokens (n,) after what a cache holds -> final hidden states (n, hidden). The executor's."""


class RecoveryError(ValueError):
    """Blocks that a step needs cannot be had. The handle stays as it was. `code` travels in error frames."""

    code = "recovery"


class LiveCaches:
    """The handles of one session over one pool, and the shadow of what is not in it. `shadow` is None where nothing is ever saved.

    Blocks that come back while layers compute are received by a thread of its own, on cores `io_cpus` (none: those of the process);
    those that are predicted to be here within `overlap_from_s` (None: what the device's kind makes of it) are waited for.
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
    ) -> None:
        self.pool, self.shadow = pool, shadow
        self._io = ThreadPoolExecutor(1, "kv-io", pin_thread, (tuple(io_cpus),))
        usual_s = OVERLAP_FROM_ON_GPU_S if pool.device.type == "cuda" else OVERLAP_FROM_S
        self._overlap_from_s = usual_s if overlap_from_s is None else overlap_from_s
        self._passes: list[tuple[int, Clock]] = []  # tokens, and their pass, whose time on a GPU is not known yet
        self._policy, self._run, self._ledger = policy, run, ledger
        self._live: dict[int, Live] = {}
        self._uses = itertools.count(1)
        self._numbers = itertools.count(1)
        self._codec_of: dict[bytes, str] = {}
        self.costs = Costs()
        self._warm_up()
        if policy.recovery in ("delta", "auto") and shadow is not None:
            self.costs.round_trip_s, bandwidth = shadow.probe()
            self.costs.learn("bytes_per_s", bandwidth)

    def open(self, request: int) -> Live:
        """A new, empty handle. KVBudgetError where the pool has no room for it beside the handle in use."""
        room, pressed = Recovered(None, None), self.pool.free_slabs < self.pool.shape.layers
        self._marks = (self._bytes(), self._ledger.copied)
        with self._stall(room):
            live = Live(next(self._numbers), self._new_cache(), request, os.urandom(16))
        if pressed:
            self._count(live, room)
            live.room = room
        return self._add(live)

    def get(self, number: int) -> Live:
        """The handle of that number; UnknownHandle."""
        if number not in self._live:
            raise UnknownHandle(f"handle {number} is not open in this session; it was released or never given")
        return self._live[number]

    def release(self, number: int) -> None:
        """Forgets a handle, its blocks here and in the shadow."""
        live = self.get(number)
        del self._live[number]
        live.cache.release()
        self._codec_of.pop(live.kv_id, None)
        if self.shadow is not None:
            self.shadow.forget(live.kv_id)

    def close(self) -> None:
        """Forgets everything here; what a KV host holds stays for whoever opens it next."""
        for live in self._live.values():
            live.cache.release()
        self._live.clear()
        self._io.shutdown()
        if self.shadow is not None:
            self.shadow.close()

    def rewind(self, live: Live, position: int) -> None:
        """Drops what lies beyond `position`. ValueError for one that the handle does not hold."""
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

    def forward(self, live: Live, tokens: np.ndarray) -> tuple[torch.Tensor, Recovered | None]:
        """Final hidden states of `tokens` after what the handle holds, with all of it back in its place; None where nothing was missing
        and no other handle had to make room.

        RecoveryError where it cannot be had back: the handle stands at its old position, and misses what it missed.
        """
        live.used = next(self._uses)
        position = live.cache.filled
        recovered, live.room = live.room, None
        try:
            if live.cache.missing.any():
                hidden, recovered = self._run_with_missing(live, tokens)
            else:
                self._make_room(len(live.cache.without_slab()), live)  # of a handle that gave way before it held anything
                live.cache.admit()
                hidden = self._run_timed(tokens, live.cache)
        except BaseException:
            live.cache.truncate(position)
            live.cache.blank_missing()
            raise
        live.fed.append(Fed(np.array(tokens), len(tokens)))
        return hidden, recovered

    def is_whole(self, live: Live) -> bool:
        """Its next step has nothing to bring back, no room to make, and none to account for."""
        return live.room is None and not live.cache.missing.any() and not live.cache.without_slab()

    def fed(self, live: Live, token: int, took_s: float) -> None:
        """Takes note of a step that ran over a whole handle beside `forward`."""
        live.used = next(self._uses)
        live.fed.append(Fed(np.array([token]), 1))
        self.costs.learn_pass(1, took_s)

    def restore(self, live: Live) -> Recovered | None:
        """Brings back what is missing, and waits for it; None where nothing is."""
        live.used = next(self._uses)
        if not live.cache.missing.any():
            return None
        try:
            recovered, arriving = self._begin(live)
            with self._stall(recovered):
                self._bring(live, arriving)
        except ShadowError as error:
            self._fall_back(live, recovered, error)
        self._count(live, recovered)
        return recovered

    def evict(self, live: Live, layers: Sequence[int]) -> tuple[int, Moved]:
        """Takes layers of a handle off the device: saves what is dirty, drops the rest. Gives the slabs given back, and what was saved.

        Under `reload` all of the handle's dirty blocks are saved: a runtime that sees one object can save and load just that.
        ValueError for layers that the model has not.
        """
        count = live.cache.shape.layers
        wrong = [layer for layer in layers if not 0 <= layer < count]
        if wrong or len(set(layers)) != len(layers):
            raise ValueError(f"layers {list(layers)[:8]} of a model of {count}; name layers 0..{count - 1}, each once")
        held = [layer for layer in layers if live.cache.layers[layer].number is not None]
        moved = self._save(live, None if self._policy.recovery == "reload" else held)
        for layer in held:
            live.cache.drop(layer)
        return len(held), moved

    def flush(self, live: Live) -> None:
        """Saves in the KV host, where another worker can open it, all that is here and not there (any more).

        RecoveryError, or ValueError without a KV host.
        """
        host = self._kv_host()
        if not live.cache.filled:
            raise ValueError(f"handle {live.number} holds nothing yet")
        try:
            host.look_again(live.kv_id, live.cache)
        except ShadowError as error:
            raise RecoveryError(f"handle {live.number} could not be saved: {error}") from error
        self._save(live, None, required=True)

    def attach(self, kv_id: bytes, request: int, tokens: np.ndarray) -> tuple[Live, int]:
        """A handle over what the KV host holds under `kv_id`, of which this session is the only writer from now on; and its missing blocks.

        Where this session held it before, only blocks that are newer there are missing. `tokens` are all that it stands for, so that
        it can be recomputed, and blocks that were computed from others do not count; their shapes are not known any more, so that a
        replay is one prefill. ShadowError where it cannot be had.
        """
        host = self._kv_host()
        if not 0 < len(tokens) <= self.pool.shape.max_length:
            raise ValueError(f"{len(tokens)} tokens came for a cache of up to {self.pool.shape.max_length} positions")
        positions, here = host.take_over(kv_id, tokens)
        before = next((live for live in self._live.values() if live.kv_id == kv_id), None)
        if before is None:
            live, here = Live(next(self._numbers), self._new_cache(), request, kv_id), np.zeros(positions.shape, dtype=bool)
        else:
            live = before
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
        self._make_room(self.pool.shape.layers, None)
        return KVCache(self.pool)

    def _make_room(self, slabs: int, keep: Live | None) -> None:
        """Frees slabs of the least recently used handles but `keep`, the first layers first, until so many are free."""
        others = sorted((live for live in self._live.values() if live is not keep), key=lambda live: live.used)
        for live in others:
            lacking = slabs - self.pool.free_slabs
            if lacking <= 0:
                return
            held = [index for index, layer in enumerate(live.cache.layers) if layer.number is not None]
            self.evict(live, held[:lacking])
        if slabs > self.pool.free_slabs:
            raise KVBudgetError(f"{slabs} slabs are needed and {self.pool.free_slabs} of the KV pool can be freed; raise kv_budget")

    def _run_with_missing(self, live: Live, tokens: np.ndarray) -> tuple[torch.Tensor, Recovered]:
        position = live.cache.filled
        overlaps = self._overlaps(live)
        recovered, arriving = self._begin(live)
        try:
            if recovered.how == "delta" and overlaps:
                hidden = self._run_over(live, tokens, arriving, recovered)
            else:
                with self._stall(recovered):
                    self._bring(live, arriving)
                hidden = self._run(tokens, live.cache)
        except ShadowError as error:
            live.cache.truncate(position)
            self._fall_back(live, recovered, error)
            hidden = self._run(tokens, live.cache)
        self._count(live, recovered)
        return hidden, recovered

    def _bring(self, live: Live, arriving: Iterator[int]) -> None:
        """Consumes a fetch in one go, or a recompute; what follows on the current stream comes after it."""
        for _ in arriving:
            pass
        live.cache.settle()

    def _run_over(self, live: Live, tokens: np.ndarray, arriving: Iterator[int], recovered: Recovered) -> torch.Tensor:
        """Runs tokens while blocks are on their way: each layer waits for its own alone."""
        layers = np.flatnonzero(live.cache.missing.any(axis=1)).tolist()
        arrivals = Arrivals(self._io, layers, arriving, live.cache)
        live.cache.awaited = arrivals.wait
        try:
            hidden = self._run(tokens, live.cache)
        except BaseException:
            if self.shadow is not None:
                arrivals.give_up(self.shadow)
            raise
        finally:
            live.cache.awaited = None
        arrivals.end()
        recovered.stall_ns += arrivals.idle_ns()
        return hidden

    def _begin(self, live: Live) -> tuple[Recovered, Iterator[int]]:
        """Chooses how to restore, makes room for it, and asks for the blocks; they arrive as the second is consumed."""
        cache = live.cache
        how, predicted_s, reason = self._choose(live)
        recovered = Recovered(how, how, cache.bytes_of(cache.missing))
        recovered.predicted_ns = None if predicted_s is None else int(1e9 * predicted_s)
        recovered.fallback = reason
        if reason:
            self._ledger.fallbacks.append(reason)
        self._marks = (self._bytes(), self._ledger.copied)
        try:
            with self._stall(recovered):
                self._make_room(len(cache.without_slab()), live)
                cache.admit()
                if how == "recompute":
                    return recovered, self._recomputed(live)
                assert self.shadow is not None
                wanted = cache.missing if how == "delta" else (cache.counts > 0) & (cache.saved >= cache.counts)
                arriving = self.shadow.fetch(live.kv_id, cache, wanted.copy())
                cache.missing |= wanted  # what is being overwritten is not to be read either, should this end halfway
                return recovered, arriving
        except ShadowError as error:
            return self._fall_back(live, recovered, error), iter(())

    def _choose(self, live: Live) -> tuple[str, float | None, str | None]:
        """(how, predicted seconds where the cost model chose, why the policy's own way cannot be gone)."""
        cache, policy = live.cache, self._policy
        lost = cache.missing & (cache.saved < cache.counts)
        if policy.recovery == "recompute":
            return "recompute", None, None
        if self.shadow is None or lost.any():
            why = f"{int(lost.sum())} missing blocks of handle {live.number} were never saved"
            if not policy.fallback:
                raise RecoveryError(f"{why}, and the mode says fallback: false")
            return "recompute", None, why
        if policy.recovery != "auto":
            return policy.recovery, None, None
        predicted = self._predicted_s(live)
        how = min(predicted, key=lambda name: predicted[name])
        return how, predicted[how], None

    def _overlaps(self, live: Live) -> bool:
        """The missing blocks take long enough to fetch that computing meanwhile pays; also where that is not known."""
        return self._predicted_s(live).get("delta", math.inf) >= self._overlap_from_s

    def _predicted_s(self, live: Live) -> dict[str, float]:
        """Seconds that each way that can be gone would take, as far as it is known."""
        self._learn_passes()
        cache, costs = live.cache, self.costs
        coded = self._codec_of.get(live.kv_id, "raw") != "raw"
        ratio = (costs.codec_ratio or 1.0) if coded else 1.0
        ways = {"delta": cache.bytes_of(cache.missing)}
        if not cache.dirty.any() and not coded:
            ways["reload"] = cache.bytes_of(np.broadcast_to(cache.counts > 0, cache.missing.shape))
        predicted = {how: costs.fetch_s(nbytes / ratio, nbytes if coded else 0) for how, nbytes in ways.items()}
        exact = self._policy.replays_exactly
        predicted["recompute"] = costs.recompute_s([len(fed.tokens) for fed in live.fed] if exact else [cache.filled])
        return {how: seconds for how, seconds in predicted.items() if seconds is not None}

    def _recomputed(self, live: Live) -> Iterator[int]:
        """Runs again all that the handle was fed: in one prefill, or in the original shapes. Gives no layer.

        Should that fail, the handle stands at its old position, and misses everything.
        """
        position, saved = live.cache.filled, live.cache.saved.copy()
        live.cache.clear()
        try:
            self._replay(live)
        except BaseException:
            live.cache.stand_for(position, saved, np.zeros(saved.shape, dtype=bool))
            raise
        yield from ()

    def _replay(self, live: Live) -> None:
        if self._policy.replays_exactly:
            for fed in live.fed:
                begin = live.cache.filled
                self._run(fed.tokens, live.cache)
                live.cache.truncate(begin + fed.kept)
        else:
            self._run_timed(live.tokens(), live.cache)

    def _run_timed(self, tokens: np.ndarray, cache: KVCache) -> torch.Tensor:
        """A forward pass of which `costs` learns what it took; on a GPU later, so that the host need not wait for it here."""
        clock = Clock(self.pool.device)
        hidden = self._run(tokens, cache)
        clock.stop()
        self._passes.append((len(tokens), clock))
        self._learn_passes()
        return hidden

    def _learn_passes(self) -> None:
        while self._passes and self._passes[0][1].is_done():
            tokens, clock = self._passes.pop(0)
            self.costs.learn_pass(tokens, clock.took_ns() / 1e9)

    def _stall(self, recovered: Recovered) -> Stall:
        return Stall(recovered, self.pool.device)

    def _warm_up(self) -> None:
        """Compiles what codec.kv runs on a GPU, before any step is timed."""
        if self.pool.device.type == "cuda" and self._policy.recovery in ("delta", "auto") and self.shadow is not None:
            warm_up(self.pool, self._policy.codec.kv)

    def _fall_back(self, live: Live, recovered: Recovered, error: ShadowError) -> Recovered:
        """A restore failed: recomputes all, and says so. RecoveryError where the mode does not allow it."""
        live.cache.blank_missing()
        if not self._may_fall_back(error):
            raise RecoveryError(f"handle {live.number} could not be restored: {error}") from error
        recovered.how, recovered.fallback = "recompute", f"{error.code}: {error}"
        self._ledger.fallbacks.append(recovered.fallback)
        with self._stall(recovered):
            live.cache.admit()
            for _ in self._recomputed(live):
                pass
        return recovered

    def _save(self, live: Live, layers: Sequence[int] | None, required: bool = False) -> Moved:
        """Saves the dirty blocks of some layers, or of all. Where that fails they are lost, unless the mode forbids a recompute."""
        cache = live.cache
        if self.shadow is None:
            return Moved()
        blocks = cache.dirty
        if layers is not None:
            blocks[[layer for layer in range(len(blocks)) if layer not in set(layers)]] = False
        if not blocks.any():
            return Moved()
        try:
            return self.shadow.save(live.kv_id, cache, blocks, self._codec(live, blocks), live.tokens())
        except ShadowError as error:
            if required or not self._may_fall_back(error):
                raise RecoveryError(f"handle {live.number} could not be saved: {error}") from error
            self._ledger.fallbacks.append(f"{error.code}: {error}")
            return Moved()

    def _codec(self, live: Live, blocks: np.ndarray) -> str:
        """The codec that blocks are saved in: reload's are raw; auto takes the mode's where it pays on this link."""
        policy = self._policy
        if policy.recovery == "reload":
            return "raw"
        if policy.codec.kv == "raw":
            return "raw"
        if live.kv_id not in self._codec_of:
            layer, block = np.argwhere(blocks)[0].tolist()
            ratio, decode_bytes_per_s = measure_codec(live.cache, layer, block, policy.codec.kv)
            self.costs.learn("codec_ratio", ratio)
            self.costs.learn("decode_bytes_per_s", decode_bytes_per_s)
            pays = policy.recovery != "auto" or self.costs.codec_pays()
            self._codec_of[live.kv_id] = policy.codec.kv if pays else "raw"
        return self._codec_of[live.kv_id]

    def _may_fall_back(self, error: ShadowError) -> bool:
        """The mode allows it, and the fault is none that a recompute would hide: another writer, or another meaning of the blocks."""
        return self._policy.fallback and error.code not in _FINAL

    def _count(self, live: Live, recovered: Recovered) -> None:
        """What moved since the restore began, and what it tells of the link."""
        (saved, fetched), copied = self._marks
        saved_now, fetched_now = self._bytes()
        recovered.saved_network_bytes = max(0, saved_now - saved)
        recovered.fetched_network_bytes = max(0, fetched_now - fetched)
        recovered.copied_bytes = self._ledger.copied - copied
        moved = recovered.fetched_network_bytes or recovered.copied_bytes
        if recovered.how == "reload" and moved and recovered.stall_ns:
            self.costs.learn("bytes_per_s", moved / (recovered.stall_ns / 1e9))

    def _bytes(self) -> tuple[int, int]:
        return (0, 0) if self.shadow is None else self.shadow.network_bytes
