"""Forward passes and decode windows of a session: their caches, their replies and their costs."""

import time
from collections import deque
from collections.abc import Generator
from contextlib import closing

import msgspec
import numpy as np

from semgap import codecs
from semgap.codecs.arrays import encode, stays_on_device, to_wire
from semgap.engine.alone import DecodeAlone
from semgap.engine.executor import Executor
from semgap.engine.sampling import draw
from semgap.kv.blocks import KVCache
from semgap.kv.handles import Live, Recovered
from semgap.kv.recovery import LiveCaches
from semgap.policy import SessionSpec
from semgap.tensors import Array, Tensor, TensorClass
from semgap.wire import messages
from semgap.wire.frames import Frame, FrameError
from semgap.wire.ledger import Direction
from semgap.wire.link import Link, Refused
from semgap.wire.messages import Operation
from semgap.worker.step_cost import StepCost, Stopwatch

Answer = tuple[TensorClass, Array]
"""The class and the tensor of a reply: the wire's, or torch's if its codec works on the device."""


class Steps:
    """Runs one model for one client. Each step's cost is appended to `costs`.

    `caches` are the session's handles, or None if the KV cache crosses with every step; then one scratch cache serves all steps.
    """

    def __init__(self, link: Link, spec: SessionSpec, executor: Executor, caches: LiveCaches | None, costs: list[StepCost]) -> None:
        self.executor, self.caches = executor, caches
        self._link, self._spec, self._policy, self._costs = link, spec, spec.policy, costs
        self._alone: DecodeAlone | None = None
        self._scratch = executor.new_cache() if caches is None else None
        self._ahead: deque[Frame] = deque()  # the window that the client requested while another one ran
        self._last_drawn: tuple[int, int] | None = None  # handle and token of a window that ran to its end: another one may follow it

    @property
    def handles(self) -> LiveCaches:
        """The session's handles. Refused if it has none."""
        if self.caches is None:
            raise Refused("handle", "this session has no handles: its mode ships the cache in every step")
        return self.caches

    def forward(self, request: Frame, watch: Stopwatch) -> None:
        """Runs a frame's tokens over a handle's cache, or over the cache that came with them."""
        forward = request.header_as(messages.Forward)
        tokens = self.tokens(request)
        self.executor.check_room(tokens, forward.position)
        live, recovered = None, None
        if self.caches is None:
            cache = self._cache_that_came(request, forward)
            self._start(watch)
            hidden = self.executor.forward(tokens, cache)
        else:
            self._start(watch)
            live = self._open(request, forward)  # may have to make room
            cache = live.cache
            hidden, recovered = self.caches.forward(live, tokens)
        answer = self._answer(hidden, live)
        watch.stop()
        self._link.reply(request, messages.Forwarded((), live.number if live else 0), self._encoded(answer, cache))
        self._offload(request, cache)
        self._costs.append(watch.cost(request.sequence, recovered))

    def tokens(self, request: Frame) -> np.ndarray:
        """The one row of token ids (n,) of a frame."""
        sent = self._link.decode(request, _only(request, TensorClass.TOKENS))
        if len(sent.shape) != 1 or sent.dtype.is_float:
            raise Refused("tokens", f"tokens are {sent.dtype.name} {sent.shape}; a row of integers was expected")
        return sent.numpy()

    def decode_window(self, request: Frame) -> None:
        """Decodes without further requests, and streams the drawn tokens until a stop token or a cancel."""
        window = request.header_as(messages.DecodeWindow)
        if self._policy.reply.kind != "token":
            raise Refused("forward", f"a window needs reply.kind token, and this session replies {self._policy.reply.kind}")
        if not window.count:
            raise Refused("forward", "a window of 0 steps has no last frame; ask for 1 or more")
        last_drawn, self._last_drawn = self._last_drawn, None
        if window.follows:
            if last_drawn is None or last_drawn[0] != window.handle:  # the window before was cut short: so is this one
                self._stream(request, [], True)
                return
            position = self.handles.get(window.handle).cache.filled
            window = msgspec.structs.replace(window, position=position, token=last_drawn[1])
        live = self._rewound(request, window.handle, window.position)
        self._run_window(request, window, live)
        self._offload(request, live.cache)

    def decode_alone(self, request: Frame) -> None:
        """Decodes positions of a handle over a copy of it, without the client between two steps, and without a planted wait."""
        asked = request.header_as(messages.DecodeAlone)
        live = self.handles.get(asked.handle)
        if self._alone is None:
            self._alone = DecodeAlone(self.executor, KVCache(self.handles.pool))
        if not self._alone.holds(asked.handle, asked.position):
            self.bring_back(request, live.cache)
            if not self.handles.is_whole(live):
                raise Refused("handle", f"handle {asked.handle} misses KV blocks; only a whole one is copied")
            self._alone.copy(asked.handle, live.cache)
            self._offload(request, live.cache)
        drawn, took_ns = self._alone.decode(asked.position, asked.token, asked.count, self._spec.seed, live.request)
        self._link.reply(request, messages.DecodedAlone((), tuple(drawn), tuple(took_ns)))

    def next_ahead(self) -> Frame | None:
        """The window that the client requested while another one ran, once."""
        return self._ahead.popleft() if self._ahead else None

    def end_of_windows(self) -> None:
        """A request other than a window came: no window can follow the last one."""
        self._last_drawn = None

    def bring_back(self, request: Frame, cache: KVCache) -> None:
        """Copies an offloaded cache back to the device."""
        moved = cache.restore()
        if moved:
            self._link.ledger.count_copy(Direction.UP, request.operation, request.kind, TensorClass.KV, moved)

    def _offload(self, request: Frame, cache: KVCache) -> None:
        if self._policy.kv_cache != "offloaded":
            return
        moved = cache.offload()
        if moved:
            self._link.ledger.count_copy(Direction.DOWN, request.operation, request.kind, TensorClass.KV, moved)

    def _open(self, request: Frame, forward: messages.Forward) -> Live:
        """The handle of a step; a new one for handle 0."""
        if forward.handle:
            return self._rewound(request, forward.handle, forward.position)
        if forward.position:
            raise Refused("handle", f"a new handle starts at position 0, not {forward.position}")
        return self.handles.open(forward.request)

    def _rewound(self, request: Frame, handle: int, position: int) -> Live:
        """A handle at `position`: a client continues from the last token that it took, whatever a window drew after it."""
        live = self.handles.get(handle)
        self.bring_back(request, live.cache)
        try:
            self.handles.rewind(live, position)
        except ValueError as error:
            raise Refused("position", str(error)) from error
        return live

    def _cache_that_came(self, request: Frame, forward: messages.Forward) -> KVCache:
        cache = self._scratch
        assert cache is not None
        if forward.position:
            packed = self._link.decode(request, _only(request, TensorClass.KV))
            if packed.dtype is not cache.pool.dtype:
                raise Refused("forward", f"a KV cache of {packed.dtype.name} came, the session computes in {cache.pool.dtype.name}")
            cache.load(cache.pool.unpack(packed))
        else:
            cache.clear()
        if cache.filled != forward.position:
            raise Refused("position", f"a KV cache of {cache.filled} positions came, the client says {forward.position}")
        return cache

    def _run_window(self, request: Frame, window: messages.DecodeWindow, live: Live) -> None:
        """Streams a window's tokens, `coalesce` to a frame. A step whose token was never sent has no cost."""
        waiting: list[int] = []
        unsent: list[StepCost] = []
        with closing(self._drawn(live, window)) as steps:
            for number, (token, watch, recovered) in enumerate(steps, 1):
                waiting.append(token)
                stops = token in self._spec.stop_tokens
                last = number == window.count or stops or self._is_cancelled()
                if last or len(waiting) == self._policy.coalesce:
                    self._stream(request, waiting, last)
                    waiting = []
                unsent.append(watch.cost(request.sequence, recovered))
                if not waiting:
                    unsent[0].codec_ns = sum(cost.codec_ns for cost in unsent)  # of their common frame
                    for cost in unsent[1:]:
                        cost.codec_ns = 0
                    self._costs += unsent
                    unsent = []
                if last:
                    self._last_drawn = (window.handle, token) if number == window.count and not stops else None
                    break

    def _drawn(self, live: Live, window: messages.DecodeWindow) -> Generator[tuple[int, Stopwatch, Recovered | None]]:
        """A window's tokens and costs. If blocks are missing, the first step runs on its own and restores them."""
        handles, token, count = self.handles, window.token, window.count
        watch = self._started_watch()
        if not handles.is_whole(live):
            self.executor.check_room(np.array([token]), live.cache.filled)  # before any block is fetched
            hidden, recovered = handles.forward(live, np.array([token]))
            token = self._draw(self.executor.logits(hidden[-1:]), live)
            watch.stop()
            yield token, watch, recovered
            count -= 1
            watch = self._started_watch()
        with closing(self.executor.decode_window(token, live.cache, count, self._spec.seed, live.request)) as steps:
            for drawn in steps:
                watch.stop_at(drawn.gpu_ns)
                handles.fed(live, token, watch.compute_ns / 1e9)
                token = drawn.token
                yield token, watch, None
                watch = self._started_watch()

    def _started_watch(self) -> Stopwatch:
        watch = Stopwatch(self.executor.device, self._link.ledger)
        self._start(watch)
        return watch

    def _start(self, watch: Stopwatch) -> None:
        """Begins a step's compute, after the policy's planted wait: it belongs to the gap. Busy, as compute is."""
        end_ns = time.perf_counter_ns() + 1000 * self._policy.plant_us
        while time.perf_counter_ns() < end_ns:
            pass
        watch.start()

    def _stream(self, request: Frame, tokens: list[int], last: bool) -> None:
        self._link.stream(request, tokens, self.executor.vocab_size > 1 << 16, last)

    def _is_cancelled(self) -> bool:
        """Receives what came while a window runs: a cancel, or the request of the following window. FrameError for anything else."""
        while self._link.has_input():
            request = self._link.next_request()
            if request.operation is Operation.CANCEL:
                return True
            if self._ahead or not (isinstance(request.header, messages.DecodeWindow) and request.header.follows):
                raise FrameError("operation", f"{request.operation.name.lower()} came while a window was running")
            self._ahead.append(request)
        return False

    def _answer(self, hidden: Array, live: Live | None) -> Answer:
        """The tensor that the policy's reply kind sends, of final hidden states (n, hidden)."""
        kind = self._policy.reply.kind
        if kind == "hidden_last":
            return self._replied(hidden[-1:], TensorClass.HIDDEN)
        logits = self.executor.logits(hidden if kind == "logits_all" else hidden[-1:])
        if kind == "token":
            assert live is not None
            token = np.array([self._draw(logits, live)], dtype=np.uint32)
            return TensorClass.TOKENS, Tensor.from_numpy(token, TensorClass.TOKENS)
        return self._replied(logits, TensorClass.LOGITS)

    def _replied(self, tensor: Array, cls: TensorClass) -> Answer:
        codec = self._policy.codec_for(cls)
        named = codecs.codec_named(codec) if isinstance(codec, str) else codec
        return cls, tensor if stays_on_device(tensor, named) else to_wire(tensor, cls)

    def _draw(self, logits: Array, live: Live) -> int:
        """The token that follows a handle's content, by the session's rule; the client would have drawn the same."""
        row = to_wire(logits[-1], TensorClass.LOGITS).as_float32()
        return draw(row, self._spec.sampling, self._spec.seed, live.request, live.cache.filled).token

    def _encoded(self, answer: Answer, cache: KVCache) -> list[codecs.Encoded]:
        cls, tensor = answer
        codec = self._policy.codec_for(cls)
        encoded = [codecs.encode(tensor, codec) if isinstance(tensor, Tensor) else encode(tensor, cls, codec)]
        if self._policy.is_stateless:
            encoded.append(encode(cache.export(), TensorClass.KV, self._policy.codec_for(TensorClass.KV), cache.pool.dtype))
        return encoded


def _only(request: Frame, cls: TensorClass) -> int:
    """The index of a frame's one tensor of a class."""
    indices = [index for index, tensor in enumerate(request.header.tensors) if tensor.cls is cls]
    if len(indices) != 1:
        raise Refused("forward", f"{len(indices)} tensors of class {cls.name.lower()} in a forward frame, 1 expected")
    return indices[0]
