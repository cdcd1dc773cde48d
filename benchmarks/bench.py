"""How fast semgap itself is: ratios within one run, their steps interleaved, with 95% intervals.

`make bench` prints the table and writes bench.json. Needs the default model and, to mean anything, a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from bench_batch import PROMISES as BATCH_PROMISES
from bench_batch import batch_ratios
from bench_executor import PROMISES, executor_ratios
from bench_handover import PROMISES as HANDOVER_PROMISES
from bench_handover import handover_ratios
from bench_kv_price import PROMISES as KV_PRICE_PROMISES
from bench_kv_price import kv_price_errors
from bench_load import PROMISES as LOAD_PROMISES
from bench_load import load_ratios
from bench_prefix import PROMISES as PREFIX_PROMISES
from bench_prefix import prefix_ratios
from bench_recovery import PROMISES as RECOVERY_PROMISES
from bench_recovery import interleaved_misses, recovery_ratios
from bench_tls import PROMISES as TLS_PROMISES
from bench_tls import tls_ratios
from sampler_burden import measure_burden

from semgap import codecs
from semgap.analysis.stats import geometric_mean_interval, mean_interval
from semgap.client.head import load_client_head
from semgap.client.local_runtime import LocalRuntime
from semgap.client.pressure import layers_to_evict
from semgap.client.probe import ping, probe_link
from semgap.client.prompts import make_prompts
from semgap.client.remote_runtime import RemoteRuntime
from semgap.client.runtime import Drawing
from semgap.client.spec import ClientSpec, Phase
from semgap.codecs.arrays import to_wire
from semgap.codecs.plane_kernels import COMPILED
from semgap.engine import cpu_planes
from semgap.engine.device import limit_threads
from semgap.engine.model_files import ModelDigest, ModelFiles, load_digest
from semgap.experiment import compute_reference, measure_trial, trial_setup
from semgap.experiment.config import Config, Coordinates, read_config
from semgap.experiment.provenance import describe_run
from semgap.experiment.trial_processes import running
from semgap.experiment.trial_relay import relay_command
from semgap.kv.blocks import KVCache
from semgap.kv.host import connect_kv
from semgap.kv.host_shadow import KVHostShadow
from semgap.kv.pool import BLOCK, HostPool, KVShape
from semgap.kv.recovery import LiveCaches
from semgap.kv.shadow import transfer_of
from semgap.kv.worker_shadow import WorkerShadow
from semgap.network.spec import Network, bits_per_s, measured_of
from semgap.policy import CodecChoice, Policy, Reply, SessionSpec, policy_from
from semgap.processes import machine
from semgap.tensors import DType, Tensor, TensorClass
from semgap.wire import frames, messages
from semgap.wire.handshake import shake_hands_as_client
from semgap.wire.ledger import Ledger
from semgap.wire.link import connect
from semgap.wire.messages import Kind, Operation
from semgap.wire.reconcile import reconcile

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "resources/models/smollm2-135m"
CONFIG = read_config([], ROOT)
ROUNDS = 5  # the repeats of an interval: fresh workers and fresh local models: where memory happens to lie moves a step by some percent
STEPS = 24  # pairs of steps in a round
WINDOW_PAIRS = 4  # pairs of windows in a round
AHEAD_PAIRS, AHEAD_WINDOWS = 2, 3  # pairs in a round, and windows in each: those after the first are asked for ahead
UPLOADS = 6
PREFIX_REPEATS = 3
LOAD_REPEATS = 3  # pairs of trials of loads
HANDOVER_REPEATS = 5
KV_PRICE_REPEATS = 2
TRIPS = 2000
RELAY_RATE, RELAY_DELAYS_MS, RELAY_PAYLOAD_BYTES = "1Gbit", (0.1, 5.0, 25.0), 16 << 20
CORES = sorted(os.sched_getaffinity(0))
THIN, COMPUTING = CORES[0], CORES[-1]


@dataclass(frozen=True)
class Line:
    """One line of the table. `bound` is what the project promises: value <= bound, or >= bound where `at_least`.

    `by_interval`: of a difference that should not be there, which is kept where the interval reaches the bound.
    """

    what: str
    value: float
    low: float | None
    high: float | None
    bound: float | None
    at_least: bool = False
    unit: str = "x"
    note: str = ""
    by_interval: bool = False

    @property
    def kept(self) -> bool | None:
        if self.bound is None:
            return None
        if self.by_interval:
            return self.low is not None and self.low <= self.bound
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def main() -> None:
    """Runs every benchmark and writes the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("bench.json"))
    options = parser.parse_args()
    model = ModelFiles(MODEL, load_digest(MODEL))
    with machine.measuring():
        lines = [
            *bench_executor(model),
            *bench_batches(model),
            bench_engine(model),
            *bench_start(model),
            *bench_steps(model),
            *bench_windows(model),
        ]
        lines += [*bench_upload(model), bench_round_trip(), *bench_tls(model)]
        lines += [*bench_bytes(model), *bench_codec_steps(model), *bench_planes(model)]
        lines += [*bench_relay(), *bench_over_relay(model)]
        lines += [
            *bench_prefixes(),
            *bench_recovery(model),
            *bench_recovery_over_relay(),
            bench_bookkeeping(model),
            bench_restore(),
            bench_samplers(model),
        ]
    lines += [*bench_trial(CONFIG, model.digest), *bench_loads(), *bench_handovers(), *bench_kv_prices()]
    for line in lines:
        print(_text(line))
    report = {"lines": [asdict(line) | {"kept": line.kept} for line in lines], "run": describe_run(ROOT)}
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {options.output}")


def bench_executor(model: ModelFiles) -> Iterator[Line]:
    """The promises of the CPU's executor: a step over the floor, which is to read the weights once and nothing else, and more."""
    os.sched_setaffinity(0, {COMPUTING})
    limit_threads(1)
    for name, ratios in executor_ratios(model, 2 * ROUNDS).items():
        yield _ratio_line(PROMISES[name].what, ratios, PROMISES[name].bound, PROMISES[name].at_least)


