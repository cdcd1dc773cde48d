"""A handle that another worker computes for this one: its blocks are fetched as they reach the KV host, before it is attached."""

from collections.abc import Iterator
from concurrent.futures import Future

from semgap.kv.codec_choice import by_run
from semgap.kv.handles import Live
from semgap.kv.host_shadow import KVHostShadow
from semgap.kv.restoring import Restorer
from semgap.kv.shadow import ShadowError
from semgap.kv.ways import Delta
from semgap.wire.step_cost import Recovered


class Following:
    """The blocks of `live` on their way from its writer to this worker, from now until `stop`, received in the restorer's thread.

    Nothing else may use the shadow before `stop`. ShadowError if the KV host cannot be reached.
    """

    def __init__(self, restorer: Restorer, host: KVHostShadow, live: Live, positions: int) -> None:
        self.live, self._restorer, self._host = live, restorer, host
        live.cache.expect(positions)
        self._moved_before = restorer.moved()
        self._done: Future[None] = restorer.io.submit(_bring, host.follow(live.kv_id, live.cache))
        self._came: Recovered | None = None

    def stop(self) -> Recovered:
        """Waits for a layer on its way, but for no other; gives the record of all that came. A failure is among the ledger's fallbacks."""
        if self._came is None:
            if not self._done.done():
                self._host.stop_following()
            self._came = self._record(self._error())
        return self._came

    def end(self) -> None:
        """Ends the link under it, which may be slow, and frees the memory of its blocks."""
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


def _bring(arriving: Iterator[int]) -> None:
    for _ in arriving:
        pass
