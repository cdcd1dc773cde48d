"""transformers over the rows of many requests at once: one pass of all rows, and attention request by request over its KV blocks.

A pass takes all rows as one sequence. Its cache writes their keys and values into blocks and gives, in place of all keys so far, the
layer itself; the model's attention then runs once for each request, on that request's rows and positions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from semgap.engine.architecture import NOT_CAUSAL, Architecture, ModelError
from semgap.engine.batch import Rows, Run
from semgap.kv.block_pool import BlockPool
from semgap.kv.pool import BLOCK

_NAME = "semgap_by_request"


def require_packable(model: Architecture) -> None:
    """ModelError for a model whose rows depend on which requests stand in the pass, or that looks ahead."""
    if model.beyond == NOT_CAUSAL:
        raise ModelError(f"{NOT_CAUSAL} lets rows see later ones, which requests of a pass do not have; use batching: null")
    kind = (model.rope or {}).get("rope_type")
    if kind == "dynamic":
        raise ModelError(f"rope type {kind!r} rotates by the longest request of a pass, so requests cannot share one; use batching: null")


@dataclass(frozen=True)
class _Part:
    """A run's rows begin..end - 1 in a pass, and the positions that they see."""

    begin: int
    end: int
    seen: int
    blocks: torch.Tensor
    mask: torch.Tensor | None


def block_cache(runs: Sequence[Run], rows: Rows, pool: BlockPool, additive: bool) -> DynamicCache:
    """A transformers cache over the runs' blocks, for one pass. `additive`: the model's attention adds its masks to the scores."""
    dtype, past, edges = getattr(torch, pool.dtype.torch_name), DynamicCache(), rows.edges.tolist()
    memory = pool.memory if isinstance(pool.memory, torch.Tensor) else torch.from_numpy(pool.memory).view(dtype)
    blocks, written, places = (
        torch.from_numpy(each).to(memory.device) for each in (rows.blocks, rows.blocks[rows.places], rows.positions % BLOCK)
    )
    parts = [
        _Part(begin, end, run.end, blocks[first:last], _mask(run, dtype if additive else None, memory.device))
        for run, (begin, first), (end, last) in zip(runs, edges, edges[1:], strict=False)
    ]
    where = written, places
    past.layers = [_BlockLayer(memory[:, layer], parts, where) for layer in range(pool.shape.layers)]
    return past


def _mask(run: Run, additive: torch.dtype | None, device: torch.device) -> torch.Tensor | None:
    """The causal mask [1, 1, n, seen] of a run; None if its attention needs none."""
    if len(run.tokens) == 1 or (run.position == 0 and additive is None):
        return None
    allowed = torch.arange(run.end)[None] <= torch.arange(run.position, run.end)[:, None]
    if additive is not None:
        allowed = torch.zeros(allowed.shape, dtype=additive).masked_fill(~allowed, torch.finfo(additive).min)
    return allowed[None, None].to(device)


class _BlockLayer(DynamicLayer):
    """One layer of all blocks: memory [blocks, 2, kv_heads, BLOCK, head_dim]. `where`: each row's block, and its place there."""

    def __init__(self, memory: torch.Tensor, parts: Sequence[_Part], where: tuple[torch.Tensor, torch.Tensor]) -> None:
        super().__init__()
        self._memory, self._parts, self._where = memory, parts, where
        self.dtype, self.device, self.is_initialized = memory.dtype, memory.device, True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Writes [1, heads, n, head_dim] keys and values. Gives itself, twice, for `_attend`."""
        blocks, places = self._where
        self._memory[blocks, 0, :, places] = key_states[0].transpose(0, 1)
        self._memory[blocks, 1, :, places] = value_states[0].transpose(0, 1)
        return self, self

    def attended(self, query: torch.Tensor, attend: Callable[..., tuple[torch.Tensor, Any]], rows: int) -> torch.Tensor:
        """`attend` of each run's queries, keys, values and mask, one run after the other along the axis `rows`."""
        return torch.cat([attend(query[:, :, part.begin : part.end], *self._seen(part), part.mask)[0] for part in self._parts], rows)

    def _seen(self, part: _Part) -> Iterator[torch.Tensor]:
        """The keys and the values [1, heads, seen, head_dim] of a run."""
        both = self._memory[part.blocks].permute(1, 2, 0, 3, 4).flatten(2, 3)
        return (each[None, :, : part.seen] for each in both)


def _attend(module: torch.nn.Module, query: torch.Tensor, key: Any, value: Any, mask: None, **options: Any) -> tuple[torch.Tensor, None]:
    return key.attended(query, partial(ALL_ATTENTION_FUNCTIONS["sdpa"], module, **options), 1), None


def _attend_gptj(module: Any, query: torch.Tensor, key: Any, value: Any, mask: None) -> tuple[torch.Tensor, None]:
    return key.attended(query, partial(type(module)._attn, module), 2), None


ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)


@contextmanager
def attending_by_request(model: PreTrainedModel) -> Iterator[None]:
    """Meanwhile the model's attention takes a `block_cache`, and no other."""
    config, before = model.config, model.config._attn_implementation
    own = [layer.attn for layer in model.base_model.h] if has_own_attention(model) else []
    try:
        config._attn_implementation = _NAME  # transformers also makes no mask for a name that it does not know
        for module in own:
            module._attn = partial(_attend_gptj, module)
        yield
    finally:
        config._attn_implementation = before
        for module in own:
            vars(module).pop("_attn", None)


def has_own_attention(model: PreTrainedModel) -> bool:
    """True for GPT-J: its attention is a method of its layers, which adds its mask to the scores, and not chosen by name."""
    return model.config.model_type == "gptj"
