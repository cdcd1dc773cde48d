"""Workers that keep KV blocks in a KV host: real processes, three model families, and everything that can go wrong between them."""

from __future__ import annotations

import os
import signal
import socket
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from links_to_kv_hosts import LinkToKVHost, relay_over

from semgap import codecs
from semgap.client.local_runtime import LocalRuntime
from semgap.client.pressure import layers_to_evict
from semgap.client.probe import ping
from semgap.client.remote_runtime import RemoteRuntime
from semgap.client.runtime import Drawing
from semgap.client.spec import ClientError, Phase
from semgap.engine.model_files import ModelFiles, load_digest
from semgap.kv.block_store import BLOCK_BYTES, HANDLE_BYTES, BlockStore
from semgap.kv.host import connect_kv
from semgap.kv.host_shadow import KVHostShadow
from semgap.kv.shadow import ShadowError
from semgap.kv.transfer import InPlaceTransfer
from semgap.policy import CodecChoice, Policy, Reply
from semgap.tensors import DType, Tensor, TensorClass
from semgap.wire import frames, messages
from semgap.wire.handshake import AuthError
from semgap.wire.link import Link, Refused, RemoteError
from semgap.wire.messages import Kind, Operation
from semgap.wire.reconcile import reconcile

if TYPE_CHECKING:
    from started_workers import KVCluster, StartedWorker

Runtime = Callable[..., RemoteRuntime]
PROMPT = np.arange(3, 70) % 512  # more than a block
STEPS = 6
LAST = Reply("logits_last")


def _local_logits(model: Path, prompt: np.ndarray = PROMPT, steps: int = STEPS) -> list[np.ndarray]:
    """The last row of logits of each step of the run that was never evicted, and so its tokens."""
    policy = Policy(placement="local", reply=LAST)
    runtime = LocalRuntime(policy, ModelFiles(model, load_digest(model)), Drawing(), threads=1, max_length=90, device="cpu", setup={})
    arrival = runtime.prefill(prompt, 0, Kind.SETUP)
    rows = [_row(arrival.logits)]
    for _ in range(steps):
        (arrival,) = runtime.decode(arrival.tokens[0], 1, Kind.SETUP)
        rows.append(_row(arrival.logits))
    return rows


def _row(logits: Tensor | None) -> np.ndarray:
    assert logits is not None
    return logits.as_float32()[-1].copy()


def _decode(runtime: RemoteRuntime, rows: list[np.ndarray], steps: range, fraction: float = 0.5) -> list[np.ndarray]:
    """Decode steps that are fed the reference's tokens, before each of which layers are evicted; the logits that came."""
    seen = []
    for step in steps:
        layers = layers_to_evict(2, fraction, step)
        if layers:
            runtime.evict(layers)
        (arrival,) = runtime.decode(int(rows[step].argmax()), 1, Kind.REGULAR)
        seen.append(_row(arrival.logits))
    return seen


def _open(open_runtime: Runtime, worker: StartedWorker, model: Path, policy: Policy, **more: Any) -> RemoteRuntime:
    return open_runtime(worker, model, policy, max_length=90, model_id=load_digest(model).sha256, **more)


def _policy(recovery: str, shadow: str = "kvhost", kv: str = "raw", **more: Any) -> Policy:
    shadow = "worker" if recovery == "recompute" else shadow
    return Policy(reply=LAST, recovery=recovery, shadow=shadow, codec=CodecChoice(kv=kv), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "gptj", "gpt2"])
@pytest.mark.parametrize(
    ("recovery", "kv"), [("reload", "raw"), ("recompute", "raw"), ("delta", "raw"), ("delta", "planes_zstd"), ("auto", "zstd")]
)
@pytest.mark.parametrize("shadow", ["worker", "kvhost"])
def test_exact_ways_back_give_bitwise_the_logits_of_the_run_that_was_never_evicted(
    kv_pair: tuple[StartedWorker, StartedWorker], model_of: Any, open_runtime: Runtime, family: str, recovery: str, kv: str, shadow: str
) -> None:
    model = model_of(family)
    rows = _local_logits(model)
    for fraction in (0.5, 1.0):
        runtime = _open(open_runtime, kv_pair[1], model, _policy(recovery, shadow, kv))
        first = runtime.prefill(PROMPT, 0, Kind.SETUP)
        seen = [_row(first.logits), *_decode(runtime, rows, range(STEPS), fraction)]
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(seen, rows, strict=True))
        steps = _steps(runtime)
        assert [step["recovered"]["fallback"] for step in steps[1:]] == [None] * STEPS
        if recovery != "auto":
            assert {step["recovered"]["how"] for step in steps[1:]} == {recovery}


