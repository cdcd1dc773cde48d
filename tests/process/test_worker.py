"""A real worker process: whatever one client does, it gets a typed error and the next client is served."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import psutil
import pytest
import xxhash

from semgap import codecs
from semgap.cli import main
from semgap.client.probe import ping
from semgap.client.remote_runtime import RemoteRuntime
from semgap.engine.model_files import load_digest
from semgap.policy import Policy, SessionSpec
from semgap.tensors import DType, Tensor, TensorClass
from semgap.wire import frames, messages
from semgap.wire.handshake import AuthError, shake_hands_as_client
from semgap.wire.link import RemoteError
from semgap.wire.messages import Kind, Operation, WeightSpec

if TYPE_CHECKING:
    from started_workers import StartedWorker

Runtime = Callable[..., RemoteRuntime]
Wait = Callable[..., None]


def _raw(operation: int, body: bytes, payload: bytes = b"", sequence: int = 1, flip: int = 0, number: int = 0, **fields: int) -> bytes:
    """A frame with a right checksum, but for `flip`. `number` 0: the frame's is its sequence."""
    values = {"magic": frames.MAGIC, "version": frames.VERSION, "kind": 0, "flags": 0, "header": len(body), "length": len(payload)} | fields
    first = (values["magic"], values["version"], operation, values["kind"], values["flags"], values["header"])
    prefix = struct.pack("<HBBBBHIQ", *first, sequence, values["length"])
    digest = xxhash.xxh3_64_intdigest(struct.pack("<Q", number or sequence) + prefix + body + payload)
    return prefix + struct.pack("<Q", flip ^ digest) + body + payload


def _last_word(sock: socket.socket) -> tuple[str, str]:
    """Code and message of the error frame that ends the connection."""
    received = b""
    sock.settimeout(10)
    with contextlib.suppress(ConnectionResetError):
        while chunk := sock.recv(65536):
            received += chunk
    assert received, "the worker closed without a word"
    length = struct.unpack_from("<H", received, 6)[0]
    error = msgspec.msgpack.decode(received[28 : 28 + length], type=messages.ErrorHeader)
    return error.code, error.message


HELLO = msgspec.msgpack.encode(messages.Hello((), 1, (frames.VERSION,), b"n" * 32))


