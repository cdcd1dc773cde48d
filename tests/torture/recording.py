"""Sessions of every remote mode, recorded byte by byte between real clients, a worker and its KV host."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import test_engine
import yaml

from semgap.client.head import load_client_head
from semgap.client.local_runtime import LocalRuntime
from semgap.client.probe import ping
from semgap.client.remote_runtime import RemoteRuntime
from semgap.client.runtime import Drawing
from semgap.engine.model_files import ModelFiles, load_digest
from semgap.experiment.config import Config, check_config
from semgap.experiment.fetch_model import fetch_model
from semgap.policy import Policy, Reply, SessionSpec, policy_from
from semgap.wire import frames, messages
from semgap.wire.frames import Limits
from semgap.wire.handshake import shake_hands_as_client
from semgap.wire.link import Link, connect
from semgap.wire.messages import Kind
from semgap.wire.reconcile import reconcile
from semgap.wire.tcp import Timeouts, parse_address

ROOT = Path(__file__).resolve().parents[2]
LENGTH, STEPS = test_engine.LENGTH, 6
PROMPT = np.arange(3, 70) % 512  # more than a block of KV
_SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
SOURCE = {"source": "random", "architecture": "llama", "config": {"vocab_size": 512, "max_position_embeddings": 128, **_SHAPE}, "seed": 7}
_HELLOS = 2  # frames of a handshake, each way


@dataclass(frozen=True)
class RecordedFrame:
    """A frame as it crossed, but for its checksum; `number` is its place in its direction."""

    operation: int
    kind: int
    flags: int
    sequence: int
    header: bytes
    payload: bytes
    number: int

    def packed(self, number: int | None = None) -> bytes:
        """Its bytes, as frame `number` with a right checksum; without one, where it was."""
        at = number or self.number
        sequence = self.sequence if number is None else at
        prefix = frames.PREFIX.pack(
            *(frames.MAGIC, frames.VERSION, self.operation, self.kind, self.flags, len(self.header), sequence, len(self.payload))
        )
        return sealed(prefix, self.header, self.payload, at)


def sealed(prefix: bytes, header: bytes, payload: bytes, number: int) -> bytes:
    """A frame with the checksum that these bytes have as frame `number`."""
    digest = frames.digest_of(number, prefix)
    digest.update(header)
    digest.update(payload)
    return prefix + frames.DIGEST.pack(digest.intdigest()) + header + payload


@dataclass(frozen=True)
class Recording:
    """One side of a connection: the session that its handshake asked for, the handshake's frames, and those that followed."""

    mode: str
    session: dict[str, Any]
    hellos: tuple[RecordedFrame, ...]
    frames: tuple[RecordedFrame, ...]

    @classmethod
    def of(cls, mode: str, stream: bytes) -> Recording:
        every = tuple(parsed(stream))
        body = msgspec.msgpack.decode(every[1].header, type=messages.Hello).body
        return cls(mode, msgspec.json.decode(body), every[:_HELLOS], every[_HELLOS:])


def parsed(stream: bytes) -> Iterator[RecordedFrame]:
    """The frames of one direction of a connection. Stops at an end in the middle of a frame."""
    at, number = 0, 0
    while at + frames.PREFIX_BYTES <= len(stream):
        _, _, operation, kind, flags, header, sequence, payload = frames.PREFIX.unpack_from(stream, at)
        begin = at + frames.PREFIX_BYTES
        at, number = begin + header + payload, number + 1
        if at <= len(stream):
            yield RecordedFrame(operation, kind, flags, sequence, stream[begin : begin + header], stream[begin + header : at], number)


@dataclass
class Tee:
    """Passes connections on to a server, and keeps what its clients sent: an item of `sent` for each connection."""

    to: str
    sent: list[bytearray] = field(default_factory=list)
    listener: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))

    @property
    def address(self) -> str:
        return "{}:{}".format(*self.listener.getsockname()[:2])

    def serve(self) -> None:
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection(parse_address(self.to))
                self.sent.append(bytearray())
                threading.Thread(target=_pump, args=(client, server, self.sent[-1]), daemon=True).start()
                threading.Thread(target=_pump, args=(server, client, bytearray()), daemon=True).start()


@contextlib.contextmanager
def tee(to: str) -> Iterator[Tee]:
    """A tee in front of a server."""
    running = Tee(to)
    threading.Thread(target=running.serve, daemon=True).start()
    try:
        yield running
    finally:
        running.listener.close()


def _pump(source: socket.socket, sink: socket.socket, kept: bytearray) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            kept += data
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def tiny_model(directory: Path) -> Path:
    """The directory of the campaign's model, of 30 KB."""
    fetch_model(SOURCE, "tiny", "float32", directory)
    return directory


