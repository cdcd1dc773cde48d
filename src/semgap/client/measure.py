"""The thin client: tokenizer, the one decode loop of all modes, and the measuring of it.

`python -m semgap.client.measure SPEC.json` runs one trial's requests and leaves report.json, logits.npz and the worker's telemetry in the
directory that the spec names; text.npz where it asks for a text pass, and logits-N.npz of each session N before the last one. Imports
no torch unless the mode is local.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from semgap.client.local_runtime import LocalRuntime
from semgap.client.loop import Observations, rss_anon_bytes, run_requests
from semgap.client.probe import probe_link
from semgap.client.prompts import make_prompts, text_after_prompts
from semgap.client.remote_runtime import RemoteRuntime
from semgap.client.runtime import Runtime
from semgap.client.spec import ClientError, ClientSpec, WorkerSide
from semgap.engine.gpu_failure import gpu_failure
from semgap.engine.model_files import ModelFileError, ModelFiles, load_digest
from semgap.network.spec import require_as_asked
from semgap.policy import Policy, SessionSpec, refused_codec
from semgap.processes.lifetime import end_with_parent
from semgap.processes.machine import boot_id
from semgap.telemetry.clock import offset_s as clock_offset_s
from semgap.wire import frames, messages
from semgap.wire.handshake import read_secret, shake_hands_as_client
from semgap.wire.ledger import LedgerError
from semgap.wire.link import Link, connect
from semgap.wire.messages import Operation
from semgap.wire.reconcile import reconcile
from semgap.wire.tcp import Timeouts, congestion_control, tcp_info

if TYPE_CHECKING:
    pass


_MAX_REPLY_BYTES = 4 << 30


def main(spec_file: str) -> None:
    """Runs the trial of a spec file and writes its report."""
    spec = msgspec.json.decode(Path(spec_file).read_bytes(), type=ClientSpec)
    if spec.parent_pid:
        end_with_parent(spec.parent_pid)
    if spec.cpus:
        os.sched_setaffinity(0, spec.cpus)
    run = _run_local if spec.policy.is_local else _run_remote
    report = run(spec)
    (Path(spec.directory) / "report.json").write_bytes(msgspec.json.encode(report))


def open_local(spec: ClientSpec, setup: dict[str, Any]) -> LocalRuntime:
    """The executor of a local mode in this process; what its set-up took goes into `setup`."""
    return LocalRuntime(
        spec.policy,
        _model(spec),
        spec.drawing,
        threads=spec.threads,
        max_length=spec.max_length,
        device=spec.device,
        executor=spec.executor,
        setup=setup,
        live_requests=spec.phase.live_requests,
    )


def _run_local(spec: ClientSpec) -> dict[str, Any]:
    setup: dict[str, Any] = {}
    runtime = open_local(spec, setup)
    setup["client_start_s"] = _since(spec.spawned_s)
    measured, seen = _measure(runtime, spec)
    return _report(spec, seen, setup, measured) | {"device": str(runtime.device), "executor": runtime.executor_kind}


def _run_remote(spec: ClientSpec) -> dict[str, Any]:
    """Runs the phase's sessions one after the other, each reconciled; the last one is the trial, what was sent before is its setup."""
    assert spec.worker is not None
    start_s = _since(spec.spawned_s)
    uploaded, held = [], []
    for number in range(1, spec.phase.sessions + 1):
        last = number == spec.phase.sessions
        report = _run_session(spec, spec.worker, last)
        uploaded.append(report["setup"]["weights_bytes"])
        held.append(report["setup"]["weights_held_bytes"])
        if not last:
            (Path(spec.directory) / "logits.npz").rename(Path(spec.directory) / f"logits-{number}.npz")
    report["setup"] |= {"client_start_s": start_s, "weights_bytes_by_session": uploaded, "weights_held_bytes_by_session": held}
    return report