@pytest.mark.parametrize(
    ("code", "frame"),
    [
        ("magic", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        ("version", _raw(1, HELLO, version=9)),
        ("operation", _raw(77, HELLO)),
        ("flags", _raw(1, HELLO, kind=9)),
        ("checksum", _raw(1, HELLO, flip=1 << 40)),
        ("header", _raw(1, b"\xc1garbage")),
        ("header", _raw(1, msgspec.msgpack.encode([[[0, 0, 99, [1], 1]], 1, [1], b"", b"", b""]))),
        ("header_limit", _raw(1, bytes(40_000))),
        ("payload_limit", _raw(1, HELLO, length=1)),
        ("payload_limit", _raw(1, HELLO, length=1 << 62)),
        ("hello", _raw(12, b"")),
        ("hello", _raw(11, msgspec.msgpack.encode([[], 64]))),
        ("sequence", _raw(1, HELLO, sequence=7, number=1)),
        ("sequence", _raw(1, HELLO, flags=1)),
    ],
)
def test_bad_input_before_the_handshake_gets_a_typed_error(worker: StartedWorker, code: str, frame: bytes) -> None:
    with worker.raw() as sock:
        sock.sendall(frame)
        assert _last_word(sock)[0] == code


@pytest.mark.parametrize(
    ("code", "frame"),
    [
        ("magic", bytes(28)),
        ("version", _raw(11, b"\x92\x90\x00", version=0)),
        ("checksum", _raw(11, b"\x92\x90\x00", sequence=3, flip=1)),
        ("checksum", _raw(11, b"\x92\x90\x00", sequence=3, number=2)),
        ("payload_limit", _raw(11, b"\x92\x90\x00", length=1 << 46)),
        ("payload_limit", _raw(4, msgspec.msgpack.encode([[[5, 2, 8, [1 << 46], 3]], 0, 0]), b"abc", sequence=3)),
        ("length", _raw(4, msgspec.msgpack.encode([[[2, 0, 5, [4], 31]], 0, 0]), bytes(31), sequence=3)),
        ("length", _raw(11, b"\x92\x90\x00", b"unannounced", sequence=3)),
        ("header", _raw(4, msgspec.msgpack.encode([[[2, 0, 99, [4], 32]], 0, 0]), bytes(32), sequence=3)),
        ("header", _raw(4, b"\x93\x90\xa1\xff\x00", sequence=3)),
        ("buffers", _raw(11, msgspec.msgpack.encode([[[0, 0, 1, [0], 0]] * 5000, 0]), sequence=3)),
        ("sequence", _raw(11, b"\x92\x90\x00", sequence=9, number=3)),
        ("operation", _raw(1, HELLO, sequence=3)),
    ],
)
def test_bad_input_inside_a_session_gets_a_typed_error(worker: StartedWorker, code: str, frame: bytes) -> None:
    link = worker.session()
    link.sock.sendall(frame)
    with pytest.raises(RemoteError) as error:
        link.request(Operation.PING, messages.Ping())
    assert error.value.code == code
    link.close()


def test_a_client_of_the_wire_before_is_told_both_versions(worker: StartedWorker) -> None:
    older = frames.VERSION - 1
    with worker.raw() as sock:
        sock.sendall(_raw(1, msgspec.msgpack.encode(messages.Hello((), 1, (older,), b"n" * 32)), version=older))
        assert _last_word(sock) == ("version", f"peer speaks wire version {older}, this side {frames.VERSION}; install the same semgap")


def test_a_wrong_secret_is_told_and_leads_nowhere(worker: StartedWorker) -> None:
    link = worker.link()
    with pytest.raises(AuthError):
        shake_hands_as_client(link, b"x" * 64, {})
    link.close()
    with worker.raw() as sock:
        sock.sendall(_raw(1, HELLO))
        sock.recv(4096)
        sock.sendall(_raw(1, msgspec.msgpack.encode(messages.Hello((), 3, (1,), b"", b"m" * 32, b"{}")), sequence=2))
        assert _last_word(sock)[0] == "auth"


def test_a_silent_client_is_closed_after_five_seconds_and_others_are_served_meanwhile(worker: StartedWorker) -> None:
    with worker.raw() as silent, worker.raw() as dripping:
        begin = time.monotonic()
        dripping.sendall(_raw(1, HELLO)[:10])
        while time.monotonic() - begin < 3:
            link = worker.session()
            ping(link, 8, 8)
            link.close()
            time.sleep(0.5)
        assert _last_word(silent)[0] == "deadline"
        assert 4.5 < time.monotonic() - begin < 8
        assert _last_word(dripping)[0] == "deadline"


def test_a_silent_session_is_closed_after_the_idle_time(start_worker: Callable[..., StartedWorker]) -> None:
    worker = start_worker("--idle-s", "0.6", "--max-sessions", "2")
    link, begin = worker.session(), time.monotonic()
    busy = worker.session()
    turned_away = worker.link()
    with pytest.raises(RemoteError, match="2 sessions are open") as error:
        shake_hands_as_client(turned_away, worker.secret, {})
    assert error.value.code == "busy"
    turned_away.close()
    assert _last_word(link.sock)[0] == "deadline"
    assert time.monotonic() - begin < 5
    busy.close()
    time.sleep(0.3)
    ping(worker.session(), 8, 8)


def test_a_port_that_is_taken_is_named_with_the_way_out(worker: StartedWorker, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--listen", worker.address]) == 1
    assert capsys.readouterr() == (
        "",
        f"semgap serve: address {worker.address} is taken by another process; use another, or port 0 for any free one\n",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--listen", "0.0.0.0:0"), "0.0.0.0:0 is beyond loopback and there is no secret; give --secret-file"),
        (("--listen", "[::]:0"), "is beyond loopback and there is no secret"),
        (("--listen", "203.0.113.9:0", "--secret-file", "SECRET"), "203.0.113.9:0 is not an address of this machine"),
        (("--listen", "not a host:0"), "cannot listen at not a host:0"),
        (("--listen", "5005"), "address '5005' is not HOST:PORT"),
        (("--secret-file", "/nonexistent/secret"), "token file /nonexistent/secret cannot be read"),
        (("--cpus", "4095"), "cannot run on cores (4095,)"),
        (("--io-cpus", "4095"), "cannot run on cores (4095,)"),
    ],
)
def test_a_worker_that_cannot_listen_as_told_says_why_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    (tmp_path / "secret").write_text("s" * 64)
    (tmp_path / "secret").chmod(0o600)
    assert main(["serve", *(str(tmp_path / "secret") if option == "SECRET" else option for option in options)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def _asked(directory: Path, **fields: Any) -> SessionSpec:
    defaults = {"policy": Policy(), "model": json.loads((directory / "config.json").read_text()), "dtype": "float32", "max_length": 32}
    return SessionSpec(**(defaults | fields))


def _offer(model: Path) -> messages.OfferWeights:
    return messages.OfferWeights((), tuple(WeightSpec(t.name, DType.from_torch_name(t.dtype), t.shape) for t in load_digest(model).tensors))


def _tokens(*ids: int) -> list[codecs.Encoded]:
    return [codecs.encode(Tensor.from_numpy(np.array(ids, dtype=np.int64), TensorClass.TOKENS), "raw")]


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"model": {"model_type": "mamba"}}, "model", "'mamba' is not supported; use an unquantised model of llama, mistral"),
        ({"model": {}}, "model", "None is not supported"),
        ({"model": {"model_type": "llama", "num_attention_heads": 0}}, "model", "is not a llama config"),
        ({"congestion": "no_such_cc"}, "session", "'no_such_cc' is not available"),
    ],
)
def test_a_session_that_cannot_be_granted_is_refused(
    worker: StartedWorker, llama: Path, fields: dict[str, Any], code: str, message: str
) -> None:
    link = worker.link()
    with pytest.raises(RemoteError, match=message) as error:
        shake_hands_as_client(link, worker.secret, msgspec.to_builtins(_asked(llama, **fields)))
    assert error.value.code == code
    link.close()


