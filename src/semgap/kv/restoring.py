"""Saving the blocks of a session's handles, and restoring one step: by the policy's way, or by a recompute if that fails."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import chain

import numpy as np

from semgap.codecs import codec_named
from semgap.codecs.clock import Clock
from semgap.kv.arrivals import Arrivals, pin_thread, stall
from semgap.kv.block_codecs import BlockCodecs
from semgap.kv.blocks import KVCache
from semgap.kv.codec_choice import by_run
from semgap.kv.handles import Live, Recovered, RecoveryError
from semgap.kv.host_shadow import KVHostShadow
from semgap.kv.pool import KVPool
from semgap.kv.restore_costs import Costs
from semgap.kv.shadow import Moved, Shadow, ShadowError
from semgap.kv.ways import Recompute, Way, way_of
from semgap.policy import AUTO, Policy
from semgap.tensors import Array
from semgap.wire.ledger import Ledger

OVERLAP_FROM_S = 1.5e-3
"""A fetch with a shorter prediction is done at once before the step. Handing it to another thread, which places blocks out of reach of the
computing core's cache, costs a step more than it hides (0.9 ms against 0.6 ms for 0.8 MB of raw blocks over loopback)."""

OVERLAP_FROM_ON_GPU_S = 0.5e-3
"""The same on a GPU. Copy engines and a stream of their own place the blocks, so that the thread takes nothing from the computation. What
remains is the hand-over to the thread, and that a step with a miss is launched layer by layer: tens of microseconds each, derived, not
measured. Copies out of pinned memory (55 GB/s, so 10 MB in 0.2 ms) stay below this limit; fetches over a network are above it."""

PATIENCE = 10
"""Blocks that take so many times as long as computing them again are given up: the link is slower than computing, and stays so."""

LEAST_PATIENCE_S = 2.0
UNKNOWN_PATIENCE_S = 10.0  # computing was not timed
LATE = ("late", "deadline")  # of blocks that were not waited for longer
_FINAL = ("fenced", "layout", "version", "auth", "role")  # faults of a KV host that a recompute would hide
Run = Callable[[np.ndarray, KVCache], Array]
"""A forward pass, the executor's: tokens (n,) after the contents of a cache -> final hidden states (n, hidden)."""


def longest_wait_s(compute_s: float | None) -> float:
    """The longest wait for blocks that are computed again in `compute_s` (None: not known)."""
    return UNKNOWN_PATIENCE_S if compute_s is None else max(LEAST_PATIENCE_S, PATIENCE * compute_s)


