"""The parts of `make gpu-check`, each run as a process: `python gpu_parts.py PART RECORDS SCRATCH [--rehearse]`.

A part writes its rows as it goes, and goes on after a measurement that failed. Trials' own functions start workers, open sessions and
drive requests, so that what is measured is what the workflow runs. With --rehearse the models are tiny, on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib.util
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from gpu_table import PARTS, Measured, Part, Records
from safetensors.torch import load_file
from sampler_burden import Pauser

from semgap.analysis.stats import Interval, geometric_mean_interval
from semgap.client.local_runtime import LocalRuntime
from semgap.client.loop import run_requests
from semgap.client.measure import open_local
from semgap.client.prompts import make_prompts
from semgap.client.remote_runtime import RemoteRuntime
from semgap.client.runtime import Drawing, Runtime, draw_from
from semgap.client.session import open_session
from semgap.client.spec import ClientSpec, WorkerSide
from semgap.codecs import CODECS, device, nvcomp
from semgap.codecs.arrays import to_wire
from semgap.engine.batch import Run
from semgap.engine.executor import Executor, RowDraw
from semgap.engine.executor_choice import choose_executor, make_executor
from semgap.engine.model_files import ModelFiles, load_digest
from semgap.engine.weights import Weights
from semgap.experiment import compute_reference, measure_trial, provenance, trial_setup, trial_worker
from semgap.experiment.cell import Cell
from semgap.experiment.config import Config, Coordinates, check_config
from semgap.experiment.fetch_model import fetch_model
from semgap.kv.block_pool import BlockPool
from semgap.kv.pool import BLOCK
from semgap.policy import SamplingRule
from semgap.processes import machine
from semgap.telemetry import nvml, samplers
from semgap.tensors import DType, TensorClass
from semgap.wire.link import connect
from semgap.wire.messages import WeightSpec
from semgap.wire.reconcile import reconcile
from semgap.wire.tcp import Timeouts

if TYPE_CHECKING:
    from semgap.engine.kernels import Tile

ROOT = Path(__file__).resolve().parents[1]
LLAMA_3_8B = {
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
}


@dataclass(frozen=True)
class Scale:
    """How large everything is: `FULL` on the GPU, `REHEARSAL` on the CPU."""

    device: str
    dtype: str
    gptj: Mapping[str, Any]  # what differs from the preset's model
    llama: Mapping[str, Any]
    prompt_tokens: int
    steps: int
    rounds: int
    copy_bytes: int


FULL = Scale("cuda", "float16", {}, LLAMA_3_8B, prompt_tokens=128, steps=50, rounds=8, copy_bytes=4 << 30)
REHEARSAL = Scale(
    "cpu",
    "float32",
    {"vocab_size": 512, "n_positions": 128, "n_embd": 64, "n_layer": 8, "n_head": 4, "rotary_dim": 8},
    {"vocab_size": 512, "max_position_embeddings": 128, "hidden_size": 64, "intermediate_size": 128}
    | {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    prompt_tokens=16,
    steps=8,
    rounds=3,
    copy_bytes=1 << 20,
)
MODEL = "gptj-6b-random"  # of config/gptj-6b.yaml
_KERNELS = 40
_TEST_PROCESSES = max(1, min(7, len(os.sched_getaffinity(0)) // 2))  # files in tests/gpu that are not alone, where there are cores
_TILES = ((4, 1024, 4), (4, 512, 2), (2, 1024, 2), (2, 1024, 4), (4, 2048, 8), (8, 512, 4), (1, 2048, 4), (16, 256, 4))
_REGISTERS = (None, 96, 168)  # of a thread, at most, in place of the tile's own bound
_BLOCK_REQUESTS = 3  # a second of them, in which every sampler takes a sample
_BATCH = 16
_PROMPT_BLOCKS = 56  # 28 layers of 128 positions, 64 to a block


class Bench:
    """What every part works with.

    `scratch` holds what one part leaves to others (the model), `roles` what the part's own worker and clients write.
    """

    def __init__(self, records: Records, scratch: Path, roles: Path, scale: Scale) -> None:
        self.records, self.scratch, self.roles, self.scale = records, scratch, roles, scale
        self.device = scale.device
        self.failed = False

    @property
    def place(self) -> trial_setup.Paths:
        """Where trials find the model and the workflow."""
        return trial_setup.Paths(self.scratch / MODEL, ROOT)

    def row(self, name: str, value: float | Interval, note: str = "") -> None:
        """Gives a row: a value, or a mean with its interval."""
        if isinstance(value, Interval):
            self.records.row(name, Measured(value.value, value.low, value.high, note, value.reason if value.value is None else None))
        else:
            self.records.row(name, Measured(float(value), note=note))

    def missing(self, name: str, reason: str) -> None:
        """Gives a row that could not be measured, which is no failure."""
        self.records.row(name, Measured(reason=reason))

    @contextlib.contextmanager
    def rows(self, *names: str) -> Iterator[None]:
        """Around the measuring of rows: what goes wrong becomes their reason, and the part goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failed = True
            for name in names:
                if name not in self.records.given:
                    self.missing(name, f"{type(error).__name__}: {error}")

    def sync(self) -> None:
        """Waits for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        """Wall time of `work` and of what it started on the device."""
        self.sync()
        begin = time.perf_counter()
        work()
        self.sync()
        return time.perf_counter() - begin

    def config(self, **over: Any) -> Config:
        """The preset config/gptj-6b.yaml, over the modes of full.yaml, with its random model and one recovery; `over` on top."""
        shape = {"prompt_lengths": [self.scale.prompt_tokens], "steps": self.scale.steps}
        phases = {"decode": shape, "recovery-evict": shape | {"evict_fractions": [0, 0.125]}}
        models = {MODEL: {"config": dict(self.scale.gptj)}}
        own: dict[str, Any] = {
            "models": [MODEL],
            "modes": ["local", "remote_cache", "sys", "sys_delta", "sys_delta_raw"],
            "phases": list(phases),
            "dtype": self.scale.dtype,
            "device": self.scale.device,
            "worker": {"weight_cache": None},  # in the worker's memory: a disk may be slower than the link
            "define": {"models": models, "phases": phases},
        }
        if self.scale is REHEARSAL:
            own["define"] |= {"modes": {"sys_delta": {"codec": {"kv": "planes_zstd"}}}}  # the preset's needs a GPU
            own |= {"max_length": 64, "exactness": {"prompts": 1, "prompt_length": 16, "tokens": 16}}
        raw: dict[str, Any] = {}
        for layer in (*(yaml.safe_load((ROOT / f"config/{name}.yaml").read_text()) for name in ("config", "full", "gptj-6b")), own, over):
            raw = _merged(raw, layer)
        return check_config(raw, ROOT)

    def raw_cell(self, mode: str, phase: str = "decode", **over: Any) -> dict[str, Any]:
        """A grid cell, as the workflow would have it."""
        return self.config(**over).cell(Coordinates(MODEL, "loopback", mode, phase, 1))

    def cell(self, mode: str, phase: str = "decode", **over: Any) -> Cell:
        """The same, typed."""
        return Cell.of(self.raw_cell(mode, phase, **over))

    def spec(self, cell: Cell) -> ClientSpec:
        """The spec of a cell's client, as its trial would make it."""
        return trial_setup.client_spec(cell, self.place, self.roles)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings key by key, as Snakemake merges config files."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def measure_environment(bench: Bench) -> None:
    """What the machine is, and how fast it copies."""
    records = bench.records
    with bench.rows():
        records.fact(
            "versions", provenance.package_versions() | {name: machine.package_version(name) for name in ("triton", "nvidia-nvcomp-cu13")}
        )
        records.fact("machine", provenance.describe_machine())
        records.fact("memory_bytes", psutil.virtual_memory()._asdict())
        records.fact("nvcomp", _try_nvcomp())
    if bench.device == "cuda":
        with bench.rows():
            records.fact("device", torch.cuda.get_device_name())
            records.fact("cuda", {"version": torch.version.cuda, "memory_bytes": torch.cuda.mem_get_info()[1], **_nvml_facts()})
    with bench.rows("copy_gb_per_s"):
        rate, nbytes = copy_rate(bench), bench.scale.copy_bytes
        bench.row("copy_gb_per_s", rate / 1e9, f"{nbytes / 1e9:.1f} GB, the fastest of 10")
    with bench.rows("pinned_up_gb_per_s", "pinned_down_gb_per_s"):
        nbytes = bench.scale.copy_bytes // 4
        host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=bench.device == "cuda").fill_(1)
        device = torch.empty(nbytes, dtype=torch.uint8, device=bench.device)
        up_s = min(bench.seconds(lambda: device.copy_(host, non_blocking=True)) for _ in range(5))
        down_s = min(bench.seconds(lambda: host.copy_(device, non_blocking=True)) for _ in range(5))
        bench.row("pinned_up_gb_per_s", nbytes / up_s / 1e9)
        bench.row("pinned_down_gb_per_s", nbytes / down_s / 1e9)