def _worst(seen: list[np.ndarray], rows: list[np.ndarray]) -> float:
    return max(float(np.abs(ours - theirs).max()) for ours, theirs in zip(seen, rows[1:], strict=True))


@pytest.mark.parametrize("kv", ["fp16_zlib", "int8", "int4"])
def test_lossy_codecs_come_close(kv_pair: tuple[StartedWorker, StartedWorker], llama: Path, open_runtime: Runtime, kv: str) -> None:
    rows = _local_logits(llama)
    runtime = _open(open_runtime, kv_pair[1], llama, _policy("delta", kv=kv, keeps="lossy"))
    runtime.prefill(PROMPT, 0, Kind.SETUP)
    assert 0 < _worst(_decode(runtime, rows, range(STEPS)), rows) < 0.2


@pytest.mark.parametrize(("executor", "least", "most"), [("fused", 0.0, 0.0), ("eager", 1e-9, 1e-4)])
def test_recompute_by_prefill_is_bitwise_in_fused_and_within_rounding_in_eager(
    kv_pair: tuple[StartedWorker, StartedWorker], llama: Path, open_runtime: Runtime, executor: str, least: float, most: float
) -> None:
    rows = _local_logits(llama)
    runtime = _open(open_runtime, kv_pair[1], llama, _policy("recompute", keeps="tokens"), executor=executor)
    runtime.prefill(PROMPT, 0, Kind.SETUP)
    assert least <= _worst(_decode(runtime, rows, range(STEPS)), rows) <= most


def _steps(runtime: RemoteRuntime) -> list[dict[str, Any]]:
    return reconcile(runtime.link)["peer"]["steps"]


@pytest.mark.parametrize("recovery", ["reload", "recompute", "delta", "auto"])
@pytest.mark.parametrize("budget", [1.0, 0.5, 0.25])
def test_sessions_that_overrun_the_budget_in_turn_get_the_logits_of_runs_with_room(
    kv_pair: tuple[StartedWorker, StartedWorker], llama: Path, open_runtime: Runtime, recovery: str, budget: float
) -> None:
    prompts = [PROMPT + request for request in range(4)]
    rows = [_local_logits(llama, prompt, 3) for prompt in prompts]
    phase = Phase("recovery", (67,), requests=4, steps=3, live_requests=4, kv_budget=budget)
    runtime = _open(open_runtime, kv_pair[1], llama, _policy(recovery), phase=phase)
    for request, prompt in enumerate(prompts):
        assert np.array_equal(_row(runtime.prefill(prompt, request, Kind.SETUP).logits), rows[request][0])
    for step in range(3):
        for request in range(4):
            runtime.select(request)
            (arrival,) = runtime.decode(int(rows[request][step].argmax()), 1, Kind.REGULAR)
            assert np.array_equal(_row(arrival.logits), rows[request][step + 1])
    peer = reconcile(runtime.link)["peer"]
    assert peer["kv_budget_bytes"] == int(budget * 4) * 3 * 2 * 2 * 90 * 32 * 4
    missed = [step["recovered"] is not None for step in peer["steps"][4:]]
    assert all(missed) if budget < 1 else not any(missed)
    moves = {"put_kv_blocks": "saved_network_bytes", "fetch_missing_kv_layers": "fetched_network_bytes"}
    for operation, column in moves.items() if recovery != "recompute" else ():
        rows_of_link = [row for row in peer["kv_host"]["rows"] if row["operation"] == operation]
        in_steps = sum(step["recovered"][column] for step in peer["steps"] if step["recovered"])
        assert in_steps == sum(row["payload_bytes"] + row["header_bytes"] for row in rows_of_link)
    for request in range(4):
        runtime.select(request)
        runtime.end_request()


def test_a_window_restores_at_its_first_step_and_goes_on(
    kv_pair: tuple[StartedWorker, StartedWorker], llama: Path, open_runtime: Runtime
) -> None:
    policy = Policy(reply=Reply("token"), keeps="tokens", window=4, recovery="delta", shadow="kvhost")
    runtime = _open(open_runtime, kv_pair[1], llama, policy)
    tokens = [int(row.argmax()) for row in _local_logits(llama)]
    assert runtime.prefill(PROMPT, 0, Kind.SETUP).tokens == (tokens[0],)
    runtime.evict([0, 1, 2])
    drawn = [token for arrival in runtime.decode(tokens[0], 4, Kind.REGULAR) for token in arrival.tokens]
    assert drawn == tokens[1:5]
    assert [step["recovered"] is not None for step in _steps(runtime)] == [False, True, False, False, False]


