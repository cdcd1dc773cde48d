"""The engine of a worker, with real processes and sockets: tokens as alone, byte books that agree, and faults that end one client alone."""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import psutil
import pytest

from semgap import codecs
from semgap.client.remote_runtime import RemoteRuntime
from semgap.client.runtime import Drawing
from semgap.client.spec import Phase
from semgap.policy import Batching, Policy, Reply, SamplingRule
from semgap.tensors import Tensor, TensorClass
from semgap.wire import frames, messages
from semgap.wire.batches import Batch, EngineState
from semgap.wire.link import Link, RemoteError
from semgap.wire.messages import Call, Kind, Operation
from semgap.wire.reconcile import reconcile

if TYPE_CHECKING:
    from started_workers import StartedWorker

Runtime = Callable[..., RemoteRuntime]
Start = Callable[..., "StartedWorker"]
Wait = Callable[..., None]

LENGTH = 128
ALL = Batching(merges="all", step_tokens=48)
MODES = {
    "serial": Batching(turns="whole"),
    "interleave": Batching(),
    "window_blind": Batching(merges="alike", wait_ms=5),
    "position": Batching(merges="lengths"),
    "phase": ALL,
    "prefix": Batching(merges="all", step_tokens=48, prefix=True),
    "deadline": Batching(merges="all", step_tokens=48, prefix=True, deadline=True),
}
DRAWN = Drawing(SamplingRule("sample", temperature=0.8, top_k=50), seed=11)
_RNG = np.random.default_rng(3)
PREFIX = _RNG.integers(0, 512, 64)
PROMPTS = {
    number: np.concatenate([PREFIX[: 64 * (number % 2)], _RNG.integers(0, 512, own)])
    for number, own in enumerate((5, 7, 23, 40, 5, 20, 19, 9), start=1)
}
TOKENS = 12


def _policy(batching: Batching | None, **more: Any) -> Policy:
    return Policy(reply=Reply("token"), keeps="tokens", batching=batching, **more)


@dataclass
class Client:
    """A client of an engine with any number of requests over one connection."""

    link: Link
    steps: int = 0
    drawn: dict[int, list[int]] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)

    def post(self, calls: Sequence[Call], ids: Iterable[int] = (), kind: Kind = Kind.REGULAR) -> int:
        fed = np.array(list(ids), np.uint16)
        tensors = [codecs.encode(Tensor.from_numpy(fed, TensorClass.TOKENS), "raw")] if fed.size else []
        return self.link.post(Operation.ADVANCE, messages.Advance((), tuple(calls)), tensors, kind)

    def begin(self, prompts: dict[int, np.ndarray], draws: int = 1, kind: Kind = Kind.REGULAR) -> int:
        """Posts one frame with the first calls of requests."""
        calls = [Call(number, 0, len(prompt), draws, most=LENGTH) for number, prompt in prompts.items()]
        return self.post(calls, np.concatenate(list(prompts.values())).tolist(), kind)

    def step(self) -> list[int]:
        """Receives one frame; gives the requests whose calls are over."""
        frame = self.link.receive_any(Operation.ADVANCE)
        ids = iter(self.link.decode(frame, 0).numpy().tolist())
        self.steps += 1
        over = []
        for gained in frame.header_as(messages.Advanced).gained:
            self.drawn.setdefault(gained.request, []).extend(next(ids) for _ in range(gained.tokens))
            over += [gained.request] if gained.last else []
        assert next(ids, None) is None
        return over

    def follow(self, prompts: dict[int, np.ndarray], over: Iterable[int], tokens: int, draws: int = 1) -> None:
        """One frame of calls for the requests that want further tokens, each fed its last one. Ends those that have enough."""
        calls, ids = [], []
        for number in over:
            have = len(self.drawn[number])
            position, more = len(prompts[number]) + have - 1, min(draws, tokens - have)
            if more <= 0:
                calls.append(Call(number, position, 0, 0, True))
                self.ended.add(number)
            else:
                calls.append(Call(number, position, 1, more))
                ids.append(self.drawn[number][-1])
        if calls:
            self.post(calls, ids)

    def run(self, prompts: dict[int, np.ndarray], tokens: int = TOKENS, draws: int = 1) -> dict[int, list[int]]:
        """Runs requests to their end in a closed loop; gives their tokens."""
        self.begin(prompts, min(draws, tokens))
        while not self.ended >= prompts.keys():
            self.follow(prompts, self.step(), tokens, draws)
        return {number: self.drawn[number] for number in prompts}

    def batches(self) -> tuple[EngineState, list[Batch]]:
        reply = self.link.request(Operation.GET_BATCHES)
        state = msgspec.json.decode(reply.header_as(messages.Bodied).body, type=EngineState)
        return state, msgspec.json.decode(reply.payloads[0], type=list[Batch])

    def kill(self) -> None:
        """Ends the connection as the kernel does for a killed process."""
        self.link.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.link.close()


