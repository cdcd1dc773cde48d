"""A trial of kind load: opens its connections, runs its levels, and reconciles each connection. And the reference: each prompt alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from semgap.client.books import body_of, clock_offset, fetch_samples, reconciled, start_samplers
from semgap.client.load_generator import Generator, LevelRun
from semgap.client.load_plan import Planned, plan_load, warmups
from semgap.client.loop import rss_anon_bytes
from semgap.client.probe import probe_link
from semgap.client.remote_runtime import RemoteRuntime
from semgap.client.report import LOGITS_FILE, Connection, Granted, Load, Measured, Report, Session
from semgap.client.runtime import Runtime
from semgap.client.session import open_session
from semgap.client.spec import ClientSpec, WorkerSide
from semgap.engine.model_files import ModelFiles, load_digest
from semgap.wire.batches import Batch
from semgap.wire.link import Link, connect
from semgap.wire.messages import Kind, Operation
from semgap.wire.tcp import Timeouts, tcp_info

_TOP = 8  # logits that the reference keeps of each draw


@dataclass(frozen=True)
class _Opened:
    """A connection whose session has its model."""

    link: Link
    granted: Granted
    start_tcp: dict[str, int]


def run_load(spec: ClientSpec, worker: WorkerSide) -> Report:
    """Runs the levels of a load phase and writes the tokens of each request (logits.npz). Raises as `Generator.run`, and LedgerError."""
    levels, setup = plan_load(spec), dict[str, Any]()
    begin = time.perf_counter()
    opened = [_open(spec, worker, setup if not number else {}) for number in range(spec.phase.links)]
    setup["connections_s"] = time.perf_counter() - begin
    first = opened[0]
    probe = probe_link(first.link, worker.probe.round_trips, worker.probe.payload_bytes)
    generator = Generator([each.link for each in opened], spec.policy, worker.timeout_s)
    warm = [generator.run(warmups(spec), warmup=True)] if spec.phase.warmup_requests else []
    start_samplers(first.link, spec, worker, first.granted)
    start_s = time.monotonic()
    runs = [generator.run(level) for level in levels]
    measured = Measured(start_s, time.monotonic())
    _write_tokens(spec, runs, [len(level.requests) for level in levels])
    samples, clock = fetch_samples(first.link, spec), clock_offset(first.link)
    load = _load(first.link, runs)
    books = [reconciled(each.link) for each in reversed(opened)][::-1]  # the first connection's hold the worker's last counts
    setup["executor_s"] = books[0].peer.executor_s
    link_bytes = _close(opened, worker.stop)
    session = Session(first.granted, probe, first.start_tcp, books[0], samples, clock, link_bytes[0])
    others = [Connection(*each) for each in zip([each.start_tcp for each in opened], books, link_bytes, strict=True)][1:]
    rows = [request.row() for run in (*warm, *runs) for request in run.requests]
    granted = (first.granted.device, first.granted.executor, first.granted.executor_reason, first.granted.executor_compiled_for)
    return Report((), tuple(rows), (), setup, measured, rss_anon_bytes(), *granted, session=session, connections=tuple(others), load=load)


def run_alone(spec: ClientSpec, runtime: Runtime) -> None:
    """The reference of a load: each of its prompts alone, by a local runtime. Writes logits.npz.

    `tokens` (requests, most tokens), -1 after a request's last; `top_tokens`, `top_logits` [requests, most tokens, 8]: the largest logits.
    """
    planned = [request for level in plan_load(spec) for request in level.requests]
    most = max(request.tokens for request in planned)
    tokens = np.full((len(planned), most), -1, dtype=np.int64)
    top_tokens = np.full((len(planned), most, _TOP), -1, dtype=np.int64)
    top_logits = np.full((len(planned), most, _TOP), -np.inf, dtype=np.float32)
    for number, request in enumerate(planned):
        for step, (token, row) in enumerate(_drawn(runtime, request, number)):
            best = np.argsort(-row, kind="stable")[:_TOP]
            tokens[number, step], top_tokens[number, step], top_logits[number, step] = token, best, row[best]
    file = Path(spec.directory) / LOGITS_FILE
    np.savez(file, allow_pickle=False, tokens=tokens, top_tokens=top_tokens, top_logits=top_logits)


def _drawn(runtime: Runtime, request: Planned, number: int) -> Sequence[tuple[int, np.ndarray]]:
    """Each token of a request with the logits (vocabulary,) that it was drawn from."""
    arrival, drawn = runtime.prefill(request.prompt, number, Kind.SETUP), []
    while True:
        assert arrival.logits is not None
        drawn.append((arrival.tokens[0], arrival.logits.as_float32()[-1].copy()))
        if len(drawn) == request.tokens:
            runtime.end_request()
            return drawn
        (arrival,) = runtime.decode(drawn[-1][0], 1, Kind.SETUP)


def _open(spec: ClientSpec, worker: WorkerSide, setup: dict[str, Any]) -> _Opened:
    """One connection, authenticated, with the model on the worker. Adds the seconds and bytes of its steps to `setup`."""
    begin = time.perf_counter()
    link = connect(worker.address, Timeouts(worker.timeout_s, worker.timeout_s))
    granted = open_session(link, spec, worker)
    setup["connect_s"] = time.perf_counter() - begin
    start_tcp = tcp_info(link.sock)
    directory = Path(spec.model_directory)
    runtime = RemoteRuntime(link, spec.policy, ModelFiles(directory, load_digest(directory)), spec.drawing)
    begin = time.perf_counter()
    setup["weights_bytes"] = runtime.upload_weights()
    setup["weights_upload_s"] = time.perf_counter() - begin
    setup["weights_held_before"] = spec.weights_held and not setup["weights_bytes"]
    setup |= {"weights_put_s": runtime.put_s, "weights_held_bytes": runtime.held_bytes}
    setup |= {f"{name}_by_session": [setup[name]] for name in ("weights_bytes", "weights_held_bytes")}
    return _Opened(link, granted, start_tcp)


def _load(link: Link, runs: Sequence[LevelRun]) -> Load:
    """The levels, a row a token, and the engine's steps, which the worker tells."""
    reply = link.request(Operation.GET_BATCHES)
    steps = msgspec.json.decode(reply.payloads[0], type=list[Batch])
    batches = tuple(msgspec.structs.asdict(step) for step in steps)
    levels = [run.summary() for run in runs]
    rows = [
        row
        for run, level in zip(runs, levels, strict=True)
        for request in run.requests
        for row in request.token_rows(level.start_s, level.end_s)
    ]
    return Load(tuple(levels), tuple(rows), batches, body_of(reply))


