"""A pass over many requests: bitwise each request's own passes with executor `fused`, its tokens with `eager`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from executors import MAX_LENGTH, alone, executor_of, pool_of
from hypothesis import given, settings
from hypothesis import strategies as st

from semgap.engine.architecture import ModelError
from semgap.engine.batch import Run
from semgap.engine.executor import Executor
from semgap.experiment.fetch_model import fetch_model
from semgap.kv.block_pool import BlockPool
from semgap.kv.gpu_block_pool import GpuBlockPool
from semgap.kv.pool import BLOCK, KVShape
from semgap.tensors import DType

FAMILIES = ("llama", "gpt2", "gptj")
PREFIX = np.arange(BLOCK) * 31 % 512
LENGTHS = (70, 3, 96, 64, 1, 65, 80, 17, 90)


class Requests:
    """Requests over one pool, whose blocks lie in no order; requests of `shared` numbers hold the prefix's block in common."""

    def __init__(self, executor: Executor, lengths: tuple[int, ...], shared: frozenset[int] = frozenset()) -> None:
        self.executor = executor
        self.pool = pool_of(executor, 1 + 2 * len(lengths))
        own = np.random.default_rng(len(lengths)).permutation(np.arange(1, self.pool.blocks))
        self.blocks = [[0 if i in shared else int(own[2 * i]), int(own[2 * i + 1])] for i in range(len(lengths))]
        self.tokens = [np.arange(length) * (37 + 2 * i) % 512 for i, length in enumerate(lengths)]
        for i in shared:
            self.tokens[i][:BLOCK] = PREFIX
        self.filled = [BLOCK if i in shared else 0 for i in range(len(lengths))]
        if shared:
            executor.forward_batch([Run(PREFIX, 0, [0], False)], self.pool)

    def step(self, fed: dict[int, int]) -> dict[int, np.ndarray]:
        """Feeds so many of its next tokens to each request, in one pass: the hidden state of each one's last."""
        runs = []
        for i, count in fed.items():
            begin = self.filled[i]
            runs.append(Run(self.tokens[i][begin : begin + count], begin, self.blocks[i], True))
            self.filled[i] = runs[-1].end
        hidden = np.asarray(self.executor.forward_batch(runs, self.pool))
        return dict(zip(fed, hidden, strict=True))

    def left(self, i: int) -> int:
        return len(self.tokens[i]) - self.filled[i]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_over_many_requests_gives_each_the_bits_of_its_own(model_of: Callable[[str], Path], family: str, threads: int) -> None:
    executor = executor_of("fused", model_of(family), threads)
    requests = Requests(executor, LENGTHS * 3)
    found = requests.step({i: len(tokens) for i, tokens in enumerate(requests.tokens)})
    for i, tokens in enumerate(requests.tokens):
        assert np.array_equal(found[i], alone(executor, tokens)[-1]), i


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(data=st.data(), threads=st.sampled_from([1, 2]))
def test_chunks_beside_steps_over_shared_prefixes_change_no_bit(
    model_of: Callable[[str], Path], family: str, data: st.DataObject, threads: int
) -> None:
    executor = executor_of("fused", model_of(family), threads)
    shared = frozenset(data.draw(st.sets(st.sampled_from([0, 2, 5, 6, 8]))))
    requests = Requests(executor, LENGTHS, shared)
    expected = [alone(executor, tokens) for tokens in requests.tokens]
    while True:
        open_ = [i for i in range(len(LENGTHS)) if requests.left(i)]
        if not open_:
            return
        chosen = data.draw(st.permutations(open_).flatmap(lambda order: st.integers(1, len(order)).map(lambda count: order[:count])))
        fed = {i: data.draw(st.integers(min(20, requests.left(i)), requests.left(i))) for i in chosen}
        for i, row in requests.step(fed).items():
            assert np.array_equal(row, expected[i][requests.filled[i] - 1]), (i, fed)


@pytest.mark.parametrize("threads", [1, 2])
def test_many_steps_that_see_one_block_give_each_the_bits_of_its_own(llama: Path, threads: int) -> None:
    """More rows than a tile has; the middle one does not share."""
    executor = executor_of("fused", llama, threads)
    requests = Requests(executor, (67,) * 40, frozenset(range(40)) - {20})
    requests.step({20: BLOCK})
    for _ in range(BLOCK, 67):
        found = requests.step(dict.fromkeys(range(40), 1))
    for i, tokens in enumerate(requests.tokens):
        assert np.array_equal(found[i], alone(executor, tokens)[-1]), i


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_gives_each_request_of_a_pass_its_own_logits_and_tokens(model_of: Callable[[str], Path], family: str) -> None:
    executor = executor_of("eager", model_of(family))
    requests = Requests(executor, LENGTHS, frozenset([0, 2, 5]))
    expected = [np.asarray(executor.logits(executor.forward(tokens, executor.new_cache()))) for tokens in requests.tokens]
    scale = max(np.ptp(rows) for rows in expected)
    while open_ := [i for i in range(len(LENGTHS)) if requests.left(i)]:
        found = requests.step({i: min(requests.left(i), 1 + 7 * (i % 3)) for i in open_})
        for i, hidden in found.items():
            logits, wanted = np.asarray(executor.logits(torch.from_numpy(hidden)[None]))[0], expected[i][requests.filled[i] - 1]
            assert np.abs(logits - wanted).max() <= 1e-4 * scale
            assert logits.argmax() == wanted.argmax()


