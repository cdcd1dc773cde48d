"""The decode loop of all modes: requests, their steps, the clock around each step, and its record."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from semgap.client.control import Control
from semgap.client.handover import Handover, moves
from semgap.client.pressure import evict, evictions, layers_to_evict
from semgap.client.progress import Progress
from semgap.client.runtime import Arrival, Runtime
from semgap.client.spec import ClientSpec
from semgap.phases import KINDS
from semgap.wire.messages import Kind


@dataclass
class Observations:
    """Results of the loop: rows of steps, requests and the control, and the measured requests."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    control: list[dict[str, Any]] = field(default_factory=list)
    measured: list[_Request] = field(default_factory=list)
    peak_rss_anon_bytes: int = 0

    def add(self, request: _Request) -> None:
        """Adds a finished request."""
        self.steps += request.rows
        self.requests.append(_request_row(request))
        self.peak_rss_anon_bytes = max(self.peak_rss_anon_bytes, rss_anon_bytes())
        if not request.warmup:
            self.measured.append(request)

    def arrays(self) -> dict[str, np.ndarray]:
        """Of the measured requests (requests, steps + 1): tokens; with logits also their digests, last rows, and other possible draws."""
        arrays = {"tokens": np.array([request.tokens for request in self.measured], dtype=np.int64)}
        if not self.measured[0].last_logits:
            return arrays
        return arrays | {
            "digests": np.array([request.digests for request in self.measured], dtype=np.uint64),
            "last_digests": np.array([request.last_digests for request in self.measured], dtype=np.uint64),
            "last_logits": np.array([request.last_logits for request in self.measured], dtype=np.float32),
            "others": _padded([request.others for request in self.measured]),
        }


def run_requests(
    runtime: Runtime, spec: ClientSpec, prompts: Sequence[np.ndarray], warmups: Sequence[np.ndarray], control: Control | None = None
) -> Observations:
    """Runs the warm-up requests, then the measured ones, with the control beside them. All requests of all modes go through here."""
    seen = Observations()
    numbered = [*((prompt, None) for prompt in warmups), *((prompt, number) for number, prompt in enumerate(prompts))]
    order = itertools.count()
    requests = [_Request(spec, index, prompt, number, order) for index, (prompt, number) in enumerate(numbered)]
    progress = Progress(sum(request.steps + 1 for request in requests))
    for warm in (True, False):
        group = [request for request in requests if request.warmup is warm]
        for first in range(0, len(group), spec.phase.live_requests):
            together = group[first : first + spec.phase.live_requests]
            _run_together(runtime, together, seen, control)
            progress.add(sum(request.steps + 1 for request in together))
    warm_requests = {request.index for request in requests if request.warmup}
    seen.control = [row for row in control.rows if row["request"] not in warm_requests] if control else []
    return seen


def _run_together(runtime: Runtime, requests: Sequence[_Request], seen: Observations, control: Control | None) -> None:
    """Runs requests that are alive at the same time: prefills one after the other, then decode steps in turns."""
    for request in requests:
        if request.moves and isinstance(runtime, Handover):
            runtime.promise(len(request.prompt))
        clock = _Clock(runtime)
        request.take(runtime.prefill(request.prompt, request.index, request.kind_of(0)), clock, request.known)
    while not all(request.is_done for request in requests):
        for request in requests:
            if not request.is_done:
                runtime.select(request.index)
                _decode_beside(control, runtime, request) if control else _decode(runtime, request)
    for request in requests:
        runtime.select(request.index)
        runtime.end_request()
        seen.add(request)


def _decode_beside(control: Control, runtime: Runtime, request: _Request) -> None:
    """Runs a block of decode steps, and the control's window of its positions."""
    step, token = len(request.tokens), request.next_token()
    count = control.block(request.steps + 1 - step)
    run = partial(control.run, request.index, step, request.position, token, count)
    comes_first = control.comes_first
    if comes_first:
        run()
    while len(request.tokens) < step + count:
        _decode(runtime, request)
    if not comes_first:
        run()


def _decode(runtime: Runtime, request: _Request) -> None:
    """Evicts layers if the phase says so, then runs one decode step of a request, or a window of steps."""
    done, pressure = len(request.tokens), {}
    if request.evictions:
        eviction = request.evictions[done - 1]
        pressure = evict(runtime, request.policy, layers_to_evict(request.layers, eviction.fraction, done), eviction)
    clock = _Clock(runtime)
    count = 1 if pressure else request.steps + 1 - done
    if request.phase.live_requests > 1:
        count = min(count, request.policy.window)  # a turn is one window, even with `ahead`
    if request.moves and done == 1 and isinstance(runtime, Handover):
        pressure = runtime.move(request.prompt, request.kind_of(done))
    for arrival in runtime.decode(request.next_token(), count, request.kind_of(done)):
        request.take(arrival, clock, pressure)
        pressure = {}


