"""A model's architecture, read from its Hugging Face config without transformers: a struct for each family, with the family's defaults."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import msgspec

from semgap.kv.pool import KVShape

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "smollm3", "granite", "gpt_neox", "gptj", "gpt2")
HEADS = ("lm_head.weight", "embed_out.weight")  # GPT-NeoX's files have the second, which transformers reads as the first
NOT_CAUSAL = "is_causal: false"
_EMBEDDINGS = {"gpt2": "transformer.wte.weight", "gptj": "transformer.wte.weight", "gpt_neox": "gpt_neox.embed_in.weight"}
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
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
class Reach:
    """The longest text, in positions, that a model computes as executors do; `why` a longer one is another computation."""

    positions: int
    why: str


@dataclass(frozen=True)
class Architecture:
    """The numbers of a decoder-only model. `feed`: inner channels of the feed-forward; `context`: the most positions.

    `rotary_dims` of each head rotate, 0 for learned positions. `rope`: `rope_type`, `rope_theta` and what the type needs. `tied`: the
    output head is the token embedding. `qkv_bias`, `out_bias` and `feed_bias` are of the linears of Llama and its kin, which other families
    always have or never. `head_norms`: each head of query and key has a norm. `logits_divisor` divides the output head's product.
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
    qkv_bias: bool = False
    out_bias: bool = False
    feed_bias: bool = False
    head_norms: bool = False
    logits_divisor: float = 1.0
    scales_by_head_dim: bool = True
    scales_by_layer: bool = False
    reach: Reach | None = None
    beyond: str | None = None  # a setting that transformers knows and that is not read here

    def kv_shape(self, max_length: int) -> KVShape:
        """The shape of one handle's KV cache."""
        return KVShape(self.layers, self.kv_heads, max_length, self.head_dim)

    def scale(self, layer: int) -> float:
        """The factor of a layer's attention scores."""
        scale = self.head_dim**-0.5 if self.scales_by_head_dim else 1.0
        return scale / (layer + 1) if self.scales_by_layer else scale

    def require_length(self, max_length: int) -> None:
        """ModelError if the model cannot hold `max_length` positions, or is another model over so many."""
        if max_length > self.context:
            raise ModelError(f"max_length {max_length} is more than the model's context of {self.context} positions")
        if self.reach and max_length > self.reach.positions:
            positions, why = self.reach.positions, self.reach.why
            way_out = f"set max_length to {positions} at most, or use another model"
            raise ModelError(f"max_length {max_length} is more than the model's {positions} positions {why}; {way_out}")


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
            qkv_bias=self.attention_bias,
            out_bias=self.attention_bias,
            feed_bias=self.mlp_bias,
            reach=self._rotary_reach(rope),
            beyond=self._beyond(),
        )

    def _rotary_reach(self, rope: Mapping[str, Any]) -> Reach | None:
        """A longrope rotates longer texts by other frequencies, keys that lie in a cache too."""
        if rope["rope_type"] not in ("longrope", "su"):
            return None
        original = rope["original_max_position_embeddings"]
        if not isinstance(original, int):
            raise ValueError(f"original_max_position_embeddings {original!r} is no number of positions")
        original = min(original, self.original_max_position_embeddings or original)
        return Reach(original, "beyond which rope type 'longrope' rotates by other frequencies (original_max_position_embeddings)")

    def _beyond(self) -> str | None:
        if not self.is_causal:
            return NOT_CAUSAL
        if any(isinstance(value, dict) for value in (self.rope_parameters or {}).values()):
            return "rope_parameters of each layer type"
        if self.rope_parameters and self.rope_scaling:
            return "rope_parameters beside rope_scaling"
        return "original_max_position_embeddings outside of rope_parameters" if self.original_max_position_embeddings else None


class _Mistral(_Llama):
    intermediate_size: _Count = 14336
    num_key_value_heads: _Count | None = 8
    max_position_embeddings: _Count = 131072
    sliding_window: int | None = 4096

    def architecture(self, family: str) -> Architecture:
        model = replace(super().architecture(family), qkv_bias=False, out_bias=False, feed_bias=False)
        return replace(model, reach=_shortest(model.reach, _window(self.sliding_window)))


class _Qwen2(_Llama):
    vocab_size: _Count = 151936
    intermediate_size: _Count = 22016
    num_key_value_heads: _Count | None = 32
    max_position_embeddings: _Count = 32768
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: list[str] | None = None

    def architecture(self, family: str) -> Architecture:
        model = replace(super().architecture(family), qkv_bias=True, out_bias=False, feed_bias=False)
        window = self.sliding_window if self.use_sliding_window else None
        if self.layer_types is None and self.max_window_layers >= self.num_hidden_layers:
            window = None
        return replace(model, reach=_shortest(model.reach, _typed_window(self.layer_types, window)))


class _Qwen3(_Qwen2):
    head_dim: _Count | None = 128

    def architecture(self, family: str) -> Architecture:
        model, biased = super().architecture(family), self.attention_bias
        return replace(model, qkv_bias=biased, out_bias=biased, head_norms=True)


