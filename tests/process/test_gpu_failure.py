"""A GPU that fails in the middle: a typed error with a way out, for a worker's client and in local alike. tests/gpu has a real one."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from semgap import codecs
from semgap.client.probe import ping
from semgap.client.remote_runtime import RemoteRuntime
from semgap.client.runtime import Drawing
from semgap.client.spec import ClientSpec
from semgap.engine.gpu_failure import gpu_failure
from semgap.engine.model_files import ModelFiles, load_digest
from semgap.kv.pool import HostPool, KVShape
from semgap.kv.recovery import LiveCaches
from semgap.policy import Batching, Policy, Reply, SessionSpec
from semgap.tensors import DType, Tensor, TensorClass
from semgap.wire import messages
from semgap.wire.frames import Limits, WireError
from semgap.wire.handshake import shake_hands_as_client
from semgap.wire.ledger import Direction, Ledger
from semgap.wire.link import Link, RemoteError, connect
from semgap.wire.messages import Call, Kind, Operation
from semgap.wire.tcp import Timeouts
from semgap.worker.session import Resources, Session
from semgap.worker.steps import Steps
from semgap.worker.weight_store import WeightStore

# The first forward pass of a process fails as torch fails when a kernel did: there is no GPU here that could.
FAILING = """
import torch
from semgap.engine.fused import FusedExecutor
def lost(self, given, cache_or_pool):
    raise torch.AcceleratorError("CUDA error: device-side assert triggered\\nCUDA kernel errors might be asynchronously reported")
FusedExecutor.forward = FusedExecutor.forward_batch = lost
"""


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("CUDA error: an illegal memory access was encountered\nmore"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
)
def test_an_error_of_the_gpu_is_told_with_its_first_line_and_a_way_out(error: Exception) -> None:
    told = gpu_failure(error)
    assert told is not None and str(error).partition("\n")[0] in told and "GPU" in told
    assert "semgap doctor" in told or "use a smaller model" in told


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "has no memory left"),
        (torch.AcceleratorError("CUDA error: out of memory"), "has no memory left"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "has no memory left"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "has no memory left"),
        (torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), "lets no further process compute"),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), "failed in the middle of the work"),
    ],
)
def test_memory_and_a_gpu_that_others_hold_are_no_broken_gpu(error: Exception, told: str) -> None:
    assert told in (gpu_failure(error) or "")
    assert ("ECC" in (gpu_failure(error) or "")) is (told == "failed in the middle of the work")


@pytest.mark.parametrize("error", [RuntimeError("shapes cannot be multiplied"), ValueError("CUDA error"), OSError("no"), KeyError("x")])
def test_any_other_error_is_none_of_the_gpus(error: Exception) -> None:
    assert gpu_failure(error) is None


@pytest.mark.parametrize(("batching", "code"), [(None, "gpu"), (Batching(), "engine")])
def test_the_session_of_a_gpu_that_failed_ends_with_that_reason_and_the_worker_lives_on(
    llama: Path, batching: Batching | None, code: str
) -> None:
    script = FAILING + "from semgap.worker.serve import ServeOptions, serve\nserve(ServeOptions(device='cpu'))"
    worker = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert worker.stdout is not None
    try:
        address = json.loads(worker.stdout.readline())["address"]
        model, policy = ModelFiles(llama, load_digest(llama)), Policy(reply=Reply("token"), keeps="tokens", batching=batching)
        for _ in range(2):  # one client after the other
            link = connect(address)
            spec = SessionSpec(model=model.config, dtype="float32", max_length=32, policy=policy)
            shake_hands_as_client(link, b"", msgspec.to_builtins(spec))
            link.limits = Limits()
            ping(link, 8, 8)
            runtime = RemoteRuntime(link, policy, model, Drawing())
            runtime.upload_weights()
            with pytest.raises(RemoteError, match=r"assert triggered; the results so far are lost\. See `semgap doctor`") as error:
                _first_token(link) if batching else runtime.prefill(np.array([1, 2]), 0, Kind.SETUP)
            assert error.value.code == code and "the GPU (" in str(error.value)
            with pytest.raises(WireError):  # its session is over
                ping(link, 8, 8)
            link.close()
        assert worker.poll() is None
    finally:
        worker.kill()
        worker.wait()
        worker.stdout.close()


def _first_token(link: Link) -> None:
    """Of a request of two tokens, by an engine."""
    ids = codecs.encode(Tensor.from_numpy(np.array([1, 2], np.uint16), TensorClass.TOKENS), "raw")
    link.request(Operation.ADVANCE, messages.Advance((), (Call(1, 0, 2, 1, most=4),)), [ids])


def test_a_session_whose_caches_cannot_be_closed_leaves_nothing_behind(tcp_pair: tuple[socket.socket, socket.socket]) -> None:
    session = Session(Link(tcp_pair[1], Direction.DOWN, Timeouts(5.0, 5.0)), "cpu", 1, Resources(WeightStore(1 << 20)))
    shape = KVShape(layers=2, heads=1, max_length=8, head_dim=4)
    pool = HostPool(shape, DType.F32, shape.nbytes(4))
    caches = LiveCaches(pool, Policy(), None, lambda tokens, cache: torch.zeros(1), Ledger())
    caches.open(0)
    pool._memory = torch.empty(0)  # as useless as the memory of a lost GPU
    session.steps = Steps(session.link, SessionSpec(), None, caches, [])  # type: ignore[arg-type]  # no step runs
    directory = session.samplers._directory = tempfile.TemporaryDirectory()
    with pytest.raises(IndexError):
        session.end()
    assert not Path(directory.name).exists()


def test_a_local_client_whose_gpu_failed_ends_with_that_one_line(llama: Path, client_spec: Callable[..., ClientSpec]) -> None:
    spec = client_spec(llama, Policy(placement="local"))
    path = Path(spec.directory) / "spec.json"
    path.write_bytes(msgspec.json.encode(spec))
    script = FAILING + f"import sys, runpy\nsys.argv = ['client', {str(path)!r}]\n"
    script += "runpy.run_module('semgap.client.measure', run_name='__main__', alter_sys=True)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("semgap client: the GPU (") and "Traceback" not in done.stderr
    assert "device-side assert triggered" in done.stderr
    assert not (Path(spec.directory) / "report.json").exists()
