"""The course of one level of a load: which request comes when, and the measured window, without ramp and drain."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque

from semgap.client.load_plan import Level, Planned
from semgap.client.load_requests import LiveRequest
from semgap.client.spec import ClientError

_STAY_SHARE, _STAY_LEAST = 0.25, 8
"""A queue is unstable if this share of the window's arrivals stay, and so many."""


class UnstableQueueError(ClientError):
    """Requests arrive faster than the worker serves them."""


class Course(ABC):
    """One level from its start at `now_s` on (CLOCK_MONOTONIC). The window is (`start_s`, `end_s`], each None until it is known."""

    def __init__(self, level: Level, now_s: float) -> None:
        self.level = level
        self.start_s: float | None = None
        self.end_s: float | None = None
        self._begun_s = now_s
        self._started = 0

    @classmethod
    def of(cls, level: Level, now_s: float) -> Course:
        """A closed loop if the level has a concurrency, else an open one."""
        return Closed(level, now_s) if level.concurrency else Open(level, now_s)

    @property
    @abstractmethod
    def is_over(self) -> bool:
        """True if every measured request has ended."""

    @abstractmethod
    def due(self, now_s: float) -> tuple[int, Planned, float] | None:
        """The next request that should be sent by now: its index in the level, the request, and when it should; None: none yet."""

    @abstractmethod
    def next_s(self) -> float | None:
        """When the next request comes by itself; None: only the end of another brings one."""

    @abstractmethod
    def drew(self, index: int, tokens: int, at_s: float) -> None:
        """Takes note that request `index` has so many tokens at `at_s`."""

    @abstractmethod
    def ended(self, request: LiveRequest, index: int, at_s: float) -> None:
        """A request has all its tokens. Marks it if it is measured."""

    @abstractmethod
    def require_stable(self, live_start: int, live_end: int) -> None:
        """UnstableQueueError if the requests alive grew too much over the window."""


class Closed(Course):
    """So many places, each with one request alive: when it ends, the next one comes. ClientError if the level has no further request.

    The places begin one after the other while the first request draws its tokens, so that they do not run in step. The window begins at
    the first end of a request after the first ones of all places have a token: the loop is then as it stays. One place needs no ramp.
    """

    def __init__(self, level: Level, now_s: float) -> None:
        super().__init__(level, now_s)
        assert level.concurrency is not None
        self._places, self._begun = level.concurrency, 1
        self._new, self._free = deque([now_s]), deque[float]()  # since when a place waits for its first request, or for its next
        self._silent: set[int] = set()  # first requests without a token
        self._left = level.measured
        if self._places == 1:
            self.start_s = now_s

    @property
    def is_over(self) -> bool:
        return not self._left

    def due(self, now_s: float) -> tuple[int, Planned, float] | None:
        waiting = self._new or self._free
        if not waiting or self.is_over:
            return None
        index = self._started
        if index == len(self.level.requests):
            raise ClientError(
                f"a loop of {self._places} sent all {index} requests of its plan before its window ended, and a request that is sent twice "
                "would find its own KV cache; make the phase's requests more alike in length, or raise its requests"
            )
        self._started += 1
        if self._new:
            self._silent.add(index)
        return index, self.level.requests[index], waiting.popleft()

    def next_s(self) -> float | None:
        return None

    def drew(self, index: int, tokens: int, at_s: float) -> None:
        self._silent.discard(index)
        begun = min(self._places, 1 + tokens * self._places // self.level.requests[0].tokens) if index == 0 else 0
        self._new.extend([at_s] * (begun - self._begun))
        self._begun = max(self._begun, begun)

    def ended(self, request: LiveRequest, index: int, at_s: float) -> None:
        self._free.append(at_s)
        if self.start_s is None:
            if self._begun == self._places and not self._new and not self._silent:
                self.start_s = at_s
        elif self.end_s is None and at_s > self.start_s:  # several may end in one frame
            request.measured = True
            self._left -= 1
            self.end_s = None if self._left else at_s

    def require_stable(self, live_start: int, live_end: int) -> None:
        """Always: no more than the loop's requests are alive."""


class Open(Course):
    """Requests come at their times, whatever the worker does. The window lasts from the first measured arrival to the last."""

    def __init__(self, level: Level, now_s: float) -> None:
        super().__init__(level, now_s)
        self._last = level.ramp + level.measured - 1
        self._left = level.measured
        self.start_s, self.end_s = self._time(level.ramp), self._time(self._last)

    @property
    def is_over(self) -> bool:
        return not self._left

    def due(self, now_s: float) -> tuple[int, Planned, float] | None:
        at_s = self.next_s()
        if at_s is None or at_s > now_s:
            return None
        index = self._started
        self._started += 1
        return index, self.level.requests[index], at_s

    def next_s(self) -> float | None:
        return self._time(self._started) if self._started < len(self.level.requests) else None

    def drew(self, index: int, tokens: int, at_s: float) -> None:
        """Does nothing: requests come at their times."""

    def ended(self, request: LiveRequest, index: int, at_s: float) -> None:
        if self.level.ramp <= index <= self._last:
            request.measured = True
            self._left -= 1

    def require_stable(self, live_start: int, live_end: int) -> None:
        stayed, came = live_end - live_start, self.level.measured
        if stayed >= max(_STAY_LEAST, _STAY_SHARE * came):
            raise UnstableQueueError(
                f"the queue is unstable: {came} requests came at {self.level.rate_per_s:.3g}/s, and {stayed} more were alive at the end of "
                "the measured window than at its start, so that latencies say how long it lasted; lower the rate of the phase's arrivals"
            )

    def _time(self, index: int) -> float:
        at_s = self.level.requests[index].at_s
        assert at_s is not None
        return self._begun_s + at_s
