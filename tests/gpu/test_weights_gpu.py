"""Weights onto a real GPU: every byte there through small slots, no copy of the model in host memory, and a fault that ends one session."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
import torch

from semgap.client.local_runtime import LocalRuntime
from semgap.client.remote_runtime import RemoteRuntime
from semgap.client.runtime import Drawing
from semgap.engine.architecture import ModelError
from semgap.engine.gpu_failure import device_title, gpu_failure
from semgap.engine.model_files import ModelFiles, load_digest
from semgap.engine.weights import Weights
from semgap.experiment.fetch_model import fetch_model
from semgap.policy import Policy, SessionSpec, policy_from
from semgap.tensors import DType
from semgap.wire import frames
from semgap.wire.handshake import shake_hands_as_client
from semgap.wire.ledger import Row
from semgap.wire.link import RemoteError, connect
from semgap.wire.messages import Kind, WeightSpec
from semgap.wire.reconcile import reconcile

if TYPE_CHECKING:
    from started_workers import StartedWorker

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU here", allow_module_level=True)

GPU = "cuda"
PROMPT = np.arange(3, 15, dtype=np.int64)
WEIGHTS: dict[str, dict[str, str]] = {
    "once": {},
    "every_step": {"weights": "every_step", "kv_cache": "every_step"},
    "by_hash": {"weights": "by_hash"},
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 0.6 GB in half precision, with tensors larger than a slot."""
    directory = tmp_path_factory.mktemp("large")
    config = {"vocab_size": 8192, "n_positions": 128, "n_embd": 2048, "n_layer": 6, "n_head": 16, "rotary_dim": 64}
    fetch_model({"source": "random", "architecture": "gptj", "config": config, "seed": 3}, "large", "float16", directory)
    return directory


@pytest.mark.parametrize("slot_bytes", [1 << 16, 8 << 20])
def test_every_byte_of_a_file_arrives_through_slots_that_are_filled_again_and_again(large: Path, slot_bytes: int) -> None:
    model = ModelFiles(large, load_digest(large))
    weights = Weights(model.specs(), GPU, slot_bytes)
    weights.read_file(model.weights_file, [tensor.offset for tensor in model.digest.tensors])
    assert weights.take_copied() == weights.nbytes
    on_gpu = weights.tensors()
    for source, spec in zip(model.map(), model.specs(), strict=True):
        expected = torch.frombuffer(bytearray(source.data), dtype=getattr(torch, spec.dtype.torch_name)).view(spec.shape)
        assert torch.equal(on_gpu[spec.name].cpu(), expected), spec.name


def _local(model: ModelFiles) -> bytes:
    runtime = LocalRuntime(Policy(placement="local"), model, Drawing(), threads=1, max_length=32, device="cuda", setup={})
    logits = runtime.prefill(PROMPT, 0, Kind.SETUP).logits
    assert logits is not None
    return bytes(logits.data)


@pytest.mark.parametrize("how", WEIGHTS)
def test_a_worker_on_the_gpu_computes_bitwise_as_local_and_counts_every_byte_over_pcie(
    start_worker: Callable[..., StartedWorker], open_runtime: Callable[..., RemoteRuntime], large: Path, tmp_path: Path, how: str
) -> None:
    model, policy = ModelFiles(large, load_digest(large)), policy_from(WEIGHTS[how], how)
    whole = sum(tensor.nbytes for tensor in model.digest.tensors)
    expected = _local(model)
    worker = start_worker("--device", "cuda", "--weight-cache", str(tmp_path))
    operations = {"once": ["put_weights"] * 2, "every_step": ["forward"] * 2, "by_hash": ["put_weights", "offer_weights"]}[how]
    for operation in operations:  # by_hash: the second session's come out of the cache
        runtime = open_runtime(worker, large, policy, device="cuda", dtype="float16")
        logits = runtime.prefill(PROMPT, 0, Kind.SETUP).logits
        assert logits is not None and bytes(logits.data) == expected
        peer = reconcile(runtime.link)
        rows = msgspec.convert(peer["peer_rows"], list[Row])
        up = [(row.operation, row.payload_bytes) for row in rows if row.link == "pcie" and row.tensor_class == "weights"]
        assert up == [(operation, whole)]
        runtime.link.close()


