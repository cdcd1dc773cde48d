"""Trials over emulated networks: the link is what was asked for, its bytes reconcile, and one that is off fails the trial."""

from __future__ import annotations

import copy
import json
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from killed_relays import relay_killed_once_connected

from semgap.engine.model_files import load_digest
from semgap.experiment.check_network import check_network
from semgap.experiment.compute_reference import compute_reference
from semgap.experiment.config import Config, Coordinates, check_config
from semgap.experiment.measure_trial import measure_trial
from semgap.experiment.trial_schemas import TrialResult
from semgap.experiment.trial_setup import Paths, TrialError
from semgap.network.namespaces import namespaces
from semgap.network.spec import Network, NetworkError
from semgap.wire import frames

if TYPE_CHECKING:
    from started_workers import StartedWorker

pytestmark = [pytest.mark.alone, pytest.mark.usefixtures("own_run")]

ROOT = Path(__file__).resolve().parents[2]
LOOSE = {"rtt_ms": 100, "goodput": 10, "lateness_ms": 1000}  # other work runs beside these tests
DELAY_MS = 15.0
NETWORKS = {
    "loopback": {"kind": "loopback"},
    "far": {"kind": "relay", "delay_ms": DELAY_MS, "rate": "1Gbit", "tolerance": LOOSE},
    "space": {"kind": "netns", "rate": "1Gbit", "congestion": "reno", "tolerance": LOOSE},
}


@pytest.fixture(scope="module")
def config(llama: Path) -> Config:
    """The default config over the tiny llama and several networks."""
    raw = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    raw["define"]["models"], raw["models"] = {"tiny": load_digest(llama).source}, ["tiny"]
    decode = {"kind": "decode", "prompt_lengths": [10], "requests": 1, "steps": 4, "warmup_requests": 1}
    evict = {"kind": "recovery", "prompt_lengths": [10], "steps": 3, "evict_fractions": [1]}
    raw["define"]["phases"], raw["phases"] = {"decode": decode, "recovery-evict": evict}, ["decode", "recovery-evict"]
    raw["define"]["networks"], raw["networks"] = NETWORKS, list(NETWORKS)
    raw["modes"] = ["local", "remote_cache", "know_loop", "remote_cache_reload"]
    raw["define"]["modes"]["remote_cache_reload"] |= {"phases": ["recovery-evict"], "networks": None}
    raw |= {"max_length": 128, "device": "cpu", "probe": {"round_trips": 3, "payload_bytes": 4 << 20}}
    raw["telemetry"] = {"interval_s": 0.05, "sources": ["host"]}
    return check_config(raw, ROOT)


@pytest.fixture(scope="module")
def cell_of(config: Config) -> Callable[..., dict[str, Any]]:
    """The cell of a mode over a network; `more` replaces keys of the network's row."""

    def make(mode: str, network: str, phase: str = "decode", trial: int = 1, **more: Any) -> dict[str, Any]:
        cell = copy.deepcopy(config.cell(Coordinates("tiny", network, mode, phase, trial)))
        cell["network_spec"] |= more
        return cell

    return make


@pytest.fixture(scope="module")
def run(cell_of: Callable[..., dict[str, Any]], llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrialResult]:
    """The result of a cell's trial, run once."""
    place, done, references = Paths(llama, ROOT), {}, {}

    def run(mode: str, network: str, phase: str = "decode", **more: Any) -> TrialResult:
        if phase not in references:
            references[phase] = tmp_path_factory.mktemp("reference") / "reference.npz"
            compute_reference(cell_of("local", "loopback", phase), place, references[phase])
        key = json.dumps([mode, network, phase, more])
        if key not in done:
            done[key] = measure_trial(cell_of(mode, network, phase, **more), place, references[phase])
        return done[key]

    return run


def _itl_s(result: TrialResult) -> float:
    return median(row["latency_s"] for row in result.tables["steps"].to_pylist() if row["measured"])


