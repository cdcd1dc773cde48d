"""A model's weights in the form that compiled executors read: one reader a family, over arrays of numpy or tensors of torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from semgap.engine.architecture import Architecture, ModelError, head_names
from semgap.engine.rope import STATIC_ROPE, Rope, rope_tables
from semgap.tensors import Array

_GPTS = ("gpt2", "gptj")  # their norms have biases
_GELU_TANH = ("gelu_new", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class Linear:
    """A weight [rows, columns] and its bias (rows,) or None; [columns, rows] if `transposed`, as in GPT-2."""

    weight: Array
    bias: Array | None = None
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

    weight: Array
    bias: Array | None
    eps: float


@dataclass(frozen=True)
class LayerWeights:
    """One layer's weights. `first` are the linears over the first norm: query, key, value; in a `parallel` layer (GPT-J) also the
    feed-forward's first. In other layers the feed-forward has a norm of its own, and a gate if it is gated. `head_norms`, of Qwen3, are of
    each head of query and key, before they rotate."""

    norm: Norm
    first: Sequence[Linear]
    scale: float
    attention_out: Linear
    feed_out: Linear
    parallel: bool = False
    feed_norm: Norm | None = None
    feed_in: Linear | None = None
    gate: Linear | None = None
    head_norms: tuple[Norm, Norm] | None = None


@dataclass(frozen=True)
class DecoderWeights:
    """The weights of a model: token and position embeddings, layers, final norm, output head."""

    tokens: Array
    positions: Array | None
    layers: Sequence[LayerWeights]
    norm: Norm
    head: Linear
    rope: Rope | None


def unsupported(model: Architecture) -> str | None:
    """Why no compiled executor can run a model, or None."""
    if model.family not in _READERS:
        return f"model type {model.family!r}"
    if model.beyond is not None:
        return model.beyond
    if model.activation not in (_GELU_TANH if model.family in _GPTS else ("silu",)):
        return f"activation {model.activation!r}"
    if model.rope is None:
        return None
    if model.rope["rope_type"] not in STATIC_ROPE:
        return f"rope type {model.rope['rope_type']!r}"
    if model.rope["partial_rotary_factor"] != 1:
        return f"partial_rotary_factor {model.rope['partial_rotary_factor']}"
    if not 0 < model.rotary_dims <= model.head_dim or model.rotary_dims % 2:
        return f"rotary_dim {model.rotary_dims} of heads of {model.head_dim}"
    try:
        rope_tables(model.rope, model.rotary_dims, 1, False)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        return f"rope {dict(model.rope)}: {type(error).__name__} {error}"
    return None


def require_kernels(model: Architecture) -> None:
    """ModelError, with the way out, for a model that no compiled executor can run."""
    why = unsupported(model)
    if why:
        raise ModelError(f"executors fused and cuda_graph have no kernel for {why}; use executor: eager")


def read_decoder(model: Architecture, weights: Mapping[str, Array], max_length: int) -> DecoderWeights:
    """The weights by name, as in the model's file, in their places.

    ModelError for a model without kernels, and for a weight that is missing, of another shape, or not the model's.
    """
    require_kernels(model)
    named = _Named(weights)
    decoder = _READERS[model.family](model, named, max_length)
    named.require_all_taken()
    return decoder


def _read_llama(model: Architecture, named: "_Named", max_length: int) -> DecoderWeights:
    hidden, feed = model.hidden, model.feed
    width, kv_width, biased = model.heads * model.head_dim, model.kv_heads * model.head_dim, model.qkv_bias
    layers = [
        LayerWeights(
            norm=named.norm(f"{at}.input_layernorm", model),
            first=[
                named.linear(f"{at}.self_attn.{part}_proj", rows, hidden, biased)
                for part, rows in (("q", width), ("k", kv_width), ("v", kv_width))
            ],
            scale=model.scale(index),
            head_norms=_head_norms(f"{at}.self_attn", model, named),
            attention_out=named.linear(f"{at}.self_attn.o_proj", hidden, width, model.out_bias),
            feed_norm=named.norm(f"{at}.post_attention_layernorm", model),
            gate=named.linear(f"{at}.mlp.gate_proj", feed, hidden, model.feed_bias),
            feed_in=named.linear(f"{at}.mlp.up_proj", feed, hidden, model.feed_bias),
            feed_out=named.linear(f"{at}.mlp.down_proj", hidden, feed, model.feed_bias),
        )
        for index, at in enumerate(f"model.layers.{index}" for index in range(model.layers))
    ]
    assert model.rope is not None
    rope = rope_tables(model.rope, model.rotary_dims, max_length, interleaved=False)
    tokens = named.take("model.embed_tokens.weight", model.vocab, hidden)
    return DecoderWeights(tokens, None, layers, named.norm("model.norm", model), named.head(model), rope)


def _head_norms(at: str, model: Architecture, named: "_Named") -> tuple[Norm, Norm] | None:
    if not model.head_norms:
        return None
    query, key = (Norm(named.take(f"{at}.{part}_norm.weight", model.head_dim), None, model.eps) for part in "qk")
    return query, key


def _read_gptj(model: Architecture, named: "_Named", max_length: int) -> DecoderWeights:
    hidden = model.hidden
    layers = [
        LayerWeights(
            norm=named.norm(f"{at}.ln_1", model),
            first=[
                *(named.linear(f"{at}.attn.{part}_proj", hidden, hidden, False) for part in "qkv"),
                named.linear(f"{at}.mlp.fc_in", model.feed, hidden, True),
            ],
            scale=model.scale(index),
            attention_out=named.linear(f"{at}.attn.out_proj", hidden, hidden, False),
            feed_out=named.linear(f"{at}.mlp.fc_out", hidden, model.feed, True),
            parallel=True,
        )
        for index, at in enumerate(f"transformer.h.{index}" for index in range(model.layers))
    ]
    assert model.rope is not None
    rope = rope_tables(model.rope, model.rotary_dims, max_length, interleaved=True)
    tokens = named.take("transformer.wte.weight", model.vocab, hidden)
    return DecoderWeights(tokens, None, layers, named.norm("transformer.ln_f", model), named.head(model), rope)


def _read_gpt2(model: Architecture, named: "_Named", max_length: int) -> DecoderWeights:
    hidden = model.hidden
    layers = [
        LayerWeights(
            norm=named.norm(f"{at}.ln_1", model),
            first=[named.linear(f"{at}.attn.c_attn", 3 * hidden, hidden, True, transposed=True)],
            scale=model.scale(index),
            attention_out=named.linear(f"{at}.attn.c_proj", hidden, hidden, True, transposed=True),
            feed_norm=named.norm(f"{at}.ln_2", model),
            feed_in=named.linear(f"{at}.mlp.c_fc", model.feed, hidden, True, transposed=True),
            feed_out=named.linear(f"{at}.mlp.c_proj", hidden, model.feed, True, transposed=True),
        )
        for index, at in enumerate(f"transformer.h.{index}" for index in range(model.layers))
    ]
    tokens, positions = (named.take(f"transformer.{name}.weight", n, hidden) for name, n in (("wte", model.vocab), ("wpe", model.context)))
    return DecoderWeights(tokens, positions, layers, named.norm("transformer.ln_f", model), named.head(model), None)


_READERS: dict[str, Callable[[Architecture, "_Named", int], DecoderWeights]]
_READERS = {
    "llama": _read_llama,
    "mistral": _read_llama,
    "qwen2": _read_llama,
    "qwen3": _read_llama,
    "gptj": _read_gptj,
    "gpt2": _read_gpt2,
}
COMPILED = tuple(_READERS)


class _Named:
    """Weights by name. Each is checked as it is taken."""

    def __init__(self, weights: Mapping[str, Array]) -> None:
        self._weights, self._taken = weights, set[str]()

    def take(self, name: str, *shape: int) -> Array:
        if name not in self._weights:
            raise ModelError(f"weight {name!r} was not given")
        weight = self._weights[name]
        if tuple(weight.shape) != shape:
            raise ModelError(f"weight {name!r} has shape {tuple(weight.shape)}, the model wants {shape}")
        self._taken.add(name)
        return weight

    def linear(self, name: str, rows: int, columns: int, biased: bool, transposed: bool = False) -> Linear:
        weight = self.take(f"{name}.weight", *((columns, rows) if transposed else (rows, columns)))
        return Linear(weight, self.take(f"{name}.bias", rows) if biased else None, transposed)

    def norm(self, name: str, model: Architecture) -> Norm:
        bias = self.take(f"{name}.bias", model.hidden) if model.family in _GPTS else None
        return Norm(self.take(f"{name}.weight", model.hidden), bias, model.eps)

    def head(self, model: Architecture) -> Linear:
        weight, bias = head_names(model, self._weights)
        return Linear(self.take(weight, model.vocab, model.hidden), self.take(bias, model.vocab) if bias else None)

    def require_all_taken(self) -> None:
        unknown = sorted(self._weights.keys() - self._taken)
        if unknown:
            raise ModelError(f"weights {', '.join(unknown[:3])} do not belong to the model")
