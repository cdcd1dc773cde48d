"""Sampling as a trial uses it: real sampler processes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from semgap.telemetry import samplers
from semgap.telemetry.clock import offset_s, read_clock
from semgap.telemetry.host import COLUMNS as HOST_COLUMNS
from semgap.telemetry.host import HostSampler, context_switches
from semgap.telemetry.samples import read_samples

SOURCE_DIRECTORY = Path(samplers.__file__).parents[2]


@contextlib.contextmanager
def child(code: str) -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            yield process
        finally:
            process.kill()


def gone(pid: int, within_s: float = 5.0) -> bool:
    """True if a process ends (or becomes a zombie) within the time."""
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_a_busy_process_shows_as_busy_and_an_idle_one_as_idle(tmp_path: Path) -> None:
    with child("while True: pass") as busy, child("import time; time.sleep(60)") as idle:
        running = samplers.start(tmp_path, pids={"worker": busy.pid, "client": idle.pid}, interval_s=0.1, sources=["host"])
        began_s = time.monotonic()
        time.sleep(0.8)
        ended_s = time.monotonic()
        result = running.stop()["host"]
    rows = read_samples(result.path).to_pylist()
    assert result.rows == len(rows) >= 8
    worker = [row for row in rows if row["side"] == "worker"]
    client = [row for row in rows if row["side"] == "client"]
    assert {row["pid"] for row in worker} == {busy.pid}
    assert worker[0]["cpu_percent"] is None
    # Compared with the CPU time from the kernel, on a machine of any load.
    cpu_s = worker[-1]["cpu_user_s"] + worker[-1]["cpu_system_s"] - worker[0]["cpu_user_s"] - worker[0]["cpu_system_s"]
    mean_percent = 100 * cpu_s / (worker[-1]["t_s"] - worker[0]["t_s"])
    assert mean_percent > 20
    percents = sorted(row["cpu_percent"] for row in worker[1:-1])
    assert percents[len(percents) // 2] == pytest.approx(mean_percent, abs=25)
    assert max(row["cpu_percent"] for row in client[1:-1]) < 20
    assert worker[0]["t_s"] <= began_s and worker[-1]["t_s"] >= ended_s
    assert all(row["rss_bytes"] > row["rss_anon_bytes"] > 0 for row in rows)
    assert result.cost is not None and 0 < result.cost.cpu_s < 0.5 and result.cost.samples == result.rows / 2 - 1


def test_a_process_that_ended_gets_no_more_rows_and_the_others_go_on(tmp_path: Path) -> None:
    with child("import time; time.sleep(60)") as stays, child("import time; time.sleep(60)") as ends:
        running = samplers.start(tmp_path, pids={"client": stays.pid, "worker": ends.pid}, interval_s=0.05, sources=["host"])
        ends.kill()
        ends.wait()
        ended_s = time.monotonic()
        time.sleep(0.3)
        rows = read_samples(running.stop()["host"].path).to_pylist()
    assert [row for row in rows if row["side"] == "worker"]
    assert not [row for row in rows if row["side"] == "worker" and row["t_s"] > ended_s]
    assert [row for row in rows if row["side"] == "client" and row["t_s"] > ended_s + 0.1]


def test_a_process_that_never_was_is_named_in_the_reason(tmp_path: Path) -> None:
    with child("pass") as ended:
        ended.wait()
        result = samplers.start(tmp_path, pids={"worker": ended.pid}, interval_s=0.1, sources=["host"]).stop()["host"]
    assert result.rows == 0
    assert f"side worker: no process {ended.pid} when sampling began" in str(result.reason)


def test_the_samplers_run_on_the_cores_that_they_were_given(tmp_path: Path) -> None:
    core = max(os.sched_getaffinity(0))
    running = samplers.start(tmp_path, pids={"client": os.getpid()}, interval_s=0.1, sources=["host"], cpus=[core])
    assert os.sched_getaffinity(running.pids["host"]) == {core}
    running.stop()


def test_context_switches_are_those_of_all_threads_and_not_of_the_main_one_alone() -> None:
    def wait_often() -> None:
        for _ in range(200):
            time.sleep(0.0005)
        finished.set()
        hold.wait()

    finished, hold = threading.Event(), threading.Event()
    before, _ = context_switches(os.getpid())
    thread = threading.Thread(target=wait_often)
    thread.start()
    finished.wait()
    after, _ = context_switches(os.getpid())
    hold.set()
    thread.join()
    assert after - before >= 200


def test_anonymous_memory_is_counted_in_bytes() -> None:
    """A process of its own takes the memory: here, threads of other tests may take and give back some at any moment."""
    size = 32 << 20
    takes_memory = f"print('ready', flush=True); input(); block = bytearray(b'x') * {size}; print('taken', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", takes_memory], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        sampler = HostSampler({"client": process.pid})
        assert process.stdout.readline() == "ready\n"
        (before,) = sampler.sample(0.0)
        print(file=process.stdin, flush=True)
        assert process.stdout.readline() == "taken\n"
        (after,) = sampler.sample(1.0)
        process.kill()
    assert after["rss_anon_bytes"] - before["rss_anon_bytes"] == pytest.approx(size, rel=0.1)


def test_an_unreadable_core_frequency_is_null_with_a_reason_and_a_readable_one_is_a_number() -> None:
    sampler = HostSampler({"client": os.getpid()})
    (row,) = sampler.sample(0.0)
    assert set(row) == {column.name for column in HOST_COLUMNS}
    assert (row["cpu_mhz"] is None) == ("cpu_mhz" in sampler.null_reasons)


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has an NVIDIA GPU")
def test_without_a_gpu_its_tables_have_the_full_schema_no_rows_and_the_reason(tmp_path: Path) -> None:
    running = samplers.start(tmp_path, pids={}, interval_s=0.1, sources=["gpu", "dmon"])
    assert running.pids == {}
    results = running.stop()
    for source, column in (("gpu", "power_w"), ("dmon", "sm_percent")):
        table = read_samples(results[source].path)
        assert results[source].path == tmp_path / f"{source}.json"
        assert (results[source].rows, table.num_rows) == (0, 0)
        assert "no NVIDIA driver" in str(results[source].reason)
        assert {"t_s", "gpu_index", column} <= set(table.column_names)
        assert "no NVIDIA driver" in json.loads(table.schema.metadata[b"semgap.null_reasons"])[column]


def test_a_sampler_that_was_killed_is_reported_and_leaves_an_empty_table(tmp_path: Path) -> None:
    (tmp_path / "host.json").write_bytes(b"of an earlier run")
    running = samplers.start(tmp_path, pids={"client": os.getpid()}, interval_s=0.1, sources=["host"])
    os.kill(running.pids["host"], signal.SIGKILL)
    result = running.stop()["host"]
    assert (result.rows, result.cost) == (0, None)
    assert result.reason == "the host sampler died (SIGKILL)"
    assert read_samples(result.path).column_names == [column.name for column in HOST_COLUMNS]


def test_a_sampler_that_failed_is_reported_with_its_last_line(tmp_path: Path) -> None:
    running = samplers.start(tmp_path, pids={"client": os.getpid()}, interval_s=0.1, sources=["host"], cpus=[100_000])
    result = running.stop()["host"]
    assert result.rows == 0
    assert str(result.reason).startswith("the host sampler died (status 1): OSError")


def test_a_sampler_that_does_not_end_in_time_is_killed_and_reported(tmp_path: Path) -> None:
    running = samplers.start(tmp_path, pids={"client": os.getpid()}, interval_s=0.1, sources=["host"])
    os.kill(running.pids["host"], signal.SIGSTOP)
    result = running.stop(timeout_s=0.2)["host"]
    assert "did not end in time" in str(result.reason)
    assert gone(running.pids["host"])


def test_a_second_stop_gives_the_same_results(tmp_path: Path) -> None:
    running = samplers.start(tmp_path, pids={"client": os.getpid()}, interval_s=0.1, sources=["host"])
    assert running.stop() == running.stop()


def test_the_samplers_die_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from semgap.telemetry import samplers\n"
        "pids = {'client': os.getpid()}\n"
        "running = samplers.start(Path(sys.argv[1]), pids=pids, interval_s=0.1, sources=['host'])\n"
        "print(running.pids['host'], flush=True); time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": str(SOURCE_DIRECTORY)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        sampler = int(parent.stdout.readline())
        assert psutil.Process(sampler).is_running()
        parent.kill()
    assert gone(sampler)


def test_a_sampler_whose_parent_is_another_process_ends_at_once() -> None:
    command = [sys.executable, "-m", "semgap.telemetry.sampler_process", json.dumps({"parent": 1})]
    environment = os.environ | {"PYTHONPATH": str(SOURCE_DIRECTORY)}
    finished = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert finished.returncode != 0
    assert b"ParentGone: parent 1 has ended" in finished.stderr


def test_importing_the_interface_loads_no_heavy_package() -> None:
    code = "import sys, semgap.telemetry.samplers\nprint({'pandas', 'pyarrow', 'psutil', 'pynvml', 'numpy', 'torch'} & set(sys.modules))"
    environment = os.environ | {"PYTHONPATH": str(SOURCE_DIRECTORY)}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment).strip() == b"set()"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"sources": ["hots"], "pids": {"client": 1}, "interval_s": 0.1}, "each of host, gpu, dmon at most once"),
        ({"sources": ["host", "host"], "pids": {"client": 1}, "interval_s": 0.1}, "each of host, gpu, dmon at most once"),
        ({"sources": ["host"], "pids": {}, "interval_s": 0.1}, "pids is empty"),
        ({"sources": ["host"], "pids": {"client": 1}, "interval_s": 0}, "must be above 0"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        samplers.start(tmp_path, **arguments)


def test_the_offset_of_another_clock_is_known_to_half_a_round_trip() -> None:
    def theirs() -> dict[str, Any]:
        time.sleep(0.002)
        reading = {"monotonic_s": time.monotonic() + 1000.0, "boot_id": "another host"}
        time.sleep(0.004)
        return reading

    offset, error_s = offset_s(theirs)
    assert 0.003 <= error_s < 0.1
    assert abs(offset - 1000.0) <= error_s
    assert offset_s(read_clock) == (0.0, 0.0)
