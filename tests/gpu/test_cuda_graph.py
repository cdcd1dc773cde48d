"""The decode step's kernels and graphs against transformers: on a GPU as they are, on a CPU in Triton's interpreter, uncaptured."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from graph_models import DEVICE, GREEDY, HAS_GPU, KIN, LENGTH, SHAPES, VOCAB, model_of, pair_of

from semgap.engine.architecture import ModelError
from semgap.engine.cuda_graph import GraphExecutor
from semgap.engine.device_sampling import draw_on_device
from semgap.engine.executor import Executor
from semgap.engine.sampling import draw, uniform
from semgap.kv.blocks import KVCache
from semgap.kv.shadow import ShadowError
from semgap.policy import SamplingRule

PROMPT = (np.arange(9) * 17 + 5) % VOCAB


@pytest.fixture(scope="module", params=sorted(SHAPES))
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Executor, GraphExecutor]]:
    yield pair_of(request.param)


def _decoded(executor: Executor, cache: KVCache, steps: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens from PROMPT on, and the logits that they were drawn from."""
    rows = [executor.logits(executor.forward(PROMPT, cache))[-1].clone()]
    tokens = [int(rows[0].argmax())]
    for _ in range(steps):
        rows.append(executor.logits(executor.forward(np.array(tokens[-1:]), cache))[-1].clone())
        tokens.append(int(rows[-1].argmax()))
    return tokens, torch.stack(rows)


def test_steps_give_the_tokens_of_eager_and_its_logits_but_for_rounding(pair: tuple[Executor, GraphExecutor]) -> None:
    eager, graph = pair
    steps = 60 if HAS_GPU else 6
    (expected, theirs), (tokens, ours) = _decoded(eager, eager.new_cache(), steps), _decoded(graph, graph.new_cache(), steps)
    assert tokens == expected and len(set(tokens)) > 1
    assert (ours - theirs).abs().max() < 2e-4 * theirs.abs().max()


@pytest.mark.parametrize("family", KIN)
def test_the_kin_of_llama_gets_eagers_tokens(family: str) -> None:
    eager, graph = pair_of(family)
    (expected, theirs), (tokens, ours) = (_decoded(executor, executor.new_cache(), 2) for executor in (eager, graph))
    assert tokens == expected and (ours - theirs).abs().max() < 2e-4 * theirs.abs().max()


def test_keys_and_values_are_eagers_and_what_was_not_written_is_still_blank(pair: tuple[Executor, GraphExecutor]) -> None:
    caches = []
    for executor in pair:
        caches.append(executor.new_cache())
        _decoded(executor, caches[-1], 3)
    assert caches[0].filled == caches[1].filled == len(PROMPT) + 3
    assert torch.allclose(torch.as_tensor(caches[0].export()), torch.as_tensor(caches[1].export()), atol=1e-4)
    assert all(layer.held_slab[:, :, :, caches[1].filled :].isnan().all() for layer in caches[1].layers)


def test_a_window_draws_what_single_steps_draw(pair: tuple[Executor, GraphExecutor]) -> None:
    _, graph = pair
    expected, _ = _decoded(graph, graph.new_cache(), 5)
    cache = graph.new_cache()
    first = int(graph.logits(graph.forward(PROMPT, cache))[-1].argmax())
    drawn = list(graph.decode_window(first, cache, 5, seed=0, request=0))
    assert [first, *(step.token for step in drawn)] == expected
    assert all((step.gpu_ns is not None and step.gpu_ns > 0) is HAS_GPU for step in drawn)


def test_a_window_that_is_left_early_leaves_no_trace(pair: tuple[Executor, GraphExecutor]) -> None:
    _, graph = pair
    expected, _ = _decoded(graph, graph.new_cache(), 4)
    cache = graph.new_cache()
    graph.forward(PROMPT, cache)
    window = graph.decode_window(expected[0], cache, 30, seed=0, request=0)
    assert [next(window).token, next(window).token] == expected[1:3]
    window.close()
    assert cache.filled == len(PROMPT) + 2
    assert all(layer.held_slab[:, :, :, cache.filled :].isnan().all() for layer in cache.layers)
    assert next(graph.decode_window(expected[2], cache, 1, seed=0, request=0)).token == expected[3]


