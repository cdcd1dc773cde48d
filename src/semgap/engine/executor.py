"""The executor: forward passes over KV slabs. Local modes call it in-process, the worker calls the same one behind a link."""

from __future__ import annotations

import importlib.util
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from semgap.codecs.gpu_clock import GpuTimer
from semgap.engine.memory_check import ModelError, refuse_what_does_not_fit
from semgap.engine.model import kv_shape
from semgap.engine.output_head import OutputHead
from semgap.engine.sampling import draw
from semgap.kv.blocks import KVCache, KVPool
from semgap.policy import SamplingRule

EXECUTORS = ("auto", "eager", "cuda_graph")


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token that a window's step drew, and the step's time on the GPU, None without one."""

    token: int
    gpu_ns: int | None


class Executor:
    """`eager` execution of a model, batch 1, op by op. Holds no request's state: the cache is the caller's. `rule`: `decode_window` draws
    by it."""

    def __init__(self, model: PreTrainedModel, max_length: int, rule: SamplingRule | None = None) -> None:
        self.model = model
        self._rule = rule
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.vocab_size = model.config.vocab_size
        context = model.config.max_position_embeddings
        if max_length > context:
            raise ModelError(f"max_length {max_length} is more than the model's context of {context} positions")
        self.kv_shape = kv_shape(model, max_length)
        self.head = OutputHead.of(model)

    @property
    def cache_nbytes(self) -> int:
        """Bytes of the KV memory of one handle."""
        return self.kv_shape.nbytes(self.dtype.itemsize)

    def new_pool(self, budget_bytes: int) -> KVPool:
        """KV memory for as many slabs as fit `budget_bytes`. ModelError where it does not fit, KVBudgetError for less than one cache."""
        refuse_what_does_not_fit("a KV cache needs", budget_bytes, self.device)
        return KVPool(self.kv_shape, self.dtype, self.device, budget_bytes)

    def new_cache(self) -> KVCache:
        """An empty KV cache of max_length positions, in memory of its own. ModelError where that does not fit."""
        return KVCache(self.new_pool(self.cache_nbytes))

    def check_room(self, tokens: np.ndarray, filled: int) -> None:
        """ValueError for a token outside the vocabulary or no room for them after `filled` positions."""
        if tokens.size == 0 or tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise ValueError(f"tokens must be 1 or more ids in 0..{self.vocab_size - 1}")
        if filled + tokens.size > self.kv_shape.max_length:
            raise ValueError(f"{filled} + {tokens.size} positions do not fit max_length {self.kv_shape.max_length}")

    @torch.inference_mode()
    def forward(self, tokens: np.ndarray, cache: KVCache) -> torch.Tensor:
        """Final hidden states (n, hidden) of `tokens` (n,), int64, which follow what `cache` holds; keys and values are appended.

        Raises as `check_room` does, before anything is appended.
        """
        self.check_room(tokens, cache.filled)
        ids = torch.from_numpy(np.array(tokens, dtype=np.int64))[None].to(self.device)
        return self.model.base_model(input_ids=ids, past_key_values=cache.cache, use_cache=True).last_hidden_state[0]

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (n, vocab) of final hidden states (n, hidden).

        The last row, the one that a token is drawn from, is always a product of its own: so it is bitwise the same whether one row
        was asked for or all, and wherever the head is applied (a row of a batched product differs in its last bits).
        """
        last = self._last_logits(hidden[-1:])
        if len(hidden) == 1:
            return last
        rows = self.head(hidden)
        rows[-1] = last[0]
        return rows

    def decode_window(self, token: int, cache: KVCache, count: int, seed: int, request: int) -> Generator[Drawn]:
        """Feeds `token`, then what it draws, up to `count` steps; `seed` and `request` are the draw's. Whoever has enough closes it.

        Raises as `check_room` does, once there is no more room; ValueError without a rule.
        """
        if self._rule is None:
            raise ValueError("this executor was made without a sampling rule; its windows cannot draw")
        for _ in range(count):
            timer = GpuTimer(self.device)
            logits = self.logits(self.forward(np.array([token]), cache))
            gpu_ns = timer.elapsed_ns()
            token = draw(logits[-1].float().cpu().numpy(), self._rule, seed, request, cache.filled).token
            yield Drawn(token, gpu_ns)

    def _last_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (1, vocab) of one hidden state (1, hidden)."""
        return self.head(hidden)


def choose_executor(name: str, device: torch.device) -> str:
    """'eager' or 'cuda_graph' for one of EXECUTORS: auto is cuda_graph on a GPU. ValueError for cuda_graph where it cannot be had."""
    if name not in EXECUTORS:
        raise ValueError(f"executor {name!r} is not known; use one of {', '.join(EXECUTORS)}")
    if name == "eager" or (name == "auto" and device.type != "cuda"):
        return "eager"
    if device.type != "cuda":
        raise ValueError(f"executor cuda_graph was asked for on {device}: it needs CUDA; use executor: eager, or see `semgap doctor`")
    if importlib.util.find_spec("triton") is None:
        raise ValueError("executor cuda_graph needs Triton, which torch for CUDA brings along on Linux; install it, or use executor: eager")
    return "cuda_graph"