@pytest.mark.parametrize("asked", [{"policy": {"placement": "moon"}}, {"max_length": "x"}, {"unknown": 1}, {"model": []}])
def test_a_session_that_makes_no_sense_is_refused(worker: StartedWorker, asked: dict[str, Any]) -> None:
    link = worker.link()
    with pytest.raises(RemoteError, match="the requested session is not valid") as error:
        shake_hands_as_client(link, worker.secret, asked)
    assert error.value.code == "session"
    link.close()


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (lambda offer: offer.weights[:-1], "model", "was not given"),
        (lambda offer: (WeightSpec(offer.weights[0].name, DType.F32, (7,)), *offer.weights[1:]), "model", "the model wants"),
        (lambda offer: (*offer.weights, WeightSpec("more", DType.F32, (1,))), "model", "more do not belong to the model"),
        (lambda offer: (WeightSpec("huge", DType.F32, (1 << 48,)),), "model", "weights need 1,125,899,906,842,624 bytes"),
        (lambda offer: (WeightSpec("huge", DType.F32, (1 << 48,) * 8),), "model", "use a smaller model"),
    ],
)
def test_an_offer_that_is_not_the_model_is_refused_and_the_right_one_taken_after_it(
    worker: StartedWorker, llama: Path, change: Callable[[messages.OfferWeights], Any], code: str, message: str
) -> None:
    link, offer = worker.session(_asked(llama)), _offer(llama)
    with pytest.raises(RemoteError, match=message) as error:
        link.request(Operation.OFFER_WEIGHTS, messages.OfferWeights((), change(offer)))
    assert error.value.code == code
    wanted = link.request(Operation.OFFER_WEIGHTS, offer).header
    assert isinstance(wanted, messages.WantWeights) and wanted.indices == tuple(range(len(offer.weights)))
    link.close()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "float64"}, "dtype 'float64' cannot cross"),
        ({"dtype": "int64"}, "is not a llama config"),
        ({"max_length": 1 << 40}, "more than the model's context of 128"),
        ({"model": None}, "opened without a model"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(worker: StartedWorker, llama: Path, fields: dict[str, Any], message: str) -> None:
    link = worker.session(_asked(llama, **fields))
    with pytest.raises(RemoteError, match=message):
        link.request(Operation.OFFER_WEIGHTS, _offer(llama))
    ping(link, 8, 8)
    link.close()


def test_forward_before_weights_is_refused_and_the_session_goes_on(worker: StartedWorker, llama: Path) -> None:
    link, offer = worker.session(_asked(llama)), _offer(llama)
    for _ in range(2):
        with pytest.raises(RemoteError) as error:
            link.request(Operation.FORWARD, messages.Forward(), _tokens(1))
        assert error.value.code == "weights"
        link.request(Operation.OFFER_WEIGHTS, offer)
    link.close()


@pytest.mark.parametrize(("executor", "loads"), [("fused", False), ("eager", True)])
def test_a_cpu_session_loads_torch_for_executor_eager_alone(
    worker: StartedWorker, llama: Path, open_runtime: Runtime, executor: str, loads: bool
) -> None:
    runtime = open_runtime(worker, llama, Policy(kv_cache="every_step", weights="every_step"), executor=executor)
    runtime.prefill(np.array([1, 2]), 0, Kind.SETUP)
    (session,) = worker.sessions()
    assert any("libtorch" in mapped.path for mapped in session.memory_maps()) is loads


def test_a_second_offer_starts_from_nothing(worker: StartedWorker, llama: Path, open_runtime: Runtime) -> None:
    runtime = open_runtime(worker, llama, Policy())
    runtime.prefill(np.array([1, 2]), 0, Kind.SETUP)
    link = runtime.link
    link.request(Operation.OFFER_WEIGHTS, _offer(llama))
    for header in (messages.Forward(), messages.Forward((), 1, 2)):
        with pytest.raises(RemoteError, match="weights of the model have not been sent"):
            link.request(Operation.FORWARD, header, _tokens(1))
    with pytest.raises(RemoteError, match="handle 1 is not open"):
        link.request(Operation.RELEASE, messages.Release((), 1))


@pytest.mark.parametrize(
    ("header", "tensors", "code", "message"),
    [
        (messages.Forward((), 99, 2), _tokens(1), "handle", "handle 99 is not open"),
        (messages.Forward((), 1, 3), _tokens(1), "position", "holds 2 positions, the client says 3"),
        (messages.Forward((), 0, 2), _tokens(1), "handle", "a new handle starts at position 0"),
        (messages.Forward((), 1, 2), _tokens(512), "request", r"ids in 0\.\.511"),
        (messages.Forward((), 1, 2), _tokens(-1), "request", r"ids in 0\.\.511"),
        (messages.Forward((), 1, 2), _tokens(), "request", "1 or more ids"),
        (messages.Forward((), 1, 2), _tokens(*range(31)), "request", r"2 \+ 31 positions do not fit max_length 32"),
        (messages.Forward((), 1, 1 << 47), _tokens(1), "request", "do not fit max_length 32"),
        (messages.Forward((), 1, 2), [], "forward", "0 tensors of class tokens in a forward frame"),
        (messages.Forward((), 1, 2), _tokens(1) * 2, "forward", "2 tensors of class tokens"),
    ],
)
def test_a_forward_that_cannot_be_is_refused_and_the_handle_is_as_before(
    worker: StartedWorker,
    llama: Path,
    open_runtime: Runtime,
    header: messages.Forward,
    tensors: list[codecs.Encoded],
    code: str,
    message: str,
) -> None:
    runtime = open_runtime(worker, llama, Policy())
    runtime.prefill(np.array([1, 2]), 0, Kind.SETUP)
    with pytest.raises(RemoteError, match=message) as error:
        runtime.link.request(Operation.FORWARD, header, tensors)
    assert error.value.code == code
    logits = next(runtime.decode(3, 1, Kind.SETUP)).logits
    assert logits is not None and logits.shape == (1, 512)


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor.from_numpy(np.zeros(2, np.float32), TensorClass.TOKENS),
        Tensor.from_numpy(np.zeros(2, np.uint16), TensorClass.TOKENS, DType.BF16),
        Tensor.from_numpy(np.zeros((1, 2), np.int64), TensorClass.TOKENS),
    ],
)
def test_tokens_that_are_no_row_of_integers_are_refused(worker: StartedWorker, llama: Path, open_runtime: Runtime, tensor: Tensor) -> None:
    runtime = open_runtime(worker, llama, Policy())
    with pytest.raises(RemoteError, match="a row of integers was expected"):
        runtime.link.request(Operation.FORWARD, messages.Forward(), [codecs.encode(tensor, "raw")])


