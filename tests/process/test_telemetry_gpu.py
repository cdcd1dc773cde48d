"""The GPU sources, against a driver library and an `nvidia-smi` that stand in for NVIDIA's."""

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from stand_in_driver import UUIDS, build_driver, driver_environment, write_nvidia_smi

from semgap.telemetry import samplers
from semgap.telemetry.gpm import METRICS
from semgap.telemetry.nvml import Device, NoDevice, resolve_visible
from semgap.telemetry.samples import read_samples

SOURCE_DIRECTORY = Path(samplers.__file__).parents[2]
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SECOND_UUID = UUIDS[1]
H100 = [Device(index, uuid, "H100") for index, uuid in enumerate(UUIDS)]
MIXED = [Device(0, UUIDS[0], "T4"), Device(1, SECOND_UUID, "H100")]

TRIAL = """
import json, sys, time
from pathlib import Path
from semgap.telemetry import samplers
from semgap.telemetry.gpm import METRICS
running = samplers.start(Path(sys.argv[1]), pids={}, interval_s=float(sys.argv[4]), sources=sys.argv[2].split(","))
print(json.dumps(dict(running.pids)), flush=True)
time.sleep(float(sys.argv[3]))
results = running.stop()
print(json.dumps({source: [each.rows, each.reason, each.cost and each.cost.describe()] for source, each in results.items()}))
"""


@pytest.fixture
def driver(tmp_path: Path) -> dict[str, str]:
    """An environment in which NVML shows two GPUs, CUDA sees the second, and nvidia-smi is on PATH."""
    return driver_environment(tmp_path) | {"PYTHONPATH": str(SOURCE_DIRECTORY)}


def has_ended(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def run_trial(directory: Path, environment: dict[str, str], sources: str, hold_s: float, interval_s: float = 0.1) -> dict[str, Any]:
    command = [sys.executable, "-c", TRIAL, str(directory), sources, str(hold_s), str(interval_s)]
    output = subprocess.check_output(command, env=environment, timeout=60)
    results: dict[str, Any] = json.loads(output.splitlines()[-1])
    return results


NO_GPM = {"gpm_window_s": None, **dict.fromkeys(METRICS)}


def test_nvml_rows_are_of_the_visible_gpu_and_energy_is_read_at_the_ends_alone(tmp_path: Path, driver: dict[str, str]) -> None:
    count, reason, cost = run_trial(tmp_path, driver, "gpu", hold_s=1.5)["gpu"]
    rows = read_samples(tmp_path / "gpu.json").to_pylist()
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
        "power_instant_w": 200.25,
        "temperature_c": 41.0,
        "sm_clock_mhz": 1980.0,
        "memory_clock_mhz": 2619.0,
        "energy_j": 5e6,
        **NO_GPM,
    }
    energies = [row["energy_j"] for row in rows]
    assert energies[0] == energies[-1] == 5e6 and set(energies[1:-1]) == {None}
    assert "gpm_dram_bandwidth_percent: GPM: Not Supported" in reason
    assert cost["samples"] == count - 1 and cost["span_s"] > 1
    assert cost["cpu_s"] > 0 and cost["cpu_s_per_sample"] == pytest.approx(cost["cpu_s"] / cost["samples"])
    assert cost["core_share"] == pytest.approx(cost["cpu_s"] / cost["span_s"])
    assert 0 < cost["busy_s"] < cost["span_s"] and cost["wall_share"] == pytest.approx(cost["busy_s"] / cost["span_s"])


