"""A causal LM over weight memory that is allocated before its bytes arrive, from a file or from the wire."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from semgap.engine.architecture import HEADS, ModelError, architecture_of
from semgap.engine.build_limits import build_limits
from semgap.engine.weights import Weights


def build_model(config: dict, weights: Weights, dtype_name: str) -> PreTrainedModel:
    """A model of a Hugging Face `config` whose parameters are views of `weights`. Never runs remote code.

    ModelError for an unsupported family, or if names, shapes or dtypes of the weights are not the model's.
    """
    architecture, dtype = architecture_of(config), getattr(torch, dtype_name)
    try:
        with build_limits(), torch.device("meta"):
            parsed = AutoConfig.for_model(**config)
            attention = "eager" if architecture.family == "gptj" else "sdpa"  # transformers' GPT-J knows no other
            model = AutoModelForCausalLM.from_config(parsed, dtype=dtype, attn_implementation=attention, trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:  # a client may send any config, and the libraries raise anything
        raise ModelError(f"the model's config is not a {architecture.family} config: {error}") from error
    _bind(model, weights, dtype, architecture.tied)
    _compute_buffers(model, weights.device)
    return model.eval()


def _compute_buffers(model: PreTrainedModel, device: str) -> None:
    """Computes the tables that a model derives from its config (rotary embedding, causal masks), as `from_pretrained` does.

    The model is built on the meta device under its own dtype. There a float16 GPT-J computes its rotary frequencies in float16, and the
    sine of position 2047 is off by 0.76. transformers' own initialisation computes them in float32 and leaves bound weights alone.
    """
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=device))
    model.initialize_weights()


def _bind(model: PreTrainedModel, weights: Weights, dtype: torch.dtype, tied: bool) -> None:
    expected = model.state_dict()
    head = next((name for name in HEADS if name in expected), None)
    given = {head if head and name in HEADS else name: tensor for name, tensor in weights.tensors().items()}
    unknown = sorted(given.keys() - expected.keys())
    if unknown:
        raise ModelError(f"weights {', '.join(unknown[:3])} do not belong to the model")
    for name, tensor in given.items():
        if tensor.shape != expected[name].shape or tensor.dtype != dtype:
            raise ModelError(
                f"weight {name!r} is {tensor.dtype} {tuple(tensor.shape)}, the model wants {dtype} {tuple(expected[name].shape)}"
            )
    model.load_state_dict(given, strict=False, assign=True)
    if tied and head not in given:  # a head of its own stays, as with from_pretrained
        model.get_output_embeddings().weight = model.get_input_embeddings().weight  # model.tie_weights() would copy GPT-J's bias
    bound = {tensor.data_ptr() for tensor in given.values()}
    unbound = [name for name, parameter in model.named_parameters() if parameter.data_ptr() not in bound]
    if unbound:
        raise ModelError(f"weights {', '.join(unbound[:3])} were not given")