def test_a_window_that_cannot_be_leaves_the_link_to_the_kv_host_whole(
    kv_pair: tuple[StartedWorker, StartedWorker], llama: Path, open_runtime: Runtime
) -> None:
    policy = Policy(reply=Reply("token"), keeps="tokens", window=4, recovery="delta", shadow="kvhost")
    runtime = _open(open_runtime, kv_pair[1], llama, policy)
    runtime.prefill(PROMPT, 0, Kind.SETUP)
    runtime.evict([0, 1, 2])
    with pytest.raises(RemoteError, match=r"ids in 0\.\.511"):
        next(runtime.decode(512, 4, Kind.REGULAR))
    assert reconcile(runtime.link)["peer"]["kv_host"]["agreed"]


def test_the_books_of_the_worker_and_its_kv_host_agree_and_keep_delta_apart(
    kv_pair: tuple[StartedWorker, StartedWorker], llama: Path, open_runtime: Runtime
) -> None:
    runtime = _open(open_runtime, kv_pair[1], llama, _policy("delta"))
    runtime.prefill(PROMPT, 0, Kind.SETUP)
    _decode(runtime, _local_logits(llama), range(2), fraction=0.5)
    host = reconcile(runtime.link)["peer"]["kv_host"]
    assert host["agreed"] and host["reason"] is None
    delta = [row for row in host["rows"] if row["kind"] == "delta"]
    assert {(row["operation"], row["direction"]) for row in delta if row["tensor_class"] == "kv"} == {
        ("put_kv_blocks", "up"),
        ("fetch_missing_kv_layers", "down"),
    }
    one_position = 2 * 2 * 32 * 4
    fetched = sum(row["tensor_bytes"] for row in delta if row["direction"] == "down")
    assert fetched == one_position * (67 + 68)  # one layer, before each of two steps
    by_kind = host["peer"]["frame_bytes_by_kind"]
    assert by_kind["delta"] == sum(row["payload_bytes"] + row["header_bytes"] for row in delta)


def test_delta_bytes_are_in_proportion_to_what_is_missing_and_clean_evictions_move_none(
    kv_pair: tuple[StartedWorker, StartedWorker], llama: Path, open_runtime: Runtime
) -> None:
    runtime = _open(open_runtime, kv_pair[1], llama, _policy("delta"))
    runtime.prefill(PROMPT, 0, Kind.SETUP)
    whole = 3 * 67 * 2 * 2 * 32 * 4
    assert runtime.evict([0, 1, 2]).saved_tensor_bytes == whole
    for layers in ([1], [0, 2], [0, 1, 2]):
        runtime.restore()
        assert runtime.evict(layers).saved_payload_bytes == 0
        before = runtime.link.ledger.copy_rows()
        assert before
    runtime.restore()
    host = reconcile(runtime.link)["peer"]["kv_host"]
    fetch = [row for row in host["rows"] if row["operation"] == "fetch_missing_kv_layers" and row["direction"] == "down"]
    assert sum(row["payload_bytes"] for row in fetch) == whole * (3 + 1 + 2 + 3) // 3


@pytest.mark.parametrize("tls", [False, True])
def test_a_link_that_the_host_ended_with_a_word_is_made_anew_by_the_next_use(kv_cluster: KVCluster, tls: bool) -> None:
    host = kv_cluster.host("--idle-s", "0.3", *(["--tls"] if tls else []))
    shadow = KVHostShadow(lambda: connect_kv(host.address, host.secret, 10.0, tls), LAYOUT, InPlaceTransfer())
    shadow.probe()
    time.sleep(1)
    with pytest.raises(ShadowError, match="no whole frame in time") as error:
        shadow.probe()
    assert error.value.code == "deadline" and shadow.broken_links == 1
    shadow.probe()
    shadow.close()


def test_a_stale_writer_that_finds_a_host_started_anew_first_does_not_shut_out_the_writer() -> None:
    store = BlockStore(1 << 20)
    for epoch in (1, 2):  # as the host before had granted them, the second by a take-over
        assert store.open(messages.OpenKV((), b"k" * 16, LAYOUT, epoch))[0] == epoch
    with pytest.raises(Refused, match="belongs to another worker now") as error:
        store.open(messages.OpenKV((), b"k" * 16, LAYOUT, 1))
    assert error.value.code == "fenced"


