"""Where forward passes happen: in this process, or on a worker behind a link, as a policy says. One request at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from semgap import codecs
from semgap.client.runtime import Arrival, Drawing, draw_from
from semgap.engine.model_files import ModelFiles
from semgap.policy import Policy
from semgap.tensors import Tensor, TensorClass
from semgap.wire import messages
from semgap.wire.frames import Flag
from semgap.wire.link import Link, RemoteError, control
from semgap.wire.messages import Kind, Operation
from semgap.wire.tcp import segments

if TYPE_CHECKING:
    from semgap.engine.output_head import OutputHead


_UPLOAD_FRAME_BYTES = 32 << 20


@dataclass(frozen=True)
class _Window:
    """A window that was asked for: the sequence of its request, and how many tokens it is to bring."""

    sequence: int
    count: int


@dataclass
class _Alive:
    """A request on the worker: its handle, its filled positions, and the cache itself where that crosses in every step."""

    request: int
    handle: int = 0
    position: int = 0
    kv: Tensor | None = None


class RemoteRuntime:
    """The executor behind a link, driven by a policy: what goes up with each step, what comes back, and what is kept between two."""

    def __init__(self, link: Link, policy: Policy, model: ModelFiles, drawing: Drawing, head: OutputHead | None = None) -> None:
        self.link = link
        self.ledger = link.ledger
        self.weights = model.map()
        self._model = model
        self._policy = policy
        self._drawing = drawing
        self._head = head
        self._alive: dict[int, _Alive] = {}
        self._now = _Alive(0)
        self._window_kind = Kind.SETUP
        self._cancelled = False
        self.held_bytes, self.put_s = 0, 0.0

    @property
    def handle(self) -> int:
        """The worker's handle of the request; 0 where it keeps none."""
        return self._now.handle

    def select(self, request: int) -> None:
        self._now = self._alive[request]

    def upload_weights(self) -> int:
        """Offers the model and sends what the worker asks for; gives the tensor bytes sent. Then `held_bytes` is what the worker had
        already, and `put_s` what the sending took.
        """
        offer = messages.OfferWeights((), self._model.specs())
        hashes = [self._hashes()] if self._policy.weights == "by_hash" else []
        wanted = self.link.request(Operation.OFFER_WEIGHTS, offer, hashes).header
        assert isinstance(wanted, messages.WantWeights)
        begin = time.perf_counter()
        self.send_weights(wanted.indices)
        self.put_s = time.perf_counter() - begin
        sent = sum(self.weights[index].data.nbytes for index in wanted.indices)
        whole = sum(weight.data.nbytes for weight in self.weights)
        self.held_bytes = whole - sent if self._policy.weights == "by_hash" else 0
        return sent

    def send_weights(self, indices: Sequence[int]) -> None:
        """Sends weights of the offer, as many to a frame as fit, and waits until the worker has them all."""
        batches = _batches(indices, [weight.data.nbytes for weight in self.weights])
        puts = (messages.PutWeights((), batch, batch is batches[-1]) for batch in batches)
        self.link.post_all(Operation.PUT_WEIGHTS, ((put, self._encoded_weights(put.indices)) for put in puts))
        if batches:
            self.link.await_reply(Operation.PUT_WEIGHTS)

    def prefill(self, prompt: np.ndarray, request: int, kind: Kind) -> Arrival:
        self._now = self._alive[request] = _Alive(request)
        return self._forward(prompt, kind)

    def decode(self, token: int, count: int, kind: Kind) -> Iterator[Arrival]:
        if self._policy.reply.kind == "token":
            yield from self._windows(token, count if self._policy.ahead else min(count, self._policy.window), kind)
        else:
            yield self._forward(np.array([token]), kind)

    def end_request(self) -> None:
        if self._now.handle:
            self.link.request(Operation.RELEASE, messages.Release((), self._now.handle))
        self._alive.pop(self._now.request, None)

    def evict(self, layers: Sequence[int]) -> messages.Evicted:
        evicted = self.link.request(Operation.EVICT, messages.Evict((), self._now.handle, tuple(layers))).header
        assert isinstance(evicted, messages.Evicted)
        return evicted

    def restore(self) -> float:
        restored = self.link.request(Operation.RESTORE, messages.Restore((), self._now.handle)).header
        assert isinstance(restored, messages.Restored)
        return restored.took_ns / 1e9

    def flush(self) -> bytes:
        """Saves the request in the worker's KV host; gives the name under which `attach` opens it, there or on another worker."""
        flushed = self.link.request(Operation.FLUSH, messages.Flush((), self._now.handle)).header
        assert isinstance(flushed, messages.Flushed)
        return flushed.kv_id

    def attach(self, kv_id: bytes, request: int, tokens: np.ndarray) -> int:
        """Goes on with a request that was flushed, of which `tokens` (n,) were fed so far; gives how many of its blocks are missing."""
        sent = [codecs.encode(Tensor.from_numpy(tokens, TensorClass.TOKENS), self._policy.codec.of(TensorClass.TOKENS))]
        attached = self.link.request(Operation.ATTACH, messages.Attach((), kv_id, request), sent).header
        assert isinstance(attached, messages.Attached)
        self._now = self._alive[request] = _Alive(request, attached.handle, len(tokens))
        return attached.missing_blocks

    def segments(self) -> tuple[int, int]:
        return segments(self.link.sock)

    def cancel_window(self) -> None:
        """Asks the worker to end the running window and what follows it; `decode` still gives what arrives until it has."""
        self._cancelled = True
        self.link.post(Operation.CANCEL, kind=self._window_kind)

    def rewind(self, position: int) -> None:
        """Gives up what lies beyond `position`: the next step or window begins there, and the worker drops the rest."""
        if not 0 < position <= self._now.position:
            raise ValueError(f"position {position} is not in 1..{self._now.position}")
        self._now.position = position

    def _forward(self, tokens: np.ndarray, kind: Kind) -> Arrival:
        sent = self._encoded_weights(range(len(self.weights))) if self._policy.weights == "every_step" else []
        sent.append(self._encode(Tensor.from_numpy(tokens, TensorClass.TOKENS)))
        if self._now.kv is not None:
            sent.append(self._encode(self._now.kv))
        header = messages.Forward((), self._now.handle, self._now.position, self._now.request)
        reply = self.link.request(Operation.FORWARD, header, sent, kind)
        assert isinstance(reply.header, messages.Forwarded)
        self._now.handle = reply.header.handle
        self._now.position += len(tokens)
        answer = self.link.decode(reply, 0)
        if self._policy.is_stateless:
            self._now.kv = self.link.decode(reply, 1)  # lies in receive memory until the next request has carried it up
        if answer.cls is TensorClass.TOKENS:
            return Arrival((int(answer.numpy()[0]),))
        logits = self._apply_head(answer) if answer.cls is TensorClass.HIDDEN else answer
        return draw_from(logits, self._drawing, self._now.request, self._now.position)

    def _windows(self, token: int, count: int, kind: Kind) -> Iterator[Arrival]:
        """Tokens as they come, `count` or up to where a window was cut short. The position follows what was handed out, so that after a
        failure the next window begins there.

        With `ahead` there may be more than one window: each is asked for when the first tokens of the one before it are here, and goes on
        with what the worker itself drew last. A round trip counts where its answer begins.
        """
        self._window_kind, self._cancelled = kind, False
        asked = deque([self._ask_window(count, kind, token=token)])
        left = count - asked[0].count
        while asked:
            window, came, last = asked[0], 0, False
            while not last:
                try:
                    frame = self.link.receive_stream(Operation.DECODE_WINDOW, window.sequence)
                except RemoteError:
                    self._drain([*asked][1:])
                    raise
                if not came:
                    self.ledger.count_round_trip(self.link.sending, Operation.DECODE_WINDOW, kind)
                    if left and not self._cancelled:
                        asked.append(self._ask_window(left, kind))
                        left -= asked[-1].count
                last = bool(frame.flags & Flag.LAST)
                ids = tuple(self.link.decode(frame, 0).numpy().tolist())
                came += len(ids)
                self._now.position += len(ids)
                if last:
                    asked.popleft()
                    left = left if came == window.count else 0
                if ids:
                    yield Arrival(ids)

    def _ask_window(self, count: int, kind: Kind, token: int | None = None) -> _Window:
        """Asks for up to `count` tokens after `token`, or after what the window before draws last."""
        count = min(count, self._policy.window)
        begin = {"follows": True} if token is None else {"position": self._now.position, "token": token}
        header = messages.DecodeWindow((), self._now.handle, count=count, **begin)
        return _Window(self.link.post(Operation.DECODE_WINDOW, header, (), kind), count)

    def _drain(self, windows: Sequence[_Window]) -> None:
        """Takes the ends of windows that follow one that failed, and so hold nothing."""
        for window in windows:
            while not self.link.receive_stream(Operation.DECODE_WINDOW, window.sequence).flags & Flag.LAST:
                pass

    def _apply_head(self, hidden: Tensor) -> Tensor:
        import torch

        from semgap.codecs.torch_tensors import from_wire, to_wire

        assert self._head is not None
        return to_wire(self._head(from_wire(hidden, torch.device("cpu"))), TensorClass.LOGITS)

    def _hashes(self) -> codecs.Encoded:
        joined = b"".join(bytes.fromhex(tensor.xxh3_128) for tensor in self._model.digest.tensors)
        return control(joined)

    def _encoded_weights(self, indices: Sequence[int]) -> list[codecs.Encoded]:
        return [self._encode(self.weights[index]) for index in indices]

    def _encode(self, tensor: Tensor) -> codecs.Encoded:
        return codecs.encode(tensor, self._policy.codec.of(tensor.cls))


def _batches(indices: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Runs of indices whose tensors fill a frame of about 32 MiB; a larger tensor has a frame to itself."""
    batches: list[tuple[int, ...]] = []
    batch: list[int] = []
    for index in indices:
        if batch and sum(sizes[i] for i in batch) + sizes[index] > _UPLOAD_FRAME_BYTES:
            batches.append(tuple(batch))
            batch = []
        batch.append(index)
    return [*batches, tuple(batch)] if batch else batches
