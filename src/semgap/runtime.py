"""Where forward passes happen: in this process, or on a worker behind a link, as a policy says. One request at a time."""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import numpy as np

from semgap import codecs, wire
from semgap.ledger import Ledger
from semgap.link import Link, segments
from semgap.policy import Policy
from semgap.sampling import SamplingRule, draw
from semgap.sources import ModelDigest
from semgap.tensors import DType, Tensor, TensorClass
from semgap.wire import Flag, Kind, Operation

if TYPE_CHECKING:
    from semgap.executor import OutputHead

_UPLOAD_FRAME_BYTES = 32 << 20
_HASH_BYTES = 16


@dataclass(frozen=True)
class ModelFiles:
    """A fetched model: its directory and its digest."""

    directory: Path
    digest: ModelDigest

    @property
    def weights_file(self) -> Path:
        return self.directory / self.digest.file

    @property
    def config(self) -> dict[str, Any]:
        """The Hugging Face config."""
        return msgspec.json.decode((self.directory / "config.json").read_bytes())

    def specs(self) -> tuple[wire.WeightSpec, ...]:
        """Names, dtypes and shapes of the weights, in file order."""
        return tuple(wire.WeightSpec(t.name, DType.from_torch_name(t.dtype), tuple(t.shape)) for t in self.digest.tensors)

    def map(self) -> list[Tensor]:
        """The weights over the mapped file: read by the kernel as they are sent, never copied into this process."""
        with self.weights_file.open("rb") as opened:
            mapped = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
        return [
            Tensor(TensorClass.WEIGHTS, spec.dtype, spec.shape, mapped[tensor.offset : tensor.offset + tensor.nbytes])
            for tensor, spec in zip(self.digest.tensors, self.specs(), strict=True)
        ]


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn, by whoever draws them."""

    rule: SamplingRule = field(default_factory=SamplingRule)
    seed: int = 0


@dataclass(frozen=True)
class Arrival:
    """Tokens that came to be known to the client at one moment, and the logits (n, vocab) that it drew from, if it did.

    `others` are tokens that might as well have been drawn (sampling.py); none are known where the worker drew.
    """

    tokens: tuple[int, ...]
    logits: Tensor | None = None
    others: tuple[int, ...] = ()


class Runtime(Protocol):
    """One request at a time: `prefill`, then `decode` as often as wanted, then `end_request`. Logits are valid until the next call."""

    ledger: Ledger

    def prefill(self, prompt: np.ndarray, request: int, kind: Kind) -> Arrival:
        """Runs a prompt (n,), int64, and gives the first token."""

    def decode(self, token: int, count: int, kind: Kind) -> Iterator[Arrival]:
        """Feeds `token` and gives what follows as it arrives: 1 to `count` tokens, as many as the policy asks for at once."""

    def end_request(self) -> None:
        """The request is over: its KV cache may go."""

    def segments(self) -> tuple[int, int]:
        """TCP segments sent and received so far."""


class LocalRuntime:
    """The executor in this process: no worker, no socket, 0 bytes."""

    def __init__(
        self, policy: Policy, model: ModelFiles, drawing: Drawing, *, threads: int, max_length: int, device: str, setup: dict[str, Any]
    ) -> None:
        import torch

        from semgap.executor import Executor, choose_device, limit_threads
        from semgap.model import Weights, build_model

        limit_threads(threads)
        self.ledger = Ledger()
        self.device = choose_device(device)
        self._drawing = drawing
        self._all_rows = policy.reply.kind == "logits_all"
        begin = time.perf_counter()
        weights = Weights(model.specs(), self.device)
        weights.read_file(model.weights_file, [tensor.offset for tensor in model.digest.tensors])
        setup["weights_load_s"] = time.perf_counter() - begin
        dtype = getattr(torch, model.digest.dtype)
        self._executor = Executor(build_model(model.config, weights, dtype), max_length)
        self.end_request()

    def prefill(self, prompt: np.ndarray, request: int, kind: Kind) -> Arrival:
        self._request = request
        return self._forward(prompt)

    def decode(self, token: int, count: int, kind: Kind) -> Iterator[Arrival]:
        yield self._forward(np.array([token]))

    def end_request(self) -> None:
        self._cache = self._executor.new_cache()

    def segments(self) -> tuple[int, int]:
        return 0, 0

    def _forward(self, tokens: np.ndarray) -> Arrival:
        from semgap.model import to_wire

        hidden = self._executor.forward(tokens, self._cache)
        logits = to_wire(self._executor.logits(hidden if self._all_rows else hidden[-1:]), TensorClass.LOGITS)
        return draw_from(logits, self._drawing, self._request, self._cache.filled)


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
        self._request = 0
        self._handle = 0
        self._position = 0
        self._kv: Tensor | None = None
        self._window_kind = Kind.SETUP

    def upload_weights(self) -> int:
        """Offers the model and sends what the worker asks for; gives the tensor bytes sent."""
        offer = wire.OfferWeights((), self._model.specs())
        hashes = [self._hashes()] if self._policy.weights == "by_hash" else []
        wanted = self.link.request(Operation.OFFER_WEIGHTS, offer, hashes).header
        assert isinstance(wanted, wire.WantWeights)
        self.send_weights(wanted.indices)
        return sum(self.weights[index].data.nbytes for index in wanted.indices)

    def send_weights(self, indices: Sequence[int]) -> None:
        """Sends weights of the offer, as many to a frame as fit, and waits until the worker has them all."""
        batches = _batches(indices, [weight.data.nbytes for weight in self.weights])
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            self.link.post(Operation.PUT_WEIGHTS, wire.PutWeights((), batch, last), self._encoded_weights(batch))
        if batches:
            self.link.await_reply(Operation.PUT_WEIGHTS)

    def prefill(self, prompt: np.ndarray, request: int, kind: Kind) -> Arrival:
        self._request = request
        return self._forward(prompt, kind)

    def decode(self, token: int, count: int, kind: Kind) -> Iterator[Arrival]:
        if self._policy.reply.kind == "token":
            yield from self._window(token, min(count, self._policy.window), kind)
        else:
            yield self._forward(np.array([token]), kind)

    def end_request(self) -> None:
        if self._handle:
            self.link.request(Operation.RELEASE, wire.Release((), self._handle))
        self._handle, self._position, self._kv = 0, 0, None

    def segments(self) -> tuple[int, int]:
        return segments(self.link.sock)

    def cancel_window(self) -> None:
        """Asks the worker to end the running window; `decode` still gives what arrives until it has."""
        self.link.post(Operation.CANCEL, kind=self._window_kind)

    def rewind(self, position: int) -> None:
        """Gives up what lies beyond `position`: the next step or window begins there, and the worker drops the rest."""
        if not 0 < position <= self._position:
            raise ValueError(f"position {position} is not in 1..{self._position}")
        self._position = position

    def _forward(self, tokens: np.ndarray, kind: Kind) -> Arrival:
        sent = self._encoded_weights(range(len(self.weights))) if self._policy.weights == "every_step" else []
        sent.append(self._encode(Tensor.from_numpy(tokens, TensorClass.TOKENS)))
        if self._kv is not None:
            sent.append(self._encode(self._kv))
        header = wire.Forward((), self._handle, self._position, self._request)
        reply = self.link.request(Operation.FORWARD, header, sent, kind)
        assert isinstance(reply.header, wire.Forwarded)
        self._handle = reply.header.handle
        self._position += len(tokens)
        answer = self.link.decode(reply, 0)
        if self._policy.is_stateless:
            self._kv = self.link.decode(reply, 1)  # lies in receive memory until the next request has carried it up
        if answer.cls is TensorClass.TOKENS:
            return Arrival((int(answer.numpy()[0]),))
        logits = self._apply_head(answer) if answer.cls is TensorClass.HIDDEN else answer
        return draw_from(logits, self._drawing, self._request, self._position)

    def _window(self, token: int, count: int, kind: Kind) -> Iterator[Arrival]:
        """Tokens as they come. The position follows what was handed out, so that after a failure the next window begins there."""
        header = wire.DecodeWindow((), self._handle, self._position, token, count)
        self._window_kind = kind
        sequence = self.link.post(Operation.DECODE_WINDOW, header, (), kind)
        self.ledger.count_round_trip(self.link.sending, Operation.DECODE_WINDOW, kind)
        last = False
        while not last:
            frame = self.link.receive_stream(Operation.DECODE_WINDOW, sequence)
            last = bool(frame.flags & Flag.LAST)
            ids = tuple(self.link.decode(frame, 0).numpy().tolist())
            self._position += len(ids)
            yield Arrival(ids)

    def _apply_head(self, hidden: Tensor) -> Tensor:
        import torch

        from semgap.model import from_wire, to_wire

        assert self._head is not None
        return to_wire(self._head(from_wire(hidden, torch.device("cpu"))), TensorClass.LOGITS)

    def _hashes(self) -> codecs.Encoded:
        joined = b"".join(bytes.fromhex(tensor.xxh3_128) for tensor in self._model.digest.tensors)
        return codecs.encode(Tensor(TensorClass.CONTROL, DType.U8, (len(joined),), memoryview(joined)), "raw")

    def _encoded_weights(self, indices: Sequence[int]) -> list[codecs.Encoded]:
        return [self._encode(self.weights[index]) for index in indices]

    def _encode(self, tensor: Tensor) -> codecs.Encoded:
        return codecs.encode(tensor, self._policy.codec.of(tensor.cls))


def draw_from(logits: Tensor, drawing: Drawing, request: int, position: int) -> Arrival:
    """The token that this side draws from the last row of `logits`, for `position` of `request`."""
    drawn = draw(logits.as_float32()[-1], drawing.rule, drawing.seed, request, position)
    return Arrival((drawn.token,), logits, drawn.others)


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