def test_a_stale_writer_that_opens_a_dropped_handle_again_does_not_shut_out_the_writer() -> None:
    store = BlockStore(1 << 20)
    store.open(messages.OpenKV((), b"k" * 16, LAYOUT, 1))  # by the stale writer, after the budget dropped what its successor had opened
    put = messages.PutKVBlocks(frames.tensor_headers([_block()]), b"k" * 16, 2, ONE)
    with pytest.raises(Refused, match="is not kept here") as error:
        store.put(put, [memoryview(bytes(4))])
    assert error.value.code == "unknown" and store.open(messages.OpenKV((), b"k" * 16, LAYOUT, 2))[0] == 2
    assert store.put(put, [memoryview(bytes(4))]) > 0


def _is_unknown(link: Link, kv_id: bytes) -> bool:
    with pytest.raises(RemoteError) as error:
        link.request(Operation.DROP_KV, messages.DropKV((), kv_id, 0))
    return error.value.code == "unknown"  # else fenced


def test_a_handle_ends_with_the_connection_that_opened_it_last(kv_cluster: KVCluster, wait_until: Callable[..., None]) -> None:
    host = kv_cluster.host()
    first, second = (connect_kv(host.address, host.secret, 10.0) for _ in range(2))
    for kv_id in (b"a" * 16, b"b" * 16):
        first.request(Operation.OPEN_KV, messages.OpenKV((), kv_id, LAYOUT, 0, True, True))
    second.request(Operation.OPEN_KV, messages.OpenKV((), b"a" * 16, LAYOUT, 1, False, True))  # its writer again, over a new link
    first.close()
    wait_until(lambda: _is_unknown(second, b"b" * 16), "the KV host drops the first connection's handle")
    assert not _is_unknown(second, b"a" * 16)
    third = connect_kv(host.address, host.secret, 10.0)
    second.close()
    wait_until(lambda: _is_unknown(third, b"a" * 16), "the KV host drops the second connection's handle")


def test_handles_that_end_with_a_connection_take_no_memory_beside_the_budget() -> None:
    store, opener = BlockStore(100 * HANDLE_BYTES), object()
    tracemalloc.start()
    try:
        for number in range(3000):
            store.open(messages.OpenKV((), number.to_bytes(16, "big"), LAYOUT, 0, True, True), opener)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert store.used_bytes == 100 * HANDLE_BYTES and taken < store.budget_bytes
    store.end(opener)
    assert store.used_bytes == 0


def test_two_hosts_give_a_handles_blocks_different_versions() -> None:
    put = messages.PutKVBlocks(frames.tensor_headers([_block()]), b"k" * 16, 1, ONE)
    stores = [BlockStore(1 << 20) for _ in range(2)]
    for store in stores:
        store.open(messages.OpenKV((), b"k" * 16, LAYOUT))
    first, second = (store.put(put, [memoryview(bytes(4))]) for store in stores)
    assert first != second and all(0 < version < 1 << 32 for version in (first, second))


FAR = 0.003  # over a path of this delay a fetch is worth overlapping with the layers before


@pytest.mark.parametrize("family", ["llama", "gptj", "gpt2"])
@pytest.mark.parametrize("kv", ["raw", "planes_zstd"])
def test_blocks_that_come_from_afar_while_layers_compute_give_the_same_bits(
    kv_cluster: KVCluster, model_of: Any, open_runtime: Runtime, family: str, kv: str
) -> None:
    model = model_of(family)
    rows = _local_logits(model)
    with relay_over(kv_cluster.host().address, LinkToKVHost(FAR)) as address:
        runtime = _open(open_runtime, kv_cluster.worker(address), model, _policy("delta", kv=kv))
        runtime.prefill(PROMPT, 0, Kind.SETUP)
        seen = [*_decode(runtime, rows, range(3)), *_decode(runtime, rows, range(3, STEPS), 1.0)]
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(seen, rows[1:], strict=True))
        assert {step["recovered"]["how"] for step in _steps(runtime)[1:]} == {"delta"}


def _flip(offset: int, data: bytes) -> bytes:
    """One bit within the first blocks that come back."""
    at = 20_000 - offset
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :] if 0 <= at < len(data) else data


def _cut(offset: int, data: bytes) -> bytes:
    return data[: max(0, 20_000 - offset)]


