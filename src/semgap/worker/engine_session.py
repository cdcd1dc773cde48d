"""A session whose requests the worker's engine runs: a proxy between its client and the engine, in the session's own process."""

from __future__ import annotations

import os
import select
import time
from dataclasses import dataclass, field

import msgspec
import numpy as np

from semgap import codecs
from semgap.engine.architecture import architecture_of
from semgap.engine.weights import Weights
from semgap.policy import SessionSpec
from semgap.tensors import DType, Tensor, TensorClass
from semgap.wire import messages
from semgap.wire.frames import Coded, DeadlineError, Destinations, Frame, WireError
from semgap.wire.link import Link, Refused, control
from semgap.wire.messages import Gained, Header, Kind, Operation
from semgap.wire.waiting import ready
from semgap.worker.engine_channel import (
    AskBatches,
    Batches,
    CallRefused,
    Calls,
    Channel,
    Fault,
    FromEngine,
    Gone,
    Member,
    Message,
    Stepped,
    Welcome,
)
from semgap.worker.engine_founding import EngineSpec, digests_of, kv_blocks, write_founding
from semgap.worker.resources import Resources
from semgap.worker.weight_upload import offered_hashes


class EngineGone(Coded, WireError):
    """The engine has ended, and this session's requests with it."""

    def __init__(self, message: str) -> None:
        super().__init__("engine", message)