def test_a_released_handle_is_gone(worker: StartedWorker, llama: Path, open_runtime: Runtime) -> None:
    runtime = open_runtime(worker, llama, Policy())
    link = runtime.link
    runtime.prefill(np.array([1]), 0, Kind.SETUP)
    link.request(Operation.RELEASE, messages.Release((), 1))
    for operation, header in ((Operation.RELEASE, messages.Release((), 1)), (Operation.FORWARD, messages.Forward((), 1, 1))):
        with pytest.raises(RemoteError, match="handle 1 is not open"):
            link.request(operation, header, _tokens(1) if operation is Operation.FORWARD else [])


def test_a_model_whose_cache_does_not_fit_memory_is_refused_before_its_weights_are_asked_for(worker: StartedWorker, llama: Path) -> None:
    asked = _asked(llama, max_length=1 << 34)
    assert asked.model is not None
    asked.model["max_position_embeddings"] = 1 << 34
    link = worker.session(asked)
    with pytest.raises(RemoteError, match=r"KV memory 26,388,279,066,624 and .*, and cpu has [\d,]+ free") as error:
        link.request(Operation.OFFER_WEIGHTS, _offer(llama))
    assert error.value.code == "model"
    link.close()


def test_one_sessions_handle_means_nothing_in_another(worker: StartedWorker, llama: Path, open_runtime: Runtime) -> None:
    one, other = open_runtime(worker, llama, Policy()), open_runtime(worker, llama, Policy())
    one.prefill(np.array([1]), 0, Kind.SETUP)
    with pytest.raises(RemoteError, match="handle 1 is not open"):
        other.link.request(Operation.FORWARD, messages.Forward((), 1, 1), _tokens(1))


