"""Trials with a network between worker and KV host: its bytes reconcile, its round trip shows, and one that dies is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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

pytestmark = [pytest.mark.alone, pytest.mark.usefixtures("own_run")]

ROOT = Path(__file__).resolve().parents[2]
LOOSE = {"rtt_ms": 100, "goodput": 10, "lateness_ms": 1000}  # other work runs beside these tests
DELAY_MS = 10.0
NETWORKS = {
    "far": {"kind": "relay", "delay_ms": DELAY_MS, "rate": "1Gbit", "tolerance": LOOSE},
    "near": {"kind": "relay", "rate": "1Gbit", "tolerance": LOOSE},
    "space": {"kind": "netns", "rate": "1Gbit", "tolerance": LOOSE},
    "kv_far": {"kind": "loopback", "kv": "far"},
    "both_relays": {"kind": "relay", "rate": "1Gbit", "tolerance": LOOSE, "kv": "far"},
    "two_spaces": {"kind": "netns", "tolerance": LOOSE, "kv": "space"},
    "space_and_relay": {"kind": "netns", "tolerance": LOOSE, "kv": "near"},
}
TRIALS = [("remote_cache_reload", "both_relays"), ("sys_delta", "kv_far")]
RUN_OVER = ["kv_far", "both_relays", "two_spaces", "space_and_relay"]


@pytest.fixture(scope="module")
def config(llama: Path) -> Config:
    """The default config's recovery modes over the tiny llama and networks with a link of the KV host."""
    raw = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    raw["define"]["models"], raw["models"] = {"tiny": load_digest(llama).source}, ["tiny"]
    evict = {"kind": "recovery", "prompt_lengths": [70], "steps": 4, "evict_fractions": [0, 1]}
    raw["define"]["phases"], raw["phases"] = {"recovery-evict": evict}, ["recovery-evict"]
    raw["define"]["networks"], raw["networks"] = NETWORKS, RUN_OVER
    raw["modes"] = ["remote_cache_reload", "sys_delta"]
    for mode in raw["modes"]:
        raw["define"]["modes"][mode] |= {"phases": ["recovery-evict"], "networks": RUN_OVER}
    raw |= {"max_length": 128, "device": "cpu", "probe": {"round_trips": 3, "payload_bytes": 1 << 20}}
    raw["telemetry"] = {"interval_s": 0.05, "sources": ["host"]}
    return check_config(raw, ROOT)


@pytest.fixture(scope="module")
def run(config: Config, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrialResult]:
    """The result of a mode's trial over a network, run once."""
    place, reference = Paths(llama, ROOT), tmp_path_factory.mktemp("reference") / "reference.npz"
    done: dict[tuple[str, str], TrialResult] = {}
    compute_reference(config.reference_cell("tiny", "recovery-evict"), place, reference)

    def run(mode: str, network: str) -> TrialResult:
        if (mode, network) not in done:
            done[mode, network] = measure_trial(config.cell(Coordinates("tiny", network, mode, "recovery-evict", 1)), place, reference)
        return done[mode, network]

    return run


def test_a_step_that_reloads_waits_for_a_round_trip_of_the_kv_hosts_link_and_the_client_for_none(run: Callable[..., TrialResult]) -> None:
    result = run("remote_cache_reload", "both_relays")
    rows = [row for row in result.tables["steps"].to_pylist() if row["measured"]]
    stalls_s = [row["stall_s"] for row in rows if row["evicted_layers"]]
    assert len(stalls_s) == 2 and min(stalls_s) > 2e-3 * DELAY_MS
    assert all(row["stall_s"] == 0 for row in rows if not row["evicted_layers"])
    assert result.manifest["probe"]["rtt_s"] < 1e-3 * DELAY_MS