def test_gpm_covers_the_time_between_two_samples_and_begins_anew_after_a_failure(tmp_path: Path, driver: dict[str, str]) -> None:
    _, reason, _ = run_trial(tmp_path, driver, "gpu", hold_s=1.0)["gpu"]
    rows = read_samples(tmp_path / "gpu.json").to_pylist()
    gpm = [{name: row[name] for name in NO_GPM} for row in rows]
    full = {"gpm_sm_activity_percent": 0.2, "gpm_sm_occupancy_percent": 0.3, "gpm_tensor_activity_percent": 0.5}
    full |= {"gpm_dram_bandwidth_percent": None, "gpm_pcie_tx_mib_per_s": 2.0, "gpm_pcie_rx_mib_per_s": 2.1}
    windows = [rows[i]["t_s"] - rows[i - 1]["t_s"] for i in (1, 2, 5)]
    assert gpm[0] == gpm[3] == gpm[4] == NO_GPM  # the first; the one that failed; the first after it
    assert gpm[1] == pytest.approx(full | {"gpm_window_s": windows[0], "gpm_tensor_activity_percent": None})
    assert gpm[2] == pytest.approx(full | {"gpm_window_s": windows[1]})
    assert gpm[5] == pytest.approx(full | {"gpm_window_s": windows[2]})
    assert "gpm_tensor_activity_percent: GPM" in reason


def test_gpm_windows_stay_long_enough_under_a_short_interval(tmp_path: Path, driver: dict[str, str]) -> None:
    run_trial(tmp_path, driver, "gpu", hold_s=0.8, interval_s=0.02)
    rows = read_samples(tmp_path / "gpu.json").to_pylist()
    windows = [row["gpm_window_s"] for row in rows if row["gpm_window_s"] is not None]
    assert len(windows) >= 3 and min(windows) >= 0.09
    assert len(rows) > 2 * len(windows)


@pytest.mark.parametrize(
    ("variable", "why"),
    [
        ("STAND_IN_NO_GPM", "this GPU has no GPM (Hopper and newer have)"),
        ("STAND_IN_GPM_FAILS", "GPM: Insufficient Permissions"),
        ("STAND_IN_GPM_FORBIDDEN", "GPM: Insufficient Permissions"),
    ],
)
def test_without_gpm_its_columns_are_null_with_the_reason_and_the_others_are_there(
    tmp_path: Path, driver: dict[str, str], variable: str, why: str
) -> None:
    count, reason, _ = run_trial(tmp_path, driver | {variable: "1"}, "gpu", hold_s=0.3)["gpu"]
    reason = "; ".join(part for part in reason.split("; ") if "power_w" not in part)  # power fails once in every case
    table = read_samples(tmp_path / "gpu.json")
    assert count == table.num_rows >= 3
    assert all({name: row[name] for name in NO_GPM} == NO_GPM and row["gpu_percent"] == 37 for row in table.to_pylist())
    assert reason == f"{', '.join(NO_GPM)}: {why}"
    assert json.loads(table.schema.metadata[b"semgap.null_reasons"])["gpm_pcie_rx_mib_per_s"] == why


@pytest.mark.parametrize(("visible", "index"), [("0", 0), ("1,0", 1), ("GPU-aaaa", 0), (SECOND_UUID, 1)])
def test_of_two_gpus_the_samples_are_those_of_cudas_first(tmp_path: Path, driver: dict[str, str], visible: str, index: int) -> None:
    (tmp_path / "nvidia-smi").write_text((tmp_path / "nvidia-smi").read_text().replace('"-i", "1"', f'"-i", "{index}"'))
    results = run_trial(tmp_path, driver | {"CUDA_VISIBLE_DEVICES": visible}, "gpu,dmon", hold_s=0.6)
    rows = read_samples(tmp_path / "gpu.json").to_pylist()
    assert {(row["gpu_index"], row["gpu_uuid"]) for row in rows} == {(index, H100[index].uuid)}
    assert results["dmon"][0] > 0  # the stand-in refuses another index


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"STAND_IN_MIG": "1"}, f"GPU 1 ({SECOND_UUID}) is split by MIG: CUDA sees a slice, NVML's counters cover the whole GPU"),
        ({"CUDA_VISIBLE_DEVICES": "MIG-1234"}, "MIG-1234 is a MIG slice; NVML's counters cover the whole GPU"),
        ({"CUDA_VISIBLE_DEVICES": "2"}, "index 2 of 2 GPUs"),
        ({"STAND_IN_FORBIDDEN": "1"}, "NVML: Insufficient Permissions"),
    ],
)
def test_what_nvml_cannot_tell_of_cudas_device_has_no_samples_but_the_reason(
    tmp_path: Path, driver: dict[str, str], more: dict[str, str], why: str
) -> None:
    results = run_trial(tmp_path, driver | more, "gpu,dmon", hold_s=0.1)
    assert all(count == 0 and why in reason for count, reason, _ in results.values())


