"""A pass of executor `cuda_graph` over many requests against `eager`'s and each request alone, and the engine over it.

On a CPU in Triton's interpreter, uncaptured.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from graph_models import DEVICE, HAS_GPU, KIN, LENGTH, SHAPES, VOCAB, model_of, pair_of
from torch.utils._python_dispatch import TorchDispatchMode

from semgap.engine import graph_batch
from semgap.engine.batch import Rows, Run
from semgap.engine.cuda_graph import GraphExecutor
from semgap.engine.eager import EagerExecutor
from semgap.engine.executor import Executor, RowDraw
from semgap.engine.graph_batch import SIZES, size_of
from semgap.engine.sampling import draw
from semgap.engine.weights import Weights
from semgap.kv.block_pool import BlockPool
from semgap.kv.pool import BLOCK
from semgap.policy import Batching, SamplingRule
from semgap.tensors import DType
from semgap.wire.batches import Batch
from semgap.wire.messages import Call, WeightSpec
from semgap.worker.engine_channel import AskBatches, Batches, Calls, Channel, FromEngine, FromSession, Member, Stepped, Welcome
from semgap.worker.engine_founding import EngineSpec, write_founding
from semgap.worker.engine_process import run_engine

ROUNDING = 2e-4  # of the largest logit, float32: as between single steps
LENGTHS = (70, 3, 64, 66, 1, 79, 65)  # filled positions; the first, third and sixth begin with the same block
SHARING = (0, 2, 5)
BLOCKS = 1 + 2 * len(LENGTHS)


class Requests:
    """Requests of LENGTHS filled positions, over a pool of each executor with the same contents."""

    def __init__(self, eager: Executor, graph: GraphExecutor) -> None:
        self.eager, self.graph = eager, graph
        self.pools = eager.new_block_pool(BLOCKS), graph.new_block_pool(BLOCKS)
        own = np.random.default_rng(5).permutation(np.arange(1, BLOCKS))
        self.blocks = [[0 if i in SHARING else int(own[2 * i]), int(own[2 * i + 1])] for i in range(len(LENGTHS))]
        self.tokens = [np.arange(LENGTH) * (17 + 2 * i) % VOCAB for i in range(len(LENGTHS))]
        for i in SHARING:
            self.tokens[i][:BLOCK] = self.tokens[0][:BLOCK]
        eager.forward_batch([Run(self.tokens[0][:BLOCK], 0, [0], False)], self.pools[0])
        begun = [(i, BLOCK if i in SHARING else 0) for i in range(len(LENGTHS))]
        runs = [Run(self.tokens[i][begin : LENGTHS[i]], begin, self.blocks[i], False) for i, begin in begun if LENGTHS[i] > begin]
        eager.forward_batch(runs, self.pools[0])
        self.pools[1].memory.copy_(_tensor(self.pools[0]))

    def runs(self, count: int, tokens: int = 1) -> list[Run]:
        """The next tokens of the first `count` requests."""
        return [Run(self.tokens[i][at : at + tokens], at, self.blocks[i], True) for i, at in enumerate(LENGTHS[:count])]

    def logits(self, runs: list[Run]) -> tuple[torch.Tensor, torch.Tensor]:
        """eager's and ours, of one pass."""
        passed = zip((self.eager, self.graph), self.pools, strict=True)
        theirs, ours = (executor.logits(executor.forward_batch(runs, pool)).float() for executor, pool in passed)
        return theirs, ours


def _tensor(pool: BlockPool) -> torch.Tensor:
    return (
        pool.memory if isinstance(pool.memory, torch.Tensor) else torch.from_numpy(pool.memory).view(getattr(torch, pool.dtype.torch_name))
    )


