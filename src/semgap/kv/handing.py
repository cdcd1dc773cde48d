"""A prefill whose blocks go to the KV host for another worker: layer by layer while later layers compute, or whole after it."""

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from semgap.kv.blocks import KVCache
from semgap.kv.handles import Live
from semgap.kv.restoring import Restorer
from semgap.kv.shadow import Moved, ShadowError


@dataclass(frozen=True)
class Handed:
    """The blocks of a handle that went to the KV host: tensor and payload bytes, and frame bytes of both directions.

    `sent_ns`: the time of encoding and sending, each layer until the KV host had it; `after_ns`: the part after the prefill.
    `kept`: False if another worker had better compute the cache again; `fallback`: why it has to, if blocks could not be saved.
    """

    moved: Moved = field(default_factory=Moved)
    network_bytes: int = 0
    sent_ns: int = 0
    after_ns: int = 0
    kept: bool = True
    fallback: str | None = None


class Handing:
    """The way of one handle's prefill to the KV host. `computed` is the cache's hook; `finish` waits for all blocks.

    Once a layer cannot be saved nothing more is sent, and `finish` says that the cache is not kept; RecoveryError if the mode allows no
    recompute. So it is with blocks that are waited for longer than the restorer's patience.
    """

    def __init__(self, restorer: Restorer, live: Live, tokens: np.ndarray, io: ThreadPoolExecutor) -> None:
        self._restorer, self._live, self._io = restorer, live, io
        self._tokens = np.concatenate([live.tokens(), tokens])
        self._begin_ns = time.perf_counter_ns()
        self._sending: list[Future[Handed]] = []
        self._kept = restorer.way.hands_over(len(tokens), live.cache, restorer.costs)
        self._streams = self._kept and restorer.way.overlaps
        self._fallback: str | None = None
        self._begun_s = self._computed_s = time.monotonic()
        self._late: ShadowError | None = None

    def computed(self, layer: int) -> None:
        """Sends a layer's blocks, in another thread."""
        self._computed_s = time.monotonic()
        if self._streams:
            self._sending.append(self._io.submit(self._send, self._live.cache.as_of(layer), [layer], self._tokens))

    def wait(self) -> None:
        """Waits until the thread is done with all layers that were computed, or has given up."""
        with self._patience(self._is_sending):
            for each in self._sending:
                each.exception()

    def finish(self) -> Handed:
        """Waits for the layers on their way, and sends the whole cache if they did not go by themselves. RecoveryError."""
        begin_ns = time.perf_counter_ns()
        with self._patience(self._is_sending or not self._streams):
            live, sending = self._live, self._sending
            parts = [each.result() for each in sending] if self._streams else [self._send(live.cache, None, live.tokens())]
        done = Handed(after_ns=time.perf_counter_ns() - begin_ns, kept=self._kept, fallback=self._fallback)
        for part in parts:
            done = replace(
                done,
                moved=done.moved + part.moved,
                network_bytes=done.network_bytes + part.network_bytes,
                sent_ns=done.sent_ns + part.sent_ns,
            )
        return done

    def _send(self, cache: KVCache, layers: Sequence[int] | None, tokens: np.ndarray) -> Handed:
        """Sends layers, or all (None), of a cache of `tokens`; nothing once a block could not be saved."""
        if not self._kept:
            return Handed()
        begin_ns, before = time.perf_counter_ns(), self._restorer.moved()
        try:
            moved = self._restorer.saved(self._live, cache, layers, tokens, (begin_ns - self._begin_ns) / 1e9)
        except ShadowError as error:
            self._kept, moved = False, Moved()
            self._fallback = self._restorer.lose(self._live, self._late or error)
        took_ns = time.perf_counter_ns() - begin_ns
        return Handed(moved, max(0, int((self._restorer.moved() - before)[0])), took_ns)

    @property
    def _is_sending(self) -> bool:
        return not all(each.done() for each in self._sending)

    @contextlib.contextmanager
    def _patience(self, waits: bool) -> Iterator[None]:
        """Gives the link up if the context `waits` for it longer than for blocks that are computed as fast as this prefill was."""
        patience_s = self._restorer.patience_s(self._computed_s - self._begun_s)
        if patience_s is None or not (waits and self._kept):
            yield
            return
        watch = threading.Timer(patience_s, self._give_up, (patience_s,))
        watch.start()
        try:
            yield
        finally:
            watch.cancel()
            watch.join()

    def _give_up(self, patience_s: float) -> None:
        layers = self._live.cache.shape.layers
        came = f"{sum(each.done() for each in self._sending)} of {layers} layers" if self._streams else "not all blocks"
        self._late = ShadowError("late", f"{came} were at the KV host after a wait of {patience_s:.1f} s")
        self._restorer.came_late(self._live.cache.bytes_of(self._live.cache.resident), patience_s)
        if self._restorer.shadow is not None:
            self._restorer.shadow.abort()
