"""Executor `eager`: the model op by op, as transformers runs it, on any device. The reference of the other executors."""

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from semgap.codecs.clock import Clock
from semgap.engine.architecture import architecture_of
from semgap.engine.batch import Run, drawn_rows
from semgap.engine.eager_batch import attending_by_request, block_cache, has_own_attention, require_packable
from semgap.engine.executor import Drawn, Executor
from semgap.engine.output_head import OutputHead
from semgap.engine.sampling import draw
from semgap.kv.block_pool import BlockPool
from semgap.kv.blocks import KVCache, KVOverflow
from semgap.policy import SamplingRule
from semgap.tensors import DType


class EagerExecutor(Executor):
    """Runs a model op by op. The weights may arrive after it is made."""

    def __init__(self, model: PreTrainedModel, max_length: int, rule: SamplingRule | None = None) -> None:
        weight = next(model.parameters())
        dtype = DType.from_torch_name(str(weight.dtype))
        self._architecture = architecture_of(model.config.to_dict())
        super().__init__(self._architecture, dtype, weight.device.type, max_length, rule)
        self.model, self.head, self._torch_dtype = model, OutputHead.of(model), weight.dtype

    @torch.inference_mode()
    def forward(self, tokens: np.ndarray, cache: KVCache) -> torch.Tensor:
        self.check_room(tokens, cache.filled)
        ids = torch.from_numpy(np.array(tokens, dtype=np.int64))[None].to(self.device)
        return self.model.base_model(input_ids=ids, past_key_values=slab_cache(cache), use_cache=True).last_hidden_state[0]

    @torch.inference_mode()
    def forward_batch(self, runs: Sequence[Run], pool: BlockPool) -> torch.Tensor:
        """Final hidden states: all rows as one sequence, attention of each run by itself."""
        require_packable(self._architecture)
        rows = self.checked_rows(runs, pool)
        cache = block_cache(runs, rows, pool, has_own_attention(self.model))
        ids, positions = (torch.from_numpy(each)[None].to(self.device) for each in (rows.tokens, rows.positions))
        with attending_by_request(self.model):
            passed = self.model.base_model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
        return self._waited(passed.last_hidden_state[0, torch.from_numpy(drawn_rows(runs)).to(self.device)])

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

    def decode_window(self, token: int, cache: KVCache, count: int, seed: int, request: int) -> Generator[Drawn]:
        rule = self._required_rule()
        for _ in range(count):
            clock = Clock(self.device)
            logits = self.logits(self.forward(np.array([token]), cache))
            clock.stop()
            gpu_ns = clock.gpu_ns()
            token = draw(logits[-1].float().cpu().numpy(), rule, seed, request, cache.filled).token
            yield Drawn(token, gpu_ns)

    def _waited(self, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states of a pass. Without any, nobody else waits for the GPU: the pass would count as a part of the next one."""
        if not len(hidden) and self.device == "cuda":
            torch.cuda.synchronize(self.device)
        return hidden

    def _last_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (1, vocab) of one hidden state (1, hidden)."""
        return self.head(hidden)


def slab_cache(cache: KVCache) -> DynamicCache:
    """A transformers cache over a handle's slabs, for one pass: bitwise the logits of a DynamicCache, without its copies."""
    past, dtype = DynamicCache(), getattr(torch, cache.pool.dtype.torch_name)
    past.layers = [_SlabLayer(cache, index, dtype) for index in range(cache.shape.layers)]
    return past


class _SlabLayer(DynamicLayer):
    def __init__(self, cache: KVCache, index: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._cache, self._index = cache, index
        slab = cache.layers[index].held_slab
        self._slab = slab if isinstance(slab, torch.Tensor) else torch.from_numpy(slab).view(dtype)
        self.dtype, self.device, self.is_initialized = dtype, self._slab.device, True
        self._show(cache.layers[index].filled)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [1, heads, n, head_dim] keys and values and gives views of all filled ones. Waits for blocks on their way."""
        if self._cache.awaited is not None:
            self._cache.awaited(self._index)
        begin, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        if end > self._slab.shape[-2]:
            raise KVOverflow(f"{end} positions do not fit a KV cache of max_length {self._slab.shape[-2]}")
        self._slab[0, :, :, begin:end] = key_states
        self._slab[1, :, :, begin:end] = value_states
        self._cache.layers[self._index].filled = end
        self._show(end)
        if self._cache.computed is not None:
            self._cache.computed(self._index)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Positions that the layer stands for."""
        return self._cache.layers[self._index].filled

    def _show(self, positions: int) -> None:
        self.keys, self.values = self._slab[0, :, :, :positions], self._slab[1, :, :, :positions]
