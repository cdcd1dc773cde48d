"""Tiny models for executors `eager` and `cuda_graph`: on a GPU as they are, on a CPU in Triton's interpreter."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from semgap.engine import kernels
from semgap.engine.cuda_graph import GraphExecutor
from semgap.engine.eager import EagerExecutor
from semgap.engine.executor import Executor
from semgap.policy import SamplingRule

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    kernels.TILES = dict.fromkeys(kernels.TILES, kernels.Tile(64, 64, 4))  # fewer programs: each takes the interpreter a millisecond
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
VOCAB, LENGTH = 131, 80
SHAPES = {
    "gptj": {"n_positions": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "gpt2": {"n_positions": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "scale_attn_by_inverse_layer_idx": True},
    "llama": {
        "max_position_embeddings": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
}
KIN: dict[str, dict[str, object]] = {"mistral": {}, "qwen2": {}, "qwen3": {"head_dim": 24, "attention_bias": False}}  # of Llama
GREEDY = SamplingRule()


def model_of(family: str, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    """A random model whose biases and norms are random too, at a scale where its logits differ."""
    torch.manual_seed(11)
    config = AutoConfig.for_model(family, vocab_size=VOCAB, **SHAPES.get(family, SHAPES["llama"]) | KIN.get(family, {}) | changes)
    attention = "eager" if family == "gptj" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if "ln" in name or "norm" in name else 0.0))
    return model.to(DEVICE, dtype).eval()


def pair_of(family: str, dtype: torch.dtype = torch.float32, rule: SamplingRule = GREEDY) -> tuple[Executor, GraphExecutor]:
    model = model_of(family, dtype)
    return EagerExecutor(model, LENGTH, rule), GraphExecutor(model, LENGTH, rule)