def copy_rate(bench: Bench) -> float:
    """Bytes read and written a second by a device-to-device copy, the fastest of 10: what bounds a decode step from below."""
    nbytes = bench.scale.copy_bytes
    source = torch.ones(nbytes, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * nbytes / min(bench.seconds(lambda: target.copy_(source)) for _ in range(10))


def _try_nvcomp() -> str:
    try:
        return nvcomp.library()._name
    except Exception as error:
        return f"does not load: {type(error).__name__}: {error}"


def _nvml_facts() -> dict[str, Any]:
    """Clocks, power limit and GPM as they are found; what NVML does not tell has its error. Changes no setting."""
    import pynvml

    try:
        device = nvml.find_device()  # CUDA's device 0, whichever index that is
    except nvml.NoDevice as error:
        return {"nvml": str(error)}
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(device.uuid)
    asked: dict[str, Callable[[], Any]] = {
        "sm_clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "max_sm_clock_mhz": lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
        "power_limit_w": lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
        "gpm_supported": lambda: bool(pynvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice),
    }
    found: dict[str, Any] = {"nvml_index": device.index, "uuid": device.uuid}
    for name, ask in asked.items():
        try:
            found[name] = ask()
        except pynvml.NVMLError as error:
            found[name] = str(error)
    pynvml.nvmlShutdown()
    return found


class _Outcomes:
    """A pytest plugin that writes each test's outcome as it comes, so that a deadline leaves what was known."""

    def __init__(self, records: Records) -> None:
        self._records, self.counts = records, {"passed": 0, "failed": 0, "skipped": 0}
        self.failures: dict[str, str] = {}
        self.skips: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._take(report.nodeid, report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed":
            self._take(report.nodeid, report)

    def _take(self, name: str, report: pytest.TestReport | pytest.CollectReport) -> None:
        self.counts[report.outcome] += 1
        if report.outcome == "failed":
            self.failures[name] = (report.longreprtext.strip().splitlines() or ["no message"])[-1]
        if report.outcome == "skipped":
            self.skips[name] = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        self._records.fact("tests", {**self.counts, "failures": self.failures, "skips": self.skips})


# Tests of times, and of what the GPU does: nothing else may run on it.
ALONE = (
    "test_kv_gpu.py::test_awaited_leaves_the_host_free_and_the_stream_in_order",
    "test_kv_gpu.py::test_a_fetch_of_an_eighth_of_the_layers_hides_under_compute",
    "test_telemetry_on_gpu.py",
)


def run_tests(bench: Bench) -> None:
    """pytest tests/gpu, 90 s for each test: most of them side by side, since they wait for compilers and processes, then those of ALONE."""
    outcomes, folder = _Outcomes(bench.records), ROOT / "tests/gpu"
    common = ["-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", f"--config-file={ROOT / 'pyproject.toml'}"]
    if importlib.util.find_spec("pytest_timeout") is None:
        print("pytest-timeout is not here: one test that hangs takes the others with it")
    else:
        common.append("--timeout=90")
    side_by_side = ["-n", str(_TEST_PROCESSES), "--dist", "loadfile"] if importlib.util.find_spec("xdist") else []
    first = pytest.main([str(folder), *common, *side_by_side, *(f"--deselect=tests/gpu/{name}" for name in ALONE)], plugins=[outcomes])
    second = pytest.main([*(str(folder / name) for name in ALONE), *common], plugins=[outcomes])
    said = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.counts.items())
    if outcomes.counts["passed"] + outcomes.counts["failed"] == 0:
        reasons = "; ".join(sorted(set(outcomes.skips.values()))) or "tests/gpu holds none"
        bench.missing("tests_failed", f"no test ran ({said}, pytest exit status {int(first)} and {int(second)}): {reasons}")
        return
    bench.row("tests_failed", outcomes.counts["failed"], "; ".join([said, *outcomes.failures]))


def make_model(bench: Bench) -> None:
    """Random weights of GPT-J-6B's shape where the trials look for them."""
    with bench.rows("model_s"):
        row = bench.config()["define"]["models"][MODEL]
        took_s = bench.seconds(lambda: fetch_model(row, MODEL, bench.scale.dtype, bench.place.model_directory))
        digest = load_digest(bench.place.model_directory)
        bench.records.fact("weight_bytes", weight_bytes(ModelFiles(bench.place.model_directory, digest)))
        bench.row("model_s", took_s, f"{digest.file_bytes / 1e9:.2f} GB in {bench.scratch.parent}")


def weight_bytes(model: ModelFiles) -> int:
    """Bytes of all weights."""
    return sum(tensor.nbytes for tensor in model.digest.tensors)


def measure_local(bench: Bench) -> None:
    """Decode steps of `local` with the device's executor and with the eager one, requests in turns, against what memory allows."""
    cell = bench.cell("local")
    spec = bench.spec(cell)
    model = ModelFiles(bench.place.model_directory, load_digest(bench.place.model_directory))
    runtimes: dict[str, LocalRuntime] = {}
    with bench.rows("setup_s", "local_ms", "local_over_floor"):
        runtimes["local"], setup_s, note = open_timed(bench, spec)
        bench.row("setup_s", setup_s, note)
    with bench.rows("eager_ms"):
        runtimes["eager"], _, _ = open_timed(bench, bench.spec(bench.cell("local", executor="eager")))
    if "local" not in runtimes:
        return
    with bench.rows("local_ms", "local_over_floor", "eager_ms"):
        itls = interleaved(bench, {name: (runtime, spec) for name, runtime in runtimes.items()})
        floor_s = weight_bytes(model) / copy_rate(bench)
        local = geometric_mean_interval([1e3 * itl for itl in itls["local"]])
        bench.row("local_ms", local, f"{len(itls['local'])} requests of {spec.phase.steps} steps")
        bench.row("local_over_floor", _scaled(local, 1e-3 / floor_s), f"{1e3 * floor_s:.2f} ms: {weight_bytes(model) / 1e9:.2f} GB")
        if "eager" in itls:
            bench.row("eager_ms", geometric_mean_interval([1e3 * itl for itl in itls["eager"]]))
    with bench.rows("samplers_percent"):
        measure_samplers(bench, cell, spec, runtimes["local"])


def open_timed(bench: Bench, spec: ClientSpec) -> tuple[LocalRuntime, float, str]:
    """A local runtime, the seconds until it was as fast as it gets but for the loading of weights, and what they are made of.

    A first request that compiles, captures or allocates counts, by what it took longer than the second.
    """
    torch.zeros(1, device=bench.device)  # CUDA's own start is no part of it
    _pin(spec)
    setup: dict[str, Any] = {}
    opened: list[LocalRuntime] = []
    whole_s = bench.seconds(lambda: opened.append(open_local(spec, setup)))
    runtime = opened[0]
    first_s, second_s = (bench.seconds(lambda: request_itl(runtime, spec)) for _ in range(2))
    built_s, more_s = whole_s - setup["weights_load_s"], max(0.0, first_s - second_s)
    note = f"{runtime.executor_kind}: {setup['executor_s']:.2f} s of it the executor's own, {more_s:.2f} s what the first request took more"
    return runtime, built_s + more_s, f"{note} than the second; weights loaded in {setup['weights_load_s']:.2f} s"


def interleaved(bench: Bench, runtimes: Mapping[str, tuple[Runtime, ClientSpec]]) -> dict[str, list[float]]:
    """ITL of each request, in seconds: the same prompt for all, requests in turns, the order turning round; the first round warms up."""
    itls: dict[str, list[float]] = {name: [] for name in runtimes}
    names = list(runtimes)
    for number in range(bench.scale.rounds + 1):
        for name in names:
            itl = request_itl(*runtimes[name])
            if number:
                itls[name].append(itl)
        names = names[1:] + names[:1]
    return itls


def request_itl(runtime: Runtime, spec: ClientSpec) -> float:
    """Mean seconds a token of one request's decode steps, through the loop of all trials."""
    rows = request_rows(runtime, spec)
    return statistics.fmean(row["latency_s"] for row in rows if row["step"])


def request_rows(runtime: Runtime, spec: ClientSpec) -> list[dict[str, Any]]:
    """The steps of one request, the prefill first, as a trial's client has them."""
    _pin(spec)
    prompts, _ = make_prompts(spec)
    return run_requests(runtime, spec, prompts[:1], []).steps


def _pin(spec: ClientSpec) -> None:
    """To the cores that the client of the spec has in a trial."""
    os.sched_setaffinity(0, spec.cpus)


def _scaled(interval: Interval, factor: float) -> Interval:
    value, low, high = (None if x is None else factor * x for x in (interval.value, interval.low, interval.high))
    return Interval(value, low, high, interval.n, interval.reason)


def measure_samplers(bench: Bench, cell: Cell, spec: ClientSpec, runtime: LocalRuntime) -> None:
    """ITL with all samplers at the config's interval over ITL while they are paused, blocks of requests in turns."""
    interval_s, pids = cell.telemetry.interval_s, {"client": os.getpid()}
    took: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as directory:
        samples = samplers.start(Path(directory), pids=pids, interval_s=interval_s, cpus=trial_setup.cores(cell)[1])
        pauser = Pauser(samples.pids.values())
        try:
            for number in range(2 * bench.scale.rounds):
                sampled = number % 4 in (0, 3)  # so that a drift falls on both
                pauser.resume() if sampled else pauser.pause()
                took[sampled].append(statistics.fmean(request_itl(runtime, spec) for _ in range(_BLOCK_REQUESTS)))
        finally:
            pauser.resume()
            results = samples.stop()
    ratios = geometric_mean_interval([on / off for on, off in zip(took[True], took[False], strict=True)])
    shares = [None if x is None else 100 * (x - 1) for x in (ratios.value, ratios.low, ratios.high)]
    bench.records.fact("samplers", {name: {"rows": result.rows, "reason": result.reason} for name, result in results.items()})
    sampled_by = ", ".join(name for name, result in results.items() if result.rows)
    bench.row("samplers_percent", Interval(*shares, ratios.n), f"{sampled_by} every {interval_s} s; kept where the interval reaches it")


@dataclass(frozen=True)
class Remote:
    """A session on a worker, and the spec of its client."""

    runtime: RemoteRuntime
    spec: ClientSpec

    def close(self) -> list[dict[str, Any]]:
        """Reconciles the session's books (LedgerError) and ends it; gives the worker's costs of its steps."""
        costs = reconcile(self.runtime.link)["peer"]["steps"]
        self.runtime.link.close()
        return costs


def open_remote(bench: Bench, cell: Cell, side: WorkerSide) -> Remote:
    """A session for a cell, its weights not sent yet."""
    spec = bench.spec(cell)
    _pin(spec)
    link = connect(side.address, Timeouts(side.timeout_s, side.timeout_s))
    open_session(link, spec, side)
    directory = bench.place.model_directory
    return Remote(RemoteRuntime(link, spec.policy, ModelFiles(directory, load_digest(directory)), spec.drawing), spec)


def measure_wire(bench: Bench) -> None:
    """Upload, and the decode steps of `sys` and `remote_cache` over loopback against `local`'s, requests in turns."""
    cells = {mode: bench.cell(mode) for mode in ("remote_cache", "sys")}
    spec = bench.spec(bench.cell("local"))
    with contextlib.ExitStack() as stack:
        side = trial_worker.start_worker(cells["sys"], ROOT, bench.roles, stack).side
        runtimes: dict[str, tuple[Runtime, ClientSpec]] = {}
        remotes: list[Remote] = []
        with bench.rows("upload_gb_per_s", "remote_cache_over_local"):
            remotes.append(upload(bench, cells["remote_cache"], side))
            runtimes["remote_cache"] = remotes[-1].runtime, remotes[-1].spec
        with bench.rows("by_hash_s", "sys_over_local"):
            remotes.append(offer_twice(bench, cells["sys"], side))
            runtimes["sys"] = remotes[-1].runtime, remotes[-1].spec
        with bench.rows("sys_over_local", "remote_cache_over_local", "again_over_local"):
            for name in ("local", "again"):
                runtimes[name] = open_local(spec, {}), spec
            itls = interleaved(bench, runtimes)
            for name in ("sys", "remote_cache", "again"):
                if name in itls:
                    ratios = [mine / base for mine, base in zip(itls[name], itls["local"], strict=True)]
                    bench.row(f"{name}_over_local", geometric_mean_interval(ratios), f"{1e3 * statistics.median(itls[name]):.3f} ms")
        with bench.rows():
            for remote in remotes:
                remote.close()
            bench.records.fact("books", f"{len(remotes)} sessions reconciled to the byte")


def upload(bench: Bench, cell: Cell, side: WorkerSide) -> Remote:
    """A session whose weights went up; and twice more, into memory that was touched before, which gives the rate."""
    remote = open_remote(bench, cell, side)
    begin = time.perf_counter()
    nbytes = remote.runtime.upload_weights()
    first_s = time.perf_counter() - begin
    every = range(len(remote.runtime.weights))
    again_s = statistics.median(bench.seconds(lambda: remote.runtime.send_weights(every)) for _ in range(2))
    note = f"{nbytes / 1e9:.2f} GB; the first upload, with the model built and the step captured, took {first_s:.2f} s"
    bench.row("upload_gb_per_s", nbytes / again_s / 1e9, note)
    return remote


def offer_twice(bench: Bench, cell: Cell, side: WorkerSide) -> Remote:
    """The second of two sessions that offer by hash: it must not have to send a byte of weights."""
    first = open_remote(bench, cell, side)
    sent = first.runtime.upload_weights()
    first.close()
    begin = time.perf_counter()
    second = open_remote(bench, cell, side)
    sent_again = second.runtime.upload_weights()
    took_s = time.perf_counter() - begin
    bench.row("by_hash_s", took_s, f"{sent_again:,} bytes of weights sent, {sent:,} in the first")
    return second


def measure_codecs(bench: Bench) -> None:
    """nvcomp_ans, int8 and int4 on KV where it lies, in batches of blocks of a GPT-J-6B layer."""
    reason = CODECS["nvcomp_ans"].unavailable()
    if reason and bench.device == "cpu":  # a rehearsal; on the GPU it is a failure
        for row in _part("codecs").rows:
            bench.missing(row.name, reason)
    else:
        with bench.rows(*(row.name for row in _part("codecs").rows)):
            measure_ans(bench)
    with bench.rows():
        blocks = kv_blocks(bench)[0]
        bench.records.fact("codecs", {name: asdict(codec_speed(bench, blocks, name)) for name in ("int8", "int4")})


def measure_ans(bench: Bench) -> None:
    """The rows of nvcomp_ans."""
    blocks, source, trained = kv_blocks(bench)
    large, prompt = codec_speed(bench, blocks, "nvcomp_ans"), codec_speed(bench, blocks[:_PROMPT_BLOCKS], "nvcomp_ans")
    half = codec_speed(bench, blocks.to(torch.float16), "nvcomp_ans")
    for name, speed in (("kv_ratio", large), ("kv_ratio_fp16", half)):
        if trained:
            bench.row(name, speed.ratio, source)
        else:
            bench.missing(name, f"a ratio of {source} ({speed.ratio:.2f}) says nothing of a trained model; `make gpu-kv` makes that")
    for name, speed in (("kv_encode_gb_per_s", large), ("kv_encode_prompt_gb_per_s", prompt)):
        bench.row(name, speed.encode_gb_per_s, f"{speed.nbytes / 1e6:.0f} MB in one batch; {speed.device_gb_per_s:.0f} by the GPU's clock")
    bench.row("kv_decode_gb_per_s", large.decode_gb_per_s, "one block after the other")
    differing = large.differing_bytes + prompt.differing_bytes + half.differing_bytes
    bench.row("kv_inexact_bytes", differing, f"of {large.nbytes + prompt.nbytes + half.nbytes:,}")


@dataclass(frozen=True)
class CodecSpeed:
    """A codec over one batch of blocks. Rates are of tensor bytes, by the wall clock; `device_gb_per_s` by the device's, encoding."""

    nbytes: int
    ratio: float
    encode_gb_per_s: float
    device_gb_per_s: float
    decode_gb_per_s: float
    differing_bytes: int


def codec_speed(bench: Bench, blocks: torch.Tensor, name: str) -> CodecSpeed:
    """Encodes `blocks` [b, ...] as one batch and decodes each; the fastest of 5, after one that warms up."""
    codec, nbytes, shape = CODECS[name], blocks.nbytes, tuple(blocks.shape[1:])
    dtype = DType.from_torch_name(str(blocks.dtype))
    payloads = device.encode(blocks, codec)
    encode_s = min(bench.seconds(lambda: device.encode(blocks, codec)) for _ in range(5))
    device_ns = min(device.encode(blocks, codec).encode_ns for _ in range(5))
    whole = [_with_head(payloads.heads[index], payloads.part(index)) for index in range(len(blocks))]
    hosts = [memoryview(payload.cpu().numpy()) for payload in whole]

    def decode() -> list[torch.Tensor]:
        return [device.decode(codec, payload, host, dtype, shape)[0] for payload, host in zip(whole, hosts, strict=True)]

    differing = sum(int((one.view(torch.uint8) != block.view(torch.uint8)).sum()) for one, block in zip(decode(), blocks, strict=True))
    decode_s = min(bench.seconds(decode) for _ in range(5))
    coded = sum(payload.nbytes for payload in whole)
    return CodecSpeed(nbytes, nbytes / coded, nbytes / encode_s / 1e9, nbytes / max(device_ns, 1), nbytes / decode_s / 1e9, differing)


def _with_head(head: memoryview, body: torch.Tensor) -> torch.Tensor:
    """A payload in memory of its own on the device, as it would arrive."""
    begin = torch.tensor(list(head), dtype=torch.uint8, device=body.device)
    return torch.cat([begin, body])


def kv_blocks(bench: Bench) -> tuple[torch.Tensor, str, bool]:
    """Blocks [b, 1, 2, heads, 64, head_dim] of bf16 KV, of a GPT-J-6B layer's size; where it is from; and whether from a trained model.

    The values are those of `make gpu-kv`, repeated as often as needed: no codec looks further than 64 KiB.
    """
    shape = (256, 1, 2, 16, 64, 256) if bench.scale is FULL else (4, 1, 2, 2, 64, 16)
    count = math.prod(shape)
    file = ROOT / "wheels/kv.safetensors"
    if file.exists():
        found = load_file(file)
        values = torch.cat([found[name].flatten() for name in sorted(found)]).to(bench.device)
        source = f"KV of SmolLM2-135M, {len(found)} prompts, {values.nbytes / 1e6:.1f} MB, repeated"
    else:
        values, source = torch.randn(min(count, 1 << 22), device=bench.device).to(torch.bfloat16), "random numbers"
    return values.repeat(-(-count // len(values)))[:count].view(shape).contiguous(), source, file.exists()


def _part(name: str) -> Part:
    return next(part for part in PARTS if part.name == name)


def measure_recovery(bench: Bench) -> None:
    """Steps that miss 1/8 of the layers, whose blocks lie in a KV host, and as many that miss none, in turns."""
    phase = "recovery-evict"
    cells = {mode: bench.cell(mode, phase) for mode in ("sys_delta_raw", "sys_delta")}
    with contextlib.ExitStack() as stack:
        side = trial_worker.start_worker(cells["sys_delta_raw"], ROOT, bench.roles, stack).side
        with bench.rows("hidden_percent", "miss_ms"):
            rows = missing_steps(bench, cells["sys_delta_raw"], side)
            bench.row("hidden_percent", *hidden_percent(rows))
            bench.row("miss_ms", *longer_by_a_miss(rows))
        with bench.rows("hidden_codec_percent"):
            cell = cells["sys_delta"]
            value, note = hidden_percent(missing_steps(bench, cell, side))
            bench.row("hidden_codec_percent", value, f"{cell.policy.codec.kv}; {note}")


def missing_steps(bench: Bench, cell: Cell, side: WorkerSide) -> list[dict[str, Any]]:
    """Steps of two requests after one that warms up, with the worker's stall and the way it recovered (None where nothing missed)."""
    remote = open_remote(bench, cell, side)
    remote.runtime.upload_weights()
    rows = [row | {"request": number} for number in range(3) for row in request_rows(remote.runtime, remote.spec)]
    costs = remote.close()
    if len(costs) != len(rows):
        raise RuntimeError(f"the client saw {len(rows)} steps, the worker {len(costs)}")
    for row, cost in zip(rows, costs, strict=True):
        recovered = cost["recovered"]
        row |= {"recovery": recovered and recovered["how"], "stall_s": recovered and recovered["stall_ns"] / 1e9}
    return [row for row in rows if row["request"] and row["step"]]


def hidden_percent(rows: Sequence[Mapping[str, Any]]) -> tuple[float, str]:
    """100 (1 - stall / the same restore done alone), of medians, as the recovery table has it."""
    missed = [row for row in rows if row["recovery"] == "delta"]
    alone = [row["restore_alone_s"] for row in missed if row.get("restore_alone_s")]
    stalls = [row["stall_s"] for row in missed if row.get("restore_alone_s") is None]
    if not (alone and stalls):
        raise RuntimeError(
            f"of {len(rows)} steps {len(stalls)} were restored by delta, and {len(alone)} more after a restore alone; both are needed"
        )
    stall_s, alone_s = statistics.median(stalls), statistics.median(alone)
    return 100 * (1 - stall_s / alone_s), f"stall {1e3 * stall_s:.2f} ms, alone {1e3 * alone_s:.2f} ms; {len(missed)} steps"


def longer_by_a_miss(rows: Sequence[Mapping[str, Any]]) -> tuple[float, str]:
    """Milliseconds, of medians."""
    missed_s, plain_s = (statistics.median(row["latency_s"] for row in rows if bool(row["recovery"]) is way) for way in (True, False))
    return 1e3 * (missed_s - plain_s), f"{1e3 * missed_s:.2f} ms against {1e3 * plain_s:.2f} ms"


def measure_llama(bench: Bench) -> None:
    """Decode steps of Llama-3-8B shapes over random weights made on the device, drawn as `local` draws; no file, no wire."""
    os.environ["TRITON_CACHE_DIR"] = str(bench.roles / "triton")  # part local left launchers in the check's own
    scale = bench.scale
    config, weights = random_model(bench, "llama", scale.llama)
    prompt = np.arange(scale.prompt_tokens, dtype=np.int64) % scale.llama["vocab_size"]
    with bench.rows("llama_setup_s", "llama_ms", "llama_over_floor"):
        run, made = bench.config(), []
        kind, _ = choose_executor(run["executor"], bench.device, run["dtype"], config)
        built_s = bench.seconds(lambda: made.append(make_executor(kind, config, weights, run["dtype"], 1, run["max_length"])))
        executor = made[0]
        first_s, second_s = (bench.seconds(lambda: decode_times(bench, executor, prompt)) for _ in range(2))
        bench.row(
            "llama_setup_s", built_s + max(0.0, first_s - second_s), f"{kind}: {built_s:.2f} s to build, the rest in the first request"
        )
        itls = [statistics.fmean(decode_times(bench, executor, prompt)) for _ in range(scale.rounds)]
        floor_s = weights.nbytes / copy_rate(bench)
        mean = geometric_mean_interval([1e3 * itl for itl in itls])
        bench.row("llama_ms", mean, f"{len(itls)} requests of {scale.steps} steps")
        bench.row("llama_over_floor", _scaled(mean, 1e-3 / floor_s), f"{1e3 * floor_s:.2f} ms: {weights.nbytes / 1e9:.2f} GB")


def measure_batches(bench: Bench) -> None:
    """Steps of 1 and of 16 requests of GPT-J's shapes in turns, from the engine's runs to drawn tokens on the host."""
    with bench.rows("batch_setup_s", "batch_1_ms", "batch_16_ms", "batch_16_over_1", "batch_shared_over_own"):
        run, made = bench.config(), []
        config, weights = random_model(bench, "gptj", run["define"]["models"][MODEL]["config"])
        kind, _ = choose_executor(run["executor"], bench.device, run["dtype"], config)
        executor = make_executor(kind, config, weights, run["dtype"], 1, run["max_length"])
        blocks = np.arange(_BATCH * executor.kv_shape.blocks).reshape(_BATCH, -1)
        setup_s = bench.seconds(lambda: made.append(executor.new_block_pool(blocks.size)))
        pool, prompt = made[0], np.arange(bench.scale.prompt_tokens, dtype=np.int64)
        bench.row("batch_setup_s", setup_s, kind)
        for i, own in enumerate(blocks):
            executor.forward_batch([Run((prompt + i) % executor.vocab_size, 0, own.tolist(), False)], pool)
        shared = blocks.copy()
        shared[:, : prompt.size // BLOCK] = blocks[0, : prompt.size // BLOCK]
        tables = {"1": blocks[:1].tolist(), "16": blocks.tolist(), "shared": shared.tolist()}
        rounds = [{name: batch_step_s(bench, executor, pool, each) for name, each in tables.items()} for _ in range(bench.scale.rounds + 1)]
        for name in ("1", "16"):
            bench.row(f"batch_{name}_ms", geometric_mean_interval([1e3 * took[name] for took in rounds[1:]]))  # the first one warms up
        bench.row("batch_16_over_1", geometric_mean_interval([took["16"] / took["1"] for took in rounds[1:]]))
        bench.row("batch_shared_over_own", geometric_mean_interval([took["shared"] / took["16"] for took in rounds[1:]]))


def batch_step_s(bench: Bench, executor: Executor, pool: BlockPool, tables: Sequence[Sequence[int]]) -> float:
    """Mean seconds of a step of the requests with these blocks, after a prompt, over as many steps as a request of the other parts has."""
    tokens, greedy = list(range(len(tables))), SamplingRule()
    begin = time.perf_counter()
    for position in range(bench.scale.prompt_tokens, bench.scale.prompt_tokens + bench.scale.steps):
        runs = [Run(np.array([token]), position, table, True) for token, table in zip(tokens, tables, strict=True)]
        drawn = executor.draw_rows(executor.forward_batch(runs, pool), [RowDraw(greedy, 0, i, position + 1) for i in range(len(runs))])
        tokens = [token for token in drawn if isinstance(token, int)]
    return (time.perf_counter() - begin) / bench.scale.steps


def random_model(bench: Bench, family: str, shape: Mapping[str, Any]) -> tuple[dict[str, Any], Weights]:
    """A Hugging Face config, and random weights that were never in a file."""
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = getattr(torch, bench.scale.dtype)
    config = AutoConfig.for_model(family, **shape)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype)
    wire_dtype = DType.from_torch_name(bench.scale.dtype)
    specs = [WeightSpec(name, wire_dtype, tuple(weight.shape)) for name, weight in skeleton.named_parameters()]
    weights = Weights(specs, bench.device)
    for weight in weights.tensors().values():
        weight.fill_(1.0) if weight.dim() == 1 else weight.normal_(0.0, 0.02)
    return config.to_dict(), weights


def decode_times(bench: Bench, executor: Executor, prompt: np.ndarray) -> list[float]:
    """Seconds of each decode step after a prefill, from a token on the host to the next one there."""
    cache, times, drawing = executor.new_cache(), [], Drawing()

    def step(tokens: np.ndarray) -> int:
        logits = executor.logits(executor.forward(tokens, cache)[-1:])
        return draw_from(to_wire(logits, TensorClass.LOGITS), drawing, 0, cache.filled).tokens[0]

    token = step(prompt)
    for _ in range(bench.scale.steps):
        begin = time.perf_counter()
        token = step(np.array([token]))
        times.append(time.perf_counter() - begin)
    return times


def measure_whole_trial(bench: Bench) -> None:
    """One trial of sys, its reference before it, as the workflow runs them."""
    with bench.rows("trial_ms", "trial_s"):
        reference = bench.roles / "reference.npz"
        compute_reference.compute_reference(bench.config().reference_cell(MODEL, "decode"), bench.place, reference)
        begin = time.monotonic()
        result = measure_trial.measure_trial(bench.raw_cell("sys"), bench.place, reference)
        whole_s = time.monotonic() - begin
        steps = [row for row in result.tables["steps"].to_pylist() if row["measured"]]
        exact = result.manifest["exactness"]
        note = f"{exact['tokens_equal']} of {exact['tokens_compared']} tokens equal local's"
        bench.row("trial_ms", 1e3 * statistics.fmean(row["latency_s"] for row in steps), note)
        bench.row("trial_s", whole_s, f"of which the upload {result.manifest['setup']['weights_upload_s']:.2f} s")
        bench.records.fact("trial", {name: result.manifest[name] for name in ("setup", "memory", "telemetry", "exactness", "probe")})


WORKFLOW_MODEL = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30} | {
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
}


def run_workflow(bench: Bench) -> None:
    """Snakemake over config/gpu.yaml in a copy of this tree: 10 trials of a random model, whose samples land in Parquet and in a figure."""
    from semgap.analysis.figures.telemetry import METRICS

    with bench.rows(*(row.name for row in _part("workflow").rows)):
        tree, full = bench.roles / "tree", bench.scale is FULL
        for name in ("Snakefile", "rules", "workflow", "config", "envs", "resources/prompts", "src"):
            source = ROOT / name
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, tree / name)
        model = {"source": "random", "architecture": "llama", "seed": 7, "config": WORKFLOW_MODEL if full else dict(bench.scale.llama)}
        own = {"models": ["random"], "modes": ["local", "sys"], "phases": ["decode"], "trials": 5 if full else 1}
        own |= {"device": bench.device, "dtype": bench.scale.dtype, "define": {"models": {"random": model}}}
        own |= {} if full else {"max_length": 64, "exactness": {"prompts": 1, "prompt_length": 16, "tokens": 4}}
        (tree / "own.yaml").write_text(yaml.safe_dump(own))
        command = [sys.executable, "-m", "snakemake", "--cores", "1", "--scheduler", "greedy"]  # the other one needs PuLP, 16 MB
        command += ["--configfile", "config/gpu.yaml", "own.yaml"]
        command += ["--", "results/results.csv", "results/figures/telemetry.svg"]
        took_s = bench.seconds(lambda: subprocess.run(command, cwd=tree, check=True))
        trials = len(list(tree.glob("results/trials/**/manifest.json")))
        bench.row("workflow_s", took_s, f"{trials} trials")
        gpu, dmon = (_samples(tree, f"{name}.parquet") for name in ("gpu", "dmon"))
        with_gpm = [row for row in gpu if row["gpm_sm_activity_percent"] is not None]
        for name, rows, source in (("gpu", gpu, "gpu"), ("gpm", with_gpm, "gpu"), ("dmon", dmon, "dmon")):
            bench.row(f"workflow_{name}_samples", len(rows), "" if rows else _why_no_samples(tree, source))
        figure = (tree / "results/figures/telemetry.svg").read_text()  # has a comment of each text that it draws
        panels = [metric.title for metric in METRICS if metric.source == "gpu" and f"<!-- {metric.title} -->" in figure]
        bench.row("workflow_gpu_panels", len(panels), ", ".join(panels))


def _samples(tree: Path, file: str) -> list[dict[str, Any]]:
    return [row for path in sorted(tree.glob(f"results/trials/**/{file}")) for row in pq.read_table(path).to_pylist()]


def _why_no_samples(tree: Path, source: str) -> str:
    """The reason that a trial's manifest has."""
    manifest = msgspec.json.decode(next(tree.glob("results/trials/**/manifest.json")).read_bytes())
    return manifest["telemetry"][source]["reason"] or f"no {source} samples"


def measure_products(bench: Bench) -> None:
    """How near to the memory's bandwidth the two products of a GPT-J layer come, with the tile that they have and with others."""
    if bench.device != "cuda":
        for name in (f"{kind}_{row}" for kind in ("project", "merge") for row in ("gb_per_s", "over_copy")):
            bench.missing(name, "the kernels need a GPU")
        return
    from triton.testing import do_bench

    from semgap.engine import kernels

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float16, device=bench.device)

    first, last = [kernels.Linear(random(rows, 4096)) for rows in (4096, 4096, 4096, 16384)], kernels.Linear(random(4096, 16384))
    x, wide, out = random(4096), random(16384), random(28672)
    copied = copy_rate(bench)
    launches: dict[str, tuple[Callable[[], None], int]] = {
        "project": (lambda: kernels.project(x, first, out), sum(each.weight.nbytes for each in first)),
        "merge": (lambda: kernels.merge(x, x, first[0], wide, last), first[0].weight.nbytes + last.weight.nbytes),
    }
    for kind, (launch, nbytes) in launches.items():
        with bench.rows(f"{kind}_gb_per_s", f"{kind}_over_copy"):
            own, found = kernels.TILES[kind], {}
            tried = (own, *(replace(own, registers=bound) for bound in _REGISTERS), *(kernels.Tile(*sizes) for sizes in _TILES))
            for tile in dict.fromkeys(tried):
                with pytest.MonkeyPatch.context() as patch:  # or what comes next would run with a tile that failed
                    patch.setitem(kernels.TILES, kind, tile)
                    found[_tile_name(tile)] = nbytes / do_bench(launch, 10, 40, return_mode="median") / 1e6
            bench.records.fact(f"{kind}_gb_per_s_by_tile", found)
            best = max(found, key=lambda name: found[name])
            note = f"tile {_tile_name(own)}; best of {len(found)} tiles {best}: {found[best]:.0f}"
            bench.row(f"{kind}_gb_per_s", found[_tile_name(own)], note)
            bench.row(f"{kind}_over_copy", 1e9 * found[_tile_name(own)] / copied)


