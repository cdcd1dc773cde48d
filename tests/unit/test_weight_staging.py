"""Weights on their way through staging memory: the very bytes, in whichever pieces they come, and a frame that fails ends the session.

A CPU is the target here; tests/gpu has the same with pinned memory and a GPU.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from semgap.client.local_runtime import LocalRuntime
from semgap.client.remote_runtime import RemoteRuntime
from semgap.client.runtime import Drawing
from semgap.engine.model_files import ModelFiles, load_digest
from semgap.engine.weight_staging import WeightStaging
from semgap.engine.weights import Weights
from semgap.policy import Policy, SessionSpec, policy_from
from semgap.tensors import DType
from semgap.wire import frames, messages
from semgap.wire.handshake import shake_hands_as_client, shake_hands_as_worker
from semgap.wire.ledger import Direction, Row
from semgap.wire.link import Link, RemoteError
from semgap.wire.messages import Kind, Operation, WeightSpec
from semgap.wire.reconcile import reconcile
from semgap.wire.tcp import Timeouts
from semgap.worker.session import Resources, Session
from semgap.worker.weight_store import WeightStore

CPU = "cpu"
SLOT = 10_000  # no multiple of any tensor's size, smaller than most of them
PROMPT = np.arange(3, 15, dtype=np.int64)
Opened = tuple[RemoteRuntime, Session]


@pytest.fixture
def open_staged(tcp_pair, llama: Path) -> Iterator[Callable[..., Opened]]:  # type: ignore[no-untyped-def]
    """A client's runtime, and the session with staging memory that serves it from a thread of this process, over loopback TCP."""
    client, link = (Link(sock, way, Timeouts(5.0, 5.0)) for sock, way in zip(tcp_pair, (Direction.UP, Direction.DOWN), strict=True))
    threads = []

    def make(policy: Policy, store: WeightStore | None = None) -> Opened:
        served = Session(link, "cpu", 1, Resources(store or WeightStore(1 << 30)), slot_bytes=SLOT)

        def serve() -> None:
            shake_hands_as_worker(link, b"", served.grant)
            try:
                served.run()
            except frames.WireError as error:
                link.reply_error(None, error.code, str(error))
            finally:
                served.end()
                link.close()

        threads.append(threading.Thread(target=serve, daemon=True))
        threads[0].start()
        model = ModelFiles(llama, load_digest(llama))
        asked = SessionSpec(policy=policy, model=model.config, dtype="float32", max_length=32)
        shake_hands_as_client(client, b"", msgspec.to_builtins(asked))
        client.limits = frames.Limits()
        return RemoteRuntime(client, policy, model, Drawing()), served

    yield make
    client.close()
    threads[0].join(10)


def _local_logits(llama: Path) -> bytes:
    model = ModelFiles(llama, load_digest(llama))
    local = LocalRuntime(Policy(placement="local"), model, Drawing(), threads=1, max_length=32, device="cpu", setup={})
    logits = local.prefill(PROMPT, 0, Kind.SETUP).logits
    assert logits is not None
    return bytes(logits.data)


@pytest.mark.parametrize(
    "row",
    [{}, {"weights": "every_step", "kv_cache": "every_step"}, {"weights": "by_hash"}, {"weights": "by_hash", "codec": {"weights": "zstd"}}],
)
def test_weights_that_pass_through_staging_compute_bitwise_as_local_and_every_copied_byte_is_counted(
    open_staged: Callable[..., Opened], llama: Path, row: dict
) -> None:
    policy = policy_from(row, "staged")
    runtime, _ = open_staged(policy)
    runtime.upload_weights()
    logits = runtime.prefill(PROMPT, 0, Kind.SETUP).logits
    assert logits is not None and bytes(logits.data) == _local_logits(llama)
    rows = msgspec.convert(reconcile(runtime.link)["peer_rows"], list[Row])
    copied = [(r.operation, r.direction, r.tensor_class, r.payload_bytes) for r in rows if r.link == "pcie"]
    how = "forward" if policy.weights == "every_step" else "put_weights"
    assert copied == [(how, "up", "weights", sum(tensor.nbytes for tensor in load_digest(llama).tensors))]