class _Phi3(_Llama):
    vocab_size: _Count = 32064
    hidden_size: _Count = 3072
    intermediate_size: _Count = 8192
    max_position_embeddings: _Count = 4096
    original_max_position_embeddings: int | None = 4096
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = None

    def architecture(self, family: str) -> Architecture:
        model = super().architecture(family)
        return replace(model, reach=_shortest(model.reach, _window(self.sliding_window)))


class _Olmo2(_Llama):
    vocab_size: _Count = 50304
    rms_norm_eps: float = 1e-5


class _SmolLM3(_Llama):
    vocab_size: _Count = 128256
    hidden_size: _Count = 2048
    num_hidden_layers: _Count = 36
    num_attention_heads: _Count = 16
    num_key_value_heads: _Count | None = 4
    max_position_embeddings: _Count = 32768
    tie_word_embeddings: bool = True
    use_sliding_window: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None

    def architecture(self, family: str) -> Architecture:
        model, window = super().architecture(family), self.sliding_window if self.use_sliding_window else None
        return replace(model, reach=_shortest(model.reach, _typed_window(self.layer_types, window)))


class _Granite(_Llama):
    logits_scaling: float = 1.0

    def architecture(self, family: str) -> Architecture:
        return replace(super().architecture(family), logits_divisor=self.logits_scaling)


class _GPTNeoX(_Llama):
    vocab_size: _Count = 50432
    hidden_size: _Count = 6144
    intermediate_size: _Count = 24576
    num_hidden_layers: _Count = 44
    num_attention_heads: _Count = 64
    hidden_act: str = "gelu"

    def architecture(self, family: str) -> Architecture:
        model, head_dim = super().architecture(family), _head_dim(self.hidden_size, self.num_attention_heads)
        return replace(model, kv_heads=model.heads, head_dim=head_dim)  # the family knows no other numbers


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


_CONFIGS: dict[str, type[_Llama] | type[_GPT]] = {
    "llama": _Llama,
    "mistral": _Mistral,
    "qwen2": _Qwen2,
    "qwen3": _Qwen3,
    "phi3": _Phi3,
    "olmo2": _Olmo2,
    "smollm3": _SmolLM3,
    "granite": _Granite,
    "gpt_neox": _GPTNeoX,
    "gptj": _GPTJ,
    "gpt2": _GPT,
}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a Hugging Face `config`. ModelError for an unknown family, a quantised model, or an invalid config."""
    family = config.get("model_type")
    if family not in FAMILIES or config.get("quantization_config") is not None:
        why = _why_unknown(config)
        raise ModelError(f"model type {family!r} is not supported{why}; use an unquantised model of {', '.join(FAMILIES)}")
    alias = next((name for name in _ALIASES if name in config), None) if family in ("gpt2", "gptj") else None
    if alias:
        raise ModelError(f"the model's config is not a {family} config: it says {alias!r}; use the family's own name, {_ALIASES[alias]!r}")
    try:
        return msgspec.convert(config, _CONFIGS[family]).architecture(family)
    except ModelError:
        raise
    except ValueError as error:  # msgspec.ValidationError is one
        raise ModelError(f"the model's config is not a {family} config: {error}") from error


def _why_unknown(config: Mapping[str, Any]) -> str:
    """The end of the refusal of an unknown family: the setting that no executor computes. Empty without such a setting."""
    if config.get("quantization_config") is not None:
        return ": its weights are quantised (quantization_config)"
    for name in _EXPERTS:
        if config.get(name):
            return f": its feed-forward layers choose among experts ({name} {config[name]})"
    if config.get("sliding_window"):
        return f": its layers attend within sliding windows (sliding_window {config['sliding_window']})"
    return ""


def head_names(model: Architecture, names: Collection[str]) -> tuple[str, str | None]:
    """The names of the output head's weight, which may be the token embedding, and of its bias, if the family has one."""
    own = next((name for name in HEADS if name in names), None if model.tied else HEADS[0])
    tied = _EMBEDDINGS.get(model.family, "model.embed_tokens.weight")
    return own or tied, "lm_head.bias" if model.family == "gptj" else None


def _window(positions: int | None) -> Reach | None:
    """The reach of layers that attend to so many positions alone: a text that is no longer has full attention."""
    return None if positions is None else Reach(positions, "beyond which its layers attend within a sliding window (sliding_window)")


def _typed_window(types: Collection[str] | None, window: int | None) -> Reach | None:
    """The reach of a config with a type for each layer. ModelError for any type but full attention and a window of known size."""
    known = {"full_attention"} if window is None else {"full_attention", "sliding_attention"}
    if strange := sorted({*(types or ())} - known):
        size = " without a window's size" if strange[0] == "sliding_attention" else ""
        raise ModelError(
            f"layers of type {strange[0]!r}{size} are not supported; use a model whose layers are all of type 'full_attention'"
        )
    return None if types and "sliding_attention" not in types else _window(window)


def _shortest(*reaches: Reach | None) -> Reach | None:
    return min((reach for reach in reaches if reach), key=lambda reach: reach.positions, default=None)


def _head_dim(hidden: int, heads: int) -> int:
    if hidden % heads:
        raise ValueError(f"a hidden size of {hidden} does not divide into {heads} heads")
    return hidden // heads
