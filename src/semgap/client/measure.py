"""The thin client: runs one trial's requests, measures them, and writes what it saw.

`python -m semgap.client.measure SPEC.json` leaves report.json, logits.npz and the worker's telemetry in the spec's directory; also
text.npz after a text pass, and logits-N.npz of each session N but the last. Imports torch for executors that do.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from semgap.client.books import clock_offset, fetch_samples, reconciled, start_samplers
from semgap.client.control import Control
from semgap.client.handover import Handover, SecondWorker
from semgap.client.head import load_client_head
from semgap.client.load import run_alone, run_load
from semgap.client.local_runtime import LocalRuntime
from semgap.client.loop import Observations, rss_anon_bytes, run_requests
from semgap.client.prefixes import publish_prefixes, require_found
from semgap.client.probe import probe_kv_link, probe_link
from semgap.client.prompts import Prompts, make_prompts, text_after_prompts
from semgap.client.remote_runtime import RemoteRuntime
from semgap.client.report import LOGITS_FILE, TEXT_FILE, Measured, Report, Session, session_logits_file
from semgap.client.runtime import ClientHead, Runtime
from semgap.client.session import open_session
from semgap.client.spec import ClientError, ClientSpec, WorkerSide
from semgap.engine.gpu_failure import gpu_failure
from semgap.engine.model_files import ModelFileError, ModelFiles, load_digest
from semgap.processes.lifetime import end_with_parent
from semgap.processes.machine import out_of_memory
from semgap.wire import frames
from semgap.wire.ledger import LedgerError
from semgap.wire.link import Link, connect
from semgap.wire.messages import Operation
from semgap.wire.tcp import Timeouts, tcp_info


def main(spec_file: str) -> None:
    """Runs the trial of a spec file and writes its report."""
    spec = msgspec.json.decode(Path(spec_file).read_bytes(), type=ClientSpec)
    if spec.parent_pid:
        end_with_parent(spec.parent_pid)
    if spec.cpus:
        os.sched_setaffinity(0, spec.cpus)
    prompts, start_s = ([], []) if spec.phase.is_load else make_prompts(spec), _since(spec.spawned_s)
    if spec.waits:
        spec = msgspec.structs.replace(spec, worker=msgspec.json.decode(sys.stdin.buffer.read(), type=WorkerSide | None))
    report = (_run_local if spec.policy.is_local else _run_remote)(spec, prompts)
    msgspec.structs.replace(report, setup=report.setup | {"client_start_s": start_s}).write(Path(spec.directory))


def open_local(spec: ClientSpec, setup: dict[str, Any]) -> LocalRuntime:
    """A local mode's executor in this process. Adds the seconds of its steps to `setup`."""
    return LocalRuntime(
        spec.policy,
        _model(spec),
        spec.drawing,
        threads=spec.threads,
        max_length=spec.max_length,
        device=spec.device,
        executor=spec.executor,
        setup=setup,
        handles=spec.handles,
    )


def _run_local(spec: ClientSpec, prompts: Prompts) -> Report:
    setup: dict[str, Any] = {}
    runtime = open_local(spec, setup)
    if spec.phase.is_load:
        begin_s = time.monotonic()
        run_alone(spec, runtime)
        return Report((), (), (), setup, Measured(begin_s, time.monotonic()), rss_anon_bytes(), runtime.device, *runtime.executor)
    measured, seen = _measure(runtime, spec, prompts)
    report = _report(spec, setup, measured, seen, runtime.device, runtime.executor)
    return msgspec.structs.replace(report, floor=runtime.floor())


def _run_remote(spec: ClientSpec, prompts: Prompts) -> Report:
    """Runs the phase's sessions in turn, after one that publishes prefixes if the phase has some, and reconciles each. The last one is the
    trial; the earlier ones belong to its setup.
    """
    assert spec.worker is not None
    if spec.phase.is_load:
        return run_load(spec, spec.worker)
    worker, spec = spec.worker, msgspec.structs.replace(spec, salt=os.urandom(16).hex())
    published = publish_prefixes(spec, worker, _model(spec), prompts[0])
    setups = []
    for number in range(1, spec.phase.sessions + 1):
        last = number == spec.phase.sessions
        report = _run_session(spec, worker, prompts, last)
        require_found(spec, _model(spec), report)
        setups.append(report.setup)
        if not last:
            (Path(spec.directory) / LOGITS_FILE).rename(Path(spec.directory) / session_logits_file(number))
    by_session = {f"{name}_by_session": [setup[name] for setup in setups] for name in ("weights_bytes", "weights_held_bytes")}
    return msgspec.structs.replace(report, setup=report.setup | by_session, connections=published)