def test_over_a_relay_each_step_of_remote_cache_takes_a_round_trip_longer(run: Callable[..., TrialResult]) -> None:
    longer_s = _itl_s(run("remote_cache", "far")) - _itl_s(run("remote_cache", "loopback"))
    assert 1.5e-3 * DELAY_MS < longer_s < 5e-3 * DELAY_MS


def test_over_a_relay_a_window_pays_one_round_trip_for_all_of_its_tokens(run: Callable[..., TrialResult]) -> None:
    steps = [row for row in run("know_loop", "far").tables["steps"].to_pylist() if row["measured"]]
    assert [row["round_trips"] for row in steps] == [1, 0, 0, 0]
    assert 1.8e-3 * DELAY_MS < sum(row["latency_s"] for row in steps) < 7e-3 * DELAY_MS  # not one a token


def test_the_relays_own_counts_agree_with_the_books_and_with_the_kernels_on_both_sides_of_it(run: Callable[..., TrialResult]) -> None:
    result = run("remote_cache", "far")
    books, (connection,) = result.manifest["reconciliation"], result.manifest["network"]["relay"]["connections"]
    assert books["agreed"] and connection["up"]["bytes_in"] == connection["up"]["bytes_out"] > books["kernel_bytes_sent"] > 4 << 20
    assert connection["down"]["bytes_in"] == connection["down"]["bytes_out"] >= books["kernel_bytes_received"]
    sent = connection["worker_tcp"]
    assert sent["bytes_sent"] - sent["bytes_retrans"] == connection["up"]["bytes_out"]
    rows = result.tables["relay"].to_pylist()
    for direction in ("up", "down"):
        assert (
            sum(row["bytes"] for row in rows if row["direction"] == direction) + connection[direction]["held_bytes"]
            == (connection[direction]["bytes_out"])
        )


def test_a_relays_lateness_and_cpu_time_are_recorded(run: Callable[..., TrialResult]) -> None:
    result = run("remote_cache", "far")
    relay = result.manifest["network"]["relay"]
    assert relay["cpu_s"] > 0 and all(relay["measured_lateness"][way]["sends"] >= 4 for way in ("up", "down"))
    assert "relay" in result.tables["host"]["side"].to_pylist()


def test_the_manifest_holds_what_was_asked_of_the_link_and_what_was_measured_cold_and_warm(run: Callable[..., TrialResult]) -> None:
    network = run("remote_cache", "far").manifest["network"]
    assert network["asked"] == {"rtt_s": 2e-3 * DELAY_MS, "goodput_bytes_per_s": 125e6}
    measured = network["measured"]
    assert set(measured) == {"rtt_s", *(f"{name}_bytes_per_s" for name in ("goodput_up", "goodput_down", "cold_up", "cold_down"))}
    assert 2e-3 * DELAY_MS <= measured["rtt_s"] < 3e-3 * DELAY_MS and measured["cold_up_bytes_per_s"] > 0


def test_past_the_first_trial_behind_a_relay_the_worker_holds_the_weights_and_the_manifest_says_so(run: Callable[..., TrialResult]) -> None:
    first, second = (run("remote_cache", "far", trial=trial) for trial in (1, 2))
    held = [trial.manifest["setup"]["weights_held_before"] for trial in (first, second)]
    sent = [trial.manifest["setup"]["weights_bytes"] for trial in (first, second)]
    assert held == [False, True] and sent[0] > 0 == sent[1]
    assert second.manifest["setup"]["weights_held_bytes"] == sent[0]
    near = run("remote_cache", "loopback", trial=2)
    assert not near.manifest["setup"]["weights_held_before"] and near.manifest["setup"]["weights_bytes"] == sent[0]
    regular = [trial.manifest["reconciliation"]["frame_bytes_by_kind"]["regular"] for trial in (first, second)]
    assert regular[0] == regular[1] > 0 and second.manifest["reconciliation"]["agreed"]


