"""The operations on a session's handles: their release, their eviction and restoring, and what a KV host does with them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from semgap.kv.recovery import LiveCaches
from semgap.wire import messages
from semgap.wire.frames import Frame
from semgap.wire.link import Link, Refused
from semgap.wire.messages import Operation
from semgap.worker.steps import Steps


@dataclass(frozen=True)
class HandleOperations:
    """Serves them for one session. `having_model` gives its steps once weights were offered, `ready` once they are all here; each raises
    Refused before.
    """

    link: Link
    having_model: Callable[[], Steps]
    ready: Callable[[], Steps]

    def handlers(self) -> Mapping[Operation, Callable[[Frame], None]]:
        """The method that serves each operation."""
        return {
            Operation.RELEASE: self._release,
            Operation.EVICT: self._evict,
            Operation.RESTORE: self._restore,
            Operation.HAND_OVER: self._hand_over,
            Operation.FLUSH: self._flush,
            Operation.EXPECT: self._expect,
            Operation.ATTACH: self._attach,
            Operation.PUBLISH: self._publish,
        }

    @property
    def _handles(self) -> LiveCaches:
        return self.having_model().handles

    def _release(self, request: Frame) -> None:
        """Forgets a handle and its cache."""
        self._handles.release(request.header_as(messages.Release).handle)  # before the answer, since later work may be timed
        self.link.reply(request)

    def _evict(self, request: Frame) -> None:
        """Takes layers of a handle off the device; dirty blocks go to the shadow."""
        header = request.header_as(messages.Evict)
        live = self._handles.get(header.handle)
        if not header.layers:
            raise Refused("evict", "an evict names one layer or more")
        self.having_model().bring_back(request, live.cache)
        slabs, moved = self._handles.evict(live, header.layers)
        self.link.reply(request, messages.Evicted((), slabs, moved.blocks, moved.tensor_bytes, moved.payload_bytes))

    def _restore(self, request: Frame) -> None:
        """Brings a handle's missing blocks back before a step needs them."""
        begin = time.perf_counter_ns()
        recovered = self._handles.restore(self._handles.get(request.header_as(messages.Restore).handle))
        self.link.reply(request, messages.Restored((), time.perf_counter_ns() - begin if recovered else 0))

    def _hand_over(self, request: Frame) -> None:
        """Promises the next new handle to another worker."""
        self.link.reply(request, messages.HandingOver((), self._handles.hand_over()))

    def _flush(self, request: Frame) -> None:
        """Answers when the KV host has the blocks of a handle that is handed over."""
        handed = self._handles.flush(self._handles.get(request.header_as(messages.Flush).handle))
        moved, times = handed.moved, (handed.sent_ns, handed.after_ns)
        sent = messages.Flushed((), moved.tensor_bytes, moved.payload_bytes, handed.network_bytes, *times, handed.kept, handed.fallback)
        self.link.reply(request, sent)

    def _expect(self, request: Frame) -> None:
        """Begins to fetch a handle that another worker computes."""
        header = request.header_as(messages.Expect)
        self._handles.expect(header.kv_id, header.positions)
        self.link.reply(request)

    def _attach(self, request: Frame) -> None:
        """Opens a handle that another worker began."""
        header = request.header_as(messages.Attach)
        tokens = self.ready().tokens(request)
        live, missing = self._handles.attach(None if header.recompute else header.kv_id, header.request, tokens)
        self.link.reply(request, messages.Attached((), live.number, missing))

    def _publish(self, request: Frame) -> None:
        """Keeps a handle's whole blocks in the KV host by their content."""
        kept, blocks = self._handles.publish(self._handles.get(request.header_as(messages.Publish).handle))
        self.link.reply(request, messages.Published((), kept, blocks))
