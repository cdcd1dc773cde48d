"""Where forward passes happen: in this process, or on a worker behind a link, as a policy says. One request at a time."""

from __future__ import annotations

import mmap
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import numpy as np

from semgap import codecs, wire
from semgap.ledger import Ledger
from semgap.link import Link, RemoteError, control, segments
from semgap.policy import Policy
from semgap.sampling import SamplingRule, draw
from semgap.sources import ModelDigest
from semgap.tensors import DType, Tensor, TensorClass
from semgap.wire import Flag, Kind, Operation

if TYPE_CHECKING:
    from semgap.executor import OutputHead
    from semgap.kv.blocks import KVCache

_UPLOAD_FRAME_BYTES = 32 << 20


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

    @property
    def layers(self) -> int:
        """Layers of the model, by whichever name its family has for them."""
        config = self.config
        return config["num_hidden_layers"] if "num_hidden_layers" in config else config["n_layer"]

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


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn, by whoever draws them."""

    rule: SamplingRule = field(default_factory=SamplingRule)
    seed: int = 0


@dataclass(frozen=True)
class Arrival:
    """Tokens that came to be known to the client at one moment, and the logits (n, vocab) that it drew from, if it did.

    `others` are tokens that might as well have been drawn (sampling.py); none are known where the worker drew. `gpu_ns` is the forward
    pass by CUDA events where it ran in this process and on a GPU; a worker keeps its own.
    """

    tokens: tuple[int, ...]
    logits: Tensor | None = None
    others: tuple[int, ...] = ()
    gpu_ns: int | None = None


class Runtime(Protocol):
    """Of each request: `prefill`, then `decode` as often as wanted, then `end_request`. Logits are valid until the next call.

    Several requests may be alive; `prefill` begins one, and what follows is about that one, or the one that `select` named last.
    """

    ledger: Ledger

    def select(self, request: int) -> None:
        """What follows is about this request, which is alive."""

    def prefill(self, prompt: np.ndarray, request: int, kind: Kind) -> Arrival:
        """Runs a prompt (n,), int64, and gives the first token."""

    def decode(self, token: int, count: int, kind: Kind) -> Iterator[Arrival]:
        """Feeds `token` and gives what follows as it arrives: 1 to `count` tokens, as many as the policy asks for (with `ahead` all)."""

    def end_request(self) -> None:
        """The request is over: its KV cache may go."""

    def evict(self, layers: Sequence[int]) -> wire.Evicted | None:
        """Takes layers of the request's KV cache off the device; None where there is no worker that could."""

    def restore(self) -> float | None:
        """Brings back what was evicted and waits for it; seconds on the worker, None where there is none."""

    def segments(self) -> tuple[int, int]:
        """TCP segments sent and received so far."""


