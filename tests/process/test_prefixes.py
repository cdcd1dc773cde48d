"""Requests whose beginning another session has computed: every way to it, over real processes, and everything that can go wrong."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from kv_worlds import row_of, rows_alone
from links_to_kv_hosts import LinkToKVHost, relay_over

from semgap.client.remote_runtime import RemoteRuntime
from semgap.client.spec import Phase
from semgap.engine.model_files import load_digest
from semgap.kv.host import connect_kv
from semgap.kv.prefix_store import LAYER_BYTES, PREFIX_BLOCK_BYTES
from semgap.policy import CodecChoice, Policy, Reply
from semgap.wire import messages
from semgap.wire.link import RemoteError, control
from semgap.wire.messages import Kind, Operation
from semgap.wire.reconcile import reconcile

if TYPE_CHECKING:
    from started_workers import KVCluster, StartedWorker

Runtime = Callable[..., RemoteRuntime]
PROMPT = np.random.default_rng(5).integers(0, 512, 300)
LENGTH = 320
LAYERS = 3
KEPT_BYTES = 2 * 2 * 64 * 32 * 4  # a layer's block
TRIES = 20


@pytest.fixture(scope="module")
def alone(long_llama: Path) -> np.ndarray:
    """The last row of logits of the prompt where nothing ever moved."""
    return rows_alone(long_llama, PROMPT, 0)[0]


def _policy(prefix: str, kv: str = "raw", **more: Any) -> Policy:
    return Policy(reply=Reply("logits_last"), prefix=prefix, shadow="kvhost", codec=CodecChoice(kv=kv), **more)


@pytest.fixture
def opened(open_runtime: Runtime, long_llama: Path) -> Runtime:
    """A session with a worker, of a policy and maybe a salt."""

    def make(worker: StartedWorker, policy: Policy, **more: Any) -> RemoteRuntime:
        return open_runtime(worker, long_llama, policy, **({"max_length": LENGTH, "model_id": load_digest(long_llama).sha256} | more))

    return make


def _publish(runtime: RemoteRuntime, tokens: np.ndarray, request: int = 0) -> messages.Published:
    runtime.prefill(tokens, request, Kind.SETUP)
    published = runtime.publish()
    runtime.end_request()
    return published


def _last(runtime: RemoteRuntime) -> dict[str, Any]:
    """The worker's record of the last step."""
    record: dict[str, Any] = reconcile(runtime.link)["peer"]["steps"][-1]["recovered"]
    return record


@pytest.mark.parametrize(
    ("prefix", "kv", "how", "executor"),
    [
        ("fetch_whole", "raw", {"fetch_whole"}, "fused"),
        ("fetch_blocks", "raw", {"fetch_blocks"}, "fused"),
        ("fetch_blocks", "planes_zstd", {"fetch_blocks"}, "fused"),
        ("auto", "zstd", {"fetch_blocks", "recompute"}, "fused"),
        ("fetch_blocks", "raw", {"fetch_blocks"}, "eager"),
    ],
)
def test_exact_ways_give_bitwise_the_logits_of_the_run_that_never_moved(
    kv_pair: tuple[StartedWorker, StartedWorker], opened: Runtime, long_llama: Path, prefix: str, kv: str, how: set[str], executor: str
) -> None:
    """With eager a prefix's own shapes are others, so that last bits differ."""
    one, other = (opened(kv_pair[1], _policy(prefix, kv), salt=f"{prefix} {kv} {executor}", executor=executor) for _ in range(2))
    assert _publish(one, PROMPT[:270]) == messages.Published((), 4, 4)
    other.prefill(PROMPT[::-1].copy(), 0, Kind.SETUP)
    assert _last(other)["how"] == "recompute" and _last(other)["missing_bytes"] == 0
    for request, (length, blocks) in enumerate([(65, 1), (64, 0), (200, 3), (300, 4)], start=1):
        seen, expected = row_of(other.prefill(PROMPT[:length], request, Kind.REGULAR)), rows_alone(long_llama, PROMPT[:length], 0)[0]
        assert np.array_equal(seen, expected) if executor == "fused" else np.abs(seen - expected).max() < 1e-4
        record = _last(other)
        assert record["fallback"] is None and record["how"] == record["planned"]
        assert record["missing_bytes"] == blocks * LAYERS * KEPT_BYTES
        assert record["how"] in (how if blocks else {"recompute"})
        (decoded,) = other.decode(int(seen.argmax()), 1, Kind.REGULAR)  # the handle is whole
        assert np.isfinite(row_of(decoded)).all()


