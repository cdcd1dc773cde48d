"""Passes of executor `cuda_graph` over the rows of many requests: one graph for each of SIZES rows, captured before the first request.

A pass takes the smallest graph that holds its rows and pads the rest; one with more rows than the largest graph is replayed part by part.
A row is a token: a decode step has one, a chunk of a prefill several, and both go the same way. One row runs the matrix-vector kernels of
kernels.py, more run torch's matrix products; everything between the products is batch_kernels.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from semgap.engine import batch_kernels, kernels
from semgap.engine.architecture import Architecture
from semgap.engine.batch import Rows
from semgap.engine.batch_kernels import Parts
from semgap.engine.decoder_weights import DecoderWeights, LayerWeights, Linear
from semgap.engine.graph_capture import captured
from semgap.kv.gpu_block_pool import GpuBlockPool
from semgap.kv.pool import BLOCK

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # steps of up to 32 decodes; beyond them prefills: up to about 256 rows a product reads weights


@dataclass(frozen=True)
class _Buffers:
    """The memory of a pass of n rows, [n, width] each: the same for all sizes, from its beginning on."""

    state: torch.Tensor  # [n, 2 + blocks of a request]: token, position, block numbers
    residual: torch.Tensor
    normed: torch.Tensor
    hidden: torch.Tensor
    first: torch.Tensor  # (n * (qkv's width + fed's),): qkv, then fed, which for one row are the products of a parallel layer's first norm
    qkv: torch.Tensor
    fed: torch.Tensor
    attended: torch.Tensor
    gated: torch.Tensor
    parts: Parts


class GraphBatch:
    """Runs a decoder over one pool: `decoder` as kernels read it, and its `plain` layers, whose linears have only biases of their own.

    Weights may arrive later: a graph holds their addresses.
    """

    def __init__(
        self, model: Architecture, decoder: DecoderWeights, plain: Sequence[LayerWeights], pool: GpuBlockPool, max_length: int
    ) -> None:
        self.pool, self._plain = pool, plain
        self._decoder, self._heads, self._kv_heads = decoder, model.heads, model.kv_heads
        like, self._max_length = decoder.tokens, max_length
        widths = (model.hidden, (model.heads + 2 * model.kv_heads) * model.head_dim, model.heads * model.head_dim, model.feed)
        self._hidden_width, self._qkv_width, self._attended_width, self._feed_width = widths
        rows, blocks = SIZES[-1], -(-max_length // BLOCK)
        self._state = torch.zeros(rows, 2 + blocks, dtype=torch.int64, device=like.device)
        self._state[:, 1] = -1
        self._memory = [
            like.new_zeros(rows * width) for width in (*[model.hidden] * 3, widths[1] + model.feed, widths[2], model.feed)
        ]  # residual, normed, hidden, first, attended, gated
        most_parts = max(size * Parts.of(size, max_length).count for size in SIZES) * model.heads
        block_d = 1 << (model.head_dim - 1).bit_length()
        self._sums = torch.empty(most_parts * block_d, dtype=torch.float32, device=like.device)
        self._stats = torch.empty(most_parts * 2, dtype=torch.float32, device=like.device)
        self._replays = self._captured()

    def forward(self, rows: Rows, drawn: np.ndarray) -> torch.Tensor:
        """Final hidden states (m, hidden) of the rows with numbers `drawn` (m,), ascending. Fills the rows' places in the pool."""
        state = self._packed(rows)
        hidden = []
        for begin in range(0, len(rows.tokens), SIZES[-1]):
            size = size_of(len(rows.tokens) - begin)
            here = torch.from_numpy(drawn[(drawn >= begin) & (drawn < begin + size)] - begin).to(self._state.device)
            self._state[:size].copy_(torch.from_numpy(state[begin : begin + size]))
            self._replays[size]()  # after both copies, which wait for the GPU
            hidden.append(self._memory[2].view(-1, self._hidden_width)[here])
        return torch.cat(hidden)

    def _packed(self, rows: Rows) -> np.ndarray:
        """The state of all rows, [n, 2 + blocks], and of those that pad the last pass: token 0 at position -1."""
        count = len(rows.tokens)
        last = (count - 1) // SIZES[-1] * SIZES[-1]
        state = np.zeros((last + size_of(count - last), self._state.shape[1]), np.int64)
        state[:count, 0], state[:count, 1], state[count:, 1] = rows.tokens, rows.positions, -1
        for (begin, first), (end, last) in zip(rows.edges, rows.edges[1:], strict=False):
            state[begin:end, 2 : 2 + last - first] = rows.blocks[first:last]
        return state

    @torch.no_grad()  # not inference_mode, as in cuda_graph.py
    def _captured(self) -> dict[int, Callable[[], None]]:
        runs = [partial(self._run, self._buffers(size)) for size in SIZES]
        with kernels.compiled_side_by_side():
            for run in runs:
                run()
        return dict(zip(SIZES, captured(runs, self._state.device.type), strict=True))

    def _buffers(self, rows: int) -> _Buffers:
        def of(memory: torch.Tensor, width: int, begin: int = 0) -> torch.Tensor:
            return memory[begin : begin + rows * width].view(rows, width)

        residual, normed, hidden, first, attended, gated = self._memory
        return _Buffers(
            state=self._state[:rows],
            residual=of(residual, self._hidden_width),
            normed=of(normed, self._hidden_width),
            hidden=of(hidden, self._hidden_width),
            first=first[: rows * (self._qkv_width + self._feed_width)],
            qkv=of(first, self._qkv_width),
            fed=of(first, self._feed_width, rows * self._qkv_width),
            attended=of(attended, self._attended_width),
            gated=of(gated, self._feed_width),
            parts=Parts.of(rows, self._max_length),
        )

    def _run(self, at: _Buffers) -> None:
        kernels.embed(at.state, self._decoder.tokens, self._decoder.positions, at.residual)
        left = None
        for index, layer in enumerate(self._decoder.layers if len(at.state) == 1 else self._plain):
            left = self._run_layer(at, index, layer, left)
        kernels.norm(at.residual, self._decoder.norm, at.hidden, left)

    def _run_layer(self, at: _Buffers, index: int, layer: LayerWeights, left: torch.Tensor | None) -> torch.Tensor | None:
        """Takes the bias that the layer before left for the next norm to add, and leaves its own."""
        kernels.norm(at.residual, layer.norm, at.normed, left)
        _first_products(at, layer)
        if layer.head_norms:
            kernels.norm_heads(at.qkv, *layer.head_norms, self._heads, self._kv_heads)
        scratch = self._sums, self._stats, at.parts
        batch_kernels.attend(at.qkv, self.pool.memory, index, at.state, self._decoder.rope, layer.scale, *scratch, at.attended)
        if layer.parallel:
            return _merge(at.residual, (at.attended, layer.attention_out), (at.fed, layer.feed_out))
        left = _merge(at.residual, (at.attended, layer.attention_out))
        assert layer.feed_norm is not None and layer.feed_in is not None
        kernels.norm(at.residual, layer.feed_norm, at.normed, left)
        _feed(at, layer.gate, layer.feed_in)
        return _merge(at.residual, (at.fed, layer.feed_out))


