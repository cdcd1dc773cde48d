"""Reports what this machine and a worker have and lack for semgap, and the consequences."""

import json
import os
import platform
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from semgap.client.hold_weights import hold_weights
from semgap.client.probe import probe_link
from semgap.client.spec import ClientSpec, Phase, Probe, Telemetry, WorkerSide
from semgap.codecs import codec_named
from semgap.engine.model_files import ModelFileError, ModelFiles, verify_model
from semgap.experiment.provenance import describe_machine
from semgap.network.namespaces import namespaces
from semgap.network.spec import Network, NetworkError, measured_of, rate_text
from semgap.policy import Policy
from semgap.processes.machine import package_version
from semgap.telemetry import gpm, nvml
from semgap.telemetry.clock import offset_s
from semgap.wire import messages
from semgap.wire.frames import Limits, WireError
from semgap.wire.handshake import read_secret, shake_hands_as_client
from semgap.wire.link import Link, connect
from semgap.wire.tcp import tcp_info

_WALL_OFFSET_S = 1.0
_PROBE_ROUND_TRIPS, _PROBE_BYTES = 50, 16 << 20
_READ_BYTES = 256 << 20  # more than caches hold
_NEEDED = ("torch", "transformers", "numpy", "msgspec", "xxhash", "tokenizers", "safetensors", "pyarrow", "psutil")
_WORKFLOW = ("snakemake", "pandas", "scipy", "matplotlib", "pygments")


@dataclass(frozen=True)
class Finding:
    """One line of the report. `state`: 'ok', 'lacks' (something is not possible) or 'broken' (nothing is)."""

    state: str
    thing: str
    value: str
    meaning: str = ""


def examine(root: Path) -> list[Finding]:
    """All findings about this machine. Takes a few seconds: torch looks for its GPU."""
    python = Finding("ok", "Python", platform.python_version())  # an older one than 3.11 cannot import this module
    read = _read_bandwidth()
    return [python, *_packages(), *_gpu(), *_processors(), *_floor(read), *_network(), *_tools(), *_models(root, read)]


def measurable(findings: Sequence[Finding]) -> str:
    """One line: the devices, links and commands that these findings of `examine` leave for measuring here."""
    broken = [f"{each.thing}: {each.meaning or each.value}" for each in findings if each.state == "broken"]
    if broken:
        return f"You can measure nothing here until this works: {'; '.join(broken)}"
    ok, lacking = ({each.thing for each in findings if each.state == state} for state in ("ok", "lacks"))
    devices = "the GPU and the CPU" if "torch on GPU" in ok else "the CPU"
    links = ["loopback", "relays"]
    links += ["network namespaces"] if "networks of netns" in ok else []
    links += ["Slurm's network between nodes"] if "sbatch" in ok else []
    tables = "semgap run alone: no tables or figures" if "packages" in lacking else "snakemake and semgap run"
    noise = "; latencies will be noisy" if lacking & {"cores", "load"} else ""
    return f"You can measure here on {devices}, over {', '.join(links[:-1])} and {links[-1]}, with {tables}{noise}."


def examine_worker(address: str, secret_file: Path | None, root: Path, model: str | None, tls: bool = False) -> list[Finding]:
    """Findings about a worker and its link: versions of both sides, clocks, round trip and goodput, and whether models are the same.

    Compares a model by content: offers its weights' hashes and sends what the worker lacks; the worker hashes everything.
    """
    try:
        secret = read_secret(secret_file)
        link = connect(address)
        granted = shake_hands_as_client(link, secret, {}, tls)
    except (WireError, ValueError) as error:
        return [Finding("broken", "worker", address, str(error))]
    where = f"{address}, pid {granted['pid']}, {granted['device']}, {granted['threads']} thread(s)"
    findings = [Finding("ok", "worker", where, link.tls or ""), *_versions(granted.get("versions", {}))]
    link.limits = Limits(payload_bytes=_PROBE_BYTES)
    try:
        findings += _clock_and_link(link)
        link.close()
        for directory in _fetched(root, model):
            findings.append(_model_there(address, secret_file, tls, directory, granted["threads"]))
    except WireError as error:
        findings.append(Finding("broken", "worker", address, str(error)))
    return findings


def _versions(theirs: Mapping[str, str | None]) -> Iterator[Finding]:
    differing = {name: version for name, version in theirs.items() if version != package_version(name)}
    both = ", ".join(f"{name} {version} there and {package_version(name)} here" for name, version in differing.items())
    meaning = f"{both}: latencies and last bits of logits may differ; install the same ones" if differing else "the same on both sides"
    value = ", ".join(f"{name} {version}" for name, version in theirs.items()) or "unknown"
    yield Finding("lacks" if differing or not theirs else "ok", "versions there", value, meaning if theirs else "an older semgap")


