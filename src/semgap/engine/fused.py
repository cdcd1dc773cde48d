"""Executor `fused`: a layer is one compiled function (cpu_kernels.py), for float32 on a CPU. Needs neither torch nor transformers.

A row of a batch has the same bits as alone, so prefill, steps, windows and replays of any shapes agree bitwise.
"""

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from semgap.engine import cpu_kernels
from semgap.engine.architecture import Architecture
from semgap.engine.batch import Rows, Run, drawn_rows
from semgap.engine.cpu_bandwidth import read_bandwidth
from semgap.engine.cpu_threads import Team
from semgap.engine.decoder_weights import DecoderWeights, LayerWeights, Linear, Norm, read_decoder
from semgap.engine.executor import Drawn, Executor
from semgap.engine.sampling import draw
from semgap.engine.weights import Weights
from semgap.kv.block_pool import BlockPool
from semgap.kv.blocks import KVCache
from semgap.kv.pool import BLOCK, HostPool
from semgap.policy import SamplingRule
from semgap.tensors import DType
from semgap.wire.step_cost import Floor

_NONE = (0, 0, 0, 0, 0)


class FusedExecutor(Executor):
    """Runs a model by compiled layers, in `threads` threads. `weights` are float32 on a CPU; their content may arrive later.

    ModelError for a model that the kernels do not know, or whose weights are not these.
    """

    def __init__(self, model: Architecture, weights: Weights, max_length: int, threads: int, rule: SamplingRule | None = None) -> None:
        super().__init__(model, DType.F32, "cpu", max_length, rule)
        self._team = Team(threads)
        cpu_kernels.load()
        decoder = read_decoder(model, weights.arrays(), max_length)
        self._memory = weights.memory  # held: the kernels take addresses in it
        self._model = model
        self._weights, self._rope = _weights(decoder), _rope(decoder, max_length)
        self._embeddings, self._positions = decoder.tokens, decoder.positions
        self._final, self._output = _norm_row(decoder.norm), np.array(linear_row(decoder.head), np.int64)

    def forward(self, tokens: np.ndarray, cache: KVCache) -> np.ndarray:
        """Final hidden states. A layer whose blocks are on their way waits for them; one that is computed is announced."""
        self.check_room(tokens, cache.filled)
        layers, pool = cache.layers, cache.pool
        assert isinstance(pool, HostPool)
        rows = Rows.of_slab(tokens, cache.filled)
        x, work = self._embedded(rows), self._work(rows)
        for first, last in [(i, i + 1) for i in range(len(layers))] if cache.by_layer else [(0, len(layers))]:
            if cache.awaited is not None:
                cache.awaited(first)
            slabs = np.array([0] * first + [pool.address(layer.number) for layer in layers[first:last]], np.int64)
            self._run_layers(first, last, x, rows, self.kv_shape.max_length, slabs[:, None], work)
            for layer in layers[first:last]:
                layer.filled += len(tokens)
            if cache.computed is not None:
                cache.computed(first)
        return self._normalised(x)

    def forward_batch(self, runs: Sequence[Run], pool: BlockPool) -> np.ndarray:
        """Final hidden states. Each row has the same bits as by `forward`."""
        rows, layers = self.checked_rows(runs, pool), np.arange(self.kv_shape.layers)[:, None]
        x = self._embedded(rows)
        blocks = pool.addresses(rows.blocks) + layers * pool.layer_nbytes
        self._run_layers(0, len(layers), x, rows, BLOCK, blocks, self._work(rows))
        return self._normalised(x[drawn_rows(runs)])

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        return cpu_kernels.project(self._output, hidden, self._team)

    def decode_window(self, token: int, cache: KVCache, count: int, seed: int, request: int) -> Generator[Drawn]:
        rule = self._required_rule()
        for _ in range(count):
            row = self.logits(self.forward(np.array([token]), cache))[0]
            token = draw(row, rule, seed, request, cache.filled).token
            yield Drawn(token, None)

    def floor(self) -> Floor:
        """A step reads all weights but embeddings, of which it reads a row; a head that is tied to them is read."""
        unread = 0 if self._embeddings.ctypes.data == self._output[0] else self._embeddings.nbytes
        unread += 0 if self._positions is None else self._positions.nbytes
        return Floor(read_bandwidth(self._memory, self._team.threads), self._memory.nbytes - unread)

    def _embedded(self, rows: Rows) -> np.ndarray:
        x: np.ndarray = self._embeddings[rows.tokens]
        return x if self._positions is None else x + self._positions[rows.positions]

    def _run_layers(self, first: int, last: int, x: np.ndarray, rows: Rows, length: int, blocks: np.ndarray, work: tuple[Any, ...]) -> None:
        """Runs layers over blocks of `length` positions, whose addresses are [layers, k]."""
        model, where = self._model, (rows.positions, rows.places, rows.edges)
        shape = (model.heads, model.kv_heads, model.head_dim, length, model.eps)
        self._team.run(cpu_kernels.run_layers, first, last, x, where, shape, self._weights, self._rope, blocks, work)

    def _normalised(self, x: np.ndarray) -> np.ndarray:
        hidden = cpu_kernels.aligned(*x.shape)
        cpu_kernels.normalise(*self._final, self._model.eps, x, hidden)
        return hidden

    def _work(self, rows: Rows) -> tuple[Any, ...]:
        """Memory for one pass, see `cpu_kernels.run_layers`."""
        model, gated, count = self._model, self._weights[4], len(rows.tokens)
        widths = (model.hidden, (model.heads + 2 * model.kv_heads) * model.head_dim, model.heads * model.head_dim)
        memory = [cpu_kernels.aligned(count, width) for width in (*widths, model.feed if gated else 0, model.feed)]
        seen, group = int(rows.positions.max()) + 1, model.heads // model.kv_heads
        attention = cpu_kernels.attention_work(self._team.threads, count, group, model.head_dim, seen)
        return *memory, np.empty(model.feed, np.float32), np.empty((count, model.hidden), np.float32), attention


