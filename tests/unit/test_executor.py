"""The executor: prefill and decode over a cache, and what it refuses before anything is appended."""

from __future__ import annotations

import json
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from semgap import doctor
from semgap.engine.architecture import ModelError
from semgap.engine.device import choose_device
from semgap.engine.eager import EagerExecutor
from semgap.engine.executor_choice import check_executor, choose_executor
from semgap.engine.model import build_model
from semgap.engine.model_files import ModelFiles, load_digest
from semgap.engine.output_head import load_head
from semgap.engine.weights import Weights
from semgap.tensors import DType
from semgap.wire.messages import WeightSpec

CPU, CUDA = "cpu", "cuda"


def _executor(directory: Path, max_length: int) -> EagerExecutor:
    digest = load_digest(directory)
    weights = Weights([WeightSpec(t.name, DType.from_torch_name(t.dtype), t.shape) for t in digest.tensors], CPU)
    weights.read_file(directory / digest.file, [tensor.offset for tensor in digest.tensors])
    return EagerExecutor(build_model(json.loads((directory / "config.json").read_text()), weights, "float32"), max_length)


@pytest.fixture(scope="module")
def executor(llama: Path) -> Iterator[EagerExecutor]:
    yield _executor(llama, 16)


def test_a_step_gives_one_row_of_logits_a_token_and_fills_the_cache(executor: EagerExecutor) -> None:
    cache = executor.new_cache()
    assert executor.logits(executor.forward(np.array([1, 2, 3]), cache)).shape == (3, 512)
    assert executor.logits(executor.forward(np.array([4]), cache)).shape == (1, 512)
    assert cache.filled == 4


def test_decoding_step_by_step_follows_the_whole_prefill(executor: EagerExecutor) -> None:
    tokens = np.array([5, 99, 510, 7, 0, 33])
    whole = executor.logits(executor.forward(tokens, executor.new_cache()))
    cache = executor.new_cache()
    rows = [executor.logits(executor.forward(tokens[i : i + 1], cache))[0] for i in range(len(tokens))]
    assert torch.allclose(torch.stack(rows), whole, atol=1e-5)


def test_two_caches_do_not_disturb_each_other(executor: EagerExecutor) -> None:
    alone = executor.new_cache()
    expected = [executor.forward(np.array([token]), alone).clone() for token in (1, 2, 3)]
    one, other = executor.new_cache(), executor.new_cache()
    for number, token in enumerate((1, 2, 3)):
        executor.forward(np.array([500 - token]), other)
        assert torch.equal(executor.forward(np.array([token]), one), expected[number])


@pytest.mark.parametrize("tokens", [[], [-1], [512], [3, 1 << 40]])
def test_a_token_outside_the_vocabulary_is_refused_and_nothing_appended(executor: EagerExecutor, tokens: list[int]) -> None:
    cache = executor.new_cache()
    with pytest.raises(ValueError, match=r"1 or more ids in 0\.\.511"):
        executor.forward(np.array(tokens, dtype=np.int64), cache)
    assert cache.filled == 0


def test_more_positions_than_max_length_are_refused_and_nothing_appended(executor: EagerExecutor) -> None:
    cache = executor.new_cache()
    executor.forward(np.arange(16), cache)
    with pytest.raises(ValueError, match=r"16 \+ 1 positions do not fit max_length 16"):
        executor.forward(np.array([1]), cache)
    assert cache.filled == 16


def test_a_max_length_beyond_the_models_context_is_refused_with_both_numbers(llama: Path) -> None:
    assert _executor(llama, 128).kv_shape.max_length == 128
    with pytest.raises(ModelError, match="max_length 129 is more than the model's context of 128"):
        _executor(llama, 129)


def test_a_device_that_is_not_here_is_refused_with_the_way_out() -> None:
    assert choose_device("cpu") == "cpu"
    if not torch.cuda.is_available():
        assert choose_device("auto") == "cpu"
        with pytest.raises(ValueError, match=r"which this machine lacks: torch \S+, CUDA .*: .+; use device: cpu"):
            choose_device("cuda")


def test_a_gpu_takes_graphs_and_a_cpu_does_not() -> None:
    assert choose_executor("auto", CUDA, "float16", None) == choose_executor("cuda_graph", CUDA, "float16", None) == ("cuda_graph", None)
    assert choose_executor("eager", CUDA, "float16", None) == ("eager", None)
    assert choose_executor("auto", CPU, "float32", {"model_type": "llama"}) == ("fused", None)
    assert choose_executor("auto", CPU, "bfloat16", None) == ("eager", "it computes in float32 only, not in bfloat16")


