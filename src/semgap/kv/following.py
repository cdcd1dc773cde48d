"""A handle that another worker computes for this one: its blocks are fetched as they reach the KV host, before it is attached."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from semgap.kv.arrivals import pin_thread
from semgap.kv.codec_choice import by_run
from semgap.kv.handles import Live
from semgap.kv.host_shadow import KVHostShadow
from semgap.kv.restoring import Restorer
from semgap.kv.shadow import ShadowError
from semgap.kv.ways import Delta
from semgap.wire.step_cost import Recovered


class Following:
    """The blocks of `live` on their way from its writer to this worker, from now until `stop`, received in a thread of its own.

    Nobody waits for them yet, so the thread takes its cores only while nothing else wants them. Nothing else may use the shadow before
    `stop`. ShadowError if the KV host cannot be reached.
    """

    def __init__(self, restorer: Restorer, host: KVHostShadow, live: Live, positions: int) -> None:
        self.live, self._restorer, self._host = live, restorer, host
        live.cache.expect(positions)
        self._moved_before = restorer.moved()
        arriving, thread = host.follow(live.kv_id, live.cache), ThreadPoolExecutor(1, "kv-follow", _yield_to_all, (restorer.io_cpus,))
        self._done: Future[None] = thread.submit(_bring, arriving)
        thread.shutdown(wait=False)
        self._came: Recovered | None = None

    def stop(self) -> Recovered:
        """Waits for layers on their way, but for no others; gives the record of all that came. The ledger's fallbacks name a failure."""
        if self._came is None:
            if not self._done.done():
                self._host.stop_following()
            self._came = self._record(self._error())
        return self._came

    def end(self) -> None:
        """Frees the memory of its blocks. The link breaks if blocks still arrive."""
        if not self._done.done():
            self._host.abort()
        self._done.exception()
        self.live.cache.release()

    def _error(self) -> BaseException | None:
        """What ended the thread, once it has ended: by itself, or with the link if that takes longer than the restorer's patience."""
        try:
            return self._done.exception(self._restorer.patience_s(None))
        except TimeoutError:
            self._host.abort()
            return self._done.exception()

    def _record(self, error: BaseException | None) -> Recovered:
        if isinstance(error, ShadowError):
            self._restorer.ledger.fallbacks.append(f"{error.code}: {error}")
        elif error is not None:
            raise error
        came = Recovered(Delta.name, Delta.name, kv_codecs=by_run(self._host.came) or None)
        self._restorer.note_moved(came, self._moved_before)
        return came


def _yield_to_all(cpus: Sequence[int]) -> None:
    """Pins the calling thread, and has it run behind all others."""
    pin_thread(cpus)
    with contextlib.suppress(OSError, AttributeError):  # a kernel without that policy
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _bring(arriving: Iterator[int]) -> None:
    for _ in arriving:
        pass
