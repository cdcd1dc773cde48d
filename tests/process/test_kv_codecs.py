"""`codec.kv: auto`: over a fast link blocks stay exact, over a slow one they get as few bytes as the mode's promise allows, and no session
that promises exactness computes with changed blocks. Real processes, links and logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kv_worlds import rows_alone, token_ids
from started_workers import KVCluster, StartedWorker
from test_handover import begun, relay, taken
from test_kv_host import _local_logits, _open, _policy, _row, _steps
from test_prefixes import LAYERS, LENGTH, PROMPT, _last, _publish

from semgap import codecs
from semgap.client.remote_runtime import RemoteRuntime
from semgap.engine.model_files import ModelFiles, load_digest
from semgap.kv import prefix_names
from semgap.kv.host import connect_kv
from semgap.policy import CodecChoice, Policy, Reply
from semgap.tensors import DType, Tensor, TensorClass
from semgap.wire import messages
from semgap.wire.link import RemoteError
from semgap.wire.messages import Kind, Operation
from semgap.wire.reconcile import reconcile

Runtime = Callable[..., RemoteRuntime]
SHORT = np.arange(3, 70) % 512  # of test_kv_host's references
LOSSY = {"int8", "int4"}


@dataclass(frozen=True)
class Links:
    """A KV host, a worker beside it, and one behind a slow link to it."""

    host: StartedWorker
    near: StartedWorker
    far: StartedWorker

    def worker(self, is_slow: bool) -> StartedWorker:
        return self.far if is_slow else self.near


@pytest.fixture(scope="module")
def links(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Links]:
    with contextlib.ExitStack() as stack:
        cluster = KVCluster(tmp_path_factory.mktemp("links"), stack)
        host = cluster.host()
        yield Links(host, cluster.worker(host.address), cluster.worker(stack.enter_context(relay(host.address, "4Mbit"))))


@pytest.mark.parametrize(("is_slow", "least", "most"), [(False, 8 << 20, 16 << 20), (True, 1 << 17, 1 << 20)])
def test_a_session_knows_a_slow_link_to_the_kv_host_from_few_bytes(
    links: Links, llama: Path, open_runtime: Runtime, is_slow: bool, least: int, most: int
) -> None:
    runtime = _open(open_runtime, links.worker(is_slow), llama, _policy("delta", kv="auto"))
    rows = reconcile(runtime.link)["peer"]["kv_host"]["rows"]
    assert least < sum(row["payload_bytes"] for row in rows if row["operation"] == "ping") < most


def came(record: dict[str, Any]) -> set[str]:
    """The codecs in which the layers of a step came."""
    return {each.split(" x ")[0] for each in record["kv_codecs"].split(", ")}


@pytest.mark.parametrize("keeps", ["bitwise", "lossy"])
@pytest.mark.parametrize("is_slow", [False, True])
@pytest.mark.parametrize("recovery", ["delta", "auto"])
def test_a_step_that_missed_blocks_gets_them_in_time_or_in_the_fewest_bytes_that_the_promise_allows(
    links: Links, llama: Path, open_runtime: Runtime, recovery: str, keeps: str, is_slow: bool
) -> None:
    rows = _local_logits(llama)
    runtime = _open(open_runtime, links.worker(is_slow), llama, _policy(recovery, kv="auto", keeps=keeps))
    runtime.prefill(SHORT, 0, Kind.SETUP)
    (_,) = runtime.decode(int(rows[0].argmax()), 1, Kind.REGULAR)  # the session knows the time of a step
    for step in (1, 2):
        runtime.evict([0, 1, 2])
        (arrival,) = runtime.decode(int(rows[step].argmax()), 1, Kind.REGULAR)
        seen, record = _row(arrival.logits), _steps(runtime)[-1]["recovered"]
        assert record["fallback"] is None
        if record["how"] == "recompute":  # sooner than a fetch, of so small a model
            assert recovery == "auto" and record["kv_codecs"] is None
        elif keeps == "lossy" and is_slow:
            assert came(record) <= LOSSY | {"int8+int4"} and 0 < np.abs(seen - rows[step + 1]).max() < 0.3
        else:
            assert came(record) == ({"planes_zstd"} if is_slow else {"raw"})
        if keeps == "bitwise" or not is_slow:
            assert np.array_equal(seen, rows[step + 1])
    assert reconcile(runtime.link)["peer"]["kv_host"]["agreed"]


@pytest.mark.parametrize("keeps", ["bitwise", "lossy"])
@pytest.mark.parametrize("is_slow", [False, True])
def test_a_request_that_moves_sends_each_layer_so_that_it_is_gone_before_the_next_one(
    links: Links, llama: Path, open_runtime: Runtime, keeps: str, is_slow: bool
) -> None:
    rows, workers = _local_logits(llama), (links.worker(is_slow), links.near)
    one, other = (_open(open_runtime, each, llama, _policy("delta", kv="auto", keeps=keeps)) for each in workers)
    one.prefill(SHORT, 9, Kind.SETUP)  # tells how fast it computes
    one.end_request()
    kv_id, logits = begun(one)
    flushed = taken(one, other, kv_id)
    assert np.array_equal(logits, rows[0]) and flushed.kept
    (arrival,) = other.decode(int(rows[0].argmax()), 1, Kind.REGULAR)
    seen, record = _row(arrival.logits), _steps(other)[0]["recovered"]
    if keeps == "lossy" and is_slow:
        assert came(record) <= LOSSY and flushed.network_bytes < 0.5 * flushed.tensor_bytes
        assert 0 < np.abs(seen - rows[1]).max() < 0.3
    elif keeps == "bitwise":
        assert came(record) <= {"raw", "planes_zstd"} and np.array_equal(seen, rows[1])
    for runtime in (one, other):
        assert reconcile(runtime.link)["peer"]["kv_host"]["agreed"]


def prefix_policy(kv: str, keeps: str = "bitwise", prefix: str = "fetch_blocks") -> Policy:
    return Policy(reply=Reply("logits_last"), prefix=prefix, shadow="kvhost", codec=CodecChoice(kv=kv), keeps=keeps)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def unmoved(long_llama: Path) -> np.ndarray:
    """The last row of logits of the prompt where nothing moved."""
    return rows_alone(long_llama, PROMPT, 0)[0]


@pytest.fixture
def open_long(open_runtime: Runtime, long_llama: Path) -> Runtime:
    """A session of that model with a worker, of a policy and a salt."""

    def make(worker: StartedWorker, policy: Policy, salt: str) -> RemoteRuntime:
        return open_runtime(worker, long_llama, policy, max_length=LENGTH, model_id=load_digest(long_llama).sha256, salt=salt)

    return make


def prefilled(runtime: RemoteRuntime) -> tuple[np.ndarray, dict[str, Any]]:
    """The last row of logits of the whole prompt, and the record of the step."""
    seen: np.ndarray = _row(runtime.prefill(PROMPT, 0, Kind.REGULAR).logits)
    return seen, _last(runtime)


@pytest.mark.parametrize("keeps", ["bitwise", "lossy"])
@pytest.mark.parametrize("is_slow", [False, True])
def test_a_prefix_is_published_in_the_codec_in_which_it_will_be_in_time(
    links: Links, open_long: Runtime, unmoved: np.ndarray, keeps: str, is_slow: bool
) -> None:
    one, other = (open_long(links.worker(is_slow), prefix_policy("auto", keeps), f"{keeps} {is_slow}") for _ in range(2))
    assert _publish(one, PROMPT[:256]) == messages.Published((), 4, 4)
    seen, record = prefilled(other)
    assert record["how"] == "fetch_blocks" and record["fallback"] is None
    if keeps == "lossy" and is_slow:
        assert came(record) <= LOSSY and 0 < np.abs(seen - unmoved).max() < 0.5
    else:
        assert came(record) == ({"planes_zstd"} if is_slow else {"raw"}) and np.array_equal(seen, unmoved)
    assert reconcile(other.link)["peer"]["kv_host"]["agreed"]


@pytest.mark.parametrize("is_slow", [False, True])
def test_exact_sessions_never_find_what_a_lossy_one_published_whatever_it_chose(
    links: Links, open_long: Runtime, unmoved: np.ndarray, is_slow: bool
) -> None:
    salt, chooses_lossy = f"apart {is_slow}", prefix_policy("auto", "lossy")
    assert _publish(open_long(links.worker(is_slow), chooses_lossy, salt), PROMPT[:256]).kept == 4
    for kv, keeps in (("auto", "bitwise"), ("auto", "tokens"), ("raw", "bitwise"), ("planes_zstd", "tokens")):
        seen, record = prefilled(open_long(links.near, prefix_policy(kv, keeps), salt))
        assert np.array_equal(seen, unmoved)
        assert (record["missing_bytes"], record["kv_codecs"], record["fallback"]) == (0, None, None)
    _, record = prefilled(open_long(links.near, chooses_lossy, salt))
    assert record["how"] == "fetch_blocks" and (came(record) <= LOSSY) is is_slow


def test_exact_sessions_share_what_any_of_them_chose(links: Links, open_long: Runtime, unmoved: np.ndarray) -> None:
    assert _publish(open_long(links.far, prefix_policy("auto"), "shared"), PROMPT[:256]).kept == 4
    seen, record = prefilled(open_long(links.near, prefix_policy("raw"), "shared"))
    assert np.array_equal(seen, unmoved) and came(record) == {"planes_zstd"}


def test_lossy_blocks_under_the_very_names_of_exact_ones_are_refused_and_computed(
    links: Links, open_long: Runtime, unmoved: np.ndarray, long_llama: Path
) -> None:
    """What no session of ours puts there: the receiver looks at each frame's codec, whatever name it was found under."""
    digest = load_digest(long_llama)
    name = prefix_names.model_name(digest.sha256, ModelFiles(long_llama, digest).config, "raw")
    layout = messages.KVLayout(name, DType.F32, LAYERS, 2, 32, 64, 64)
    space = prefix_names.space_of(layout, "planted", "fused on cpu")
    block = codecs.encode(Tensor.from_numpy(np.ones((1, 2, 2, 64, 32), np.float32), TensorClass.KV), "int8")
    link = connect_kv(links.host.address, links.host.secret, 10.0)
    put = messages.PutPrefixBlock((), space, layout, prefix_names.chain_of(space, PROMPT, 64)[0], 0)
    link.request(Operation.PUT_PREFIX_BLOCK, put, [token_ids(PROMPT[:64]), *[block] * LAYERS])
    link.close()
    for kv in ("raw", "auto"):
        seen, record = prefilled(open_long(links.near, prefix_policy(kv), "planted"))
        assert np.array_equal(seen, unmoved)
        assert record["fallback"].endswith("a KV block came in codec number 6, and this session takes exact codecs alone")