def size_of(rows: int) -> int:
    """The smallest of SIZES that holds so many rows; the largest, which holds a part of them, if none does."""
    return next((size for size in SIZES if size >= rows), SIZES[-1])


def _first_products(at: _Buffers, layer: LayerWeights) -> None:
    """Query, key and value; in a parallel layer the feed-forward's first product and its activation, too."""
    if len(at.qkv) == 1:
        kernels.project(at.normed, layer.first, at.first, gelu_last=layer.parallel)
        return
    *joint, last = layer.first
    begin = 0
    for linear in joint if layer.parallel else layer.first:
        _product(at.normed, linear, at.qkv[:, begin : begin + linear.rows])
        begin += linear.rows
    if layer.parallel:
        _product(at.normed, last, at.fed)
        batch_kernels.activate(at.fed)


def _feed(at: _Buffers, gate: Linear | None, up: Linear) -> None:
    if len(at.qkv) == 1:
        if gate is None:
            kernels.project(at.normed, [up], at.fed, gelu_last=True)
        else:
            kernels.gate(at.normed, gate, up, at.fed)
        return
    _product(at.normed, up, at.fed)
    if gate is not None:
        _product(at.normed, gate, at.gated)
    batch_kernels.activate(at.fed, None if gate is None else at.gated)


def _merge(residual: torch.Tensor, *given: tuple[torch.Tensor, Linear]) -> torch.Tensor | None:
    """residual [n, N] += linear(x), for one or two (x, linear). In place. Of more rows than one, the last bias is left to add."""
    if len(residual) == 1:
        kernels.merge(residual, *given[0], *(given[1] if len(given) > 1 else (None, None)))
        return None
    left = None
    for x, linear in given:
        if left is not None:
            residual.add_(left)
        torch.addmm(residual, x, _matrix(linear), out=residual)
        left = linear.bias
    return left


def _product(x: torch.Tensor, linear: Linear, out: torch.Tensor) -> None:
    """out [n, rows] = linear(x), x [n, columns]."""
    if linear.bias is None:
        torch.mm(x, _matrix(linear), out=out)
    else:
        torch.addmm(linear.bias, x, _matrix(linear), out=out)


def _matrix(linear: Linear) -> torch.Tensor:
    """[columns, rows]"""
    return linear.weight if linear.transposed else linear.weight.t()