@pytest.mark.parametrize(("kv", "ratio"), [("raw", 1), ("planes_zstd", None), ("int8", None), ("int4", None)])
def test_no_more_bytes_cross_than_the_missing_tensors_over_the_codec_s_ratio(
    kv_pair: tuple[StartedWorker, StartedWorker], opened: Runtime, alone: np.ndarray, kv: str, ratio: int | None
) -> None:
    policy = _policy("fetch_blocks", kv, keeps="lossy" if kv.startswith("int") else "bitwise")
    _publish(opened(kv_pair[1], policy, salt=f"bytes {kv}"), PROMPT[:256])
    runtime = opened(kv_pair[1], policy, salt=f"bytes {kv}")
    seen = row_of(runtime.prefill(PROMPT, 0, Kind.REGULAR))
    books = reconcile(runtime.link)["peer"]
    (blocks,) = [row for row in books["kv_host"]["rows"] if row["operation"] == "fetch_prefix" and row["tensor_class"] == "kv"]
    missing = 4 * LAYERS * KEPT_BYTES
    record = books["steps"][-1]["recovered"]
    assert blocks["tensor_bytes"] == missing == record["missing_bytes"]
    assert ratio is None or blocks["payload_bytes"] * ratio == missing
    assert 0 < record["fetched_network_bytes"] - blocks["payload_bytes"] < 3000  # headers, names and token ids, of blocks of any size
    assert np.array_equal(seen, alone) if kv in ("raw", "planes_zstd") else 0 < np.abs(seen - alone).max() < 0.5


def test_sessions_of_several_workers_share_blocks_and_a_published_one_is_kept_once(
    kv_cluster: KVCluster, opened: Runtime, alone: np.ndarray
) -> None:
    host = kv_cluster.host()
    one, other = (opened(kv_cluster.worker(host.address), _policy("fetch_blocks")) for _ in range(2))
    _publish(one, PROMPT)
    assert np.array_equal(row_of(other.prefill(PROMPT, 0, Kind.REGULAR)), alone)
    assert _last(other)["how"] == "fetch_blocks" and _last(other)["missing_bytes"] == 4 * LAYERS * KEPT_BYTES
    used = _used_bytes(host)
    assert other.publish() == messages.Published((), 4, 4)  # those that it fetched
    assert _used_bytes(host) == used
    puts = [row for row in reconcile(other.link)["peer"]["kv_host"]["rows"] if row["operation"] == "put_prefix_block"]
    assert puts == []  # the KV host has them: none crosses again


def _used_bytes(host: StartedWorker) -> int:
    link = connect_kv(host.address, host.secret, 10.0)
    used: int = reconcile(link)["peer"]["used_bytes"]
    link.close()
    return used


def test_a_tenant_without_the_salt_finds_nothing_and_learns_nothing(
    kv_pair: tuple[StartedWorker, StartedWorker], opened: Runtime, alone: np.ndarray
) -> None:
    _publish(opened(kv_pair[1], _policy("fetch_blocks"), salt="of one tenant"), PROMPT)
    for salt, found in (("of another", 0), ("", 0), ("of one tenant", 4)):
        runtime = opened(kv_pair[1], _policy("fetch_blocks"), salt=salt)
        assert np.array_equal(row_of(runtime.prefill(PROMPT, 0, Kind.REGULAR)), alone)
        assert _last(runtime)["missing_bytes"] == found * LAYERS * KEPT_BYTES
        if not found:
            assert _last(runtime)["fetched_network_bytes"] < 2000  # the answer to a find, no block


