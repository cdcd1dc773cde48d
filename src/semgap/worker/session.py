"""One client's session on the worker: its model, its handles, its counters, and what each operation does with them."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import tempfile
import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import psutil
import torch

from semgap import codecs
from semgap.codecs.torch_tensors import encode, from_wire, stays_on_device, to_wire
from semgap.engine.cuda_graph import make_executor
from semgap.engine.executor import Executor, choose_executor
from semgap.engine.memory_check import FAMILIES, require_room
from semgap.engine.model import build_model
from semgap.engine.sampling import draw
from semgap.engine.torch_device import choose_device
from semgap.engine.weight_staging import WeightStaging
from semgap.engine.weights import Weights, fill
from semgap.kv.blocks import BLOCK, KVCache
from semgap.kv.handles import Live, Recovered
from semgap.kv.host import connect_kv
from semgap.kv.host_shadow import KVHostShadow
from semgap.kv.recovery import LiveCaches
from semgap.kv.shadow import Shadow, transfer_of
from semgap.kv.transfer import BlockTransfer
from semgap.kv.worker_shadow import WorkerShadow
from semgap.policy import SessionSpec, refused_codec
from semgap.processes.machine import identity
from semgap.telemetry import samplers
from semgap.telemetry.clock import read_clock
from semgap.tensors import DType, Tensor, TensorClass
from semgap.wire import frames, messages
from semgap.wire.frames import Frame, FrameError, Limits
from semgap.wire.ledger import Direction
from semgap.wire.link import Link, Refused, answer_ping, control
from semgap.wire.messages import Header, Operation
from semgap.wire.reconcile import counters
from semgap.wire.tcp import congestion_control
from semgap.worker.step_cost import StepCost, Stopwatch
from semgap.worker.weight_store import HASH_BYTES, Draft, FalseHash, StoreFull, WeightStore


@dataclass(frozen=True)
class KVHostAddress:
    """Where a worker's KV host listens, and the secret that they share."""

    address: str
    secret: bytes
    timeout_s: float = 30.0

    def connect(self) -> Link:
        """A link to it; WireError."""
        return connect_kv(self.address, self.secret, self.timeout_s)


@dataclass(frozen=True)
class Resources:
    """What a worker's sessions share. `io_cpus`: cores of the thread that brings KV blocks back, and of samplers (none: the worker's)."""

    store: WeightStore
    kv_host: KVHostAddress | None = None
    io_cpus: tuple[int, ...] = ()