def config() -> Config:
    """The default config over the tiny model, with every mode."""
    raw = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    raw["define"]["models"], raw["models"] = {"tiny": SOURCE}, ["tiny"]
    raw |= {"max_length": LENGTH, "device": "cpu"}
    return check_config(raw, ROOT)


def remote_modes() -> dict[str, Policy]:
    """Every remote mode of config/config.yaml that this machine can run."""
    rows = yaml.safe_load((ROOT / "config/config.yaml").read_text())["define"]["modes"]
    fields = set(Policy.__struct_fields__)
    own = {mode: policy_from({key: value for key, value in row.items() if key in fields}, mode) for mode, row in rows.items()}
    return {mode: policy for mode, policy in own.items() if not policy.is_local}


def session_of(policy: Policy, model: Path) -> SessionSpec:
    """The session that a client of this mode asks for."""
    digest = load_digest(model)
    handles = 4 if policy.batching else 2
    return SessionSpec(policy=policy, model=ModelFiles(model, digest).config, max_length=LENGTH, model_id=digest.sha256, handles=handles)


def opened(address: str, secret: bytes, session: SessionSpec, timeout_s: float = 60.0, tls: bool = False) -> Link:
    """An authenticated link."""
    link = connect(address, Timeouts(timeout_s, timeout_s))
    shake_hands_as_client(link, secret, msgspec.to_builtins(session), tls)
    link.limits = Limits()
    return link


def run_session(address: str, secret: bytes, policy: Policy, model: Path, steps: int = STEPS, tls: bool = False) -> list[int]:
    """A whole session of a mode, with everything that its clients do; gives its tokens. Raises what a client would."""
    link = opened(address, secret, session_of(policy, model), tls=tls)
    try:
        ping(link, 64, 64)
        runtime = RemoteRuntime(link, policy, ModelFiles(model, load_digest(model)), Drawing(), _head(policy, model))
        runtime.upload_weights()
        tokens = _batched(link, policy, steps) if policy.batching else _alone(runtime, policy, steps)
        reconcile(link)
        return tokens
    finally:
        link.close()


def _head(policy: Policy, model: Path) -> Any:
    return load_client_head(ModelFiles(model, load_digest(model)), "fused", 1) if policy.reply.kind == "hidden_last" else None


def _batched(link: Link, policy: Policy, steps: int) -> list[int]:
    client = test_engine.Client(link)
    return client.run({1: PROMPT}, steps + 1, policy.window)[1]


def _alone(runtime: RemoteRuntime, policy: Policy, steps: int) -> list[int]:
    tokens = list(runtime.prefill(PROMPT, 0, Kind.REGULAR).tokens)
    if not policy.is_stateless:
        runtime.decode_alone(len(PROMPT), tokens[0], 2)
    pressed = policy.kv_cache == "resident"
    while len(tokens) <= steps:
        if pressed and len(tokens) in (2, 4):
            runtime.evict([0, 1])
            if len(tokens) == 4:
                runtime.restore()
        for arrival in runtime.decode(tokens[-1], steps + 1 - len(tokens) if len(tokens) > 2 else 1, Kind.REGULAR):
            tokens += arrival.tokens
    runtime.end_request()
    if policy.shadow == "kvhost" and policy.recovery == "delta":
        _hand_over(runtime)
    return tokens


def _hand_over(runtime: RemoteRuntime) -> None:
    """A request that is promised to another worker, kept for it, and expected and taken by this one itself."""
    kv_id = runtime.hand_over()
    runtime.expect(kv_id, len(PROMPT))
    runtime.prefill(PROMPT, 1, Kind.REGULAR)
    kept = runtime.flush(Kind.REGULAR).kept
    runtime.attach(kv_id if kept else None, 2, PROMPT, Kind.REGULAR)
    for request in (2, 1):
        runtime.select(request)
        runtime.end_request()


def expected_tokens(model: Path, steps: int = STEPS) -> list[int]:
    """The tokens of the same session without a network."""
    policy = Policy(placement="local", reply=Reply("logits_last"))
    files = ModelFiles(model, load_digest(model))
    runtime = LocalRuntime(policy, files, Drawing(), threads=1, max_length=LENGTH, device="cpu", setup={})
    tokens = list(runtime.prefill(PROMPT, 0, Kind.SETUP).tokens)
    while len(tokens) <= steps:
        tokens += [token for arrival in runtime.decode(tokens[-1], 1, Kind.SETUP) for token in arrival.tokens]
    return tokens
