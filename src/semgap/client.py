"""The thin client: tokenizer, the one decode loop of all modes, and the measuring of it.

`python -m semgap.client SPEC.json` runs one trial's requests and leaves report.json, logits.npz and the worker's telemetry in the
directory that the spec names; text.npz where it asks for a text pass, and logits-N.npz of each session N before the last one. Imports
no torch unless the mode is local.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import xxhash
from tokenizers import Tokenizer

from semgap import wire
from semgap.books import close_books
from semgap.codecs import Encoded
from semgap.gpufault import gpu_failure
from semgap.ledger import Ledger, LedgerError
from semgap.lifetime import end_with_parent
from semgap.link import (
    Link,
    Timeouts,
    congestion_control,
    connect,
    control,
    read_secret,
    shake_hands_as_client,
    tcp_info,
)
from semgap.machine import boot_id
from semgap.network import Network, require_as_asked
from semgap.policy import Policy, SessionSpec, refused_codec
from semgap.prompts import load_passages, make_prompt
from semgap.runtime import Arrival, Drawing, LocalRuntime, ModelFiles, RemoteRuntime, Runtime
from semgap.sources import ModelFileError, load_digest
from semgap.telemetry.clock import offset_s as clock_offset_s
from semgap.wire import Kind, Operation

if TYPE_CHECKING:
    from semgap.executor import OutputHead

_PING_BYTES = 64
_MAX_REPLY_BYTES = 4 << 30


class Phase(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the requests of a trial are. `requests` for each prompt length; `steps` decode steps after each prefill.

    `live_requests` of them are alive at a time and decode in turns, over KV memory for the fraction `kv_budget` of their caches.
    Before decode step i, the fraction evict_fractions[i mod n] of the layers is taken off the device.
    """

    kind: str
    prompt_lengths: tuple[int, ...]
    requests: int = 1
    warmup_requests: int = 1
    warmup_steps: int = 2
    steps: int = 0
    sessions: int = 1
    live_requests: int = 1
    kv_budget: float = 1.0
    evict_fractions: tuple[float, ...] = ()


class Telemetry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    interval_s: float
    sources: tuple[str, ...]


class Probe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the link is probed before the trial: 64-byte round trips, and payload bytes each way."""

    round_trips: int
    payload_bytes: int


class WorkerSide(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The worker and how to deal with it. `stop`: it was started for this trial and ends with it."""

    address: str
    telemetry: Telemetry
    probe: Probe
    secret_file: str | None = None
    stop: bool = False
    network: Network = Network()
    timeout_s: float = 120.0


class ClientSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One trial, as the client needs to know it. `text_pass`: the measured requests once more after it, fed with the text itself."""

    directory: str
    model_directory: str
    prompts_file: str
    policy: Policy
    phase: Phase
    dtype: str
    threads: int
    max_length: int
    device: str
    executor: str = "auto"
    drawing: Drawing = msgspec.field(default_factory=Drawing)
    cpus: tuple[int, ...] = ()
    worker: WorkerSide | None = None
    forced_tokens: tuple[tuple[int, ...], ...] | None = None
    text_pass: bool = False
    layers: int = 0
    model_id: str = ""
    spawned_s: float | None = None
    parent_pid: int | None = None


class ClientError(Exception):
    """The trial cannot be run as its spec says."""


@dataclass
class Observations:
    """What the loop saw: rows of steps and requests, and the measured requests themselves."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    measured: list[_Request] = field(default_factory=list)
    peak_rss_anon_bytes: int = 0

    def add(self, request: _Request) -> None:
        """Takes a finished request."""
        self.steps += request.rows
        self.requests.append(_request_row(request.index, request.warmup, len(request.prompt), [row["latency_s"] for row in request.rows]))
        self.peak_rss_anon_bytes = max(self.peak_rss_anon_bytes, _rss_anon_bytes())
        if not request.warmup:
            self.measured.append(request)

    def arrays(self) -> dict[str, np.ndarray]:
        """Of the measured requests (requests, steps + 1): tokens, and where logits were seen their digests, last rows, other draws."""
        arrays = {"tokens": np.array([request.tokens for request in self.measured], dtype=np.int64)}
        if not self.measured[0].last_logits:
            return arrays
        return arrays | {
            "digests": np.array([request.digests for request in self.measured], dtype=np.uint64),
            "last_digests": np.array([request.last_digests for request in self.measured], dtype=np.uint64),
            "last_logits": np.array([request.last_logits for request in self.measured], dtype=np.float32),
            "others": _padded([request.others for request in self.measured]),
        }


