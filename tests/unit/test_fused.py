"""Executor `fused`: transformers' logits and tokens, and the same bits for a row in whatever pass it stands."""

from __future__ import annotations

import itertools
import math
import os
import platform
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from semgap import engine
from semgap.client.local_runtime import LocalRuntime
from semgap.client.runtime import Drawing
from semgap.engine import cpu_bandwidth, cpu_kernels, cpu_threads, kernel_cache
from semgap.engine.architecture import ModelError
from semgap.engine.cpu_threads import Team
from semgap.engine.decoder_weights import COMPILED
from semgap.engine.executor_choice import choose_executor, compiled_for, make_executor, preload
from semgap.engine.fused import FusedExecutor
from semgap.engine.model_files import ModelFiles, load_digest
from semgap.engine.weights import Weights
from semgap.experiment.fetch_model import fetch_model
from semgap.kv.blocks import KVCache
from semgap.policy import Policy, SamplingRule
from semgap.wire.messages import Kind

CPU = "cpu"
FAMILIES = ("llama", "gpt2", "gptj", "qwen3")  # the others run Llama's code
TOKENS = np.arange(60) * 37 % 512


def fused(directory: Path, max_length: int = 90, rule: SamplingRule | None = None, threads: int = 1) -> FusedExecutor:
    model = ModelFiles(directory, load_digest(directory))
    weights = Weights(model.specs(), CPU)
    weights.read_file(model.weights_file, [tensor.offset for tensor in model.digest.tensors])
    executor = make_executor("fused", model.config, weights, "float32", threads, max_length, rule)
    assert isinstance(executor, FusedExecutor)
    return executor


def rows_of(executor: FusedExecutor, cache: KVCache, tokens: np.ndarray) -> np.ndarray:
    rows: np.ndarray = executor.logits(executor.forward(tokens, cache))
    return rows


