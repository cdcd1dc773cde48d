"""Executor `fused`: a layer is one compiled function (cpu_kernels.py), for float32 on a CPU.

A row of a batch has the same bits as alone, so prefill, steps, windows and replays of any shapes agree bitwise.
"""

from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from semgap.engine import cpu_kernels
from semgap.engine.cpu_threads import Team
from semgap.engine.decoder_weights import GELU_TANH, READERS, STATIC_ROPE, DecoderWeights, LayerWeights, Linear, Norm
from semgap.engine.executor import Drawn, Executor
from semgap.engine.sampling import draw
from semgap.kv.blocks import KVCache
from semgap.policy import SamplingRule

_NONE = (0, 0, 0, 0, 0)


class FusedExecutor(Executor):
    """Runs a model by compiled layers, in `threads` threads. The weights may arrive after it is made.

    ModelError for a model that the kernels do not know.
    """

    def __init__(self, model: PreTrainedModel, max_length: int, rule: SamplingRule | None = None, threads: int = 1) -> None:
        super().__init__(model, max_length, rule)
        self._team = Team(threads)
        cpu_kernels.load()
        self._decoder = decoder = READERS[model.config.model_type](model, max_length)
        shape = self.kv_shape
        self._shape = (decoder.heads, shape.heads, shape.head_dim, max_length, decoder.norm.eps)
        self._weights = _weights(decoder)
        self._rope = _rope(decoder, max_length)
        self._embeddings = decoder.tokens.numpy()
        self._positions = None if decoder.positions is None else decoder.positions.numpy()
        self._final, self._output = _norm_row(decoder.norm), np.array(_linear_row(decoder.head), np.int64)

    def forward(self, tokens: np.ndarray, cache: KVCache) -> torch.Tensor:
        self.check_room(tokens, cache.filled)
        return torch.from_numpy(self._hidden(tokens, cache))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (n, vocab) of final hidden states (n, hidden)."""
        return torch.from_numpy(cpu_kernels.project(self._output, hidden.numpy(), self._team))

    def decode_window(self, token: int, cache: KVCache, count: int, seed: int, request: int) -> Generator[Drawn]:
        rule = self._required_rule()
        for _ in range(count):
            tokens = np.array([token])
            self.check_room(tokens, cache.filled)
            row = cpu_kernels.project(self._output, self._hidden(tokens, cache), self._team)[0]
            token = draw(row, rule, seed, request, cache.filled).token
            yield Drawn(token, None)

    def _hidden(self, tokens: np.ndarray, cache: KVCache) -> np.ndarray:
        """Final hidden states (n, hidden), float32. A layer whose blocks are on their way waits for them."""
        position, end, layers = cache.filled, cache.filled + len(tokens), cache.layers
        x = self._embeddings[tokens]
        if self._positions is not None:
            x += self._positions[position:end]
        work = self._work(len(tokens))
        for first, last in [(0, len(layers))] if cache.awaited is None else [(i, i + 1) for i in range(len(layers))]:
            if cache.awaited is not None:
                cache.awaited(first)
            slabs = np.array([0] * first + [layer.held_slab.data_ptr() for layer in layers[first:last]], np.int64)
            arguments = first, last, x, position, self._shape, self._weights, self._rope, slabs, work
            self._team.run(cpu_kernels.run_layers, *arguments)
            for layer in layers[first:last]:
                layer.set_filled(end)
        hidden = cpu_kernels.aligned(*x.shape)
        cpu_kernels.normalise(*self._final, self._shape[-1], x, hidden)
        return hidden

    def _work(self, rows: int) -> tuple[np.ndarray, ...]:
        """Memory for one pass over so many rows, see `cpu_kernels.run_layers`."""
        heads, kv_heads, head_dim, max_length, _ = self._shape
        hidden, feed, gated = self._embeddings.shape[1], self._decoder.feed, self._weights[4]
        widths = (hidden, (heads + 2 * kv_heads) * head_dim, heads * head_dim, feed if gated else 0, feed)
        memory = [cpu_kernels.aligned(rows, width) for width in widths]
        scores = cpu_kernels.aligned(self._team.threads, 8, max_length)
        return *memory, np.empty(feed, np.float32), np.empty((rows, hidden), np.float32), scores


def unsupported(config: Mapping[str, Any], dtype: str) -> str | None:
    """Why the kernels cannot run a Hugging Face config in a dtype, or None."""
    if dtype != "float32":
        return f"it computes in float32 only, not in {dtype}"
    if config.get("final_logit_softcapping") is not None:
        return "it has no kernel for soft-capped logits"
    is_llama = config.get("model_type") == "llama"
    activation = config.get("hidden_act", "silu") if is_llama else config.get("activation_function", "gelu_new")
    if activation not in (("silu",) if is_llama else GELU_TANH):
        return f"it has no kernel for activation {activation!r}"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if kind not in STATIC_ROPE:
        return f"it has no kernel for rope type {kind!r}"
    return None if is_llama or config.get("model_type") != "gptj" else _wrong_rotary(config)


def _wrong_rotary(config: Mapping[str, Any]) -> str | None:
    head_dim, rotated = config.get("n_embd", 4096) // config.get("n_head", 16), config.get("rotary_dim", 64)
    fits = rotated and rotated % 2 == 0 and rotated <= head_dim
    return None if fits else f"it has no kernel for rotary_dim {rotated} of heads of {head_dim}"


def _weights(decoder: DecoderWeights) -> tuple[Any, ...]:
    first = decoder.layers[0]
    linears = np.array(
        [[_NONE if linear is None else _linear_row(linear) for linear in _linears(layer)] for layer in decoder.layers], np.int64
    )
    norms = np.array([[_norm_row(layer.norm), _norm_row(layer.feed_norm or layer.norm)] for layer in decoder.layers], np.int64)
    scales = np.array([layer.scale for layer in decoder.layers], np.float32)
    return linears, norms, scales, len(first.first) == 1, first.gate is not None, first.parallel


def _linears(layer: LayerWeights) -> list[Linear | None]:
    """Query, key, value (or one, joint), attention's output, gate, up, down."""
    first: list[Linear | None] = list(layer.first)
    up = first.pop() if layer.parallel else layer.feed_in
    return [*first, *[None] * (3 - len(first)), layer.attention_out, layer.gate, up, layer.feed_out]


def _linear_row(linear: Linear) -> tuple[int, int, int, int, int]:
    """(address, rows, columns, address of the bias or 0, transposed), as the kernels read it."""
    assert linear.weight.is_contiguous()
    bias = 0 if linear.bias is None else linear.bias.data_ptr()
    return linear.weight.data_ptr(), linear.rows, linear.columns, bias, int(linear.transposed)


def _norm_row(norm: Norm) -> tuple[int, int]:
    return norm.weight.data_ptr(), 0 if norm.bias is None else norm.bias.data_ptr()


def _rope(decoder: DecoderWeights, max_length: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """Cosines and sines, one a pair of dimensions: the tables of the model hold each twice."""
    if decoder.rope is None:
        nothing = np.empty((max_length, 0), np.float32)
        return nothing, nothing, False
    tables = (decoder.rope.cosines.numpy(), decoder.rope.sines.numpy())
    pairs = tables[0].shape[1] // 2
    once = [table[:, ::2] if decoder.rope.interleaved else table[:, :pairs] for table in tables]
    return np.ascontiguousarray(once[0]), np.ascontiguousarray(once[1]), decoder.rope.interleaved
