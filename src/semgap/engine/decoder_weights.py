"""A model's weights in the form that a decode step's kernels read: one reader a family."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from semgap.engine.families import ModelError

STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # their frequencies do not depend on the length of the text
GELU_TANH = ("gelu_new", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class Linear:
    """A weight [rows, K] and its bias (rows,) or None; [K, rows] if `transposed`, as in GPT-2."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    transposed: bool = False

    @property
    def rows(self) -> int:
        return self.weight.shape[1 if self.transposed else 0]

    @property
    def columns(self) -> int:
        return self.weight.shape[0 if self.transposed else 1]


@dataclass(frozen=True)
class Norm:
    """LayerNorm, or RMSNorm without a bias."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float


@dataclass(frozen=True)
class Rope:
    """Cosines and sines, float32 [positions, rotary dims], of rotary position embedding.

    `interleaved`: neighbouring dims rotate together; otherwise dim i and dim i + half.
    """

    cosines: torch.Tensor
    sines: torch.Tensor
    interleaved: bool


@dataclass(frozen=True)
class LayerWeights:
    """One layer's weights. `first` are the linears over the first norm: query, key, value; in a `parallel` layer (GPT-J) also the
    feed-forward's first. In other layers the feed-forward has a norm of its own, and a gate if it is gated."""

    norm: Norm
    first: Sequence[Linear]
    scale: float
    attention_out: Linear
    feed_out: Linear
    parallel: bool = False
    feed_norm: Norm | None = None
    feed_in: Linear | None = None
    gate: Linear | None = None


@dataclass(frozen=True)
class DecoderWeights:
    """The weights of a model, and the number of its heads and of its feed-forward's inner channels."""

    tokens: torch.Tensor
    positions: torch.Tensor | None
    layers: Sequence[LayerWeights]
    norm: Norm
    head: Linear
    rope: Rope | None
    heads: int
    feed: int


def _read_gptj(model: PreTrainedModel, max_length: int) -> DecoderWeights:
    config = model.config
    _check(config.activation_function in GELU_TANH, f"activation {config.activation_function!r}")
    head_dim = config.hidden_size // config.num_attention_heads
    rotated = config.rotary_dim or 0
    _check(0 < rotated <= head_dim and rotated % 2 == 0, f"rotary_dim {config.rotary_dim} of heads of {head_dim}")
    blocks = model.transformer.h
    turns = blocks[0].attn.embed_positions[:max_length].to(model.dtype).float().repeat_interleave(2, dim=1)
    sines, cosines = (half.contiguous() for half in turns.chunk(2, dim=1))
    layers = []
    for block in blocks:
        parts = [block.attn.q_proj, block.attn.k_proj, block.attn.v_proj, block.mlp.fc_in]
        layers.append(
            LayerWeights(
                norm=_norm(block.ln_1),
                first=[Linear(part.weight.detach(), _bias(part)) for part in parts],
                scale=1 / math.sqrt(head_dim),
                attention_out=_linear(block.attn.out_proj),
                feed_out=_linear(block.mlp.fc_out),
                parallel=True,
            )
        )
    feed = blocks[0].mlp.fc_in.out_features
    base = model.transformer
    rope = Rope(cosines, sines, interleaved=True)
    return DecoderWeights(base.wte.weight.detach(), None, layers, _norm(base.ln_f), _head(model), rope, config.num_attention_heads, feed)


def _read_gpt2(model: PreTrainedModel, max_length: int) -> DecoderWeights:
    config, base = model.config, model.transformer
    _check(config.activation_function in GELU_TANH, f"activation {config.activation_function!r}")
    layers = [
        LayerWeights(
            norm=_norm(block.ln_1),
            first=[_linear(block.attn.c_attn, transposed=True)],
            scale=block.attn.scaling,
            attention_out=_linear(block.attn.c_proj, transposed=True),
            feed_norm=_norm(block.ln_2),
            feed_in=_linear(block.mlp.c_fc, transposed=True),
            feed_out=_linear(block.mlp.c_proj, transposed=True),
        )
        for block in base.h
    ]
    feed, heads = layers[0].feed_out.columns, config.num_attention_heads
    return DecoderWeights(base.wte.weight.detach(), base.wpe.weight.detach(), layers, _norm(base.ln_f), _head(model), None, heads, feed)


def _read_llama(model: PreTrainedModel, max_length: int) -> DecoderWeights:
    config, base = model.config, model.model
    queries, kv = config.num_attention_heads, config.num_key_value_heads
    _check(queries % kv == 0, f"{queries} heads over {kv} KV heads")
    _check(config.hidden_act == "silu", f"activation {config.hidden_act!r}")
    _check(base.rotary_emb.rope_type in STATIC_ROPE, f"rope type {base.rotary_emb.rope_type!r}")
    positions = torch.arange(max_length, device=base.embed_tokens.weight.device)[None]
    cosines, sines = (each[0].float().contiguous() for each in base.rotary_emb(base.embed_tokens.weight, positions))
    layers = []
    for block in base.layers:
        attention = block.self_attn
        layers.append(
            LayerWeights(
                norm=_norm(block.input_layernorm),
                first=[_linear(part) for part in (attention.q_proj, attention.k_proj, attention.v_proj)],
                scale=attention.scaling,
                attention_out=_linear(attention.o_proj),
                feed_norm=_norm(block.post_attention_layernorm),
                gate=_linear(block.mlp.gate_proj),
                feed_in=_linear(block.mlp.up_proj),
                feed_out=_linear(block.mlp.down_proj),
            )
        )
    rope, heads, feed = Rope(cosines, sines, interleaved=False), config.num_attention_heads, config.intermediate_size
    return DecoderWeights(base.embed_tokens.weight.detach(), None, layers, _norm(base.norm), _head(model), rope, heads, feed)


READERS: dict[str, Callable[[PreTrainedModel, int], DecoderWeights]] = {"gptj": _read_gptj, "gpt2": _read_gpt2, "llama": _read_llama}


def _check(known: bool, what: str) -> None:
    if not known:
        raise ModelError(f"executors fused and cuda_graph have no kernel for {what}; use executor: eager")


def _linear(module: Any, transposed: bool = False) -> Linear:
    return Linear(module.weight.detach(), None if module.bias is None else module.bias.detach(), transposed)


def _bias(module: torch.nn.Linear) -> torch.Tensor:
    """A linear's bias, or zeros: linears that run in one kernel all have a bias or none has."""
    weight = module.weight
    return torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device) if module.bias is None else module.bias.detach()


def _norm(module: Any) -> Norm:
    bias = getattr(module, "bias", None)
    eps = module.variance_epsilon if bias is None else module.eps
    return Norm(module.weight.detach(), None if bias is None else bias.detach(), eps)


def _head(model: PreTrainedModel) -> Linear:
    _check(getattr(model.config, "final_logit_softcapping", None) is None, "soft-capped logits")
    return _linear(model.get_output_embeddings())