@pytest.mark.parametrize("family", FAMILIES)
def test_after_a_batch_eager_runs_single_requests_as_before(model_of: Callable[[str], Path], family: str) -> None:
    executor = executor_of("eager", model_of(family))
    before = alone(executor, PREFIX)
    Requests(executor, (5, 9)).step({0: 5, 1: 9})
    assert np.array_equal(alone(executor, PREFIX), before)


@pytest.mark.parametrize("kind", ["fused", "eager"])
def test_only_the_last_rows_of_runs_that_draw_come_back(llama: Path, kind: str) -> None:
    executor = executor_of(kind, llama)
    pool, tokens = pool_of(executor, 3), np.arange(10)
    hidden = executor.forward_batch([Run(tokens, 0, [i], i != 1) for i in range(3)], pool)
    assert hidden.shape == (2, 128)
    assert executor.forward_batch([Run(tokens, 0, [0], False)], pool).shape == (0, 128)


@pytest.mark.parametrize("kind", ["fused", "eager"])
def test_a_stale_block_shows_in_its_own_request_alone(llama: Path, kind: str) -> None:
    executor = executor_of(kind, llama)
    requests = Requests(executor, (70, 70))
    requests.step({0: 69, 1: 69})
    requests.pool.blank(requests.blocks[1][0])
    found = requests.step({0: 1, 1: 1})
    assert np.isfinite(found[0]).all() and np.isnan(found[1]).all()


ONE = np.array([1])


@pytest.mark.parametrize("kind", ["fused", "eager"])
@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "1 or more runs"),
        ([Run(ONE, 0, [0], True), Run(ONE[:0], 0, [1], True)], "run 1 has no tokens"),
        ([Run(np.array([512]), 0, [0], True)], r"tokens must be ids in 0\.\.511, not 512\.\.512"),
        ([Run(-ONE, 0, [0], True)], r"tokens must be ids in 0\.\.511, not -1\.\.-1"),
        ([Run(ONE, -1, [0], True)], r"run 0: -1 \+ 1 positions do not fit"),
        ([Run(ONE, 96, [0, 1], True)], r"run 0: 96 \+ 1 positions do not fit max_length 96"),
        ([Run(ONE, 64, [0], True)], "run 0: 1 blocks of 64 positions do not hold 65"),
        ([Run(ONE, 0, [3], True)], r"block numbers must be in 0\.\.2"),
        ([Run(ONE, 0, [-1], True)], r"block numbers must be in 0\.\.2"),
        ([Run(ONE, 0, [1], True), Run(ONE, 64, [1, 2], True)], "block 1 is written by a run and stands in another"),
    ],
)
def test_runs_that_cannot_be_are_refused_and_nothing_written(llama: Path, kind: str, runs: list[Run], message: str) -> None:
    executor = executor_of(kind, llama)
    pool = pool_of(executor, 3)
    with pytest.raises(ValueError, match=message):
        executor.forward_batch(runs, pool)
    assert np.isnan(pool.memory).all()


@pytest.mark.parametrize("kind", ["fused", "eager"])
def test_a_pool_of_another_dtype_or_shape_is_refused(llama: Path, kind: str) -> None:
    executor = executor_of(kind, llama)
    other = KVShape(2, 2, MAX_LENGTH, 32)
    for pool in (BlockPool(executor.kv_shape, DType.F16, 1 << 20), BlockPool(other, DType.F32, 1 << 20)):
        with pytest.raises(ValueError, match=r"the pool holds blocks of .*; this executor needs F32 "):
            executor.forward_batch([Run(ONE, 0, [0], True)], pool)


def test_eager_refuses_a_rope_that_depends_on_the_other_requests(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    config = {"vocab_size": 512, "max_position_embeddings": 128, **shape, **rope}
    fetch_model({"source": "random", "architecture": "llama", "config": config, "seed": 1}, "m", "float32", tmp_path)
    executor = executor_of("eager", tmp_path)
    with pytest.raises(ModelError, match=r"rope type 'dynamic' rotates by the longest request of a pass.*use batching: null"):
        executor.forward_batch([Run(ONE, 0, [0], True)], pool_of(executor, 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_over_blocks_in_a_torch_tensor_gives_the_bits_of_blocks_in_host_memory(model_of: Callable[[str], Path], family: str) -> None:
    executor = executor_of("eager", model_of(family))
    there = GpuBlockPool(executor.kv_shape, executor.dtype, "cpu", 4 * pool_of(executor, 1).block_nbytes)
    here = executor.new_block_pool(4)
    assert (here.blocks, there.blocks) == (4, 4) and np.isnan(here.memory).all() and there.memory.isnan().all()
    for runs in ([Run(PREFIX, 0, [2], True), Run(PREFIX[:5], 0, [1], False)], [Run(ONE, BLOCK, [2, 3], True), Run(ONE, 5, [1], True)]):
        assert torch.equal(executor.forward_batch(runs, here), executor.forward_batch(runs, there))
        assert np.array_equal(here.memory, there.memory.numpy(), equal_nan=True)
    there.blank(2)
    assert there.memory[2].isnan().all() and not there.memory[1, :, :, :, :6].isnan().any()