def test_an_upload_takes_no_host_memory_for_the_model(
    start_worker: Callable[..., StartedWorker], open_runtime: Callable[..., RemoteRuntime], large: Path, llama: Path
) -> None:
    worker = start_worker("--device", "cuda")
    peaks = []
    for directory, dtype in ((llama, "float32"), (large, "float16")):
        runtime = open_runtime(worker, directory, Policy(), device="cuda", dtype=dtype)
        runtime.prefill(PROMPT, 0, Kind.SETUP)
        peaks.append(reconcile(runtime.link)["peer"]["peak_rss_bytes"])
        runtime.link.close()
    whole = sum(tensor.nbytes for tensor in load_digest(large).tensors)
    assert peaks[1] - peaks[0] < 0.8 * whole  # libraries load other kernels for the other dtype


def test_a_model_that_does_not_fit_the_gpu_is_refused_with_both_numbers_and_nothing_is_allocated(llama: Path) -> None:
    before = torch.cuda.memory_allocated()
    with pytest.raises(ModelError, match=r"weights need 4,398,046,511,104 bytes and cuda has [\d,]+ free"):
        Weights([WeightSpec("huge", DType.F32, (1 << 40,))], GPU)
    model = ModelFiles(llama, load_digest(llama))
    huge = ModelFiles(llama, msgspec.structs.replace(model.digest, max_positions=1 << 40))
    with pytest.raises(ValueError, match="more than the model's context"):
        LocalRuntime(Policy(placement="local"), huge, Drawing(), threads=1, max_length=1 << 40, device="cuda", setup={})
    assert torch.cuda.memory_allocated() == before


# A kernel that reads outside its tensor: what a fault of the GPU is to a process, whose context is dead from then on.
FAULT = """
import torch
from semgap.worker.steps import Steps
tokens_of = Steps.tokens
def faulty(self, request):
    tokens = tokens_of(self, request)
    if tokens[0] == 13:
        torch.zeros(4, device="cuda")[torch.tensor([1 << 20], device="cuda")]
        torch.cuda.synchronize()
    return tokens
Steps.tokens = faulty
from semgap.worker.serve import ServeOptions, serve
serve(ServeOptions(device="cuda"))
"""


def test_a_fault_of_the_gpu_ends_its_session_with_a_typed_error_and_the_next_one_computes(llama: Path) -> None:
    worker = subprocess.Popen([sys.executable, "-c", FAULT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert worker.stdout is not None
    try:
        address = json.loads(worker.stdout.readline())["address"]
        model = ModelFiles(llama, load_digest(llama))
        for first, fails in ((13, True), (14, False)):
            link = connect(address)
            shake_hands_as_client(link, b"", msgspec.to_builtins(SessionSpec(model=model.config, dtype="float32", max_length=32)))
            link.limits = frames.Limits()
            runtime = RemoteRuntime(link, Policy(), model, Drawing())
            runtime.upload_weights()
            if fails:
                with pytest.raises(RemoteError, match="failed in the middle of the work") as error:
                    runtime.prefill(np.array([first, 2]), 0, Kind.SETUP)
                assert error.value.code == "gpu" and device_title() in str(error.value)
            else:
                assert runtime.prefill(np.array([first, 2]), 0, Kind.SETUP).logits is not None
            link.close()
        assert worker.poll() is None
    finally:
        worker.kill()
        worker.wait()
        worker.stdout.close()


def test_running_out_of_device_memory_is_told_as_such() -> None:
    free, _ = torch.cuda.mem_get_info()
    with pytest.raises(torch.OutOfMemoryError) as error:
        torch.empty(2 * free + (1 << 40), dtype=torch.uint8, device=GPU)
    told = gpu_failure(error.value)
    assert told is not None and "has no memory left" in told