@pytest.mark.parametrize("row", [{}, {"weights": "every_step", "kv_cache": "every_step"}])
def test_a_second_offer_in_a_session_frees_the_first_one_s_memory(open_staged: Callable[..., Opened], row: dict) -> None:
    runtime, session = open_staged(policy_from(row, "staged"))
    gc.disable()
    try:
        runtime.upload_weights()
        runtime.prefill(PROMPT, 0, Kind.SETUP)
        assert session.steps is not None
        cache = session.steps._scratch or session.steps.handles.get(1).cache
        memory = weakref.ref(cache.pool._memory)
        del cache
        runtime.upload_weights()
        assert memory() is None
    finally:
        gc.enable()


def test_weights_out_of_the_store_pass_through_staging_too(open_staged: Callable[..., Opened], llama: Path) -> None:
    store = WeightStore(1 << 30)
    digest = load_digest(llama)
    raw = (llama / digest.file).read_bytes()
    hashes = {index: bytes.fromhex(tensor.xxh3_128) for index, tensor in enumerate(digest.tensors)}
    draft = store.begin(hashes, {index: tensor.nbytes for index, tensor in enumerate(digest.tensors)})
    for index, tensor in enumerate(digest.tensors):
        sink = draft.through(index, Weights([WeightSpec("w", DType.U8, (tensor.nbytes,))], CPU).sink(0))
        sink.window()[:] = raw[tensor.offset : tensor.offset + tensor.nbytes]
        sink.took(tensor.nbytes)
    draft.finish()
    store.take_in()
    runtime, _ = open_staged(policy_from({"weights": "by_hash"}, "by_hash"), store)
    assert runtime.upload_weights() == 0
    logits = runtime.prefill(PROMPT, 0, Kind.SETUP).logits
    assert logits is not None and bytes(logits.data) == _local_logits(llama)
    rows = msgspec.convert(reconcile(runtime.link)["peer_rows"], list[Row])
    copied = sum(tensor.nbytes for tensor in digest.tensors)
    assert [(r.operation, r.payload_bytes) for r in rows if r.link == "pcie"] == [("offer_weights", copied)]


def test_a_frame_of_weights_whose_checksum_is_wrong_ends_the_session_with_that_reason(open_staged: Callable[..., Opened]) -> None:
    runtime, served = open_staged(Policy())
    wanted = runtime.link.request(Operation.OFFER_WEIGHTS, messages.OfferWeights((), runtime._model.specs())).header
    assert isinstance(wanted, messages.WantWeights)
    weights = runtime._encoded_weights(wanted.indices)
    buffers = [buffer for weight in weights for buffer in weight.buffers]
    put = messages.PutWeights(frames.tensor_headers(weights), wanted.indices, True)
    start = bytearray(frames.pack(Operation.PUT_WEIGHTS, Kind.SETUP, 0, 4, put, buffers))
    start[20] ^= 1  # of the checksum
    frames.send(runtime.link.sock, bytes(start), buffers, 5.0)
    with pytest.raises(RemoteError, match="checksum of a put_weights frame") as error:
        runtime.link.await_reply(Operation.PUT_WEIGHTS)
    assert error.value.code == "checksum"
    assert served.upload is not None and served.upload.missing == len(runtime._model.specs())
    with pytest.raises(frames.WireError):
        runtime.prefill(PROMPT, 0, Kind.SETUP)


def test_a_model_read_from_a_file_through_staging_is_the_files(llama: Path) -> None:
    digest = load_digest(llama)
    specs = [WeightSpec(t.name, DType.from_torch_name(t.dtype), t.shape) for t in digest.tensors]
    offsets = [tensor.offset for tensor in digest.tensors]
    straight, staged = Weights(specs, CPU), Weights(specs, CPU, SLOT)
    for weights in (straight, staged):
        weights.read_file(llama / digest.file, offsets)
    theirs = staged.tensors()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in straight.tensors().items())
    assert (straight.take_copied(), staged.take_copied(), staged.take_copied()) == (0, staged.nbytes, 0)


def test_a_slot_is_never_larger_than_it_was_made_and_holds_pieces_of_several_tensors() -> None:
    staging, targets = WeightStaging(CPU, 8), [torch.zeros(n, dtype=torch.uint8) for n in (3, 20, 0, 5)]
    value = 0
    for target in targets:
        sink = staging.into(target)
        while value < sum(t.numel() for t in targets[: 1 + next(i for i, t in enumerate(targets) if t is target)]):
            window = sink.window()
            assert 0 < window.nbytes <= 8
            window[:1] = bytes([value])
            sink.took(1)
            value += 1
    assert [target.tolist() for target in targets] == [[*range(3)], [*range(3, 23)], [], [*range(23, 28)]]