def _run_session(spec: ClientSpec, worker: WorkerSide, prompts: Prompts, last: bool) -> Report:
    setup: dict[str, Any] = {}
    begin = time.perf_counter()
    link = connect(worker.address, Timeouts(worker.timeout_s, worker.timeout_s))
    granted = open_session(link, spec, worker)
    setup["connect_s"] = time.perf_counter() - begin
    start_tcp = tcp_info(link.sock)
    probe = probe_link(link, worker.probe.round_trips, worker.probe.payload_bytes)
    head = _load_head(spec, granted.executor, setup)
    runtime: Runtime = _upload(link, spec, head, setup)
    second = SecondWorker.opened(spec, worker, _model(spec), head) if worker.second else None
    if second:
        assert isinstance(runtime, RemoteRuntime)
        runtime = Handover(runtime, second.runtime, spec.policy)
    over_kv = worker.network.kv is not None and spec.policy.shadow == "kvhost"
    kv_probe = probe_kv_link(link, worker.probe.round_trips, worker.probe.payload_bytes) if over_kv else None
    start_samplers(link, spec, worker, granted)
    measured, seen = _measure(runtime, spec, prompts)
    samples, clock = fetch_samples(link, spec), clock_offset(link)
    executor = (granted.executor, granted.executor_reason, granted.executor_compiled_for)
    report = _report(spec, setup, measured, seen, granted.device, executor)
    moved_to = second.close(worker.stop and last) if second else None
    books = reconciled(link)
    setup["executor_s"] = books.peer.executor_s
    if worker.stop and last:
        link.request(Operation.SHUTDOWN)
    link_bytes = {"up": link.ledger.up.frame, "down": link.ledger.down.frame}  # with the shutdown's
    link.close()
    session = Session(granted, probe, start_tcp, books, samples, clock, link_bytes, kv_probe)
    return msgspec.structs.replace(report, session=session, second=moved_to)


def _model(spec: ClientSpec) -> ModelFiles:
    directory = Path(spec.model_directory)
    return ModelFiles(directory, load_digest(directory))


def _load_head(spec: ClientSpec, executor: str, setup: dict[str, Any]) -> ClientHead | None:
    if spec.policy.reply.kind != "hidden_last":
        return None
    begin = time.perf_counter()
    head = load_client_head(_model(spec), executor, spec.threads)
    setup |= {"head_load_s": time.perf_counter() - begin, "head_bytes": head.nbytes}
    return head


def _upload(link: Link, spec: ClientSpec, head: ClientHead | None, setup: dict[str, Any]) -> RemoteRuntime:
    runtime = RemoteRuntime(link, spec.policy, _model(spec), spec.drawing, head)
    begin = time.perf_counter()
    setup["weights_bytes"] = runtime.upload_weights()
    setup["weights_upload_s"] = time.perf_counter() - begin
    setup["weights_held_before"] = spec.weights_held and not setup["weights_bytes"]
    setup |= {"weights_put_s": runtime.put_s, "weights_held_bytes": runtime.held_bytes}
    return runtime


def _measure(runtime: Runtime, spec: ClientSpec, prompts: Prompts) -> tuple[Measured, Observations]:
    measured_prompts, warmups = prompts
    begin = time.monotonic()
    control = Control(runtime, spec.policy, spec.phase) if spec.control else None
    seen = run_requests(runtime, spec, measured_prompts, warmups, control)
    measured = Measured(begin, time.monotonic())
    if spec.text_pass:
        _run_text(runtime, spec, measured_prompts)
    return measured, seen


def _run_text(runtime: Runtime, spec: ClientSpec, prompts: Sequence[np.ndarray]) -> None:
    """Runs the requests again in the same session, fed with the text that follows each prompt. Writes text.npz."""
    forced = tuple(tuple(follows.tolist()) for follows in text_after_prompts(spec))
    seen = run_requests(runtime, msgspec.structs.replace(spec, forced_tokens=forced), prompts, [])
    arrays = seen.arrays() | {"text": np.array(forced, dtype=np.int64)}
    np.savez(Path(spec.directory) / TEXT_FILE, allow_pickle=False, **arrays)


def _report(
    spec: ClientSpec,
    setup: dict[str, Any],
    measured: Measured,
    seen: Observations,
    device: str,
    executor: tuple[str, str | None, str | None],
) -> Report:
    """The report without its session. Writes logits.npz."""
    np.savez(Path(spec.directory) / LOGITS_FILE, allow_pickle=False, **seen.arrays())
    peak_bytes = max(seen.peak_rss_anon_bytes, rss_anon_bytes())
    rows = (tuple(seen.steps), tuple(seen.requests), tuple(seen.control))
    return Report(*rows, setup, measured, peak_bytes, device, *executor)


def _since(spawned_s: float | None) -> float | None:
    """Seconds since the trial spawned this process (CLOCK_MONOTONIC of one host), or None if none did."""
    return None if spawned_s is None else time.monotonic() - spawned_s


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except (frames.WireError, ClientError, LedgerError, ModelFileError, ValueError) as error:
        sys.exit(f"semgap client: {error}")
    except MemoryError as error:
        sys.exit(f"semgap client: {out_of_memory(error)}")
    except RuntimeError as error:
        failure = gpu_failure(error)
        if failure is None:
            raise
        sys.exit(f"semgap client: {failure}")