@pytest.mark.parametrize(("spoil", "why"), [(_flip, "checksum"), (_cut, "truncated")])
@pytest.mark.parametrize("recovery", ["delta", "reload"])
@pytest.mark.parametrize(("fallback", "delay_s"), [(True, 0.0), (False, 0.0), (True, FAR), (False, FAR)])
def test_a_restore_that_fails_midway_gives_the_right_logits_or_a_clear_error(
    kv_cluster: KVCluster, llama: Path, open_runtime: Runtime, spoil: Any, why: str, recovery: str, fallback: bool, delay_s: float
) -> None:
    rows, path = _local_logits(llama), LinkToKVHost(delay_s, spoil)
    with relay_over(kv_cluster.host().address, path) as address:
        runtime = _open(open_runtime, kv_cluster.worker(address), llama, _policy(recovery, fallback=fallback))
        runtime.prefill(PROMPT, 0, Kind.SETUP)
        runtime.evict([0, 1, 2])
        path.armed = True
        if not fallback:
            with pytest.raises(RemoteError, match="handle 1 could not be restored: the KV host") as error:
                runtime.decode(int(rows[0].argmax()), 1, Kind.REGULAR).__next__()
            assert error.value.code == "recovery"
            return
        (arrival,) = runtime.decode(int(rows[0].argmax()), 1, Kind.REGULAR)
        assert np.array_equal(_row(arrival.logits), rows[1])
        peer = reconcile(runtime.link)["peer"]
        (reason,) = peer["fallbacks"]
        assert reason.startswith(f"{why}: the KV host") and peer["steps"][-1]["recovered"]["fallback"] == reason
        assert not peer["kv_host"]["agreed"] and "links to the KV host broke" in peer["kv_host"]["reason"]


@pytest.mark.parametrize("revived", [True, False])
def test_a_kv_host_that_is_killed_costs_a_recompute_and_no_wrong_token(
    kv_cluster: KVCluster, llama: Path, open_runtime: Runtime, revived: bool
) -> None:
    rows = _local_logits(llama)
    host = kv_cluster.host("--listen", f"127.0.0.1:{_free_port()}")
    runtime = _open(open_runtime, kv_cluster.worker(host.address), llama, _policy("delta"))
    runtime.prefill(PROMPT, 0, Kind.SETUP)
    runtime.evict([1])
    os.kill(host.process.pid, signal.SIGKILL)
    host.process.wait()
    if revived:
        kv_cluster.host("--listen", host.address)
    seen = _decode(runtime, rows, range(STEPS))
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(seen, rows[1:], strict=True))
    fallbacks = reconcile(runtime.link)["peer"]["fallbacks"]
    assert len(fallbacks) == 2 if revived else len(fallbacks) >= STEPS  # a save that failed, and the step that then misses its blocks


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_blocks_that_the_host_had_no_room_for_are_recomputed(kv_cluster: KVCluster, llama: Path, open_runtime: Runtime) -> None:
    rows = _local_logits(llama)
    block = 2 * 2 * 64 * 32 * 4
    host = kv_cluster.host(budget_bytes=4 * block)
    runtime = _open(open_runtime, kv_cluster.worker(host.address), llama, _policy("delta"))
    runtime.prefill(PROMPT, 0, Kind.SETUP)
    runtime.evict([0, 1, 2])  # three full blocks and three short ones fit; a second handle's push the oldest out
    other = _open(open_runtime, kv_cluster.worker(host.address), llama, _policy("delta"))
    other.prefill(PROMPT, 0, Kind.SETUP)
    other.evict([0, 1, 2])
    (arrival,) = runtime.decode(int(rows[0].argmax()), 1, Kind.REGULAR)
    assert np.array_equal(_row(arrival.logits), rows[1])
    peer = reconcile(runtime.link)["peer"]
    assert peer["fallbacks"] == ["gone: the KV host: block 0 of layer 0 is not kept here (any more)"]
    assert peer["kv_host"]["agreed"]
    (arrival,) = other.decode(int(rows[0].argmax()), 1, Kind.REGULAR)
    assert np.array_equal(_row(arrival.logits), rows[1]) and reconcile(other.link)["peer"]["fallbacks"] == []