@pytest.mark.parametrize(
    ("publisher", "reader"),
    [({"kv": "int8", "keeps": "lossy"}, {}), ({"executor": "eager"}, {"executor": "fused"}), ({"kv": "planes_zstd"}, {"kv": "zstd"})],
)
def test_a_session_never_gets_blocks_with_other_bits_than_its_own_and_exact_codecs_share(
    kv_pair: tuple[StartedWorker, StartedWorker], opened: Runtime, alone: np.ndarray, publisher: dict[str, str], reader: dict[str, str]
) -> None:
    exact, salt = "kv" in reader, f"{publisher} {reader}"
    one, other = (
        opened(kv_pair[1], _policy("fetch_blocks", **_without_executor(side)), salt=salt, executor=side.get("executor", "auto"))
        for side in (publisher, reader)
    )
    assert _publish(one, PROMPT[:270]) == messages.Published((), 4, 4)
    assert np.array_equal(row_of(other.prefill(PROMPT, 0, Kind.REGULAR)), alone)
    assert _last(other)["missing_bytes"] == (4 * LAYERS * KEPT_BYTES if exact else 0) and _last(other)["fallback"] is None


def _without_executor(side: dict[str, str]) -> dict[str, Any]:
    return {key: value for key, value in side.items() if key != "executor"}


def test_blocks_of_equal_weights_under_another_config_are_not_found_nor_taken_over(
    kv_pair: tuple[StartedWorker, StartedWorker], open_runtime: Runtime, long_llama: Path, other_theta: Path
) -> None:
    own: dict[str, Any] = {"max_length": LENGTH, "model_id": load_digest(long_llama).sha256, "salt": "theta"}
    one, other = (open_runtime(kv_pair[1], each, _policy("fetch_blocks"), **own) for each in (long_llama, other_theta))
    _publish(one, PROMPT)
    assert np.array_equal(row_of(other.prefill(PROMPT, 0, Kind.REGULAR)), rows_alone(other_theta, PROMPT, 0)[0])
    assert _last(other)["missing_bytes"] == 0
    handing = Policy(reply=Reply("logits_last"), recovery="delta", shadow="kvhost")
    one, other = (open_runtime(kv_pair[1], each, handing, **own) for each in (long_llama, other_theta))
    kv_id = one.hand_over()
    one.prefill(PROMPT, 0, Kind.REGULAR)
    assert one.flush(Kind.REGULAR).kept
    with pytest.raises(RemoteError, match="use the same model, dtype and lossy codec"):
        other.attach(kv_id, 0, PROMPT, Kind.REGULAR)


def test_a_full_kv_host_keeps_a_beginning_says_so_and_the_rest_is_computed(
    kv_cluster: KVCluster, opened: Runtime, alone: np.ndarray
) -> None:
    room = 3 * (PREFIX_BLOCK_BYTES + LAYERS * (LAYER_BYTES + KEPT_BYTES)) + 5000  # and the books of a handle
    worker = kv_cluster.worker(kv_cluster.host(budget_bytes=room).address)
    one, other = (opened(worker, _policy("fetch_blocks")) for _ in range(2))
    one.prefill(PROMPT, 0, Kind.SETUP)
    with pytest.raises(RemoteError, match=r"could not be published: the KV host: .* do not fit"):
        one.publish()
    assert np.array_equal(row_of(other.prefill(PROMPT, 0, Kind.REGULAR)), alone)
    assert _last(other)["missing_bytes"] == 3 * LAYERS * KEPT_BYTES and _last(other)["how"] == "fetch_blocks"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@pytest.mark.parametrize("revived", [True, False])
@pytest.mark.parametrize("prefix", ["fetch_blocks", "fetch_whole", "auto"])
def test_a_kv_host_that_is_killed_or_started_anew_costs_a_computation_and_no_wrong_token(
    kv_cluster: KVCluster, opened: Runtime, alone: np.ndarray, revived: bool, prefix: str
) -> None:
    host = kv_cluster.host("--listen", f"127.0.0.1:{_free_port()}")
    worker = kv_cluster.worker(host.address)
    one, other = (opened(worker, _policy(prefix)) for _ in range(2))
    _publish(one, PROMPT)
    os.kill(host.process.pid, signal.SIGKILL)
    host.process.wait()
    if revived:
        kv_cluster.host("--listen", host.address)
    for request in range(3):
        assert np.array_equal(row_of(other.prefill(PROMPT, request, Kind.REGULAR)), alone)
    fallbacks = [step["recovered"]["fallback"] for step in reconcile(other.link)["peer"]["steps"]]
    assert all((fallback is None) == (revived and request > 0) for request, fallback in enumerate(fallbacks))
    assert fallbacks[0].startswith("closed: the KV host: ")


