"""A client's session with a worker: authentication, and the agreement on model, policy and executor. Imports no torch."""

from pathlib import Path

import msgspec

from semgap.client.report import Granted
from semgap.client.spec import ClientError, ClientSpec, WorkerSide
from semgap.engine.model_files import ModelFiles, load_digest
from semgap.policy import Policy, SessionSpec, refused_codec
from semgap.wire import frames
from semgap.wire.handshake import read_secret, shake_hands_as_client
from semgap.wire.link import Link
from semgap.wire.tcp import congestion_control

_MAX_REPLY_BYTES = 4 << 30


def open_session(link: Link, spec: ClientSpec, worker: WorkerSide, stop_tokens: tuple[int, ...] = ()) -> Granted:
    """Authenticates and opens a session for the spec's model and policy. ClientError if the worker's threads or device are others."""
    refused = refused_codec(spec.policy, "client")
    if refused:
        raise ClientError(f"the mode cannot be run: {refused}")
    secret = read_secret(Path(worker.secret_file) if worker.secret_file else None)
    congestion_control(link.sock, worker.network.congestion)
    asked = SessionSpec(
        policy=spec.policy,
        model=ModelFiles(Path(spec.model_directory), load_digest(Path(spec.model_directory))).config,
        dtype=spec.dtype,
        executor=spec.executor,
        max_length=spec.max_length,
        sampling=spec.drawing.rule,
        seed=spec.drawing.seed,
        stop_tokens=stop_tokens,
        congestion=worker.network.congestion,
        model_id=spec.model_id,
        salt=spec.salt,
        handles=spec.handles,
        kv_budget=spec.phase.kv_budget,
    )
    granted = msgspec.convert(shake_hands_as_client(link, secret, msgspec.to_builtins(asked), worker.tls), Granted)
    link.limits = frames.Limits(payload_bytes=_MAX_REPLY_BYTES)
    require_same_threads(worker.address, granted.threads, spec.threads)
    if spec.device not in ("auto", granted.device):
        raise ClientError(f"the worker at {worker.address} computes on {granted.device}, the config says device: {spec.device}")
    require_promise(spec.policy, granted.device)
    return granted


def require_same_threads(address: str, theirs: int, ours: int) -> None:
    """ClientError if the worker has another number of threads than the config."""
    if theirs != ours:
        way_out = f"start it with --threads {ours}, or say threads: {theirs}"
        raise ClientError(f"the worker at {address} runs {theirs} threads, the config says threads: {ours}; {way_out}")


def require_promise(policy: Policy, device: str) -> None:
    """ClientError if the mode promises equal bits and its two halves run on two kinds of device: the client's head runs on its CPU."""
    if policy.reply.kind == "hidden_last" and policy.keeps != "lossy" and device != "cpu":
        raise ClientError(
            f"the mode promises keeps: {policy.keeps}, but the worker computes on {device} and the client applies the output head on its "
            "CPU, which gives other last bits; say keeps: lossy, or device: cpu"
        )
