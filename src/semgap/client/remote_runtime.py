"""The executor behind a link: sends tokens, weights and caches to a worker as a policy says, and decodes its replies."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from semgap import codecs
from semgap.client.runtime import Arrival, ClientHead, Drawing, draw_from
from semgap.engine.model_files import ModelFiles
from semgap.policy import Policy
from semgap.tensors import Tensor, TensorClass
from semgap.wire import messages
from semgap.wire.frames import Flag, Frame
from semgap.wire.link import Link, RemoteError, control
from semgap.wire.messages import Kind, Operation
from semgap.wire.tcp import segments

_UPLOAD_FRAME_BYTES = 32 << 20


@dataclass(frozen=True)
class _Window:
    """A requested window: the sequence number of its request, and its number of tokens."""

    sequence: int
    count: int


@dataclass
class _Alive:
    """A request on the worker: its handle, its filled positions, and its cache if that crosses in every step."""

    request: int
    handle: int = 0
    position: int = 0
    kv: Tensor | None = None


class RemoteRuntime:
    """A `Runtime` on a worker. `held_bytes`: weights that the worker had already; `put_s`: time of sending the others."""

    def __init__(self, link: Link, policy: Policy, model: ModelFiles, drawing: Drawing, head: ClientHead | None = None) -> None:
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
        """The worker's handle of the request; 0 if it keeps none."""
        return self._now.handle

    def select(self, request: int) -> None:
        self._now = self._alive[request]

    def upload_weights(self) -> int:
        """Offers the model and sends the weights that the worker wants; gives their tensor bytes. Sets `held_bytes` and `put_s`."""
        offer = messages.OfferWeights((), self._model.specs())
        hashes = b"".join(bytes.fromhex(tensor.xxh3_128) for tensor in self._model.digest.tensors)
        sent_along = [control(hashes)] if self._policy.weights == "by_hash" else []
        wanted = self.link.request(Operation.OFFER_WEIGHTS, offer, sent_along).header_as(messages.WantWeights)
        begin = time.perf_counter()
        self.send_weights(wanted.indices)
        self.put_s = time.perf_counter() - begin
        sent = sum(self.weights[index].data.nbytes for index in wanted.indices)
        whole = sum(weight.data.nbytes for weight in self.weights)
        self.held_bytes = whole - sent if self._policy.weights == "by_hash" else 0
        return sent

    def send_weights(self, indices: Sequence[int]) -> None:
        """Sends weights of the offer, several to a frame, and waits until the worker has them all."""
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

    def decode_alone(self, position: int, token: int, count: int) -> tuple[int, ...]:
        header = messages.DecodeAlone((), self._now.handle, position, token, count)
        return self.link.request(Operation.DECODE_ALONE, header).header_as(messages.DecodedAlone).took_ns

    def end_request(self) -> None:
        if self._now.handle:
            self.link.request(Operation.RELEASE, messages.Release((), self._now.handle))
        self._alive.pop(self._now.request, None)

    def evict(self, layers: Sequence[int]) -> messages.Evicted:
        return self.link.request(Operation.EVICT, messages.Evict((), self._now.handle, tuple(layers))).header_as(messages.Evicted)

    def restore(self) -> float:
        restored = self.link.request(Operation.RESTORE, messages.Restore((), self._now.handle)).header_as(messages.Restored)
        return restored.took_ns / 1e9

    def publish(self) -> messages.Published:
        """Keeps the request's whole blocks in the worker's KV host by their content: sessions with this one's salt find them."""
        return self.link.request(Operation.PUBLISH, messages.Publish((), self._now.handle)).header_as(messages.Published)

    def hand_over(self) -> bytes:
        """Promises the next request to another worker; gives its name in the KV host, for `attach` there."""
        return self.link.request(Operation.HAND_OVER).header_as(messages.HandingOver).kv_id

    def expect(self, kv_id: bytes, positions: int) -> None:
        """Has a request of `positions` tokens, which another worker promised under this name, fetched while that worker computes."""
        self.link.request(Operation.EXPECT, messages.Expect((), kv_id, positions))

    def flush(self, kind: Kind) -> messages.Flushed:
        """Waits until the KV host has the promised request's blocks."""
        return self.link.request(Operation.FLUSH, messages.Flush((), self._now.handle), (), kind).header_as(messages.Flushed)

    def attach(self, kv_id: bytes | None, request: int, tokens: np.ndarray, kind: Kind) -> int:
        """Continues a request that another worker began, fed with `tokens` (n,) so far; gives the number of its missing blocks.

        With `kv_id` None they are computed again.
        """
        sent = [codecs.encode(Tensor.from_numpy(tokens, TensorClass.TOKENS), self._policy.codec.of(TensorClass.TOKENS))]
        header = messages.Attach((), kv_id or bytes(16), request, kv_id is None)
        attached = self.link.request(Operation.ATTACH, header, sent, kind).header_as(messages.Attached)
        self._now = self._alive[request] = _Alive(request, attached.handle, len(tokens))
        return attached.missing_blocks

    def segments(self) -> tuple[int, int]:
        return segments(self.link.sock)

    def cancel_window(self) -> None:
        """Makes the worker end the running window and those after it; `decode` still gives the tokens that arrive until then."""
        self._cancelled = True
        self.link.post(Operation.CANCEL, kind=self._window_kind)

    def rewind(self, position: int) -> None:
        """Goes back to `position`: the next step or window begins there, and the worker drops the positions beyond."""
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
        self._now.handle = reply.header_as(messages.Forwarded).handle
        self._now.position += len(tokens)
        answer = self.link.decode(reply, 0)
        if self._policy.is_stateless:
            self._now.kv = self.link.decode(reply, 1)  # in receive memory, until the next request sends it up
        if answer.cls is TensorClass.TOKENS:
            return Arrival((int(answer.numpy()[0]),))
        head_ns = 0
        if answer.cls is TensorClass.HIDDEN:
            assert self._head is not None
            begin_ns = time.perf_counter_ns()
            answer = self._head.logits_of(answer)
            head_ns = time.perf_counter_ns() - begin_ns
        return replace(draw_from(answer, self._drawing, self._now.request, self._now.position), head_ns=head_ns)

    def _windows(self, token: int, count: int, kind: Kind) -> Iterator[Arrival]:
        """Tokens as they arrive, `count` or up to the end of a window cut short. The position follows the tokens given out, so that after
        a failure the next window begins there.

        With `ahead` there may be several windows: each is requested when the first tokens of the one before arrive, and goes on with the
        worker's last token. A round trip counts when its answer begins.
        """
        self._window_kind, self._cancelled = kind, False
        windows = deque([self._request_window(count, kind, token=token)])
        left = count - windows[0].count
        while windows:
            window, came, last = windows[0], 0, False
            while not last:
                frame = self._token_frame(windows)
                if not came:
                    self.ledger.count_round_trip(self.link.sending, Operation.DECODE_WINDOW, kind)
                    if left and not self._cancelled:
                        windows.append(self._request_window(left, kind))
                        left -= windows[-1].count
                last = bool(frame.flags & Flag.LAST)
                ids = tuple(self.link.decode(frame, 0).numpy().tolist())
                came += len(ids)
                self._now.position += len(ids)
                if last:
                    windows.popleft()
                    left = left if came == window.count else 0
                if ids:
                    yield Arrival(ids)

    def _request_window(self, count: int, kind: Kind, token: int | None = None) -> _Window:
        """Requests up to `count` tokens after `token`, or after the last token of the window before."""
        count = min(count, self._policy.window)
        begin = {"follows": True} if token is None else {"position": self._now.position, "token": token}
        header = messages.DecodeWindow((), self._now.handle, count=count, **begin)
        return _Window(self.link.post(Operation.DECODE_WINDOW, header, (), kind), count)

    def _token_frame(self, windows: deque[_Window]) -> Frame:
        """The next frame of the first window. If that failed, the windows after it hold no tokens: takes their frames too."""
        try:
            return self.link.receive_stream(Operation.DECODE_WINDOW, windows[0].sequence)
        except RemoteError:
            for window in [*windows][1:]:
                while not self.link.receive_stream(Operation.DECODE_WINDOW, window.sequence).flags & Flag.LAST:
                    pass
            raise

    def _encoded_weights(self, indices: Sequence[int]) -> list[codecs.Encoded]:
        return [self._encode(self.weights[index]) for index in indices]

    def _encode(self, tensor: Tensor) -> codecs.Encoded:
        return codecs.encode(tensor, self._policy.codec.of(tensor.cls))


def _batches(indices: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Runs of indices whose tensors fill a frame of about 32 MiB; a larger tensor gets a frame of its own."""
    batches: list[tuple[int, ...]] = []
    batch: list[int] = []
    for index in indices:
        if batch and sum(sizes[i] for i in batch) + sizes[index] > _UPLOAD_FRAME_BYTES:
            batches.append(tuple(batch))
            batch = []
        batch.append(index)
    return [*batches, tuple(batch)] if batch else batches
