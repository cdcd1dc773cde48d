"""TLS in real processes: trials through relays and with an external worker, commands, and words where a side lacks it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import yaml

from semgap.client.remote_runtime import RemoteRuntime
from semgap.client.session import open_session
from semgap.client.spec import ClientSpec
from semgap.doctor import examine_worker
from semgap.engine.model_files import ModelFiles, load_digest
from semgap.experiment.check_network import check_network
from semgap.experiment.compute_reference import compute_reference
from semgap.experiment.config import Config, Coordinates, check_config
from semgap.experiment.measure_trial import measure_trial
from semgap.experiment.trial_setup import Paths, TrialError
from semgap.policy import Policy, Reply
from semgap.wire.frames import ClosedError
from semgap.wire.handshake import AuthError
from semgap.wire.link import RemoteError, connect
from semgap.wire.tcp import Timeouts

if TYPE_CHECKING:
    from started_workers import KVCluster, StartedWorker

pytestmark = [pytest.mark.alone, pytest.mark.usefixtures("own_run")]

ROOT = Path(__file__).resolve().parents[2]
LOOSE = {"rtt_ms": 100, "goodput": 100, "lateness_ms": 1000}  # other work runs beside these tests
NETWORKS = {
    "loopback": {"kind": "loopback"},
    "slow": {"kind": "relay", "delay_ms": 2, "rate": "1Gbit", "tolerance": LOOSE},
    "both_relays": {"kind": "relay", "rate": "1Gbit", "tolerance": LOOSE, "kv": "slow"},
}
PHASES = {
    "decode": {"kind": "decode", "prompt_lengths": [12], "requests": 2, "steps": 4},
    "recovery-evict": {"kind": "recovery", "prompt_lengths": [70], "steps": 4, "evict_fractions": [0, 1]},
}


def _config(llama: Path, **worker: Any) -> Config:
    raw = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    raw["define"]["models"], raw["models"] = {"tiny": load_digest(llama).source}, ["tiny"]
    raw["define"]["networks"], raw["networks"] = NETWORKS, ["loopback"] if "launch" in worker else list(NETWORKS)
    raw["define"]["phases"], raw["phases"] = PHASES, list(PHASES)
    chosen = {"remote_cache": "decode", "sys_delta": "recovery-evict"}
    raw["modes"] = list(chosen)
    raw["define"]["modes"] = {mode: raw["define"]["modes"][mode] | {"phases": [chosen[mode]], "networks": None} for mode in chosen}
    raw["define"]["modes"]["remote_cache"] |= {"weights": "by_hash"}
    raw |= {"max_length": 96, "device": "cpu", "probe": {"round_trips": 3, "payload_bytes": 1 << 22}}
    raw["telemetry"] = {"interval_s": 0.05, "sources": ["host"]}
    raw["worker"] = {"tls": True} | worker
    raw["exactness"] = {"prompts": 1, "prompt_length": 8, "tokens": 4}
    return check_config(raw, ROOT)


@pytest.fixture
def reference(llama: Path, tmp_path: Path) -> Callable[[str], Path]:
    def make(phase: str) -> Path:
        file = tmp_path / f"{phase}.npz"
        compute_reference(_config(llama).reference_cell("tiny", phase), Paths(llama, ROOT), file)
        return file

    return make


def test_trials_behind_relays_reconcile_on_every_link(llama: Path, reference: Callable[[str], Path]) -> None:
    config, place = _config(llama), Paths(llama, ROOT)
    check_network(config.network_cell("both_relays"), ROOT)
    at = Coordinates("tiny", "both_relays", "sys_delta", "recovery-evict", 1)
    result = measure_trial(config.cell(at), place, reference("recovery-evict"))
    said = result.manifest["reconciliation"]
    assert said["tls"] == said["kv_host"]["tls"] and said["tls"].startswith("TLSv1.3 ")
    assert result.manifest["cell"]["worker"]["tls"] and result.manifest["network"]["kv"]["relay"]["connections"]
    assert sum(row["fetched_network_bytes"] for row in result.tables["steps"].to_pylist()) > 0
    held = measure_trial(config.cell(Coordinates("tiny", "slow", "remote_cache", "decode", 2)), place, reference("decode"))
    assert held.manifest["setup"]["weights_held_before"]  # past the relay, in a session of its own


def test_an_external_worker_with_tls_serves_trials_and_without_it_says_so(
    llama: Path, reference: Callable[[str], Path], start_worker: Callable[..., StartedWorker]
) -> None:
    at, place, file = Coordinates("tiny", "loopback", "remote_cache", "decode", 1), Paths(llama, ROOT), reference("decode")
    for worker_has, client_has in ((True, True), (False, True), (True, False)):
        worker = start_worker(*(["--tls"] if worker_has else []))
        side = {"launch": "external", "address": worker.address, "secret_file": str(worker.secret_file), "tls": client_has}
        cell = _config(llama, **side).cell(at)
        if worker_has == client_has:
            assert measure_trial(cell, place, file).manifest["reconciliation"]["tls"]
            continue
        with pytest.raises(TrialError, match="start both with tls"):
            measure_trial(cell, place, file)
        assert "start both with tls" in worker.log.read_text()


def _semgap(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "semgap", *arguments], capture_output=True, text=True, timeout=60)


def test_ping_and_doctor_speak_tls_with_worker_and_kv_host(kv_cluster: KVCluster, llama: Path, tmp_path: Path) -> None:
    host = kv_cluster.host("--tls")
    worker = kv_cluster.worker(host.address, "--tls")
    secret = ["--secret-file", str(worker.secret_file)]
    found = _semgap("ping", worker.address, *secret, "--tls", "--kv", "--json", "--payload-bytes", "100000", "--round-trips", "3")
    assert json.loads(found.stdout)["kv"]["rtt_s"] > 0, found.stderr
    without = _semgap("ping", worker.address, *secret)
    assert without.returncode == 1 and without.stderr.count("\n") == 1 and "start both with tls" in without.stderr
    nobody = _semgap("ping", worker.address, "--tls")
    assert nobody.returncode == 1 and "TLS needs the shared secret" in nobody.stderr
    assert examine_worker(worker.address, worker.secret_file, tmp_path, None, tls=True)[0].meaning.startswith("TLSv1.3 ")
    assert "start both with tls" in examine_worker(worker.address, worker.secret_file, tmp_path, None)[0].meaning


@pytest.mark.parametrize("command", [["serve"], ["kvhost", "--budget-bytes", "1000000"]])
def test_a_side_that_is_to_speak_tls_without_a_secret_does_not_start(command: list[str]) -> None:
    done = _semgap(*command, "--tls")
    assert done.returncode == 1 and "TLS needs the shared secret" in done.stderr and "--secret-file" in done.stderr


def test_a_worker_whose_kv_host_speaks_no_tls_says_which_link_it_is(
    kv_cluster: KVCluster, llama: Path, client_spec: Callable[..., ClientSpec]
) -> None:
    worker = kv_cluster.worker(kv_cluster.host().address, "--tls")
    policy = Policy(reply=Reply("token"), recovery="delta", shadow="kvhost")
    spec = client_spec(llama, policy, worker, model_id="m", max_length=64)
    assert spec.worker is not None
    side = msgspec.structs.replace(spec.worker, tls=True)
    link = connect(worker.address, Timeouts(20.0, 20.0))
    open_session(link, spec, side)
    with pytest.raises(RemoteError, match="the KV host: one side of this connection speaks TLS"):
        RemoteRuntime(link, policy, ModelFiles(llama, load_digest(llama)), spec.drawing).upload_weights()
    link.close()


def test_clients_of_a_tls_worker_that_have_another_secret_or_leave_cost_the_next_one_nothing(
    llama: Path, start_worker: Callable[..., StartedWorker], client_spec: Callable[..., ClientSpec], tmp_path: Path
) -> None:
    worker = start_worker("--tls")
    other = tmp_path / "other"
    other.write_text("o" * 64)
    other.chmod(0o600)
    spec = client_spec(llama, Policy(), worker)
    assert spec.worker is not None
    right = msgspec.structs.replace(spec.worker, tls=True)
    for said in (b"", b"\x16\x03\x01\x02\x00\x01", b"\x16\x03\x01" + bytes(600), b"GET / HTTP/1.1\r\n\r\n" + bytes(40)):
        with worker.raw() as sock:
            sock.sendall(said)
    link = connect(worker.address)
    with pytest.raises(AuthError, match="does not hold this client's secret"):
        open_session(link, spec, msgspec.structs.replace(right, secret_file=str(other)))
    link.close()
    link = connect(worker.address, Timeouts(20.0, 20.0))
    open_session(link, spec, right)
    link.close()
    assert worker.process.poll() is None


def test_a_tls_client_hears_that_all_places_are_taken(
    llama: Path, start_worker: Callable[..., StartedWorker], client_spec: Callable[..., ClientSpec]
) -> None:
    worker = start_worker("--tls", "--max-sessions", "1")
    spec = client_spec(llama, Policy(), worker)
    assert spec.worker is not None
    side = msgspec.structs.replace(spec.worker, tls=True)
    first = connect(worker.address, Timeouts(20.0, 20.0))
    open_session(first, spec, side)
    second = connect(worker.address, Timeouts(20.0, 20.0))
    with pytest.raises((RemoteError, ClosedError)) as refused:
        open_session(second, spec, side)
    assert isinstance(refused.value, RemoteError) and refused.value.code == "busy"
    first.close()
    second.close()