def _flip(offset: int, data: bytes) -> bytes:
    """One bit within the first blocks that come."""
    at = 20_000 - offset
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :] if 0 <= at < len(data) else data


def _cut(offset: int, data: bytes) -> bytes:
    return data[: max(0, 20_000 - offset)]


@pytest.mark.parametrize(("spoil", "why"), [(_flip, "checksum"), (_cut, "truncated")])
@pytest.mark.parametrize("prefix", ["fetch_blocks", "fetch_whole"])
@pytest.mark.parametrize(("fallback", "delay_s"), [(True, 0.0), (False, 0.0), (True, 0.003), (False, 0.003)])
def test_a_fetch_that_fails_midway_gives_the_right_logits_or_a_clear_error_and_leaves_nothing(
    kv_cluster: KVCluster, opened: Runtime, alone: np.ndarray, spoil: Any, why: str, prefix: str, fallback: bool, delay_s: float
) -> None:
    link = LinkToKVHost(delay_s, spoil)
    with relay_over(kv_cluster.host().address, link) as address:
        worker = kv_cluster.worker(address)
        one, other = (opened(worker, _policy(prefix, fallback=fallback)) for _ in range(2))
        _publish(one, PROMPT)
        link.armed = True
        if not fallback:
            with pytest.raises(RemoteError, match="could not be restored: the KV host") as error:
                other.prefill(PROMPT, 0, Kind.REGULAR)
            assert error.value.code == "recovery"
        else:
            assert np.array_equal(row_of(other.prefill(PROMPT, 0, Kind.REGULAR)), alone)
            assert _last(other)["fallback"].startswith(f"{why}: the KV host") and _last(other)["how"] == "recompute"
        link.armed = False
        assert np.array_equal(row_of(other.prefill(PROMPT, 1, Kind.REGULAR)), alone)
        assert _last(other)["how"] == prefix and _last(other)["fallback"] is None


def test_a_link_that_stays_slower_than_computing_is_given_up_once_and_then_left_alone(
    kv_cluster: KVCluster, opened: Runtime, alone: np.ndarray
) -> None:
    link = LinkToKVHost()
    with relay_over(kv_cluster.host().address, link) as address:
        worker = kv_cluster.worker(address)
        one, other = (opened(worker, _policy("fetch_blocks")) for _ in range(2))
        _publish(one, PROMPT)
        other.prefill(PROMPT[::-1].copy(), 0, Kind.SETUP)  # the session knows how fast it computes
        link.delay_s = 0.9  # for each 64 KiB from here on, and the blocks are 1.6 MB
        answers = [row_of(other.prefill(PROMPT, request, Kind.REGULAR)) for request in (1, 2)]
        assert all(np.array_equal(answer, alone) for answer in answers)
        late, left_alone = [step["recovered"] for step in reconcile(other.link)["peer"]["steps"]][-2:]
    waited = r"late: \d of 3 layers came within 2\.0 s|deadline: .*not all blocks came in time"  # computing meanwhile, or not
    assert re.match(waited, late["fallback"]) and late["how"] == "recompute"
    assert left_alone["fallback"].startswith("slow: the blocks would take") and left_alone["how"] == "recompute"


def test_a_link_that_a_session_finds_too_slow_is_not_waited_for(kv_cluster: KVCluster, opened: Runtime, alone: np.ndarray) -> None:
    with relay_over(kv_cluster.host().address, LinkToKVHost(delay_s=0.6)) as address:  # 0.1 MB/s
        worker = kv_cluster.worker(address)
        one = opened(worker, _policy("fetch_blocks"))
        _publish(one, PROMPT)
        assert np.array_equal(row_of(one.prefill(PROMPT, 1, Kind.REGULAR)), alone)
        record, books = _last(one), reconcile(one.link)["peer"]
        assert record["fallback"].startswith("slow: the blocks would take") and record["how"] == "recompute"
        assert books["kv_host"]["agreed"] and books["fallbacks"] == [record["fallback"]]  # no link broke