@pytest.fixture(scope="module", params=[*SHAPES, *KIN])
def requests(request: pytest.FixtureRequest) -> Iterator[Requests]:
    yield Requests(*pair_of(request.param))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_decodes_of_unequal_lengths_over_a_shared_block_get_eagers_logits_and_their_own_tokens(requests: Requests, count: int) -> None:
    before, runs = requests.pools[1].memory.clone(), requests.runs(count)
    theirs, ours = requests.logits(runs)
    assert ours.shape == (count, VOCAB) and (ours - theirs).abs().max() < ROUNDING * theirs.abs().max()
    for i, run in enumerate(runs):
        eager = requests.eager
        alone = eager.logits(eager.forward(requests.tokens[i][: run.end], eager.new_cache()))[-1]
        assert (ours[i] - alone).abs().max() < ROUNDING * alone.abs().max() and ours[i].argmax() == alone.argmax()
    after, kept = requests.pools[1].memory, torch.ones(BLOCKS, BLOCK, dtype=torch.bool)
    for run in runs:
        kept[run.blocks[run.position // BLOCK], run.position % BLOCK] = False
    own = after.transpose(1, 4)[~kept.to(DEVICE)]
    assert own.isfinite().all()
    assert torch.equal(_bits(after)[kept.to(DEVICE)], _bits(before)[kept.to(DEVICE)])  # what pads a pass leaves no trace, NaN kept its bits


def _bits(memory: torch.Tensor) -> torch.Tensor:
    return memory.transpose(1, 4).contiguous().view(torch.int32)


HALF = [("gptj", torch.float16), ("gptj", torch.bfloat16), ("qwen3", torch.bfloat16), ("gpt2", torch.float16)]


@pytest.mark.parametrize(("family", "dtype"), HALF)
def test_in_half_precision_logits_stay_within_the_stated_tolerance(family: str, dtype: torch.dtype) -> None:
    requests = Requests(*pair_of(family, dtype))
    theirs, ours = requests.logits(requests.runs(5))
    assert (ours - theirs).abs().max() <= theirs.abs().max() * (2**-6 if dtype is torch.float16 else 2**-4)


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_chunks_beside_decodes_run_in_parts_where_they_are_more_rows_than_a_graph(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one request in two parts of a pass, and a run that draws nothing."""
    monkeypatch.setattr(graph_batch, "SIZES", (1, 2, 4))
    requests = Requests(*pair_of(family))
    runs = requests.runs(5)
    runs[1] = Run(requests.tokens[1][3:10], 3, requests.blocks[1], True)
    runs[2] = Run(requests.tokens[2][64:66], 64, requests.blocks[2], False)
    assert sum(len(run.tokens) for run in runs) == 12
    theirs, ours = requests.logits(runs)
    assert ours.shape == (4, VOCAB) and (ours - theirs).abs().max() < ROUNDING * theirs.abs().max()
    memories = (torch.as_tensor(_tensor(pool)) for pool in requests.pools)
    assert torch.allclose(*memories, atol=1e-4, equal_nan=True)
    runs = [Run(requests.tokens[1][10:12], 10, requests.blocks[1], True), Run(requests.tokens[2][66:67], 66, requests.blocks[2], True)]
    theirs, ours = requests.logits(runs)
    assert (ours - theirs).abs().max() < ROUNDING * theirs.abs().max()


def test_a_pass_takes_the_smallest_graph_that_holds_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SIZES[:6] == (1, 2, 4, 8, 16, 32)
    assert [size_of(rows) for rows in (1, 2, 3, 4, 7, 16, 17, 33, 256, 257)] == [1, 2, 4, 4, 8, 16, 32, 64, 256, 256]
    monkeypatch.setattr(graph_batch, "SIZES", (1, 2, 4))
    requests, taken = Requests(*pair_of("gpt2")), []
    replays = requests.graph._batch._replays
    for size, replay in list(replays.items()):
        replays[size] = lambda size=size, replay=replay: (taken.append(size), replay())[1]
    for count in (1, 2, 3, 4, 5, 7):
        requests.logits(requests.runs(count))
    assert taken == [1, 2, 4, 4, 4, 1, 4, 4]


class _Copies(TorchDispatchMode):
    """Notes copies from the host to the device meta."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = op(*args, **(kwargs or {}))
        if op.overloadpacket.__name__ in ("copy_", "_to_copy"):
            assert made.device.type == "meta"
            self._seen.append("copy")
        return made


def test_no_copy_from_the_host_waits_for_a_pass_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The draws' launches would follow only once the pass is over."""
    monkeypatch.setattr(graph_batch, "SIZES", (1, 2))
    _, graph = pair_of("llama")
    graph.new_block_pool(2)
    batch, seen = graph._batch, []
    batch._state, batch._memory[2] = batch._state.to("meta"), batch._memory[2].to("meta")
    batch._replays[2] = lambda: seen.append("pass")
    with _Copies(seen):
        hidden = batch.forward(Rows.of([Run(ONE, 0, [0], True), Run(ONE, 0, [1], False)]), np.array([0]))
    assert seen == ["copy", "copy", "pass"] and hidden.shape == (1, 64)


@pytest.fixture(scope="module")
def pair() -> tuple[Executor, GraphExecutor]:
    """Executors whose pools are each test's own."""
    return pair_of("llama")


def test_a_stale_block_shows_in_its_own_request_alone(pair: tuple[Executor, GraphExecutor]) -> None:
    requests = Requests(*pair)
    requests.pools[1].blank(requests.blocks[3][0])
    hidden = requests.graph.forward_batch(requests.runs(4), requests.pools[1])
    assert hidden[:3].isfinite().all() and hidden[3].isnan().all()


ONE = np.array([1])


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "1 or more runs"),
        ([Run(np.array([VOCAB]), 0, [0], True)], r"tokens must be ids in 0\.\.130, not 131\.\.131"),
        ([Run(ONE, LENGTH, [0, 1], True)], r"run 0: 80 \+ 1 positions do not fit max_length 80"),
        ([Run(ONE, 64, [0], True)], "run 0: 1 blocks of 64 positions do not hold 65"),
        ([Run(ONE, 0, [3], True)], r"block numbers must be in 0\.\.2"),
        ([Run(ONE, 0, [1], True), Run(ONE, 64, [1, 2], True)], "block 1 is written by a run and stands in another"),
    ],
)
def test_runs_that_cannot_be_are_refused_and_nothing_written(runs: list[Run], message: str, pair: tuple[Executor, GraphExecutor]) -> None:
    _, graph = pair
    pool = graph.new_block_pool(3)
    with pytest.raises(ValueError, match=message):
        graph.forward_batch(runs, pool)
    assert pool.memory.isnan().all()