def _weights(decoder: DecoderWeights) -> tuple[Any, ...]:
    first = decoder.layers[0]
    linears = np.array(
        [[_NONE if linear is None else linear_row(linear) for linear in _linears(layer)] for layer in decoder.layers], np.int64
    )
    norms = np.array([[_norm_row(norm) for norm in _norms(layer)] for layer in decoder.layers], np.int64)
    scales = np.array([layer.scale for layer in decoder.layers], np.float32)
    return linears, norms, scales, len(first.first) == 1, first.gate is not None, first.parallel


def _linears(layer: LayerWeights) -> list[Linear | None]:
    """Query, key, value (or one, joint), attention's output, gate, up, down."""
    first: list[Linear | None] = list(layer.first)
    up = first.pop() if layer.parallel else layer.feed_in
    return [*first, *[None] * (3 - len(first)), layer.attention_out, layer.gate, up, layer.feed_out]


def _norms(layer: LayerWeights) -> list[Norm | None]:
    """Of attention, feed-forward, and each head of query and key."""
    return [layer.norm, layer.feed_norm or layer.norm, *(layer.head_norms or (None, None))]


def linear_row(linear: Linear) -> tuple[int, int, int, int, int]:
    """(address, rows, columns, address of the bias or 0, transposed), as the kernels read it."""
    return linear.weight.ctypes.data, linear.rows, linear.columns, _address(linear.bias), int(linear.transposed)


def _norm_row(norm: Norm | None) -> tuple[int, int]:
    return (0, 0) if norm is None else (norm.weight.ctypes.data, _address(norm.bias))


def _address(array: np.ndarray | None) -> int:
    return 0 if array is None else array.ctypes.data


def _rope(decoder: DecoderWeights, max_length: int) -> tuple[np.ndarray, np.ndarray, bool]:
    if decoder.rope is None:
        nothing = np.empty((max_length, 0), np.float32)
        return nothing, nothing, False
    return decoder.rope.cosines, decoder.rope.sines, decoder.rope.interleaved