@pytest.fixture
def join(open_runtime: Runtime, llama: Path) -> Callable[..., Client]:
    """A client whose session has joined an engine with KV blocks for `requests` requests."""

    def make(worker: StartedWorker, batching: Batching = ALL, requests: int = 8, kv_budget: float = 1.0, **more: Any) -> Client:
        phase = Phase("decode", (12,), live_requests=requests, kv_budget=kv_budget)
        policy = more.pop("policy", None) or _policy(batching)
        defaults: dict[str, Any] = {"phase": phase, "max_length": LENGTH, "drawing": DRAWN}
        return Client(open_runtime(worker, llama, policy, **(defaults | more)).link)

    return make


@pytest.fixture(scope="module")
def engine_worker(start_once: Start) -> StartedWorker:
    return start_once("--max-sessions", "32", "--parent-pid", str(os.getpid()))


@pytest.fixture
def alone(engine_worker: StartedWorker, open_runtime: Runtime, llama: Path) -> Callable[..., dict[int, list[int]]]:
    """Tokens of requests that run one by one in a session without an engine."""

    def run(tokens: int = TOKENS, worker: StartedWorker = engine_worker, **more: Any) -> dict[int, list[int]]:
        defaults: dict[str, Any] = {"max_length": LENGTH, "drawing": DRAWN}
        runtime = open_runtime(worker, llama, _policy(None, window=LENGTH), **(defaults | more))
        drawn = {}
        for number, prompt in PROMPTS.items():
            first = runtime.prefill(prompt, number, Kind.SETUP).tokens[0]
            rest = [token for arrival in runtime.decode(first, tokens - 1, Kind.SETUP) for token in arrival.tokens]
            drawn[number] = [first, *rest]
            runtime.end_request()
        runtime.link.close()
        return drawn

    return run


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("draws", [1, 5])
def test_one_client_with_many_requests_gets_their_tokens_as_alone_one_frame_a_step_and_its_bytes_reconcile(
    engine_worker: StartedWorker, join: Callable[..., Client], alone: Callable[..., dict[int, list[int]]], mode: str, draws: int
) -> None:
    client = join(engine_worker, MODES[mode])
    assert client.run(PROMPTS, draws=draws) == alone()
    state, rows = client.batches()
    assert client.steps == sum(row.drawn > 0 for row in rows)
    assert (state.kv_held, state.live, state.queued, state.steps) == (0, 0, 0, len(rows))
    reconcile(client.link)


@pytest.mark.parametrize("mode", MODES)
def test_many_clients_with_a_request_each_get_their_tokens_as_alone_and_the_bytes_of_each_reconcile(
    engine_worker: StartedWorker, join: Callable[..., Client], alone: Callable[..., dict[int, list[int]]], mode: str
) -> None:
    clients = {number: join(engine_worker, MODES[mode]) for number in PROMPTS}
    for number, client in clients.items():
        client.begin({number: PROMPTS[number]})
    while waiting := {client.link.sock: client for number, client in clients.items() if number not in client.ended}:
        for sock in select.select(list(waiting), [], [], 20)[0]:
            waiting[sock].follow(PROMPTS, waiting[sock].step(), TOKENS)
    assert {number: client.drawn[number] for number, client in clients.items()} == alone()
    for client in clients.values():
        reconcile(client.link)


def test_executor_eager_draws_the_tokens_of_each_request_alone(
    start_worker: Start, join: Callable[..., Client], alone: Callable[..., dict[int, list[int]]]
) -> None:
    worker = start_worker("--executor", "eager")
    assert join(worker, executor="eager").run(PROMPTS) == alone(worker=worker, executor="eager")