class Restorer:
    """The means of a session to save blocks and to restore them: its way, its shadow (or None), and the measured costs of both."""

    def __init__(
        self,
        pool: KVPool,
        policy: Policy,
        shadow: Shadow | None,
        run: Run,
        ledger: Ledger,
        io_cpus: Sequence[int],
        overlap_from_s: float | None,
        way: Way | None = None,
    ) -> None:
        self.shadow, self.run, self.ledger, self.device = shadow, run, ledger, pool.device
        self.way, self.recompute = way or way_of(policy), Recompute(policy.replays_exactly)
        self.costs = Costs()
        self.codecs = None if shadow is None else BlockCodecs(policy, self.way, shadow.transfer, self.costs)
        self.io_cpus = tuple(io_cpus)
        self.io = ThreadPoolExecutor(1, "kv-io", pin_thread, (self.io_cpus,))
        self._policy = policy
        usual_s = OVERLAP_FROM_ON_GPU_S if pool.device == "cuda" else OVERLAP_FROM_S
        self._overlap_from_s = usual_s if overlap_from_s is None else overlap_from_s
        self._passes: list[tuple[int, Clock]] = []  # tokens and clock of passes whose time on a GPU is not known yet
        if shadow is not None and (self.way.overlaps or way is not None):
            for codec in policy.kv_codecs:
                shadow.transfer.warm_up(pool, codec)
            self.costs.round_trip_s, bandwidth = shadow.probe()
            self.costs.learn("bytes_per_s", bandwidth)

    def close(self) -> None:
        """Ends the thread and the shadow's session."""
        self.io.shutdown()
        if self.shadow is not None:
            self.shadow.close()

    def save(self, live: Live, layers: Sequence[int] | None) -> Moved:
        """Saves dirty blocks of some layers, or of all (None). A failure loses them; RecoveryError without fallback."""
        try:
            return self.saved(live, live.cache, layers, live.tokens())
        except ShadowError as error:
            self.lose(live, error)
            return Moved()

    def saved(self, live: Live, cache: KVCache, layers: Sequence[int] | None, tokens: np.ndarray, elapsed_s: float | None = None) -> Moved:
        """Saves dirty blocks of a handle's `cache` of `tokens`, of some layers or of all (None). `elapsed_s`: one layer's, which go to
        another worker, so long after their prefill began; None: a later step here misses them. ShadowError.
        """
        if self.shadow is None or self.codecs is None:
            return Moved()
        blocks = cache.dirty
        layers = range(len(blocks)) if layers is None else layers
        blocks[np.setdiff1d(np.arange(len(blocks)), layers)] = False
        if not blocks.any():
            return Moved()
        if elapsed_s is None or self.way.moves_whole_handles:
            by_layer = self.codecs.evicted(live, cache, blocks, layers)
        else:
            by_layer = self.codecs.sent(live, cache, blocks, layers[0], elapsed_s)
        codes = np.array([codec_named(codec).code for codec in by_layer])
        live.codes[blocks] = np.broadcast_to(codes[:, None], blocks.shape)[blocks]
        return self.shadow.save(live.kv_id, cache, blocks, by_layer, tokens)

    def lose(self, live: Live, error: ShadowError) -> str:
        """Notes that blocks could not be saved, and gives the note. RecoveryError if the mode allows no recompute."""
        if not self.may_fall_back(error):
            raise RecoveryError(f"handle {live.number} could not be saved: {error}") from error
        why = f"{error.code}: {error}"
        self.ledger.fallbacks.append(why)
        return why

    def choose(self, live: Live) -> tuple[Way, float | None, str | None]:
        """(the way of a step, predicted seconds if the cost model chose it, the reason if the policy's own way cannot be taken)."""
        self._learn_passes()
        if live.recomputes:
            return self.recompute, None, None
        lost = live.cache.missing & (live.cache.saved < live.cache.counts)
        if not self.way.fetches or (self.shadow is not None and not lost.any()):
            return (*self.way.pick(live, self.costs), None)
        why = f"{int(lost.sum())} missing blocks of handle {live.number} were never saved"
        if not self._policy.fallback:
            raise RecoveryError(f"{why}, and the mode says fallback: false")
        return self.recompute, None, why

    def overlaps(self, way: Way, live: Live) -> bool:
        """True if the fetch takes long enough that computing meanwhile pays, or if its time is unknown."""
        predicted_s = way.predicted_s(live, self.costs) if way.overlaps else 0.0
        return way.overlaps and (predicted_s is None or predicted_s >= self._overlap_from_s)

    def computing_s(self, live: Live) -> float | None:
        """Predicted seconds of computing a handle again; None if passes are not timed."""
        return self.recompute.predicted_s(live, self.costs) if self.way.compares else None

    def patience_s(self, compute_s: float | None) -> float | None:
        """`longest_wait_s`; None if the mode allows no recompute."""
        return longest_wait_s(compute_s) if self._policy.fallback else None

    def too_slow(self, fetch_s: float | None, compute_s: float | None) -> str | None:
        """Why a fetch of these predictions is not begun, or None."""
        patience_s = self.patience_s(compute_s)
        if fetch_s is None or patience_s is None or fetch_s <= patience_s:
            return None
        computed = "" if compute_s is None else f", and all is computed in {compute_s:.2f} s"
        return f"slow: the blocks would take {fetch_s:.1f} s{computed}; no longer than {patience_s:.1f} s are waited for"

    def came_late(self, payload_bytes: float, patience_s: float) -> None:
        """Takes the link for no faster than blocks showed that did not come in time: as many are not waited for again."""
        self.costs.bytes_per_s = payload_bytes / patience_s

    def may_fall_back(self, error: ShadowError) -> bool:
        """True if the mode allows a recompute, and if that would not hide another writer or another meaning of the blocks."""
        return self._policy.fallback and error.code not in _FINAL

    def run_again(self, live: Live) -> None:
        """Runs all tokens of a handle again. If that fails, the handle stands at its old position and misses every block."""
        position, saved = live.cache.filled, live.cache.saved.copy()
        live.cache.clear()
        try:
            if self.recompute.exactly:
                for fed in live.fed:
                    begin = live.cache.filled
                    self.run(fed.tokens, live.cache)
                    live.cache.truncate(begin + fed.kept)
            else:
                self.run_timed(live.tokens(), live.cache)
        except BaseException:
            live.cache.stand_for(position, saved, np.zeros(saved.shape, dtype=bool))
            raise

    def run_timed(self, tokens: np.ndarray, cache: KVCache) -> Array:
        """A forward pass whose time `costs` learns if a choice needs it; on a GPU later, so that the host need not wait for it here."""
        if not (self.way.compares or self._policy.codec.kv == AUTO):
            return self.run(tokens, cache)
        clock = Clock(self.device)
        hidden = self.run(tokens, cache)
        clock.stop()
        self._passes.append((len(tokens), clock))
        self._learn_passes()
        return hidden

    def learn_step(self, tokens: int, clock: Clock, idle_ns: int = 0) -> None:
        """Adds the compute of a step of one token that missed blocks, if codecs are chosen by it: each step of a handle may miss some."""
        if self._policy.codec.kv == AUTO and tokens == 1:  # what follows a prefix tells no prefill of a whole prompt
            self.costs.learn_pass(1, max(1, clock.took_ns() - idle_ns) / 1e9)

    def _learn_passes(self) -> None:
        while self._passes and self._passes[0][1].is_done():
            tokens, clock = self._passes.pop(0)
            self.costs.learn_pass(tokens, clock.took_ns() / 1e9)

    def moved(self) -> np.ndarray:
        """[saved to a KV host, fetched from it, copied in this worker]: bytes so far."""
        return np.array([*(self.shadow.network_bytes if self.shadow is not None else (0, 0)), self.ledger.copied])

    def note_moved(self, recovered: Recovered, before: np.ndarray) -> None:
        """Records the bytes that moved since `before`. A link that broke meanwhile has lost its count."""
        saved, fetched, copied = (self.moved() - before).tolist()
        recovered.saved_network_bytes, recovered.fetched_network_bytes, recovered.copied_bytes = max(0, saved), max(0, fetched), copied


