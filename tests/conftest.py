"""What several test files share: tiny models, socket pairs, and started worker processes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import struct
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from started_workers import KVCluster, StartedWorker, started_worker

if not torch.cuda.is_available():  # Triton's kernels run in its interpreter; it looks when it is first imported
    os.environ["TRITON_INTERPRET"] = "1"

from semgap.client.probe import ping
from semgap.client.remote_runtime import RemoteRuntime
from semgap.client.runtime import ClientHead
from semgap.client.session import open_session
from semgap.client.spec import ClientSpec, Phase, Probe, Telemetry, WorkerSide
from semgap.engine.model_files import ModelFiles, load_digest
from semgap.experiment.fetch_model import fetch_model
from semgap.policy import Policy
from semgap.processes import machine
from semgap.wire.link import Link, connect
from semgap.wire.tcp import Timeouts

torch.set_num_threads(1)  # on shared cores, threads spend their time waiting for each other
ROOT = Path(__file__).resolve().parents[1]
SHAPES: dict[str, dict[str, Any]] = {
    "gptj": {"n_positions": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "gpt2": {"n_positions": 96, "n_embd": 64, "n_layer": 2, "n_head": 4},
    "llama": {
        "max_position_embeddings": 128,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
_KIN = {  # of Llama
    "max_position_embeddings": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SHAPES |= {  # each with the settings that tell its family from Llama's
    "mistral": _KIN | {"head_dim": 24, "sliding_window": 100},
    "qwen2": _KIN,
    "qwen3": _KIN | {"head_dim": 32, "tie_word_embeddings": True},
    "phi3": _KIN
    | {
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 128,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "short_factor": [1.0, 1.1, 1.5, 2.0],
            "long_factor": [1.0, 2.0, 3.0, 4.0],
        },
    },
    "olmo2": _KIN,
    "smollm3": _KIN | {"no_rope_layers": [1, 0]},
    "granite": _KIN | {"attention_multiplier": 0.1, "embedding_multiplier": 6.0, "residual_multiplier": 0.3, "logits_scaling": 3.0},
    "gpt_neox": {name: value for name, value in _KIN.items() if name != "num_key_value_heads"},
}
VOCAB = 512
ALONE = "pytest.mark.alone"  # a mark of the whole file: the scheduler sees names of tests, not their marks


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """In several processes (`make test`), the files marked `pytest.mark.alone` share one process; each other file goes to either."""
    from xdist.scheduler import LoadScopeScheduling

    @cache
    def scope_of(file: str) -> str:
        return "alone" if ALONE in (config.rootpath / file).read_text() else file

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope_of(nodeid.partition("::")[0])

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Directory of a family's tiny random model, made once; read only by agreement."""

    @cache
    def make(family: str, dtype: str = "float32") -> Path:
        directory = tmp_path_factory.mktemp("models") / family
        config = {"vocab_size": VOCAB, **SHAPES[family]}
        fetch_model({"source": "random", "architecture": family, "config": config, "seed": 7}, family, dtype, directory)
        return directory

    return make


@pytest.fixture(scope="session")
def llama(model_of: Callable[[str], Path]) -> Path:
    return model_of("llama")


@pytest.fixture(scope="session")
def long_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of 3 layers with room for several blocks."""
    config = {"vocab_size": 512, "max_position_embeddings": 512, "hidden_size": 128, "intermediate_size": 256}
    config |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    directory = tmp_path_factory.mktemp("models") / "long"
    fetch_model({"source": "random", "architecture": "llama", "config": config, "seed": 7}, "long", "float32", directory)
    return directory


@pytest.fixture(scope="session")
def other_theta(long_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of `long_llama` under another config: its keys are rotated otherwise."""
    directory = tmp_path_factory.mktemp("models") / "theta"
    shutil.copytree(long_llama, directory)
    config = json.loads((directory / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 500.0
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def tcp_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a loopback TCP connection; reads and writes wake every 0.1 s, as link.py has them do."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    wake = struct.pack("ll", 0, 100_000)
    for sock in (one, other):
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wake)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wake)
    with one, other:
        yield one, other


