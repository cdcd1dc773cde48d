"""A prefill on one worker whose request goes on at another: exactness, bytes, and everything that can go wrong between them."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
from links_to_kv_hosts import LinkToKVHost, relay_over
from test_kv_host import PROMPT, _local_logits, _open, _policy, _row, _steps

from semgap import codecs
from semgap.client.remote_runtime import RemoteRuntime
from semgap.kv.block_store import BLOCK_BYTES, HANDLE_BYTES
from semgap.kv.host import connect_kv
from semgap.policy import Reply
from semgap.tensors import Tensor, TensorClass
from semgap.wire import messages
from semgap.wire.link import RemoteError
from semgap.wire.messages import Kind, Operation
from semgap.wire.reconcile import reconcile

if TYPE_CHECKING:
    from started_workers import KVCluster, StartedWorker

pytestmark = pytest.mark.alone
Runtime = Callable[..., RemoteRuntime]
WHOLE = 3 * 2 * 2 * 67 * 32 * 4  # layers, keys and values, KV heads, positions, head_dim, float32
TRIES = 3


@contextlib.contextmanager
def relay(to: str, rate: str) -> Iterator[str]:
    """A slow link in front of a KV host; gives its address."""
    command = [sys.executable, "-m", "semgap", "relay", "--to", to, "--delay-ms", "0.5", "--rate", rate]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["address"]
    finally:
        process.kill()
        process.wait()


def begun(one: RemoteRuntime, expecting: RemoteRuntime | None = None) -> tuple[bytes, np.ndarray]:
    """A request that is promised to another worker, after its prefill: its name, and its first logits."""
    kv_id = one.hand_over()
    if expecting:
        expecting.expect(kv_id, len(PROMPT))
    return kv_id, _row(one.prefill(PROMPT, 0, Kind.REGULAR).logits)


def taken(one: RemoteRuntime, other: RemoteRuntime, kv_id: bytes) -> messages.Flushed:
    """Moves a begun request, as the client of a trial does."""
    flushed = one.flush(Kind.REGULAR)
    other.attach(kv_id if flushed.kept else None, 0, PROMPT, Kind.REGULAR)
    one.end_request()
    return flushed


def decoded(runtime: RemoteRuntime, rows: list[np.ndarray], steps: int = 3) -> bool:
    """True if the next steps have bitwise the logits of the run that never moved."""
    seen = [_row(next(iter(runtime.decode(int(rows[step].argmax()), 1, Kind.REGULAR))).logits) for step in range(steps)]
    return all(np.array_equal(ours, theirs) for ours, theirs in zip(seen, rows[1:], strict=False))


def is_known(host: StartedWorker, kv_id: bytes) -> bool:
    """True if the KV host still has the handle: it then says who its writer is, and nothing changes."""
    link = connect_kv(host.address, host.secret, 10.0)
    mask = codecs.encode(Tensor.from_numpy(np.ones((3, 2), dtype=np.uint8), TensorClass.CONTROL), "raw")
    try:
        with pytest.raises(RemoteError) as error:
            link.request(Operation.FETCH_MISSING_KV_LAYERS, messages.FetchMissing((), kv_id, 0), [mask])
        assert error.value.code in ("fenced", "unknown")
        return error.value.code == "fenced"
    finally:
        link.close()


@pytest.mark.parametrize("family", ["llama", "gptj", "gpt2"])
@pytest.mark.parametrize(("recovery", "kv"), [("reload", "raw"), ("delta", "raw"), ("delta", "planes_zstd"), ("auto", "zstd")])
def test_a_request_that_moves_has_bitwise_the_logits_of_the_run_that_never_moved(
    kv_pair: tuple[StartedWorker, StartedWorker], model_of: Any, open_runtime: Runtime, family: str, recovery: str, kv: str
) -> None:
    model = model_of(family)
    rows = _local_logits(model)
    one, other = (_open(open_runtime, kv_pair[1], model, _policy(recovery, kv=kv)) for _ in range(2))
    kv_id, first = begun(one)
    flushed = taken(one, other, kv_id)
    assert np.array_equal(first, rows[0]) and decoded(other, rows)
    assert flushed.kept and flushed.payload_bytes <= flushed.network_bytes <= 1.01 * flushed.payload_bytes + 3 * 1000
    assert flushed.after_ns >= 0 and flushed.sent_ns > 0
    step = _steps(other)[0]["recovered"]
    assert step["how"] == ("reload" if recovery == "reload" else "delta") and step["fallback"] is None


@pytest.mark.parametrize("family", ["llama", "gptj", "gpt2"])
@pytest.mark.parametrize(("recovery", "kv"), [("delta", "raw"), ("delta", "planes_zstd"), ("auto", "zstd")])
def test_a_request_that_is_expected_is_there_when_it_is_attached_with_the_same_bits_and_bytes(
    kv_pair: tuple[StartedWorker, StartedWorker], model_of: Any, open_runtime: Runtime, family: str, recovery: str, kv: str
) -> None:
    model = model_of(family)
    rows = _local_logits(model)
    one, other = (_open(open_runtime, kv_pair[1], model, _policy(recovery, kv=kv)) for _ in range(2))
    for _ in range(TRIES):
        kv_id, first = begun(one, other)
        flushed = one.flush(Kind.REGULAR)
        other.attach(kv_id, 0, PROMPT, Kind.REGULAR)  # what is on its way then is decoded, or fetched, with the step
        assert np.array_equal(first, rows[0]) and decoded(other, rows)
        step = next(row["recovered"] for row in reversed(_steps(other)) if row["recovered"])
        assert (step["how"], step["fallback"], step["missing_bytes"]) == ("delta", None, flushed.tensor_bytes)
        assert flushed.payload_bytes < step["fetched_network_bytes"] < 1.01 * flushed.payload_bytes + 3000
        assert kv in step["kv_codecs"] or recovery == "auto"
        for each in (one, other):
            each.end_request()
    assert all(reconcile(each.link)["peer"]["kv_host"]["agreed"] for each in (one, other))


@pytest.mark.parametrize("full", [False, True])
def test_whatever_else_the_second_worker_does_ends_what_it_expected_and_the_rest_comes_with_the_step(
    kv_cluster: KVCluster, llama: Path, open_runtime: Runtime, full: bool
) -> None:
    host, rows, path = kv_cluster.host(), _local_logits(llama), LinkToKVHost()
    with relay_over(host.address, path) as slow:
        first, second = kv_cluster.worker(slow), kv_cluster.worker(host.address)
        one, other = (_open(open_runtime, each, llama, _policy("delta", kv="planes_zstd")) for each in (first, second))
        path.delay_s = 0.5  # of each layer's acknowledgement, after which the next one is sent
        kv_id, _ = begun(one, other)
        if full:  # a second handle takes the memory of the expected one
            other.prefill(PROMPT, 7, Kind.REGULAR)
            assert decoded(other, rows, 2)
        else:
            time.sleep(0.3)  # the first layer is there, the last one is not
            assert reconcile(other.link)["peer"]["kv_host"]["agreed"]
        assert one.flush(Kind.REGULAR).kept
        missing = other.attach(kv_id, 0, PROMPT, Kind.REGULAR)
        assert missing == 6 if full else 0 < missing < 6
        assert decoded(other, rows)
        step = next(row["recovered"] for row in reversed(_steps(other)) if row["recovered"])
        assert (step["missing_bytes"], step["fallback"]) == (WHOLE, None)
    assert reconcile(other.link)["peer"]["kv_host"]["agreed"]


def test_what_is_expected_and_never_comes_holds_nobody_up(
    kv_cluster: KVCluster, llama: Path, open_runtime: Runtime, wait_until: Callable[..., None]
) -> None:
    host, rows = kv_cluster.host(), _local_logits(llama)
    worker = kv_cluster.worker(host.address)
    one, other, third = (_open(open_runtime, worker, llama, _policy("delta")) for _ in range(3))
    for _ in range(TRIES):
        other.expect(one.hand_over(), len(PROMPT))  # and another one before it came
    kv_id, _ = begun(one, other)
    assert taken(one, other, kv_id).kept and decoded(other, rows)
    other.end_request()
    other.expect(one.hand_over(), len(PROMPT))
    other.attach(None, 0, PROMPT, Kind.REGULAR)
    assert decoded(other, rows)
    other.expect(one.hand_over(), len(PROMPT))
    assert reconcile(other.link)["peer"]["kv_host"]["agreed"]
    kv_id = third.hand_over()
    other.expect(kv_id, len(PROMPT))
    third.link.close()
    wait_until(lambda: not is_known(host, kv_id), "its promise ends with it")
    other.attach(kv_id, 1, PROMPT, Kind.REGULAR)
    assert decoded(other, rows)
    assert "6 missing blocks" in next(row["recovered"]["fallback"] for row in reversed(_steps(other)) if row["recovered"])
    assert sum("is not kept here" in each for each in reconcile(other.link)["peer"]["fallbacks"]) == 2, "what was followed, and the attach"
    other.expect(bytes(16), len(PROMPT))
    assert "is not kept here" in reconcile(other.link)["peer"]["fallbacks"][-1], "nobody promised it"


def test_bytes_of_what_was_expected_and_dropped_are_in_the_record_of_the_next_handle(
    kv_cluster: KVCluster, llama: Path, open_runtime: Runtime
) -> None:
    host, rows = kv_cluster.host(), _local_logits(llama)
    one, other = (_open(open_runtime, kv_cluster.worker(host.address), llama, _policy("delta")) for _ in range(2))
    begun(one, other)
    one.flush(Kind.REGULAR)
    other.attach(None, 0, PROMPT, Kind.REGULAR)
    assert decoded(other, rows)
    peer = reconcile(other.link)["peer"]
    fetched = sum(row["payload_bytes"] + row["header_bytes"] for row in peer["kv_host"]["rows"] if row["operation"] == "follow_kv")
    (step,) = [each["recovered"] for each in peer["steps"] if each["recovered"]]
    assert (step["fetched_network_bytes"], step["missing_bytes"], step["kv_codecs"]) == (fetched, WHOLE, None)


def test_blocks_of_other_tokens_than_those_that_were_expected_are_computed(
    kv_pair: tuple[StartedWorker, StartedWorker], llama: Path, open_runtime: Runtime
) -> None:
    rows = _local_logits(llama)
    one, other = (_open(open_runtime, kv_pair[1], llama, _policy("delta", keeps="tokens")) for _ in range(2))
    kv_id = one.hand_over()
    other.expect(kv_id, len(PROMPT))
    one.prefill(np.append(PROMPT[:-1], 1), 0, Kind.REGULAR)
    one.flush(Kind.REGULAR)
    assert other.attach(kv_id, 0, PROMPT, Kind.REGULAR) >= 3, "the last block of each layer"
    (arrival,) = other.decode(int(rows[0].argmax()), 1, Kind.REGULAR)
    assert np.abs(_row(arrival.logits) - rows[1]).max() < 1e-4


def test_recompute_sends_nothing_and_runs_the_tokens_again_on_the_other_worker(
    kv_pair: tuple[StartedWorker, StartedWorker], llama: Path, open_runtime: Runtime
) -> None:
    rows = _local_logits(llama)
    one, other = (_open(open_runtime, kv_pair[1], llama, _policy("recompute", keeps="tokens")) for _ in range(2))
    one.prefill(PROMPT, 0, Kind.REGULAR)
    assert other.attach(None, 0, PROMPT, Kind.REGULAR) == 3 * 2
    assert decoded(other, rows)
    step = _steps(other)[0]["recovered"]
    assert (step["how"], step["fallback"], step["missing_bytes"]) == ("recompute", None, WHOLE)


@pytest.mark.parametrize("kv", ["int8", "int4"])
def test_lossy_codecs_come_close_and_take_fewer_bytes(
    kv_pair: tuple[StartedWorker, StartedWorker], llama: Path, open_runtime: Runtime, kv: str
) -> None:
    rows = _local_logits(llama)
    one, other = (_open(open_runtime, kv_pair[1], llama, _policy("delta", kv=kv, keeps="lossy")) for _ in range(2))
    kv_id, _ = begun(one)
    flushed = taken(one, other, kv_id)
    (arrival,) = other.decode(int(rows[0].argmax()), 1, Kind.REGULAR)
    assert 0 < np.abs(_row(arrival.logits) - rows[1]).max() < 0.2
    assert flushed.tensor_bytes == WHOLE and flushed.network_bytes < 0.5 * WHOLE


def test_auto_sends_nothing_over_a_link_on_which_computing_again_is_sooner(
    kv_cluster: KVCluster, llama: Path, open_runtime: Runtime
) -> None:
    host, rows = kv_cluster.host(), _local_logits(llama)
    with relay(host.address, "8Mbit") as slow:
        first, second = kv_cluster.worker(slow), kv_cluster.worker(host.address)
        one, other = (_open(open_runtime, each, llama, _policy("auto")) for each in (first, second))
        one.prefill(PROMPT, 9, Kind.SETUP)  # tells how fast it computes
        one.end_request()
        kv_id, _ = begun(one)
        flushed = taken(one, other, kv_id)
        assert not flushed.kept and flushed.network_bytes == 0 and flushed.fallback is None, "a choice is no fallback"
        assert decoded(other, rows)
    assert not is_known(host, kv_id)


def test_a_link_slower_than_compute_delays_the_next_token_and_changes_none(
    kv_cluster: KVCluster, llama: Path, open_runtime: Runtime
) -> None:
    host, rows = kv_cluster.host(), _local_logits(llama)
    path = LinkToKVHost()
    with relay_over(host.address, path) as slow:
        first, second = kv_cluster.worker(slow), kv_cluster.worker(host.address)
        one, other = (_open(open_runtime, each, llama, _policy("delta")) for each in (first, second))
        path.delay_s = 0.1  # of each layer's acknowledgement
        for _ in range(TRIES):
            kv_id, _ = begun(one)
            flushed = taken(one, other, kv_id)
            assert flushed.kept and flushed.sent_ns > 3e8 and flushed.after_ns > 1e8
            assert decoded(other, rows, 1)
            other.end_request()
            assert not is_known(host, kv_id)


def _drawn(runtime: RemoteRuntime, token: int) -> list[int]:
    return [each for arrival in runtime.decode(token, 4, Kind.REGULAR) for each in arrival.tokens]


@pytest.mark.parametrize(("recovery", "kv"), [("delta", "raw"), ("delta", "planes_zstd"), ("reload", "raw")])
def test_what_the_first_worker_decodes_or_drops_before_the_flush_costs_the_other_one_nothing(
    kv_cluster: KVCluster, llama: Path, open_runtime: Runtime, recovery: str, kv: str
) -> None:
    host, path = kv_cluster.host(), LinkToKVHost()
    policy = msgspec.structs.replace(_policy(recovery, kv=kv, keeps="tokens"), reply=Reply("token"), window=4)
    with relay_over(host.address, path) as slow:
        one, other = (_open(open_runtime, kv_cluster.worker(address), llama, policy) for address in (slow, host.address))
        path.delay_s = 0.1  # of each layer's acknowledgement
        expected = None
        for kept in (67, 40):
            kv_id = one.hand_over()
            (token,) = one.prefill(PROMPT, 0, Kind.REGULAR).tokens
            if kept < len(PROMPT):
                one.rewind(kept)
            drawn = _drawn(one, token)
            expected = expected or drawn
            assert one.flush(Kind.REGULAR).kept
            fed = PROMPT if recovery == "delta" else np.append(PROMPT[:kept], [token, *drawn[:3]])
            other.attach(kv_id, 0, fed, Kind.REGULAR)
            assert recovery == "reload" or _drawn(other, token) == expected
            assert recovery == "delta" or _drawn(other, drawn[3]) == _drawn(one, drawn[3])
            assert [step["recovered"]["fallback"] for step in _steps(other) if step["recovered"]] == [None] * (1 if kept == 67 else 2)
            for each in (one, other):
                each.end_request()


@pytest.mark.parametrize("fallback", [True, False])
def test_a_full_kv_host_costs_a_recompute_or_is_a_clear_error(
    kv_cluster: KVCluster, llama: Path, open_runtime: Runtime, fallback: bool
) -> None:
    rows = _local_logits(llama)
    host = kv_cluster.host(budget_bytes=HANDLE_BYTES + 2 * (BLOCK_BYTES + WHOLE // 6) - 1)  # not even a layer
    worker = kv_cluster.worker(host.address)
    one, other = (_open(open_runtime, worker, llama, _policy("delta", fallback=fallback)) for _ in range(2))
    for _ in range(TRIES):
        kv_id, _ = begun(one)
        if not fallback:
            with pytest.raises(RemoteError, match=r"could not be saved: the KV host: .* bytes of blocks") as error:
                one.flush(Kind.REGULAR)
            assert error.value.code == "recovery"
            one.end_request()
        else:
            flushed = taken(one, other, kv_id)
            assert not flushed.kept and "bytes of blocks" in (flushed.fallback or "")
            assert decoded(other, rows, 1)
            other.end_request()
        assert not is_known(host, kv_id)
    if fallback:
        assert len(reconcile(one.link)["peer"]["fallbacks"]) == TRIES, "after the first refusal nothing more is sent"


def test_a_kv_host_that_drops_the_first_layers_to_keep_the_last_costs_a_recompute(
    kv_cluster: KVCluster, llama: Path, open_runtime: Runtime
) -> None:
    rows = _local_logits(llama)
    host = kv_cluster.host(budget_bytes=HANDLE_BYTES + 5 * (BLOCK_BYTES + 64 * 2 * 2 * 32 * 4) // 2)
    one, other = (_open(open_runtime, kv_cluster.worker(host.address), llama, _policy("delta")) for _ in range(2))
    kv_id, _ = begun(one)
    assert taken(one, other, kv_id).kept
    assert decoded(other, rows)
    assert "were never saved" in _steps(other)[0]["recovered"]["fallback"]


def test_who_took_over_is_the_only_writer(kv_cluster: KVCluster, llama: Path, open_runtime: Runtime) -> None:
    rows = _local_logits(llama)
    worker = kv_cluster.worker(kv_cluster.host().address)
    one, other = (_open(open_runtime, worker, llama, _policy("delta")) for _ in range(2))
    kv_id, _ = begun(one)
    one.flush(Kind.REGULAR)
    other.attach(kv_id, 0, PROMPT, Kind.REGULAR)
    next(iter(one.decode(int(rows[0].argmax()), 1, Kind.REGULAR)))
    with pytest.raises(RemoteError, match="belongs to another worker now"):
        one.evict([0])
    one.end_request()  # drops nothing of the other's
    assert decoded(other, rows)


def test_requests_that_stay_and_requests_that_move_take_turns(
    kv_pair: tuple[StartedWorker, StartedWorker], llama: Path, open_runtime: Runtime
) -> None:
    rows = _local_logits(llama)
    one, other = (_open(open_runtime, kv_pair[1], llama, _policy("delta", kv="planes_zstd")) for _ in range(2))
    for request in itertools.islice(itertools.cycle((True, False)), 6):
        if request:
            kv_id, first = begun(one)
            one.link.post(Operation.PING, messages.Ping())  # whatever comes while layers are on their way waits for them
            one.link.await_reply(Operation.PING)
            taken(one, other, kv_id)
            assert decoded(other, rows)
            other.end_request()
        else:
            first = _row(one.prefill(PROMPT, 1, Kind.REGULAR).logits)
            assert decoded(one, rows)
            one.end_request()
        assert np.array_equal(first, rows[0])


def test_what_cannot_be_handed_over_is_refused_and_the_session_goes_on(
    kv_pair: tuple[StartedWorker, StartedWorker], llama: Path, open_runtime: Runtime
) -> None:
    rows = _local_logits(llama)
    lonely = _open(open_runtime, kv_pair[1], llama, _policy("delta", shadow="worker"))
    with pytest.raises(RemoteError, match="this session has no KV host"):
        lonely.hand_over()
    finding = _open(open_runtime, kv_pair[1], llama, msgspec.structs.replace(_policy("delta"), prefix="fetch_blocks"))
    with pytest.raises(RemoteError, match="this session fetches prefixes, which do not go to another worker"):
        finding.hand_over()
    finding.prefill(PROMPT, 0, Kind.REGULAR)
    assert finding.evict((0, 1)).slabs == 2 and decoded(finding, rows)
    one = _open(open_runtime, kv_pair[1], llama, _policy("delta"))
    one.prefill(PROMPT, 0, Kind.SETUP)
    with pytest.raises(RemoteError, match="was not to be handed over"):
        one.flush(Kind.SETUP)
    with pytest.raises(RemoteError, match="91 positions are expected in a cache of 1 to 90"):
        one.expect(bytes(16), 91)
    with pytest.raises(RemoteError, match="recovery reload fetches no layers"):
        _open(open_runtime, kv_pair[1], llama, _policy("reload")).expect(bytes(16), 60)
    with pytest.raises(RemoteError, match="this session has no KV host"):
        lonely.expect(bytes(16), 60)
    with pytest.raises(RemoteError, match="tokens came for a cache of 1 to 90"):
        one.attach(None, 1, np.zeros(91, dtype=np.int64), Kind.SETUP)
    one.select(0)
    assert decoded(one, rows)