def _run_session(spec: ClientSpec, worker: WorkerSide, last: bool) -> dict[str, Any]:
    setup: dict[str, Any] = {}
    model = _model(spec)
    begin = time.perf_counter()
    head = None
    if spec.policy.reply.kind == "hidden_last":
        from semgap.engine.output_head import load_output_head  # loads torch, which no other client needs

        head = load_output_head(model, spec.threads)
        setup |= {"head_load_s": time.perf_counter() - begin, "head_bytes": head.nbytes}
    begin = time.perf_counter()
    link = connect(worker.address, Timeouts(worker.timeout_s, worker.timeout_s))
    granted = open_session(link, spec, worker)
    setup["connect_s"] = time.perf_counter() - begin
    start_tcp = tcp_info(link.sock)
    probe = probe_link(link, worker.probe.round_trips, worker.probe.payload_bytes)
    require_as_asked(worker.network, probe)
    runtime = RemoteRuntime(link, spec.policy, model, spec.drawing, head)
    begin = time.perf_counter()
    setup["weights_bytes"] = runtime.upload_weights()
    setup["weights_upload_s"] = time.perf_counter() - begin
    setup |= {"weights_put_s": runtime.put_s, "weights_held_bytes": runtime.held_bytes}
    cpus = spec.cpus if granted["machine"]["boot_id"] == boot_id() else ()  # of this machine
    sampled = messages.TelemetryRequest((), "start", worker.telemetry.interval_s, worker.telemetry.sources, cpus)
    link.request(Operation.TELEMETRY, sampled)
    measured, seen = _measure(runtime, spec)
    telemetry = _fetch_telemetry(link, spec)
    clock = messages.TelemetryRequest((), "clock")
    offset = clock_offset_s(lambda: _body(link.request(Operation.TELEMETRY, clock)))
    report = _report(spec, seen, setup, measured)
    report |= {"granted": granted, "device": granted["device"], "executor": granted["executor"]}
    report |= {"probe": probe, "worker_telemetry": telemetry, "start_tcp": start_tcp}
    report["worker_clock"] = dict(zip(("offset_s", "error_s"), offset, strict=True))
    report |= _books(link)
    setup["executor_s"] = report["worker_executor_s"]
    if worker.stop and last:
        link.request(Operation.SHUTDOWN)
    report["link_bytes"] = {"up": link.ledger.up.frame, "down": link.ledger.down.frame}  # all of the connection's, the last words too
    link.close()
    return report


def _model(spec: ClientSpec) -> ModelFiles:
    directory = Path(spec.model_directory)
    return ModelFiles(directory, load_digest(directory))


def open_session(link: Link, spec: ClientSpec, worker: WorkerSide, stop_tokens: tuple[int, ...] = ()) -> dict[str, Any]:
    """Authenticates and opens a session for the spec's model and policy. ClientError where the worker computes otherwise than asked."""
    refused = refused_codec(spec.policy, "client")
    if refused:
        raise ClientError(f"the mode cannot be run: {refused}")
    secret = read_secret(Path(worker.secret_file) if worker.secret_file else None)
    congestion_control(link.sock, worker.network.congestion)
    asked = SessionSpec(
        policy=spec.policy,
        model=_model(spec).config,
        dtype=spec.dtype,
        executor=spec.executor,
        max_length=spec.max_length,
        sampling=spec.drawing.rule,
        seed=spec.drawing.seed,
        stop_tokens=stop_tokens,
        congestion=worker.network.congestion,
        model_id=spec.model_id,
        handles=spec.phase.live_requests,
        kv_budget=spec.phase.kv_budget,
    )
    granted = shake_hands_as_client(link, secret, msgspec.to_builtins(asked))
    link.limits = frames.Limits(payload_bytes=_MAX_REPLY_BYTES)
    require_same_threads(worker.address, granted["threads"], spec.threads)
    if spec.device not in ("auto", granted["device"]):
        raise ClientError(f"the worker at {worker.address} computes on {granted['device']}, the config says device: {spec.device}")
    require_promise(spec.policy, granted["device"])
    return granted


def require_same_threads(address: str, theirs: int, ours: int) -> None:
    """ClientError where a worker computes with other threads than the config says."""
    if theirs != ours:
        raise ClientError(
            f"the worker at {address} runs {theirs} threads, the config says threads: {ours}; start it with --threads {ours}, or say "
            f"threads: {theirs}"
        )


