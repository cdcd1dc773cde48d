"""What a client with the secret may do wrong: it is refused by name, and the worker, the KV host and the relay serve the next one."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import psutil
import pytest
import xxhash
import yaml

from semgap import codecs
from semgap.client.probe import ping
from semgap.client.remote_runtime import RemoteRuntime
from semgap.engine import build_limits
from semgap.engine.architecture import ModelError
from semgap.kv.block_store import BlockStore
from semgap.kv.host import connect_kv
from semgap.policy import Batching, CodecChoice, Policy, Reply, SessionSpec
from semgap.tensors import DType, Tensor, TensorClass
from semgap.wire import messages
from semgap.wire.frames import Limits
from semgap.wire.handshake import shake_hands_as_client
from semgap.wire.link import Refused, RemoteError, connect, control
from semgap.wire.messages import Kind, Operation, WeightSpec
from semgap.wire.tcp import Timeouts
from semgap.worker import session_limits

if TYPE_CHECKING:
    from started_workers import KVCluster, StartedWorker

Runtime = Callable[..., RemoteRuntime]
TINY = {"model_type": "llama", "vocab_size": 16, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
TINY_WEIGHTS = (
    ("model.embed_tokens.weight", (16, 4)),
    ("model.layers.0.self_attn.q_proj.weight", (4, 4)),
    ("model.layers.0.self_attn.k_proj.weight", (4, 4)),
    ("model.layers.0.self_attn.v_proj.weight", (4, 4)),
    ("model.layers.0.self_attn.o_proj.weight", (4, 4)),
    ("model.layers.0.mlp.gate_proj.weight", (4, 4)),
    ("model.layers.0.mlp.up_proj.weight", (4, 4)),
    ("model.layers.0.mlp.down_proj.weight", (4, 4)),
    ("model.layers.0.input_layernorm.weight", (4,)),
    ("model.layers.0.post_attention_layernorm.weight", (4,)),
    ("model.norm.weight", (4,)),
    ("lm_head.weight", (16, 4)),
)


def tiny_session(**fields: Any) -> SessionSpec:
    return SessionSpec(**({"policy": Policy(), "model": TINY, "max_length": 8} | fields))


def upload_tiny(link: Any, value: float) -> tuple[int, ...]:
    """Uploads a tiny model by hash, all of whose weights are `value`. Gives the weights that the worker wanted."""
    tensors = [Tensor.from_numpy(np.full(shape, value, np.float32), TensorClass.WEIGHTS) for _, shape in TINY_WEIGHTS]
    offer = messages.OfferWeights((), tuple(WeightSpec(name, DType.F32, shape) for name, shape in TINY_WEIGHTS))
    hashes = b"".join(xxhash.xxh3_128_digest(bytes(tensor.data)) for tensor in tensors)
    wanted = link.request(Operation.OFFER_WEIGHTS, offer, [control(hashes)]).header_as(messages.WantWeights).indices
    if wanted:
        sent = [codecs.encode(tensors[index], "raw") for index in wanted]
        link.request(Operation.PUT_WEIGHTS, messages.PutWeights((), wanted, True), sent)
    return wanted


def test_uploads_by_hash_leave_no_more_descriptors_than_the_worker_allows(start_worker: Callable[..., StartedWorker]) -> None:
    worker = start_worker()
    listener = psutil.Process(worker.process.pid)
    resource.prlimit(worker.process.pid, resource.RLIMIT_NOFILE, (listener.num_fds() + 70, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    link = worker.session(tiny_session(policy=Policy(weights="by_hash")))
    for number in range(1, 82):
        assert upload_tiny(link, number)
    link.close()
    assert worker.process.poll() is None
    again = worker.session(tiny_session(policy=Policy(weights="by_hash")))
    assert not upload_tiny(again, 81)  # the latest are kept
    assert upload_tiny(again, 1)
    again.close()
    assert "could not" not in worker.log.read_text()


def test_a_worker_that_had_no_descriptor_left_serves_whoever_waited_once_it_has(
    start_worker: Callable[..., StartedWorker], wait_until: Callable[..., None]
) -> None:
    worker = start_worker()
    pid, before = worker.process.pid, resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (psutil.Process(pid).num_fds(), before[1]))
    link = worker.link()
    wait_until(lambda: "could not take a connection" in worker.log.read_text(), "the worker has no descriptor for it")
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    shake_hands_as_client(link, worker.secret, msgspec.to_builtins(SessionSpec()))
    link.close()


def test_a_worker_takes_every_planted_wait_that_a_config_may_have() -> None:
    schema = yaml.safe_load((Path(__file__).resolve().parents[2] / "workflow/schemas/config.schema.yaml").read_text())
    assert schema["$defs"]["mode"]["properties"]["plant_us"]["maximum"] == session_limits._MOST_PLANT_US


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_length": 0}, "max_length is 0; a session with a model needs 1 or more"),
        ({"max_length": -1}, "max_length is -1"),
        ({"model": None, "max_length": -1}, "max_length is -1"),
        ({"handles": 257}, "a session of 257 handles; without batching it has at most 256"),
        ({"policy": Policy(plant_us=10**12)}, "plant_us is 1000000000000; use 0 to 10000000"),
        ({"policy": Policy(window=0)}, "window 0, coalesce 1; each must be 1 or more"),
        ({"policy": Policy(coalesce=-1)}, "window 1, coalesce -1"),
        ({"policy": Policy(reply=Reply("topk"))}, "reply.k is None with reply.kind topk"),
        ({"policy": Policy(reply=Reply("topk", -5))}, "reply.k is -5"),
    ],
)
def test_a_session_out_of_bounds_is_refused(worker: StartedWorker, fields: dict[str, Any], message: str) -> None:
    link = worker.link()
    with pytest.raises(RemoteError, match=message) as error:
        shake_hands_as_client(link, worker.secret, msgspec.to_builtins(tiny_session(**fields)))
    assert error.value.code == "session"
    link.close()


@pytest.mark.parametrize(
    ("kv", "message"), [("nonsense", "codec 'nonsense' is not one for kv"), ("compact", "codec 'compact' is not one for kv")]
)
def test_a_codec_that_a_class_cannot_have_is_refused(worker: StartedWorker, kv: str, message: str) -> None:
    link = worker.link()
    with pytest.raises(RemoteError, match=message) as error:
        shake_hands_as_client(link, worker.secret, msgspec.to_builtins(tiny_session(policy=Policy(codec=CodecChoice(kv=kv)))))
    assert error.value.code == "codec"
    link.close()


def test_a_session_with_batching_may_name_more_handles(worker: StartedWorker) -> None:
    worker.session(tiny_session(policy=Policy(reply=Reply("token"), keeps="tokens", batching=Batching()), handles=4096)).close()


def test_a_session_holds_64_handles_open_or_as_many_as_it_asked_for(worker: StartedWorker, open_runtime: Runtime, llama: Path) -> None:
    runtime = open_runtime(worker, llama, Policy())
    for request in range(64):
        runtime.prefill(np.array([1, 2]), request, Kind.SETUP)
    with pytest.raises(RemoteError, match="64 handles are open, the most that this session may hold; release one") as error:
        runtime.prefill(np.array([1, 2]), 64, Kind.SETUP)
    assert error.value.code == "handle"
    runtime.select(0)
    runtime.end_request()
    runtime.prefill(np.array([1, 2]), 65, Kind.SETUP)


def _kv(array: np.ndarray, dtype: DType | None = None) -> codecs.Encoded:
    return codecs.encode(Tensor.from_numpy(array, TensorClass.KV, dtype), "raw")


@pytest.mark.parametrize(
    ("kv", "code", "message"),
    [
        (_kv(np.zeros(3 * 2 * 2 * 2 * 32, np.float32)), "request", "a KV cache of shape"),
        (_kv(np.zeros((), np.float32)), "request", "a KV cache of shape"),
        (_kv(np.zeros((3, 2, 2, 2, 31), np.float32)), "request", "does not fit"),
        (_kv(np.zeros((3, 2, 2, 2, 32), np.float16)), "forward", "a KV cache of F16 came, the session computes in F32"),
        (_kv(np.zeros((3, 2, 2, 2, 32), np.uint16), DType.BF16), "forward", "a KV cache of BF16 came"),
        (_kv(np.zeros((3, 2, 2, 2, 32), np.int64)), "forward", "a KV cache of I64 came"),
    ],
)
def test_a_kv_cache_of_another_form_is_refused_and_the_session_goes_on(
    worker: StartedWorker, open_runtime: Runtime, llama: Path, kv: codecs.Encoded, code: str, message: str
) -> None:
    runtime = open_runtime(worker, llama, Policy(kv_cache="every_step"))
    tokens = codecs.encode(Tensor.from_numpy(np.array([1], np.int64), TensorClass.TOKENS), "raw")
    with pytest.raises(RemoteError, match=message) as error:
        runtime.link.request(Operation.FORWARD, messages.Forward((), 0, 2), [tokens, kv])
    assert error.value.code == code
    assert runtime.prefill(np.array([1, 2]), 0, Kind.SETUP).logits is not None


@pytest.mark.parametrize(
    ("config", "limits", "message"),
    [
        ({"model_type": "llama", "num_labels": 10**7}, {"MOST_CPU_S": 0.2}, "takes more than 0.2 s of CPU time to build"),
        ({"model_type": "llama", "num_labels": 10**6}, {"MOST_BYTES": 8 << 20}, "takes more than 8,388,608 bytes of memory to build"),
    ],
)
def test_a_config_that_takes_long_or_much_to_build_is_refused(
    config: dict[str, Any], limits: dict[str, float], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from semgap.engine.model import build_model
    from semgap.engine.weights import Weights

    with pytest.raises(ModelError, match="were not given"):
        build_model(TINY, Weights([], "cpu"), "float32")  # loads the library's code, which takes memory too
    for name, value in limits.items():
        monkeypatch.setattr(build_limits, name, value)
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(ModelError, match=message):
        build_model(config, Weights([], "cpu"), "float32")
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_a_session_that_runs_out_of_memory_says_so_and_the_next_is_served(start_worker: Callable[..., StartedWorker]) -> None:
    worker = start_worker()
    most = psutil.Process(worker.process.pid).memory_info().vms + (64 << 20)
    resource.prlimit(worker.process.pid, resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
    link = worker.session()
    with pytest.raises(RemoteError, match=rf"the session's memory ran out: .* and may hold {most:,} bytes \(ulimit -v\)") as error:
        link.request(Operation.PING, messages.Ping(), [control(bytes(100 << 20))])
    assert error.value.code == "memory"
    link.close()
    ping(worker.session(), 8, 8)


@contextlib.contextmanager
def started_relay(to: str, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    command = [sys.executable, "-m", "semgap", "relay", "--to", to, "--parent-pid", str(os.getpid()), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout
        try:
            yield process, json.loads(process.stdout.readline())["address"]
        finally:
            process.kill()


def test_a_relay_passes_on_more_connections_than_select_can_watch() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard < 3000:
        pytest.skip(f"needs 3,000 descriptors, this machine allows {hard}")
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    resource.setrlimit(resource.RLIMIT_NOFILE, (3000, hard))
    try:
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=600))
            to = f"127.0.0.1:{listener.getsockname()[1]}"
            process, address = stack.enter_context(started_relay(to, "--max-connections", "600"))
            host, port = address.split(":")
            ends = []
            for _ in range(530):
                near = stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
                far = stack.enter_context(listener.accept()[0])
                ends.append((near, far))
            far.settimeout(10)
            near.sendall(b"through")
            assert far.recv(100) == b"through"
            assert process.poll() is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_relay_with_all_connections_open_says_so(worker: StartedWorker) -> None:
    with started_relay(worker.address, "--max-connections", "1") as (_, address):
        link = connect(address, Timeouts(10.0, 10.0))
        shake_hands_as_client(link, worker.secret, msgspec.to_builtins(SessionSpec()))
        link.limits = Limits()
        another = connect(address, Timeouts(10.0, 10.0))
        with pytest.raises(RemoteError, match="1 connections are open, the most that this relay passes on") as error:
            shake_hands_as_client(another, worker.secret, msgspec.to_builtins(SessionSpec()))
        assert error.value.code == "busy"
        ping(link, 8, 8)
        link.close()


def test_a_kv_host_with_all_connections_open_says_so(kv_cluster: KVCluster) -> None:
    host = kv_cluster.host("--max-connections", "1")
    link, another = host.link(), host.link()
    shake_hands_as_client(link, host.secret, {"role": "kvhost"})
    link.limits = Limits()
    with pytest.raises(RemoteError, match="1 connections are open, the most that this KV host serves") as error:
        shake_hands_as_client(another, host.secret, {"role": "kvhost"})
    assert error.value.code == "busy"
    ping(link, 8, 8)


def _layout(**fields: Any) -> messages.KVLayout:
    return msgspec.structs.replace(messages.KVLayout("model", DType.F32, 3, 2, 32, 90, 64), **fields)


def _put_kv(**fields: Any) -> messages.PutKVBlocks:
    return messages.PutKVBlocks(**({"kv_id": b"m" * 16, "epoch": 1, "places": ((0, 0),)} | fields))


@pytest.mark.parametrize(
    "header",
    [
        messages.OpenKV((), b"m" * 15, _layout()),
        messages.OpenKV((), b"m" * 16, _layout(), -1),
        messages.OpenKV((), b"m" * 16, _layout(), 1 << 49),
        messages.OpenKV((), b"m" * 16, _layout(model="m" * 129)),
        messages.OpenKV((), b"m" * 16, _layout(layers=0)),
        messages.OpenKV((), b"m" * 16, _layout(heads=0)),
        messages.OpenKV((), b"m" * 16, _layout(head_dim=1 << 17)),
        messages.OpenKV((), b"m" * 16, _layout(max_length=1 << 40)),
        messages.OpenKV((), b"m" * 16, _layout(block=1 << 40)),
        _put_kv(texts=(1 << 63,)),
        _put_kv(places=((0, 1 << 28),)),
        _put_kv(places=((1 << 40, 0),)),
        _put_kv(places=((0, 0),) * 4097),
        messages.DropKV((), b"m" * 16, 1 << 49),
    ],
)
def test_a_kv_message_beyond_its_schema_is_refused_by_name(
    kv_pair: tuple[StartedWorker, StartedWorker], header: messages.OpenKV | messages.PutKVBlocks | messages.DropKV
) -> None:
    operations = {messages.OpenKV: Operation.OPEN_KV, messages.PutKVBlocks: Operation.PUT_KV_BLOCKS, messages.DropKV: Operation.DROP_KV}
    link = connect_kv(kv_pair[0].address, kv_pair[0].secret, 10.0)
    with pytest.raises(RemoteError, match="does not decode") as error:
        link.request(operations[type(header)], header)
    assert error.value.code == "header"
    link.close()
    connect_kv(kv_pair[0].address, kv_pair[0].secret, 10.0).close()
    assert "Traceback" not in kv_pair[0].log.read_text()


def _keep_block(store: BlockStore, kv_id: bytes, layer: int) -> None:
    head = messages.TensorHeader(TensorClass.KV, 0, DType.U8, (1, 2, 1, 1, 1), 2)
    store.put(messages.PutKVBlocks((head,), kv_id, 1, ((layer, 0),), (layer + 1,)), [memoryview(np.zeros(2, np.uint8))])


SMALL = messages.KVLayout("model", DType.U8, 1 << 16, 1, 1, 64, 64)


def test_everything_that_a_kv_host_keeps_counts_against_its_budget() -> None:
    budget = 1 << 20
    store, ids = BlockStore(budget), [number.to_bytes(16, "little") for number in range(3000)]
    tracemalloc.start()
    try:
        for kv_id in ids:  # 6 MB of handles
            store.open(messages.OpenKV((), kv_id, msgspec.structs.replace(SMALL)))
        assert store.used_bytes <= budget
        _, handles_bytes = tracemalloc.get_traced_memory()
        for layer in range(3000):  # 4 MB of blocks of two bytes
            _keep_block(store, ids[-1], layer)
        assert store.used_bytes <= budget
        blocks_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert handles_bytes < 2 * budget and blocks_bytes < budget  # an opening's answer has its tables, 1 MB
    with pytest.raises(Refused, match="is not kept here") as error:
        store.open(messages.OpenKV((), ids[0], SMALL, 0, False))
    assert error.value.code == "unknown"
    _, versions, *_ = store.open(messages.OpenKV((), ids[-1], SMALL, 0, False))
    assert np.flatnonzero(versions).tolist() == list(range(3000 - int((versions > 0).sum()), 3000))  # the latest


def test_a_handle_cannot_be_opened_in_an_epoch_beyond_which_nobody_could_open_it() -> None:
    store = BlockStore(1 << 20)
    for epoch in (1 << 48, (1 << 32) + 1):
        with pytest.raises(Refused, match=f"epoch {epoch} of handle .* was never granted") as error:
            store.open(messages.OpenKV((), b"k" * 16, SMALL, epoch))
        assert error.value.code == "fenced"
    assert store.open(messages.OpenKV((), b"k" * 16, SMALL, 1 << 32))[0] == 1 << 32
    assert store.open(messages.OpenKV((), b"k" * 16, SMALL))[0] == (1 << 32) + 1
    assert store.open(messages.OpenKV((), b"k" * 16, SMALL, (1 << 32) + 1))[0] == (1 << 32) + 1
    with pytest.raises(Refused, match="was never granted"):
        store.open(messages.OpenKV((), b"k" * 16, SMALL, 1 << 40))