def test_the_facts_of_gpu_check_are_those_of_cudas_first_gpu(driver: dict[str, str]) -> None:
    code = f"import json, sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import gpu_parts; print(json.dumps(gpu_parts._nvml_facts()))"
    told = [subprocess.check_output([sys.executable, "-c", code], env=driver | more, timeout=120) for more in ({}, {"STAND_IN_MIG": "1"})]
    facts, split = map(json.loads, told)
    assert (facts["nvml_index"], facts["uuid"], facts["sm_clock_mhz"], facts["gpm_supported"]) == (1, SECOND_UUID, 1980, True)
    assert "is split by MIG" in split["nvml"]


def test_a_gpu_that_others_filled_after_the_check_is_told_with_who_holds_how_much(driver: dict[str, str]) -> None:
    code = "import torch, semgap.engine.gpu_failure as g; print(g.gpu_failure(torch.OutOfMemoryError('CUDA out of memory. Tried 2 GiB.')))"
    told = subprocess.check_output([sys.executable, "-c", code], env=driver, timeout=120, text=True)
    assert told.startswith(f"GPU 1 (Stand-in, {SECOND_UUID}) has no memory left: CUDA out of memory. Tried 2 GiB.")
    assert "end other processes on it (pid 4242 holds 80,000,000,000 bytes)" in told


def test_a_gpu_lost_midway_leaves_what_was_read_before_and_the_reason(tmp_path: Path, driver: dict[str, str]) -> None:
    count, reason, _ = run_trial(tmp_path, driver | {"STAND_IN_LOST": "1"}, "gpu", hold_s=0.5)["gpu"]
    rows = read_samples(tmp_path / "gpu.json").to_pylist()
    assert count == len(rows) >= 4
    assert rows[1]["gpm_sm_activity_percent"] == pytest.approx(0.2)
    assert [row["gpm_sm_activity_percent"] for row in rows[2:]] == [None] * (count - 2)
    assert "GPM: GPU is lost" in reason


def test_a_driver_older_than_gpm_leaves_its_columns_null(tmp_path: Path, driver: dict[str, str]) -> None:
    compiler = shutil.which("cc")
    assert compiler is not None
    build_driver(compiler, tmp_path, "-DOLD_DRIVER")
    _, reason, _ = run_trial(tmp_path, driver, "gpu", hold_s=0.3)["gpu"]
    assert "gpm_pcie_rx_mib_per_s: this driver has no GPM: Function Not Found" in reason


def doctors_word_on_gpm(environment: dict[str, str]) -> str:
    code = "import semgap.doctor as d; f = d._gpm(); assert f in list(d._gpu()); print(f.state, f.value, f.meaning)"
    return subprocess.check_output([sys.executable, "-c", code], env=environment, timeout=60, text=True)


def test_doctor_says_if_there_is_gpm_and_why_not(driver: dict[str, str]) -> None:
    assert doctors_word_on_gpm(driver).startswith("ok Stand-in SM activity")
    assert doctors_word_on_gpm(driver | {"STAND_IN_NO_GPM": "1"}).startswith("lacks none this GPU has no GPM")
    assert doctors_word_on_gpm(driver | {"STAND_IN_FORBIDDEN": "1"}).startswith("lacks none NVML: Insufficient Permissions")
    without = {name: value for name, value in driver.items() if name != "LD_LIBRARY_PATH"}
    if not Path("/dev/nvidiactl").exists():
        assert doctors_word_on_gpm(without).startswith("lacks none no NVIDIA driver")


BURDEN = """
import json, sys, time
from dataclasses import asdict
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from sampler_burden import measure_burden
work = lambda: time.sleep(0.002)
found = measure_burden(work, Path(sys.argv[1]), pids={}, interval_s=0.02, sources=["gpu", "dmon"], pairs=3, block_s=0.3)
print(json.dumps({"blocks": [asdict(block) for block in found.blocks], "ratios": found.ratios, "ratio": found.ratio,
                  "steps_s": [block.step_s for block in found.blocks]}))
"""