@pytest.mark.parametrize("way", ["fetch_blocks", "fetch_whole"])
def test_twenty_requests_beside_others_that_push_their_blocks_out_get_the_right_logits(
    kv_cluster: KVCluster, opened: Runtime, alone: np.ndarray, way: str
) -> None:
    room = 5 * (PREFIX_BLOCK_BYTES + LAYERS * (LAYER_BYTES + KEPT_BYTES)) + 5000
    worker = kv_cluster.worker(kv_cluster.host(budget_bytes=room).address)
    one, other = (opened(worker, _policy(way)) for _ in range(2))
    found = set()
    for number in range(TRIES):
        _publish(one, PROMPT[: 64 * (1 + number % 4)], number)
        if number % 3:
            _publish(one, (PROMPT[: 64 * (1 + number % 3)] + number) % 512, 100 + number)
        assert np.array_equal(row_of(other.prefill(PROMPT, number, Kind.REGULAR)), alone)
        found.add(_last(other)["missing_bytes"] // (LAYERS * KEPT_BYTES))
        other.end_request()
    assert len(found) > 1 and reconcile(other.link)["peer"]["fallbacks"] == []


def test_a_session_without_prefixes_publishes_nothing_and_says_so(kv_pair: tuple[StartedWorker, StartedWorker], opened: Runtime) -> None:
    runtime = opened(kv_pair[1], Policy(reply=Reply("logits_last"), shadow="kvhost"))
    runtime.prefill(PROMPT, 0, Kind.SETUP)
    with pytest.raises(RemoteError, match="this session fetches no prefixes; open it with prefix: fetch_blocks"):
        runtime.publish()


@pytest.mark.parametrize(
    ("operation", "header", "code"),
    [
        (Operation.FETCH_PREFIX, messages.FetchPrefix((), 1), "gone"),
        (Operation.FIND_PREFIX, messages.FindPrefix((), bytes(32), None, (b"n" * 16,)), "place"),
        (Operation.PUT_PREFIX_BLOCK, messages.PutPrefixBlock((), bytes(32), None, b"n" * 16), "place"),
    ],
)
def test_a_request_out_of_place_is_refused_and_the_link_goes_on(
    kv_pair: tuple[StartedWorker, StartedWorker], operation: Operation, header: messages.Header, code: str
) -> None:
    link = connect_kv(kv_pair[0].address, kv_pair[0].secret, 10.0)
    with pytest.raises(RemoteError) as error:
        link.request(operation, header, [control(b"12345678")] if operation is not Operation.FETCH_PREFIX else [])
    assert error.value.code == code
    assert reconcile(link)["peer"]["used_bytes"] >= 0
    link.close()


def test_a_prefix_is_fetched_beside_a_handle_that_must_make_room_and_both_stay_right(
    kv_pair: tuple[StartedWorker, StartedWorker], opened: Runtime, alone: np.ndarray
) -> None:
    """The pool fits one handle; the other one's blocks go to the KV host and come back."""
    _publish(opened(kv_pair[1], _policy("fetch_blocks"), salt="room"), PROMPT)
    phase = Phase("recovery", (300,), live_requests=2, kv_budget=0.5)
    runtime = opened(kv_pair[1], _policy("fetch_blocks"), salt="room", phase=phase)
    for request in (0, 1):
        assert np.array_equal(row_of(runtime.prefill(PROMPT, request, Kind.REGULAR)), alone)
    record = _last(runtime)
    assert record["how"] == "fetch_blocks" and record["saved_network_bytes"] > 4 * LAYERS * KEPT_BYTES
    decoded = []
    for request in (0, 1):
        runtime.select(request)
        decoded += [row_of(arrival) for arrival in runtime.decode(int(alone.argmax()), 1, Kind.REGULAR)]
    assert np.array_equal(*decoded)
