"""Every family of models: `eager` is transformers' own `generate`, and configs that no executor computes are refused by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from executors import alone, executor_of, pool_of
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from semgap.engine.architecture import FAMILIES, ModelError, architecture_of
from semgap.engine.batch import Run
from semgap.engine.decoder_weights import COMPILED
from semgap.engine.eager import EagerExecutor
from semgap.engine.eager_batch import require_packable
from semgap.engine.executor_choice import choose_executor, make_executor
from semgap.engine.model_files import ModelFiles, load_digest
from semgap.engine.output_head import load_head
from semgap.engine.weights import Weights
from semgap.experiment.config import read_config
from semgap.experiment.fetch_model import SourceError, fetch_model

ROOT = Path(__file__).resolve().parents[2]
KIN = tuple(family for family in FAMILIES if family not in ("llama", "gptj", "gpt2"))  # other tests run these three
PROMPT = np.arange(40) * 37 % 512
STEPS = 8


def test_the_families_of_each_executor() -> None:
    assert set(FAMILIES) == {"llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "smollm3", "gpt2", "gptj", "gpt_neox", "granite"}
    assert set(COMPILED) == {"llama", "mistral", "qwen2", "qwen3", "gpt2", "gptj"}
    for family in FAMILIES:
        for device, compiled in (("cpu", "fused"), ("cuda", "cuda_graph")):
            executor, why = choose_executor("auto", device, "float32", {"model_type": family})
            known = family in COMPILED
            assert (executor, why) == ((compiled, None) if known else ("eager", f"it has no kernel for model type {family!r}"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_eager_gives_bitwise_the_logits_and_tokens_of_generate(model_of: Callable[..., Path], family: str, dtype: str) -> None:
    directory = model_of(family, dtype)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    for weight in theirs.parameters():
        weight.data = weight.data.clone()  # where it lies in the file, unaligned, products have other last bits
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(
        torch.from_numpy(PROMPT)[None], max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    executor = executor_of("eager", directory, dtype=dtype)
    assert isinstance(executor, EagerExecutor)
    assert all(torch.equal(ours, buffer) for (_, ours), buffer in zip(executor.model.named_buffers(), theirs.buffers(), strict=True))
    cache, tokens, rows = executor.new_cache(), PROMPT, []
    for _ in range(STEPS):
        rows.append(executor.logits(executor.forward(tokens, cache))[-1])
        tokens = np.array([int(rows[-1].argmax())])
    assert [int(row.argmax()) for row in rows] == expected.sequences[0, len(PROMPT) :].tolist()
    assert torch.equal(torch.stack(rows).float(), torch.cat(expected.logits).float())


@pytest.mark.parametrize("family", KIN)
def test_requests_of_a_pass_get_their_own_hidden_states(model_of: Callable[..., Path], family: str) -> None:
    """Bitwise with fused, within rounding with eager: chunks of two requests, whose blocks lie in no order."""
    for kind in ("eager", "fused") if family in COMPILED else ("eager",):
        executor = executor_of(kind, model_of(family))
        requests = [(PROMPT, [3, 0]), (np.arange(80) * 11 % 512, [2, 4])]
        expected, pool = [alone(executor, tokens) for tokens, _ in requests], pool_of(executor, 5)
        for begin, end in ((0, 20), (20, 39), (39, 40)):
            runs = [Run(tokens[part], part.start, blocks, True) for tokens, blocks in requests for part in [slice(begin, end)]]
            found = np.asarray(executor.forward_batch(runs, pool))
            for row, hidden in zip(found, expected, strict=True):
                assert np.array_equal(row, hidden[end - 1]) if kind == "fused" else np.abs(row - hidden[end - 1]).max() < 1e-5


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def test_the_length_of_its_window_is_the_longest_text_over_which_a_layer_attends_to_all() -> None:
    logits = {}
    for window in (40, None):
        config = AutoConfig.for_model("mistral", vocab_size=512, sliding_window=window, **SMALL)
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        with torch.inference_mode():
            logits[window] = model(input_ids=torch.arange(41)[None]).logits[0]
    assert torch.allclose(logits[40][:40], logits[None][:40], atol=1e-6) and not torch.allclose(logits[40][40], logits[None][40], atol=1e-5)


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
SLIDING = {"use_sliding_window": True, "sliding_window": 64}


@pytest.mark.parametrize(
    ("config", "positions", "why"),
    [
        ({"model_type": "mistral"}, 4096, "sliding window"),  # the family's default
        ({"model_type": "mistral", "sliding_window": 64}, 64, "sliding window"),
        ({"model_type": "mistral", "sliding_window": None}, None, ""),
        ({"model_type": "qwen2", "sliding_window": 64}, None, ""),
        ({"model_type": "qwen2", "max_window_layers": 1} | SLIDING, 64, "sliding window"),
        ({"model_type": "qwen2", "max_window_layers": 32} | SLIDING, None, ""),  # no layer has it
        ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]} | SLIDING, 64, "sliding window"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"], "max_window_layers": 0} | SLIDING, None, ""),
        ({"model_type": "smollm3"} | SLIDING, 64, "sliding window"),
        ({"model_type": "phi3", "sliding_window": 2047}, 2047, "sliding window"),
        ({"model_type": "phi3", "max_position_embeddings": 131072, "rope_scaling": LONGROPE}, 4096, "longrope"),
        ({"model_type": "phi3", "max_position_embeddings": 131072, "rope_scaling": LONGROPE, "sliding_window": 64}, 64, "sliding window"),
        ({"model_type": "phi3"}, None, ""),
    ],
)
def test_a_text_beyond_a_window_or_a_rotation_is_refused_by_its_name(config: dict[str, Any], positions: int | None, why: str) -> None:
    model = architecture_of(config)
    model.require_length(positions or model.context)
    if positions:
        with pytest.raises(ModelError, match=f"max_length {positions + 1} is more than .* {positions} positions beyond which .*{why}"):
            model.require_length(positions + 1)


def test_a_model_that_looks_ahead_runs_no_batch() -> None:
    require_packable(architecture_of({"model_type": "qwen3"}))
    with pytest.raises(ModelError, match="is_causal: false lets rows see later ones"):
        require_packable(architecture_of({"model_type": "qwen3", "is_causal": False}))


@pytest.mark.parametrize("executor", ["eager", "fused"])
def test_no_executor_is_made_for_longer_texts_than_a_models_window(model_of: Callable[..., Path], executor: str) -> None:
    model = ModelFiles(model_of("mistral"), load_digest(model_of("mistral")))
    with pytest.raises(ModelError, match="max_length 101 is more than the model's 100 positions beyond which its layers attend within"):
        make_executor(executor, model.config, Weights(model.specs(), "cpu"), "float32", 1, 101)


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"model_type": "mixtral", "num_local_experts": 8},
        r"'mixtral' is not supported: .* experts \(num_local_experts 8\); use an unquantised",
    ),
    ({"model_type": "qwen3_moe", "num_experts": 128}, r"'qwen3_moe' is not supported: .* experts \(num_experts 128\)"),
    ({"model_type": "gemma3_text", "sliding_window": 512}, r"'gemma3_text' is not supported: .* sliding windows \(sliding_window 512\)"),
    ({"model_type": "qwen2", "quantization_config": {"bits": 4}}, r"'qwen2' is not supported: its weights are quantised"),
    ({"model_type": "mamba"}, "'mamba' is not supported; use an unquantised model of llama, mistral, qwen2, qwen3, phi3"),
    ({"model_type": "qwen3", "layer_types": ["sliding_attention"]}, "layers of type 'sliding_attention' without a window's size"),
    (
        {"model_type": "smollm3", "layer_types": ["full_attention", "linear_attention"]},
        "layers of type 'linear_attention' are not supported",
    ),
    (
        {"model_type": "phi3", "rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": "all"}},
        "no number of positions",
    ),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_what_no_executor_computes_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        architecture_of(config)


def test_a_directory_of_another_family_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", "num_local_experts": 8}))
    with pytest.raises(SourceError, match="'mixtral' is not supported: its feed-forward layers choose among experts"):
        fetch_model({"source": "path", "path": str(tmp_path)}, "m", "float32", tmp_path / "fetched")


def test_a_random_model_of_another_family_is_refused_with_the_families_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="architecture 'mixtral' is not one of llama, mistral"):
        fetch_model({"source": "random", "architecture": "mixtral", "config": {}, "seed": 1}, "m", "float32", tmp_path)


def test_the_config_takes_every_family_as_a_random_model() -> None:
    (listed,) = re.findall(r"architecture: \{enum: \[(.*?)\]", (ROOT / "workflow/schemas/config.schema.yaml").read_text())
    assert set(listed.split(", ")) == set(FAMILIES)


def test_a_file_with_either_name_of_gpt_neoxs_head_is_the_model(model_of: Callable[..., Path], tmp_path: Path) -> None:
    """Files of the hub have embed_out.weight, which transformers computes with as lm_head.weight and writes back."""
    shutil.copytree(model_of("gpt_neox"), tmp_path / "hub")
    weights = load_file(tmp_path / "hub/model.safetensors")
    weights["embed_out.weight"] = weights.pop("lm_head.weight")
    save_file(weights, tmp_path / "hub/model.safetensors", {"format": "pt"})
    fetch_model({"source": "path", "path": str(tmp_path / "hub")}, "m", "float32", tmp_path)
    names = {tensor.name for tensor in load_digest(tmp_path).tensors}
    assert "embed_out.weight" in names and "lm_head.weight" not in names
    heads, rows = [], []
    for directory in (model_of("gpt_neox"), tmp_path):
        executor = executor_of("eager", directory)
        rows.append(executor.logits(executor.forward(PROMPT, executor.new_cache())))
        heads.append(load_head(ModelFiles(directory, load_digest(directory))).weight)
    assert torch.equal(*rows) and torch.equal(*heads)


@pytest.mark.parametrize(("name", "parameters"), [("qwen3-0.6b-random", 596_049_920), ("qwen3-8b-random", 8_190_735_360)])
def test_the_presets_random_models_are_as_large_as_qwen3(name: str, parameters: int) -> None:
    config = read_config([ROOT / "config/qwen3.yaml"], ROOT)["define"]["models"][name]["config"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **config))
    assert sum(weight.numel() for weight in model.parameters()) == parameters
    assert architecture_of(model.config.to_dict()).kv_shape(256).heads == 8 and model.config.rope_parameters["rope_theta"] == 1e6


def test_the_table_of_families_says_which_executor_takes_which() -> None:
    rows = re.findall(r"^\| `(\w+)`: .* \| yes \| (yes|no) \| (yes|no) \|$", (ROOT / "config/README.md").read_text(), re.MULTILINE)
    assert {family: (fused, graph) for family, fused, graph in rows} == {
        family: ("yes", "yes") if family in COMPILED else ("no", "no") for family in FAMILIES
    }