def run_requests(runtime: Runtime, spec: ClientSpec, prompts: Sequence[np.ndarray], warmups: Sequence[np.ndarray]) -> Observations:
    """The warm-up requests, then the measured ones; every mode goes through here and nowhere else."""
    seen = Observations()
    numbered = [*((prompt, None) for prompt in warmups), *((prompt, number) for number, prompt in enumerate(prompts))]
    order = itertools.count()
    requests = [_Request(spec, index, prompt, number, order) for index, (prompt, number) in enumerate(numbered)]
    for warm in (True, False):
        group = [request for request in requests if request.warmup is warm]
        for first in range(0, len(group), spec.phase.live_requests):
            _run_together(runtime, group[first : first + spec.phase.live_requests], seen)
    return seen


def _run_together(runtime: Runtime, requests: Sequence[_Request], seen: Observations) -> None:
    """Requests that are alive at the same time: their prefills one after the other, then their decode steps in turns."""
    for request in requests:
        clock = _Clock(runtime)
        request.take(runtime.prefill(request.prompt, request.index, request.kind_of(0)), clock, {})
    while not all(request.is_done for request in requests):
        for request in requests:
            if not request.is_done:
                runtime.select(request.index)
                _decode(runtime, request)
    for request in requests:
        runtime.select(request.index)
        runtime.end_request()
        seen.add(request)


def _decode(runtime: Runtime, request: _Request) -> None:
    """One decode step of a request, or a window of them, and before it the eviction that the phase asks for."""
    done, pressure = len(request.tokens), {}
    if request.phase.evict_fractions:
        pressure = _evict(runtime, request, done)
    clock = _Clock(runtime)
    count = 1 if pressure else request.steps + 1 - done
    if request.phase.live_requests > 1:
        count = min(count, request.policy.window)  # a turn is a window, also for those that could ask for all of them
    for arrival in runtime.decode(request.next_token(), count, request.kind_of(done)):
        request.take(arrival, clock, pressure)
        pressure = {}


def _evict(runtime: Runtime, request: _Request, step: int) -> dict[str, Any]:
    """Takes the step's fraction of the layers off the device; gives what is known of that, for the step's row.

    With policies that fetch while they compute, the same restore is first done alone and timed, and the layers are evicted again: its
    time is what the step would have to wait, were nothing hidden under compute.
    """
    fractions = request.phase.evict_fractions
    fraction = fractions[(step - 1) % len(fractions)]
    layers = layers_to_evict(request.layers, fraction, step)
    evicted = runtime.evict(layers) if layers else None
    row: dict[str, Any] = {"evict_fraction": fraction, "evicted_layers": len(layers)}
    if evicted is None:
        return row
    row |= {"saved_tensor_bytes": evicted.saved_tensor_bytes, "saved_payload_bytes": evicted.saved_payload_bytes}
    if request.policy.recovery in ("delta", "auto"):
        row["restore_alone_s"] = runtime.restore()
        again = runtime.evict(layers)
        assert again is not None
        row["saved_tensor_bytes"] += again.saved_tensor_bytes  # all of it is dirty once more where `auto` recomputed
        row["saved_payload_bytes"] += again.saved_payload_bytes
    return row


