"""The interface of the decode loop to a runtime, local or remote."""

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
    """How client or worker draws tokens."""

    rule: SamplingRule = field(default_factory=SamplingRule)
    seed: int = 0


@dataclass(frozen=True)
class Arrival:
    """Tokens that the client learns at one moment, and the logits (n, vocab) that it drew them from, if it did.

    `others`: tokens that might as well have been drawn (engine/sampling.py); empty if the worker drew. `head_ns`: the output head in
    this process. `compute_ns`, `gpu_ns`: the forward pass and the head in a local mode, the latter by CUDA events; a worker keeps its own.
    """

    tokens: tuple[int, ...]
    logits: Tensor | None = None
    others: tuple[int, ...] = ()
    head_ns: int = 0
    compute_ns: int | None = None
    gpu_ns: int | None = None


class ClientHead(Protocol):
    """A linear map from final hidden states (after the final norm) to logits."""

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""

    def logits_of(self, hidden: Tensor) -> Tensor:
        """Logits (n, vocab) of hidden states (n, hidden)."""


class Runtime(Protocol):
    """For each request: `prefill`, `decode` as often as needed, `end_request`. Logits are valid until the next call.

    Several requests may be alive. `prefill` begins and selects one; `select` selects another; the other calls are about the selected.
    """

    @property
    def ledger(self) -> Ledger:
        """The count of its frames; of several links, as it is now."""

    def select(self, request: int) -> None:
        """Selects an alive request."""

    def prefill(self, prompt: np.ndarray, request: int, kind: Kind) -> Arrival:
        """Runs a prompt (n,), int64; gives the first token."""

    def decode(self, token: int, count: int, kind: Kind) -> Iterator[Arrival]:
        """Feeds `token`; gives the next tokens as they arrive, 1 to `count` of them, as the policy says (with `ahead` all)."""

    def decode_alone(self, position: int, token: int, count: int) -> Sequence[int]:
        """Nanoseconds of each of `count` steps that the executor decodes by itself, over a copy of the request's cache, from `position`."""

    def end_request(self) -> None:
        """Ends the request and frees its KV cache."""

    def evict(self, layers: Sequence[int]) -> messages.Evicted | None:
        """Takes layers of the request's KV cache off the device; None without a worker."""

    def restore(self) -> float | None:
        """Brings evicted layers back and waits; seconds on the worker, or None without a worker."""

    def segments(self) -> tuple[int, int]:
        """TCP segments sent and received so far."""


def draw_from(logits: Tensor, drawing: Drawing, request: int, position: int) -> Arrival:
    """Draws a token from the last row of `logits`, for `position` of `request`."""
    drawn = draw(logits.as_float32()[-1], drawing.rule, drawing.seed, request, position)
    return Arrival((drawn.token,), logits, drawn.others)