@pytest.fixture(scope="module")
def own_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This process is a workflow: its trials fork their processes as a run's do, and wait for no other trial of this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "LOCK", tmp_path_factory.mktemp("lock") / "measure.lock")
        patch.setenv("SEMGAP_WORKFLOW", f"{socket.gethostname()}:{os.getpid()}")
        patch.delenv("SLURM_JOB_ID", raising=False)
        yield


@pytest.fixture
def started_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's trials start programs anew, as outside a workflow."""
    monkeypatch.delenv("SEMGAP_WORKFLOW", raising=False)


@pytest.fixture(scope="module")
def start_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., StartedWorker]]:
    """Starts workers that all tests of a file share."""
    with contextlib.ExitStack() as stack:
        yield lambda *options: stack.enter_context(started_worker(tmp_path_factory.mktemp("worker"), *options))


@pytest.fixture
def kv_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KVCluster]:
    with contextlib.ExitStack() as stack:
        yield KVCluster(tmp_path_factory.mktemp("cluster"), stack)


@pytest.fixture(scope="module")
def kv_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StartedWorker, StartedWorker]]:
    """A KV host and a worker for all tests of a module that leave both alive."""
    with contextlib.ExitStack() as stack:
        cluster = KVCluster(tmp_path_factory.mktemp("pair"), stack)
        host = cluster.host()
        yield host, cluster.worker(host.address)


@pytest.fixture
def start_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., StartedWorker]]:
    """Starts workers with options of one's own; they end with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *options: stack.enter_context(started_worker(tmp_path_factory.mktemp("worker"), *options))


@pytest.fixture(scope="session")
def shared_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartedWorker]:
    """One worker for all tests that must leave it alive, which is a part of what they test."""
    with started_worker(tmp_path_factory.mktemp("worker"), "--parent-pid", str(os.getpid())) as worker:
        yield worker


@pytest.fixture
def worker(shared_worker: StartedWorker) -> Iterator[StartedWorker]:
    """The shared worker; after the test it must still serve the next client."""
    yield shared_worker
    assert shared_worker.process.poll() is None, shared_worker.log.read_text()
    link = shared_worker.session()
    ping(link, 64, 64)
    link.close()


@pytest.fixture
def client_spec(tmp_path: Path) -> Callable[..., ClientSpec]:
    """The spec of a trial's client over a model directory; `worker` is a StartedWorker for remote modes."""

    def make(model: Path, policy: Policy, worker: StartedWorker | None = None, phase: Phase | None = None, **more: Any) -> ClientSpec:
        side = None
        if worker:
            side = WorkerSide(worker.address, Telemetry(0.1, ()), Probe(2, 1024), secret_file=str(worker.secret_file))
        defaults: dict[str, Any] = {
            "directory": str(tmp_path),
            "model_directory": str(model),
            "prompts_file": str(ROOT / "resources/prompts/english.txt"),
            "policy": policy,
            "phase": phase or Phase("decode", (12,), requests=2, steps=3),
            "dtype": "float32",
            "threads": 1,
            "max_length": 32,
            "device": "cpu",
            "worker": side,
        }
        return ClientSpec(**(defaults | more))

    return make


@pytest.fixture
def open_runtime(client_spec: Callable[..., ClientSpec]) -> Iterator[Callable[..., RemoteRuntime]]:
    """A RemoteRuntime with its weights sent, on a session of its own."""
    links: list[Link] = []

    def make(
        worker: StartedWorker, model: Path, policy: Policy, head: ClientHead | None = None, upload: bool = True, **more: Any
    ) -> RemoteRuntime:
        stop_tokens = more.pop("stop_tokens", ())
        spec = client_spec(model, policy, worker, **more)
        assert spec.worker is not None
        link = connect(worker.address, Timeouts(20.0, 20.0))
        links.append(link)
        open_session(link, spec, spec.worker, stop_tokens)
        runtime = RemoteRuntime(link, policy, ModelFiles(model, load_digest(model)), spec.drawing, head)
        if upload:
            runtime.upload_weights()
        return runtime

    yield make
    for link in links:
        link.close()


@pytest.fixture
def wait_until() -> Callable[..., None]:
    """Waits for a condition, at most `timeout_s`; says what it waited for."""

    def wait(condition: Callable[[], bool], what: str, timeout_s: float = 15.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
            time.sleep(0.02)

    return wait