def layers_to_evict(layers: int, fraction: float, step: int) -> list[int]:
    """So many of the layers as the fraction rounds to, at least one for a fraction above 0, evenly spread and moving on with each step."""
    count = max(1, round(fraction * layers)) if fraction > 0 else 0
    return sorted((step + index * layers // count) % layers for index in range(count))


class _Clock:
    """Time, CPU and traffic from its making to the first arrival, and from each arrival to the next.

    `begin_s` is CLOCK_MONOTONIC, as perf_counter is on Linux and as the samplers' stamps are.

    Between arrivals of one window the client's own bookkeeping counts, since the worker computes on meanwhile; between two steps
    that the client asks for, each with a clock of its own, it does not.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._traffic = _traffic(runtime)
        self._cpu_ns = time.process_time_ns()
        self._at_ns = time.perf_counter_ns()

    def lap(self) -> dict[str, Any]:
        """What passed since the last arrival."""
        at_ns, cpu_ns, traffic = time.perf_counter_ns(), time.process_time_ns(), _traffic(self._runtime)
        row: dict[str, Any] = {name: traffic[name] - self._traffic[name] for name in traffic}
        row |= {"begin_s": self._at_ns / 1e9, "latency_s": (at_ns - self._at_ns) / 1e9, "client_cpu_s": (cpu_ns - self._cpu_ns) / 1e9}
        self._traffic, self._cpu_ns, self._at_ns = traffic, cpu_ns, at_ns
        return row


class _Request:
    """One request, and what is seen of it: rows for steps.parquet, tokens, of each step the reply's digests and last row of logits."""

    def __init__(self, spec: ClientSpec, index: int, prompt: np.ndarray, number: int | None, order: Iterator[int]) -> None:
        self.index, self.prompt, self.warmup = index, prompt, number is None
        self._order = order  # counts the steps of all requests as they come, which is how the worker counts them
        self.phase, self.policy, self.layers = spec.phase, spec.policy, spec.layers
        self.steps = min(spec.phase.steps, spec.phase.warmup_steps) if self.warmup else spec.phase.steps
        self._forced = spec.forced_tokens[number] if spec.forced_tokens and number is not None else None
        self.rows: list[dict[str, Any]] = []
        self.tokens: list[int] = []
        self.digests: list[int] = []
        self.last_digests: list[int] = []
        self.last_logits: list[np.ndarray] = []
        self.others: list[tuple[int, ...]] = []

    @property
    def is_done(self) -> bool:
        """The prefill's token and one a step are there."""
        return len(self.tokens) > self.steps

    def next_token(self) -> int:
        """What is fed next: the token drawn last, or the one that the spec forces."""
        return self.tokens[-1] if self._forced is None else self._forced[len(self.tokens) - 1]

    def kind_of(self, step: int) -> Kind:
        """regular where the phase measures this step, else setup."""
        return Kind.REGULAR if not self.warmup and (step == 0) == (self.phase.kind == "prefill") else Kind.SETUP

    def take(self, arrival: Arrival, clock: _Clock, pressure: dict[str, Any]) -> None:
        """Records an arrival. Tokens that came together have one row each; the first carries time, traffic and what was evicted before."""
        lap = clock.lap()
        if arrival.gpu_ns is not None:
            lap["gpu_s"] = arrival.gpu_ns / 1e9
        for token in arrival.tokens:
            step = len(self.tokens)
            position = 0 if step == 0 else len(self.prompt) + step - 1
            row = {"order": next(self._order), "request": self.index, "step": step, "warmup": self.warmup}
            row |= {"position": position, "token": token}
            row |= {"measured": self.kind_of(step) is Kind.REGULAR, "tokens_in": len(self.prompt) if step == 0 else 1}
            self.rows.append(row | lap | pressure)
            self.tokens.append(token)
            lap, pressure = dict.fromkeys(lap, 0) | {"begin_s": lap["begin_s"] + lap["latency_s"]}, {}
        if arrival.logits is not None:
            last = arrival.logits.numpy()[-1]
            self.digests.append(xxhash.xxh3_64_intdigest(arrival.logits.data))
            self.last_digests.append(xxhash.xxh3_64_intdigest(last))
            self.last_logits.append(arrival.logits.as_float32()[-1].copy())
            self.others.append(arrival.others)


def _padded(others: Sequence[Sequence[tuple[int, ...]]]) -> np.ndarray:
    """Token ids (requests, steps + 1, widest), int64, with -1 where a step has fewer than the widest."""
    widest = max(len(step) for request in others for step in request)
    return np.array([[(*step, *[-1] * (widest - len(step))) for step in request] for request in others], dtype=np.int64)


def _traffic(runtime: Runtime) -> dict[str, int]:
    out, into = runtime.segments()
    return _byte_counts(runtime.ledger) | {"round_trips": runtime.ledger.round_trips, "up_segments": out, "down_segments": into}


def _byte_counts(ledger: Ledger) -> dict[str, int]:
    return {
        "up_tensor_bytes": ledger.up.tensor,
        "up_payload_bytes": ledger.up.payload,
        "up_frame_bytes": ledger.up.frame,
        "down_tensor_bytes": ledger.down.tensor,
        "down_payload_bytes": ledger.down.payload,
        "down_frame_bytes": ledger.down.frame,
    }


def _request_row(request: int, warmup: bool, prompt_tokens: int, latencies: Sequence[float]) -> dict[str, Any]:
    """TTFT is the prefill's latency; TPOT = (E2E - TTFT)/(n - 1), where E2E is the sum of the steps' latencies."""
    end_to_end_s = sum(latencies)
    n = len(latencies)
    return {
        "request": request,
        "warmup": warmup,
        "prompt_tokens": prompt_tokens,
        "new_tokens": n,
        "ttft_s": latencies[0],
        "e2e_s": end_to_end_s,
        "tpot_s": (end_to_end_s - latencies[0]) / (n - 1) if n > 1 else None,
    }


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
    head = load_output_head(model, spec.threads) if spec.policy.reply.kind == "hidden_last" else None
    setup |= {"head_load_s": time.perf_counter() - begin, "head_bytes": head.nbytes} if head else {}
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
    sampled = wire.TelemetryRequest((), "start", worker.telemetry.interval_s, worker.telemetry.sources, cpus)
    link.request(Operation.TELEMETRY, sampled)
    measured, seen = _measure(runtime, spec)
    telemetry = _fetch_telemetry(link, spec)
    clock = wire.TelemetryRequest((), "clock")
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


def load_output_head(model: ModelFiles, threads: int) -> OutputHead:
    """The output head in this process: torch, and a copy of the head's weights where the executor would have them."""
    from semgap.executor import OutputHead, limit_threads
    from semgap.model import load_head

    limit_threads(threads)
    return OutputHead(*load_head(model.config, model.specs(), model.weights_file, [t.offset for t in model.digest.tensors]))


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
    link.limits = wire.Limits(payload_bytes=_MAX_REPLY_BYTES)
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


def probe_link(link: Link, round_trips: int, payload_bytes: int) -> dict[str, float]:
    """Round trip (median, s) of 64-byte pings and goodput each way (bytes/s) of one ping that carries `payload_bytes`.

    cold_*: the goodput of the first such pings, which comes before all others: on a new connection TCP's slow start and the growing of
    buffers on both sides are in it.
    """
    filler = control(bytes(payload_bytes))
    cold_up_s, cold_down_s = _transfers_s(link, filler, payload_bytes)
    rtt_s = statistics.median([_timed(lambda: ping(link, _PING_BYTES, 0)) for _ in range(round_trips)])
    up_s, down_s = _transfers_s(link, filler, payload_bytes)
    return {
        "rtt_s": rtt_s,
        "goodput_up_bytes_per_s": payload_bytes / up_s,
        "goodput_down_bytes_per_s": payload_bytes / down_s,
        "cold_up_bytes_per_s": payload_bytes / cold_up_s,
        "cold_down_bytes_per_s": payload_bytes / cold_down_s,
        "payload_bytes": payload_bytes,
        "round_trips": round_trips,
    }


def _transfers_s(link: Link, filler: Encoded, payload_bytes: int) -> tuple[float, float]:
    up_s = _timed(lambda: link.request(Operation.PING, wire.Ping(), [filler]))
    return up_s, _timed(lambda: ping(link, 0, payload_bytes))


def ping(link: Link, up_bytes: int, down_bytes: int) -> None:
    """One round trip with `up_bytes` of filler up and `down_bytes` down."""
    link.request(Operation.PING, wire.Ping((), down_bytes), [control(bytes(up_bytes))] if up_bytes else [])


def _books(link: Link) -> dict[str, Any]:
    """The reconciled books of the session, as the report holds them. LedgerError where any side or link does not agree."""
    books = close_books(link)
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


def make_prompts(spec: ClientSpec) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The measured requests' prompts, `requests` of each length, and the warm-ups', which are other text."""
    lengths = _prompt_lengths(spec)
    made = _cut_text(spec, [*lengths, *[spec.phase.prompt_lengths[0]] * spec.phase.warmup_requests])
    return made[: len(lengths)], made[len(lengths) :]


def text_after_prompts(spec: ClientSpec) -> list[np.ndarray]:
    """What the text goes on with after each measured request's prompt, steps + 1 tokens: to be fed in place of what was drawn."""
    lengths, follows = _prompt_lengths(spec), spec.phase.steps + 1
    longer = _cut_text(spec, [length + follows for length in lengths])
    return [tokens[-follows:] for tokens in longer]


def _prompt_lengths(spec: ClientSpec) -> list[int]:
    return [length for length in spec.phase.prompt_lengths for _ in range(spec.phase.requests)]


def _cut_text(spec: ClientSpec, lengths: Sequence[int]) -> list[np.ndarray]:
    tokenizer = Tokenizer.from_file(str(Path(spec.model_directory) / "tokenizer.json"))
    passages = load_passages(Path(spec.prompts_file))
    return [make_prompt(tokenizer, passages, index, length) for index, length in enumerate(lengths)]


def _report(spec: ClientSpec, seen: Observations, setup: dict[str, Any], measured: dict[str, float]) -> dict[str, Any]:
    """Writes logits.npz and gives what goes into report.json."""
    _write_arrays(Path(spec.directory) / "logits.npz", seen.arrays())
    return {
        "steps": seen.steps,
        "requests": seen.requests,
        "setup": setup,
        "measured": measured,
        "pid": os.getpid(),
        "client_peak_rss_anon_bytes": max(seen.peak_rss_anon_bytes, _rss_anon_bytes()),
    }


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _fetch_telemetry(link: Link, spec: ClientSpec) -> dict[str, Any]:
    """Stops the worker's samplers and writes their files as worker-SOURCE.parquet; gives rows, reason and cost of each."""
    reply = link.request(Operation.TELEMETRY, wire.TelemetryRequest((), "stop"))
    results = _body(reply)
    for source, payload in zip(results, reply.payloads, strict=True):
        (Path(spec.directory) / f"worker-{source}.parquet").write_bytes(payload)
    return results


def _body(reply: wire.Frame) -> dict[str, Any]:
    assert isinstance(reply.header, wire.Bodied)
    return msgspec.json.decode(reply.header.body)


def _timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _since(spawned_s: float | None) -> float | None:
    """Seconds since the trial spawned this process (CLOCK_MONOTONIC of one host)."""
    return None if spawned_s is None else time.monotonic() - spawned_s


def _rss_anon_bytes() -> int:
    """Anonymous resident memory now; a mapped model file is not in it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except (wire.WireError, ClientError, LedgerError, ModelFileError, ValueError) as error:
        sys.exit(f"semgap client: {error}")
    except RuntimeError as error:
        failure = gpu_failure(error)
        if failure is None:
            raise
        sys.exit(f"semgap client: {failure}")
