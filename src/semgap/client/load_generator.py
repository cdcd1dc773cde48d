"""The load generator: thin clients of many requests in one process and one thread, over one link each or fewer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from semgap import codecs
from semgap.client.load_course import Course, UnstableQueueError
from semgap.client.load_plan import Level
from semgap.client.load_requests import LiveRequest
from semgap.client.report import LoadLevel
from semgap.client.spec import ClientError
from semgap.policy import Policy
from semgap.tensors import Tensor, TensorClass
from semgap.wire import messages
from semgap.wire.link import Link, RemoteError
from semgap.wire.messages import Kind, Operation
from semgap.wire.waiting import Watch

_WAIT_S = 1.0


@dataclass
class Snapshot:
    """Requests alive and running sums over all links, at one moment: frame bytes up and down, round trips, CPU seconds."""

    live: int
    up: int
    down: int
    round_trips: int
    cpu_s: float


@dataclass
class LevelRun:
    """The results of a level: its requests in the order of sending, their indices in the level, and the books at the window's ends."""

    course: Course
    requests: list[LiveRequest] = field(default_factory=list)
    index_of: dict[int, int] = field(default_factory=dict)
    start: Snapshot | None = None
    end: Snapshot | None = None

    def summary(self) -> LoadLevel:
        """The level's window. Takes a level that is over."""
        level, start_s, end_s, start, end = self.course.level, self.course.start_s, self.course.end_s, self.start, self.end
        assert start_s is not None and end_s is not None and start is not None and end is not None
        came = np.array([at_s for request in self.requests for at_s in request.came_s if start_s < at_s <= end_s])
        first = int(np.count_nonzero(came <= (start_s + end_s) / 2))
        after_ramp = self.requests[level.ramp :]  # whose requests come several at a time
        late = [request.sent_s - request.arrived_s for request in after_ramp if request.sent_s is not None]
        return LoadLevel(
            level=level.number,
            concurrency=level.concurrency,
            rate_per_s=level.rate_per_s,
            share=level.share,
            start_s=start_s,
            end_s=end_s,
            requests=sum(request.measured for request in self.requests),
            tokens=len(came),
            half_tokens=(first, len(came) - first),
            live_start=start.live,
            live_end=end.live,
            up_frame_bytes=end.up - start.up,
            down_frame_bytes=end.down - start.down,
            round_trips=end.round_trips - start.round_trips,
            client_cpu_s=end.cpu_s - start.cpu_s,
            late_p95_s=float(np.quantile(late, 0.95, method="higher")),
            late_max_s=max(late),
        )


