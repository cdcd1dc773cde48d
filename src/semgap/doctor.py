"""What this machine has and lacks for semgap, and what that means."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from semgap.provenance import describe_machine

_NEEDED = ("torch", "transformers", "numpy", "msgspec", "xxhash", "tokenizers", "safetensors", "pyarrow", "psutil")
_WORKFLOW = ("snakemake", "pandas", "scipy", "matplotlib", "pygments")


@dataclass(frozen=True)
class Finding:
    """One line of the report. `state` is 'ok', 'lacks' (something is not possible) or 'broken' (nothing is)."""

    state: str
    thing: str
    value: str
    meaning: str = ""


def examine(root: Path) -> list[Finding]:
    """Everything that decides what can be run here. Takes a few seconds: torch is asked for its GPU."""
    return [*_python(), *_packages(), *_gpu(), *_processors(), *_network(), *_tools(), *_models(root)]


def _python() -> Iterator[Finding]:
    new_enough = sys.version_info >= (3, 11)
    yield Finding("ok" if new_enough else "broken", "Python", platform.python_version(), "" if new_enough else "3.11 or newer is needed")


def _packages() -> Iterator[Finding]:
    for names, state, meaning in (
        (_NEEDED, "broken", "workers and clients do not start; run make, or pip install -r requirements.lock"),
        (_WORKFLOW, "lacks", "no workflow, tables or figures here; serve, run and ping work"),
    ):
        missing = [name for name in names if _version(name) is None]
        found = ", ".join(f"{name} {_version(name)}" for name in names if name not in missing)
        yield Finding(state if missing else "ok", "packages", found, f"missing {', '.join(missing)}: {meaning}" if missing else "")


def _gpu() -> Iterator[Finding]:
    machine = describe_machine()
    if machine["gpus"]:
        yield Finding("ok", "GPU", ", ".join(machine["gpus"]), f"driver {machine['driver']}")
    else:
        yield Finding("lacks", "GPU", "none", f"{machine['gpu_reason'] or 'NVML finds no device'}: gpu and dmon tables stay empty")
    yield _gpm()
    if _version("torch"):
        import torch

        usable = torch.cuda.is_available()
        value = f"torch {torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"
        yield Finding("ok" if usable else "lacks", "torch on GPU", value, "" if usable else "device: auto computes on the CPU")
        yield _graphs()
        yield _gpu_codec()


def _graphs() -> Finding:
    from semgap.executor import choose_device, choose_executor

    try:
        choose_executor("cuda_graph", choose_device("auto"))
    except ValueError as error:
        return Finding("lacks", "executor cuda_graph", str(error), "executor: auto is eager")
    return Finding("ok", "executor cuda_graph", f"Triton {_version('triton')}", "executor: auto is this")


def _gpu_codec() -> Finding:
    from semgap.codecs import codec_named

    reason = codec_named("nvcomp_ans").unavailable()
    meaning = "modes that encode or decode with it here are refused" if reason else ""
    return Finding("lacks" if reason else "ok", "codec nvcomp_ans", reason or "works here", meaning)


def _gpm() -> Finding:
    from semgap.telemetry import gpm, nvml

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


def _network() -> Iterator[Finding]:
    from semgap.link import tcp_info

    with socket.socket() as sock:
        try:
            tcp_info(sock)
            yield Finding("ok", "TCP_INFO", f"Linux {platform.release()}", "byte counts can be reconciled with the kernel")
        except OSError as error:
            yield Finding("broken", "TCP_INFO", f"Linux {platform.release()}", f"{error}; no remote trial can be reconciled")
    available = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
    default = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    yield Finding("ok", "congestion control", default, f"available: {', '.join(available)}")


def _tools() -> Iterator[Finding]:
    for tool, meaning in (
        ("git", "manifests hold no commit"),
        ("nvidia-smi", "dmon tables stay empty"),
        ("sbatch", "no Slurm here; profiles/slurm needs it"),
    ):
        path = shutil.which(tool)
        yield Finding("ok" if path else "lacks", tool, path or "not found", "" if path else meaning)


def _models(root: Path) -> Iterator[Finding]:
    from semgap.sources import ModelFileError, verify_model

    directories = sorted(path.parent for path in root.glob("resources/models/*/config.json"))
    if not directories:
        yield Finding("lacks", "models", "none fetched", f"under {root}; `snakemake --cores 1` fetches them")
    for directory in directories:
        try:
            digest = verify_model(directory)
            yield Finding("ok", f"model {directory.name}", f"{digest.dtype}, {digest.file_bytes / 1e6:.0f} MB", "whole")
        except ModelFileError as error:
            yield Finding("lacks", f"model {directory.name}", "damaged", str(error))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