class EngineSession:
    """Joins an engine for one client, passes the client's calls on to it, and streams the drawn tokens back.

    Refused for a session that no engine can serve. Once it has joined, every method raises EngineGone when the engine has ended.
    """

    def __init__(self, link: Link, spec: SessionSpec, executor: str, device: str, threads: int, resources: Resources) -> None:
        if not 0 <= spec.seed < 1 << 64:
            raise Refused("session", f"sampling seed is {spec.seed}; use 0..2^64 - 1")
        self.welcome: Welcome | None = None
        self._link, self._spec, self._resources = link, spec, resources
        self._device, self._executor, self._threads = device, executor, threads
        self._engine: EngineSpec | None = None
        self._key = b""
        self._channel: Channel[FromEngine] | None = None
        self._vocab = 0
        self._asked: dict[int, tuple[Kind, int]] = {}  # kind and sequence of the frame of each running call
        self._newest = (Kind.SETUP, 0)

    @property
    def has_joined(self) -> bool:
        """True if an engine serves this session."""
        return self._channel is not None

    def offer(self, request: Frame) -> bool:
        """Takes the offer of a model, and leaves the engine of an earlier one. True if an engine has its weights already: joins that.

        KVBudgetError if the KV budget is less than one request.
        """
        self.leave()
        spec, weights = self._spec, request.header_as(messages.OfferWeights).weights
        assert spec.model is not None and spec.policy.batching is not None
        model = architecture_of(spec.model)
        blocks = kv_blocks(model.kv_shape(spec.max_length), spec.handles, spec.kv_budget)
        what = (spec.model, weights, spec.dtype, self._device, self._executor, self._threads, spec.max_length)
        self._engine, self._vocab = EngineSpec(*what, spec.policy.batching, blocks), model.vocab
        if spec.policy.weights != "by_hash":
            return False
        self._key = self._engine.key(offered_hashes(request, len(weights)))
        return self._joins()

    def bring(self, weights: Weights) -> int | None:
        """Joins an engine that has these weights, given in host memory. If there is none, gives the file with which `found` begins one."""
        assert self._engine is not None
        self._key = self._engine.key(digests_of(weights))
        return None if self._joins() else write_founding(self._engine, weights)

    def found(self, founding_fd: int) -> None:
        """Joins an engine, which begins with that file if nobody began it meanwhile. EngineGone if it cannot begin."""
        try:
            if not self._joins(founding_fd):
                raise EngineGone("the engine of this model ended while it began; the worker's log may say why")
        finally:
            os.close(founding_fd)

    def leave(self) -> None:
        """Leaves the engine, which then forgets all requests of this session."""
        if self._channel:
            self._channel.close()
        self._channel = self.welcome = None
        self._asked.clear()

    def next_request(self, destinations: Destinations | None) -> Frame:
        """The client's next request. Until it comes, drawn tokens go out. DeadlineError if client and engine are silent for long."""
        channel = self._joined()
        poller, idle_s = select.poll(), self._link.timeouts.idle_s
        for each in (self._link.sock, channel):
            poller.register(each, select.POLLIN)
        silent_since_s = time.monotonic()
        while True:
            for message in self._receive(channel):
                self._pass_on(message)
                silent_since_s = time.monotonic()
            if self._link.has_input():
                return self._link.next_request(destinations)
            left_s = silent_since_s + idle_s - time.monotonic()
            if left_s <= 0:
                raise DeadlineError("the peer sent no whole frame in time")
            poller.poll(1000 * left_s)

    def advance(self, request: Frame) -> None:
        """Passes a frame's calls on to the engine. Refused for two calls of one request, or ids of another number."""
        self._joined()
        calls, ids = request.header_as(messages.Advance).calls, self._ids(request)
        numbers = {call.request for call in calls}
        if len(numbers) < len(calls):
            raise Refused("advance", f"{len(calls)} calls of {len(numbers)} requests in a frame; use one call a request")
        if sum(call.tokens for call in calls) != ids.size:
            raise Refused("tokens", f"the calls feed {sum(call.tokens for call in calls)} tokens, and {ids.size} came")
        self._newest = (request.kind, request.sequence)
        self._asked |= {call.request: self._newest for call in calls if call.draws}
        self._say(Calls(calls, ids.astype(np.uint32).tobytes()))

    def get_batches(self, request: Frame) -> None:
        """Answers with the engine's state, and the rows of its last steps."""
        self._say(AskBatches())
        channel, batches = self._joined(), None
        while batches is None:
            ready([channel])
            for message in self._receive(channel):
                if isinstance(message, Batches):
                    batches = message
                else:
                    self._pass_on(message)
        self._link.reply(request, messages.Bodied((), msgspec.json.encode(batches.state)), [control(batches.rows)])

    def _ids(self, request: Frame) -> np.ndarray:
        """The token ids (n,) of a frame, which may have none."""
        tensors = request.header.tensors
        if not tensors:
            return np.empty(0, np.int64)
        if len(tensors) > 1 or tensors[0].cls is not TensorClass.TOKENS or len(tensors[0].shape) != 1 or tensors[0].dtype.is_float:
            raise Refused("tokens", "the ids of all calls of a frame are one row of integers, of class tokens")
        ids = self._link.decode(request, 0).numpy()
        if ids.size and (ids.min() < 0 or ids.max() >= self._vocab):
            raise Refused("tokens", f"tokens must be ids in 0..{self._vocab - 1}")
        return ids

    def _pass_on(self, message: FromEngine) -> None:
        """Passes the engine's message on to the client."""
        match message:
            case Stepped():
                self._stream(message)
            case CallRefused(request, code, why):
                frame = _frame_of(*self._asked.pop(request, self._newest))
                self._link.reply_error(frame, code, why)
            case Fault(why):
                raise EngineGone(why)

    def _stream(self, stepped: Stepped) -> None:
        """One frame for a step; or one for each kind, if its calls came in frames of several kinds."""
        frames: dict[Kind, _Part] = {}
        begin = 0
        for gained in stepped.gained:
            kind, sequence = self._asked.get(gained.request, self._newest)
            part = frames.setdefault(kind, _Part(_frame_of(kind, sequence)))
            part.gained.append(gained)
            part.ids += stepped.ids[begin : begin + gained.tokens]
            begin += gained.tokens
            if gained.last:
                self._asked.pop(gained.request, None)
        for part in frames.values():
            dtype = DType.U32 if self._vocab > 1 << 16 else DType.U16
            ids = Tensor.from_numpy(np.array(part.ids, dtype.numpy), TensorClass.TOKENS)
            self._link.reply(part.answers, messages.Advanced((), tuple(part.gained)), [codecs.encode(ids, "raw")])

    def _joins(self, founding_fd: int | None = None) -> bool:
        """Joins the engine of the key. False if there is none, and no file to begin one with. EngineGone if it says why it fails."""
        channel = Channel[FromEngine](self._resources.engines.ask(self._key, founding_fd), FromEngine)
        try:
            while not (said := channel.next()):
                pass
        except Gone:
            channel.close()
            return False
        if isinstance(said[0], Fault):
            channel.close()
            raise EngineGone(said[0].message)
        assert isinstance(said[0], Welcome)
        self._channel, self.welcome = channel, said[0]
        self._say(Member(self._spec.sampling, self._spec.seed, self._spec.stop_tokens))
        if self._resources.io_cpus:
            os.sched_setaffinity(0, self._resources.io_cpus)  # the computing cores are the engine's now
        return True

    def _joined(self) -> Channel[FromEngine]:
        if self._channel is None:
            raise Refused("weights", "this session's model has no engine yet: its weights have not been sent")
        return self._channel

    def _say(self, message: Message) -> None:
        try:
            self._joined().send_whole(message)
        except Gone as error:
            raise self._gone() from error

    def _receive(self, channel: Channel[FromEngine]) -> list[FromEngine]:
        try:
            return channel.receive()
        except Gone as error:
            raise self._gone() from error

    def _gone(self) -> EngineGone:
        assert self.welcome is not None
        return EngineGone(f"engine {self.welcome.pid}, which ran this session's requests, has ended; the worker's log may say why")


@dataclass
class _Part:
    """The part of a step that one frame carries, and the frame that it answers."""

    answers: Frame
    gained: list[Gained] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)


def _frame_of(kind: Kind, sequence: int) -> Frame:
    """An advance frame as its answers know it."""
    return Frame(Operation.ADVANCE, kind, 0, sequence, Header(), (), 0, 0)