@pytest.mark.parametrize("family", COMPILED)
def test_prefill_and_steps_give_transformers_logits_and_tokens(model_of: Callable[[str], Path], family: str) -> None:
    """Within 1/10,000 of the logits' range, as the check of the real model demands."""
    executor, cache = fused(model_of(family)), None
    theirs = AutoModelForCausalLM.from_pretrained(model_of(family), dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = theirs(input_ids=torch.from_numpy(TOKENS)[None]).logits[0].numpy()
    cache = executor.new_cache()
    found = np.concatenate([rows_of(executor, cache, TOKENS[:50]), *(rows_of(executor, cache, TOKENS[i : i + 1]) for i in range(50, 60))])
    assert np.abs(found - expected).max() <= 1e-4 * (expected.max() - expected.min())
    assert np.array_equal(found.argmax(-1), expected.argmax(-1))


ODD: dict[str, dict[str, Any]] = {  # what a family's config may say beyond the tiny models of the other tests
    "llama": {"head_dim": 16, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 1},
    "llama linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "llama yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}},
    "mistral": {"head_dim": 24, "attention_bias": True, "mlp_bias": True, "rope_theta": 1e5},  # the biases are not the family's: not read
    "qwen2": {"attention_bias": False, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "qwen2 yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    "qwen3": {"head_dim": 24, "attention_bias": True, "num_key_value_heads": 1, "rms_norm_eps": 1e-3},
    "gpt2": {"n_inner": 96, "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False},
    "gptj": {"n_inner": 96, "scale_attn_weights": False, "rotary_dim": 16},
    "gptj tied": {"tie_word_embeddings": True, "rotary_dim": 16},
}


@pytest.mark.parametrize("name", ODD)
def test_configs_out_of_the_ordinary_give_transformers_logits(tmp_path: Path, name: str) -> None:
    family = name.partition(" ")[0]
    shape = {"vocab_size": 512, "initializer_range": 0.2}  # logits that differ, so that errors show
    if not family.startswith("gpt"):
        shape |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        shape |= {"max_position_embeddings": 128}
    else:
        shape |= {"n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4}
    fetch_model({"source": "random", "architecture": family, "config": shape | ODD[name], "seed": 5}, family, "float32", tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = theirs(input_ids=torch.from_numpy(TOKENS)[None]).logits[0].numpy()
    executor = fused(tmp_path)
    found = rows_of(executor, executor.new_cache(), TOKENS)
    assert np.abs(found - expected).max() <= 1e-5 * (expected.max() - expected.min())


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12))
def test_a_row_has_the_same_bits_in_passes_of_any_sizes(model_of: Callable[[str], Path], family: str, sizes: list[int]) -> None:
    executor = fused(model_of(family))
    edges = np.minimum(np.cumsum([0, *sizes]), len(TOKENS))
    pieces = [TOKENS[begin:end] for begin, end in zip(edges, [*edges[1:], len(TOKENS)], strict=True) if end > begin]
    cache = executor.new_cache()
    apart = np.concatenate([rows_of(executor, cache, piece) for piece in pieces])
    assert np.array_equal(apart, rows_of(executor, executor.new_cache(), TOKENS))


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_threads_change_no_bit(model_of: Callable[[str], Path], family: str, threads: int) -> None:
    found = []
    for executor in (fused(model_of(family)), fused(model_of(family), threads=threads)):
        cache = executor.new_cache()
        pieces = [TOKENS[:37], *(TOKENS[i : i + 1] for i in range(37, 57)), TOKENS[57:]]
        found.append(np.concatenate([rows_of(executor, cache, piece) for piece in pieces]))
    assert np.array_equal(*found)


@pytest.mark.parametrize("threads", [1, 2])
def test_local_computes_in_the_configs_threads(llama: Path, threads: int) -> None:
    begun, torchs = set(threading.enumerate()), torch.get_num_threads()
    model, policy = ModelFiles(llama, load_digest(llama)), Policy(placement="local")
    local = LocalRuntime(policy, model, Drawing(), threads=threads, max_length=32, device="cpu", setup={})
    torch.set_num_threads(torchs)
    local.prefill(TOKENS[:20], 0, Kind.SETUP)
    assert sum(thread.name.startswith("kernels") for thread in set(threading.enumerate()) - begun) == threads - 1


@given(count=st.integers(0, 2000), threads=st.integers(1, 70), unit=st.integers(1, 64))
@settings(max_examples=50, deadline=None)
def test_threads_share_all_work_once(count: int, threads: int, unit: int) -> None:
    memory = np.zeros(16, np.int64)
    shares = [cpu_threads.share(count, (thread, threads, memory), unit) for thread in range(threads)]
    assert [begin for begin, _ in shares] + [count] == [0] + [end for _, end in shares]
    assert all(begin % unit == 0 or begin == count for begin, _ in shares)
    assert max(end - begin for begin, end in shares) <= math.ceil(math.ceil(count / unit) / threads) * unit


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_thread_that_fails_ends_the_others_and_its_error_is_raised(failing: int) -> None:
    left: list[int] = []

    def work(own: tuple[int, int, np.ndarray]) -> None:
        if own[0] == failing:
            raise ArithmeticError(f"thread {failing}")
        cpu_threads.meet(own, 0)
        left.append(own[0])

    team = Team(3)
    for _ in range(2):
        left.clear()
        with pytest.raises(ArithmeticError, match=f"thread {failing}"):
            team.run(work)
        assert sorted(left) == [thread for thread in range(3) if thread != failing]


def test_a_fork_of_a_process_with_threads_starts_its_own() -> None:
    team = Team(2)
    team.run(lambda own: cpu_threads.meet(own, 0))
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        team.run(lambda own: cpu_threads.meet(own, 0))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("threads", [1, 2])
def test_the_bandwidth_is_of_the_memory_that_all_threads_read_together(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, sums = np.ones(100_000, np.float32), np.zeros(threads, np.float32)
    Team(threads).run(cpu_bandwidth._read, memory, sums)
    assert sums.sum() == memory.size
    clock = itertools.count(0, 2)
    monkeypatch.setattr(cpu_bandwidth.time, "perf_counter", lambda: next(clock))
    assert cpu_bandwidth.read_bandwidth(memory, threads) == memory.nbytes / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_draws_what_single_steps_draw(model_of: Callable[[str], Path], family: str) -> None:
    executor = fused(model_of(family), rule=SamplingRule("greedy"))
    one, other = executor.new_cache(), executor.new_cache()
    for cache in (one, other):
        executor.forward(TOKENS[:20], cache)
    drawn = [drawn.token for drawn in executor.decode_window(5, one, 12, 0, 0)]
    token, expected = 5, []
    for _ in range(12):
        token = int(rows_of(executor, other, np.array([token]))[0].argmax())
        expected.append(token)
    assert drawn == expected and one.filled == other.filled == 32


def test_a_layer_waits_for_its_own_blocks_alone(llama: Path) -> None:
    executor = fused(llama)
    whole, waiting = executor.new_cache(), executor.new_cache()
    for cache in (whole, waiting):
        executor.forward(TOKENS[:20], cache)
    order: list[int] = []

    def awaited(layer: int) -> None:
        order.append(layer)
        assert [waiting.layers[i].filled for i in range(3)] == [21] * layer + [20] * (3 - layer)

    waiting.awaited = awaited
    assert np.array_equal(rows_of(executor, waiting, TOKENS[20:21]), rows_of(executor, whole, TOKENS[20:21]))
    assert order == [0, 1, 2]


@given(rows=st.integers(1, 7), columns=st.integers(1, 130), count=st.integers(1, 40), offset=st.integers(0, 15), transposed=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_product_has_the_same_bits_for_every_alignment_and_number_of_rows(
    rows: int, columns: int, count: int, offset: int, transposed: bool
) -> None:
    generator = np.random.default_rng(rows * columns + count)
    memory = np.empty(rows * columns + 16, np.float32)
    weight = memory[offset : offset + rows * columns].reshape((columns, rows) if transposed else (rows, columns))
    weight[:] = generator.standard_normal(weight.shape, np.float32)
    bias, x = generator.standard_normal(rows, np.float32), generator.standard_normal((count, columns), np.float32)

    def product(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
        linear = np.array([weight.ctypes.data, rows, columns, bias.ctypes.data, transposed], np.int64)
        return cpu_kernels.project(linear, x)

    found = product(weight, x)
    assert np.allclose(found, x @ (weight if transposed else weight.T) + bias, atol=1e-4)
    assert np.array_equal(found, np.concatenate([product(weight.copy(), x[b : b + 1]) for b in range(count)]))


def test_the_kernels_name_the_machine_that_they_are_compiled_for() -> None:
    told = compiled_for("fused")
    assert told is not None and platform.machine() in told and f"by numba {numba.__version__}" in told
    assert compiled_for("eager") is compiled_for("cuda_graph") is None
    plain = subprocess.run(
        [sys.executable, "-c", "from semgap.engine.executor_choice import compiled_for; print(compiled_for('fused'))"],
        env=os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert ", generic, no vector instructions, by numba" in plain


def test_only_float32_on_a_cpu_with_known_kernels_is_taken() -> None:
    llama = {"model_type": "llama", "hidden_act": "silu"}
    assert choose_executor("auto", CPU, "float32", llama) == choose_executor("fused", CPU, "float32", llama) == ("fused", None)
    for dtype, device, config, reason in [
        ("bfloat16", CPU, llama, "float32 only, not in bfloat16"),
        ("float32", "cuda", llama, "it runs on a CPU, not on cuda"),
        ("float32", CPU, llama | {"hidden_act": "gelu"}, "no kernel for activation 'gelu'"),
        ("float32", CPU, llama | {"rope_parameters": {"rope_type": "dynamic"}}, "no kernel for rope type 'dynamic'"),
        ("float32", CPU, llama | {"rope_scaling": {"type": "dynamic"}}, "no kernel for rope type 'dynamic'"),
        ("float32", CPU, llama | {"rope_scaling": {"type": "linear"}}, "no kernel for rope .*KeyError 'factor'"),
        ("float32", CPU, llama | {"is_causal": False}, "no kernel for is_causal: false"),
        ("float32", CPU, llama | {"rope_scaling": {"type": "linear"}, "rope_parameters": {"rope_theta": 1e4}}, "beside rope_scaling"),
        (
            "float32",
            CPU,
            {"model_type": "qwen3", "rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "rope_parameters of each layer",
        ),
        ("float32", CPU, {"model_type": "granite"}, "no kernel for model type 'granite'"),
        ("float32", CPU, llama | {"original_max_position_embeddings": 64}, "outside of rope_parameters"),
        ("float32", CPU, {"model_type": "gpt2", "add_cross_attention": True}, "no kernel for add_cross_attention: true"),
        ("float32", CPU, llama | {"partial_rotary_factor": 0.5}, "no kernel for partial_rotary_factor 0.5"),
        ("float32", CPU, llama | {"hidden_act": "gelu_new"}, "no kernel for activation 'gelu_new'"),
        ("float32", CPU, {"model_type": "gpt2", "activation_function": "silu"}, "no kernel for activation 'silu'"),
        ("float32", CPU, {"model_type": "gptj", "n_embd": 64, "n_head": 4, "rotary_dim": 32}, "rotary_dim 32 of heads of 16"),
        ("float32", CPU, {"model_type": "gptj", "n_embd": 64, "n_head": 4, "rotary_dim": None}, "rotary_dim 0 of heads of 16"),
    ]:
        with pytest.raises(ValueError, match=f"executor fused cannot run this model: .*{reason}.*use executor: eager"):
            choose_executor("fused", device, dtype, config)
        if device == CPU:
            kind, why = choose_executor("auto", device, dtype, config)
            assert kind == "eager" and why and re.search(reason, why)


def test_a_kv_head_for_an_uneven_share_of_heads_is_refused(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 3}
    config = {"vocab_size": 512, "head_dim": 16, "max_position_embeddings": 64, **shape}
    fetch_model({"source": "random", "architecture": "llama", "config": config, "seed": 1}, "m", "float32", tmp_path)
    with pytest.raises(ModelError, match="4 heads do not divide into groups over 3 KV heads"):
        fused(tmp_path, 64)


@pytest.mark.parametrize("part", [0, 1])
def test_a_stale_key_or_value_shows_in_the_logits(llama: Path, part: int) -> None:
    executor = fused(llama)
    cache = executor.new_cache()
    executor.forward(TOKENS[:20], cache)
    cache.layers[1].held_slab[part, :, :, 3] = float("nan")
    assert np.isnan(rows_of(executor, cache, TOKENS[20:21])).all()


def test_a_numba_that_does_not_load_leaves_eager_and_a_worker_that_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cpu_kernels", "fused"):
        monkeypatch.setitem(sys.modules, f"semgap.engine.{name}", None)
        monkeypatch.delattr(engine, name)
    preload("cpu", "auto")
    kind, why = choose_executor("auto", CPU, "float32", {"model_type": "llama"})
    assert kind == "eager" and why and why.startswith("numba does not load")
    with pytest.raises(ValueError, match="executor fused cannot run this model: numba does not load"):
        choose_executor("fused", CPU, "float32", {"model_type": "llama"})


def test_a_kernel_cache_that_others_may_write_or_that_cannot_be_made_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMGAP_KERNEL_CACHE", str(tmp_path / "kernels"))
    assert kernel_cache.is_usable()
    (tmp_path / "kernels").chmod(0o777)
    assert not kernel_cache.is_usable()
    monkeypatch.setenv("SEMGAP_KERNEL_CACHE", "/dev/full/kernels")
    assert not kernel_cache.is_usable()


def test_an_edit_of_any_file_of_kernels_compiles_all_of_them_anew(tmp_path: Path) -> None:
    layer, vectors = tmp_path / "cpu_layer.py", tmp_path / "cpu_vectors.py"
    for file in (layer, vectors):
        file.write_text("one = 1\n")
    before = kernel_cache.ContentLocator(layer).get_source_stamp()
    assert kernel_cache.ContentLocator(vectors).get_source_stamp() == before
    vectors.write_text("one = 2\n")
    assert kernel_cache.ContentLocator(layer).get_source_stamp() != before