class Generator:
    """Runs levels over links, whose sessions are open and have their model. Numbers its requests from 0."""

    def __init__(self, links: Sequence[Link], policy: Policy, timeout_s: float) -> None:
        self._links, self._policy, self._timeout_s = links, policy, timeout_s
        self._numbers = 0
        self._live: dict[int, LiveRequest] = {}
        self._waiting: defaultdict[int, list[LiveRequest]] = defaultdict(list)  # for a call, by link
        self._kind = Kind.SETUP
        self._heard_s = time.monotonic()
        self._index_of = {link.sock: index for index, link in enumerate(links)}
        self._watch = Watch(self._index_of)

    def run(self, level: Level, warmup: bool = False) -> LevelRun:
        """Runs a level until its measured requests have ended, and ends all others. ClientError names a queue that is unstable."""
        run = LevelRun(Course.of(level, time.monotonic()))
        self._watch_window(run, warmup)
        while not run.course.is_over:
            self._start_due(run, warmup)
            self._send()
            self._receive(run, run.course.next_s())
            self._watch_window(run, warmup)
        self._cut_short(run)
        return run

    def _start_due(self, run: LevelRun, warmup: bool) -> None:
        while due := run.course.due(time.monotonic()):
            index, planned, arrived_s = due
            live = [0] * len(self._links)
            for each in self._live.values():
                live[each.connection] += 1
            request = LiveRequest(self._numbers, run.course.level.number, live.index(min(live)), planned, arrived_s, warmup)
            self._numbers += 1
            run.requests.append(request)
            run.index_of[request.number] = index
            self._live[request.number] = request
            self._waiting[request.connection].append(request)

    def _send(self) -> None:
        """One frame a link, with the calls of all its requests that wait for one."""
        for index, requests in self._waiting.items():
            now_s = time.monotonic()
            calls, fed = zip(*(request.next_call(self._policy, now_s) for request in requests), strict=True)
            for request in requests:
                if request.sent_s is None:
                    request.sent_s = now_s
                if request.cut and not request.awaits:
                    del self._live[request.number]
            link, ids = self._links[index], np.concatenate(fed)
            sent = [codecs.encode(Tensor.from_numpy(ids, TensorClass.TOKENS), self._policy.codec.tokens)] if len(ids) else []
            link.post(Operation.ADVANCE, messages.Advance((), calls), sent, self._kind)
            if any(call.draws for call in calls):
                link.ledger.count_round_trip(link.sending, Operation.ADVANCE, self._kind)
        self._waiting.clear()

    def _receive(self, run: LevelRun, until_s: float | None = None) -> None:
        """Waits for frames, at most `until_s`, and takes all that are there. ClientError if the worker is silent for too long."""
        wait_s = _WAIT_S if until_s is None else min(_WAIT_S, max(0.0, until_s - time.monotonic()))
        try:
            arrivals = [each for sock in self._watch.ready(wait_s) for each in self._frames(self._index_of[sock])]
        except RemoteError as error:
            if error.code != "queue":
                raise
            raise UnstableQueueError(f"the worker refuses a request, {len(self._live)} are alive: {error}") from error
        for gained, ids, at_s in arrivals:
            self._take(run, gained, ids, at_s)
        if arrivals or not self._live:
            self._heard_s = time.monotonic()
        elif time.monotonic() - self._heard_s > self._timeout_s:
            raise ClientError(f"the worker sent nothing for {self._timeout_s:g} s (timeouts.reply_s); {len(self._live)} requests are alive")

    def _frames(self, index: int) -> list[tuple[messages.Gained, list[int], float]]:
        """The tokens of all frames that lie ready on a link, by request, with the time of each frame."""
        link, found, more = self._links[index], [], True
        while more:
            frame = link.receive_any(Operation.ADVANCE)
            at_s, begin = time.monotonic(), 0
            ids = link.decode(frame, 0).numpy().tolist() if frame.header.tensors else []
            for gained in frame.header_as(messages.Advanced).gained:
                found.append((gained, ids[begin : begin + gained.tokens], at_s))
                begin += gained.tokens
            more = link.has_input()
        return found

    def _take(self, run: LevelRun, gained: messages.Gained, ids: list[int], at_s: float) -> None:
        request = self._live.get(gained.request)
        if request is None:
            raise ClientError(f"the worker sent tokens of request {gained.request}, which is not alive")
        over, index = request.take(ids, gained, at_s), run.index_of[request.number]
        run.course.drew(index, len(request.tokens), at_s)
        if not over:
            return
        if not request.is_done and not request.cut:
            self._waiting[request.connection].append(request)
            return
        del self._live[request.number]
        if request.is_done:
            run.course.ended(request, index, at_s)

    def _watch_window(self, run: LevelRun, warmup: bool) -> None:
        """Reads the books when the window begins and ends. Its calls are of kind regular."""
        now_s, course = time.monotonic(), run.course
        if run.start is None and course.start_s is not None and course.start_s <= now_s:
            run.start = self._snapshot()
            self._kind = Kind.SETUP if warmup else Kind.REGULAR
        if run.end is None and course.end_s is not None and course.end_s <= now_s:
            run.end = self._snapshot()
            self._kind = Kind.SETUP
            course.require_stable(run.start.live if run.start else 0, run.end.live)

    def _cut_short(self, run: LevelRun) -> None:
        """Takes all live requests back, and waits until the worker has ended the calls that ran."""
        self._waiting.clear()
        for request in self._live.values():
            request.cut = True
            self._waiting[request.connection].append(request)
        self._send()
        while self._live:
            self._receive(run)

    def _snapshot(self) -> Snapshot:
        ledgers = [link.ledger for link in self._links]
        sums = (sum(each.up.frame for each in ledgers), sum(each.down.frame for each in ledgers), sum(each.round_trips for each in ledgers))
        return Snapshot(len(self._live), *sums, time.process_time())
