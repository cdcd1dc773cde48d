"""The GPU sources, against a driver library and an `nvidia-smi` that stand in for NVIDIA's."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from semgap.telemetry import sampling
from semgap.telemetry.nvml import Device, NoDevice, resolve_visible

DATA = Path(__file__).parents[1] / "data"
SOURCE_DIRECTORY = Path(sampling.__file__).parents[2]
SECOND_UUID = "GPU-bbbb0000-1111"
H100 = [Device(0, "GPU-aaaa0000-0000", "H100"), Device(1, SECOND_UUID, "H100")]
MIXED = [Device(0, "GPU-aaaa0000-0000", "T4"), Device(1, SECOND_UUID, "H100")]

# Two GPUs; PCIe throughput is not supported (3), and power fails once (999), at its second call.
LIBRARY = r"""
#include <stdint.h>
#include <stdio.h>
#include <string.h>
static const char *uuids[2] = {"GPU-aaaa0000-0000", "GPU-bbbb0000-1111"};
int nvmlInitWithFlags(unsigned f) { return 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int e) { return e == 3 ? "Not Supported" : "Unknown Error"; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **d) { *d = (void *)(uintptr_t)(i + 1); return 0; }
int nvmlDeviceGetHandleByUUID(const char *u, void **d) {
  for (unsigned i = 0; i < 2; i++) if (!strcmp(u, uuids[i])) { *d = (void *)(uintptr_t)(i + 1); return 0; }
  return 6; }
int nvmlDeviceGetUUID(void *d, char *u, unsigned n) {
  snprintf(u, n, "%s", uuids[(uintptr_t)d - 1]); return 0; }
int nvmlDeviceGetName(void *d, char *s, unsigned n) { snprintf(s, n, "Stand-in"); return 0; }
int nvmlDeviceGetIndex(void *d, unsigned *i) { *i = (unsigned)((uintptr_t)d - 1); return 0; }
int nvmlDeviceGetUtilizationRates(void *d, unsigned *u) { u[0] = 37; u[1] = 12; return 0; }
int nvmlDeviceGetMemoryInfo(void *d, uint64_t *m) { m[0] = 80; m[1] = 50; m[2] = 30; return 0; }
int nvmlDeviceGetPowerUsage(void *d, unsigned *p) {
  static int calls; *p = 123456; return ++calls == 2 ? 999 : 0; }
int nvmlDeviceGetTemperature(void *d, int s, unsigned *t) { *t = 41; return s; }
int nvmlDeviceGetClockInfo(void *d, int k, unsigned *c) { *c = k == 1 ? 1980 : k == 2 ? 2619 : 0; return 0; }
int nvmlDeviceGetTotalEnergyConsumption(void *d, uint64_t *e) { *e = 5000000000ull; return 0; }
int nvmlDeviceGetPcieThroughput(void *d, int k, unsigned *v) { return 3; }
"""

# Like dmon, it never flushes, prints a header and then samples, and starts a process of its own.
NVIDIA_SMI = """#!{python}
import subprocess, sys, time
assert sys.argv[1:] == ["dmon", "-s", "pucvmet", "-d", "1", "-i", "1"], sys.argv
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, file=open({pids!r}, "w"))
for line in open({data!r}):
    print(line, end="")
    time.sleep(0.01)
{then}
"""

TRIAL = """
import json, sys, time
from pathlib import Path
from semgap.telemetry import sampling
running = sampling.start(Path(sys.argv[1]), pids={}, interval_s=0.1, sources=sys.argv[2].split(","))
print(json.dumps(dict(running.pids)), flush=True)
time.sleep(float(sys.argv[3]))
results = running.stop()
print(json.dumps({source: [each.rows, each.reason, each.cost_cpu_s] for source, each in results.items()}))
"""


def write_nvidia_smi(directory: Path, then: str) -> None:
    script = directory / "nvidia-smi"
    script.write_text(
        NVIDIA_SMI.format(
            python=sys.executable,
            pids=str(directory / "child.pid"),
            data=str(DATA / "dmon_h100_pucvmet.txt"),
            then=then,
        )
    )
    script.chmod(0o755)


@pytest.fixture
def driver(tmp_path: Path) -> dict[str, str]:
    """An environment in which NVML shows two GPUs, CUDA sees the second, and nvidia-smi is on PATH."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build the stand-in for the driver's library")
    (tmp_path / "nvml.c").write_text(LIBRARY)
    library = tmp_path / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", str(library), str(tmp_path / "nvml.c")], check=True)
    write_nvidia_smi(tmp_path, then="time.sleep(60)")
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return inherited | {
        "LD_LIBRARY_PATH": str(tmp_path),
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(SOURCE_DIRECTORY),
        "CUDA_VISIBLE_DEVICES": SECOND_UUID,
    }