def test_the_rows_of_the_steps_say_what_ran_in_them(engine_worker: StartedWorker, join: Callable[..., Client]) -> None:
    client = join(engine_worker, Batching(merges="all", step_tokens=30))
    prompts = {1: PROMPTS[1], 3: PROMPTS[3]}  # 64 + 5 and 64 + 23 tokens
    client.run(prompts, tokens=6, draws=6)  # the shorter one decodes on by itself while the other's prompt is cut
    state, rows = client.batches()
    assert sum(row.prefill_tokens for row in rows) == sum(map(len, prompts.values()))
    assert sum(row.drawn for row in rows) == 12 and sum(row.decodes for row in rows) == 10
    assert all(row.tokens <= 30 for row in rows) and any(row.decodes and row.prefill_tokens for row in rows)
    assert max(row.kv_blocks for row in rows) == 4 and all(0 < row.occupancy <= 1 for row in rows)
    assert all(row.compute_s > 0 and row.schedule_s > 0 and row.reply_s > 0 for row in rows)
    assert [row.begin_s for row in rows] == sorted(row.begin_s for row in rows) and rows[-1].begin_s < time.monotonic()
    assert state.kv_blocks == 16 and state.sessions == 1


def test_a_common_prefix_is_held_once(engine_worker: StartedWorker, join: Callable[..., Client]) -> None:
    prompts = {number: np.concatenate([PREFIX, [number]]) for number in range(1, 5)}
    held = {}
    for mode in ("phase", "prefix"):
        client = join(engine_worker, MODES[mode])
        client.run(prompts, tokens=40)
        held[mode] = max(row.kv_blocks for row in client.batches()[1])
    assert held == {"phase": 8, "prefix": 5}


def test_frames_are_of_the_kind_that_the_client_asked_with(engine_worker: StartedWorker, join: Callable[..., Client]) -> None:
    client = join(engine_worker)
    client.begin({1: PROMPTS[1]}, draws=40, kind=Kind.SETUP)
    client.begin({2: PROMPTS[2]}, draws=40, kind=Kind.REGULAR)
    over: list[int] = []
    while len(over) < 2:
        over += client.step()
    reconcile(client.link)
    down = [
        row for row in client.link.ledger.copy_rows() if (row.operation, row.direction, row.tensor_class) == ("advance", "down", "tokens")
    ]
    assert {row.kind: row.payload_bytes for row in down} == {"setup": 80, "regular": 80}  # 40 ids of 2 bytes


def test_a_stop_token_ends_a_call_early(
    engine_worker: StartedWorker, join: Callable[..., Client], open_runtime: Runtime, llama: Path
) -> None:
    free = join(engine_worker).run({2: PROMPTS[2]}, draws=TOKENS)[2]
    phase = Phase("decode", (12,), live_requests=8)
    more = {"phase": phase, "max_length": LENGTH, "drawing": DRAWN, "stop_tokens": (free[4],)}
    stopped = Client(open_runtime(engine_worker, llama, _policy(ALL), **more).link)
    stopped.begin({2: PROMPTS[2]}, draws=TOKENS)
    while not stopped.step():
        pass
    assert stopped.drawn[2] == free[: free.index(free[4]) + 1]


def test_a_request_that_is_ended_frees_its_blocks_at_once_and_can_begin_anew(
    engine_worker: StartedWorker, join: Callable[..., Client], alone: Callable[..., dict[int, list[int]]]
) -> None:
    client = join(engine_worker)
    client.begin({1: PROMPTS[1]}, draws=40)
    client.step()
    client.post([Call(1, 0, 0, 0, True)])
    while 1 not in client.step():  # frames of steps that ran before the end
        pass
    assert len(client.drawn[1]) < 40
    client.begin({2: PROMPTS[2]})
    assert client.step() == [2]
    client.follow(PROMPTS, [2], 1)
    assert client.batches()[0].kv_held == 0
    client.drawn.clear()
    assert client.run({1: PROMPTS[1]}) == {1: alone()[1]}


@pytest.mark.parametrize(
    ("calls", "ids", "code", "message"),
    [
        ([Call(1, 0, 2, most=9), Call(1, 0, 0)], [1, 2], "advance", "2 calls of 1 requests in a frame"),
        ([Call(1, 0, 3, most=9)], [1, 2], "tokens", "the calls feed 3 tokens, and 2 came"),
        ([Call(1, 0, 1, most=9)], [512], "tokens", r"ids in 0\.\.511"),
        ([Call(1, 5, 1, most=9)], [1], "position", "request 1 is not known here"),
        ([Call(1, 0, 1, most=LENGTH + 1)], [1], "position", "wants 129 positions in all"),
        ([Call(1, 0, 1, 9, most=8)], [1], "position", "would pass its 8 positions"),
    ],
)
def test_a_call_that_cannot_be_is_refused_and_the_session_goes_on(
    engine_worker: StartedWorker,
    join: Callable[..., Client],
    alone: Callable[..., dict[int, list[int]]],
    calls: list[Call],
    ids: list[int],
    code: str,
    message: str,
) -> None:
    client = join(engine_worker)
    sequence = client.post(calls, ids)
    with pytest.raises(RemoteError, match=message) as error:
        client.step()
    assert (error.value.code, error.value.sequence) == (code, sequence)
    assert client.run({4: PROMPTS[4]}) == {4: alone()[4]}