@dataclass
class Session:
    """One client's model, handles and counters. Lives in a process of its own.

    `device` is 'cpu', 'cuda' or 'auto'; `max_payload_bytes` bounds a frame's payload, 0 for half of this machine's memory. With
    `slot_bytes` weights pass through staging memory on the CPU too.
    """

    link: Link
    device_name: str
    resources: Resources
    max_payload_bytes: int = 0
    slot_bytes: int = 0
    spec: SessionSpec = field(default_factory=SessionSpec)
    weights: Weights | None = None
    executor: Executor | None = None
    live: LiveCaches | None = None
    costs: list[StepCost] = field(default_factory=list)
    congestion: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _asked_ahead: deque[Frame] = field(default_factory=deque)  # the window that was asked for while another one ran
    _drawn: tuple[int, int] | None = None  # handle and token that a window ended with whose steps all ran: what another one may follow
    _draft: Draft | None = None  # of the upload by hash that is on its way
    _executor_kind: str = "eager"
    _executor_s: float = 0.0  # to make it, with its kernels and graphs
    _filled: set[int] = field(default_factory=set)
    _scratch: KVCache | None = None  # of a stateless session, whose cache comes along with every step
    _sampling: samplers.Sampling | None = None
    _directory: tempfile.TemporaryDirectory | None = None

    def grant(self, asked: dict) -> dict:
        """Checks what the client asks for and opens the limits of an authenticated peer."""
        try:
            self.spec = msgspec.convert(asked, SessionSpec)
        except msgspec.ValidationError as error:
            raise Refused("session", f"the session asked for is not valid: {error}") from error
        if self.spec.model is not None and self.spec.model.get("model_type") not in FAMILIES:
            raise Refused("model", f"model type {self.spec.model.get('model_type')!r} is not one of {', '.join(FAMILIES)}")
        try:
            self.congestion = congestion_control(self.link.sock, self.spec.congestion)
            self.device = choose_device(self.device_name)
            self._executor_kind = choose_executor(self.spec.executor, self.device)
        except ValueError as error:
            raise Refused("session", str(error)) from error
        refused = refused_codec(self.spec.policy, "worker")
        if refused:
            raise Refused("codec", refused)
        limit = self.max_payload_bytes or psutil.virtual_memory().total // 2
        self.link.limits = Limits(payload_bytes=limit)
        return {
            "pid": os.getpid(),
            "device": str(self.device),
            "executor": self._executor_kind,
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "versions": {name: _version(name) for name in ("semgap", "torch", "transformers", "numpy", "msgspec")},
            "max_payload_bytes": limit,
            "congestion": self.congestion,
            "cpus": sorted(os.sched_getaffinity(0)),
            "machine": identity(),
        }

    def run(self) -> bool:
        """Serves requests until the client leaves; True when it asked for the worker to stop."""
        handlers = {
            Operation.OFFER_WEIGHTS: self.offer_weights,
            Operation.PUT_WEIGHTS: self.put_weights,
            Operation.FORWARD: self.forward,
            Operation.DECODE_WINDOW: self.decode_window,
            Operation.CANCEL: self.cancel,
            Operation.RELEASE: self.release,
            Operation.EVICT: self.evict,
            Operation.RESTORE: self.restore,
            Operation.FLUSH: self.flush,
            Operation.ATTACH: self.attach,
            Operation.GET_NETWORK_COUNTERS: self.get_network_counters,
            Operation.TELEMETRY: self.telemetry,
            Operation.PING: self.ping,
        }
        while True:
            request = self._asked_ahead.popleft() if self._asked_ahead else self.link.next_request(self._place)
            if request.operation is not Operation.DECODE_WINDOW:
                self._drawn = None
            if request.operation is Operation.SHUTDOWN:
                self.link.reply(request)
                self.link.drain(1.0)
                return True
            handler = handlers.get(request.operation)
            if handler is None:
                raise FrameError("operation", f"{request.operation.name.lower()} has no place in a session")
            try:
                handler(request)
            except ValueError as error:  # as all refusals are
                self.link.reply_error(request, getattr(error, "code", "request"), str(error))

    def end(self) -> None:
        """Stops what the session started, all of it even where caches cannot be closed, as on a GPU that is lost."""
        with ExitStack() as last:
            if self._directory:
                last.callback(self._directory.cleanup)
            if self._draft:
                last.callback(self._draft.discard)
            if self.live:
                last.callback(self.live.close)
            if self._sampling:
                last.callback(self._sampling.stop, 1.0)

    def offer_weights(self, request: Frame) -> None:
        """Allocates memory for the weights that the client names, and says which of them must be sent."""
        offer = request.header
        assert isinstance(offer, messages.OfferWeights)
        if self.spec.model is None:
            raise Refused("session", "this session was opened without a model")
        self._forget_model()
        dtype = DType.from_torch_name(self.spec.dtype)
        self._require_room(offer.weights, getattr(torch, dtype.torch_name))
        self.weights = Weights(offer.weights, self.device, WeightStaging(self.device, self.slot_bytes) if self.slot_bytes else None)
        model = build_model(self.spec.model, self.weights, getattr(torch, dtype.torch_name))
        begin = time.perf_counter()
        rule = self.spec.sampling if self.spec.policy.reply.kind == "token" else None
        self.executor = make_executor(self._executor_kind, model, self.spec.max_length, rule)
        self._executor_s = time.perf_counter() - begin
        self._make_caches(self.executor)  # here, not inside the first prefill, whose time is measured
        self.link.reply(request, messages.WantWeights((), self._lacking(request)))

    def put_weights(self, request: Frame) -> None:
        """Takes a frame of weights, which `_place` let the kernel write straight into the model's memory."""
        put = request.header
        assert isinstance(put, messages.PutWeights)
        self._take_weights(request, put.indices)
        if put.last:
            self._pass_on()
            self._weights().settle()
            self.link.reply(request)

    def forward(self, request: Frame) -> None:
        """Runs the tokens of a frame over a handle's cache, or over the cache that came with them."""
        watch = Stopwatch(self.device)
        forward = request.header
        assert isinstance(forward, messages.Forward)
        by_class = self._tensors_by_class(request)
        if self.spec.policy.weights == "every_step":
            self._take_weights(request, tuple(range(len(self._weights().specs))))
            self._weights().settle()
        executor = self._ready_executor()
        tokens = self._tokens(request)
        executor.check_room(tokens, forward.position)
        if self.spec.policy.is_stateless:
            cache = self._cache_that_came(request, forward, by_class)
            watch.start()
            hidden, recovered, live = executor.forward(tokens, cache), None, None
        else:
            watch.start()
            live = self._open(request, forward)  # which may have to make room
            cache = live.cache
            hidden, recovered = self._caches().forward(live, tokens)
        answer = self._answer(executor, hidden, live)
        watch.stop()
        self.link.reply(request, messages.Forwarded((), live.number if live else 0), self._encoded(answer, cache))
        self._offload(request, cache)
        self.costs.append(watch.cost(request.sequence, recovered))

    def decode_window(self, request: Frame) -> None:
        """Decodes on by itself and streams the tokens that it draws, `coalesce` to a frame, until a stop token or a cancel."""
        window = request.header
        assert isinstance(window, messages.DecodeWindow)
        if not window.count:
            raise Refused("forward", "a window of 0 steps has no last frame; ask for 1 or more")
        executor = self._ready_executor()
        drawn, self._drawn = self._drawn, None
        if window.follows:
            if drawn is None or drawn[0] != window.handle:  # the one before was cut short: so is this one
                self.link.stream(request, [], executor.vocab_size > 1 << 16, True)
                return
            position = self._caches().get(window.handle).cache.filled
            window = msgspec.structs.replace(window, position=position, token=drawn[1])
        live = self._rewound(request, window.handle, window.position)
        waiting: list[int] = []
        unsent: list[StepCost] = []
        with closing(self._steps(executor, live, window)) as steps:
            for number, (token, watch, recovered) in enumerate(steps, 1):
                waiting.append(token)
                last = number == window.count or token in self.spec.stop_tokens or self._is_cancelled()
                if last or len(waiting) == self.spec.policy.coalesce:
                    self.link.stream(request, waiting, executor.vocab_size > 1 << 16, last)
                    waiting = []
                unsent.append(watch.cost(request.sequence, recovered))
                if not waiting:  # a step whose token never leaves is none that the client knows of
                    self.costs += unsent
                    unsent = []
                if last:
                    ran = number == window.count and token not in self.spec.stop_tokens
                    self._drawn = (window.handle, token) if ran else None
                    break
        self._offload(request, live.cache)

    def _steps(self, executor: Executor, live: Live, window: messages.DecodeWindow) -> Generator[tuple[int, Stopwatch, Recovered | None]]:
        """A window's tokens, and what each took: a step of its own where blocks are missing, then the executor's own loop."""
        caches, token, count = self._caches(), window.token, window.count
        if not caches.is_whole(live):
            executor.check_room(np.array([token]), live.cache.filled)  # before any block is asked for
            watch = Stopwatch(self.device)
            watch.start()
            hidden, recovered = caches.forward(live, np.array([token]))
            token = self._draw(executor.logits(hidden[-1:]), live)
            watch.stop()
            yield token, watch, recovered
            count -= 1
        watch = Stopwatch(self.device)
        watch.start()
        with closing(executor.decode_window(token, live.cache, count, self.spec.seed, live.request)) as steps:
            for drawn in steps:
                watch.stop_at(drawn.gpu_ns)
                caches.fed(live, token, watch.compute_ns / 1e9)
                token = drawn.token
                yield token, watch, None
                watch = Stopwatch(self.device)
                watch.start()

    def cancel(self, request: Frame) -> None:
        """A cancel whose window had ended already: nothing to do, and no answer."""

    def release(self, request: Frame) -> None:
        """Forgets a handle and its cache."""
        header = request.header
        assert isinstance(header, messages.Release)
        self._caches().release(header.handle)  # before the answer: what comes after may be timed
        self.link.reply(request)

    def evict(self, request: Frame) -> None:
        """Takes layers of a handle off the device; dirty blocks go to the shadow."""
        header = request.header
        assert isinstance(header, messages.Evict)
        caches = self._caches()
        live = caches.get(header.handle)
        if not header.layers:
            raise Refused("evict", "an evict names one layer or more")
        self._restore(request, live.cache)
        slabs, moved = caches.evict(live, header.layers)
        self.link.reply(request, messages.Evicted((), slabs, moved.blocks, moved.tensor_bytes, moved.payload_bytes))

    def restore(self, request: Frame) -> None:
        """Brings a handle's missing blocks back before they are needed."""
        header = request.header
        assert isinstance(header, messages.Restore)
        begin = time.perf_counter_ns()
        recovered = self._caches().restore(self._caches().get(header.handle))
        self.link.reply(request, messages.Restored((), time.perf_counter_ns() - begin if recovered else 0))

    def flush(self, request: Frame) -> None:
        """Saves a handle in the KV host, where another worker can open it."""
        header = request.header
        assert isinstance(header, messages.Flush)
        live = self._caches().get(header.handle)
        self._caches().flush(live)
        self.link.reply(request, messages.Flushed((), live.kv_id, live.cache.filled))

    def attach(self, request: Frame) -> None:
        """Opens a handle out of the KV host."""
        header = request.header
        assert isinstance(header, messages.Attach)
        self._ready_executor()
        tokens = self._tokens(request)
        live, missing = self._caches().attach(header.kv_id, header.request, tokens)
        self.link.reply(request, messages.Attached((), live.number, missing))

    def get_network_counters(self, request: Frame) -> None:
        """This side's ledger and its kernel's counters, as they are before this answer is sent; delta apart from regular."""
        shadow = self.live.shadow if self.live else None
        body = {
            **counters(self.link),
            "steps": [msgspec.to_builtins(cost) for cost in self.costs],
            "peak_rss_bytes": _peak_rss_bytes(),
            "executor_s": self._executor_s,
            "weight_store_bytes": self.resources.store.held_bytes,
            "pcie_reason": None if self.device.type == "cuda" else "no GPU: the cache lies in host memory, nothing crosses PCIe",
            "kv_budget_bytes": self.live.pool.budget_bytes if self.live else None,
            "fallbacks": self.link.ledger.fallbacks,
            "kv_host": shadow.books() if shadow else None,
        }
        self.link.reply(request, None, [control(msgspec.json.encode(body))])

    def telemetry(self, request: Frame) -> None:
        """Starts samplers of this worker and its host, stops them and sends their Parquet files, or reads the clock of their stamps."""
        header = request.header
        assert isinstance(header, messages.TelemetryRequest)
        if header.action == "clock":
            self.link.reply(request, messages.Bodied((), msgspec.json.encode(read_clock())))
            return
        if header.action == "start":
            self._start_sampling(header)
            self.link.reply(request, messages.Bodied((), b"{}"))
            return
        if header.action != "stop" or self._sampling is None:
            raise Refused("telemetry", f"telemetry {header.action!r}: say 'start', then 'stop', or 'clock'")
        results = self._sampling.stop()
        self._sampling = None
        body = {name: {"rows": r.rows, "reason": r.reason, "cost": r.cost and r.cost.describe()} for name, r in results.items()}
        files = [control(result.path.read_bytes()) for result in results.values()]
        self.link.reply(request, messages.Bodied((), msgspec.json.encode(body)), files)

    def ping(self, request: Frame) -> None:
        """Answers with filler."""
        answer_ping(self.link, request)

    def _place(self, operation: Operation, header: Header) -> Sequence[frames.Memory | None]:
        """Raw weights go straight towards the model's memory; everything else into the receive arena."""
        indices: Sequence[int] = ()
        if isinstance(header, messages.PutWeights):
            indices = header.indices
        elif isinstance(header, messages.Forward) and self.spec.policy.weights == "every_step" and self.weights:
            indices = range(len(self.weights.specs))
        if self.weights is None or len(indices) > len(header.tensors):
            return [None] * len(header.tensors)
        return [self._weight_memory(t, indices[i]) if i < len(indices) else None for i, t in enumerate(header.tensors)]

    def _weight_memory(self, tensor: messages.TensorHeader, index: int) -> frames.Memory | None:
        self._check_weight(tensor, index)
        if tensor.codec:
            return None
        return self._draft.through(index, self._weights().sink(index)) if self._draft else self._weights().place(index)

    def _check_weight(self, tensor: messages.TensorHeader, index: int) -> None:
        weights = self._weights()
        if index >= len(weights.specs):
            raise FrameError("weights", f"weight {index} of {len(weights.specs)}")
        spec = weights.specs[index]
        if (tensor.cls, tensor.dtype, tensor.shape) != (TensorClass.WEIGHTS, spec.dtype, spec.shape):
            raise FrameError("weights", f"weight {spec.name!r} is {spec.dtype.name} {spec.shape}, got {tensor.dtype.name} {tensor.shape}")

    def _lacking(self, request: Frame) -> tuple[int, ...]:
        """Indices of the offered weights that must be sent; those that the store has by their hash are taken from there."""
        weights, policy = self._weights(), self.spec.policy
        every = range(len(weights.specs))
        if policy.weights == "every_step":
            return ()
        if policy.weights == "once":
            return tuple(every)
        hashes, store = self._offered_hashes(request, len(every)), self.resources.store
        store.refuse_what_it_cannot_keep(weights.nbytes)
        store.refresh()
        held = {index for index in every if self._is_held(hashes[index], index) and store.read_into(hashes[index], weights.sink(index))}
        self._filled.update(index for index in held if self._is_held(hashes[index], index))  # a damaged upload goes as a whole
        weights.settle()
        self._count_copies(request)
        lacking = tuple(index for index in every if index not in self._filled)
        if lacking:
            digests, sizes = {index: hashes[index] for index in lacking}, {index: weights.sizes[index] for index in lacking}
            self._draft = store.begin(digests, sizes, weights.slot_bytes, self.resources.io_cpus)
        return lacking

    def _is_held(self, digest: bytes, index: int) -> bool:
        return self.resources.store.has(digest, self._weights().sizes[index])

    def _pass_on(self) -> None:
        """Gives a whole upload to later sessions; one whose hashes are false is of no use in this one either."""
        draft, self._draft = self._draft, None
        if draft is None:
            return
        try:
            draft.finish()
        except (FalseHash, StoreFull):
            self._filled.clear()
            raise

    def _offered_hashes(self, request: Frame, count: int) -> list[bytes]:
        if len(request.payloads) != 1 or request.payloads[0].nbytes != count * HASH_BYTES:
            raise Refused("weights", f"an offer by hash brings {HASH_BYTES} bytes for each of its {count} weights")
        joined = bytes(request.payloads[0])
        return [joined[start : start + HASH_BYTES] for start in range(0, len(joined), HASH_BYTES)]

    def _take_weights(self, request: Frame, indices: Sequence[int]) -> None:
        if len(indices) > len(request.header.tensors):
            raise FrameError("weights", f"{len(indices)} weights announced, {len(request.header.tensors)} tensors came")
        for position, index in enumerate(indices):
            tensor = request.header.tensors[position]
            self._check_weight(tensor, index)
            if tensor.codec:
                sink = self._weights().sink(index)
                fill(self._draft.through(index, sink) if self._draft else sink, self.link.decode(request, position).data)
        self._filled.update(indices)
        self._count_copies(request)

    def _count_copies(self, request: Frame) -> None:
        copied = self._weights().take_copied()
        if copied:
            self.link.ledger.count_copy(Direction.UP, request.operation, request.kind, TensorClass.WEIGHTS, copied)

    def _tensors_by_class(self, request: Frame) -> dict[TensorClass, list[int]]:
        found: dict[TensorClass, list[int]] = {}
        for index, tensor in enumerate(request.header.tensors):
            found.setdefault(tensor.cls, []).append(index)
        return found

    def _one(self, by_class: dict[TensorClass, list[int]], cls: TensorClass) -> int:
        indices = by_class.get(cls, [])
        if len(indices) != 1:
            raise Refused("forward", f"{len(indices)} tensors of class {cls.name.lower()} in a forward frame, 1 expected")
        return indices[0]

    def _tokens(self, request: Frame) -> np.ndarray:
        """The one row of token ids (n,) of a frame."""
        sent = self.link.decode(request, self._one(self._tensors_by_class(request), TensorClass.TOKENS))
        if len(sent.shape) != 1 or sent.dtype.is_float:
            raise Refused("tokens", f"tokens are {sent.dtype.name} {sent.shape}; a row of integers was expected")
        return sent.numpy()

    def _make_caches(self, executor: Executor) -> None:
        """The pool of the session's handles, and what holds their blocks when it does not."""
        policy, spec = self.spec.policy, self.spec
        if policy.is_stateless:
            self._scratch = executor.new_cache()
            return
        pool = executor.new_pool(int(spec.kv_budget * spec.handles * executor.cache_nbytes))
        shadow = None if policy.recovery == "recompute" else self._shadow(executor, transfer_of(pool))
        self.live = LiveCaches(pool, policy, shadow, executor.forward, self.link.ledger, self.resources.io_cpus)

    def _shadow(self, executor: Executor, transfer: BlockTransfer) -> Shadow:
        if self.spec.policy.shadow == "worker":
            return WorkerShadow(self.link.ledger, transfer)
        if self.resources.kv_host is None:
            raise Refused("kv_host", "the mode says shadow: kvhost, and this worker has none; start it with --kv-host HOST:PORT")
        if not self.spec.model_id:
            raise Refused("session", "a session that keeps blocks in a KV host names its model by model_id, the digest of its weights")
        shape = executor.kv_shape
        dtype = DType.from_torch_name(str(executor.dtype))
        sizes = (shape.layers, shape.heads, shape.head_dim, shape.max_length, BLOCK)
        layout = messages.KVLayout(self.spec.model_id, dtype, *sizes)
        shadow = KVHostShadow(self.resources.kv_host.connect, layout, transfer, self.link.ledger)
        shadow.reach()
        return shadow

    def _open(self, request: Frame, forward: messages.Forward) -> Live:
        """The handle that a step runs over, a new one for handle 0."""
        if forward.handle == 0:
            if forward.position:
                raise Refused("handle", f"a new handle starts at position 0, not {forward.position}")
            return self._caches().open(forward.request)
        return self._rewound(request, forward.handle, forward.position)

    def _cache_that_came(self, request: Frame, forward: messages.Forward, by_class: dict[TensorClass, list[int]]) -> KVCache:
        cache = self._scratch
        assert cache is not None
        if forward.position:
            packed = self.link.decode(request, self._one(by_class, TensorClass.KV))
            cache.load(from_wire(packed, self.device))
        else:
            cache.clear()
        if cache.filled != forward.position:
            raise Refused("position", f"a KV cache of {cache.filled} positions came, the client says {forward.position}")
        return cache

    def _answer(self, executor: Executor, hidden: torch.Tensor, live: Live | None) -> Tensor | torch.Tensor:
        """What the policy's reply kind sends of final hidden states (n, hidden); on the device where it is to be encoded there."""
        kind = self.spec.policy.reply.kind
        if kind == "hidden_last":
            return self._replied(hidden[-1:], TensorClass.HIDDEN)
        logits = executor.logits(hidden if kind == "logits_all" else hidden[-1:])
        if kind == "token":
            assert live is not None
            return Tensor.from_numpy(np.array([self._draw(logits, live)], dtype=np.uint32), TensorClass.TOKENS)
        return self._replied(logits, TensorClass.LOGITS)

    def _replied(self, tensor: torch.Tensor, cls: TensorClass) -> Tensor | torch.Tensor:
        codec = self.spec.policy.codec_for(cls)
        named = codecs.codec_named(codec) if isinstance(codec, str) else codec
        return tensor if stays_on_device(tensor, named) else to_wire(tensor, cls)

    def _draw(self, logits: torch.Tensor, live: Live) -> int:
        """The token that follows what a handle holds, by the session's rule; the client would have drawn the same."""
        row = to_wire(logits[-1], TensorClass.LOGITS).as_float32()
        return draw(row, self.spec.sampling, self.spec.seed, live.request, live.cache.filled).token

    def _encoded(self, answer: Tensor | torch.Tensor, cache: KVCache) -> list[codecs.Encoded]:
        policy = self.spec.policy
        if isinstance(answer, Tensor):
            encoded = [codecs.encode(answer, policy.codec_for(answer.cls))]
        else:
            cls = TensorClass.HIDDEN if policy.reply.kind == "hidden_last" else TensorClass.LOGITS
            encoded = [encode(answer, cls, policy.codec_for(cls))]
        if policy.is_stateless:
            encoded.append(encode(cache.export(), TensorClass.KV, policy.codec_for(TensorClass.KV)))
        return encoded

    def _rewound(self, request: Frame, handle: int, position: int) -> Live:
        """A handle at `position`: a client goes on from the last token that it took, whatever a window drew after it."""
        live = self._caches().get(handle)
        self._restore(request, live.cache)
        try:
            self._caches().rewind(live, position)
        except ValueError as error:
            raise Refused("position", str(error)) from error
        return live

    def _restore(self, request: Frame, cache: KVCache) -> None:
        moved = cache.restore()
        if moved:
            self.link.ledger.count_copy(Direction.UP, request.operation, request.kind, TensorClass.KV, moved)

    def _is_cancelled(self) -> bool:
        """Takes what came while a window runs: a cancel, or the request of the one that follows; anything else has no place there."""
        while self.link.has_input():
            request = self.link.next_request()
            if request.operation is Operation.CANCEL:
                return True
            if self._asked_ahead or not (isinstance(request.header, messages.DecodeWindow) and request.header.follows):
                raise FrameError("operation", f"{request.operation.name.lower()} came while a window was running")
            self._asked_ahead.append(request)
        return False

    def _offload(self, request: Frame, cache: KVCache) -> None:
        if self.spec.policy.kv_cache != "offloaded":
            return
        moved = cache.offload()
        if moved:
            self.link.ledger.count_copy(Direction.DOWN, request.operation, request.kind, TensorClass.KV, moved)

    def _caches(self) -> LiveCaches:
        if self.live is None:
            why = "its mode ships the cache in every step" if self.weights else "no weights were offered in it"
            raise Refused("handle", f"this session has no handles: {why}")
        return self.live

    def _require_room(self, offered: Sequence[messages.WeightSpec], dtype: torch.dtype) -> None:
        spec = self.spec
        assert spec.model is not None
        load = {"handles": spec.handles, "kv_budget": spec.kv_budget}
        require_room(spec.model, offered, dtype, self.device, spec.max_length, spec.policy, **load)

    def _forget_model(self) -> None:
        """A new offer starts from nothing: no weight of the one before counts as sent, and no cache outlives its model."""
        if self.live:
            self.live.close()
        if self.weights:
            self.weights.settle()  # before its memory goes
        if self._draft:
            self._draft.discard()
        self._draft = None
        had_model = self.weights is not None
        self.weights = self.executor = self.live = self._scratch = None
        self._filled.clear()
        if had_model:
            gc.collect()  # a cache and its layers refer to each other, and their memory is to go before the new one's is asked for

    def _weights(self) -> Weights:
        if self.weights is None:
            raise Refused("weights", "no weights were offered in this session")
        return self.weights

    def _ready_executor(self) -> Executor:
        missing = len(self._weights().specs) - len(self._filled)
        if self.executor is None or missing:
            raise Refused("weights", f"{missing} weights of the model have not been sent")
        return self.executor

    def _start_sampling(self, header: messages.TelemetryRequest) -> None:
        if self._sampling:
            raise Refused("telemetry", "telemetry runs already; stop it first")
        self._directory = self._directory or tempfile.TemporaryDirectory(prefix="semgap-telemetry-")
        self._sampling = samplers.start(
            Path(self._directory.name),
            pids={"worker": os.getpid()},
            interval_s=header.interval_s,
            sources=header.sources,
            cpus=header.cpus or self.resources.io_cpus or None,
        )


def _peak_rss_bytes() -> int:
    """The session's highest resident memory, from /proc/self/status (getrusage would give its parent's)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def _version(name: str) -> str | None:
    """None for a package that is not installed but found by its path, as semgap itself may be."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
