"""Executor `cuda_graph`: a decode step is a handful of kernels a layer (kernels.py), captured once as CUDA graphs and replayed.

A pass of more than one token, a prefill, runs eagerly. Graphs know no handle: they read the addresses of a cache's slabs, the token and
its position from device memory, so that one capture serves every handle. A step that misses KV blocks replays one graph a layer, of the
same kernels, and waits before each layer for its blocks. Passes over many requests are graph_batch.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedModel

from semgap.codecs.clock import Clock
from semgap.engine.architecture import architecture_of
from semgap.engine.batch import Run, drawn_rows
from semgap.engine.decoder_weights import DecoderWeights, Linear, read_decoder
from semgap.engine.device_sampling import NOT_A_DISTRIBUTION, draw_on_device
from semgap.engine.eager import EagerExecutor
from semgap.engine.executor import Drawn, RowDraw
from semgap.engine.graph_capture import captured
from semgap.engine.memory_check import require_free
from semgap.engine.rope import Rope
from semgap.engine.sampling import uniform
from semgap.kv.gpu_block_pool import GpuBlockPool
from semgap.kv.gpu_pool import GpuPool
from semgap.kv.pool import KVPool
from semgap.policy import SamplingRule

if TYPE_CHECKING:
    from semgap.engine.graph_batch import GraphBatch
    from semgap.kv.block_pool import BlockPool
    from semgap.kv.blocks import KVCache


_NO_DISTRIBUTION = "the largest of the logits is not finite: there is no distribution to sample from"
_AHEAD = 2  # steps of a window that are enqueued before the first one's token is read


class GraphExecutor(EagerExecutor):
    """Runs decode steps of one token as CUDA graphs, captured as it is made. Without a `rule` it has no windows.

    The weights may arrive later: a graph holds their addresses. ModelError for a model without kernels; executor: eager takes it.
    """

    def __init__(self, model: PreTrainedModel, max_length: int, rule: SamplingRule | None = None) -> None:
        super().__init__(model, max_length, rule)
        from semgap.engine import kernels

        self._kernels, architecture = kernels, architecture_of(model.config.to_dict())
        weights = {name: weight.detach() for name, weight in model.named_parameters()}
        self._plain = read_decoder(architecture, weights, max_length)
        self._decoder = decoder = _for_kernels(self._plain, self._torch_dtype)
        shape, heads = self.kv_shape, architecture.heads
        self._sizes = {"heads": heads, "kv_heads": shape.heads, "head_dim": shape.head_dim, "max_length": max_length}
        splits, block_d = kernels.splits_for(max_length), 1 << (shape.head_dim - 1).bit_length()
        self._state = torch.zeros(2, dtype=torch.int64, device=self.device)  # token, position
        self._slabs = torch.zeros(shape.layers, dtype=torch.int64, device=self.device)
        self._distances: list[int] = []  # the content of self._slabs
        self._residual, self._normed, self._hidden = (self._new(architecture.hidden) for _ in range(3))
        self._first = self._new(sum(linear.rows for linear in decoder.layers[0].first))
        self._attended = self._new(heads * shape.head_dim)
        self._qkv_rows = (heads + 2 * shape.heads) * shape.head_dim
        self._fed = self._first[self._qkv_rows :] if decoder.layers[0].parallel else self._new(architecture.feed)
        self._sums = torch.empty(heads, splits, block_d, dtype=torch.float32, device=self.device)
        self._stats = torch.empty(heads, splits, 2, dtype=torch.float32, device=self.device)
        self._logits = self._new(self.vocab_size)
        self._uniform = torch.zeros(1, dtype=torch.float64, device=self.device)
        self._drawn = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._seen = torch.zeros(_AHEAD, dtype=torch.int64, pin_memory=self.device == "cuda")
        self._batch: GraphBatch | None = None
        runs = [self._run_step, *([self._run_draw] if rule else []), *self._layer_runs()]
        self._step, *rest = self._captured(runs)
        self._draw = rest.pop(0) if rule else None
        self._layers = rest

    @torch.inference_mode()
    def forward(self, tokens: np.ndarray, cache: KVCache) -> torch.Tensor:
        """The hidden state of a single token is valid until the next step."""
        self.check_room(tokens, cache.filled)
        if tokens.size > 1:
            return super().forward(tokens, cache)
        position = cache.filled
        self._point_at(cache)
        self._state[0].fill_(int(tokens[0]))
        self._state[1].fill_(position)
        if not cache.by_layer:
            self._step()
            _append(cache, position + 1)
        else:
            self._step_layer_by_layer(cache, position)
        return self._hidden[None]

    def decode_window(self, token: int, cache: KVCache, count: int, seed: int, request: int) -> Generator[Drawn]:
        """The GPU draws, and runs up to two steps ahead of the caller. Steps that the caller does not take leave no trace."""
        self._required_rule()
        self.check_room(np.array([token]), cache.filled)
        begin, done, launched = cache.filled, 0, 0
        room = min(count, self.kv_shape.max_length - begin)
        self._point_at(cache)
        self._state[0].fill_(token)
        self._state[1].fill_(begin)
        running: list[_Running] = []
        try:
            while done < count:
                if done == room:
                    self.check_room(np.array([token]), cache.filled)  # raises
                while len(running) < _AHEAD and launched < room:
                    running.append(self._launch(launched, uniform(seed, request, begin + launched + 1)))
                    launched += 1
                drawn = running.pop(0).wait(self._seen)
                token = drawn.token
                if token == NOT_A_DISTRIBUTION:
                    raise ValueError(_NO_DISTRIBUTION)
                done += 1
                _append(cache, begin + done)
                yield drawn
        finally:
            if running:
                running[-1].wait(self._seen)
            if done < launched:
                _blank(cache, begin + done, begin + launched)

    def new_pool(self, budget_bytes: int) -> KVPool:
        """In torch's memory also where Triton's interpreter runs on a CPU."""
        require_free("a KV cache needs", budget_bytes, self.device)
        return GpuPool(self.kv_shape, self.dtype, self.device, budget_bytes)

    @torch.inference_mode()
    def forward_batch(self, runs: Sequence[Run], pool: BlockPool) -> torch.Tensor:
        """Final hidden states, by the graphs of the newest of `new_block_pool`'s pools. ValueError for another pool."""
        rows = self.checked_rows(runs, pool)
        if self._batch is None or self._batch.pool is not pool:
            raise ValueError("the graphs of a batch are captured over one pool, the last of new_block_pool; use that one")
        return self._waited(self._batch.forward(rows, drawn_rows(runs)))

    def new_block_pool(self, blocks: int) -> GpuBlockPool:
        """Captures the graphs of `forward_batch` over the pool as well, which takes seconds."""
        from semgap.engine.graph_batch import GraphBatch

        self._batch = None  # an earlier pool's memory is free for the new one
        pool = GpuBlockPool(self.kv_shape, self.dtype, self.device, self._block_pool_nbytes(blocks))
        self._batch = GraphBatch(self._architecture, self._decoder, self._plain.layers, pool, self.kv_shape.max_length)
        return pool

    @torch.inference_mode()
    def draw_rows(self, hidden: torch.Tensor, draws: Sequence[RowDraw]) -> list[int | ValueError]:
        """On the GPU, as windows draw: the host reads one number a row."""
        logits = self._last_logits(hidden) if len(hidden) == 1 else self.head(hidden)
        tokens = logits.argmax(1)
        sampled = [index for index, each in enumerate(draws) if each.rule.kind != "greedy"]
        places = [uniform(draws[index].seed, draws[index].request, draws[index].position) for index in sampled]
        for index, place in zip(sampled, torch.tensor(places, dtype=torch.float64).to(self.device), strict=True):
            tokens[index : index + 1] = draw_on_device(logits[index], draws[index].rule, place[None])
        return [ValueError(_NO_DISTRIBUTION) if token == NOT_A_DISTRIBUTION else token for token in tokens.tolist()]

    def _launch(self, number: int, u: float) -> _Running:
        """Enqueues one step of a window and its draw, which feed the next step."""
        assert self._draw is not None
        slot = number % _AHEAD
        running = _Running(slot, Clock(self.device))
        self._uniform.fill_(u)
        self._step()
        self._draw()
        self._seen[slot : slot + 1].copy_(self._drawn, non_blocking=True)
        running.clock.stop()
        return running

    def _last_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """By the same kernel as in windows, so that either side draws the same token."""
        self._normed.copy_(hidden[0])
        out = torch.empty_like(self._logits)
        self._kernels.project(self._normed, [self._decoder.head], out)
        return out[None]

    def _step_layer_by_layer(self, cache: KVCache, position: int) -> None:
        self._begin()
        for index, layer in enumerate(self._layers):
            if cache.awaited is not None:
                cache.awaited(index)
            layer()
            cache.layers[index].filled = position + 1
            if cache.computed is not None:
                cache.computed(index)
        self._end()

    def _layer_runs(self) -> list[Callable[[], None]]:
        return [lambda index=index: self._run_layer(index) for index in range(len(self._decoder.layers))]  # type: ignore[misc]

    def _run_step(self) -> None:
        self._begin()
        for index in range(len(self._decoder.layers)):
            self._run_layer(index)
        self._end()

    def _begin(self) -> None:
        self._kernels.embed(self._state, self._decoder.tokens, self._decoder.positions, self._residual)

    def _end(self) -> None:
        self._kernels.norm(self._residual, self._decoder.norm, self._hidden)

    def _run_layer(self, index: int) -> None:
        kernels, layer, x = self._kernels, self._decoder.layers[index], self._residual
        kernels.norm(x, layer.norm, self._normed)
        kernels.project(self._normed, layer.first, self._first, gelu_last=layer.parallel)
        if layer.head_norms:
            kernels.norm_heads(self._first, *layer.head_norms, self._sizes["heads"], self._sizes["kv_heads"])
        kernels.attend(
            self._first, self._slabs, index, self._state, self._decoder.rope, layer.scale, self._sums, self._stats, self._attended,
            **self._sizes,
        )  # fmt: skip
        if layer.parallel:
            kernels.merge(x, self._attended, layer.attention_out, self._fed, layer.feed_out)
            return
        kernels.merge(x, self._attended, layer.attention_out)
        assert layer.feed_norm is not None and layer.feed_in is not None
        kernels.norm(x, layer.feed_norm, self._normed)
        if layer.gate is None:
            kernels.project(self._normed, [layer.feed_in], self._fed, gelu_last=True)
        else:
            kernels.gate(self._normed, layer.gate, layer.feed_in, self._fed)
        kernels.merge(x, self._fed, layer.feed_out)

    def _run_draw(self) -> None:
        """Draws from a step's hidden state, and sets token and position for the next step."""
        assert self._rule is not None
        self._kernels.project(self._hidden, [self._decoder.head], self._logits)
        self._drawn.copy_(draw_on_device(self._logits, self._rule, self._uniform))
        self._state[:1].copy_(self._drawn.clamp(min=0))
        self._state[1:].add_(1)

    @torch.no_grad()  # not inference_mode: torch keeps tensors for its graphs' random numbers, and writes them outside of it
    def _captured(self, runs: Sequence[Callable[[], None]]) -> list[Callable[[], None]]:
        """A graph's replay of each run. The first runs work over a spare slab."""
        with self._kernels.compiled_side_by_side():
            self._run_step()
            self._last_logits(self._hidden[None])
        shape = self.kv_shape
        parking = self._new(2 * shape.heads * shape.max_length * shape.head_dim)
        self._slabs.copy_(torch.tensor(self._distances_to([parking] * shape.layers)))
        self._last_logits(self._hidden[None])
        return captured(runs, self.device)

    def _point_at(self, cache: KVCache) -> None:
        """Makes the graphs work on the slabs of `cache`."""
        distances = self._distances_to([layer.held_slab for layer in cache.layers])
        if distances != self._distances:
            self._slabs.copy_(torch.tensor(distances))
            self._distances = distances

    def _distances_to(self, slabs: Sequence[torch.Tensor]) -> list[int]:
        return self._kernels.distances_to(slabs, self._first, self.kv_shape.head_dim)

    def _new(self, size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=self._torch_dtype, device=self.device)


