"""`codec.kv: auto`: over a fast link blocks stay exact, over a slow one they get as few bytes as the mode's promise allows, and no session
that promises exactness computes with changed blocks. Real processes, links and logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from test_handover import begun, relay, taken
from test_kv_host import _local_logits, _open, _policy, _row, _steps
from test_prefixes import LAYERS, LENGTH, PROMPT, _ids, _last, _logits_alone, _publish

from semgap import codecs
from semgap.client.remote_runtime import RemoteRuntime
from semgap.engine.model_files import ModelFiles, load_digest
from semgap.experiment.fetch_model import fetch_model
from semgap.kv import prefix_names
from semgap.kv.host import connect_kv
from semgap.policy import CodecChoice, Policy, Reply
from semgap.tensors import DType, Tensor, TensorClass
from semgap.wire import messages
from semgap.wire.link import RemoteError
from semgap.wire.messages import Kind, Operation
from semgap.wire.reconcile import reconcile

if TYPE_CHECKING:
    from started_workers import KVCluster, StartedWorker

pytestmark = pytest.mark.alone
Runtime = Callable[..., RemoteRuntime]
SLOW = "4Mbit"
LOSSY = {"int8", "int4"}


@contextlib.contextmanager
def link_of(host: StartedWorker, is_slow: bool) -> Iterator[str]:
    """The address at which a worker reaches its KV host, over loopback or over a slow link."""
    if not is_slow:
        yield host.address
        return
    with relay(host.address, SLOW) as slow:
        yield slow


def came(record: dict[str, Any]) -> set[str]:
    """The codecs in which the layers of a step came."""
    return {each.split(" x ")[0] for each in record["kv_codecs"].split(", ")}


@pytest.mark.parametrize("keeps", ["bitwise", "lossy"])
@pytest.mark.parametrize("is_slow", [False, True])
@pytest.mark.parametrize("recovery", ["delta", "auto"])
def test_a_step_that_missed_blocks_gets_them_in_time_or_in_the_fewest_bytes_that_the_promise_allows(
    kv_cluster: KVCluster, llama: Path, open_runtime: Runtime, recovery: str, keeps: str, is_slow: bool
) -> None:
    host, rows = kv_cluster.host(), _local_logits(llama)
    with link_of(host, is_slow) as address:
        runtime = _open(open_runtime, kv_cluster.worker(address), llama, _policy(recovery, kv="auto", keeps=keeps))
        runtime.prefill(np.arange(3, 70) % 512, 0, Kind.SETUP)
        for step in range(3):
            if step:  # the session knows the time of a step
                runtime.evict([0, 1, 2])
            (arrival,) = runtime.decode(int(rows[step].argmax()), 1, Kind.REGULAR)
            record = _steps(runtime)[-1]["recovered"]
            if not step:
                assert record is None and np.array_equal(_row(arrival.logits), rows[1])
                continue
            assert record["fallback"] is None
            if record["how"] == "recompute":  # auto, over the slow link
                assert recovery == "auto" and is_slow and record["kv_codecs"] is None
            elif keeps == "lossy" and is_slow:
                assert came(record) <= LOSSY | {"int8+int4"} and 0 < np.abs(_row(arrival.logits) - rows[step + 1]).max() < 0.3
            else:
                assert came(record) == ({"planes_zstd"} if is_slow else {"raw"})
            if keeps == "bitwise" or not is_slow:
                assert np.array_equal(_row(arrival.logits), rows[step + 1])
        assert reconcile(runtime.link)["peer"]["kv_host"]["agreed"]


@pytest.mark.parametrize("keeps", ["bitwise", "lossy"])
@pytest.mark.parametrize("is_slow", [False, True])
def test_a_request_that_moves_sends_each_layer_so_that_it_is_gone_before_the_next_one(
    kv_cluster: KVCluster, llama: Path, open_runtime: Runtime, keeps: str, is_slow: bool
) -> None:
    host, rows = kv_cluster.host(), _local_logits(llama)
    with link_of(host, is_slow) as address:
        first, second = kv_cluster.worker(address), kv_cluster.worker(host.address)
        one, other = (_open(open_runtime, each, llama, _policy("delta", kv="auto", keeps=keeps)) for each in (first, second))
        one.prefill(np.arange(3, 70) % 512, 9, Kind.SETUP)  # tells how fast it computes
        one.end_request()
        kv_id, logits = begun(one)
        flushed = taken(one, other, kv_id)
        assert np.array_equal(logits, rows[0]) and flushed.kept
        (arrival,) = other.decode(int(rows[0].argmax()), 1, Kind.REGULAR)
        record = _steps(other)[0]["recovered"]
        if keeps == "lossy" and is_slow:
            assert came(record) <= LOSSY and flushed.network_bytes < 0.5 * flushed.tensor_bytes
            assert 0 < np.abs(_row(arrival.logits) - rows[1]).max() < 0.3
        else:
            assert came(record) <= {"raw", "planes_zstd"} | (LOSSY if keeps == "lossy" else set())
        if keeps == "bitwise":
            assert np.array_equal(_row(arrival.logits), rows[1])
        for runtime in (one, other):
            assert reconcile(runtime.link)["peer"]["kv_host"]["agreed"]


@pytest.fixture(scope="module")
def long_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with room for several blocks."""
    config = {"vocab_size": 512, "max_position_embeddings": 512, "hidden_size": 128, "intermediate_size": 256}
    config |= {"num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2}
    directory = tmp_path_factory.mktemp("models") / "long"
    fetch_model({"source": "random", "architecture": "llama", "config": config, "seed": 7}, "long", "float32", directory)
    return directory


@pytest.fixture(scope="module")
def unmoved(long_llama: Path) -> np.ndarray:
    """The last row of logits of the prompt where nothing moved."""
    return _logits_alone(long_llama, PROMPT)


@pytest.fixture
def open_long(open_runtime: Runtime, long_llama: Path) -> Runtime:
    """A session of that model with a worker, of a policy and maybe a salt."""

    def make(worker: StartedWorker, policy: Policy, **more: Any) -> RemoteRuntime:
        return open_runtime(worker, long_llama, policy, **({"max_length": LENGTH, "model_id": load_digest(long_llama).sha256} | more))

    return make


def prefix_policy(kv: str, keeps: str = "bitwise", prefix: str = "fetch_blocks") -> Policy:
    return Policy(reply=Reply("logits_last"), prefix=prefix, shadow="kvhost", codec=CodecChoice(kv=kv), keeps=keeps)  # type: ignore[arg-type]


@pytest.mark.parametrize("keeps", ["bitwise", "lossy"])
@pytest.mark.parametrize("is_slow", [False, True])
def test_a_prefix_is_published_in_the_codec_in_which_it_will_be_in_time(
    kv_cluster: KVCluster, open_long: Runtime, unmoved: np.ndarray, keeps: str, is_slow: bool
) -> None:
    with link_of(kv_cluster.host(), is_slow) as address:
        worker = kv_cluster.worker(address)
        one, other = (open_long(worker, prefix_policy("auto", keeps)) for _ in range(2))
        assert _publish(one, PROMPT[:256]) == messages.Published((), 4, 4)
        seen, record = _row_of(other.prefill(PROMPT, 0, Kind.REGULAR)), _last(other)
        assert record["how"] == "fetch_blocks" and record["fallback"] is None
        if keeps == "lossy" and is_slow:
            assert came(record) <= LOSSY and 0 < np.abs(seen - unmoved).max() < 0.5
        else:
            assert came(record) == ({"planes_zstd"} if is_slow else {"raw"}) and np.array_equal(seen, unmoved)
        assert reconcile(other.link)["peer"]["kv_host"]["agreed"]


def _row_of(arrival: Any) -> np.ndarray:
    row: np.ndarray = arrival.logits.as_float32()[-1].copy()
    return row


@pytest.mark.parametrize("reader", [("auto", "bitwise"), ("auto", "tokens"), ("raw", "bitwise"), ("planes_zstd", "tokens")])
def test_an_exact_session_never_finds_what_a_lossy_one_published(
    kv_cluster: KVCluster, open_long: Runtime, unmoved: np.ndarray, reader: tuple[str, str]
) -> None:
    """Whatever that one chose: the first publishes over a slow link, in a lossy codec, the second over loopback, raw."""
    host = kv_cluster.host()
    with relay(host.address, SLOW) as slow:
        for number, address in enumerate((slow, host.address)):
            salt = f"{reader} {number}"
            lossy = open_long(kv_cluster.worker(address), prefix_policy("auto", "lossy"), salt=salt)
            assert _publish(lossy, PROMPT[:256]) == messages.Published((), 4, 4)
            exact = open_long(kv_cluster.worker(host.address), prefix_policy(*reader), salt=salt)
            assert np.array_equal(_row_of(exact.prefill(PROMPT, 0, Kind.REGULAR)), unmoved)
            assert _last(exact)["missing_bytes"] == 0 and _last(exact)["kv_codecs"] is None
            again = open_long(kv_cluster.worker(host.address), prefix_policy("auto", "lossy"), salt=salt)
            again.prefill(PROMPT, 0, Kind.REGULAR)
            assert _last(again)["how"] == "fetch_blocks" and (came(_last(again)) <= LOSSY) is (address == slow)


def test_exact_sessions_share_what_any_of_them_chose(kv_cluster: KVCluster, open_long: Runtime, unmoved: np.ndarray) -> None:
    host = kv_cluster.host()
    with relay(host.address, SLOW) as slow:
        assert _publish(open_long(kv_cluster.worker(slow), prefix_policy("auto")), PROMPT[:256]).kept == 4
        reader = open_long(kv_cluster.worker(host.address), prefix_policy("raw"))
        assert np.array_equal(_row_of(reader.prefill(PROMPT, 0, Kind.REGULAR)), unmoved)
        assert came(_last(reader)) == {"planes_zstd"}


def test_lossy_blocks_under_the_very_names_of_exact_ones_are_refused_and_computed(
    kv_pair: tuple[StartedWorker, StartedWorker], open_long: Runtime, unmoved: np.ndarray, long_llama: Path
) -> None:
    """What no session of ours puts there: the receiver looks at each frame's codec, whatever name it was found under."""
    digest = load_digest(long_llama)
    name = prefix_names.model_name(digest.sha256, ModelFiles(long_llama, digest).config, "raw")
    space = prefix_names.space_of(messages.KVLayout(name, DType.F32, LAYERS, 2, 32, 64, 64), "planted", "fused on cpu")
    block = codecs.encode(Tensor.from_numpy(np.ones((1, 2, 2, 64, 32), np.float32), TensorClass.KV), "int8")
    link = connect_kv(kv_pair[0].address, kv_pair[0].secret, 10.0)
    layout = messages.KVLayout(name, DType.F32, LAYERS, 2, 32, 64, 64)
    put = messages.PutPrefixBlock((), space, layout, prefix_names.chain_of(space, PROMPT, 64)[0], 0)
    link.request(Operation.PUT_PREFIX_BLOCK, put, [_ids(PROMPT[:64]), *[block] * LAYERS])
    link.close()
    for kv in ("raw", "auto"):
        runtime = open_long(kv_pair[1], prefix_policy(kv), salt="planted")
        assert np.array_equal(_row_of(runtime.prefill(PROMPT, 0, Kind.REGULAR)), unmoved)
        assert _last(runtime)["fallback"].endswith("a KV block came in codec number 6, and this session takes exact codecs alone")


@pytest.mark.parametrize("second", [("raw", "bitwise"), ("auto", "bitwise"), ("int8", "lossy")])
def test_a_worker_that_promises_more_does_not_take_over_what_a_lossy_one_computed(
    kv_pair: tuple[StartedWorker, StartedWorker], llama: Path, open_runtime: Runtime, second: tuple[str, str]
) -> None:
    one = _open(open_runtime, kv_pair[1], llama, _policy("delta", kv="auto", keeps="lossy"))
    other = _open(open_runtime, kv_pair[1], llama, _policy("delta", kv=second[0], keeps=second[1]))
    kv_id, _ = begun(one)
    assert one.flush(Kind.REGULAR).kept
    with pytest.raises(RemoteError, match="use the same model, dtype and lossy codec") as error:
        other.attach(kv_id, 0, np.arange(3, 70) % 512, Kind.REGULAR)
    assert error.value.code == "layout"


@pytest.mark.parametrize(
    ("policy", "where"),
    [
        (Policy(codec=CodecChoice(kv="auto")), "recovery reload, prefix recompute"),
        (Policy(codec=CodecChoice(kv="auto"), kv_cache="every_step"), "kv_cache every_step"),
        (Policy(codec=CodecChoice(kv="auto"), recovery="recompute"), "recovery recompute"),
        (Policy(codec=CodecChoice(reply="auto"), recovery="delta"), "codec 'auto' is not one for logits"),
    ],
)
def test_a_worker_refuses_a_session_that_has_nothing_to_choose_for(
    kv_pair: tuple[StartedWorker, StartedWorker], llama: Path, open_runtime: Runtime, policy: Policy, where: str
) -> None:
    with pytest.raises(RemoteError, match=where) as error:
        _open(open_runtime, kv_pair[1], llama, policy)
    assert error.value.code == "codec"