def test_calls_beyond_the_queue_are_refused_and_the_others_run(engine_worker: StartedWorker, join: Callable[..., Client]) -> None:
    client = join(engine_worker, Batching(merges="all", max_requests=1, max_queue=1))
    client.begin({1: PROMPTS[1]}, draws=30)
    client.begin({2: PROMPTS[2]}, draws=3)
    refused = client.begin({3: PROMPTS[3]})
    over, errors = [], []
    while len(over) < 2:
        try:
            ended = client.step()
        except RemoteError as error:
            errors.append((error.code, error.sequence))
            assert "the queue takes 1" in str(error)
            continue
        over += ended
        client.follow(PROMPTS, ended, 1)
    assert over == [1, 2] and errors == [("queue", refused)]


def test_a_kv_budget_below_one_request_is_refused_before_weights_are_sent(
    engine_worker: StartedWorker, join: Callable[..., Client], open_runtime: Runtime
) -> None:
    with pytest.raises(RemoteError, match="a KV budget of 1 blocks of 64 positions is less than one request of 128 positions") as error:
        join(engine_worker, requests=1, kv_budget=0.5)
    assert error.value.code == "kv_budget"


def test_a_kv_budget_of_two_requests_runs_eight_with_their_tokens(
    engine_worker: StartedWorker, join: Callable[..., Client], alone: Callable[..., dict[int, list[int]]]
) -> None:
    client = join(engine_worker, ALL, requests=2)
    assert client.run(PROMPTS, draws=TOKENS) == alone()
    assert max(row.kv_blocks for row in client.batches()[1]) <= 4


def test_an_engine_is_shared_by_sessions_of_equal_weights_and_options_and_by_no_others(
    start_worker: Start, join: Callable[..., Client], wait_until: Wait
) -> None:
    worker = start_worker()
    by_hash = _policy(ALL, weights="by_hash")
    one, two, other = join(worker), join(worker, policy=by_hash), join(worker, MODES["serial"])
    pids = [client.batches()[0].pid for client in (one, two, other)]
    assert pids[0] == pids[1] != pids[2]
    two.link.close()
    wait_until(lambda: one.batches()[0].sessions == 1, "the engine forgets a session that left")
    one.link.close()
    wait_until(lambda: not psutil.pid_exists(pids[0]), "the engine ends after its last session")
    assert other.batches()[0].pid == pids[2]


def test_a_model_that_an_engine_has_crosses_no_more_by_hash(
    engine_worker: StartedWorker, join: Callable[..., Client], open_runtime: Runtime, llama: Path
) -> None:
    first = join(engine_worker)  # weights: once
    phase = Phase("decode", (12,), live_requests=8)
    more = {"phase": phase, "max_length": LENGTH, "drawing": DRAWN}
    runtime = open_runtime(engine_worker, llama, _policy(ALL, weights="by_hash"), upload=False, **more)
    assert runtime.upload_weights() == 0
    assert Client(runtime.link).batches()[0].pid == first.batches()[0].pid


def test_operations_of_sessions_with_and_without_an_engine_stay_apart(
    engine_worker: StartedWorker, join: Callable[..., Client], open_runtime: Runtime, llama: Path
) -> None:
    with pytest.raises(RemoteError, match="an engine runs this session's requests"):
        join(engine_worker).link.request(Operation.FORWARD, messages.Forward())
    plain = Client(open_runtime(engine_worker, llama, Policy()).link)
    plain.begin({1: PROMPTS[1]})
    with pytest.raises(RemoteError, match="this session's mode has no batching"):
        plain.step()
    early = Client(open_runtime(engine_worker, llama, _policy(ALL), upload=False).link)
    early.begin({1: PROMPTS[1]})
    with pytest.raises(RemoteError, match="has no engine yet"):
        early.step()


KINDS_OF_DEATH = ("connected", "offer", "upload", "uploaded", "half a frame", "prefill", "window", "between calls", "queued", "ended")


