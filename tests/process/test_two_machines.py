"""Both sides on machines of their own: a worker with another boot id and another CLOCK_MONOTONIC, and one that is attached to a trial."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import yaml

from semgap.engine.model_files import load_digest
from semgap.experiment.compute_reference import compute_reference
from semgap.experiment.config import Coordinates, check_config
from semgap.experiment.measure_trial import measure_trial
from semgap.experiment.trial_schemas import TrialResult
from semgap.experiment.trial_setup import Paths
from semgap.policy import SessionSpec
from semgap.processes import machine, remote_lifetime, slurm
from semgap.processes.remote_lifetime import Order
from semgap.wire.handshake import shake_hands_as_client, write_secret
from semgap.wire.link import connect

pytestmark = pytest.mark.alone

ROOT = Path(__file__).resolve().parents[2]
AHEAD_S = 5000
ELSEWHERE = ("unshare", "--mount", "--time", "--monotonic", str(AHEAD_S), "--fork", "--kill-child", "sh", "-c")
BIND = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'
BOOT_ID = "00000000-0000-4000-8000-000000000001"
SECRET = "0123456789abcdef" * 4
Wait = Callable[..., None]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What runs a command as on another machine; skips where the kernel or its rights do not allow that."""
    file = tmp_path_factory.mktemp("boot") / "id"
    file.write_text(BOOT_ID + "\n")
    command = [*ELSEWHERE, BIND, str(file)]
    tried = subprocess.run([*command, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no mount and time namespaces here: {tried.stderr.strip()}")
    return command


@pytest.fixture(scope="module")
def far_worker(elsewhere: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An external worker on that machine: its address and its secret's file."""
    secret = tmp_path_factory.mktemp("far") / "secret"
    write_secret(secret)
    command = [sys.executable, "-m", "semgap", "serve", "--secret-file", str(secret), "--device", "cpu"]
    process = subprocess.Popen([*elsewhere, *command], stdout=subprocess.PIPE)
    assert process.stdout is not None
    yield {"launch": "external", "address": json.loads(process.stdout.readline())["address"], "secret_file": str(secret)}
    process.kill()  # unshare takes its child along
    process.wait()
    process.stdout.close()


@pytest.fixture(scope="module")
def result(far_worker: dict[str, str], llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrialResult]:
    """A trial with it, over a network of kind hosts."""
    raw = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    raw["define"]["models"], raw["models"] = {"tiny": load_digest(llama).source}, ["tiny"]
    raw["define"]["networks"], raw["networks"] = {"far": {"kind": "hosts"}}, ["far"]
    raw["define"]["phases"] = {"decode": {"kind": "decode", "prompt_lengths": [8], "steps": 3}}
    for name in ("remote_cache", "local"):
        raw["define"]["modes"][name]["phases"] = None
    raw |= {"modes": ["remote_cache"], "phases": ["decode"], "max_length": 64, "device": "cpu", "worker": far_worker}
    raw |= {"exactness": {"prompt_length": 8, "tokens": 4}, "probe": {"round_trips": 3, "payload_bytes": 65536}}
    raw["telemetry"] = {"interval_s": 0.02, "sources": ["host"]}
    config, directory = check_config(raw, ROOT), tmp_path_factory.mktemp("trial")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "LOCK", directory / "lock")
        compute_reference(config.reference_cell("tiny", "decode"), Paths(llama, ROOT), directory / "reference.npz")
        cell = config.cell(Coordinates("tiny", "far", "remote_cache", "decode", 1))
        yield measure_trial(cell, Paths(llama, ROOT), directory / "reference.npz")


def test_the_manifest_says_which_machines_these_were_and_how_far_their_clocks_are_apart(result: TrialResult) -> None:
    hosts, clock = result.manifest["hosts"], result.manifest["telemetry"]["worker_clock"]
    assert (hosts["client"]["boot_id"], hosts["worker"]["boot_id"]) == (machine.boot_id(), BOOT_ID)
    assert 0 < clock["error_s"] < 0.1
    assert abs(clock["offset_s"] - AHEAD_S) <= clock["error_s"]


def test_samples_of_both_hosts_are_on_the_client_s_clock(result: TrialResult) -> None:
    window, rows = result.manifest["measured"], result.tables["host"].to_pylist()
    assert {row["side"] for row in rows} == {"client", "worker"}
    assert all(window["start_s"] - 60 < row["t_s"] < window["end_s"] + 60 for row in rows)


class Attached:
    """A `semgap serve --attached` whose lock is a file of the test's own."""

    SCRIPT = (
        "import sys, pathlib; from semgap import cli; from semgap.processes import machine; "
        "machine.LOCK = pathlib.Path(sys.argv[1]); cli.main(sys.argv[2:])"
    )

    def __init__(self, lock: Path, order: Order) -> None:
        command = [sys.executable, "-c", self.SCRIPT, str(lock), "serve", "--attached", "--device", "cpu"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(order) + b"\n")
        self.process.stdin.flush()

    def address(self) -> str:
        assert self.process.stdout is not None
        address: str = json.loads(self.process.stdout.readline())["address"]
        return address

    def end(self) -> None:
        """Closes its input, and waits until it has ended."""
        self.process.communicate(timeout=30)
        assert self.process.returncode == 0


@pytest.fixture
def attached(tmp_path: Path) -> Iterator[Callable[[str], Attached]]:
    started: list[Attached] = []

    def start(lock_boot_id: str) -> Attached:
        started.append(Attached(tmp_path / "lock", Order(SECRET, lock_boot_id)))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.communicate()


def test_an_attached_worker_takes_its_secret_from_its_input_and_ends_with_it(attached: Callable[[str], Attached]) -> None:
    worker = attached(machine.boot_id())
    link = connect(worker.address())
    granted = shake_hands_as_client(link, SECRET.encode(), msgspec.to_builtins(SessionSpec()))
    assert granted["machine"] == machine.identity()
    assert granted["cpus"] == list(machine.split_cores(1)[0])
    worker.end()
    link.close()


def test_a_worker_on_a_machine_of_its_own_holds_that_machine_s_measuring_lock(
    attached: Callable[[str], Attached], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "LOCK", tmp_path / "lock")
    with machine.measuring():
        waits, same = attached(BOOT_ID), attached(machine.boot_id())
        assert waits.process.stderr is not None
        assert b"another trial measures on this machine" in waits.process.stderr.readline()
        same.address()  # whoever started it holds the lock for it
        same.end()
    waits.address()
    waits.end()


def test_an_attached_worker_that_hears_nothing_any_more_ends(tmp_path: Path) -> None:
    script = Attached.SCRIPT.replace("cli.main", "from semgap.processes import remote_lifetime; remote_lifetime.SILENT_S = 1.0; cli.main")
    command = [sys.executable, "-c", script, str(tmp_path / "lock"), "serve", "--attached", "--device", "cpu"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(msgspec.json.encode(Order(SECRET, machine.boot_id())) + b"\n")
        process.stdin.flush()
        process.stdout.readline()
        assert process.wait(20) == 0


def test_cores_are_split_between_who_computes_and_all_else() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    computing, thin = machine.split_cores(1)
    assert computing == (allowed[-1],) and thin == (tuple(allowed[:-1]) or computing)
    assert machine.split_cores(len(allowed)) == (tuple(allowed), tuple(allowed))
    with pytest.raises(ValueError, match=r"cores \[4095\] are not among this process's"):
        machine.split_cores(1, (4095,))


def test_outside_of_a_slurm_job_there_is_no_other_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(slurm.AllocationError, match="this is no Slurm job: SLURM_JOB_ID is not set; run the workflow with"):
        slurm.allocation()


def test_without_slurm_nothing_is_left_over_from_an_earlier_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.cancel_leftovers(tmp_path) == []


def test_detaching_from_a_process_that_is_gone_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_lifetime, "_BEAT_S", 0.05)
    process = subprocess.Popen(["head", "-n", "1"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    remote_lifetime.attach(process, Order(SECRET, BOOT_ID))
    process.wait(10)
    time.sleep(0.3)  # some beats
    remote_lifetime.detach(process)
