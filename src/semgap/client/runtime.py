"""What the decode loop asks of a runtime, local or remote, and what it gets back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from semgap.engine.sampling import draw
from semgap.policy import SamplingRule
from semgap.tensors import Tensor
from semgap.wire import messages
from semgap.wire.ledger import Ledger
from semgap.wire.messages import Kind


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

    def evict(self, layers: Sequence[int]) -> messages.Evicted | None:
        """Takes layers of the request's KV cache off the device; None where there is no worker that could."""

    def restore(self) -> float | None:
        """Brings back what was evicted and waits for it; seconds on the worker, None where there is none."""

    def segments(self) -> tuple[int, int]:
        """TCP segments sent and received so far."""


def draw_from(logits: Tensor, drawing: Drawing, request: int, position: int) -> Arrival:
    """The token that this side draws from the last row of `logits`, for `position` of `request`."""
    drawn = draw(logits.as_float32()[-1], drawing.rule, drawing.seed, request, position)
    return Arrival((drawn.token,), logits, drawn.others)