def bench_batches(model: ModelFiles) -> Iterator[Line]:
    """The promises of a step over many requests: over one of a single request, and over plain transformers."""
    os.sched_setaffinity(0, {COMPUTING})
    limit_threads(1)
    for name, ratios in batch_ratios(model, ROUNDS).items():
        yield _ratio_line(BATCH_PROMISES[name].what, ratios, BATCH_PROMISES[name].bound, BATCH_PROMISES[name].at_least)


def bench_engine(model: ModelFiles) -> Line:
    """ITL of one request that an engine serves over that of a session without one at equal compute, step by step in turns."""
    ratios = []
    for number in range(ROUNDS):
        print(f"engine: round {number + 1} of {ROUNDS}", file=sys.stderr, flush=True)
        with worker() as address, worker() as other:
            policy = _mode("serial")
            alone = _remote(address, model, msgspec.structs.replace(policy, batching=None))
            engine = _remote(other, model, policy)
            ratios.append(_ratio(*_engine_and_session(engine, alone)))
            alone.link.close()
            engine.link.close()
    return _ratio_line("ITL of 1 request, engine / session, loopback", ratios, 1.03)


def bench_loads() -> Iterator[Line]:
    """The promises of many requests at once, by trials."""
    for name, ratios in load_ratios(LOAD_REPEATS).items():
        yield _ratio_line(LOAD_PROMISES[name].what, ratios, LOAD_PROMISES[name].bound, LOAD_PROMISES[name].at_least)


def bench_handovers() -> Iterator[Line]:
    """The promises of requests that move to another worker after their prefill, by trials."""
    for name, ratios in handover_ratios(HANDOVER_REPEATS).items():
        line = _ratio_line(HANDOVER_PROMISES[name].what, ratios, HANDOVER_PROMISES[name].bound, HANDOVER_PROMISES[name].at_least)
        yield replace(line, by_interval=name == "codec")


def bench_kv_prices() -> Iterator[Line]:
    """How far prices of recovery over held-out links to the KV host are from what was measured."""
    for name, errors in kv_price_errors(KV_PRICE_REPEATS).items():
        yield _ratio_line(KV_PRICE_PROMISES[name].what, errors, KV_PRICE_PROMISES[name].bound)


def bench_steps(model: ModelFiles) -> Iterator[Line]:
    """ITL of remote_cache and of a second local model beside local's at equal compute; the second is the A/A pair."""
    ratios: dict[str, list[float]] = {"remote_cache": [], "local again": []}
    longer_ms: list[float] = []
    for number in range(ROUNDS):
        print(f"steps: round {number + 1} of {ROUNDS}", file=sys.stderr, flush=True)
        with worker() as address:
            local, again = _local(model), _local(model)
            remote = _remote(address, model, Policy())
            times = _steps({"local": local, "remote_cache": remote, "local again": again})
            remote.link.close()
            for name, into in ratios.items():
                into.append(_ratio(times[name], times["local"]))
            longer_ms.append(1e3 * _longer_s(times["remote_cache"], times["local"]))
    yield _difference_line("ITL remote_cache - local, loopback", longer_ms, 1.0)
    yield _ratio_line("ITL remote_cache / local, loopback", ratios["remote_cache"], None)
    yield _ratio_line("ITL local / local (A/A)", ratios["local again"], None)


def bench_windows(model: ModelFiles) -> Iterator[Line]:
    """ITL of `sys` (windows of 32) beside local's at equal compute: windows and as many local steps, in turns."""
    ratios, longer_ms = [], []
    policy = _mode("sys")
    for number in range(ROUNDS):
        print(f"windows: round {number + 1} of {ROUNDS}", file=sys.stderr, flush=True)
        with worker() as address:
            local, remote = _local(model), _remote(address, model, policy)
            windows, steps = _interleaved_windows(local, remote, policy.window, WINDOW_PAIRS)
            ratios.append(_ratio(windows, steps))
            longer_ms.append(1e3 * _longer_s(windows, steps) / policy.window)
            remote.link.close()
    yield _difference_line("ITL sys - local, loopback, windows of 32", longer_ms, 0.4)
    yield _ratio_line("ITL sys / local, loopback, windows of 32", ratios, 1.02)


def bench_start(model: ModelFiles) -> Iterator[Line]:
    """A worker until it takes clients, the imports of a thin client, and a session's memory over what its model needs."""
    os.sched_setaffinity(0, {COMPUTING})
    ready, imported = [], []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        with worker():
            ready.append(time.perf_counter() - begin)
        imported.append(_timed(lambda: subprocess.run([sys.executable, "-c", "import semgap.client.measure"], check=True)))
    for what, took, bound in (("worker ready", ready, 1.0), ("thin client imported", imported, 0.3)):
        yield Line(what, statistics.median(took), min(took), max(took), bound, unit="s", note=f"median and range of {len(took)}")
    with worker() as address:
        remote = _remote(address, model, Policy())
        remote.prefill(make_prompts(_spec(Policy()))[0][0], 0, Kind.SETUP)
        peak = reconcile(remote.link)["peer"]["peak_rss_bytes"]
        remote.link.close()
    weights = sum(tensor.nbytes for tensor in model.digest.tensors)
    allowed = 1.3 * weights + model.architecture.kv_shape(256).nbytes(4) + 150e6
    note = f"{peak / 1e6:,.0f} MB of {allowed / 1e6:,.0f}"
    yield Line("session's peak memory / 1.3 x weights + KV + 150 MB", peak / allowed, None, None, 1.0, note=note)


