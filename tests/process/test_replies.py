"""Replies, windows, weights by hash and draws on either side: what a policy that knows more does, against local."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
import xxhash

from semgap.client.head import load_client_head
from semgap.client.local_runtime import LocalRuntime
from semgap.client.loop import run_requests
from semgap.client.remote_runtime import RemoteRuntime
from semgap.client.runtime import Drawing
from semgap.client.spec import ClientSpec, Phase
from semgap.engine.model_files import ModelFiles, load_digest
from semgap.engine.weights import Weights, fill
from semgap.experiment.exactness import Logits, compare, summarise
from semgap.policy import Policy, PolicyError, SamplingRule, policy_from
from semgap.tensors import DType
from semgap.wire import frames, messages
from semgap.wire.frames import Flag
from semgap.wire.link import RemoteError
from semgap.wire.messages import Kind, Operation
from semgap.wire.reconcile import reconcile
from semgap.worker.weight_store import WeightStore

if TYPE_CHECKING:
    from started_workers import StartedWorker

Runtime = Callable[..., RemoteRuntime]
PROMPT = np.arange(3, 15, dtype=np.int64)
COMPACT = {"tokens": "compact"}
MODES: dict[str, dict[str, Any]] = {
    "logits_last": {"reply": {"kind": "logits_last"}},
    "planes": {"reply": {"kind": "logits_last"}, "codec": {**COMPACT, "reply": "planes_zstd"}},
    "hidden_last": {"reply": {"kind": "hidden_last"}, "codec": COMPACT},
    "topk": {"reply": {"kind": "topk", "k": 64}, "keeps": "lossy"},
    "token": {"reply": {"kind": "token"}, "codec": COMPACT, "keeps": "tokens"},
    "window": {"reply": {"kind": "token"}, "codec": COMPACT, "keeps": "tokens", "window": 4},
    "coalesced": {"reply": {"kind": "token"}, "codec": COMPACT, "keeps": "tokens", "window": 5, "coalesce": 3},
    "ahead": {"reply": {"kind": "token"}, "codec": COMPACT, "keeps": "tokens", "window": 4, "ahead": True},
    "ahead_coalesced": {"reply": {"kind": "token"}, "keeps": "tokens", "window": 5, "coalesce": 3, "ahead": True},
    "ahead_offloaded": {"reply": {"kind": "token"}, "kv_cache": "offloaded", "keeps": "tokens", "window": 4, "ahead": True},
    "offloaded_window": {"reply": {"kind": "token"}, "kv_cache": "offloaded", "keeps": "tokens", "window": 8},
    "zstd_by_hash": {"weights": "by_hash", "codec": {"tokens": "zstd", "weights": "zstd", "reply": "zstd", "kv": "zstd"}},
    "naive_planes": {"weights": "every_step", "kv_cache": "every_step", "codec": {"kv": "planes_zstd", "reply": "planes_zstd"}},
}
RULES = {
    "greedy": SamplingRule(),
    "temperature": SamplingRule("sample", temperature=1.3),
    "top_k": SamplingRule("sample", top_k=20),
    "top_p": SamplingRule("sample", temperature=0.8, top_p=0.9),
}
TOKEN = policy_from(MODES["token"], "token")


def _local(directory: Path, drawing: Drawing) -> LocalRuntime:
    model = ModelFiles(directory, load_digest(directory))
    policy = Policy(placement="local")
    return LocalRuntime(policy, model, drawing, threads=1, max_length=32, device="cpu", setup={})


def _saw(runtime: LocalRuntime | RemoteRuntime, spec: ClientSpec) -> Logits:
    return Logits(**run_requests(runtime, spec, [PROMPT, PROMPT[::-1].copy()], []).arrays())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
@pytest.mark.parametrize("mode", MODES)
def test_every_reply_keeps_what_its_mode_promises(
    worker: StartedWorker,
    open_runtime: Runtime,
    client_spec: Callable[..., ClientSpec],
    model_of: Callable[[str], Path],
    family: str,
    mode: str,
) -> None:
    policy = policy_from(MODES[mode], mode)
    spec = client_spec(model_of(family), policy, phase=Phase("decode", (12,), requests=2, steps=9))
    head = (
        load_client_head(ModelFiles(model_of(family), load_digest(model_of(family))), "fused", 1)
        if policy.reply.kind == "hidden_last"
        else None
    )
    seen = _saw(open_runtime(worker, model_of(family), policy, head=head), spec)
    reference = _saw(_local(model_of(family), Drawing()), spec)
    summary = summarise(compare(reference, seen, policy.reply.kind == "logits_all"), policy.keeps)
    assert summary["promise_kept"], summary
    assert summary["tokens_equal"] == summary["tokens_compared"] == 20


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", ["token", "window", "logits_last", "hidden_last"])
def test_either_side_draws_the_same_tokens(
    worker: StartedWorker, open_runtime: Runtime, client_spec: Callable[..., ClientSpec], llama: Path, mode: str, rule: str
) -> None:
    policy = policy_from(MODES[mode], mode)
    drawing = Drawing(RULES[rule], seed=11)
    spec = client_spec(llama, policy, phase=Phase("decode", (12,), requests=2, steps=9), drawing=drawing)
    head = load_client_head(ModelFiles(llama, load_digest(llama)), "fused", 1) if mode == "hidden_last" else None
    seen = _saw(open_runtime(worker, llama, policy, drawing=drawing, head=head), spec)
    reference = _saw(_local(llama, drawing), spec)
    assert summarise(compare(reference, seen, False), "tokens")["promise_kept"]
    assert seen.tokens.tolist() == reference.tokens.tolist()


def test_a_token_costs_fewer_bytes_the_more_is_known(worker: StartedWorker, open_runtime: Runtime, llama: Path) -> None:
    counted = {}
    for name, policy in (("token", TOKEN), ("window", msgspec.structs.replace(TOKEN, window=16)), ("coalesced", None)):
        policy = policy or msgspec.structs.replace(TOKEN, window=16, coalesce=16)
        runtime = open_runtime(worker, llama, policy)
        first = runtime.prefill(PROMPT, 0, Kind.SETUP).tokens[0]
        before = runtime.ledger.up.frame + runtime.ledger.down.frame
        tokens = [token for arrival in runtime.decode(first, 16, Kind.REGULAR) for token in arrival.tokens]
        counted[name] = (runtime.ledger.up.frame + runtime.ledger.down.frame - before) / len(tokens)
    assert counted["token"] <= 96
    assert counted["window"] <= 40
    assert counted["coalesced"] <= 8


def test_a_cancelled_window_ends_early_and_the_handle_goes_on_at_the_last_token_taken(
    worker: StartedWorker, open_runtime: Runtime, llama: Path
) -> None:
    plain = open_runtime(worker, llama, TOKEN)
    expected = [plain.prefill(PROMPT, 0, Kind.SETUP).tokens[0]]
    while len(expected) < 8:
        expected += next(plain.decode(expected[-1], 1, Kind.SETUP)).tokens
    runtime = open_runtime(worker, llama, msgspec.structs.replace(TOKEN, window=1000), max_length=120)
    taken = list(runtime.prefill(PROMPT, 0, Kind.SETUP).tokens)
    arrivals = runtime.decode(taken[-1], 100, Kind.REGULAR)
    taken += next(arrivals).tokens
    runtime.cancel_window()
    came = len(taken) + sum(len(arrival.tokens) for arrival in arrivals)
    assert came < 101
    runtime.rewind(len(PROMPT) + 1)  # all that came after the first two tokens is given up
    while len(taken) < 8:
        taken += next(iter(list(runtime.decode(taken[-1], 1, Kind.REGULAR)))).tokens
    assert taken == expected


def test_a_window_that_fails_midway_leaves_the_handle_usable(worker: StartedWorker, open_runtime: Runtime, llama: Path) -> None:
    runtime = open_runtime(worker, llama, msgspec.structs.replace(TOKEN, window=64), max_length=16)
    taken = list(runtime.prefill(PROMPT, 0, Kind.SETUP).tokens)
    with pytest.raises(RemoteError, match="do not fit max_length 16"):
        for arrival in runtime.decode(taken[-1], 64, Kind.REGULAR):
            taken += arrival.tokens
    assert len(taken) == 5
    runtime.rewind(len(PROMPT) + 2)
    again = [token for arrival in runtime.decode(taken[2], 2, Kind.REGULAR) for token in arrival.tokens]
    assert again == taken[3:5]


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_window_that_ends_midway_has_a_cost_for_each_token_that_came_and_for_no_other(
    worker: StartedWorker, open_runtime: Runtime, llama: Path, cancelled: bool
) -> None:
    policy = msgspec.structs.replace(TOKEN, window=1000, coalesce=3)
    runtime = open_runtime(worker, llama, policy, max_length=120 if cancelled else 16)
    taken = list(runtime.prefill(PROMPT, 0, Kind.SETUP).tokens)
    with contextlib.nullcontext() if cancelled else pytest.raises(RemoteError, match="do not fit max_length 16"):
        for arrival in runtime.decode(taken[-1], 100, Kind.REGULAR):
            if cancelled and len(taken) == 1:
                runtime.cancel_window()
            taken += arrival.tokens
    assert len(taken) < 101 if cancelled else len(taken) == 1 + 3  # 4 steps fit; the token of the last was waiting for two more
    assert len(reconcile(runtime.link)["peer"]["steps"]) == len(taken)


def test_stop_tokens_end_a_window_on_the_worker(worker: StartedWorker, open_runtime: Runtime, llama: Path) -> None:
    policy = msgspec.structs.replace(TOKEN, window=16)
    plain = open_runtime(worker, llama, policy)
    first = plain.prefill(PROMPT, 0, Kind.SETUP).tokens[0]
    drawn = [token for arrival in plain.decode(first, 16, Kind.SETUP) for token in arrival.tokens]
    stop = drawn[3]
    stopping = open_runtime(worker, llama, policy, stop_tokens=(stop,))
    stopping.prefill(PROMPT, 0, Kind.SETUP)
    cut = [token for arrival in stopping.decode(first, 16, Kind.SETUP) for token in arrival.tokens]
    assert cut == drawn[: drawn.index(stop) + 1]


def test_a_cancel_that_comes_too_late_changes_nothing(worker: StartedWorker, open_runtime: Runtime, llama: Path) -> None:
    runtime = open_runtime(worker, llama, msgspec.structs.replace(TOKEN, window=2))
    first = runtime.prefill(PROMPT, 0, Kind.SETUP).tokens[0]
    drawn = [token for arrival in runtime.decode(first, 2, Kind.SETUP) for token in arrival.tokens]
    runtime.cancel_window()
    assert len(drawn) == 2
    assert len(list(runtime.decode(drawn[-1], 2, Kind.SETUP))) == 2


AHEAD = msgspec.structs.replace(TOKEN, window=4, ahead=True)


def _taken(runtime: RemoteRuntime, token: int, count: int) -> list[int]:
    return [token for arrival in runtime.decode(token, count, Kind.REGULAR) for token in arrival.tokens]


def test_the_next_window_is_asked_for_at_the_first_token_of_the_last_one(worker: StartedWorker, open_runtime: Runtime, llama: Path) -> None:
    runtime = open_runtime(worker, llama, AHEAD)
    first = runtime.prefill(PROMPT, 0, Kind.SETUP).tokens[0]
    before, sent, trips = runtime.ledger.up.frames, [], []
    for _ in runtime.decode(first, 10, Kind.REGULAR):
        sent.append(runtime.ledger.up.frames - before)
        trips.append(runtime.ledger.round_trips)
    assert sent == [2, 2, 2, 2, 3, 3, 3, 3, 3, 3]
    assert [later - sooner for sooner, later in itertools.pairwise(trips)] == [0, 0, 0, 1, 0, 0, 0, 1, 0]


def test_windows_asked_for_ahead_give_the_tokens_of_single_steps_and_a_cost_each(
    worker: StartedWorker, open_runtime: Runtime, llama: Path
) -> None:
    plain = open_runtime(worker, llama, msgspec.structs.replace(TOKEN, window=40), max_length=64)
    ahead = open_runtime(worker, llama, AHEAD, max_length=64)
    first = plain.prefill(PROMPT, 0, Kind.SETUP).tokens[0]
    assert ahead.prefill(PROMPT, 0, Kind.SETUP).tokens[0] == first
    assert _taken(ahead, first, 30) == _taken(plain, first, 30)
    assert len(reconcile(ahead.link)["peer"]["steps"]) == 31


def test_a_cancel_ends_the_window_that_was_asked_for_ahead_as_well(worker: StartedWorker, open_runtime: Runtime, llama: Path) -> None:
    plain = open_runtime(worker, llama, msgspec.structs.replace(TOKEN, window=100), max_length=128)
    first = plain.prefill(PROMPT, 0, Kind.SETUP).tokens[0]
    expected = _taken(plain, first, 100)
    runtime = open_runtime(worker, llama, msgspec.structs.replace(AHEAD, window=50), max_length=128)
    runtime.prefill(PROMPT, 0, Kind.SETUP)
    arrivals = runtime.decode(first, 100, Kind.REGULAR)
    taken = list(next(arrivals).tokens)
    runtime.cancel_window()
    taken += [token for arrival in arrivals for token in arrival.tokens]
    assert len(taken) < 100
    taken += _taken(runtime, taken[-1], 100 - len(taken))  # the handle goes on where it was cut short
    assert taken == expected
    assert len(reconcile(runtime.link)["peer"]["steps"]) == 101


def test_a_stop_token_ends_what_was_asked_for_ahead(worker: StartedWorker, open_runtime: Runtime, llama: Path) -> None:
    plain = open_runtime(worker, llama, msgspec.structs.replace(TOKEN, window=16))
    first = plain.prefill(PROMPT, 0, Kind.SETUP).tokens[0]
    drawn = _taken(plain, first, 16)
    for stop in {drawn[1], drawn[3], drawn[9]}:  # inside a window, as its last token, and in a later one
        stopping = open_runtime(worker, llama, AHEAD, stop_tokens=(stop,))
        stopping.prefill(PROMPT, 0, Kind.SETUP)
        cut = _taken(stopping, first, 16)
        assert cut == drawn[: drawn.index(stop) + 1]
        assert len(reconcile(stopping.link)["peer"]["steps"]) == 1 + len(cut)


def test_a_window_that_fails_takes_the_one_after_it_along_and_leaves_the_handle_usable(
    worker: StartedWorker, open_runtime: Runtime, llama: Path
) -> None:
    runtime = open_runtime(worker, llama, AHEAD, max_length=len(PROMPT) + 6)
    taken = list(runtime.prefill(PROMPT, 0, Kind.SETUP).tokens)
    with pytest.raises(RemoteError, match="do not fit max_length 18"):
        for arrival in runtime.decode(taken[-1], 20, Kind.REGULAR):
            taken += arrival.tokens
    assert len(taken) == 1 + 6
    runtime.rewind(len(PROMPT) + 2)
    assert _taken(runtime, taken[2], 3) == taken[3:6]


def test_a_window_cannot_follow_what_is_not_the_end_of_one(worker: StartedWorker, open_runtime: Runtime, llama: Path) -> None:
    from semgap.wire.messages import DecodeWindow

    runtime = open_runtime(worker, llama, AHEAD)
    runtime.prefill(PROMPT, 0, Kind.SETUP)
    sequence = runtime.link.post(Operation.DECODE_WINDOW, DecodeWindow((), 1, count=3, follows=True))
    frame = runtime.link.receive_stream(Operation.DECODE_WINDOW, sequence)
    assert (frame.flags, frame.payload_bytes) == (Flag.REPLY | Flag.LAST, 0)


def test_a_second_window_asked_for_ahead_ends_the_connection(worker: StartedWorker, open_runtime: Runtime, llama: Path) -> None:
    from semgap.wire.frames import WireError
    from semgap.wire.messages import DecodeWindow

    runtime = open_runtime(worker, llama, AHEAD, max_length=128)
    first = runtime.prefill(PROMPT, 0, Kind.SETUP).tokens[0]
    sequence = runtime.link.post(Operation.DECODE_WINDOW, DecodeWindow((), 1, len(PROMPT), first, 100))
    for _ in range(2):
        runtime.link.post(Operation.DECODE_WINDOW, DecodeWindow((), 1, count=3, follows=True))
    with pytest.raises(WireError):
        for _ in range(110):
            runtime.link.receive_stream(Operation.DECODE_WINDOW, sequence)


def test_only_the_last_frame_of_a_window_says_so(worker: StartedWorker, open_runtime: Runtime, llama: Path) -> None:
    runtime = open_runtime(worker, llama, msgspec.structs.replace(TOKEN, window=3))
    first = runtime.prefill(PROMPT, 0, Kind.SETUP).tokens[0]
    from semgap.wire.messages import DecodeWindow

    sequence = runtime.link.post(Operation.DECODE_WINDOW, DecodeWindow((), 1, len(PROMPT), first, 3))
    flags = [runtime.link.receive_stream(Operation.DECODE_WINDOW, sequence).flags for _ in range(3)]
    assert flags == [Flag.REPLY, Flag.REPLY, Flag.REPLY | Flag.LAST]


def test_a_window_of_no_steps_is_refused_and_nobody_waits_for_it(worker: StartedWorker, open_runtime: Runtime, llama: Path) -> None:
    runtime = open_runtime(worker, llama, TOKEN)
    first = runtime.prefill(PROMPT, 0, Kind.SETUP).tokens[0]
    sequence = runtime.link.post(Operation.DECODE_WINDOW, messages.DecodeWindow((), 1, len(PROMPT), first, 0))
    with pytest.raises(RemoteError, match="0 steps"):
        runtime.link.receive_stream(Operation.DECODE_WINDOW, sequence)
    assert len(list(runtime.decode(first, 1, Kind.SETUP))) == 1


def test_a_second_session_by_hash_uploads_nothing_and_computes_the_same(
    start_worker: Callable[..., StartedWorker], open_runtime: Runtime, llama: Path
) -> None:
    worker = start_worker()
    policy = policy_from({"weights": "by_hash"}, "by_hash")
    whole = sum(tensor.nbytes for tensor in load_digest(llama).tensors)
    replies, sent = [], []
    for _ in range(2):
        runtime = open_runtime(worker, llama, policy, upload=False)
        sent.append(runtime.upload_weights())
        logits = runtime.prefill(PROMPT, 0, Kind.SETUP).logits
        assert logits is not None
        replies.append(bytes(logits.data))
        runtime.link.close()
    assert sent == [whole, 0]
    assert replies[0] == replies[1]


def test_what_the_worker_holds_for_later_sessions_is_counted_apart_from_a_sessions_memory(
    start_worker: Callable[..., StartedWorker], open_runtime: Runtime, llama: Path
) -> None:
    worker, policy = start_worker(), policy_from({"weights": "by_hash"}, "by_hash")
    whole = sum(tensor.nbytes for tensor in load_digest(llama).tensors)
    earlier = open_runtime(worker, llama, Policy())
    open_runtime(worker, llama, policy)
    later = open_runtime(worker, llama, policy)
    held = [reconcile(runtime.link)["peer"]["weight_store_bytes"] for runtime in (earlier, later)]
    assert held[0] == held[1]  # also in a session that began before the upload
    assert whole < held[0] < whole + (1 << 16)  # an index besides
    assert reconcile(open_runtime(start_worker(), llama, Policy()).link)["peer"]["weight_store_bytes"] == 0


def _sink(nbytes: int) -> frames.Sink:
    """Memory of one weight of so many bytes."""
    return Weights([messages.WeightSpec("w", DType.U8, (nbytes,))], "cpu").sink(0)


def test_an_upload_that_had_to_go_is_not_held_any_more() -> None:
    store = WeightStore(budget_bytes=1000)
    held = []
    for letter in (b"a", b"b"):
        weight = memoryview(letter * 600)
        draft = store.begin({0: xxhash.xxh3_128_digest(weight)}, {0: weight.nbytes})
        fill(draft.through(0, _sink(weight.nbytes)), weight)
        draft.finish()
        store.take_in()
        held.append(store.held_bytes)
    assert 600 < held[0] == held[1] < 1000


def test_weights_that_are_not_what_their_hash_says_are_refused(
    start_worker: Callable[..., StartedWorker], open_runtime: Runtime, llama: Path
) -> None:
    worker = start_worker()
    runtime = open_runtime(worker, llama, policy_from({"weights": "by_hash"}, "by_hash"), upload=False)
    tampered = bytearray(runtime.weights[0].data)
    tampered[0] ^= 1
    object.__setattr__(runtime.weights[0], "data", memoryview(tampered))
    with pytest.raises(RemoteError, match="does not have the hash") as error:
        runtime.upload_weights()
    assert error.value.code == "hash"
    with pytest.raises(RemoteError, match="weights of the model have not been sent"):
        runtime.prefill(PROMPT, 0, Kind.SETUP)
    again = open_runtime(worker, llama, policy_from({"weights": "by_hash"}, "by_hash"), upload=False)
    assert again.upload_weights() == sum(tensor.nbytes for tensor in load_digest(llama).tensors)  # nothing false was kept


def _logits(tokens: list[int], last: np.ndarray, others: tuple[int, ...] = ()) -> Logits:
    steps = len(tokens)
    digests = np.zeros((1, steps), np.uint64)
    rows = np.broadcast_to(last, (1, steps, len(last))).astype(np.float32)
    return Logits(np.array([tokens]), digests, digests, rows, np.tile(np.array(others, np.int64), (1, steps, 1)))


@pytest.mark.parametrize(("token", "edge_draws"), [(3, 1), (4, 0)])
def test_a_draw_near_an_edge_excuses_the_token_beyond_it_and_no_other(token: int, edge_draws: int) -> None:
    reference, seen = _logits([5, 6, 7], np.ones(8), others=(3,)), _logits([5, token, 7], np.ones(8))
    summary = summarise(compare(reference, seen, False), "tokens")
    assert (summary["edge_draws"], summary["promise_kept"]) == (edge_draws, bool(edge_draws))


def test_a_promise_of_which_nothing_was_compared_is_not_kept() -> None:
    reference, seen = _logits([5, 6, 7], np.ones(8), others=(-1, 0)), _logits([0, 0, 0], np.ones(8))
    summary = summarise(compare(reference, seen, False), "tokens")
    assert (summary["tokens_compared"], summary["edge_draws"], summary["promise_kept"]) == (0, 1, False)


def test_logits_that_are_no_numbers_break_even_a_lossy_promise_and_overflow_does_not() -> None:
    reference = _logits([1, 1], np.ones(8))
    torn, overflown = np.ones(8), np.ones(8)
    torn[3], overflown[3] = np.nan, np.inf
    for last, kept in ((torn, False), (overflown, True)):
        summary = summarise(compare(reference, _logits([1, 1], last), False), "lossy")
        assert (summary["promise_kept"], summary["max_abs_diff"], summary["max_kl_nats"]) == (kept, None, None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"reply": {"kind": "hidden_last"}, "codec": {"reply": "topk"}, "keeps": "lossy"}, "does not accept reply"),
        ({"codec": {"reply": "topk"}, "keeps": "lossy"}, "codec.reply 'topk' needs its k"),
        ({"reply": {"kind": "topk", "k": 5}, "codec": {"reply": "fp16"}, "keeps": "lossy"}, "which has a form of its own; use raw"),
    ],
)
def test_a_codec_that_cannot_be_used_as_the_reply_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        policy_from(row, "m")