def _write_tokens(spec: ClientSpec, runs: Sequence[LevelRun], sizes: Sequence[int]) -> None:
    """`tokens` (requests, most tokens), in the order of the rows, -1 where none came; `planned`: each request's row in the reference."""
    requests = [request for run in runs for request in run.requests]
    before = np.cumsum([0, *sizes])
    planned = [int(before[number]) + run.index_of[request.number] for number, run in enumerate(runs) for request in run.requests]
    tokens = np.full((len(requests), max(request.planned.tokens for request in requests)), -1, dtype=np.int64)
    for row, request in zip(tokens, requests, strict=True):
        row[: len(request.tokens)] = request.tokens
    np.savez(Path(spec.directory) / LOGITS_FILE, allow_pickle=False, tokens=tokens, planned=np.array(planned, dtype=np.int64))


def _close(opened: Sequence[_Opened], stop: bool) -> list[dict[str, int]]:
    """Closes all connections, the first one last: it ends the worker if that is the trial's. Gives the bytes of each, up and down."""
    for each in opened[1:]:
        each.link.close()
    if stop:
        opened[0].link.request(Operation.SHUTDOWN)
    opened[0].link.close()
    return [{"up": each.link.ledger.up.frame, "down": each.link.ledger.down.frame} for each in opened]