def _clock_and_link(link: Link) -> Iterator[Finding]:
    def clock() -> dict[str, Any]:
        reply = link.request(messages.Operation.TELEMETRY, messages.TelemetryRequest((), "clock"))
        return json.loads(reply.header_as(messages.Bodied).body)

    offset, error = offset_s(clock)
    same = "one machine, one clock" if not error else "semgap converts its samples to this side's clock"
    yield Finding("ok", "clock there", f"{offset:+.6f} s, give or take {error:.6f} s (CLOCK_MONOTONIC)", same)
    yield _wall_clock(*offset_s(clock, "wall_s"))
    found = measured_of(probe_link(link, _PROBE_ROUND_TRIPS, _PROBE_BYTES))
    rtt_s = found.pop("rtt_s")
    assert rtt_s is not None
    yield Finding("ok", "round trip", f"{1e3 * rtt_s:.3f} ms", f"median of {_PROBE_ROUND_TRIPS}, 64 bytes")
    rates = {name: rate_text(rate) if rate else "too fast to tell" for name, rate in found.items()}
    up, down, cold_up, cold_down = (rates[f"{name}_bytes_per_s"] for name in ("goodput_up", "goodput_down", "cold_up", "cold_down"))
    yield Finding("ok", "goodput", f"{up} up, {down} down", f"on a new connection {cold_up} and {cold_down} ({_PROBE_BYTES:,} bytes)")


def _wall_clock(offset: float, error: float) -> Finding:
    is_off = abs(offset) > _WALL_OFFSET_S + error
    meaning = "shifts the times in its logs, not the measurements; run a time service on both hosts (chrony, ntpd)" if is_off else ""
    return Finding("lacks" if is_off else "ok", "wall clock there", f"{offset:+.6f} s, give or take {error:.6f} s", meaning)


def _fetched(root: Path, model: str | None) -> list[Path]:
    directories = sorted(path.parent for path in root.glob("resources/models/*/digest.json"))
    chosen = [directory for directory in directories if model in (None, directory.name)]
    if model and not chosen:
        known = ", ".join(directory.name for directory in directories) or "none"
        raise ValueError(f"model {model!r} is not under {root}/resources/models; there is {known}")
    return chosen


def _model_there(address: str, secret_file: Path | None, tls: bool, directory: Path, threads: int) -> Finding:
    digest = verify_model(directory)
    worker = WorkerSide(address, Telemetry(1.0, ()), Probe(1, 1), secret_file=str(secret_file) if secret_file else None, tls=tls)
    spec = ClientSpec("", str(directory), "", Policy(), Phase("prefill", (1,)), digest.dtype, threads, 2, "auto")
    held, sent = hold_weights(spec, worker, ModelFiles(directory, digest))
    meaning = f"the same on both sides, by hash; {held / 1e6:,.0f} MB were there, {sent / 1e6:,.0f} MB were sent"
    return Finding("ok", f"model {directory.name} there", digest.sha256[:16], meaning)


def _packages() -> Iterator[Finding]:
    for names, state, meaning in (
        (_NEEDED, "broken", "workers and clients do not start; run make, or pip install -r requirements.lock"),
        (_WORKFLOW, "lacks", "no workflow, tables or figures here; serve, run and ping work"),
    ):
        missing = [name for name in names if package_version(name) is None]
        found = ", ".join(f"{name} {package_version(name)}" for name in names if name not in missing)
        yield Finding(state if missing else "ok", "packages", found, f"missing {', '.join(missing)}: {meaning}" if missing else "")


def _gpu() -> Iterator[Finding]:
    machine = describe_machine()
    if machine["gpus"]:
        yield Finding("ok", "GPU", ", ".join(machine["gpus"]), f"driver {machine['driver']}")
    else:
        yield Finding("lacks", "GPU", "none", f"{machine['gpu_reason'] or 'NVML finds no device'}: gpu and dmon tables stay empty")
    yield _gpm()
    if package_version("torch"):
        import torch

        from semgap.engine.device import why_no_cuda

        usable = torch.cuda.is_available()
        value = f"torch {torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"
        why = "" if usable else f"device: auto computes on the CPU ({why_no_cuda()})"
        yield Finding("ok" if usable else "lacks", "torch on GPU", value, why)
        yield _graphs()
        yield _gpu_codec()
    yield _fused()


def _graphs() -> Finding:
    from semgap.engine.device import choose_device
    from semgap.engine.executor_choice import why_no_graphs

    why = why_no_graphs(choose_device("auto"))
    if why:
        return Finding("lacks", "executor cuda_graph", "not here", f"{why}; executor: auto is another")
    return Finding("ok", "executor cuda_graph", f"Triton {package_version('triton')}", "executor: auto is this")