@pytest.mark.parametrize(
    ("name", "message"), [("cuda_graph", "it needs CUDA; use executor: eager"), ("graph", "use one of auto, fused, eager, cuda_graph")]
)
def test_an_executor_that_cannot_be_had_is_refused_with_the_way_out(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_executor(name, CPU, "float32", None)


def _offered(directory: Path, change: str = "") -> tuple[dict[str, Any], Weights]:
    """A model's config, and its weights before they arrive; `change` is added to the name of the last one."""
    model = ModelFiles(directory, load_digest(directory))
    *specs, last = model.specs()
    return model.config, Weights([*specs, WeightSpec(last.name + change, last.dtype, last.shape)], CPU)


@pytest.mark.parametrize("kind", ["cuda_graph", "fused", "eager"])
def test_an_executor_that_an_engine_makes_on_its_device_is_checked_over_host_memory(kind: str, model_of: Callable[[str], Path]) -> None:
    config, weights = _offered(model_of("llama"))
    check_executor(kind, config, weights, "float32", 1, 64)
    with pytest.raises(ModelError, match="max_length 129 is more than the model's context of 128 positions"):
        check_executor(kind, config, weights, "float32", 1, 129)
    config, weights = _offered(model_of("llama"), ".twice")
    with pytest.raises(ModelError, match=r"do not belong to the model|was not given"):
        check_executor(kind, config, weights, "float32", 1, 64)


def test_a_model_without_kernels_is_refused_before_an_engine_begins(model_of: Callable[[str], Path]) -> None:
    config, weights = _offered(model_of("olmo2"))
    check_executor("eager", config, weights, "float32", 1, 64)
    with pytest.raises(ModelError, match="no kernel for model type 'olmo2'; use executor: eager"):
        check_executor("cuda_graph", config, weights, "float32", 1, 64)


LLAMA = {"model_type": "llama"}


@pytest.mark.parametrize("lacking", ["compiler", "headers", "linker", "CC"])
def test_without_what_triton_builds_launchers_with_auto_takes_eager_and_cuda_graph_is_refused(
    lacking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    assert choose_executor("auto", CUDA, "float16", LLAMA) == ("cuda_graph", None)
    if lacking == "compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
        expected = "no gcc or clang in PATH, and CC is not set; install gcc"
    elif lacking == "headers":
        monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
        expected = rf"{tmp_path}/Python.h is missing; install them \(Debian: python3\.\d+-dev\)"
    elif lacking == "linker":
        broken = tmp_path / "cc"
        broken.write_text("#!/bin/sh\necho cannot find ld >&2\nexit 1\n")
        broken.chmod(0o755)
        monkeypatch.setenv("CC", str(broken))
        expected = f"{broken} says 'cannot find ld'; repair it, or set CC to another"
    else:
        monkeypatch.setenv("CC", "no-such-cc")
        expected = "CC is 'no-such-cc', which is no command here; set CC to one, or unset it"
    kind, why = choose_executor("auto", CUDA, "float16", LLAMA)
    assert kind == "eager" and re.search(expected, why or "")
    with pytest.raises(ValueError, match=f"executor cuda_graph cannot run on cuda: .*{expected}; use executor: eager"):
        choose_executor("cuda_graph", CUDA, "float16", LLAMA)


def test_doctor_says_which_executor_this_machine_has_and_why() -> None:
    (found,) = [finding for finding in doctor.examine(Path()) if finding.thing == "executor cuda_graph"]
    assert found.state == ("ok" if torch.cuda.is_available() else "lacks")
    assert found.meaning.endswith("executor: auto is this" if torch.cuda.is_available() else "it needs CUDA; executor: auto is another")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
def test_the_last_row_of_logits_is_bitwise_the_same_asked_for_alone_or_with_all(model_of: Callable[[str], Path], family: str) -> None:
    executor = _executor(model_of(family), 32)
    hidden = executor.forward(np.arange(20), executor.new_cache())
    rows, last = executor.logits(hidden), executor.logits(hidden[-1:])
    assert torch.equal(rows[-1], last[0])
    assert torch.allclose(rows, executor.head(hidden), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
def test_hidden_states_and_head_are_the_models_own_logits(model_of: Callable[[str], Path], family: str) -> None:
    executor = _executor(model_of(family), 32)
    tokens = np.arange(20)
    with torch.inference_mode():
        whole = executor.model(input_ids=torch.from_numpy(tokens)[None]).logits[0]
    assert torch.equal(executor.logits(executor.forward(tokens, executor.new_cache()))[:-1], whole[:-1])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
def test_a_head_loaded_by_itself_gives_bitwise_the_executors_logits(model_of: Callable[[str], Path], family: str) -> None:
    executor, model = _executor(model_of(family), 32), ModelFiles(model_of(family), load_digest(model_of(family)))
    hidden = executor.forward(np.arange(20), executor.new_cache())[-1:]
    assert torch.equal(load_head(model)(hidden), executor.logits(hidden))
