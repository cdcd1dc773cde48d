"""A model's architecture, read from its Hugging Face config without transformers: a struct for each family, with the family's defaults."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import msgspec

from semgap.kv.pool import KVShape

FAMILIES = ("llama", "gptj", "gpt2")
_EMBEDDINGS = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight", "gptj": "transformer.wte.weight"}
_ALIASES = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
}
"""Names that transformers takes for those of GPT-2 and GPT-J, and never writes."""

_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 48)]


class ModelError(ValueError):
    """This side cannot build or hold the model; the message says why. `code` travels in error frames."""

    code = "model"


@dataclass(frozen=True)
class Architecture:
    """The numbers of a decoder-only model. `feed`: inner channels of the feed-forward; `context`: the most positions.

    `rotary_dims` of each head rotate, 0 for learned positions. `rope`: `rope_type`, `rope_theta` and what the type needs. `tied`: the
    output head is the token embedding. `attention_bias` and `feed_bias` are of Llama's linears, which other families always have or never.
    """

    family: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    feed: int
    vocab: int
    context: int
    eps: float
    activation: str
    tied: bool
    rotary_dims: int = 0
    rope: Mapping[str, Any] | None = None
    attention_bias: bool = False
    feed_bias: bool = False
    soft_cap: float | None = None
    scales_by_head_dim: bool = True
    scales_by_layer: bool = False
    beyond: str | None = None  # a setting that transformers knows and that is not read here

    def kv_shape(self, max_length: int) -> KVShape:
        """The shape of one handle's KV cache."""
        return KVShape(self.layers, self.kv_heads, max_length, self.head_dim)

    def scale(self, layer: int) -> float:
        """The factor of a layer's attention scores."""
        scale = self.head_dim**-0.5 if self.scales_by_head_dim else 1.0
        return scale / (layer + 1) if self.scales_by_layer else scale


class _Llama(msgspec.Struct):
    vocab_size: _Count = 32000
    hidden_size: _Count = 4096
    intermediate_size: _Count = 11008
    num_hidden_layers: _Count = 32
    num_attention_heads: _Count = 32
    num_key_value_heads: _Count | None = None
    head_dim: _Count | None = None
    hidden_act: str = "silu"
    max_position_embeddings: _Count = 2048
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    partial_rotary_factor: float | None = None
    final_logit_softcapping: float | None = None
    is_causal: bool = True
    original_max_position_embeddings: int | None = None

    def architecture(self, family: str) -> Architecture:
        kv_heads = self.num_key_value_heads or self.num_attention_heads
        rope = dict(self.rope_parameters or self.rope_scaling or {})
        rope.setdefault("rope_type", rope.get("type", "default"))
        rope.setdefault("rope_theta", self.rope_theta or 10000.0)
        rope.setdefault("partial_rotary_factor", self.partial_rotary_factor or 1.0)
        rope.setdefault("original_max_position_embeddings", self.max_position_embeddings)
        head_dim = self.head_dim or _head_dim(self.hidden_size, self.num_attention_heads)
        if self.num_attention_heads % kv_heads:
            raise ValueError(f"{self.num_attention_heads} heads do not divide into groups over {kv_heads} KV heads")
        return Architecture(
            family=family,
            layers=self.num_hidden_layers,
            heads=self.num_attention_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            hidden=self.hidden_size,
            feed=self.intermediate_size,
            vocab=self.vocab_size,
            context=self.max_position_embeddings,
            eps=self.rms_norm_eps,
            activation=self.hidden_act,
            tied=self.tie_word_embeddings,
            rotary_dims=head_dim,
            rope=rope,
            attention_bias=self.attention_bias,
            feed_bias=self.mlp_bias,
            soft_cap=self.final_logit_softcapping,
            beyond=self._beyond(),
        )

    def _beyond(self) -> str | None:
        if not self.is_causal:
            return "is_causal: false"
        if self.rope_parameters and self.rope_scaling:
            return "rope_parameters beside rope_scaling"
        return "original_max_position_embeddings outside of rope_parameters" if self.original_max_position_embeddings else None


class _GPT(msgspec.Struct):
    """The fields that GPT-2 and GPT-J share, with GPT-2's defaults."""

    vocab_size: _Count = 50257
    n_positions: _Count = 1024
    n_embd: _Count = 768
    n_layer: _Count = 12
    n_head: _Count = 12
    n_inner: _Count | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    add_cross_attention: bool = False

    def architecture(self, family: str) -> Architecture:
        head_dim = _head_dim(self.n_embd, self.n_head)
        return Architecture(
            family=family,
            layers=self.n_layer,
            heads=self.n_head,
            kv_heads=self.n_head,
            head_dim=head_dim,
            hidden=self.n_embd,
            feed=self.n_inner or 4 * self.n_embd,
            vocab=self.vocab_size,
            context=self.n_positions,
            eps=self.layer_norm_epsilon,
            activation=self.activation_function,
            tied=self.tie_word_embeddings,
            scales_by_head_dim=self.scale_attn_weights,
            scales_by_layer=self.scale_attn_by_inverse_layer_idx,
            beyond="add_cross_attention: true" if self.add_cross_attention else None,
        )


class _GPTJ(_GPT):
    vocab_size: _Count = 50400
    n_positions: _Count = 2048
    n_embd: _Count = 4096
    n_layer: _Count = 28
    n_head: _Count = 16
    tie_word_embeddings: bool = False
    rotary_dim: int | None = 64

    def architecture(self, family: str) -> Architecture:
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
        scaled = replace(super().architecture(family), scales_by_head_dim=True, scales_by_layer=False)  # only GPT-2 reads those keys
        return replace(scaled, rotary_dims=self.rotary_dim or 0, rope=rope)


_CONFIGS: dict[str, type[_Llama] | type[_GPT]] = {"llama": _Llama, "gptj": _GPTJ, "gpt2": _GPT}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a Hugging Face `config`. ModelError for an unknown family, a quantised model, or an invalid config."""
    family = config.get("model_type")
    if family not in FAMILIES or "quantization_config" in config:
        raise ModelError(f"model type {family!r} is not supported; use an unquantised model of {', '.join(FAMILIES)}")
    alias = next((name for name in _ALIASES if name in config), None) if family != "llama" else None
    if alias:
        raise ModelError(f"the model's config is not a {family} config: it says {alias!r}; use the family's own name, {_ALIASES[alias]!r}")
    try:
        return msgspec.convert(config, _CONFIGS[family]).architecture(family)
    except ValueError as error:  # msgspec.ValidationError is one
        raise ModelError(f"the model's config is not a {family} config: {error}") from error


def head_names(model: Architecture, names: Collection[str]) -> tuple[str, str | None]:
    """The names of the output head's weight, which may be the token embedding, and of its bias, if the family has one."""
    own = "lm_head.weight" in names or not model.tied
    return "lm_head.weight" if own else _EMBEDDINGS[model.family], "lm_head.bias" if model.family == "gptj" else None


def _head_dim(hidden: int, heads: int) -> int:
    if hidden % heads:
        raise ValueError(f"a hidden size of {hidden} does not divide into {heads} heads")
    return hidden // heads