class Restoring:
    """Restores one step, in this order: choose a way, make room under `stall`, `begin`, then either `run` or `bring_back`.

    A failure of the shadow turns it into a recompute; RecoveryError if the mode does not allow that. So does a layer whose blocks come
    later than `patience_s` after they were requested (None: as the restorer's patience is with this handle).
    """

    def __init__(self, restorer: Restorer, live: Live, patience_s: float | None = None) -> None:
        self._restorer, self._live = restorer, live
        self._way, predicted_s, reason = restorer.choose(live)
        compute_s = restorer.computing_s(live)
        self._patience_s = restorer.patience_s(compute_s) if patience_s is None else patience_s
        fetch_s = self._way.predicted_s(live, restorer.costs) if self._way.fetches else None
        if patience_s is None and (slow := restorer.too_slow(fetch_s, compute_s)):
            self._way, predicted_s, reason = restorer.recompute, None, slow
        self._here = live.undecoded if self._way.overlaps else []
        self._overlaps = bool(self._here) or restorer.overlaps(self._way, live)
        live.undecoded = []
        predicted_ns = None if predicted_s is None else int(1e9 * predicted_s)
        missing_bytes = live.cache.bytes_of(live.cache.missing)
        self.recovered = Recovered(self._way.name, self._way.name, missing_bytes, predicted_ns=predicted_ns, fallback=reason)
        if reason:
            restorer.ledger.fallbacks.append(reason)
        self._moved_before = restorer.moved()
        self._arriving: Iterator[int] = iter(())
        self._payload_bytes = 0.0

    def stall(self) -> AbstractContextManager[None]:
        """Adds the time of its block to the record."""
        return stall(self.recovered, self._restorer.device)

    def begin(self) -> None:
        """Requests the blocks; they arrive when `run` or `bring_back` consumes them."""
        cache, shadow = self._live.cache, self._restorer.shadow
        if not self._way.fetches:
            return
        assert shadow is not None
        wanted = self._way.wanted(cache)
        for one in self._here:
            wanted[one.layer, [*one.held]] = False
        self._payload_bytes = self._restorer.costs.payload_bytes(self._live.saved_bytes(wanted))
        try:
            with self.stall():
                patience_s = None if self._overlaps else self._patience_s  # else each layer's wait has it
                self._arriving = self._from_here()
                if wanted.any() or not self._here:
                    self._arriving = chain(self._arriving, shadow.fetch(self._live.kv_id, cache, wanted, patience_s))
                cache.miss(wanted)  # blocks that are being overwritten must not be read either, if this fails midway
        except ShadowError as error:
            self._fall_back(error)

    def _from_here(self) -> Iterator[int]:
        """Decodes what came before the step."""
        shadow = self._restorer.shadow
        return shadow.decoded(self._live.cache, self._here) if isinstance(shadow, KVHostShadow) and self._here else iter(())

    def bring_back(self) -> Recovered:
        """Waits until all blocks are back. Later work on the current stream comes after them."""
        try:
            self._bring()
        except ShadowError as error:
            self._fall_back(error)
        return self._finished()

    def run(self, tokens: np.ndarray) -> tuple[Array, Recovered]:
        """Final hidden states of `tokens`, after all blocks are back, or while they arrive."""
        cache = self._live.cache
        position = cache.filled
        try:
            if self._overlaps:
                hidden = self._run_over(tokens)
            else:
                self._bring()
                clock = Clock(self._restorer.device)
                hidden = self._restorer.run(tokens, cache)
                clock.stop()
                self._restorer.learn_step(len(tokens), clock)
        except ShadowError as error:
            cache.truncate(position)
            self._fall_back(error)
            hidden = self._restorer.run(tokens, cache)
        return hidden, self._finished()

    def _bring(self) -> None:
        with self.stall():
            if self._way.fetches:
                for _ in self._arriving:
                    pass
            elif self._live.cache.missing.any():
                self._restorer.run_again(self._live)
            self._live.cache.settle()

    def _run_over(self, tokens: np.ndarray) -> Array:
        """Runs tokens while blocks arrive: each layer waits for its own blocks only."""
        cache = self._live.cache
        arrivals, shadow = self._arrivals()
        cache.awaited = arrivals.wait
        clock = Clock(self._restorer.device)
        try:
            hidden = self._restorer.run(tokens, cache)
        except BaseException:
            arrivals.give_up(shadow)
            raise
        finally:
            cache.awaited = None
        clock.stop()
        arrivals.end()
        idle_ns = arrivals.idle_ns()
        self.recovered.stall_ns += idle_ns
        self._restorer.learn_step(len(tokens), clock, idle_ns)
        return hidden

    def _arrivals(self) -> tuple[Arrivals, Shadow]:
        """The missing blocks on their way in another thread, and the shadow that they come from."""
        cache, shadow = self._live.cache, self._restorer.shadow
        assert shadow is not None
        layers: list[int] = np.flatnonzero(cache.missing.any(axis=1)).tolist()
        return Arrivals(self._restorer.io, layers, self._arriving, cache, self._patience_s), shadow

    def _fall_back(self, error: ShadowError) -> None:
        """Recomputes all after a restore that failed, and records the reason."""
        cache, restorer, recovered = self._live.cache, self._restorer, self.recovered
        cache.blank_missing()
        if not restorer.may_fall_back(error):
            raise RecoveryError(f"handle {self._live.number} could not be restored: {error}") from error
        if error.code in LATE and self._patience_s is not None:
            restorer.came_late(self._payload_bytes, self._patience_s)
        self._way, self._overlaps = restorer.recompute, False
        recovered.how, recovered.fallback = self._way.name, f"{error.code}: {error}"
        restorer.ledger.fallbacks.append(recovered.fallback)
        with self.stall():
            cache.admit()
            restorer.run_again(self._live)

    def _finished(self) -> Recovered:
        """The record, with the bytes that moved. A fetch that the step waited for tells the link's bandwidth."""
        recovered, shadow = self.recovered, self._restorer.shadow
        if self._way.fetches and shadow is not None:
            recovered.kv_codecs = by_run(shadow.came) or None
        self._restorer.note_moved(recovered, self._moved_before)
        moved = recovered.fetched_network_bytes or recovered.copied_bytes
        if self._way.fetches and not self._way.overlaps and moved and recovered.stall_ns:
            self._restorer.costs.learn("bytes_per_s", moved / (recovered.stall_ns / 1e9))
        return recovered