def test_steps_are_timed_with_the_samplers_running_and_paused_in_turns(tmp_path: Path, driver: dict[str, str]) -> None:
    found = json.loads(subprocess.check_output([sys.executable, "-c", BURDEN, str(tmp_path), str(BENCHMARKS)], env=driver, timeout=60))
    blocks, step_s = found["blocks"], found["steps_s"]
    assert [block["sampled"] for block in blocks] == [False, True, True, False, False, True]
    assert found["ratios"] == pytest.approx([step_s[1] / step_s[0], step_s[2] / step_s[3], step_s[5] / step_s[4]])
    assert found["ratio"] == pytest.approx(statistics.geometric_mean(found["ratios"]))
    for source in ("gpu", "dmon"):  # dmon is a process below its sampler
        stamps = read_samples(tmp_path / f"{source}.json")["t_s"].to_pylist()
        within = [sum(block["begin_s"] <= t_s <= block["end_s"] for t_s in stamps) for block in blocks]
        assert [count for count, block in zip(within, blocks, strict=True) if not block["sampled"]] == [0, 0, 0]
        assert within[1] > 0 and (source == "dmon" or within[5] > 0)
    assert has_ended(int((tmp_path / "child.pid").read_text()))


def test_a_metric_that_fails_once_is_null_in_that_row_and_asked_for_again(tmp_path: Path, driver: dict[str, str]) -> None:
    _, reason, _ = run_trial(tmp_path, driver, "gpu", hold_s=0.3)["gpu"]
    powers = read_samples(tmp_path / "gpu.json")["power_w"].to_pylist()
    assert powers[:3] == [123.456, None, 123.456]
    assert "power_w: NVML: Unknown Error" in reason


def test_dmon_lines_are_stamped_as_they_come_and_its_own_child_ends_too(tmp_path: Path, driver: dict[str, str]) -> None:
    before_s = time.monotonic()
    count, _, cost = run_trial(tmp_path, driver, "dmon", hold_s=1.0)["dmon"]
    rows = read_samples(tmp_path / "dmon.json").to_pylist()
    assert count == len(rows) == 38
    assert rows[14]["sm_percent"] == 25 and rows[1]["pcie_rx_mb_per_s"] == 22660
    stamps = [row["t_s"] for row in rows]
    assert before_s < stamps[0] and stamps == sorted(stamps)
    # 38 lines, 10 ms apart: had they waited in a buffer, they would have come together.
    assert stamps[-1] - stamps[0] > 0.3
    assert cost["cpu_s"] > 0 and cost["busy_s"] is cost["wall_share"] is None
    assert has_ended(int((tmp_path / "child.pid").read_text()))


def test_a_dmon_that_ends_early_keeps_its_samples_and_says_so(tmp_path: Path, driver: dict[str, str]) -> None:
    write_nvidia_smi(tmp_path, then="print('0 1 2'); sys.exit(9)")
    count, reason, _ = run_trial(tmp_path, driver, "dmon", hold_s=1.0)["dmon"]
    assert count == read_samples(tmp_path / "dmon.json").num_rows == 38
    assert reason.startswith("nvidia-smi dmon ended by itself with status 9 (and 1 more)")


def test_a_dmon_without_samples_is_reported_with_its_output(tmp_path: Path, driver: dict[str, str]) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    count, reason, _ = run_trial(tmp_path, driver, "dmon", hold_s=0.1)["dmon"]
    assert count == 0
    assert "status 9" in reason and "NVIDIA-SMI has failed" in reason


def test_dmon_dies_with_a_trial_that_was_killed(tmp_path: Path, driver: dict[str, str]) -> None:
    command = [sys.executable, "-c", TRIAL, str(tmp_path), "dmon", "60", "0.1"]
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
def test_an_ambiguous_gpu_is_refused_with_the_way_out(visible: dict[str, str], devices: list[Device], problem: str) -> None:
    with pytest.raises(NoDevice, match=problem):
        resolve_visible(visible, devices)