def _fused() -> Finding:
    try:
        import numba

        from semgap.engine import kernel_cache
    except ImportError as error:
        return Finding("lacks", "executor fused", "numba does not load", f"{error}; executor: auto is eager on the CPU")
    kept = f"kept in {kernel_cache.directory()}" if kernel_cache.is_usable() else "compiled anew by each process"
    return Finding(
        "ok", "executor fused", f"numba {numba.__version__}", f"executor: auto is this on the CPU, in float32; kernels are {kept}"
    )


def _gpu_codec() -> Finding:
    reason = codec_named("nvcomp_ans").unavailable()
    meaning = "modes that encode or decode with it here are refused" if reason else ""
    return Finding("lacks" if reason else "ok", "codec nvcomp_ans", reason or "works here", meaning)


def _gpm() -> Finding:
    try:
        device = nvml.require_gpm()
    except (gpm.NoGpm, nvml.NoDevice) as error:
        return Finding("lacks", "GPM", "none", f"{error}: no SM activity, occupancy, tensor and DRAM use in gpu tables")
    return Finding("ok", "GPM", device.name, "SM activity, occupancy, tensor, DRAM and PCIe use are sampled")


def _processors() -> Iterator[Finding]:
    allowed = sorted(os.sched_getaffinity(0))
    two = len(allowed) >= 2
    meaning = "" if two else "client and worker share one core and disturb each other"
    yield Finding("ok" if two else "lacks", "cores", f"{len(allowed)} allowed ({allowed}), {describe_machine()['cpu']}", meaning)
    memory = psutil.virtual_memory()
    yield Finding("ok", "memory", f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free")
    load = os.getloadavg()[0]
    quiet = load < 0.5 * len(allowed)
    yield Finding("ok" if quiet else "lacks", "load", f"{load:.1f}", "" if quiet else "others compute here; latencies will be noisy")


def _read_bandwidth() -> float | None:
    """Bytes/s that one core reads, or None without numba."""
    try:
        from semgap.engine.cpu_bandwidth import read_bandwidth
    except ImportError:
        return None
    return read_bandwidth(np.ones(_READ_BYTES // 4, np.float32))


def _floor(read: float | None) -> Iterator[Finding]:
    if read is not None:
        meaning = f"a decode step on one core takes at least {1e12 / read:.0f} ms for each GB of weights"
        yield Finding("ok", "a core reads", f"{read / 1e9:.1f} GB/s", meaning)


def _network() -> Iterator[Finding]:
    with socket.socket() as sock:
        try:
            tcp_info(sock)
            yield Finding("ok", "TCP_INFO", f"Linux {platform.release()}", "byte counts can be reconciled with the kernel")
        except OSError as error:
            yield Finding("broken", "TCP_INFO", f"Linux {platform.release()}", f"{error}; no remote trial can be reconciled")
    available = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
    default = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    yield Finding("ok", "congestion control", default, f"available: {', '.join(available)}")
    yield _namespaces()


def _namespaces() -> Finding:
    able = "no"
    try:
        with namespaces(Network("netns", rate="1Gbit")):
            able = "rate alone"
        with namespaces(Network("netns", rate="1Gbit", delay_ms=1)):
            return Finding("ok", "networks of netns", "delay, loss and rate")
    except NetworkError as error:
        return Finding("lacks", "networks of netns", able, str(error))


def _tools() -> Iterator[Finding]:
    for tool, meaning in (
        ("git", "manifests hold no commit"),
        ("nvidia-smi", "dmon tables stay empty"),
        ("sbatch", "no Slurm here; profiles/slurm needs it"),
    ):
        path = shutil.which(tool)
        yield Finding("ok" if path else "lacks", tool, path or "not found", "" if path else meaning)


def _models(root: Path, read: float | None) -> Iterator[Finding]:
    directories = sorted(path.parent for path in root.glob("resources/models/*/config.json"))
    if not directories:
        yield Finding("lacks", "models", "none fetched", f"under {root}; `snakemake --cores 1` fetches them")
    for directory in directories:
        try:
            digest = verify_model(directory)
            floor = f"; a decode step on one core takes at least {1e3 * digest.file_bytes / read:.0f} ms" if read else ""
            yield Finding("ok", f"model {directory.name}", f"{digest.dtype}, {digest.file_bytes / 1e6:.0f} MB", f"whole{floor}")
        except ModelFileError as error:
            yield Finding("lacks", f"model {directory.name}", "damaged", str(error))
