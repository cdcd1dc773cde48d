"""Executor `fused`: a layer is one compiled function (cpu_kernels.py), for float32 on a CPU. Needs neither torch nor transformers.

A row of a batch has the same bits as alone, so prefill, steps, windows and replays of any shapes agree bitwise.
"""

from collections.abc import Generator
from typing import Any

import numpy as np

from semgap.engine import cpu_kernels
from semgap.engine.architecture import Architecture
from semgap.engine.cpu_bandwidth import read_bandwidth
from semgap.engine.cpu_threads import Team
from semgap.engine.decoder_weights import DecoderWeights, LayerWeights, Linear, Norm, read_decoder
from semgap.engine.executor import Drawn, Executor
from semgap.engine.sampling import draw
from semgap.engine.weights import Weights
from semgap.kv.blocks import KVCache
from semgap.kv.pool import HostPool
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
        self._model, self._shape = model, (model.heads, model.kv_heads, model.head_dim, max_length, model.eps)
        self._weights, self._rope = _weights(decoder), _rope(decoder, max_length)
        self._embeddings, self._positions = decoder.tokens, decoder.positions
        self._final, self._output = _norm_row(decoder.norm), np.array(linear_row(decoder.head), np.int64)

    def forward(self, tokens: np.ndarray, cache: KVCache) -> np.ndarray:
        """Final hidden states. A layer whose blocks are on their way waits for them."""
        self.check_room(tokens, cache.filled)
        position, end, layers, pool = cache.filled, cache.filled + len(tokens), cache.layers, cache.pool
        assert isinstance(pool, HostPool)
        x = self._embeddings[tokens]
        if self._positions is not None:
            x += self._positions[position:end]
        work = self._work(len(tokens))
        for first, last in [(0, len(layers))] if cache.awaited is None else [(i, i + 1) for i in range(len(layers))]:
            if cache.awaited is not None:
                cache.awaited(first)
            slabs = np.array([0] * first + [pool.address(layer.number) for layer in layers[first:last]], np.int64)
            self._team.run(cpu_kernels.run_layers, first, last, x, position, self._shape, self._weights, self._rope, slabs, work)
            for layer in layers[first:last]:
                layer.filled = end
        hidden = cpu_kernels.aligned(*x.shape)
        cpu_kernels.normalise(*self._final, self._shape[-1], x, hidden)
        return hidden

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

    def _work(self, rows: int) -> tuple[np.ndarray, ...]:
        """Memory for one pass over so many rows, see `cpu_kernels.run_layers`."""
        heads, kv_heads, head_dim, max_length, _ = self._shape
        hidden, feed, gated = self._model.hidden, self._model.feed, self._weights[4]
        widths = (hidden, (heads + 2 * kv_heads) * head_dim, heads * head_dim, feed if gated else 0, feed)
        memory = [cpu_kernels.aligned(rows, width) for width in widths]
        scores = cpu_kernels.aligned(self._team.threads, 8, max_length)
        return *memory, np.empty(feed, np.float32), np.empty((rows, hidden), np.float32), scores


def _weights(decoder: DecoderWeights) -> tuple[Any, ...]:
    first = decoder.layers[0]
    linears = np.array(
        [[_NONE if linear is None else linear_row(linear) for linear in _linears(layer)] for layer in decoder.layers], np.int64
    )
    norms = np.array([[_norm_row(layer.norm), _norm_row(layer.feed_norm or layer.norm)] for layer in decoder.layers], np.int64)
    scales = np.array([layer.scale for layer in decoder.layers], np.float32)
    return linears, norms, scales, len(first.first) == 1, first.gate is not None, first.parallel


def _linears(layer: LayerWeights) -> list[Linear | None]:
    """Query, key, value (or one, joint), attention's output, gate, up, down."""
    first: list[Linear | None] = list(layer.first)
    up = first.pop() if layer.parallel else layer.feed_in
    return [*first, *[None] * (3 - len(first)), layer.attention_out, layer.gate, up, layer.feed_out]


def linear_row(linear: Linear) -> tuple[int, int, int, int, int]:
    """(address, rows, columns, address of the bias or 0, transposed), as the kernels read it."""
    return linear.weight.ctypes.data, linear.rows, linear.columns, _address(linear.bias), int(linear.transposed)


def _norm_row(norm: Norm) -> tuple[int, int]:
    return norm.weight.ctypes.data, _address(norm.bias)


def _address(array: np.ndarray | None) -> int:
    return 0 if array is None else array.ctypes.data


def _rope(decoder: DecoderWeights, max_length: int) -> tuple[np.ndarray, np.ndarray, bool]:
    if decoder.rope is None:
        nothing = np.empty((max_length, 0), np.float32)
        return nothing, nothing, False
    return decoder.rope.cosines, decoder.rope.sines, decoder.rope.interleaved