def has_ended(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def run_trial(directory: Path, environment: dict[str, str], sources: str, hold_s: float) -> dict[str, Any]:
    command = [sys.executable, "-c", TRIAL, str(directory), sources, str(hold_s)]
    output = subprocess.check_output(command, env=environment, timeout=60)
    results: dict[str, Any] = json.loads(output.splitlines()[-1])
    return results


def test_nvml_rows_are_of_the_visible_gpu_with_slow_metrics_once_a_second(tmp_path: Path, driver: dict[str, str]) -> None:
    count, reason, cost_cpu_s = run_trial(tmp_path, driver, "gpu", hold_s=1.5)["gpu"]
    table = pq.read_table(tmp_path / "gpu.parquet")
    rows = table.to_pylist()
    assert count == len(rows) >= 10
    assert {(row["gpu_index"], row["gpu_uuid"]) for row in rows} == {(1, SECOND_UUID)}
    assert rows[0] | {"t_s": 0.0} == {
        "t_s": 0.0,
        "gpu_index": 1,
        "gpu_uuid": SECOND_UUID,
        "gpu_percent": 37.0,
        "memory_controller_percent": 12.0,
        "memory_used_bytes": 30.0,
        "power_w": 123.456,
        "temperature_c": 41.0,
        "sm_clock_mhz": 1980.0,
        "memory_clock_mhz": 2619.0,
        "energy_j": 5e6,
        "pcie_tx_kb_per_s": None,
        "pcie_rx_kb_per_s": None,
    }
    energies = [row["energy_j"] for row in rows]
    assert 2 <= len(energies) - energies.count(None) <= 3
    assert "pcie_tx_kb_per_s: NVML: Not Supported" in reason
    assert cost_cpu_s > 0


def test_a_metric_that_fails_once_is_null_in_that_row_and_asked_for_again(tmp_path: Path, driver: dict[str, str]) -> None:
    _, reason, _ = run_trial(tmp_path, driver, "gpu", hold_s=0.3)["gpu"]
    powers = pq.read_table(tmp_path / "gpu.parquet")["power_w"].to_pylist()
    assert powers[:3] == [123.456, None, 123.456]
    assert "power_w: NVML: Unknown Error" in reason


def test_dmon_lines_are_stamped_as_they_come_and_its_own_child_ends_too(tmp_path: Path, driver: dict[str, str]) -> None:
    before_s = time.monotonic()
    count, _, cost_cpu_s = run_trial(tmp_path, driver, "dmon", hold_s=1.0)["dmon"]
    rows = pq.read_table(tmp_path / "dmon.parquet").to_pylist()
    assert count == len(rows) == 38
    assert rows[14]["sm_percent"] == 25 and rows[1]["pcie_rx_mb_per_s"] == 22660
    stamps = [row["t_s"] for row in rows]
    assert before_s < stamps[0] and stamps == sorted(stamps)
    # 38 lines, 10 ms apart: had they waited in a buffer, they would have come together.
    assert stamps[-1] - stamps[0] > 0.3
    assert cost_cpu_s > 0
    assert has_ended(int((tmp_path / "child.pid").read_text()))


def test_a_dmon_that_ends_early_keeps_its_samples_and_says_so(tmp_path: Path, driver: dict[str, str]) -> None:
    write_nvidia_smi(tmp_path, then="print('0 1 2'); sys.exit(9)")
    count, reason, _ = run_trial(tmp_path, driver, "dmon", hold_s=1.0)["dmon"]
    assert count == pq.read_table(tmp_path / "dmon.parquet").num_rows == 38
    assert reason.startswith("nvidia-smi dmon ended by itself with status 9 (and 1 more)")


def test_a_dmon_that_gives_nothing_is_reported_with_what_it_said(tmp_path: Path, driver: dict[str, str]) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    count, reason, _ = run_trial(tmp_path, driver, "dmon", hold_s=0.1)["dmon"]
    assert count == 0
    assert "status 9" in reason and "NVIDIA-SMI has failed" in reason


def test_dmon_dies_with_a_trial_that_was_killed(tmp_path: Path, driver: dict[str, str]) -> None:
    command = [sys.executable, "-c", TRIAL, str(tmp_path), "dmon", "60"]
    with subprocess.Popen(command, env=driver, stdout=subprocess.PIPE) as trial:
        assert trial.stdout is not None
        sampler = psutil.Process(json.loads(trial.stdout.readline())["dmon"])
        (dmon,) = sampler.children()
        orphan = psutil.Process(int((tmp_path / "child.pid").read_text()))
        trial.kill()
    left = psutil.wait_procs([sampler, dmon], timeout=5)[1]
    orphan.kill()
    assert left == []


@pytest.mark.parametrize(
    ("visible", "devices", "index"),
    [
        ({}, H100, 0),
        ({"CUDA_VISIBLE_DEVICES": "1,0"}, H100, 1),
        ({"CUDA_VISIBLE_DEVICES": SECOND_UUID}, MIXED, 1),
        ({"CUDA_VISIBLE_DEVICES": "GPU-bbbb,0"}, MIXED, 1),
        ({"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, MIXED, 0),
    ],
)
def test_the_visible_gpu_is_the_first_that_cuda_would_see(visible: dict[str, str], devices: list[Device], index: int) -> None:
    assert resolve_visible(visible, devices).index == index


@pytest.mark.parametrize(
    ("visible", "devices", "problem"),
    [
        ({}, [], "shows no GPU"),
        ({"CUDA_VISIBLE_DEVICES": ""}, H100, "names 0 GPUs"),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, H100, "names 0 GPUs"),
        ({"CUDA_VISIBLE_DEVICES": "2"}, H100, "index 2 of 2 GPUs"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-"}, H100, "names 2 GPUs"),
        ({"CUDA_VISIBLE_DEVICES": "MIG-1234"}, H100, "MIG slice"),
        ({"CUDA_VISIBLE_DEVICES": "0"}, MIXED, "set CUDA_DEVICE_ORDER=PCI_BUS_ID or give a UUID"),
    ],
)
def test_a_gpu_that_cannot_be_told_is_refused_with_the_way_out(visible: dict[str, str], devices: list[Device], problem: str) -> None:
    with pytest.raises(NoDevice, match=problem):
        resolve_visible(visible, devices)