def test_a_handle_that_the_host_dropped_is_opened_anew_by_its_next_save(kv_cluster: KVCluster, llama: Path, open_runtime: Runtime) -> None:
    rows = _local_logits(llama)
    longer = np.arange(len(PROMPT) + STEPS)  # as long as the first one's text at its end
    host = kv_cluster.host(budget_bytes=HANDLE_BYTES + 3 * (2 * BLOCK_BYTES + len(longer) * 2 * 2 * 32 * 4))
    one, other = (_open(open_runtime, kv_cluster.worker(host.address), llama, _policy("delta")) for _ in range(2))
    one.prefill(PROMPT, 0, Kind.SETUP)
    one.evict([0, 1, 2])
    other.prefill(longer, 0, Kind.SETUP)
    other.evict([0, 1, 2])  # its blocks push out all of the first one
    seen = _decode(one, rows, range(2), fraction=0) + _decode(one, rows, range(2, STEPS), fraction=1)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(seen, rows[1:], strict=True))
    (fallback,) = reconcile(one.link)["peer"]["fallbacks"]
    assert fallback.startswith("unknown: the KV host: handle")


LAYOUT = messages.KVLayout("model", DType.F32, 3, 2, 32, 90, 64)


def _block(positions: int = 64, dtype: type = np.float32) -> codecs.Encoded:
    return codecs.encode(Tensor.from_numpy(np.ones((1, 2, 2, positions, 32), dtype), TensorClass.KV), "raw")


ONE = ((0, 0),)


def _open_kv(layout: messages.KVLayout | None, kv_id: bytes = b"k" * 16, new: bool = True) -> tuple[Operation, messages.Header]:
    return Operation.OPEN_KV, messages.OpenKV((), kv_id, layout, 0, new)


def _put(kv_id: bytes, epoch: int, places: tuple[tuple[int, int], ...]) -> tuple[Operation, messages.Header]:
    return Operation.PUT_KV_BLOCKS, messages.PutKVBlocks((), kv_id, epoch, places)


def _follow(layout: messages.KVLayout | None, positions: int = 70, kv_id: bytes = b"k" * 16) -> tuple[Operation, messages.Header]:
    return Operation.FOLLOW_KV, messages.FollowKV((), kv_id, layout, positions)


OTHER_MODEL = messages.KVLayout("other", DType.F32, 3, 2, 32, 90, 64)
HUGE = messages.KVLayout("model", DType.F32, 1 << 16, 1, 1, 1 << 20, 64)
FINE = messages.KVLayout("model", DType.F32, 1, 1, 1, 1 << 28, 1)
FETCH = (Operation.FETCH_MISSING_KV_LAYERS, messages.FetchMissing((), b"k" * 16, 1))


@pytest.mark.parametrize(
    ("asked", "tensors", "code", "message"),
    [
        (_open_kv(LAYOUT, b"z" * 16, False), [], "unknown", "is not kept here"),
        (_open_kv(OTHER_MODEL), [], "layout", "use the same model"),
        (_open_kv(HUGE, b"y" * 16), [], "layout", "layers x positions"),
        (_open_kv(FINE, b"y" * 16), [], "layout", "layers x blocks; use larger blocks"),
        (_open_kv(None, b"y" * 16), [], "layout", "opened with the layout of its blocks"),
        (_put(b"k" * 16, 0, ONE), [_block()], "fenced", "belongs to another worker"),
        (_put(b"k" * 16, 9, ONE), [_block()], "unknown", "is not kept here"),
        (_put(b"z" * 16, 1, ONE), [_block()], "unknown", "is not kept here"),
        (_put(b"k" * 16, 1, ((3, 0),)), [_block()], "place", "block 0 of layer 3"),
        (_put(b"k" * 16, 1, ((0, 0), (0, 1))), [_block()], "place", "1 blocks came for 2 places"),
        ((Operation.PUT_KV_BLOCKS, messages.PutKVBlocks((), b"k" * 16, 1, ONE, (1, 2))), [_block()], "place", "2 digests of texts came"),
        (_put(b"k" * 16, 1, ONE), [_block(65)], "place", "with 65 positions"),
        (_put(b"k" * 16, 1, ONE), [_block(64, np.float16)], "layout", "the handle's are F32"),
        (_put(b"k" * 16, 1, ((0, 0), (1, 0))), [_block()] * 2, "budget", "70,144 bytes of blocks and their books are more"),
        (FETCH, np.ones((2, 2)), "mask", r"a mask of shape \(2, 2\)"),
        (FETCH, np.zeros((3, 2)), "mask", "selects no block"),
        (FETCH, np.ones((3, 2)), "gone", "block 0 of layer 0"),
        (FETCH, [], "mask", "takes one mask"),
        ((Operation.DROP_KV, messages.DropKV((), b"k" * 16, 0)), [], "fenced", "belongs to another worker"),
        (_follow(None), [], "layout", "followed with the layout"),
        (_follow(OTHER_MODEL), [], "layout", "use the same model"),
        (_follow(LAYOUT, 91), [], "place", "91 positions are more than the handle's 90"),
        (_follow(LAYOUT, kv_id=b"z" * 16), [], "unknown", "is not kept here"),
    ],
)
def test_what_cannot_be_is_refused_by_the_host_and_the_connection_goes_on(
    kv_cluster: KVCluster, asked: tuple[Operation, messages.Header], tensors: Any, code: str, message: str
) -> None:
    host = kv_cluster.host(budget_bytes=40_000)
    link = connect_kv(host.address, host.secret, 10.0)
    link.request(Operation.OPEN_KV, messages.OpenKV((), b"k" * 16, LAYOUT))
    if isinstance(tensors, np.ndarray):
        tensors = [codecs.encode(Tensor.from_numpy(tensors.astype(np.uint8), TensorClass.CONTROL), "raw")]
    with pytest.raises(RemoteError, match=message) as error:
        link.request(*asked, tensors)
    assert error.value.code == code
    assert reconcile(link, "KV host")["peer"]["used_bytes"] == HANDLE_BYTES
    link.close()