def test_a_pool_that_the_graphs_do_not_know_is_refused(pair: tuple[Executor, GraphExecutor]) -> None:
    eager, graph = pair
    earlier = graph.new_block_pool(1)
    graph.new_block_pool(1)
    for pool in (earlier, eager.new_block_pool(1)):
        with pytest.raises(ValueError, match="captured over one pool, the last of new_block_pool"):
            graph.forward_batch([Run(ONE, 0, [0], True)], pool)


@pytest.mark.parametrize("rows", [1, 4])
def test_rows_draw_on_the_device_what_the_host_would_draw(rows: int, pair: tuple[Executor, GraphExecutor]) -> None:
    _, graph = pair
    hidden = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    rules = (SamplingRule("sample", temperature=0.7, top_k=40, top_p=0.9), SamplingRule(), SamplingRule("sample", temperature=2.0))
    draws = [RowDraw(rules[row % 3], 5 + row, row, 30 + row) for row in range(rows)]
    logits = graph.logits(hidden).float().cpu().numpy()
    expected = [draw(row, each.rule, each.seed, each.request, each.position).token for row, each in zip(logits, draws, strict=True)]
    assert graph.draw_rows(hidden, draws) == expected
    assert EagerExecutor.draw_rows(graph, hidden, draws) == expected


def test_a_row_whose_logits_are_no_distribution_has_an_error_of_its_own(pair: tuple[Executor, GraphExecutor]) -> None:
    _, graph = pair
    hidden = torch.ones(3, 64, device=DEVICE)
    hidden[1] = float("nan")
    drawn = graph.draw_rows(hidden, [RowDraw(SamplingRule("sample", temperature=0.5), 1, 1, 1)] * 3)
    assert isinstance(drawn[1], ValueError) and "no distribution to sample from" in str(drawn[1])
    assert isinstance(drawn[0], int) and isinstance(drawn[2], int)