def test_two_handles_take_turns_over_the_same_graphs(pair: tuple[Executor, GraphExecutor]) -> None:
    _, graph = pair
    alone, _ = _decoded(graph, graph.new_cache(), 3)
    one, other = graph.new_cache(), graph.new_cache()
    graph.forward(PROMPT, one)
    graph.forward(PROMPT[::-1].copy(), other)
    tokens = alone[:1]
    for number in range(3):
        graph.forward(np.array([number]), other)
        tokens.append(int(graph.logits(graph.forward(np.array(tokens[-1:]), one))[-1].argmax()))
    assert tokens == alone


def test_a_step_layer_by_layer_is_bitwise_the_step_and_waits_for_each_layer(pair: tuple[Executor, GraphExecutor]) -> None:
    _, graph = pair
    whole, parts = graph.new_cache(), graph.new_cache()
    for cache in (whole, parts):
        graph.forward(PROMPT, cache)
    expected = graph.forward(np.array([3]), whole).clone()
    waited: list[int] = []
    parts.awaited = waited.append
    assert torch.equal(graph.forward(np.array([3]), parts), expected)
    assert waited == [0, 1] and torch.equal(whole.export(), parts.export())


def test_a_step_whose_blocks_do_not_come_can_be_taken_back(pair: tuple[Executor, GraphExecutor]) -> None:
    _, graph = pair
    cache = graph.new_cache()
    graph.forward(PROMPT, cache)

    def fail_at_1(layer: int) -> None:
        if layer == 1:
            raise ShadowError("gone", "no such block")

    cache.awaited = fail_at_1
    with pytest.raises(ShadowError):
        graph.forward(np.array([3]), cache)
    cache.awaited = None
    cache.truncate(len(PROMPT))
    assert all(layer.held_slab[:, :, :, len(PROMPT) :].isnan().all() for layer in cache.layers)


def test_a_window_stops_where_the_cache_is_full(pair: tuple[Executor, GraphExecutor]) -> None:
    _, graph = pair
    cache = graph.new_cache()
    graph.forward(np.arange(LENGTH - 2), cache)
    window = graph.decode_window(1, cache, 9, seed=0, request=0)
    assert len([next(window), next(window)]) == 2
    with pytest.raises(ValueError, match=f"{LENGTH} . 1 positions do not fit max_length {LENGTH}"):
        next(window)


def test_what_a_capture_leaves_in_torch_can_be_written_outside_inference_mode() -> None:
    """torch keeps tensors for the random numbers of all graphs, made by the first capture and written by every later one."""
    modes: list[bool] = []

    class Watched(GraphExecutor):
        def _begin(self) -> None:
            modes.append(torch.is_inference_mode_enabled())
            super()._begin()

    graph = Watched(model_of("llama"), LENGTH, GREEDY)
    assert modes and not any(modes)
    if HAS_GPU:
        place, other = torch.zeros(1, device=DEVICE), torch.cuda.CUDAGraph()
        place += 1  # loads the kernel
        with torch.cuda.graph(other):
            place += 1
        other.replay()
        assert int(place) == 2
    cache = graph.new_cache()
    graph.forward(PROMPT, cache)
    assert len(list(graph.decode_window(1, cache, 3, seed=0, request=0))) == 3


@pytest.mark.skipif(not HAS_GPU, reason="nothing is captured without a GPU")
def test_garbage_that_holds_graphs_does_not_end_a_capture() -> None:
    class Collecting(GraphExecutor):
        """Collects garbage in the midst of a capture, as Python itself may while it is allowed to."""

        def _run_layer(self, index: int) -> None:
            if gc.isenabled() and torch.cuda.is_current_stream_capturing():
                gc.collect()
            super()._run_layer(index)

    model = model_of("gpt2")
    for _ in range(2):
        graph = Collecting(model, LENGTH, GREEDY)
        cache = graph.new_cache()
        graph.forward(PROMPT, cache)
        assert len(list(graph.decode_window(1, cache, 3, seed=0, request=0))) == 3
        graph.itself = graph  # type: ignore[attr-defined]  # a cycle, which only a collection ends
    assert gc.isenabled()


