"""Requests that move: one worker computes the prompt, another goes on with the request. Both are the client's, over a link each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from semgap.client.books import reconciled
from semgap.client.remote_runtime import RemoteRuntime
from semgap.client.report import Connection
from semgap.client.runtime import Arrival, ClientHead
from semgap.client.session import open_session
from semgap.client.spec import ClientSpec, WorkerSide
from semgap.engine.model_files import ModelFiles
from semgap.policy import Policy
from semgap.wire import messages
from semgap.wire.ledger import Ledger, Totals
from semgap.wire.link import Link, connect
from semgap.wire.messages import Kind, Operation
from semgap.wire.tcp import Timeouts, tcp_info


def moves(number: int | None) -> bool:
    """True for a request that moves: a warm-up (None), and of the measured ones the first and the last of each four. The others stay, so
    that each has a neighbour to compare with, before it and after it in turn.
    """
    return number is None or number % 4 in (0, 3)


class Handover:
    """A `Runtime` over two workers: a request begins on the first, and after `move` it is the second's."""

    def __init__(self, first: RemoteRuntime, second: RemoteRuntime, policy: Policy) -> None:
        self._first, self._second, self._policy = first, second, policy
        self._now = first
        self._request = 0
        self._promised: bytes | None = None

    @property
    def ledger(self) -> Ledger:
        """The sums of both links, as they are now."""
        both = (self._first.ledger, self._second.ledger)
        names = ("tensor", "payload", "frame", "frames")
        up, down = (Totals(*(sum(getattr(getattr(each, way), name) for each in both) for name in names)) for way in ("up", "down"))
        return Ledger({}, up, down, sum(each.round_trips for each in both), sum(each.codec_ns for each in both))

    def promise(self, positions: int) -> None:
        """Has the first worker keep the next request, of `positions` tokens, for the second, unless that is to compute it again; and the
        second one fetch its layers meanwhile, if the mode sees them.
        """
        self._promised = None if self._policy.recovery == "recompute" else self._first.hand_over()
        if self._promised and self._policy.recovery != "reload":
            self._second.expect(self._promised, positions)

    def move(self, tokens: np.ndarray, kind: Kind) -> dict[str, Any]:
        """Moves the request, fed with `tokens` (n,) so far, to the second worker; gives columns for the row of its first step there."""
        flushed = self._first.flush(kind) if self._promised else messages.Flushed(kept=False)
        self._second.attach(self._promised if flushed.kept else None, self._request, tokens, kind)
        self._now = self._second
        return {
            "handed": flushed.kept,
            "saved_tensor_bytes": flushed.tensor_bytes,
            "saved_payload_bytes": flushed.payload_bytes,
            "sent_network_bytes": flushed.network_bytes,
            "sent_s": flushed.sent_ns / 1e9,
            "sent_after_s": flushed.after_ns / 1e9,
            **({"fallback": flushed.fallback} if flushed.fallback else {}),
        }

    def select(self, request: int) -> None:
        self._now.select(request)

    def prefill(self, prompt: np.ndarray, request: int, kind: Kind) -> Arrival:
        self._now, self._request = self._first, request
        return self._first.prefill(prompt, request, kind)

    def decode(self, token: int, count: int, kind: Kind) -> Iterator[Arrival]:
        return self._now.decode(token, count, kind)

    def decode_alone(self, position: int, token: int, count: int) -> Sequence[int]:
        return self._now.decode_alone(position, token, count)

    def end_request(self) -> None:
        self._now.end_request()
        if self._now is not self._first:  # it still holds what it computed
            self._first.end_request()

    def evict(self, layers: Sequence[int]) -> messages.Evicted:
        return self._now.evict(layers)

    def restore(self) -> float:
        return self._now.restore()

    def segments(self) -> tuple[int, int]:
        (out, into), (more_out, more_in) = self._first.segments(), self._second.segments()
        return out + more_out, into + more_in


@dataclass(frozen=True)
class SecondWorker:
    """A session with the worker that goes on with the requests, with its model there."""

    link: Link
    start_tcp: dict[str, int]
    runtime: RemoteRuntime

    @classmethod
    def opened(cls, spec: ClientSpec, worker: WorkerSide, model: ModelFiles, head: ClientHead | None) -> SecondWorker:
        """Connects, and uploads the weights. Raises as `open_session`."""
        assert worker.second is not None
        link = connect(worker.second, Timeouts(worker.timeout_s, worker.timeout_s))
        open_session(link, spec, worker)
        start_tcp = tcp_info(link.sock)
        runtime = RemoteRuntime(link, spec.policy, model, spec.drawing, head)
        runtime.upload_weights()
        return cls(link, start_tcp, runtime)

    def close(self, stop: bool) -> Connection:
        """Reconciles the session and closes it; with `stop` it ends the worker. LedgerError."""
        books = reconciled(self.link)
        if stop:
            self.link.request(Operation.SHUTDOWN)
        link_bytes = {"up": self.link.ledger.up.frame, "down": self.link.ledger.down.frame}
        self.link.close()
        return Connection(self.start_tcp, books, link_bytes)