def _tile_name(tile: Tile) -> str:
    return f"{tile.rows}x{tile.columns}, {tile.warps} warps, {tile.registers or 'any'} registers"


def measure_kernels(bench: Bench) -> None:
    """What the GPU does in one decode step of `local`, kernel by kernel, as torch.profiler counts it: a request less a prefill alone."""
    spec = bench.spec(bench.cell("local", executor="auto" if bench.device == "cuda" else "eager"))  # fused has no operators of torch
    steps = spec.phase.steps
    prefill_alone = msgspec.structs.replace(spec, phase=msgspec.structs.replace(spec.phase, kind="prefill", steps=0))
    measure_products(bench)
    with bench.rows("kernels_ms"):
        runtime = open_local(spec, {})
        request_rows(runtime, spec)
        whole, prefill = (kernel_times(bench, runtime, each) for each in (spec, prefill_alone))
        table = {name: [(a - b) / steps for a, b in zip(took, prefill.get(name, (0, 0)), strict=True)] for name, took in whole.items()}
        if not table:
            raise RuntimeError("torch.profiler saw no kernel: it lacks CUPTI, or the permission to trace this GPU")
        largest = sorted(table.items(), key=lambda item: -item[1][0])[:_KERNELS]
        bench.records.fact("kernels", [{"name": name, "ms": ms, "calls": calls} for name, (ms, calls) in largest])
        bench.row("kernels_ms", sum(ms for ms, _ in table.values()), f"{len(table)} kernels; facts.kernels of the JSON has the largest")