def _for_kernels(decoder: DecoderWeights, dtype: torch.dtype) -> DecoderWeights:
    """The weights as the kernels read them: linears that run in one kernel all have a bias or none, and rope tables on the device, one
    column a dimension, rounded to the model's dtype as transformers does."""
    layers = [replace(layer, first=_alike(layer.first)) for layer in decoder.layers]
    return replace(decoder, layers=layers, rope=decoder.rope and _rope(decoder.rope, dtype, decoder.tokens.device))


def _alike(linears: Sequence[Linear]) -> list[Linear]:
    if all(linear.bias is None for linear in linears):
        return list(linears)
    return [linear if linear.bias is not None else replace(linear, bias=linear.weight.new_zeros(linear.rows)) for linear in linears]


def _rope(rope: Rope, dtype: torch.dtype, device: torch.device) -> Rope:
    doubled = [np.repeat(table, 2, axis=1) if rope.interleaved else np.tile(table, 2) for table in (rope.cosines, rope.sines)]
    cosines, sines = (torch.from_numpy(table).to(dtype).float().contiguous().to(device) for table in doubled)
    return Rope(cosines, sines, rope.interleaved)


@dataclass(frozen=True)
class _Running:
    """A step of a window on its way: its token will lie in a slot of pinned memory."""

    slot: int
    clock: Clock

    def wait(self, seen: torch.Tensor) -> Drawn:
        """Its token and its time, once the GPU is done."""
        gpu_ns = self.clock.gpu_ns()
        return Drawn(int(seen[self.slot]), gpu_ns)


def _append(cache: KVCache, filled: int) -> None:
    for layer in cache.layers:
        layer.filled = filled


def _blank(cache: KVCache, begin: int, end: int) -> None:
    """Overwrites the positions of steps that the caller did not take: empty KV memory is NaN."""
    for layer in cache.layers:
        layer.blank(begin, end)