def bench_bytes(model: ModelFiles) -> Iterator[Line]:
    """TCP payload per decode token, both directions, all framing counted, of modes as config.yaml has them."""
    counted = {}
    with worker() as address:
        for name in ("sys_simulated", "know_head", "know_consumer", "know_loop"):
            counted[name] = _bytes_per_token(_remote(address, model, _mode(name)))
        coalesced = msgspec.structs.replace(_mode("know_loop"), coalesce=16)
        counted["coalesced"] = _bytes_per_token(_remote(address, model, coalesced))
    times = counted["sys_simulated"] / counted["know_head"]
    note = f"{counted['sys_simulated']:,.0f} B against {counted['know_head']:,.0f} B"
    yield Line("payload per token, sys_simulated / know_head", times, None, None, 30, at_least=True, note=note)
    yield Line("payload per token, know_consumer", counted["know_consumer"], None, None, 96, unit="B")
    yield Line("payload per token, know_loop", counted["know_loop"], None, None, 40, unit="B", note="each token sent as it comes")
    yield Line("payload per token, know_loop, 16 to a frame", counted["coalesced"], None, None, 8, unit="B")


def bench_codec_steps(model: ModelFiles) -> Iterator[Line]:
    """What a codec adds to a loopback step, in units of its own encode and decode time, which the ledgers hold."""
    raw = Policy(reply=Reply("logits_last"))
    for name in ("planes_zstd", "fp16_zlib"):
        added, own_ms = [], []
        for _ in range(ROUNDS):
            with worker() as address:
                plain = _remote(address, model, raw)
                coded = _remote(address, model, msgspec.structs.replace(raw, codec=CodecChoice(reply=name)))
                times = _steps({"plain": plain, "coded": coded})
                own_s = _codec_seconds_per_step(coded)
                plain.link.close()
                coded.link.close()
            added.append(_longer_s(times["coded"], times["plain"]) / own_s)
            own_ms.append(1e3 * own_s)
        interval = mean_interval(added)
        what = f"step with {name} - step with raw, / its encode + decode"
        note = f"{ROUNDS} rounds; encode + decode {statistics.mean(own_ms):.2f} ms; kept where the interval reaches the bound"
        yield Line(what, interval.value or math.nan, interval.low, interval.high, 1.0, note=note, by_interval=True)


def bench_planes(model: ModelFiles) -> Iterator[Line]:
    """planes_zstd against fp16 + zlib on the fp16 logits of all positions of a prompt: size, and encoding speed in turns."""
    logits = _local(model, Reply("logits_all")).prefill(make_prompts(_spec(Policy()))[0][0], 0, Kind.SETUP).logits
    assert logits is not None
    half = Tensor.from_numpy(logits.as_float32().astype(np.float16), TensorClass.LOGITS)
    sizes = {name: codecs.encode(half, name).nbytes for name in ("planes_zstd", "fp16_zlib")}
    speeds = []
    for _ in range(5):
        zlib_s = _timed(lambda: codecs.encode(half, "fp16_zlib"))
        planes_s = _timed(lambda: codecs.encode(half, "planes_zstd"))
        speeds.append(zlib_s / planes_s)
    ratio = sizes["planes_zstd"] / sizes["fp16_zlib"]
    yield Line("fp16 logits, planes_zstd size / fp16 + zlib size", ratio, None, None, 0.92, note=f"{half.shape[0]} rows")
    yield _ratio_line("fp16 logits, planes_zstd encode speed / fp16 + zlib", speeds, 20, at_least=True)
    yield from _compiled_planes(model)


def _compiled_planes(model: ModelFiles) -> Iterator[Line]:
    """planes_zstd on a block of the model's KV cache, 64 positions of a layer, with compiled kernels and with numpy, in turns."""
    whole = to_wire(_cache_of(model).block(0, 0)[None], TensorClass.KV)
    encoded = codecs.encode(whole, "planes_zstd")
    payload = memoryview(b"".join(encoded.buffers))
    cpu_planes.load()
    compiled, times = dict(COMPILED), dict[str, list[float]]()
    for _ in range(5):
        for name, kernels in (("compiled", compiled), ("numpy", {})):
            COMPILED.clear()
            COMPILED.update(kernels)
            for way, run in (
                ("encode", lambda: codecs.encode(whole, "planes_zstd")),
                ("decode", lambda: codecs.decode(encoded.codec, whole.cls, whole.dtype, whole.shape, payload)),
            ):
                times.setdefault(f"{way} {name}", []).append(min(_timed(run) for _ in range(50)))
    for way, bound in (("encode", 1.0), ("decode", 0.75)):
        ratios = [ours / theirs for ours, theirs in zip(times[f"{way} compiled"], times[f"{way} numpy"], strict=True)]
        note = f"{1e6 * min(times[f'{way} compiled']):.0f} us"
        yield _ratio_line(f"float32 KV block, planes_zstd {way}, compiled / numpy", ratios, bound, note=note)


def bench_upload(model: ModelFiles) -> Iterator[Line]:
    """Upload of all weights into a worker's model, against sendall and recv_into between two bare sockets, in turns."""
    ours, plain = [], []
    with worker() as address:
        runtime = _remote(address, model, Policy(), upload=False)
        begin = time.perf_counter()
        nbytes = runtime.upload_weights()
        first_s = time.perf_counter() - begin
        weights = runtime.weights
        with plain_receiver(nbytes) as sock:
            for number in range(UPLOADS + 1):
                plain_s = _timed(lambda: _send_plainly(sock, weights))
                ours_s = _timed(lambda: runtime.send_weights(range(len(weights))))
                if number:  # the first touches fresh pages
                    plain.append(plain_s)
                    ours.append(ours_s)
        runtime.link.close()
    goodput = nbytes / statistics.median(ours) / 1e9
    note = f"{goodput:.2f} GB/s; the first upload, into fresh memory and with the model built, took {first_s:.2f} s"
    ratios = [theirs / mine for theirs, mine in zip(plain, ours, strict=True)]
    yield _ratio_line("weight upload goodput / plain sendall + recv_into", ratios, 0.7, at_least=True, note=note)