class _Clock:
    """Time, CPU and traffic from its creation to the first arrival, and from each arrival to the next.

    `begin_s` is CLOCK_MONOTONIC, like perf_counter on Linux and the samplers' stamps. Inside a window, client bookkeeping is included:
    the worker computes meanwhile. Between steps, each with a clock of its own, it is not.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._traffic = _traffic(runtime)
        self._codec_ns = runtime.ledger.codec_ns
        self._cpu_ns = time.process_time_ns()
        self._at_ns = time.perf_counter_ns()

    def lap(self) -> dict[str, Any]:
        """Columns of the time since the last arrival."""
        at_ns, cpu_ns, traffic = time.perf_counter_ns(), time.process_time_ns(), _traffic(self._runtime)
        codec_ns = self._runtime.ledger.codec_ns
        row: dict[str, Any] = {name: traffic[name] - self._traffic[name] for name in traffic}
        row |= {"begin_s": self._at_ns / 1e9, "latency_s": (at_ns - self._at_ns) / 1e9, "client_cpu_s": (cpu_ns - self._cpu_ns) / 1e9}
        row["client_codec_s"] = (codec_ns - self._codec_ns) / 1e9
        self._traffic, self._codec_ns, self._cpu_ns, self._at_ns = traffic, codec_ns, cpu_ns, at_ns
        return row


class _Request:
    """One request and its record: rows for steps.parquet, tokens, and each reply's digests and last row of logits."""

    def __init__(self, spec: ClientSpec, index: int, prompt: np.ndarray, number: int | None, order: Iterator[int]) -> None:
        self.index, self.prompt, self.warmup = index, prompt, number is None
        self._order = order  # numbers the steps of all requests as they come, like the worker
        self.phase, self.policy, self.layers = spec.phase, spec.policy, spec.layers
        self.steps = min(spec.phase.steps, spec.phase.warmup_steps) if self.warmup else spec.phase.steps
        self.evictions = evictions(spec.phase.evict_fractions, self.steps, f"{spec.drawing.seed}/{spec.trial}/{index}")
        prefix_tokens = None if number is None else spec.phase.prefix_of(number)
        self.known: dict[str, Any] = {} if prefix_tokens is None else {"prefix_tokens": prefix_tokens}  # columns of its prefill
        self.moves = KINDS[self.phase.kind].workers > 1 and moves(number)
        self._forced = spec.forced_tokens[number] if spec.forced_tokens and number is not None else None
        self.rows: list[dict[str, Any]] = []
        self.tokens: list[int] = []
        self.digests: list[int] = []
        self.last_digests: list[int] = []
        self.last_logits: list[np.ndarray] = []
        self.others: list[tuple[int, ...]] = []

    @property
    def is_done(self) -> bool:
        """True if all tokens are there: one of the prefill and one a step."""
        return len(self.tokens) > self.steps

    @property
    def position(self) -> int:
        """The position of the next step's token."""
        return len(self.prompt) + len(self.tokens) - 1 if self.tokens else 0

    def next_token(self) -> int:
        """The token to feed next: the last drawn one, or the spec's forced one."""
        return self.tokens[-1] if self._forced is None else self._forced[len(self.tokens) - 1]

    def kind_of(self, step: int) -> Kind:
        """REGULAR if the phase measures this step, else SETUP."""
        return Kind.REGULAR if not self.warmup and (step == 0) == (KINDS[self.phase.kind].measures == "prefill") else Kind.SETUP

    def take(self, arrival: Arrival, clock: _Clock, pressure: dict[str, Any]) -> None:
        """Records an arrival: one row for each token. The first row has the time, the traffic and the eviction before it."""
        lap = clock.lap()
        lap["client_compute_s"] = arrival.head_ns / 1e9
        if arrival.compute_ns is not None:
            lap |= {"worker_compute_s": arrival.compute_ns / 1e9, "client_codec_s": None}
        if arrival.gpu_ns is not None:
            lap["gpu_s"] = arrival.gpu_ns / 1e9
        for token in arrival.tokens:
            step = len(self.tokens)
            row = {"order": next(self._order), "request": self.index, "step": step, "warmup": self.warmup}
            row |= {"position": self.position, "token": token}
            row |= {"moves": self.moves} if KINDS[self.phase.kind].workers > 1 else {}
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
    """Token ids (requests, steps + 1, widest), int64; -1 fills steps with fewer than the widest."""
    widest = max(len(step) for request in others for step in request)
    return np.array([[(*step, *[-1] * (widest - len(step))) for step in request] for request in others], dtype=np.int64)


def _traffic(runtime: Runtime) -> dict[str, int]:
    (out, into), ledger = runtime.segments(), runtime.ledger
    return {
        "up_tensor_bytes": ledger.up.tensor,
        "up_payload_bytes": ledger.up.payload,
        "up_frame_bytes": ledger.up.frame,
        "down_tensor_bytes": ledger.down.tensor,
        "down_payload_bytes": ledger.down.payload,
        "down_frame_bytes": ledger.down.frame,
        "round_trips": ledger.round_trips,
        "up_segments": out,
        "down_segments": into,
    }


def _request_row(request: _Request) -> dict[str, Any]:
    """TTFT is the prefill's latency; TPOT = (E2E - TTFT)/(n - 1), where E2E is the sum of the steps' latencies."""
    latencies = [row["latency_s"] for row in request.rows]
    end_to_end_s, n = sum(latencies), len(latencies)
    return {
        "request": request.index,
        "warmup": request.warmup,
        "prompt_tokens": len(request.prompt),
        "new_tokens": n,
        "ttft_s": latencies[0],
        "e2e_s": end_to_end_s,
        "tpot_s": (end_to_end_s - latencies[0]) / (n - 1) if n > 1 else None,
    }


def rss_anon_bytes() -> int:
    """Anonymous resident memory now, without mapped model files."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))