@pytest.mark.parametrize("second", [("raw", "bitwise"), ("auto", "bitwise"), ("int8", "lossy")])
def test_a_worker_of_another_promise_does_not_take_over_what_a_lossy_one_computed(
    links: Links, llama: Path, open_runtime: Runtime, second: tuple[str, str]
) -> None:
    one = _open(open_runtime, links.near, llama, _policy("delta", kv="auto", keeps="lossy"))
    other = _open(open_runtime, links.near, llama, _policy("delta", kv=second[0], keeps=second[1]))
    kv_id, _ = begun(one)
    assert one.flush(Kind.REGULAR).kept
    with pytest.raises(RemoteError, match="use the same model, dtype and lossy codec") as error:
        other.attach(kv_id, 0, SHORT, Kind.REGULAR)
    assert error.value.code == "layout"


@pytest.mark.parametrize(
    ("policy", "where"),
    [
        (Policy(codec=CodecChoice(kv="auto")), "recovery reload, prefix recompute"),
        (Policy(codec=CodecChoice(kv="auto"), kv_cache="every_step"), "kv_cache every_step"),
        (Policy(codec=CodecChoice(kv="auto"), recovery="recompute"), "recovery recompute"),
    ],
)
def test_a_worker_refuses_a_session_that_has_nothing_to_choose_for(
    links: Links, llama: Path, open_runtime: Runtime, policy: Policy, where: str
) -> None:
    with pytest.raises(RemoteError, match=f"codec.kv 'auto' with .*{where}.*: use recovery: delta or auto, or prefix") as error:
        _open(open_runtime, links.near, llama, policy)
    assert error.value.code == "codec"