def test_without_a_relay_nothing_of_one_is_there(run: Callable[..., TrialResult]) -> None:
    result = run("remote_cache", "loopback")
    assert result.manifest["network"]["relay"] is None and result.tables["relay"].num_rows == 0
    assert set(result.tables["host"]["side"].to_pylist()) == {"client", "worker"}
    assert run("local", "far").manifest["network"] is None


def test_a_kv_host_is_beside_its_worker_and_not_behind_the_network(run: Callable[..., TrialResult]) -> None:
    result = run("remote_cache_reload", "far", "recovery-evict")
    steps = [row for row in result.tables["steps"].to_pylist() if row["measured"]]
    assert all(row["recovery"] == "reload" and row["fetched_network_bytes"] > 0 for row in steps)
    assert median(row["stall_s"] for row in steps) < 1e-3 * DELAY_MS


@pytest.mark.parametrize(
    ("tolerance", "fault"),
    [
        ({"rtt_ms": 0.001}, "network 'far': the link's round trip is "),
        ({"goodput": 1e-9}, "network 'far': the link's goodput up is "),
        ({"lateness_ms": 1e-4}, "network 'far': the relay was late: of "),
    ],
)
def test_a_trial_whose_link_is_off_its_tolerance_is_measured_again_twice_and_then_kept_apart(
    run: Callable[..., TrialResult], tolerance: dict[str, float], fault: str
) -> None:
    result = run("remote_cache", "far", tolerance=LOOSE | tolerance)
    faults = [*result.manifest["earlier_faults"], result.manifest["apart"]]
    assert len(faults) == 3 and all(each.startswith(fault) and "tolerance" in each for each in faults)
    assert result.tables["steps"].num_rows > 0


def test_a_trial_whose_link_is_within_its_tolerance_is_measured_once(run: Callable[..., TrialResult]) -> None:
    manifest = run("remote_cache", "far").manifest
    assert manifest["apart"] is None and manifest["earlier_faults"] == [] and manifest["steal_share"] is not None


def test_a_relay_that_ends_in_a_trial_is_named(run: Callable[..., TrialResult]) -> None:
    named = r"the relay of network 'far' ended by itself \(exit -9\), and with it the client: "
    with relay_killed_once_connected(), pytest.raises(TrialError, match=named):
        run("remote_cache", "far", tolerance=LOOSE | {"rtt_ms": 101})


def _netns_reason() -> str | None:
    try:
        with namespaces(Network("netns")):
            return None
    except NetworkError as error:
        return str(error)


def test_a_trial_runs_between_two_namespaces_with_the_congestion_control_that_was_asked_for(run: Callable[..., TrialResult]) -> None:
    reason = _netns_reason()
    if reason:
        pytest.skip(reason)
    result = run("remote_cache", "space")
    assert {row["congestion"] for row in result.tables["tcp"].to_pylist()} == {"reno"}
    assert result.manifest["reconciliation"]["agreed"] and result.manifest["exactness"]["promise_kept"]
    network = result.manifest["network"]
    assert network["relay"] is None and network["asked"]["goodput_bytes_per_s"] == pytest.approx(125e6 * 1448 / 1514)
    assert run("remote_cache_reload", "space", "recovery-evict").manifest["exactness"]["promise_kept"]


def test_a_network_that_the_kernel_lacks_something_for_is_refused_by_name(run: Callable[..., TrialResult]) -> None:
    reason = _netns_reason()
    if reason:
        pytest.skip(reason)
    try:
        fault = run("remote_cache", "space", delay_ms=5, tolerance=LOOSE | {"rtt_ms": 1e-6}).manifest["apart"]  # this kernel has netem
    except TrialError as error:
        fault = str(error)
    assert re.match(r"network 'space': .*(the kernel's netem|round trip is)", fault)