@pytest.mark.parametrize("ends", ["all layers", "another request", "a drop"])
def test_who_follows_a_handle_gets_each_layer_once_it_is_whole_until_something_else(
    kv_pair: tuple[StartedWorker, StartedWorker], ends: str
) -> None:
    writer, reader = (connect_kv(kv_pair[0].address, kv_pair[0].secret, 10.0) for _ in range(2))
    kv_id = os.urandom(16)
    writer.request(Operation.OPEN_KV, messages.OpenKV((), kv_id, LAYOUT))
    sequence = reader.post(*_follow(LAYOUT, kv_id=kv_id))

    def followed() -> messages.KVFollowed:
        return reader.receive_stream(Operation.FOLLOW_KV, sequence).header_as(messages.KVFollowed)

    def written(*places: tuple[int, int]) -> int:
        blocks = [_block(64 if block == 0 else 6) for _, block in places]
        return writer.request(*_put(kv_id, 1, places), blocks).header_as(messages.KVPut).version

    second = written((1, 0), (1, 1), (2, 0))
    first = [written((0, 1)), written((0, 0))]
    assert followed() == messages.KVFollowed(frames.tensor_headers([_block(), _block(6)]), 0, (0, 1), tuple(reversed(first)))
    came = followed()
    assert (came.layer, came.blocks, came.versions) == (1, (0, 1), (second, second))
    assert not reader.has_input(), "half of layer 2 is not there"
    if ends == "all layers":
        assert (written((2, 1)), followed().layer, followed().blocks) == (second + 3, 2, ())
    elif ends == "another request":
        reader.post(Operation.CANCEL)
        assert followed().blocks == ()
    else:
        writer.request(Operation.DROP_KV, messages.DropKV((), kv_id, 1))
        with pytest.raises(RemoteError, match="is not kept here"):
            followed()
    assert reconcile(reader, "KV host")["peer"]
    if ends != "a drop":
        writer.request(Operation.DROP_KV, messages.DropKV((), kv_id, 1))
    for link in (writer, reader):
        link.close()


def test_a_client_has_the_worker_ping_its_kv_host_before_and_after_it_has_blocks_there(
    kv_pair: tuple[StartedWorker, StartedWorker], llama: Path, open_runtime: Runtime
) -> None:
    _, worker = kv_pair
    runtime = open_runtime(worker, llama, Policy(shadow="kvhost"), model_id="m")
    for link in (worker.session(), runtime.link):
        for sizes in ((64, 0), (1 << 20, 1 << 20)):
            pinged = link.request(Operation.PING_KV_HOST, messages.PingKVHost((), *sizes)).header_as(messages.KVHostPinged)
            assert pinged.took_ns > 0
        with pytest.raises(RemoteError, match="ping for 300000000 bytes is over the limit") as error:
            link.request(Operation.PING_KV_HOST, messages.PingKVHost((), 0, 300_000_000))
        assert error.value.code == "ping"
    books = reconcile(runtime.link)["peer"]["kv_host"]  # the second link's pings were over the blocks' own
    filler = sum(row["payload_bytes"] for row in books["rows"] if row["operation"] == "ping" and row["direction"] == "up")
    assert books["agreed"] and filler == 64 + (1 << 20)