class LocalRuntime:
    """The executor in this process: no worker, no socket, 0 bytes."""

    def __init__(
        self,
        policy: Policy,
        model: ModelFiles,
        drawing: Drawing,
        *,
        threads: int,
        max_length: int,
        device: str,
        setup: dict[str, Any],
        live_requests: int = 1,
        executor: str = "auto",
    ) -> None:
        import torch

        from semgap.cuda_graph import make_executor
        from semgap.executor import choose_device, choose_executor, limit_threads
        from semgap.model import Weights, build_model, require_room

        limit_threads(threads)
        self.ledger = Ledger()
        self.device = choose_device(device)
        self.executor_kind = choose_executor(executor, self.device)
        self._drawing = drawing
        self._all_rows = policy.reply.kind == "logits_all"
        dtype = getattr(torch, model.digest.dtype)
        load = {"handles": live_requests, "kv_budget": 1.0}
        require_room(model.config, model.specs(), dtype, self.device, max_length, policy, **load)
        begin = time.perf_counter()
        weights = Weights(model.specs(), self.device)
        weights.read_file(model.weights_file, [tensor.offset for tensor in model.digest.tensors])
        setup["weights_load_s"] = time.perf_counter() - begin
        built = build_model(model.config, weights, dtype)
        begin = time.perf_counter()
        self._executor = make_executor(self.executor_kind, built, max_length)
        setup["executor_s"] = time.perf_counter() - begin
        self._spare = [self._executor.new_cache()]
        self._alive: dict[int, KVCache] = {}

    def select(self, request: int) -> None:
        self._request, self._cache = request, self._alive[request]

    def prefill(self, prompt: np.ndarray, request: int, kind: Kind) -> Arrival:
        self._alive[request] = self._spare.pop() if self._spare else self._executor.new_cache()
        self.select(request)
        return self._forward(prompt)

    def decode(self, token: int, count: int, kind: Kind) -> Iterator[Arrival]:
        yield self._forward(np.array([token]))

    def end_request(self) -> None:
        cache = self._alive.pop(self._request)
        cache.clear()
        self._spare.append(cache)

    def evict(self, layers: Sequence[int]) -> None:
        return None

    def restore(self) -> None:
        return None

    def segments(self) -> tuple[int, int]:
        return 0, 0

    def _forward(self, tokens: np.ndarray) -> Arrival:
        from semgap.bridge import to_wire
        from semgap.gputime import GpuTimer

        timer = GpuTimer(self.device)
        hidden = self._executor.forward(tokens, self._cache)
        logits = to_wire(self._executor.logits(hidden if self._all_rows else hidden[-1:]), TensorClass.LOGITS)
        gpu_ns = timer.elapsed_ns()
        return replace(draw_from(logits, self._drawing, self._request, self._cache.filled), gpu_ns=gpu_ns)


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
        offer = wire.OfferWeights((), self._model.specs())
        hashes = [self._hashes()] if self._policy.weights == "by_hash" else []
        wanted = self.link.request(Operation.OFFER_WEIGHTS, offer, hashes).header
        assert isinstance(wanted, wire.WantWeights)
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
        puts = (wire.PutWeights((), batch, batch is batches[-1]) for batch in batches)
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
            self.link.request(Operation.RELEASE, wire.Release((), self._now.handle))
        self._alive.pop(self._now.request, None)

    def evict(self, layers: Sequence[int]) -> wire.Evicted:
        evicted = self.link.request(Operation.EVICT, wire.Evict((), self._now.handle, tuple(layers))).header
        assert isinstance(evicted, wire.Evicted)
        return evicted

    def restore(self) -> float:
        restored = self.link.request(Operation.RESTORE, wire.Restore((), self._now.handle)).header
        assert isinstance(restored, wire.Restored)
        return restored.took_ns / 1e9

    def flush(self) -> bytes:
        """Saves the request in the worker's KV host; gives the name under which `attach` opens it, there or on another worker."""
        flushed = self.link.request(Operation.FLUSH, wire.Flush((), self._now.handle)).header
        assert isinstance(flushed, wire.Flushed)
        return flushed.kv_id

    def attach(self, kv_id: bytes, request: int, tokens: np.ndarray) -> int:
        """Goes on with a request that was flushed, of which `tokens` (n,) were fed so far; gives how many of its blocks are missing."""
        sent = [codecs.encode(Tensor.from_numpy(tokens, TensorClass.TOKENS), self._policy.codec.of(TensorClass.TOKENS))]
        attached = self.link.request(Operation.ATTACH, wire.Attach((), kv_id, request), sent).header
        assert isinstance(attached, wire.Attached)
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
        header = wire.Forward((), self._now.handle, self._now.position, self._now.request)
        reply = self.link.request(Operation.FORWARD, header, sent, kind)
        assert isinstance(reply.header, wire.Forwarded)
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
        header = wire.DecodeWindow((), self._now.handle, count=count, **begin)
        return _Window(self.link.post(Operation.DECODE_WINDOW, header, (), kind), count)

    def _drain(self, windows: Sequence[_Window]) -> None:
        """Takes the ends of windows that follow one that failed, and so hold nothing."""
        for window in windows:
            while not self.link.receive_stream(Operation.DECODE_WINDOW, window.sequence).flags & Flag.LAST:
                pass

    def _apply_head(self, hidden: Tensor) -> Tensor:
        import torch

        from semgap.bridge import from_wire, to_wire

        assert self._head is not None
        return to_wire(self._head(from_wire(hidden, torch.device("cpu"))), TensorClass.LOGITS)

    def _hashes(self) -> codecs.Encoded:
        joined = b"".join(bytes.fromhex(tensor.xxh3_128) for tensor in self._model.digest.tensors)
        return control(joined)

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