def _die(worker: StartedWorker, runtime: Any, llama: Path, stage: str, after_s: float) -> None:
    """A client that comes as far as `stage` and is killed `after_s` later."""
    phase = Phase("decode", (12,), live_requests=8)
    more = {"phase": phase, "max_length": LENGTH, "drawing": DRAWN, "upload": False}
    made = runtime(worker, llama, _policy(ALL), **more)
    client, offer = Client(made.link), messages.OfferWeights((), made._model.specs())
    if stage not in ("connected", "offer", "upload"):
        made.upload_weights()
    match stage:
        case "offer":
            client.link.post(Operation.OFFER_WEIGHTS, offer)
        case "upload":
            client.link.request(Operation.OFFER_WEIGHTS, offer)
            client.link.post_all(Operation.PUT_WEIGHTS, [(messages.PutWeights((), (0,)), made._encoded_weights([0]))])
        case "half a frame":
            frame = frames.pack(Operation.ADVANCE, Kind.REGULAR, 0, 9, messages.Advance((), (Call(1, 0),)), [memoryview(bytes(999))])
            client.link.sock.sendall(frame[:-5])
        case "prefill":
            client.begin(PROMPTS)
        case "window":
            client.begin(PROMPTS, draws=40)
            client.step()
        case "between calls":
            client.begin({1: PROMPTS[1]})
            client.step()
        case "queued":
            client.begin({100 + n: PREFIX for n in range(200)}, draws=40)
        case "ended":
            client.run({1: PROMPTS[1]}, tokens=2)
    time.sleep(after_s)
    client.kill()


def test_clients_killed_at_any_stage_leave_nothing_behind_and_others_get_their_tokens(
    start_worker: Start,
    join: Callable[..., Client],
    open_runtime: Runtime,
    alone: Callable[..., dict[int, list[int]]],
    llama: Path,
    wait_until: Wait,
) -> None:
    worker, expected, chance = start_worker("--max-sessions", "32"), alone(tokens=20), random.Random(16)
    client, rounds = join(worker), 0
    stages = [*KINDS_OF_DEATH, *KINDS_OF_DEATH]
    for stage in stages:
        client.drawn.clear()
        client.ended.clear()
        client.begin(PROMPTS)
        _die(worker, open_runtime, llama, stage, chance.choice((0, 0.002, 0.01, 0.03)))
        while not client.ended >= PROMPTS.keys():
            client.follow(PROMPTS, client.step(), 20)
        rounds += client.drawn == expected
    assert rounds == len(stages)
    wait_until(lambda: client.batches()[0].sessions == 1, "the engine forgets killed clients")
    state, _ = client.batches()
    assert (state.kv_held, state.live, state.queued) == (0, 0, 0)
    reconcile(client.link)
    assert len(worker.sessions()) == 2  # this session and the engine
    client.link.close()
    wait_until(lambda: not worker.sessions(), "the last session ends, and the engine with it")


@pytest.mark.parametrize("stalled_in", ["its client", "its session"])
def test_a_client_that_stalls_holds_up_nobody(
    start_worker: Start, join: Callable[..., Client], alone: Callable[..., dict[int, list[int]]], wait_until: Wait, stalled_in: str
) -> None:
    worker = start_worker()
    client, expected = join(worker), alone()
    client.run(PROMPTS, draws=TOKENS)
    before = set(worker.sessions())
    stalled = join(worker)
    stalled.begin({1: PROMPTS[1]}, draws=40)
    if stalled_in == "its session":
        (session,) = set(worker.sessions()) - before
        session.send_signal(signal.SIGSTOP)
    else:
        for _ in range(4000):
            stalled.link.post(Operation.GET_BATCHES)
    for _ in range(3):
        client.drawn.clear()
        client.ended.clear()
        assert client.run(PROMPTS) == expected
    session.kill() if stalled_in == "its session" else stalled.kill()
    wait_until(lambda: client.batches()[0].sessions == 1, "a client that reads nothing is given up")
    assert client.batches()[0].kv_held == 0


