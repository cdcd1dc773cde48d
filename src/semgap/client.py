"""The thin client: tokenizer, the one decode loop of all modes, and the measuring of it.

`python -m semgap.client SPEC.json` runs one trial's requests and leaves report.json, logits.npz and the worker's telemetry in the
directory that the spec names. Imports no torch unless the mode is local.
"""

from __future__ import annotations

import mmap
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import xxhash
from tokenizers import Tokenizer

from semgap import codecs, wire
from semgap.ledger import Direction, Ledger, LedgerError, Row, compare_ledgers, compare_with_kernel, frame_bytes
from semgap.lifetime import end_with_parent
from semgap.link import (
    Link,
    Timeouts,
    congestion_control,
    connect,
    read_secret,
    segments,
    shake_hands_as_client,
    tcp_info,
)
from semgap.policy import Policy, SessionSpec
from semgap.prompts import load_passages, make_prompt
from semgap.sampling import greedy
from semgap.sources import ModelDigest, ModelFileError, load_digest
from semgap.tensors import DType, Tensor, TensorClass
from semgap.wire import Kind, Operation

_UPLOAD_FRAME_BYTES = 32 << 20
_PING_BYTES = 64
_MAX_REPLY_BYTES = 4 << 30


class Phase(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the requests of a trial are. `requests` for each prompt length; `steps` decode steps after each prefill."""

    kind: str
    prompt_lengths: tuple[int, ...]
    requests: int = 1
    warmup_requests: int = 1
    warmup_steps: int = 2
    steps: int = 0


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
    congestion: str | None = None
    timeout_s: float = 120.0


class ClientSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One trial, as the client needs to know it."""

    directory: str
    model_directory: str
    prompts_file: str
    policy: Policy
    phase: Phase
    dtype: str
    threads: int
    max_length: int
    device: str
    cpus: tuple[int, ...] = ()
    worker: WorkerSide | None = None
    forced_tokens: tuple[tuple[int, ...], ...] | None = None
    spawned_s: float | None = None
    parent_pid: int | None = None


class Runtime(Protocol):
    """Where forward passes happen. One request at a time."""

    ledger: Ledger

    def forward(self, tokens: np.ndarray, kind: Kind) -> Tensor:
        """Logits (n, vocab) of the next `tokens` (n,) of the request; valid until the next call."""

    def next_request(self) -> None:
        """The request is over: its KV cache may go."""

    def segments(self) -> tuple[int, int]:
        """TCP segments sent and received so far."""


class ClientError(Exception):
    """The trial cannot be run as its spec says."""


class LocalRuntime:
    """The executor in this process: no worker, no socket, 0 bytes."""

    def __init__(self, spec: ClientSpec, digest: ModelDigest, setup: dict[str, float]) -> None:
        import torch

        from semgap.executor import Executor, choose_device, limit_threads
        from semgap.model import Weights, build_model

        limit_threads(spec.threads)
        self.ledger = Ledger()
        self.device = choose_device(spec.device)
        begin = time.perf_counter()
        weights = Weights(_weight_specs(digest), self.device)
        weights.read_file(Path(spec.model_directory) / digest.file, [tensor.offset for tensor in digest.tensors])
        setup["weights_load_s"] = time.perf_counter() - begin
        dtype = getattr(torch, spec.dtype)
        self._executor = Executor(build_model(_model_config(spec), weights, dtype), spec.max_length)
        self.next_request()

    def forward(self, tokens: np.ndarray, kind: Kind) -> Tensor:
        from semgap.model import to_wire

        return to_wire(self._executor.forward(tokens, self._cache), TensorClass.LOGITS)

    def next_request(self) -> None:
        self._cache = self._executor.new_cache()

    def segments(self) -> tuple[int, int]:
        return 0, 0


class RemoteRuntime:
    """The executor behind a link, driven by a policy: what goes up with each step, and what is kept between two."""

    def __init__(self, link: Link, policy: Policy, digest: ModelDigest, model_file: Path) -> None:
        self.link = link
        self.ledger = link.ledger
        self._policy = policy
        self._specs = _weight_specs(digest)
        self.weights = _map_weights(digest, model_file)
        self._handle = 0
        self._position = 0
        self._kv: Tensor | None = None

    def upload_weights(self) -> int:
        """Offers the model and sends what the worker asks for; gives the tensor bytes sent."""
        offer = wire.OfferWeights((), self._specs)
        wanted = self.link.request(Operation.OFFER_WEIGHTS, offer).header
        assert isinstance(wanted, wire.WantWeights)
        self.send_weights(wanted.indices)
        return sum(self.weights[index].data.nbytes for index in wanted.indices)

    def send_weights(self, indices: Sequence[int]) -> None:
        """Sends weights of the offer, as many to a frame as fit, and waits until the worker has them all."""
        batches = _batches(indices, [weight.data.nbytes for weight in self.weights])
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            self.link.post(Operation.PUT_WEIGHTS, wire.PutWeights((), batch, last), self._encoded_weights(batch))
        if batches:
            self.link.await_reply(Operation.PUT_WEIGHTS)

    def forward(self, tokens: np.ndarray, kind: Kind) -> Tensor:
        sent = self._encoded_weights(range(len(self.weights))) if self._policy.weights == "every_step" else []
        sent.append(self._encode(Tensor.from_numpy(tokens, TensorClass.TOKENS)))
        if self._kv is not None:
            sent.append(self._encode(self._kv))
        reply = self.link.request(Operation.FORWARD, wire.Forward((), self._handle, self._position), sent, kind)
        assert isinstance(reply.header, wire.Forwarded)
        self._handle = reply.header.handle
        self._position += len(tokens)
        logits = self.link.decode(reply, 0)
        if self._policy.is_stateless:
            self._kv = self.link.decode(reply, 1)  # lies in receive memory until the next request has carried it up
        return logits

    def next_request(self) -> None:
        if self._handle:
            self.link.request(Operation.RELEASE, wire.Release((), self._handle))
        self._handle, self._position, self._kv = 0, 0, None

    def segments(self) -> tuple[int, int]:
        return segments(self.link.sock)

    def _encoded_weights(self, indices: Sequence[int]) -> list[codecs.Encoded]:
        return [self._encode(self.weights[index]) for index in indices]

    def _encode(self, tensor: Tensor) -> codecs.Encoded:
        return codecs.encode(tensor, self._policy.codec.of(tensor.cls))


@dataclass
class Observations:
    """What the loop saw: rows of steps and requests, and per request its tokens, reply digests and last rows of logits."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    digests: list[list[int]] = field(default_factory=list)
    last_logits: list[list[np.ndarray]] = field(default_factory=list)
    peak_rss_anon_bytes: int = 0


def run_requests(runtime: Runtime, spec: ClientSpec, prompts: Sequence[np.ndarray], warmups: Sequence[np.ndarray]) -> Observations:
    """The warm-up requests, then the measured ones; every mode goes through here and nowhere else."""
    seen = Observations()
    for prompt in warmups:
        _run_request(runtime, spec, prompt, None, seen)
    for number, prompt in enumerate(prompts):
        _run_request(runtime, spec, prompt, number, seen)
    return seen


def _run_request(runtime: Runtime, spec: ClientSpec, prompt: np.ndarray, number: int | None, seen: Observations) -> None:
    """One prefill and its decode steps. Between two timed steps the reply is digested and its last row kept for later comparison."""
    phase = spec.phase
    warmup = number is None
    forced = spec.forced_tokens[number] if spec.forced_tokens and number is not None else None
    steps = min(phase.steps, phase.warmup_steps) if warmup else phase.steps
    request = len(seen.requests)
    tokens, position = prompt, 0
    drawn, digests, rows, latencies = [], [], [], []
    for step in range(steps + 1):
        measured = not warmup and (step == 0) == (phase.kind == "prefill")
        row, logits, token = _run_step(runtime, tokens, Kind.REGULAR if measured else Kind.SETUP)
        seen.steps.append(
            {"request": request, "step": step, "warmup": warmup, "measured": measured, "position": position, "token": token, **row}
        )
        position += len(tokens)
        drawn.append(token)
        digests.append(xxhash.xxh3_64_intdigest(logits.data))
        rows.append(logits.as_float32()[-1].copy())
        latencies.append(row["latency_s"])
        tokens = np.array([token if forced is None else forced[step]], dtype=np.int64)
    runtime.next_request()
    seen.requests.append(_request_row(request, warmup, len(prompt), latencies))
    seen.peak_rss_anon_bytes = max(seen.peak_rss_anon_bytes, _rss_anon_bytes())
    if not warmup:
        seen.tokens.append(drawn)
        seen.digests.append(digests)
        seen.last_logits.append(rows)


def _run_step(runtime: Runtime, tokens: np.ndarray, kind: Kind) -> tuple[dict[str, Any], Tensor, int]:
    """One timed forward pass and the choice of its token, with what it moved. Latency is from tokens in to token out."""
    before, trips, (out, into) = _byte_counts(runtime.ledger), runtime.ledger.round_trips, runtime.segments()
    cpu_begin = time.process_time_ns()
    begin = time.perf_counter_ns()
    logits = runtime.forward(tokens, kind)
    token = greedy(logits.as_float32()[-1])
    latency_ns = time.perf_counter_ns() - begin
    cpu_ns = time.process_time_ns() - cpu_begin
    after, (out_after, into_after) = _byte_counts(runtime.ledger), runtime.segments()
    moved = {name: after[name] - before[name] for name in after}
    row = {
        "tokens_in": len(tokens),
        "latency_s": latency_ns / 1e9,
        "client_cpu_s": cpu_ns / 1e9,
        "round_trips": runtime.ledger.round_trips - trips,
        "up_segments": out_after - out,
        "down_segments": into_after - into,
        **moved,
    }
    return row, logits, token


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


def _run_local(spec: ClientSpec) -> dict[str, Any]:
    setup: dict[str, Any] = {}
    digest = load_digest(Path(spec.model_directory))
    runtime = LocalRuntime(spec, digest, setup)
    setup["client_start_s"] = _since(spec.spawned_s)
    measured, seen = _measure(runtime, spec)
    return _report(spec, seen, setup, measured) | {"device": str(runtime.device)}


def _run_remote(spec: ClientSpec) -> dict[str, Any]:
    worker = spec.worker
    assert worker is not None
    setup: dict[str, Any] = {"client_start_s": _since(spec.spawned_s)}
    digest = load_digest(Path(spec.model_directory))
    begin = time.perf_counter()
    link = connect(worker.address, Timeouts(worker.timeout_s, worker.timeout_s))
    granted = open_session(link, spec, worker)
    setup["connect_s"] = time.perf_counter() - begin
    start_tcp = tcp_info(link.sock)
    probe = probe_link(link, worker.probe.round_trips, worker.probe.payload_bytes)
    runtime = RemoteRuntime(link, spec.policy, digest, Path(spec.model_directory) / digest.file)
    begin = time.perf_counter()
    setup["weights_bytes"] = runtime.upload_weights()
    setup["weights_upload_s"] = time.perf_counter() - begin
    sampled = wire.TelemetryRequest((), "start", worker.telemetry.interval_s, worker.telemetry.sources, spec.cpus)
    link.request(Operation.TELEMETRY, sampled)
    measured, seen = _measure(runtime, spec)
    telemetry = _fetch_telemetry(link, spec)
    report = _report(spec, seen, setup, measured)
    report |= {"granted": granted, "device": granted["device"], "probe": probe, "worker_telemetry": telemetry, "start_tcp": start_tcp}
    report |= close_books(link)
    if worker.stop:
        link.request(Operation.SHUTDOWN)
    link.close()
    return report


def open_session(link: Link, spec: ClientSpec, worker: WorkerSide) -> dict[str, Any]:
    """Authenticates and opens a session for the spec's model and policy. ClientError where the worker computes otherwise than asked."""
    secret = read_secret(Path(worker.secret_file) if worker.secret_file else None)
    congestion_control(link.sock, worker.congestion)
    asked = SessionSpec(spec.policy, _model_config(spec), spec.dtype, spec.max_length, worker.congestion)
    granted = shake_hands_as_client(link, secret, msgspec.to_builtins(asked))
    link.limits = wire.Limits(payload_bytes=_MAX_REPLY_BYTES)
    if granted["threads"] != spec.threads:
        raise ClientError(f"the worker at {worker.address} runs {granted['threads']} threads, the config says threads: {spec.threads}")
    if spec.device not in ("auto", granted["device"]):
        raise ClientError(f"the worker at {worker.address} computes on {granted['device']}, the config says device: {spec.device}")
    return granted


def probe_link(link: Link, round_trips: int, payload_bytes: int) -> dict[str, float]:
    """Round trip (median, s) of 64-byte pings and goodput each way (bytes/s) of one ping that carries `payload_bytes`."""
    trips = [_timed(lambda: ping(link, _PING_BYTES, 0)) for _ in range(round_trips)]
    rtt_s = statistics.median(trips)
    up_s = _timed(lambda: ping(link, payload_bytes, 0))
    down_s = _timed(lambda: ping(link, 0, payload_bytes))
    return {
        "rtt_s": rtt_s,
        "goodput_up_bytes_per_s": payload_bytes / up_s,
        "goodput_down_bytes_per_s": payload_bytes / down_s,
        "payload_bytes": payload_bytes,
        "round_trips": round_trips,
    }


def ping(link: Link, up_bytes: int, down_bytes: int) -> None:
    """One round trip with `up_bytes` of filler up and `down_bytes` down."""
    filler = Tensor(TensorClass.CONTROL, DType.U8, (up_bytes,), memoryview(bytes(up_bytes)))
    link.request(Operation.PING, wire.Ping((), down_bytes), [codecs.encode(filler, "raw")] if up_bytes else [])


def close_books(link: Link) -> dict[str, Any]:
    """Fetches the worker's counters and reconciles both ledgers with each other and with both kernels, to the byte.

    LedgerError names what differs. The books close as the worker answers: its answer itself is checked against this side's kernel.
    """
    link.post(Operation.GET_NETWORK_COUNTERS)
    rows = link.ledger.copy_rows()
    reply = link.await_reply(Operation.GET_NETWORK_COUNTERS)
    theirs = msgspec.json.decode(reply.payloads[0])
    worker_rows = msgspec.convert(theirs["rows"], list[Row])
    compare_ledgers(rows, worker_rows)
    compare_with_kernel("worker", worker_rows, Direction.DOWN, theirs["tcp"])
    link.drain()
    tcp = tcp_info(link.sock)
    final = link.ledger.copy_rows()
    compare_with_kernel("client", final, Direction.UP, tcp)
    return {
        "client_rows": msgspec.to_builtins(rows),
        "worker_rows": theirs["rows"],
        "client_tcp": tcp,
        "worker_tcp": theirs["tcp"],
        "worker_steps": theirs["steps"],
        "worker_peak_rss_bytes": theirs["peak_rss_bytes"],
        "pcie_reason": theirs["pcie_reason"],
        "frame_bytes_by_kind": theirs["frame_bytes_by_kind"],
        "closing_frame_bytes": frame_bytes(final, Direction.DOWN) - frame_bytes(rows, Direction.DOWN),
        "congestion": congestion_control(link.sock),
    }


def _measure(runtime: Runtime, spec: ClientSpec) -> tuple[dict[str, float], Observations]:
    prompts, warmups = make_prompts(spec)
    begin = time.monotonic()
    seen = run_requests(runtime, spec, prompts, warmups)
    return {"start_s": begin, "end_s": time.monotonic()}, seen


def make_prompts(spec: ClientSpec) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The measured requests' prompts, `requests` of each length, and the warm-ups', which are other text."""
    tokenizer = Tokenizer.from_file(str(Path(spec.model_directory) / "tokenizer.json"))
    passages = load_passages(Path(spec.prompts_file))
    lengths = [length for length in spec.phase.prompt_lengths for _ in range(spec.phase.requests)]
    warm = [spec.phase.prompt_lengths[0]] * spec.phase.warmup_requests
    made = [make_prompt(tokenizer, passages, index, length) for index, length in enumerate([*lengths, *warm])]
    return made[: len(lengths)], made[len(lengths) :]


def _report(spec: ClientSpec, seen: Observations, setup: dict[str, Any], measured: dict[str, float]) -> dict[str, Any]:
    """Writes logits.npz and gives what goes into report.json."""
    np.savez(
        Path(spec.directory) / "logits.npz",
        tokens=np.array(seen.tokens, dtype=np.int64),
        digests=np.array(seen.digests, dtype=np.uint64),
        last_logits=np.array(seen.last_logits, dtype=np.float32),
    )
    return {
        "steps": seen.steps,
        "requests": seen.requests,
        "setup": setup,
        "measured": measured,
        "pid": os.getpid(),
        "client_peak_rss_anon_bytes": max(seen.peak_rss_anon_bytes, _rss_anon_bytes()),
    }


def _fetch_telemetry(link: Link, spec: ClientSpec) -> dict[str, Any]:
    """Stops the worker's samplers and writes their files as worker-SOURCE.parquet; gives rows, reason and cost of each."""
    reply = link.request(Operation.TELEMETRY, wire.TelemetryRequest((), "stop"))
    assert isinstance(reply.header, wire.Bodied)
    results = msgspec.json.decode(reply.header.body)
    for source, payload in zip(results, reply.payloads, strict=True):
        (Path(spec.directory) / f"worker-{source}.parquet").write_bytes(payload)
    return results


def _model_config(spec: ClientSpec) -> dict[str, Any]:
    return msgspec.json.decode((Path(spec.model_directory) / "config.json").read_bytes())


def _weight_specs(digest: ModelDigest) -> tuple[wire.WeightSpec, ...]:
    return tuple(wire.WeightSpec(t.name, DType.from_torch_name(t.dtype), tuple(t.shape)) for t in digest.tensors)


def _map_weights(digest: ModelDigest, file: Path) -> list[Tensor]:
    """The model's tensors over the mapped file: read by the kernel as they are sent, never copied into this process."""
    with file.open("rb") as opened:
        mapped = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
    return [
        Tensor(TensorClass.WEIGHTS, spec.dtype, spec.shape, mapped[tensor.offset : tensor.offset + tensor.nbytes])
        for tensor, spec in zip(digest.tensors, _weight_specs(digest), strict=True)
    ]


def _batches(indices: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Runs of indices whose tensors fill a frame of about 32 MiB; a larger tensor has a frame to itself."""
    batches: list[tuple[int, ...]] = []
    batch: list[int] = []
    for index in indices:
        if batch and sum(sizes[i] for i in batch) + sizes[index] > _UPLOAD_FRAME_BYTES:
            batches.append(tuple(batch))
            batch = []
        batch.append(index)
    return [*batches, tuple(batch)] if batch else batches


def _timed(work: Callable[[], None]) -> float:
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