def test_a_worker_without_a_kv_host_says_so_to_who_would_have_it_pinged(worker: StartedWorker) -> None:
    with pytest.raises(RemoteError, match="this worker has no KV host to ping; start it with --kv-host HOST:PORT") as error:
        worker.session().request(Operation.PING_KV_HOST, messages.PingKVHost((), 64, 0))
    assert error.value.code == "kv_host"


def test_a_kv_host_that_is_gone_ends_no_session_that_pings_it(kv_cluster: KVCluster) -> None:
    host = kv_cluster.host()
    link = kv_cluster.worker(host.address).session()
    link.request(Operation.PING_KV_HOST, messages.PingKVHost((), 64, 0))
    host.process.kill()
    host.process.wait()
    for _ in range(2):
        with pytest.raises(RemoteError, match="the worker's KV host does not answer") as error:
            link.request(Operation.PING_KV_HOST, messages.PingKVHost((), 64, 0))
        assert error.value.code == "kv_host"
    ping(link, 64, 64)


def test_who_has_no_secret_or_takes_a_worker_for_a_host_gets_nowhere(kv_pair: tuple[StartedWorker, StartedWorker]) -> None:
    host, worker = kv_pair
    with pytest.raises(AuthError, match=f"the KV host at {host.address} does not hold this worker's secret"):
        connect_kv(host.address, b"x" * 64, 10.0)
    with pytest.raises(RemoteError, match=f"{worker.address} is no KV host; start one with `semgap kvhost`"):
        connect_kv(worker.address, worker.secret, 10.0)
    with pytest.raises(RemoteError, match="this is a KV host"):
        host.session()


def test_a_mode_that_wants_a_kv_host_is_refused_where_there_is_none(
    worker: StartedWorker, kv_cluster: KVCluster, llama: Path, open_runtime: Runtime
) -> None:
    with pytest.raises(RemoteError, match="start it with --kv-host HOST:PORT"):
        _open(open_runtime, worker, llama, _policy("delta"))
    with pytest.raises(RemoteError, match="names its model by model_id"):
        open_runtime(kv_cluster.worker(kv_cluster.host().address), llama, _policy("delta"), max_length=90)
    lonely = kv_cluster.worker(f"127.0.0.1:{_free_port()}")
    with pytest.raises(RemoteError, match=r"the KV host: no KV host answers at .*; start one with `semgap kvhost`"):
        _open(open_runtime, lonely, llama, _policy("delta"))


@pytest.mark.parametrize(
    ("header", "code", "message"),
    [
        (messages.Evict((), 9, (0,)), "handle", "handle 9 is not open"),
        (messages.Evict((), 1, (3,)), "request", r"name layers 0\.\.2"),
        (messages.Evict((), 1), "evict", "names one layer or more"),
    ],
)
def test_an_eviction_that_cannot_be_is_refused_and_the_handle_is_as_before(
    worker: StartedWorker, llama: Path, open_runtime: Runtime, header: messages.Evict, code: str, message: str
) -> None:
    rows = _local_logits(llama)
    runtime = _open(open_runtime, worker, llama, Policy(reply=LAST))
    runtime.prefill(PROMPT, 0, Kind.SETUP)
    with pytest.raises(RemoteError, match=message) as error:
        runtime.link.request(Operation.EVICT, header)
    assert error.value.code == code
    evicted = runtime.link.request(Operation.EVICT, messages.Evict((), 1, (0, 2))).header
    assert isinstance(evicted, messages.Evicted) and evicted.slabs == 2
    assert np.array_equal(_decode(runtime, rows, range(1), fraction=0)[0], rows[1])


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="this machine has a GPU, and what is tested is that it has none")
def test_a_worker_and_a_client_without_a_gpu_refuse_its_codec_by_name(
    kv_pair: tuple[StartedWorker, StartedWorker], llama: Path, open_runtime: Runtime
) -> None:
    said = "'nvcomp_ans' cannot be encoded or decoded by the"
    with pytest.raises(RemoteError, match=rf"codec\.kv {said} worker: there is no usable GPU") as told:
        _open(open_runtime, kv_pair[1], llama, _policy("delta", kv="nvcomp_ans"))
    assert told.value.code == "codec"
    with pytest.raises(ClientError, match=rf"codec\.reply {said} client: there is no usable GPU"):
        _open(open_runtime, kv_pair[1], llama, Policy(reply=LAST, codec=CodecChoice(reply="nvcomp_ans")))