def test_a_sampled_window_draws_what_the_client_would() -> None:
    rule = SamplingRule(kind="sample", temperature=0.7, top_k=40, top_p=0.9)
    _, graph = pair_of("llama", rule=rule)
    cache, alone = graph.new_cache(), graph.new_cache()
    for each in (cache, alone):
        graph.forward(PROMPT, each)
    token, expected = 7, []
    for _ in range(6):
        logits = graph.logits(graph.forward(np.array([token]), alone))[-1].float().cpu().numpy()
        token = draw(logits, rule, seed=5, request=2, position=alone.filled).token
        expected.append(token)
    assert [step.token for step in graph.decode_window(7, cache, 6, seed=5, request=2)] == expected


@pytest.mark.parametrize("top_k", [0, 9000])
@pytest.mark.parametrize("top_p", [1, 0.9])
def test_a_draw_over_a_real_vocabulary_can_be_captured(top_k: int, top_p: float) -> None:
    """50,400 logits in half precision, many of them equal: torch sorts so many by other kernels than the small models' here."""
    rule = SamplingRule(kind="sample", temperature=0.9, top_k=top_k, top_p=top_p)
    logits = (torch.randn(50_400, generator=torch.Generator().manual_seed(2)) * 3).to(DEVICE, torch.float16)
    place, drawn = torch.zeros(1, dtype=torch.float64, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)

    def run() -> None:
        drawn.copy_(draw_on_device(logits, rule, place))

    run()  # loads the kernels
    if HAS_GPU:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
    row = logits.float().cpu().numpy()
    for position in range(20):
        place.fill_(uniform(4, 1, position))
        graph.replay() if HAS_GPU else run()
        assert int(drawn) == draw(row, rule, 4, 1, position).token


def test_logits_without_a_distribution_end_the_window() -> None:
    model = model_of("llama")
    graph = GraphExecutor(model, LENGTH, SamplingRule(kind="sample", temperature=0.5))
    cache = graph.new_cache()
    graph.forward(PROMPT, cache)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="no distribution to sample from"):
        next(graph.decode_window(1, cache, 4, seed=0, request=0))
    assert cache.filled == len(PROMPT)
    assert all(layer.held_slab[:, :, :, len(PROMPT) :].isnan().all() for layer in cache.layers)


@pytest.mark.parametrize(("family", "dtype"), [("gptj", torch.float16), ("gptj", torch.bfloat16), ("qwen3", torch.bfloat16)])
def test_in_half_precision_logits_stay_within_the_stated_tolerance(family: str, dtype: torch.dtype) -> None:
    """Of the largest logit: 2^-6 in float16, 2^-4 in bfloat16 (docs/gpu.md), over steps that are fed the same tokens."""
    eager, graph = pair_of(family, dtype)
    caches = eager.new_cache(), graph.new_cache()
    rows = [[executor.logits(executor.forward(PROMPT, cache))[-1].float()] for executor, cache in zip((eager, graph), caches, strict=True)]
    for token in (3, 77, 20):
        for row, executor, cache in zip(rows, (eager, graph), caches, strict=True):
            row.append(executor.logits(executor.forward(np.array([token]), cache))[-1].float())
    theirs, ours = (torch.stack(row) for row in rows)
    assert (ours - theirs).abs().max() <= theirs.abs().max() * (2**-6 if dtype is torch.float16 else 2**-4)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("gptj", {"activation_function": "relu"}, "no kernel for activation 'relu'; use executor: eager"),
        ("llama", {"hidden_act": "gelu"}, "no kernel for activation 'gelu'; use executor: eager"),
        ("phi3", {"pad_token_id": 0}, "no kernel for model type 'phi3'; use executor: eager"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "no kernel for rope type 'dynamic'"),
    ],
)
def test_a_model_without_kernels_is_refused_with_the_way_out(family: str, change: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        GraphExecutor(model_of(family, **change), LENGTH)