@dataclass
class Client:
    """A session's end of a channel to an engine: runs requests in a closed loop."""

    channel: Channel[FromEngine]
    drawn: dict[int, list[int]] = field(default_factory=dict)
    batches: Batches | None = None

    def begin(self, prompts: dict[int, np.ndarray], draws: int) -> None:
        calls = tuple(Call(number, 0, len(prompt), draws, True, LENGTH) for number, prompt in prompts.items())
        self.channel.send_whole(Calls(calls, np.concatenate(list(prompts.values())).astype(np.uint32).tobytes()))

    def receive(self) -> int:
        """Takes what came; gives how many requests ended."""
        ended = 0
        for message in self.channel.next():
            if isinstance(message, Stepped):
                ids = iter(message.ids)
                for gained in message.gained:
                    self.drawn.setdefault(gained.request, []).extend(next(ids) for _ in range(gained.tokens))
                    ended += gained.last
            elif isinstance(message, Batches):
                self.batches = message
            else:
                assert isinstance(message, Welcome), message
        return ended


@pytest.fixture
def engine_of() -> Iterator[Callable[..., Client]]:
    """A client of an engine that runs in a thread, by its founding file, as in a process of its own."""
    ends: list[tuple[Client, threading.Thread, list[int]]] = []

    def make(family: str, batching: Batching) -> Client:
        model = model_of(family)
        given = {name: weight.detach() for name, weight in model.named_parameters()}
        weights = Weights([WeightSpec(name, DType.F32, tuple(weight.shape)) for name, weight in given.items()], "cpu")
        for name, array in weights.arrays().items():
            array[:] = given[name].cpu().numpy()
        config = msgspec.json.decode(model.config.to_json_string(use_diff=False))
        spec = EngineSpec(config, weights.specs, "float32", DEVICE.type, "cuda_graph", 1, LENGTH, batching, 8)
        (ours, theirs), intakes = socket.socketpair(), socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        founding, status = write_founding(spec, weights), []
        founder = Channel(theirs, FromSession)
        thread = threading.Thread(target=lambda: status.append(run_engine(intakes[0], founder, founding)))
        thread.start()
        client = Client(Channel(ours, FromEngine))
        client.channel.send_whole(Member(SamplingRule(), 0, ()))
        ends.append((client, thread, status))
        return client

    yield make
    for client, thread, status in ends:
        client.channel.close()
        thread.join(20)
        assert status == [0]


def test_the_engine_over_graphs_draws_each_requests_own_tokens(
    engine_of: Callable[..., Client], pair: tuple[Executor, GraphExecutor]
) -> None:
    eager, _ = pair
    shared = np.arange(BLOCK) * 7 % VOCAB
    prompts = {1: np.concatenate([shared, [5, 9]]), 2: np.array([3, 77]), 3: np.concatenate([shared, [8]]), 4: np.arange(6)}
    client = engine_of("llama", Batching(merges="all", step_tokens=32, prefix=True))
    client.begin(prompts, 4)
    ended = 0
    while ended < len(prompts):
        ended += client.receive()
    for number, prompt in prompts.items():
        cache, tokens, fed = eager.new_cache(), [], prompt
        for _ in range(4):
            tokens.append(int(eager.logits(eager.forward(fed, cache))[-1].argmax()))
            fed = np.array(tokens[-1:])
        assert client.drawn[number] == tokens, number
    client.channel.send_whole(AskBatches())
    while client.batches is None:
        client.receive()
    steps = msgspec.json.decode(client.batches.rows, type=list[Batch])
    assert max(step.requests for step in steps) == 4 and any(step.decodes and step.prefill_tokens for step in steps)
    assert max(step.kv_shared for step in steps) == 1 and client.batches.state.kv_held == 0
    assert client.batches.state.pid == os.getpid()


@pytest.mark.skipif(not HAS_GPU, reason="nothing is captured without a GPU")
def test_a_replay_gives_the_bits_of_its_first_run(pair: tuple[Executor, GraphExecutor]) -> None:
    requests = Requests(*pair)
    runs = requests.runs(7)
    first = requests.graph.forward_batch(runs, requests.pools[1]).clone()
    assert all(torch.equal(requests.graph.forward_batch(runs, requests.pools[1]), first) for _ in range(3))