def kernel_times(bench: Bench, runtime: Runtime, spec: ClientSpec) -> dict[str, tuple[float, int]]:
    """(ms, calls) of each kernel in one request; in a rehearsal of each operator."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = bench.device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        request_rows(runtime, spec)
        bench.sync()
    column = "self_device_time_total" if on_gpu else "self_cpu_time_total"  # us
    took = {event.key: (getattr(event, column) / 1e3, event.count) for event in profiler.key_averages()}
    return {name: (ms, calls) for name, (ms, calls) in took.items() if ms > 0}  # calls of CUDA's API are there too, and take no GPU time


_NOT_ALONE = ("tests", "model", "trial", "workflow")  # they measure nothing, or take the machine's measuring lock themselves
RUN: Mapping[str, Callable[[Bench], None]] = {
    "environment": measure_environment,
    "model": make_model,
    "local": measure_local,
    "wire": measure_wire,
    "codecs": measure_codecs,
    "recovery": measure_recovery,
    "kernels": measure_kernels,
    "batch": measure_batches,
    "llama": measure_llama,
    "tests": run_tests,
    "trial": measure_whole_trial,
    "workflow": run_workflow,
}


def main() -> int:
    """Runs one part; 1 where a measurement of it failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=RUN)
    parser.add_argument("records", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    faulthandler.enable()  # a crash in native code leaves a traceback in the part's log
    part = _part(options.part)
    options.scratch.mkdir(parents=True, exist_ok=True)
    scale = REHEARSAL if options.rehearse else FULL
    alone = contextlib.nullcontext() if part.name in _NOT_ALONE else machine.measuring()
    with options.records.open("w") as file, tempfile.TemporaryDirectory(prefix="semgap-gpu-check-") as roles, alone:
        bench = Bench(Records(file, part), options.scratch, Path(roles), scale)
        RUN[part.name](bench)
    return int(bench.failed)


if __name__ == "__main__":
    sys.exit(main())
