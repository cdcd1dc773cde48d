"""The control of a trial: beside a mode's decode steps, the executor decodes the same positions by itself.

A block is a few steps of a request. The control's window of its positions runs before it or after it, in turn, so that drift cancels.
Its frames are of kind setup, and no clock of a step runs meanwhile.
"""

import time
from typing import Any

from semgap.client.runtime import Runtime
from semgap.client.spec import Phase
from semgap.phases import KINDS
from semgap.policy import Policy

_LEAST_STEPS = 4
_MOST_STEPS = 4096  # of a request on the wire


def no_control(policy: Policy, phase: Phase) -> str | None:
    """Why a mode has no control in a phase, or None."""
    if policy.is_stateless:
        return "a stateless mode leaves the worker no cache to decode over"
    if phase.is_load:
        return "a load keeps its worker busy: steps of a control would be among the others'"
    if KINDS[phase.kind].measures == "prefill":
        return "a phase that measures prefills has no control; phases with decode steps do"
    if KINDS[phase.kind].workers > 1:
        return "requests move to another worker: the phase's others stay, and stand in for a control"
    return "live requests share KV memory: to copy one for a control would push others out" if phase.live_requests > 1 else None


class Control:
    """Runs windows. `rows` are rows of control.parquet."""

    def __init__(self, runtime: Runtime, policy: Policy, phase: Phase) -> None:
        self.rows: list[dict[str, Any]] = []
        self._runtime, self._policy, self._in_steps = runtime, policy, bool(phase.evict_fractions)
        self._windows = 0

    def block(self, left: int) -> int:
        """The next block's steps, of `left`: whole windows of the mode, which are single steps in a phase with evictions."""
        window = 1 if self._in_steps else left if self._policy.ahead else self._policy.window
        return min(left, window * -(-_LEAST_STEPS // window), _MOST_STEPS)

    @property
    def comes_first(self) -> bool:
        """True if the next window runs before its block."""
        return self._windows % 2 == 0

    def run(self, request: int, step: int, position: int, token: int, count: int) -> None:
        """Decodes `count` positions from that of `step`, which is fed `token`."""
        begin_s = time.perf_counter()
        for index, took_ns in enumerate(self._runtime.decode_alone(position, token, count)):
            at = {"request": request, "step": step + index, "position": position + index, "window": self._windows}
            self.rows.append(at | {"begin_s": begin_s, "compute_s": took_ns / 1e9})
        self._windows += 1