@pytest.mark.parametrize(
    ("indices", "tensor"), [((0,), np.zeros(3, np.float32)), ((1 << 40,), np.zeros(3, np.float32)), ((0, 1), np.zeros(3, np.float32))]
)
def test_weights_that_were_not_offered_end_the_session(
    worker: StartedWorker, llama: Path, indices: tuple[int, ...], tensor: np.ndarray
) -> None:
    link = worker.session(_asked(llama))
    link.request(Operation.OFFER_WEIGHTS, _offer(llama))
    sent = [codecs.encode(Tensor.from_numpy(tensor, TensorClass.WEIGHTS), "raw")]
    with pytest.raises(RemoteError) as error:
        link.request(Operation.PUT_WEIGHTS, messages.PutWeights((), indices, True), sent)
    assert error.value.code == "weights"
    link.close()


def test_a_damaged_compressed_payload_gets_a_typed_error(worker: StartedWorker, llama: Path, open_runtime: Runtime) -> None:
    runtime = open_runtime(worker, llama, Policy())
    bad = codecs.Encoded(TensorClass.TOKENS, 2, DType.I64, (4,), (memoryview(b"not zlib"),), 8, 0)
    with pytest.raises(RemoteError, match="zlib payload is damaged") as error:
        runtime.link.request(Operation.FORWARD, messages.Forward(), [bad])
    assert error.value.code == "payload"


