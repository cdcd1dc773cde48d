"""Prices of recovery phases over other links to the KV host, on restores simulated block by block over simulated links."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from simulated_links import Link, Network
from written_trials import LAYERS, RAW, Pressed, Trial, results, results_of, written

from semgap import cli, policy
from semgap.analysis.collect_trials import with_directories
from semgap.analysis.link_grid import LinkGrid
from semgap.analysis.restores import CHOOSES, CHOSEN, HIDDEN, METRIC, OVERLAP_FROM_S, UNTIMED, _places, restores_over
from semgap.analysis.results import Results
from semgap.analysis.tables import price
from semgap.client.pressure import layers_to_evict
from semgap.kv import restoring

NEAR = Network("near", 20e-6, 40e9)
FAR = (Network("1gbit", 0.5e-3, 1e9), Network("500mbit", 1e-3, 5e8), Network("200mbit", 2.5e-3, 2e8))
FRACTIONS = (0.0, 0.125, 0.5, 1.0)
LAYER_S, SHARE, SOFTWARE_S, LAYER_BYTES = 1e-3, 0.8, 0.2e-3, 150_000


def waited(how: str, fraction: float, step: int, link: Link, at_s: float, alone: bool = False) -> tuple[float, int]:
    """Seconds without compute of a step, or of its restore alone, and the bytes fetched: layer by layer, as they come."""
    count = round(fraction * LAYERS)
    missing = sorted((step + index * LAYERS // count) % LAYERS for index in range(count))
    wanted = list(range(LAYERS)) if how == "reload" and missing else missing
    asked_s, received_s, here_s = link.up.carry(at_s, 100), at_s, {}
    for layer in wanted:
        received_s = max(received_s, link.down.carry(asked_s, LAYER_BYTES)) + SOFTWARE_S
        here_s[layer] = received_s
    if how == "reload" or alone or received_s - at_s < 1.5e-3:  # so short a fetch runs before its step
        return received_s - at_s, len(wanted) * LAYER_BYTES
    now_s = at_s
    for layer in range(LAYERS):
        now_s = max(now_s, here_s.get(layer, now_s)) + LAYER_S
    return now_s - at_s - LAYERS * LAYER_S, len(wanted) * LAYER_BYTES


def recovering(how: str, network: Network, trial: int) -> Trial:
    """Steps of each fraction, two of whose restores also ran alone. Compute is the layers' and the head's."""
    dice = np.random.default_rng([trial, *network.name.encode()])
    link = Link(network, dice)
    probe, steps, rows = link.probe(1.0), [], []
    computed_s = LAYERS * LAYER_S / SHARE
    for step in range(1, 25):
        fraction, alone = FRACTIONS[step % 4], how == "delta" and step % 8 < 4 and step % 4 > 0
        alone_s = waited(how, fraction, step, link, 200.0 + step, alone=True)[0] if alone else None
        stall_s, fetched = waited(how, fraction, step, link, 200.5 + step) if fraction else (0.0, 0)
        steps.append(Pressed(computed_s + stall_s + 5e-4, fraction, how if fraction else None, stall_s, alone_s, fetched=fetched))
        rows.append({"worker_compute_s": computed_s + stall_s, "step": step, "round_trips": 1})
    mode = {"reload": "remote_cache", "delta": "sys"}[how]
    return Trial(
        mode,
        "recovery-evict",
        trial,
        tuple(step.latency_s for step in steps),
        pressed=tuple(steps),
        rows=tuple(rows),
        recovery=how,
        network=f"kv_{network.name}",
        network_spec={"kind": "loopback", "kv": network.name},
        kv_network_spec=network.spec,
        kv_probe=probe,
        control_s=((computed_s,) * len(steps),),
    )


def every(*networks: Network) -> list[Trial]:
    return [recovering(how, network, trial) for trial in (1, 2) for network in networks for how in ("reload", "delta")]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results(tmp_path_factory.mktemp("measured"), *every(NEAR, *FAR))


def test_each_link_to_the_kv_host_is_priced_from_those_that_are_no_slower(measured: Results) -> None:
    held = measured.restores_held_out
    assert len(held) == 2 * 3 * 4
    priced = held[held["network"] != "kv_near"]
    assert (priced["gap_error_s"].abs() < 4e-4).all(), priced[["mode", "network", "evict_fraction", "measured_s", "gap_error_s"]]
    waits = priced[priced["measured_s"] > 1e-3]
    assert (waits["gap_error"] * waits["measured_s"] - waits["gap_error_s"]).abs().max() < 1e-12
    assert waits["gap_error"].abs().max() < 0.1 and priced["gap_error"].isna().sum() == len(priced) - len(waits) > 0
    assert set(priced.loc[priced["network"] == "kv_500mbit", "from_networks"]) == {"kv_near, kv_1gbit"}
    fastest = held[held["network"] == "kv_near"]
    assert fastest["priced_s"].isna().all() and set(fastest["reason"]) == {HIDDEN}


def test_what_delta_hides_behind_compute_is_not_priced_as_a_wait(measured: Results) -> None:
    held = measured.restores_held_out.query("network == 'kv_1gbit'").set_index(["mode", "evict_fraction"])
    assert held.loc[("sys", 0.125), "priced_s"] < 0.35 * held.loc[("remote_cache", 0.125), "priced_s"]
    assert held.loc[("sys", 1.0), "priced_s"] == pytest.approx(held.loc[("sys", 1.0), "measured_s"], rel=0.1)


def test_the_table_of_errors_has_a_row_for_each_mode_and_one_for_all(measured: Results) -> None:
    rows = price.table(measured).query("metric == @METRIC").set_index("mode")
    assert METRIC in set(rows["metric"]) and set(rows.index) == {"remote_cache", "sys", price.ALL_REMOTE}
    assert rows.loc[price.ALL_REMOTE, "median_gap_error"] < 0.1
    assert rows.loc[price.ALL_REMOTE, "cells"] == 18 and rows.loc[price.ALL_REMOTE, "worst_gap_error_s"] < 4e-4


def test_errors_are_seconds_since_a_wait_may_be_hidden_to_nothing(measured: Results) -> None:
    held = measured.restores_held_out.dropna(subset=["priced_s"])
    assert held["measured_s"].min() < 1e-6 and price.table(measured).query("metric == @METRIC")["worst_error"].isna().all()
    grids = (LinkGrid.parsed("20ms", "1Gbit"), LinkGrid.parsed("2ms", "1Gbit"))
    told = restores_over(measured.restores, measured.restores_held_out, *grids).set_index(["mode", "evict_fraction"])
    assert told.loc[("sys", 0.125), "wait_model_error_ms"] < 0.4


def test_without_a_restore_that_ran_alone_there_is_no_price_and_that_is_why(tmp_path: Path) -> None:
    def never_alone(trial: Trial) -> Trial:
        return replace(trial, pressed=tuple(replace(step, alone_s=None) for step in trial.pressed))

    found = results(tmp_path, *(never_alone(recovering("delta", network, 1)) for network in (NEAR, FAR[0])))
    held = found.restores_held_out
    assert len(held) == 2 * 3 and held["priced_s"].isna().all() and set(held["reason"]) == {UNTIMED}
    over = restores_over(found.restores, held, LinkGrid.parsed("20ms", "1Gbit"), LinkGrid.parsed("1ms,50ms", "1Gbit"))
    waits = over[over["evict_fraction"] > 0]
    assert waits["wait_ms"].isna().all() and set(waits["wait_ms_reason"]) == set(waits["itl_ms_reason"]) == {UNTIMED}
    assert (over.loc[over["evict_fraction"] == 0, "wait_ms"] == 0).all()


def test_a_mode_that_chose_its_codecs_by_the_link_has_no_price_over_another_one_and_that_is_why(tmp_path: Path) -> None:
    chose = [replace(trial, codec=RAW | {"kv": "auto"}) for trial in every(NEAR, FAR[0]) if trial.recovery == "delta"]
    found = results(tmp_path, *chose, *(trial for trial in every(NEAR, FAR[0]) if trial.recovery == "reload"))
    held = found.restores_held_out
    own, others = held[held["mode"] == "sys"], held[held["mode"] != "sys"]
    assert own["priced_s"].isna().all() and set(own["reason"]) == {CHOSEN} and others["priced_s"].notna().any()
    over = (
        restores_over(found.restores, held, LinkGrid.parsed("20ms", "1Gbit"), LinkGrid.parsed("1ms", "1Gbit")).set_index("mode").loc["sys"]
    )
    waits = over[over["evict_fraction"] > 0]
    assert waits["wait_ms"].isna().all() and set(waits["wait_ms_reason"]) == set(waits["itl_ms_reason"]) == {CHOSEN}
    assert (over.loc[over["evict_fraction"] == 0, "wait_ms"] == 0).all()


def test_one_network_whose_restores_ran_alone_prices_the_others(tmp_path: Path) -> None:
    far = recovering("delta", FAR[0], 1)
    without = replace(far, pressed=tuple(replace(step, alone_s=None) for step in far.pressed))
    held = results(tmp_path, recovering("delta", NEAR, 1), without).restores_held_out.set_index("network")
    assert (held.loc["kv_1gbit", "gap_error_s"].abs() < 4e-4).all() and set(held.loc["kv_near", "reason"]) == {UNTIMED}


def test_blocks_kept_beside_the_worker_cross_no_link_and_have_no_price(tmp_path: Path) -> None:
    beside = [replace(trial, shadow="worker", kv_probe=None) for trial in every(NEAR, FAR[0])]
    unprobed = replace(recovering("delta", FAR[1], 1), kv_probe=None)
    made = results(tmp_path, *beside, unprobed)
    assert made.restores.empty and price.table(made).query("metric == @METRIC").empty


def test_a_probe_that_was_twice_as_fast_as_the_steps_link_shows_in_the_errors(tmp_path: Path) -> None:
    trials = every(NEAR, FAR[0])
    wrong = [
        Trial(**{**vars(trial), "kv_probe": {**trial.kv_probe, "goodput_down_bytes_per_s": 2 * trial.kv_probe["goodput_down_bytes_per_s"]}})
        if trial.kv_probe and trial.network == "kv_1gbit"
        else trial
        for trial in trials
    ]
    held = results(tmp_path, *wrong).restores_held_out.query("network == 'kv_1gbit' and mode == 'remote_cache'")
    assert (held["gap_error_s"].abs() / held["measured_s"]).min() > 0.3


def test_one_network_has_no_error_and_says_why(tmp_path: Path) -> None:
    held = results(tmp_path, *every(NEAR)).restores_held_out
    assert held["priced_s"].isna().all() and set(held["reason"]) == {"one network was run: no other one to price it from"}


def test_a_price_over_two_links_is_the_wait_and_the_step_over_both(tmp_path: Path) -> None:
    recorded = results(tmp_path, *every(NEAR))
    table = restores_over(
        recorded.restores, recorded.restores_held_out, LinkGrid.parsed("20ms", "1Gbit"), LinkGrid.parsed("1ms,5ms", "1Gbit")
    )
    rows = table.set_index(["kv_rtt", "mode", "evict_fraction"])
    measured_s, _ = waited("reload", 0.5, 3, Link(Network("x", 0.5e-3, 1e9), np.random.default_rng(1)), 10.0)
    near, far = rows.loc[("1ms", "remote_cache", 0.5)], rows.loc[("5ms", "remote_cache", 0.5)]
    assert near["wait_ms"] == pytest.approx(1e3 * measured_s, rel=0.05)
    assert far["wait_ms"] - near["wait_ms"] == pytest.approx(4, abs=0.1)
    assert near["itl_ms"] == pytest.approx(near["wait_ms"] + 1e3 * LAYERS * LAYER_S / SHARE + 20 + 1.5, abs=1.5)
    assert rows.loc[("1ms", "sys", 0.0), "wait_ms"] == 0 and rows.loc[("1ms", "sys", 0.0), "trials"] == 2


def test_the_command_prices_recovery_phases_over_a_named_kv_link_and_refuses_half_of_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = results_of(written(tmp_path / "trials", *every(NEAR)))
    directories = [str(manifest.parent) for manifest in tmp_path.rglob("manifest.json")]
    with_directories(found.rows, directories, tmp_path).to_csv(tmp_path / "results.csv", index=False)
    arguments = ["price", str(tmp_path), "--as-recorded", "--rtt", "1ms", "--rate", "1Gbit"]
    assert cli.main([*arguments, "--kv-rtt", "2ms"]) == 1
    assert "give both, or neither" in capsys.readouterr().err
    assert cli.main(arguments) == 1
    assert "take --kv-rtt and --kv-rate" in capsys.readouterr().err
    assert cli.main([*arguments, "--kv-rtt", "2ms", "--kv-rate", "1Gbit"]) == 0
    printed = capsys.readouterr().out
    assert "### Recovery, priced" in printed and "kv rtt 2ms" in printed


def test_steps_that_restored_otherwise_are_left_out(tmp_path: Path) -> None:
    trial = recovering("delta", NEAR, 1)
    fell = tuple(Pressed(**{**vars(step), "fallback": "gone"}) if index == 3 else step for index, step in enumerate(trial.pressed))
    made = results(tmp_path, Trial(**{**vars(trial), "pressed": fell})).restores
    assert isinstance(made, pd.DataFrame) and 4 not in set(made["step"])


def test_prices_know_the_limit_and_the_layers_of_the_code_that_restores() -> None:
    """analysis imports neither: it reads results where semgap's engine is not installed."""
    assert {"cpu": restoring.OVERLAP_FROM_S, "cuda": restoring.OVERLAP_FROM_ON_GPU_S} == OVERLAP_FROM_S
    assert policy.AUTO == CHOOSES
    for layers, fraction, step in itertools.product((2, 7, 30), (0.125, 0.5, 1.0), range(9)):
        evicted = layers_to_evict(layers, fraction, step)
        assert _places(layers, len(evicted), step).tolist() == evicted