def bench_round_trip() -> Line:
    """Median 64-byte round trip of `ping` over that of a bare send and recv in Python, in batches taken in turns."""
    ours: list[float] = []
    plain: list[float] = []
    ratios = []
    with worker() as address, plain_echo() as sock:
        link = connect(address)
        shake_hands_as_client(link, b"", {})
        link.limits = frames.Limits()
        for _ in range(10):
            mine = [_timed(lambda: ping(link, 64, 64)) for _ in range(TRIPS // 10)]
            theirs = [_timed(lambda: _bounce(sock)) for _ in range(TRIPS // 10)]
            ratios.append(statistics.median(mine) / statistics.median(theirs))
            ours += mine
            plain += theirs
        link.close()
    note = f"{1e6 * statistics.median(ours):.0f} us against {1e6 * statistics.median(plain):.0f} us"
    return _ratio_line("64-byte round trip p50 / bare socket", ratios, 2.0, note=note)


def bench_tls(model: ModelFiles) -> Iterator[Line]:
    """The cost of TLS: a step and an upload with it over those without."""
    for name, ratios in tls_ratios(model, ROUNDS).items():
        yield _ratio_line(TLS_PROMISES[name].what, ratios, TLS_PROMISES[name].bound)


def bench_relay() -> Iterator[Line]:
    """Goodput through a relay over what was asked of it, and what its round trips have beyond twice the delay.

    A worker that has slept for as long as the link takes wakes late, as it would behind any network: the same ping without a relay, after
    such a pause, says how late, and what is left is the relay's.
    """
    for delay_ms in RELAY_DELAYS_MS:
        network = Network("relay", delay_ms=delay_ms, rate=RELAY_RATE)
        ratios: dict[str, list[float]] = {"up": [], "down": []}
        beyond_ms, own_ms = [], []
        for _ in range(ROUNDS):
            with worker() as address, _relayed(address, network) as through:
                pause_ms = 1e3 * _paused_rtt_s(address, 2e-3 * delay_ms)
                found = measured_of(_probe(through))
            assert found["rtt_s"] is not None
            beyond_ms.append(1e3 * found["rtt_s"] - 2 * delay_ms)
            own_ms.append(beyond_ms[-1] - pause_ms)
            for way in ratios:
                ratios[way].append((found[f"goodput_{way}_bytes_per_s"] or math.nan) / (bits_per_s(RELAY_RATE) / 8))
        where = f"relay, {RELAY_RATE}, {2 * delay_ms:g} ms"
        for way, found_ratios in ratios.items():
            yield _ratio_line(f"goodput {way} / asked, {where}", found_ratios, 0.97, at_least=True)
        yield Line(f"round trip - asked, {where}", statistics.median(beyond_ms), min(beyond_ms), max(beyond_ms), None, unit="ms")
        note = "less that of a ping after a pause as long, without a relay"
        yield Line(
            f"round trip of the relay's own, {where}", statistics.median(own_ms), min(own_ms), max(own_ms), 0.3, unit="ms", note=note
        )


def bench_over_relay(model: ModelFiles) -> Iterator[Line]:
    """At 1 Gbit: ITL of `sys` (windows of 32) over local's, at 50 ms with its windows asked for ahead; remote_cache's above local's."""
    policy = _mode("sys")
    ahead = msgspec.structs.replace(policy, ahead=True)
    near, far = (Network("relay", delay_ms=delay_ms, rate=RELAY_RATE) for delay_ms in (5.0, 25.0))
    ratios: list[float] = []
    ahead_ratios: list[float] = []
    longer_ms: list[float] = []
    for number in range(ROUNDS):
        print(f"over a relay: round {number + 1} of {ROUNDS}", file=sys.stderr, flush=True)
        with worker() as address:
            local = _local(model)
            with _relayed(address, near) as through:
                remote = _remote(through, model, policy)
                ratios.append(_ratio(*_interleaved_windows(local, remote, policy.window, WINDOW_PAIRS)))
                remote.link.close()
                stepping = _remote(through, model, Policy())
                times = _steps({"local": local, "remote_cache": stepping})
                stepping.link.close()
            with _relayed(address, far) as through:
                remote = _remote(through, model, ahead)
                ahead_ratios.append(_ratio(*_interleaved_windows(local, remote, AHEAD_WINDOWS * ahead.window, AHEAD_PAIRS)))
                remote.link.close()
        longer_ms.append(1e3 * _longer_s(times["remote_cache"], times["local"]))
    yield _ratio_line("ITL sys / local, relay, 1Gbit, 10 ms, windows of 32", ratios, 1.05)
    interval = mean_interval(longer_ms)
    low, high = interval.low, interval.high
    yield Line("ITL remote_cache - local, relay, 1Gbit, 10 ms", interval.value or math.nan, low, high, 10, at_least=True, unit="ms")
    note = f"{AHEAD_WINDOWS} windows, the first one's round trip in it"
    yield _ratio_line("ITL sys asked ahead / local, relay, 1Gbit, 50 ms", ahead_ratios, 1.05, note=note)


@contextmanager
def _relayed(address: str, network: Network) -> Iterator[str]:
    """The address of a relay in front of a worker, on the thin core."""
    with tempfile.TemporaryDirectory(prefix="semgap-bench-") as scratch:
        command = relay_command(network, address, (THIN,), Path(scratch) / "relay.json")
        with running("relay", command, Path(scratch) / "relay.log", 1, serves=True) as relay:
            yield relay.await_address(60)


def _probe(address: str) -> dict[str, float]:
    """What a probe from the thin core finds."""
    os.sched_setaffinity(0, {THIN})
    link = connect(address)
    shake_hands_as_client(link, b"", {})
    link.limits = frames.Limits()
    probe = probe_link(link, 50, RELAY_PAYLOAD_BYTES)
    link.close()
    return probe


def _paused_rtt_s(address: str, pause_s: float) -> float:
    """The median round trip to a worker that has slept for `pause_s`, without a relay."""
    os.sched_setaffinity(0, {THIN})
    link = connect(address)
    shake_hands_as_client(link, b"", {})
    link.limits = frames.Limits()
    trips = []
    for _ in range(50):
        time.sleep(pause_s)
        trips.append(_timed(lambda: ping(link, 64, 0)))
    link.close()
    return statistics.median(trips)


def bench_recovery(model: ModelFiles) -> Iterator[Line]:
    """How much longer a step takes that misses 1/8 of the layers: `delta` and `auto` against `reload`, over a KV host, steps in turns."""
    longer: dict[str, list[float]] = {name: [] for name in RECOVERIES}
    restored: dict[str, list[dict]] = {name: [] for name in RECOVERIES}
    saved_clean = 0
    for number in range(ROUNDS):
        print(f"recovery: round {number + 1} of {ROUNDS}", file=sys.stderr, flush=True)
        with kv_host() as host, worker("--kv-host", host, "--io-cpus", str(THIN)) as address:
            runtimes = {name: _remote(address, model, policy) for name, policy in RECOVERIES.items()}
            prompt = make_prompts(_spec(Policy()))[0][0]
            missed = interleaved_misses(model.architecture.layers, runtimes, prompt, 1 / 8, 2 * STEPS)
            saved_clean += sum(each.saved_clean_bytes for each in missed.values())
            for name, runtime in runtimes.items():
                longer[name].append(statistics.mean(missed[name].longer_s))
                restored[name] += [step["recovered"] for step in reconcile(runtime.link)["peer"]["steps"] if step["recovered"]]
                runtime.link.close()
    reload_s = longer["reload"]
    for name, bound in (("auto", 0.35), ("delta, planes_zstd", None)):
        note = f"{1e3 * statistics.mean(longer[name]):.2f} ms against {1e3 * statistics.mean(reload_s):.2f} ms"
        ratios = [ours / base for ours, base in zip(longer[name], reload_s, strict=True)]
        interval = mean_interval(ratios)
        what = f"step longer by a miss of 1/8, {name} / reload"
        yield Line(what, interval.value or math.nan, interval.low, interval.high, bound, note=f"{ROUNDS} rounds; {note}")
    layers = model.architecture.layers
    share = len(layers_to_evict(layers, 1 / 8, 0)) / layers
    yield Line("reload, bytes fetched / all filled bytes", share * _fetched_per_missing(restored["reload"]), None, None, 1.01)
    ways = ", ".join(sorted({each["how"] for each in restored["auto"]}))
    yield Line("auto, bytes fetched / missing bytes", _fetched_per_missing(restored["auto"]), None, None, 1.01, note=f"took {ways}, raw")
    ratio = _kv_ratio(model, "planes_zstd")
    note = f"ratio {ratio:.3f}, of the whole cache in one piece"
    times_ratio = ratio * _fetched_per_missing(restored["delta, planes_zstd"])
    yield Line("delta, bytes fetched x codec ratio / missing bytes", times_ratio, None, None, 1.01, note=note)
    yield Line("evicting clean blocks, bytes saved", float(saved_clean), None, None, 0.0, unit="B")


def bench_prefixes() -> Iterator[Line]:
    """The promises of prefixes that are fetched, over three links of the KV host."""
    for name, ratios in prefix_ratios(PREFIX_REPEATS).items():
        yield _ratio_line(PREFIX_PROMISES[name].what, ratios, PREFIX_PROMISES[name].bound, PREFIX_PROMISES[name].at_least)


def bench_recovery_over_relay() -> Iterator[Line]:
    """The promises of a recovery over a link of 1 Gbit and 1 ms between worker and KV host."""
    for name, ratios in recovery_ratios(ROUNDS).items():
        yield _ratio_line(RECOVERY_PROMISES[name].what, ratios, RECOVERY_PROMISES[name].bound, RECOVERY_PROMISES[name].at_least)


def bench_bookkeeping(model: ModelFiles) -> Line:
    """ITL over a handle of LiveCaches of which nothing is missing, against the same executor over the handle's bare cache, in turns.

    Both run over one cache: where memory happens to lie moves a step by a percent.
    """
    os.sched_setaffinity(0, {COMPUTING})
    executor = _local(model)._executor
    ledger = Ledger()
    policy = Policy(recovery="delta")
    prompt, ratios = make_prompts(_spec(Policy()))[0][0], []
    for _ in range(ROUNDS):
        pool = executor.new_pool(executor.cache_nbytes)
        caches = LiveCaches(pool, policy, WorkerShadow(ledger, transfer_of(pool)), executor.forward, ledger)
        live = caches.open(0)
        caches.forward(live, prompt)
        ratios.append(_paired_ratio(partial(caches.forward, live), lambda token, cache=live.cache: executor.forward(token, cache)))
        caches.close()
    note = "geometric means of rounds; kept where the interval reaches 1"
    return replace(_ratio_line("ITL with KV bookkeeping, nothing missing / without", ratios, 1.0, note=note), by_interval=True)


def bench_samplers(model: ModelFiles) -> Line:
    """ITL with the samplers of a trial running beside it, against the same paused, in blocks of a second in turns."""
    os.sched_setaffinity(0, {COMPUTING})
    executor = _local(model)._executor
    prompt, cache = make_prompts(_spec(Policy()))[0][0], executor.new_cache()
    executor.forward(prompt, cache)

    def step() -> None:
        executor.logits(executor.forward(prompt[:1], cache))
        cache.truncate(len(prompt))

    interval_s = CONFIG["telemetry"]["interval_s"]
    with tempfile.TemporaryDirectory() as directory:
        found = measure_burden(step, Path(directory), pids={"client": os.getpid()}, interval_s=interval_s, cpus=[THIN])
    ran = [source for source, result in found.sources.items() if result.cost]
    note = f"sampled by {', '.join(ran)} every {interval_s} s; kept where the interval reaches 1.01"
    return replace(_ratio_line("ITL with samplers / without", found.ratios, 1.01, note=note), by_interval=True)


def bench_restore() -> Line:
    """Bringing back 100 MB of raw blocks from a KV host into slabs, against sendall and recv_into between two bare sockets, in turns."""
    shape = KVShape(layers=30, heads=3, max_length=2240, head_dim=64)
    pool = HostPool(shape, DType.F32, shape.nbytes(4))
    cache = KVCache(pool)
    cache.load(np.random.default_rng(0).standard_normal(shape.filled(shape.max_length), np.float32))
    nbytes = cache.bytes_of(cache.resident)
    layout = messages.KVLayout("bench", DType.F32, shape.layers, shape.heads, shape.head_dim, shape.max_length, BLOCK)
    ratios, ours = [], []
    with kv_host() as host, plain_sender(nbytes) as receive:
        os.sched_setaffinity(0, {COMPUTING})
        shadow = KVHostShadow(lambda: connect_kv(host, b"", 30.0), layout, transfer_of(pool))
        shadow.save(b"k" * 16, cache, cache.resident, ("raw",) * shape.layers, np.zeros(shape.max_length, dtype=np.int64))
        for number in range(2 * UPLOADS + 1):
            plain_s = _timed(receive)
            for layer_index in range(shape.layers):
                cache.drop(layer_index)
            cache.admit()
            ours_s = _timed(lambda: list(shadow.fetch(b"k" * 16, cache, cache.missing.copy())))
            if number:  # the first touches fresh pages
                ratios.append(plain_s / ours_s)
                ours.append(ours_s)
        shadow.close()
    note = f"{nbytes / 1e6:.0f} MB at {nbytes / statistics.median(ours) / 1e9:.2f} GB/s"
    return _ratio_line("restoring blocks, goodput / plain sendall + recv_into", ratios, 0.7, at_least=True, note=note)


def bench_trial(config: Config, digest: ModelDigest) -> Iterator[Line]:
    """One trial of remote_cache as the workflow runs it: what it costs beside its measurement, and memory."""
    place = trial_setup.Paths(MODEL, ROOT)
    at = Coordinates(config["models"][0], config["networks"][0], "remote_cache", "decode", 1)
    with tempfile.TemporaryDirectory() as scratch:
        reference = Path(scratch) / "reference.npz"
        compute_reference.compute_reference(config.reference_cell(at.model, at.phase), place, reference)
        begin = time.monotonic()
        result = measure_trial.measure_trial(config.cell(at), place, reference)
        result.write(Path(scratch))
        whole_s = time.monotonic() - begin
    measured = result.manifest["measured"]
    weights = sum(tensor.nbytes for tensor in digest.tensors)
    kv = 30 * 2 * 3 * config["max_length"] * 64 * 4
    memory = result.manifest["memory"]
    start_s = result.manifest["setup"]["client_start_s"]
    yield Line("trial outside its measurement", whole_s - (measured["end_s"] - measured["start_s"]), None, None, 10.0, unit="s")
    bound = 1.3 * weights + kv + 500e6
    yield Line("worker, peak memory", memory["worker_peak_rss_bytes"] / 1e6, None, None, bound / 1e6, unit="MB")
    yield Line("thin client, peak anonymous memory", memory["client_peak_rss_anon_bytes"] / 1e6, None, None, 250.0, unit="MB")
    yield Line("thin client, start-up", start_s, None, None, None, unit="s", note="from spawn to its first connection")


def worker(*options: str) -> AbstractContextManager[str]:
    """A fresh worker on the computing core; gives its address."""
    return _served("serve", "--cpus", str(COMPUTING), *options)


def kv_host() -> AbstractContextManager[str]:
    """A fresh KV host on the thin core; gives its address."""
    return _served("kvhost", "--budget-bytes", str(1 << 30), "--cpus", str(THIN))


@contextmanager
def _served(*arguments: str) -> Iterator[str]:
    command = [sys.executable, "-m", "semgap", *arguments, "--parent-pid", str(os.getpid())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["address"]
    finally:
        process.terminate()
        process.wait()


@contextmanager
def plain_receiver(nbytes: int) -> Iterator[socket.socket]:
    """A process on the computing core that receives `nbytes` into one buffer, again and again, and answers each with a byte."""

    def receive(sock: socket.socket) -> None:
        buffer = memoryview(np.zeros(nbytes, dtype=np.uint8))
        while True:
            done = 0
            while done < nbytes:
                got = sock.recv_into(buffer[done:])
                if not got:
                    return
                done += got
            sock.sendall(b".")

    with _forked(receive) as sock:
        yield sock


@contextmanager
def plain_sender(nbytes: int) -> Iterator[Callable[[], None]]:
    """A process on the thin core that sends `nbytes` for each byte that it gets; gives what asks for them and receives them here."""

    def send(sock: socket.socket) -> None:
        os.sched_setaffinity(0, {THIN})
        buffer = memoryview(np.ones(nbytes, dtype=np.uint8))
        while sock.recv(1):
            sock.sendall(buffer)

    target = memoryview(np.ones(nbytes, dtype=np.uint8))
    with _forked(send) as sock:

        def receive() -> None:
            sock.sendall(b".")
            done = 0
            while done < nbytes:
                done += sock.recv_into(target[done:])

        yield receive


@contextmanager
def plain_echo() -> Iterator[socket.socket]:
    """A process on the computing core that sends back every 64 bytes."""

    def echo(sock: socket.socket) -> None:
        while data := sock.recv(64):
            sock.sendall(data)

    with _forked(echo) as sock:
        yield sock


@contextmanager
def _forked(serve: Callable[[socket.socket], None]) -> Iterator[socket.socket]:
    listener = socket.create_server(("127.0.0.1", 0))
    pid = os.fork()
    if pid == 0:
        os.sched_setaffinity(0, {COMPUTING})
        accepted, _ = listener.accept()
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        serve(accepted)
        os._exit(0)
    os.sched_setaffinity(0, {THIN})
    with socket.create_connection(listener.getsockname()) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield sock
    os.waitpid(pid, 0)
    listener.close()


@dataclass(frozen=True)
class Timed:
    """Seconds of a step or a window, and of its forward passes."""

    latency_s: float
    compute_s: float


def _steps(runtimes: dict[str, LocalRuntime | RemoteRuntime]) -> dict[str, list[Timed]]:
    """The decode steps of each runtime in a row, after the same prefill.

    A gap needs no neighbour in time, and a thin client that another model's steps push out of its core's cache is not thin.
    """
    prompt, _ = make_prompts(_spec(Policy()))
    times, drawn = {}, set()
    for name, runtime in runtimes.items():
        _pin(runtime)
        token = runtime.prefill(prompt[0], 0, Kind.SETUP).tokens[0]
        latencies, computed = [], []
        for _ in range(STEPS + 2):
            begin = time.perf_counter()
            (arrival,) = runtime.decode(token, 1, Kind.REGULAR)
            latencies.append(time.perf_counter() - begin)
            token = arrival.tokens[0]
            computed.append((arrival.compute_ns or 0) / 1e9)
        if isinstance(runtime, RemoteRuntime):
            computed = _worker_compute_s(runtime)[-STEPS - 2 :]
        times[name] = list(map(Timed, latencies, computed))[2:]  # the first ones warm up
        drawn.add(token)
    if len(drawn) != 1:
        raise SystemExit(f"the runtimes drew different tokens at the end: {sorted(drawn)}")
    return times


def _engine_and_session(engine: RemoteRuntime, alone: RemoteRuntime) -> tuple[list[Timed], list[Timed]]:
    """Steps of the same prompt, in turns; two more of each warm up. SystemExit for different tokens."""
    prompt = make_prompts(_spec(Policy()))[0][0]
    drawn = alone.prefill(prompt, 0, Kind.SETUP).tokens[0]
    token, _ = _advanced(engine, prompt, messages.Call(1, 0, len(prompt), 1, most=256))
    ours, latencies = [], []
    for step in range(2 * STEPS + 2):
        begin = time.perf_counter()
        token, compute_s = _advanced(engine, np.array([token]), messages.Call(1, len(prompt) + step, 1, 1))
        between = time.perf_counter()
        (arrival,) = alone.decode(drawn, 1, Kind.REGULAR)
        latencies.append(time.perf_counter() - between)
        ours.append(Timed(between - begin, compute_s))
        drawn = arrival.tokens[0]
        if token != drawn:
            raise SystemExit(f"the engine drew {token} and the session {drawn}")
    theirs = list(map(Timed, latencies, _worker_compute_s(alone)[-2 * STEPS - 2 :]))
    return ours[2:], theirs[2:]


def _advanced(engine: RemoteRuntime, ids: np.ndarray, call: messages.Call) -> tuple[int, float]:
    """The token of a call that feeds `ids`, and the seconds of its step."""
    sent = [codecs.encode(Tensor.from_numpy(ids.astype(np.int64), TensorClass.TOKENS), "compact")]
    engine.link.post(Operation.ADVANCE, messages.Advance((), (call,)), sent, Kind.REGULAR)
    frame = engine.link.receive_any(Operation.ADVANCE)
    (gained,) = frame.header_as(messages.Advanced).gained
    return engine.link.decode(frame, 0).numpy()[0].item(), gained.compute_us / 1e6


def _interleaved_windows(local: LocalRuntime, remote: RemoteRuntime, tokens: int, pairs: int) -> tuple[list[Timed], list[Timed]]:
    """`tokens` in windows, and as many local steps from the same token, in turns; one more pair warms up."""
    prompt, _ = make_prompts(_spec(Policy()))
    windows: list[float] = []
    steps: list[Timed] = []
    for pair in range(pairs + 1):
        local_s = 0.0
        for runtime in (local, remote) if pair % 2 else (remote, local):
            _pin(runtime)
            token = runtime.prefill(prompt[0], 0, Kind.SETUP).tokens[0]
            begin = time.perf_counter()
            done = 0
            while done < tokens:
                for arrival in runtime.decode(token, tokens - done, Kind.REGULAR):
                    token, done = arrival.tokens[-1], done + len(arrival.tokens)
                    local_s += (arrival.compute_ns or 0) / 1e9
            took_s = time.perf_counter() - begin
            runtime.end_request()
            if runtime is remote:
                windows.append(took_s)
            else:
                steps.append(Timed(took_s, local_s))
    passes = np.reshape(_worker_compute_s(remote), (pairs + 1, tokens + 1))  # a prefill, then the windows' steps
    return list(map(Timed, windows, passes[:, 1:].sum(axis=1).tolist()))[1:], steps[1:]


def _worker_compute_s(remote: RemoteRuntime) -> list[float]:
    """Seconds of each forward pass of the session so far, by the worker's clock."""
    return [step["compute_ns"] / 1e9 for step in reconcile(remote.link)["peer"]["steps"]]


def _gap_s(times: Sequence[Timed]) -> float:
    return statistics.median(each.latency_s - each.compute_s for each in times)


def _longer_s(ours: Sequence[Timed], base: Sequence[Timed]) -> float:
    """The difference of the gaps, one value a round: where memory happens to lie moves compute by some percent, and not the gap."""
    return _gap_s(ours) - _gap_s(base)


def _ratio(ours: Sequence[Timed], base: Sequence[Timed]) -> float:
    """The ratio of latencies at the compute of `base`: one value a round, since its steps share processes and memory."""
    compute_s = statistics.mean(each.compute_s for each in base)
    return (compute_s + _gap_s(ours)) / (compute_s + _gap_s(base))


def _paired_ratio(ours: Callable[[np.ndarray], object], theirs: Callable[[np.ndarray], object]) -> float:
    """Geometric mean of the ratios of times of steps taken in turns, the first of which warm up."""
    token, logs = np.array([42]), []
    for step in range(2 * STEPS):
        took = {work: _timed(lambda work=work: work(token)) for work in ((ours, theirs) if step % 2 else (theirs, ours))}
        logs.append(math.log(took[ours] / took[theirs]))
    return math.exp(statistics.mean(logs[2:]))


RECOVERIES = {
    "reload": Policy(reply=Reply("logits_last"), recovery="reload", shadow="kvhost"),
    "auto": Policy(reply=Reply("logits_last"), recovery="auto", shadow="kvhost", codec=CodecChoice(kv="planes_zstd")),
    "delta, planes_zstd": Policy(reply=Reply("logits_last"), recovery="delta", shadow="kvhost", codec=CodecChoice(kv="planes_zstd")),
}


def _fetched_per_missing(restored: Sequence[dict]) -> float:
    """Frame bytes between worker and KV host, both directions, over the filled bytes that were missing."""
    return sum(each["fetched_network_bytes"] for each in restored) / sum(each["missing_bytes"] for each in restored)


def _kv_ratio(model: ModelFiles, codec: str) -> float:
    """Tensor bytes over payload bytes of the KV cache of a prompt, encoded in one piece."""
    whole = to_wire(_cache_of(model).export(), TensorClass.KV)
    return whole.data.nbytes / codecs.encode(whole, codec).nbytes


def _cache_of(model: ModelFiles) -> KVCache:
    """After a prompt."""
    executor = _local(model)._executor
    cache = executor.new_cache()
    executor.forward(make_prompts(_spec(Policy()))[0][0], cache)
    return cache


def _bytes_per_token(runtime: RemoteRuntime) -> float:
    """Over 64 tokens after a prefill."""
    prompt, _ = make_prompts(_spec(Policy()))
    token = runtime.prefill(prompt[0], 0, Kind.SETUP).tokens[0]
    before = runtime.ledger.up.frame + runtime.ledger.down.frame
    done = 0
    while done < 64:
        for arrival in runtime.decode(token, 64 - done, Kind.REGULAR):
            token, done = arrival.tokens[-1], done + len(arrival.tokens)
    moved = runtime.ledger.up.frame + runtime.ledger.down.frame - before
    runtime.link.close()
    return moved / done


def _codec_seconds_per_step(runtime: RemoteRuntime) -> float:
    """Encoding on the worker and decoding here of one decode step's reply, from both ledgers."""
    report = reconcile(runtime.link)
    regular = [row for row in report["rows"] + report["peer_rows"] if row["kind"] == "regular" and row["tensor_class"] == "logits"]
    return sum(row["encode_ns"] + row["decode_ns"] for row in regular) / 1e9 / (STEPS + 2)


def _pin(runtime: LocalRuntime | RemoteRuntime) -> None:
    """A model in this process computes on the core that the worker computes on; a thin client keeps to the other."""
    os.sched_setaffinity(0, {COMPUTING if isinstance(runtime, LocalRuntime) else THIN})


def _spec(policy: Policy) -> ClientSpec:
    phase = Phase("decode", (128,), warmup_requests=0, warmup_steps=0, steps=STEPS + 2)
    return ClientSpec("", str(MODEL), str(ROOT / "resources/prompts/english.txt"), policy, phase, "float32", 1, 256, "cpu")


def _local(model: ModelFiles, reply: Reply | None = None) -> LocalRuntime:
    os.sched_setaffinity(0, {COMPUTING})
    policy = Policy(placement="local", reply=reply or Reply("logits_last"))
    return LocalRuntime(policy, model, Drawing(), threads=1, max_length=256, device="cpu", setup={})


def _remote(address: str, model: ModelFiles, policy: Policy, upload: bool = True) -> RemoteRuntime:
    os.sched_setaffinity(0, {THIN})
    link = connect(address)
    asked = SessionSpec(policy, model.config, model.digest.dtype, max_length=256, model_id=model.digest.sha256)
    granted = shake_hands_as_client(link, b"", msgspec.to_builtins(asked))
    link.limits = frames.Limits()
    head = load_client_head(model, granted["executor"], 1) if policy.reply.kind == "hidden_last" else None
    runtime = RemoteRuntime(link, policy, model, Drawing(), head)
    if upload:
        runtime.upload_weights()
    return runtime


def _mode(name: str) -> Policy:
    """A mode of config.yaml."""
    return policy_from(CONFIG.policy(name), name)


def _send_plainly(sock: socket.socket, weights: Sequence[Tensor]) -> None:
    for weight in weights:
        sock.sendall(weight.data)
    sock.recv(1)


def _bounce(sock: socket.socket) -> None:
    sock.sendall(bytes(64))
    sock.recv(64)


def _timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _ratio_line(what: str, ratios: Sequence[float], bound: float | None, at_least: bool = False, note: str = "") -> Line:
    """Geometric mean of the ratios of repeats, with a t interval on the log scale over them."""
    interval = geometric_mean_interval(ratios)
    said = f"{len(ratios)} repeats" + (f"; {note}" if note else "")
    return Line(what, interval.value or math.nan, interval.low, interval.high, bound, at_least, note=said)


def _difference_line(what: str, differences_ms: Sequence[float], bound: float) -> Line:
    """Mean of the differences of rounds, with a t interval over them."""
    interval = mean_interval(differences_ms)
    note = f"{len(differences_ms)} repeats"
    return Line(what, interval.value or math.nan, interval.low, interval.high, bound, unit="ms", note=note)


def _text(line: Line) -> str:
    interval = f"[{line.low:.3f} to {line.high:.3f}]" if line.low is not None and line.high is not None else ""
    sign = ">=" if line.at_least else "<="
    bound = "" if line.bound is None else f"{sign} {line.bound:g}  {'kept' if line.kept else 'NOT KEPT'}"
    return f"{line.what:<52} {line.value:>9.3f} {line.unit:<2} {interval:<18} {bound:<18} {line.note}"


if __name__ == "__main__":
    main()