@pytest.mark.parametrize(("mode", "network"), TRIALS)
def test_over_a_relay_to_the_kv_host_a_trial_keeps_its_tokens_and_every_byte(
    run: Callable[..., TrialResult], mode: str, network: str
) -> None:
    result = run(mode, network)
    exactness = result.manifest["exactness"]
    assert exactness["promise_kept"] and exactness["tokens_equal"] == exactness["tokens_compared"] == 5
    assert result.manifest["kv"]["fallbacks"] == [] and result.manifest["reconciliation"]["kv_host"]["agreed"]
    ours = [row for row in result.tables["ledger"].to_pylist() if row["side"] == "worker_to_kv_host" and row["link"] == "network"]
    (connection,) = result.manifest["network"]["kv"]["relay"]["connections"]
    up, down = (sum(row["payload_bytes"] + row["header_bytes"] for row in ours if row["direction"] == way) for way in ("up", "down"))
    assert connection["up"]["bytes_in"] == connection["up"]["bytes_out"] == connection["worker_tcp"]["bytes_sent"] == up > 2 << 20
    closing = connection["down"]["bytes_out"] - down  # the answer that closes the books is in nobody's rows
    assert connection["down"]["bytes_in"] == connection["down"]["bytes_out"] and 0 < closing < 10_000
    assert result.manifest["reconciliation"]["kv_host"]["kernel_bytes_received"] == down + closing


def test_each_relay_has_its_own_rows_and_report(run: Callable[..., TrialResult]) -> None:
    result = run("remote_cache_reload", "both_relays")
    network = result.manifest["network"]
    for side, link in (("relay", network), ("kv_relay", network["kv"])):
        rows = [row for row in result.tables["relay"].to_pylist() if row["side"] == side]
        (connection,) = link["relay"]["connections"]
        for way in ("up", "down"):
            moved = sum(row["bytes"] for row in rows if row["direction"] == way) + connection[way]["held_bytes"]
            assert moved == connection[way]["bytes_out"]
            assert link["relay"]["measured_lateness"][way]["sends"] > 0
    assert {"relay", "kv_relay"} <= set(result.tables["host"]["side"].to_pylist())
    assert network["relay"]["delay_ms"] == 0 and network["kv"]["relay"]["delay_ms"] == DELAY_MS


def test_the_manifest_holds_what_was_asked_of_the_kv_hosts_link_and_what_was_measured(run: Callable[..., TrialResult]) -> None:
    network = run("sys_delta", "kv_far").manifest["network"]
    assert network["relay"] is None and network["asked"] == {"rtt_s": None, "goodput_bytes_per_s": None}
    kv = network["kv"]
    assert kv["network"] == "far" and kv["asked"] == {"rtt_s": 2e-3 * DELAY_MS, "goodput_bytes_per_s": 125e6}
    assert set(kv["measured"]) == set(network["measured"]) and 2e-3 * DELAY_MS <= kv["measured"]["rtt_s"] < 4e-3 * DELAY_MS
    assert kv["probe"]["payload_bytes"] == 1 << 20


def test_a_relay_to_the_kv_host_that_ends_in_a_trial_is_named(run: Callable[..., TrialResult]) -> None:
    named = r"the relay of the link to the KV host \(network 'far'\) ended by itself \(exit -9\), and with it the client: "
    with relay_killed_once_connected(), pytest.raises(TrialError, match=named):
        run("remote_cache_reload", "kv_far")


@pytest.mark.parametrize("network", ["two_spaces", "space_and_relay"])
def test_namespaces_and_relays_go_together(run: Callable[..., TrialResult], network: str) -> None:
    try:
        with namespaces(Network("netns"), Network("netns")):
            pass
    except NetworkError as error:
        pytest.skip(str(error))
    result = run("sys_delta", network)
    assert result.manifest["exactness"]["promise_kept"] and result.manifest["reconciliation"]["kv_host"]["agreed"]
    kv = result.manifest["network"]["kv"]
    assert kv["network"] == NETWORKS[network]["kv"] and (kv["relay"] is not None) is (kv["network"] == "near")


def test_a_network_is_checked_with_the_link_of_its_kv_host(config: Config) -> None:
    cell = config.network_cell("kv_far")
    cell["kv_network_spec"] |= {"tolerance": LOOSE | {"rtt_ms": 1e-6}}
    with pytest.raises(TrialError, match=r"network 'kv_far': the link to the KV host \(network 'far'\): the link's round trip is 2\d\."):
        check_network(cell, ROOT)