def require_promise(policy: Policy, device: str) -> None:
    """ClientError where the mode promises what two devices cannot keep: this side's head runs on its CPU."""
    if policy.reply.kind == "hidden_last" and policy.keeps != "lossy" and device != "cpu":
        raise ClientError(
            f"the mode promises keeps: {policy.keeps}, but the worker computes on {device} and the client applies the output head on its "
            "CPU, which gives other last bits; say keeps: lossy, or device: cpu"
        )


def _books(link: Link) -> dict[str, Any]:
    """The reconciled books of the session, as the report holds them. LedgerError where any side or link does not agree."""
    books = reconcile(link)
    theirs = books["peer"]
    if theirs["kv_host"] and not theirs["kv_host"]["agreed"]:
        raise LedgerError(f"the books of the worker and its KV host: {theirs['kv_host']['reason']}")
    return {
        "client_rows": books["rows"],
        "worker_rows": books["peer_rows"],
        "client_tcp": books["tcp"],
        "worker_tcp": books["peer_tcp"],
        "worker_steps": theirs["steps"],
        "worker_peak_rss_bytes": theirs["peak_rss_bytes"],
        "worker_executor_s": theirs["executor_s"],
        "worker_weight_store_bytes": theirs["weight_store_bytes"],
        "pcie_reason": theirs["pcie_reason"],
        "frame_bytes_by_kind": theirs["frame_bytes_by_kind"],
        "kv_budget_bytes": theirs["kv_budget_bytes"],
        "fallbacks": theirs["fallbacks"],
        "kv_host": theirs["kv_host"],
        "closing_frame_bytes": books["closing_frame_bytes"],
        "congestion": books["congestion"],
    }


def _measure(runtime: Runtime, spec: ClientSpec) -> tuple[dict[str, float], Observations]:
    prompts, warmups = make_prompts(spec)
    begin = time.monotonic()
    seen = run_requests(runtime, spec, prompts, warmups)
    measured = {"start_s": begin, "end_s": time.monotonic()}
    if spec.text_pass:
        _run_text(runtime, spec, prompts)
    return measured, seen


def _run_text(runtime: Runtime, spec: ClientSpec, prompts: Sequence[np.ndarray]) -> None:
    """The requests fed with what the text goes on with, whatever is drawn; leaves text.npz. Over the session that is open already."""
    forced = tuple(tuple(follows.tolist()) for follows in text_after_prompts(spec))
    seen = run_requests(runtime, msgspec.structs.replace(spec, forced_tokens=forced), prompts, [])
    _write_arrays(Path(spec.directory) / "text.npz", seen.arrays() | {"text": np.array(forced, dtype=np.int64)})


def _report(spec: ClientSpec, seen: Observations, setup: dict[str, Any], measured: dict[str, float]) -> dict[str, Any]:
    """Writes logits.npz and gives what goes into report.json."""
    _write_arrays(Path(spec.directory) / "logits.npz", seen.arrays())
    return {
        "steps": seen.steps,
        "requests": seen.requests,
        "setup": setup,
        "measured": measured,
        "pid": os.getpid(),
        "client_peak_rss_anon_bytes": max(seen.peak_rss_anon_bytes, rss_anon_bytes()),
    }


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _fetch_telemetry(link: Link, spec: ClientSpec) -> dict[str, Any]:
    """Stops the worker's samplers and writes their files as worker-SOURCE.parquet; gives rows, reason and cost of each."""
    reply = link.request(Operation.TELEMETRY, messages.TelemetryRequest((), "stop"))
    results = _body(reply)
    for source, payload in zip(results, reply.payloads, strict=True):
        (Path(spec.directory) / f"worker-{source}.parquet").write_bytes(payload)
    return results


def _body(reply: frames.Frame) -> dict[str, Any]:
    assert isinstance(reply.header, messages.Bodied)
    return msgspec.json.decode(reply.header.body)


def _since(spawned_s: float | None) -> float | None:
    """Seconds since the trial spawned this process (CLOCK_MONOTONIC of one host)."""
    return None if spawned_s is None else time.monotonic() - spawned_s


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except (frames.WireError, ClientError, LedgerError, ModelFileError, ValueError) as error:
        sys.exit(f"semgap client: {error}")
    except RuntimeError as error:
        failure = gpu_failure(error)
        if failure is None:
            raise
        sys.exit(f"semgap client: {failure}")