@pytest.fixture(scope="module")
def network_cell(config: Config) -> Callable[..., dict[str, Any]]:
    """The cell of a network's check; `more` replaces keys of its row."""

    def make(network: str, worker: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        cell = copy.deepcopy(config.network_cell(network))
        cell["network_spec"] |= more
        cell["worker"] |= worker or {}
        return cell

    return make


def test_a_network_that_can_be_had_passes_its_check_with_what_was_measured(network_cell: Callable[..., dict[str, Any]]) -> None:
    found = check_network(network_cell("far"), ROOT)
    assert found["network"] == "far" and found["asked"] == {"rtt_s": 2e-3 * DELAY_MS, "goodput_bytes_per_s": 125e6}
    assert found["measured"]["rtt_s"] >= 2e-3 * DELAY_MS


def test_a_rate_that_this_machine_cannot_make_fails_the_check_with_the_one_that_it_can(network_cell: Callable[..., dict[str, Any]]) -> None:
    impossible = network_cell("far", delay_ms=None, rate="100Gbit", tolerance={"rtt_ms": 100, "goodput": 0.5, "lateness_ms": 100})
    with pytest.raises(
        TrialError, match=r"network 'far': the link's goodput up is [\d.e+]+ [GM]bit/s, the config asks for 100 Gbit/s \(100Gbit"
    ):
        check_network(impossible, ROOT)


def test_a_host_that_does_not_answer_fails_the_check_by_its_address(network_cell: Callable[..., dict[str, Any]]) -> None:
    nobody = network_cell("loopback", {"launch": "external", "address": "127.0.0.1:1"}, kind="hosts")
    with pytest.raises(TrialError, match=r"network 'loopback': semgap ping: no worker answers at 127.0.0.1:1: .*refused"):
        check_network(nobody, ROOT)


def test_a_congestion_control_that_is_not_there_fails_the_check_with_those_that_are(network_cell: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(TrialError, match=r"network 'far': congestion control 'vegasx' is not available: .*; available: .*(cubic|reno)"):
        check_network(network_cell("far", congestion="vegasx"), ROOT)


def test_an_external_worker_of_other_threads_fails_the_check_with_the_way_out(
    network_cell: Callable[..., dict[str, Any]], start_worker: Callable[..., StartedWorker]
) -> None:
    worker = start_worker("--threads", "2")
    settings = {"launch": "external", "address": worker.address, "secret_file": str(worker.secret_file)}
    with pytest.raises(
        TrialError, match=r"network 'loopback': the worker at \S+ runs 2 threads, the config says .*; start it with --threads 1"
    ):
        check_network(network_cell("loopback", settings, kind="hosts"), ROOT)


def test_a_host_that_takes_connections_and_says_nothing_fails_the_check_by_its_address(network_cell: Callable[..., dict[str, Any]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        cell = network_cell("loopback", {"launch": "external", "address": address}, kind="hosts")
        cell["timeouts"] |= {"trial_s": 1}
        with pytest.raises(TrialError, match=f"its probe took longer than timeouts.trial_s 1 s: what listens at {address} does not answer"):
            check_network(cell, ROOT)


def test_a_worker_of_another_version_fails_the_check_by_both_versions(network_cell: Callable[..., dict[str, Any]]) -> None:
    """A peer whose answers have the next version's number in their prefix."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            client, _ = listener.accept()
            with client:
                prefix = bytearray(client.recv(4096)[: frames.PREFIX_BYTES])
                prefix[2] = frames.VERSION + 1
                client.sendall(prefix)
                client.recv(4096)

        thread = threading.Thread(target=answer)
        thread.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        cell = network_cell("loopback", {"launch": "external", "address": address}, kind="hosts")
        said = f"peer speaks wire version {frames.VERSION + 1}, this side {frames.VERSION}; install the same semgap"
        with pytest.raises(TrialError, match=said):
            check_network(cell, ROOT)
        thread.join(10)
