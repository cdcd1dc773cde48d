"""The interface of an executor, which runs forward passes over KV slabs, and the parts that all executors share."""

from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from semgap.engine.memory_check import require_context, require_free
from semgap.engine.model import kv_shape
from semgap.engine.output_head import OutputHead
from semgap.kv.blocks import KVCache
from semgap.kv.pool import KVPool
from semgap.policy import SamplingRule


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token that a window's step drew, and the step's time on the GPU, or None on a CPU."""

    token: int
    gpu_ns: int | None


class Executor(ABC):
    """Runs a model, batch 1. Holds no state of a request: the cache is the caller's. `decode_window` draws by `rule`.

    Local modes call it in the client's process, the worker calls the same one behind a link.
    """

    def __init__(self, model: PreTrainedModel, max_length: int, rule: SamplingRule | None = None) -> None:
        self.model = model
        self._rule = rule
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.vocab_size = model.config.vocab_size
        require_context(model.config.max_position_embeddings, max_length)
        self.kv_shape = kv_shape(model, max_length)
        self.head = OutputHead.of(model)

    @abstractmethod
    def forward(self, tokens: np.ndarray, cache: KVCache) -> torch.Tensor:
        """Final hidden states (n, hidden) of `tokens` (n,), int64, which follow the content of `cache`; appends keys and values.

        Raises as `check_room`, before anything is appended.
        """

    @abstractmethod
    def decode_window(self, token: int, cache: KVCache, count: int, seed: int, request: int) -> Generator[Drawn]:
        """Feeds `token`, then each drawn token, up to `count` steps. `seed` and `request` are the draw's. Close it to stop earlier.

        Raises as `check_room` once there is no more room; ValueError without a rule.
        """

    @property
    def cache_nbytes(self) -> int:
        """Bytes of the KV memory of one handle."""
        return self.kv_shape.nbytes(self.dtype.itemsize)

    def new_pool(self, budget_bytes: int) -> KVPool:
        """KV memory for as many slabs as fit `budget_bytes`. ModelError if the device has less, KVBudgetError for less than one cache."""
        require_free("a KV cache needs", budget_bytes, self.device)
        return KVPool(self.kv_shape, self.dtype, self.device, budget_bytes)

    def new_cache(self) -> KVCache:
        """An empty KV cache of max_length positions, in memory of its own. ModelError if it does not fit."""
        return KVCache(self.new_pool(self.cache_nbytes))

    def check_room(self, tokens: np.ndarray, filled: int) -> None:
        """ValueError for a token outside the vocabulary, or if the tokens do not fit after `filled` positions."""
        if tokens.size == 0 or tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise ValueError(f"tokens must be 1 or more ids in 0..{self.vocab_size - 1}")
        if filled + tokens.size > self.kv_shape.max_length:
            raise ValueError(f"{filled} + {tokens.size} positions do not fit max_length {self.kv_shape.max_length}")

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (n, vocab) of final hidden states (n, hidden).

        The last row, from which a token is drawn, is always a product of its own. So it is bitwise the same for one row and for all
        rows, on whichever side the head is applied (a row of a batched product differs in its last bits).
        """
        last = self._last_logits(hidden[-1:])
        if len(hidden) == 1:
            return last
        rows = self.head(hidden)
        rows[-1] = last[0]
        return rows

    def _last_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (1, vocab) of one hidden state (1, hidden)."""
        return self.head(hidden)

    def _required_rule(self) -> SamplingRule:
        """The sampling rule. ValueError without one."""
        if self._rule is None:
            raise ValueError("this executor was made without a sampling rule; its windows cannot draw")
        return self._rule
