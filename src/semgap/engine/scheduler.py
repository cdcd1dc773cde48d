"""Which requests run in the next step of the engine, and on how many tokens each. No sockets, no executor, no clock: time is passed in.

A request has known tokens and computed ones; there are no phases. It is ready if its call wants draws: some known tokens are then not
computed yet. Batching says which ready requests share a step.
"""

from bisect import insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from semgap.engine.batch import Run
from semgap.engine.live_request import CallError, LiveRequest, RequestKey
from semgap.engine.request_blocks import RequestBlocks
from semgap.kv.block_tables import BlockTables
from semgap.policy import Batching
from semgap.wire.messages import Call

IDLE_S = 5.0  # a request without a call for so long gives its blocks to a queued one
PATIENCE_S = 10.0  # a request that has waited so long comes first, whatever the deadlines of others

Stops = Mapping[int, Sequence[int] | frozenset[int]]


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One run of a step, and whose it is."""

    key: RequestKey
    run: Run
    request: LiveRequest


@dataclass(frozen=True, slots=True)
class Outcome:
    """A token that a step drew for a request; `last`: its call gets no more.

    `queued_s`: from the call's arrival, or from the call's token before, to the first step that ran some of it. `compute_s`: of the steps
    that ran some of it.
    """

    key: RequestKey
    token: int
    last: bool
    queued_s: float
    compute_s: float


class Scheduler:
    """Requests of all sessions under one Batching. Call `schedule`, run what it returns, and give the drawn tokens to `took`.

    A new request queues until it is admitted: at most `max_requests` are, and only while the pool has room for the known tokens of all of
    them and a block more for each. If a step still finds no free block, the youngest admitted request gives up its blocks and queues again;
    the oldest one never does, so it reaches its end. Cancel and leave may come at any moment, also between `schedule` and `took`.
    """

    def __init__(self, batching: Batching, tables: BlockTables, max_length: int) -> None:
        self.batching, self.tables = batching, tables
        self._blocks = RequestBlocks(tables, batching.prefix)
        self._max_length = max_length
        self._slots = 1 if batching.turns == "whole" else batching.max_requests
        self.requests: dict[RequestKey, LiveRequest] = {}
        self._running: list[LiveRequest] = []  # admitted, in the order of their admission
        self._queue: list[LiveRequest] = []  # oldest first
        self._ages = count()
        self._token_s = float("inf")
        self._now_s = 0.0

    @property
    def live(self) -> int:
        """Admitted requests, those between two calls included."""
        return len(self._running)

    @property
    def queued(self) -> int:
        """Requests that want tokens and are not admitted."""
        return len(self._queue)

    def add(self, key: RequestKey, call: Call, tokens: np.ndarray, now_s: float) -> bool:
        """Takes a call with its `tokens` (call.tokens,), whose ids the caller has checked. With draws 0 and ends it is `cancel`.

        True if that took back a running call. CallError (a ValueError) if the call cannot be taken: codes queue, kv_budget, position,
        tokens, drawing. It then changes nothing.
        """
        if call.ends and not call.draws:
            return self.cancel(key)
        request = self.requests.get(key)
        if request is None:
            request = self._begin(key, call)
        request.check(call, tokens)
        request.feed(call, tokens, now_s)
        self.requests[key] = request
        if request.draws and not request.runs:
            self._enqueue(request)
        return False

    def cancel(self, key: RequestKey) -> bool:
        """Ends a request and frees its blocks; True if its call still wanted draws. A key that is not known is ignored."""
        request = self.requests.pop(key, None)
        if request is None:
            return False
        if request.runs:
            self._release(request)
        elif request in self._queue:
            self._queue.remove(request)
        return request.draws > 0

    def leave(self, session: int) -> None:
        """Cancels all requests of a session."""
        for key in [key for key in self.requests if key[0] == session]:
            self.cancel(key)

    def schedule(self, now_s: float) -> list[Scheduled]:
        """The runs of the next step, whose blocks are allotted; [] if nothing is ready."""
        self._now_s = now_s
        while True:
            self._admit()
            running = len(self._running)
            step = self._fill_step()
            if step or len(self._running) == running:  # a request that preempted itself leaves its turn to the others
                break
        for request in step:
            request.is_new_call = False
            if request.started_s is None:
                request.started_s = now_s
        return [Scheduled(request.key, request.run(tokens), request) for request, tokens in step.items()]

    def next_due_s(self, now_s: float) -> float | None:
        """Seconds until `schedule` may return a step if no call comes before, 0 if it may now; None if it needs a new call."""
        self._now_s = now_s
        self._admit()
        due = [self._due_s(request) for request in self._running if request.draws]
        if self._queue:
            due += [request.ready_s + IDLE_S for request in self._running if not request.draws]
        return max(0.0, min(due) - now_s) if due else None

    def took(
        self, scheduled: Sequence[Scheduled], drawn: Sequence[int | None], stops: Stops, compute_s: float, now_s: float
    ) -> list[Outcome]:
        """Takes the step's tokens, one or None a run, in order. `stops`: stop tokens by session number. One outcome a run that drew."""
        outcomes = []
        self._token_s = min(self._token_s, compute_s / max(1, sum(each.run.tokens.size for each in scheduled)))
        for each, token in zip(scheduled, drawn, strict=True):
            request, run = each.request, each.run
            if self.requests.get(each.key) is not request:
                continue  # cancelled meanwhile
            request.computed += run.tokens.size
            request.compute_s += compute_s
            self._blocks.seal(request)
            if run.draws:
                assert token is not None, f"no token was drawn for request {each.key}"
                outcomes.append(self._outcome(request, token, stops, now_s))
        return outcomes

    def _outcome(self, request: LiveRequest, token: int, stops: Stops, now_s: float) -> Outcome:
        last = request.draw(token, stops.get(request.key[0], ()))
        assert request.started_s is not None
        outcome = Outcome(request.key, token, last, request.started_s - request.ready_s, request.compute_s)
        if last and request.ends:
            self.cancel(request.key)
        else:
            request.wait_from(now_s)
        return outcome

    def _begin(self, key: RequestKey, call: Call) -> LiveRequest:
        request = LiveRequest.begun(key, next(self._ages), call, self._max_length)
        tables = self.tables
        if tables.blocks_of(call.most) > tables.blocks:
            room = tables.blocks * tables.positions
            raise CallError("kv_budget", f"request {key[1]} wants {call.most} positions, the KV pool has {room}; raise kv_budget")
        if len(self.requests) >= self._slots + self.batching.max_queue:
            alive, limit = len(self.requests), self.batching.max_queue
            raise CallError("queue", f"{alive} requests are alive and the queue takes {limit}; try later, or raise batching.max_queue")
        return request

    def _enqueue(self, request: LiveRequest) -> None:
        insort(self._queue, request, key=lambda queued: queued.age)

    def _admit(self) -> None:
        """Moves queued requests in while there is room: in order of age, or of urgency under deadlines. None is overtaken for its size."""
        while self._queue:
            head = min(self._queue, key=self._urgency) if self.batching.deadline else self._queue[0]
            while not self._fits(head):
                silent = next((each for each in self._running if not each.draws and self._now_s >= each.ready_s + IDLE_S), None)
                if silent is None:
                    return
                self._preempt(silent)
            self._queue.remove(head)
            self._running.append(head)
            head.runs = True

    def _fits(self, request: LiveRequest) -> bool:
        """True if a slot and enough blocks are free. The request then holds the filled blocks of its prefix."""
        if len(self._running) >= self._slots:
            return False
        self._blocks.adopt(request)
        if not self._running or sum(map(self._blocks.missing, (*self._running, request))) <= self.tables.free:
            return True
        self._blocks.free(request)
        return False

    def _fill_step(self) -> dict[LiveRequest, int]:
        """The tokens that each request computes in this step."""
        batching = self.batching
        cuts = batching.merges == "all"
        step: dict[LiveRequest, int] = {}
        for request in self._candidates():
            if not request.runs:
                continue  # preempted in this step
            chosen = self._blocks.claimant(request)
            if chosen in step:
                continue
            left = batching.step_tokens - sum(step.values()) if cuts or step else chosen.left
            if left <= 0 or (chosen.left > left and not cuts):
                break
            self._run_in(step, chosen, min(chosen.left, left))
        return step

    def _run_in(self, step: dict[LiveRequest, int], request: LiveRequest, tokens: int) -> None:
        """Adds a request with blocks for its `tokens` to the step. While the pool has none, preempts the youngest, out of the step too."""
        while not self._blocks.grow(request, tokens):
            youngest = max(self._running, key=lambda running: running.age)
            step.pop(youngest, None)
            self._preempt(youngest)
            if youngest is request:
                return
        step[request] = tokens

    def _candidates(self) -> Iterable[LiveRequest]:
        """Ready requests that may share a step, the most urgent first, decodes before prefills."""
        ready = [request for request in self._running if request.draws]
        for request in ready:
            self._blocks.adopt(request)
        ready.sort(key=self._urgency)
        match self.batching.merges:
            case "nothing":
                return ready[:1]
            case "alike":
                return next(self._due_groups(ready), [])
            case "lengths":
                return [request for request in ready if request.is_decode == ready[0].is_decode]
            case "all":
                return sorted(ready, key=lambda request: not request.is_decode)

    def _due_groups(self, ready: list[LiveRequest]) -> Iterator[list[LiveRequest]]:
        """Groups of equal lengths and positions of which one has waited long enough, or that fill all slots."""
        groups: dict[tuple[int, int], list[LiveRequest]] = {}
        for request in ready:
            groups.setdefault((request.left, request.computed), []).append(request)
        for group in groups.values():
            if len(group) >= self._slots or any(self._due_s(request) <= self._now_s for request in group):
                yield group

    def _due_s(self, request: LiveRequest) -> float:
        """From when on it may run. Only a new call waits for others: later draws of a call find them there."""
        return request.ready_s + (self.batching.wait_ms * 1e-3 if request.is_new_call else 0.0)

    def _urgency(self, request: LiveRequest) -> tuple[int, float, float]:
        """Smaller comes first: who has waited longest, or who has the least slack of those that can still be in time; then the late."""
        waits = request.ready_s
        if not self.batching.deadline or self._now_s - waits > PATIENCE_S:
            return 0, waits, request.age
        slack_s = request.slack_s(self._now_s, self._token_s if self._token_s < float("inf") else 0.0)
        return (1, slack_s, waits) if slack_s >= 0 else (2, waits, request.age)

    def _preempt(self, request: LiveRequest) -> None:
        """Takes all blocks of an admitted request. It computes its known tokens again once it is admitted again."""
        self._release(request)
        if request.draws:
            self._enqueue(request)

    def _release(self, request: LiveRequest) -> None:
        self._blocks.free(request)
        self._running.remove(request)
        request.runs = False