@pytest.mark.parametrize("reply_bytes", [(1 << 28) + 1, 1 << 48])
def test_a_ping_cannot_ask_for_the_workers_memory(worker: StartedWorker, reply_bytes: int) -> None:
    link = worker.session()
    with pytest.raises(RemoteError, match="is over the limit"):
        link.request(Operation.PING, messages.Ping((), reply_bytes))
    link.close()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (messages.TelemetryRequest((), "stop"), "say 'start', then 'stop'"),
        (messages.TelemetryRequest((), "jump"), "say 'start', then 'stop'"),
        (messages.TelemetryRequest((), "start", 0.0, ("host",)), "interval_s is 0; use 0.01 to 60"),
        (messages.TelemetryRequest((), "start", 1e-9, ("host",)), "interval_s is 1e-09"),
        (messages.TelemetryRequest((), "start", float("nan"), ("host",)), "interval_s is nan"),
        (messages.TelemetryRequest((), "start", 0.1, ("../etc",)), "each of host, gpu, dmon at most once"),
    ],
)
def test_telemetry_that_cannot_be_is_refused(worker: StartedWorker, request_: messages.TelemetryRequest, message: str) -> None:
    link = worker.session()
    with pytest.raises(RemoteError, match=message):
        link.request(Operation.TELEMETRY, request_)
    ping(link, 8, 8)
    link.close()


def test_a_client_killed_in_the_middle_of_its_upload_leaves_no_session(worker: StartedWorker, llama: Path, wait_until: Wait) -> None:
    link = worker.session(_asked(llama))
    link.request(Operation.OFFER_WEIGHTS, _offer(llama))
    link.sock.sendall(_raw(3, msgspec.msgpack.encode(messages.PutWeights((), (), True)), sequence=4, length=1 << 20)[:40])
    link.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # as the kernel does for a killed process
    link.close()
    wait_until(lambda: not worker.sessions(), "the session of a killed client ends")


def test_a_client_killed_in_the_middle_of_a_forward_leaves_no_session(
    worker: StartedWorker, llama: Path, open_runtime: Runtime, wait_until: Wait
) -> None:
    runtime = open_runtime(worker, llama, Policy())
    runtime.link.post(Operation.FORWARD, messages.Forward(), _tokens(*range(30)))
    runtime.link.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    runtime.link.close()
    wait_until(lambda: not worker.sessions(), "the session of a killed client ends")


def _alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def test_sigterm_ends_the_worker_its_sessions_and_their_samplers(start_worker: Callable[..., StartedWorker], wait_until: Wait) -> None:
    worker = start_worker()
    link = worker.session()
    link.request(Operation.TELEMETRY, messages.TelemetryRequest((), "start", 0.1, ("host",)))
    pids = [child.pid for child in psutil.Process(worker.process.pid).children(recursive=True)]
    assert len(pids) == 2
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.wait(10) == 0
    wait_until(lambda: not _alive(pids), "session and sampler end")
    with pytest.raises(frames.WireError):
        link.request(Operation.PING, messages.Ping())


def test_sigkill_of_the_worker_takes_its_sessions_along(start_worker: Callable[..., StartedWorker], wait_until: Wait) -> None:
    worker = start_worker()
    link = worker.session()
    pids = [session.pid for session in worker.sessions()]
    assert pids
    worker.process.kill()
    wait_until(lambda: not _alive(pids), "the session ends")
    link.close()


def test_a_client_may_end_the_worker(start_worker: Callable[..., StartedWorker]) -> None:
    worker = start_worker()
    link = worker.session()
    link.request(Operation.SHUTDOWN)
    assert worker.process.wait(10) == 0
    link.close()


def test_a_worker_ends_with_the_process_that_it_was_told_to_follow(tmp_path: Path, wait_until: Wait) -> None:
    script = (
        "import os, subprocess, sys\n"
        "worker = subprocess.Popen([sys.executable, '-m', 'semgap', 'serve', '--parent-pid', str(os.getpid())], stdout=subprocess.PIPE)\n"
        "print(worker.stdout.readline().decode(), end='', flush=True)\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout is not None and parent.stdin is not None
    pid = json.loads(parent.stdout.readline())["pid"]
    assert _alive([pid])
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not _alive([pid]), "the worker ends with its parent")
    parent.stdout.close()
    parent.stdin.close()
