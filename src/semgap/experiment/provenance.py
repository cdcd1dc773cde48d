"""Where a result comes from: code, packages, machine, session. What cannot be known is null with a reason."""

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from semgap.experiment.staleness import content_digest
from semgap.processes.machine import package_version
from semgap.telemetry.nvml import NoDevice, list_devices, open_nvml

_PACKAGES = (
    *("torch", "transformers", "numpy", "tokenizers", "msgspec", "xxhash", "zstandard", "pandas", "pyarrow", "snakemake"),
    *("nvidia-nvcomp-cu13", "nvidia-nvcomp-cu12"),  # one of them where codec nvcomp_ans is used
)


def describe_run(root: Path) -> dict[str, Any]:
    """Provenance for a manifest: git, packages, machine, GPU, time (UTC) and command."""
    return {
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": _git(root),
        "packages": package_versions(),
        "machine": describe_machine(),
        "command": sys.argv,
    }


def fingerprint(run: Mapping[str, Any], device: str, worker_node: str | None = None) -> str:
    """What must be equal for two latencies to be compared: packages, machine, the device that computed, an allocation's other node."""
    equal = {"packages": run["packages"], "machine": run["machine"], "device": device}
    return content_digest(equal | ({"worker_node": worker_node} if worker_node else {}))[:16]


def package_versions() -> dict[str, str | None]:
    """Versions of the packages that shape a result; null for one that is not installed."""
    return {"python": platform.python_version()} | {name: package_version(name) for name in _PACKAGES}


def describe_machine() -> dict[str, Any]:
    """Host, kernel, CPU and GPUs."""
    return {
        "host": socket.gethostname(),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        **_gpus(),
    }


def session_id() -> str:
    """The Snakemake run that a trial belongs to, from SEMGAP_SESSION; each run by hand is a session of its own."""
    return os.environ.get("SEMGAP_SESSION") or new_session_id()


def new_session_id() -> str:
    """A new one: time, host and process."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{socket.gethostname()}-{os.getpid()}"


def _git(root: Path) -> dict[str, Any]:
    try:
        commit = _run_git(root, "rev-parse", "HEAD").strip()
        changed = _run_git(root, "status", "--porcelain").splitlines()
    except (OSError, subprocess.CalledProcessError) as error:
        return {"commit": None, "dirty": None, "reason": f"git does not answer here: {error}"}
    return {"commit": commit, "dirty": bool(changed), "reason": None}


def _run_git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout


def _cpu_model() -> str | None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def _gpus() -> dict[str, Any]:
    try:
        with open_nvml() as nvml:
            names = [f"{device.name} {device.uuid}" for device in list_devices(nvml)]
            return {"gpus": names, "driver": nvml.nvmlSystemGetDriverVersion(), "gpu_reason": None}
    except NoDevice as error:
        return {"gpus": None, "driver": None, "gpu_reason": str(error)}
