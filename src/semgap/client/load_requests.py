"""A live request of a load, as its thin client sees it: its calls, its tokens, and when they came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from semgap.client.load_plan import Planned
from semgap.policy import Policy
from semgap.wire.messages import Call, Gained

_NO_TOKENS = np.empty(0, dtype=np.int64)


@dataclass(eq=False)
class LiveRequest:
    """Request `number` of the trial. Times in s, CLOCK_MONOTONIC. `arrived_s`: when its user wanted it sent.

    `cut`: nobody waits for its further tokens; its next call takes it back.
    """

    number: int
    level: int
    connection: int
    planned: Planned
    arrived_s: float
    warmup: bool = False
    measured: bool = False
    sent_s: float | None = None
    cut: bool = False
    tokens: list[int] = field(default_factory=list)
    came_s: list[float] = field(default_factory=list)
    calls: list[tuple[int, int]] = field(default_factory=list)
    _asked: int = 0

    @property
    def is_done(self) -> bool:
        """True if all its tokens are there."""
        return len(self.tokens) == self.planned.tokens

    @property
    def awaits(self) -> bool:
        """True if its call is not over."""
        return self._asked > 0

    def next_call(self, policy: Policy, now_s: float) -> tuple[Call, np.ndarray]:
        """The call that it waits for now, and the token ids to feed.

        A mode with windows lets the worker feed what it drew; the others send each token back.
        """
        drawn = len(self.tokens)
        if self.cut:
            return Call(self.number, self._position, 0, 0, ends=True), _NO_TOKENS
        fed = self.planned.prompt if not drawn else np.array(self.tokens[-1:] if policy.window == 1 else [], dtype=np.int64)
        self._asked = min(policy.window, self.planned.tokens - drawn)
        ends = drawn + self._asked == self.planned.tokens
        most = 0 if drawn else self.planned.positions
        return Call(self.number, self._position, len(fed), self._asked, ends, most, self._deadline_us(policy, now_s)), fed

    def take(self, ids: Sequence[int], gained: Gained, at_s: float) -> bool:
        """Takes tokens that came; True if its call is over. ValueError for more than it asked for, or for fewer if it is not cut."""
        self._asked -= len(ids)
        if self._asked < 0 or (gained.last != (self._asked == 0) and not self.cut):
            raise ValueError(f"request {self.number} got {len(ids)} tokens and last {gained.last} with {self._asked} of its call left")
        self._asked = 0 if gained.last else self._asked
        self.tokens += ids
        self.came_s += [at_s] * len(ids)
        self.calls += [(gained.queued_us, gained.compute_us)] * len(ids)
        return gained.last

    def row(self) -> dict[str, Any]:
        """Its row of requests.parquet. A request that was cut short has no E2E."""
        came_s, planned = self.came_s, self.planned
        ttft_s = came_s[0] - self.arrived_s if came_s else None
        e2e_s = came_s[-1] - self.arrived_s if self.is_done else None
        tpot_s = (came_s[-1] - came_s[0]) / (len(came_s) - 1) if self.is_done and len(came_s) > 1 else None
        return {
            "request": self.number,
            "warmup": self.warmup,
            "prompt_tokens": len(planned.prompt),
            "new_tokens": len(self.tokens),
            "ttft_s": ttft_s,
            "e2e_s": e2e_s,
            "tpot_s": tpot_s,
            "level": self.level,
            "class": planned.cls,
            "connection": self.connection,
            "measured": self.measured,
            "arrived_s": self.arrived_s,
            "late_s": None if self.sent_s is None else self.sent_s - self.arrived_s,
            "queue_s": self.calls[0][0] / 1e6 if self.calls else None,
            "in_time": self._in_time(ttft_s, tpot_s),
        }

    def token_rows(self, start_s: float, end_s: float) -> list[dict[str, Any]]:
        """Its rows of load.parquet: a token is measured if it came in the window."""
        before = [None, *self.came_s][: len(self.came_s)]
        return [
            {
                "request": self.number,
                "level": self.level,
                "step": step,
                "came_s": at_s,
                "token": token,
                "gap_s": None if last_s is None else at_s - last_s,
                "measured": start_s < at_s <= end_s,
                "queued_s": queued_us / 1e6,
                "compute_s": compute_us / 1e6,
            }
            for step, (token, at_s, last_s, (queued_us, compute_us)) in enumerate(
                zip(self.tokens, self.came_s, before, self.calls, strict=True)
            )
        ]

    @property
    def _position(self) -> int:
        """The worker's filled positions: all but the last drawn token."""
        return len(self.planned.prompt) + len(self.tokens) - 1 if self.tokens else 0

    def _deadline_us(self, policy: Policy, now_s: float) -> int:
        """The time that is left for the next token, at least 1; 0 for a mode or a request that knows no deadline."""
        deadlines = self.planned.deadlines
        if deadlines is None or policy.batching is None or not policy.batching.deadline:
            return 0
        first_s = self.arrived_s + deadlines.ttft_ms / 1e3
        due_s = first_s if not self.tokens else max(first_s, self.came_s[0]) + len(self.tokens) * deadlines.tpot_ms / 1e3
        return max(1, round(1e6 * (due_s - now_s)))

    def _in_time(self, ttft_s: float | None, tpot_s: float | None) -> bool | None:
        """True if it kept its deadlines; None without them, or if it was cut short."""
        deadlines = self.planned.deadlines
        if deadlines is None or not self.is_done or ttft_s is None:
            return None
        return 1e3 * ttft_s <= deadlines.ttft_ms and 1e3 * (tpot_s or 0) <= deadlines.tpot_ms