def _misbehaved(sequence: int) -> dict[str, bytes]:
    good = frames.pack(Operation.ADVANCE, Kind.REGULAR, 0, sequence, messages.Advance((), (Call(1, 0),)), [])
    other = frames.pack(Operation.OPEN_KV, Kind.REGULAR, 0, sequence, messages.OpenKV(), [])
    return {
        "magic": bytes(64),
        "checksum": good[:20] + bytes(8) + good[28:],
        "sequence": frames.pack(Operation.ADVANCE, Kind.REGULAR, 0, sequence + 5, messages.Advance((), (Call(1, 0),)), [], sequence),
        "header": frames.pack(Operation.ADVANCE, Kind.REGULAR, 0, sequence, messages.Ping((), 5), []),
        "operation": other,
    }


@pytest.mark.parametrize("code", ["magic", "checksum", "sequence", "header", "operation"])
def test_a_misbehaving_frame_ends_its_session_alone(
    engine_worker: StartedWorker, join: Callable[..., Client], alone: Callable[..., dict[int, list[int]]], code: str, wait_until: Wait
) -> None:
    client, wrong = join(engine_worker), join(engine_worker)
    client.begin(PROMPTS)
    last = wrong.begin(PROMPTS, draws=40)
    wrong.link.sock.sendall(_misbehaved(last + 1)[code])
    with pytest.raises(RemoteError) as error:
        while True:
            wrong.step()
    assert error.value.code == code
    while not client.ended >= PROMPTS.keys():
        client.follow(PROMPTS, client.step(), TOKENS)
    assert client.drawn == alone()
    wait_until(lambda: client.batches()[0].sessions == 1, "the engine forgets the session")
    assert client.batches()[0].kv_held == 0
    reconcile(client.link)


def test_when_the_engine_is_killed_every_client_hears_of_it_and_the_next_one_gets_a_new_engine(
    start_worker: Start, join: Callable[..., Client], alone: Callable[..., dict[int, list[int]]], wait_until: Wait
) -> None:
    worker = start_worker()
    clients = [join(worker) for _ in range(3)]
    pid = clients[0].batches()[0].pid
    clients[1].begin(PROMPTS, draws=40)
    clients[2].begin({1: PROMPTS[1]})
    os.kill(pid, signal.SIGKILL)
    for client in clients:
        with pytest.raises(RemoteError, match=f"engine {pid}, which ran this session's requests, has ended") as error:
            while True:
                client.step()
        assert error.value.code == "engine"
    wait_until(lambda: not worker.sessions(), "its sessions end")
    assert f"engine {pid} ended with signal 9" in worker.log.read_text()
    following = join(worker)
    assert following.run(PROMPTS) == alone()
    assert following.batches()[0].pid != pid


def test_a_request_without_a_distribution_to_draw_from_ends_with_the_reason_and_the_engine_goes_on(
    engine_worker: StartedWorker, open_runtime: Runtime, llama: Path
) -> None:
    phase = Phase("decode", (12,), live_requests=8)
    more = {"phase": phase, "max_length": LENGTH, "drawing": DRAWN, "upload": False}
    runtime = open_runtime(engine_worker, llama, _policy(ALL), **more)
    runtime.weights = [Tensor.from_numpy(np.full_like(each.numpy(), np.nan), TensorClass.WEIGHTS) for each in runtime.weights]
    runtime.upload_weights()
    client = Client(runtime.link)
    for number in (1, 2):
        client.begin({number: PROMPTS[number]})
        with pytest.raises(RemoteError, match=f"request {number} has ended: the largest of the logits is nan"):
            client.step()
    assert client.batches()[0].kv_held == 0


def test_sessions_above_the_limit_are_turned_away_and_the_engine_counts_as_none(start_worker: Start, join: Callable[..., Client]) -> None:
    worker = start_worker("--max-sessions", "2")
    clients = [join(worker), join(worker)]
    with pytest.raises(RemoteError, match="2 sessions are open, the most that this worker serves") as error:
        join(worker)
    assert error.value.code == "busy"
    assert all(client.run({1: PROMPTS[1]}, tokens=2) for client in clients)


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_the_engine_ends_with_its_worker(start_worker: Start, join: Callable[..., Client], wait_until: Wait, ending: int) -> None:
    worker = start_worker()
    client = join(worker)
    pid = client.batches()[0].pid
    client.begin(PROMPTS, draws=40)
    worker.process.send_signal(ending)
    worker.process.wait(10)
    wait_until(lambda: not psutil.pid_exists(pid), "the engine ends")


def test_a_silent_session_of_an_engine_is_closed_after_the_idle_time(start_worker: Start, join: Callable[..., Client]) -> None:
    client = join(start_worker("--idle-s", "0.5"))
    with pytest.raises(RemoteError) as error:
        client.step()
    assert error.value.code == "deadline"
