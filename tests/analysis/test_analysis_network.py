"""The tables network and price, their figure and `semgap price`, on trials over links simulated packet by packet."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from figure_texts import texts, unreadable_texts
from simulated_links import PROBED, Network, Traffic, simulated
from written_trials import Pressed, Trial, pressed, reseal, results, results_of, written

from semgap import cli
from semgap.analysis.collect_trials import with_directories
from semgap.analysis.figures import network as network_figure
from semgap.analysis.links import LinkModel
from semgap.analysis.price import _Errors
from semgap.analysis.price import price as prices
from semgap.analysis.results import Results
from semgap.analysis.stats import Interval
from semgap.analysis.tables import network
from semgap.analysis.tables import price as price_errors
from semgap.analysis.tables.price import ALL_REMOTE

LOCAL = Traffic("local", 0, 0)
REMOTE_CACHE = Traffic("remote_cache", 60, 196_700)
NAIVE = Traffic("naive", 5_000_000, 700_000)
SYS = Traffic("sys", 50, 30, window=32)
AHEAD = Traffic("sys_ahead", 50, 30, window=32, ahead=True)
COALESCED = Traffic("know_loop_coalesced", 50, 46, window=16, coalesce=8)
MODES = (LOCAL, REMOTE_CACHE, NAIVE, SYS, COALESCED)
LOOPBACK = Network("loopback", 20e-6, 12e9)
NETWORKS = tuple(Network(f"{rtt_ms:g}ms-{mbit:g}Mbit", rtt_ms / 2e3, mbit * 1e6) for rtt_ms in (0.2, 10) for mbit in (100, 1000))
COMPUTE_S = 0.006


def every(networks: tuple[Network, ...], modes: tuple[Traffic, ...] = MODES, trials: int = 2) -> list[Trial]:
    """Every mode over every network."""
    return [simulated(mode, at, trial, COMPUTE_S) for trial in range(1, trials + 1) for at in networks for mode in modes]


def swept(root: Path, networks: tuple[Network, ...], modes: tuple[Traffic, ...] = MODES, trials: int = 2) -> Results:
    return results(root, *every(networks, modes, trials))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return swept(tmp_path_factory.mktemp("sweep"), NETWORKS)


@pytest.fixture(scope="module")
def table(sweep: Results) -> pd.DataFrame:
    return network.table(sweep)


@pytest.fixture(scope="module")
def loopback(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return swept(tmp_path_factory.mktemp("loopback"), (LOOPBACK,))


def test_only_compute_is_fitted_and_the_model_explains_every_cell(table: pd.DataFrame) -> None:
    assert len(table) == 2 * len(NETWORKS) * len(MODES)
    expected_ms = table["metric"].map({"ITL": 1e3 * COMPUTE_S, "TTFT": 10e3 * COMPUTE_S})
    assert (table["compute_ms"] / expected_ms - 1).abs().max() < 0.01
    assert table["residual"].abs().max() < 0.01
    assert (table["fitted_ms"] - table["compute_ms"] - table["link_ms"]).abs().max() < 1e-9


def test_a_cell_has_its_configured_and_its_measured_network(table: pd.DataFrame) -> None:
    own = table.query("mode == 'remote_cache' and network == '10ms-100Mbit'").set_index("metric")
    cell = own.loc["ITL"]
    assert (cell["network_kind"], cell["asked_rtt_ms"], cell["asked_rate_mbit_per_s"], cell["trials"]) == ("relay", 10, 100, 2)
    assert cell["rtt_ms"] == pytest.approx(10.03, abs=0.03)
    assert cell["goodput_up_mbit_per_s"] == pytest.approx(100, rel=0.01)
    assert cell["latency_ms"] == pytest.approx(6 + 10 + 196_700 * 8 / 100e3, rel=0.01)
    assert cell["latency_ms_low"] < cell["latency_ms"] < cell["latency_ms_high"]
    assert own.loc["TTFT", "latency_ms"] == pytest.approx(60 + 10 + 196_700 * 8 / 100e3, rel=0.01)
    assert cell["ratio_to_local"] == pytest.approx(cell["latency_ms"] / 6, rel=0.01)
    assert (cell["round_trips_per_token"], cell["up_payload_bytes_per_token"], cell["down_payload_bytes_per_token"]) == (1, 60, 196_700)


def test_a_window_pays_its_round_trip_once_and_sends_while_it_computes(table: pd.DataFrame) -> None:
    of_mode = table.query("network == '10ms-1000Mbit' and of_phase").set_index("mode")
    assert of_mode.loc["sys", "link_ms"] == pytest.approx(10 / 32, rel=0.01)
    assert of_mode.loc["know_loop_coalesced", "link_ms"] == pytest.approx(10 / 16, rel=0.01)
    assert of_mode.loc["sys", "ratio_to_local"] == pytest.approx((6 + 10 / 32) / 6, rel=0.01)


def test_each_network_is_priced_from_the_others_alone(table: pd.DataFrame) -> None:
    assert table["price_error"].abs().max() < 0.01
    cell = table.query("mode == 'sys' and network == '0.2ms-100Mbit'").iloc[0]
    assert cell["priced_from"] == ", ".join(at.name for at in NETWORKS if at.name != "0.2ms-100Mbit")


@pytest.mark.parametrize("rtt_ms", [10, 50, 400])
def test_windows_sent_for_ahead_hide_as_much_of_the_link_as_they_compute(tmp_path: Path, rtt_ms: int) -> None:
    """A window of 32 computes 192 ms: all but the first of 5 hide 10 and 50 ms of link, and part of 400 ms."""
    at = Network("far", rtt_ms / 2e3, 1e9)
    far = results(tmp_path / "far", *(simulated(AHEAD, at, trial, COMPUTE_S, steps=160) for trial in (1, 2)))
    near = results(tmp_path / "near", *(simulated(AHEAD, LOOPBACK, trial, COMPUTE_S, steps=160) for trial in (1, 2)))
    measured, recorded = itl(far).iloc[0], itl(near).iloc[0]
    assert recorded["compute_ms"] == pytest.approx(1e3 * COMPUTE_S, rel=0.01)
    assert measured["compute_ms"] == pytest.approx(1e3 * COMPUTE_S, rel=0.01)
    assert measured["latency_ms"] == pytest.approx(6 + (rtt_ms + 4 * max(0, rtt_ms - 31 * 6)) / 160, rel=0.01)
    priced = prices(near, LinkModel.parsed(f"{rtt_ms}ms", "1Gbit")).iloc[0]
    assert priced["itl_ms"] == pytest.approx(measured["latency_ms"], rel=0.01)
    assert priced["tokens_per_s"] == pytest.approx(far.rows["tokens_per_s"].mean(), rel=0.01)
    back = prices(far, LinkModel.parsed("40us", "12Gbit")).iloc[0]
    assert back["itl_ms"] == pytest.approx(recorded["latency_ms"], rel=0.01)


def test_a_network_that_is_unlike_the_model_shows_in_its_errors(tmp_path: Path) -> None:
    """The probe was twice as fast as the steps' link."""
    first, second = NETWORKS[0], NETWORKS[2]
    trials = [simulated(REMOTE_CACHE, at, trial, COMPUTE_S) for trial in (1, 2) for at in (first, second)]
    probes = [trial.probe | {"goodput_down_bytes_per_s": 2 * trial.probe["goodput_down_bytes_per_s"]} for trial in trials]
    wrong = [
        Trial(**{**vars(trial), "probe": probe}) if trial.network == second.name else trial
        for trial, probe in zip(trials, probes, strict=True)
    ]
    found = results(tmp_path, *wrong)
    cell = itl(found).query(f"network == '{second.name}'").iloc[0]
    missing_ms, whole_ms = 196_700 * 8 / 100e3 / 2, 6 + 10 + 196_700 * 8 / 100e3
    assert cell["price_error"] == pytest.approx(-missing_ms / whole_ms, abs=0.01)
    errors = price_errors.table(found).query(f"mode == '{ALL_REMOTE}' and metric == 'ITL'").iloc[0]
    assert errors["worst_error"] >= errors["median_error"] > 0.1


def test_compute_that_differs_is_no_error_of_the_gap(tmp_path: Path) -> None:
    """Over the second network the worker measured 9 ms of compute instead of 6."""
    first, second = NETWORKS[0], NETWORKS[2]
    gap_ms = 10 + 196_700 * 8 / 100e3
    found = results(tmp_path, *(clocked(at, compute_s) for at, compute_s in ((first, COMPUTE_S), (second, 1.5 * COMPUTE_S))))
    cell = itl(found).query(f"network == '{second.name}'").iloc[0]
    assert cell["price_error"] == pytest.approx(-3 / (9 + gap_ms), abs=0.005)
    assert (cell["gap_ms"], cell["gap_priced_ms"]) == (pytest.approx(gap_ms, rel=0.01), pytest.approx(gap_ms, rel=0.01))
    assert cell["gap_error"] == pytest.approx(0, abs=0.01)
    errors = price_errors.table(found).query("mode == 'remote_cache' and metric == 'ITL'").iloc[0]
    assert errors["worst_gap_error_s"] < 2e-4 and errors["worst_error"] > 0.05


def test_an_error_of_the_link_shows_whole_in_the_gap(tmp_path: Path) -> None:
    """The second network's probe found twice the rate: the gap is priced too low by half of the transfer."""
    first, second = NETWORKS[0], NETWORKS[2]
    trial = clocked(second, COMPUTE_S)
    wrong = dataclasses.replace(trial, probe=trial.probe | {"goodput_down_bytes_per_s": 2 * trial.probe["goodput_down_bytes_per_s"]})
    cell = itl(results(tmp_path, clocked(first, COMPUTE_S), wrong)).query(f"network == '{second.name}'").iloc[0]
    transfer_ms = 196_700 * 8 / 100e3
    assert cell["gap_error"] == pytest.approx(-transfer_ms / 2 / (10 + transfer_ms), abs=0.01)
    assert cell["nominal_error"] == pytest.approx(0, abs=0.06), "by round trip and rate of the config the probe plays no part"
    assert cell["gap_nominal_ms"] == pytest.approx(10 + transfer_ms, rel=0.06)


def test_of_two_networks_with_equal_errors_the_first_is_named(tmp_path: Path) -> None:
    """Each is priced from the other, so both errors are equal but for the last bits."""
    first, second = NETWORKS[0], NETWORKS[2]
    for order in ((first, second), (second, first)):
        own = tmp_path / order[0].name
        trials = (
            dataclasses.replace(clocked(at, COMPUTE_S), probe=simulated(REMOTE_CACHE, at, 1, COMPUTE_S).probe | {"rtt_s": 0.003})
            for at in order
        )
        errors = price_errors.table(results(own, *trials)).query("mode == 'remote_cache' and metric == 'ITL'").iloc[0]
        assert errors["worst_gap_error_s"] == pytest.approx(errors["median_gap_error_s"]) and errors["worst_gap_error_s"] > 1e-3
        assert errors["worst_network"] == order[0].name


def clocked(at: Network, compute_s: float) -> Trial:
    """A trial whose worker's clock shows its compute."""
    trial = simulated(REMOTE_CACHE, at, 1, compute_s)
    return dataclasses.replace(trial, rows=tuple({**row, "worker_compute_s": compute_s} for row in trial.rows))


def itl(found: Results) -> pd.DataFrame:
    table = network.table(found)
    return table[table["metric"] == "ITL"]


def test_errors_are_medians_and_worsts_over_cells_without_local(sweep: Results, table: pd.DataFrame) -> None:
    cells, errors = table[table["metric"] == "ITL"], price_errors.table(sweep).query("metric == 'ITL'").set_index("mode")
    remote = cells[cells["mode"] != "local"]
    assert errors.loc[ALL_REMOTE, "cells"] == len(remote) == 4 * len(NETWORKS)
    assert errors.loc[ALL_REMOTE, "median_error"] == pytest.approx(remote["price_error"].abs().median())
    gaps_ms = (remote["gap_priced_ms"] - remote["gap_ms"]).abs()
    assert errors.loc[ALL_REMOTE, "worst_gap_error_s"] == pytest.approx(gaps_ms.max() / 1e3)
    worst = remote.loc[gaps_ms.idxmax()]
    assert tuple(errors.loc[ALL_REMOTE, ["worst_network", "worst_mode"]]) == (worst["network"], worst["mode"])
    assert errors.loc["local", "cells"] == len(NETWORKS)


def test_one_network_has_no_error_and_says_why(loopback: Results) -> None:
    errors, cells = price_errors.table(loopback), network.table(loopback)
    assert errors["median_error"].isna().all()
    assert set(errors["reason"]) == set(cells["price_reason"]) == {"one network was run: no other one to price it from"}
    assert cells["price_error"].isna().all()
    assert cells["residual"].abs().max() < 1e-9


def test_a_link_that_one_trial_does_not_show_is_null(tmp_path: Path) -> None:
    """In the first trial the frames of the windows waited for the link."""
    links = (Network("slow", 0.005, 20e3), Network("slow", 0.005, 100e6))
    cell = itl(results(tmp_path, *(simulated(SYS, at, number, COMPUTE_S) for number, at in enumerate(links, 1)))).iloc[0]
    assert pd.isna(cell["link_ms"]) and pd.isna(cell["fitted_ms"]) and pd.isna(cell["residual"])


def test_a_goodput_that_one_probe_could_not_tell_is_null_and_the_other_way_stays(tmp_path: Path) -> None:
    whole, other = (simulated(REMOTE_CACHE, NETWORKS[0], number, COMPUTE_S) for number in (1, 2))
    short = other.probe["payload_bytes"] / (other.probe["rtt_s"] / 2)  # the transfer took half of the round trip
    cell = itl(results(tmp_path, whole, dataclasses.replace(other, probe=other.probe | {"goodput_up_bytes_per_s": short}))).iloc[0]
    assert pd.isna(cell["goodput_up_mbit_per_s"]) and "took no longer than its round trip" in cell["link_reason"]
    assert cell["goodput_down_mbit_per_s"] == pytest.approx(100, rel=0.01)


@pytest.mark.parametrize("at", NETWORKS, ids=lambda at: at.name)
def test_trials_over_loopback_alone_give_what_any_link_would_take(loopback: Results, at: Network, tmp_path: Path) -> None:
    table = network.table(swept(tmp_path, (at,), trials=1))
    priced = prices(loopback, LinkModel.parsed(f"{2e3 * at.delay_s:g}ms", f"{at.bits_per_s / 1e6:g}Mbit")).set_index("mode")
    for metric in ("ITL", "TTFT"):
        measured_ms = table[table["metric"] == metric].set_index("mode")["latency_ms"]
        assert (priced[f"{metric.lower()}_ms"] / measured_ms - 1).abs().max() < 0.01
    assert set(priced["from_networks"]) == {"loopback"}


def test_a_link_slower_than_compute_hides_the_compute_of_a_window(loopback: Results, tmp_path: Path) -> None:
    slow = Network("slow", 0.005, 20e3)  # 30 bytes take 12 ms, compute 6
    measured = itl(swept(tmp_path, (slow,), (SYS,), trials=1)).iloc[0]
    priced = prices(loopback, LinkModel.parsed("10ms", "20kbit")).set_index("mode").loc["sys"]
    assert measured["latency_ms"] > 12
    assert priced["itl_ms"] == pytest.approx(measured["latency_ms"], rel=0.01)


@pytest.mark.parametrize("mode", [SYS, AHEAD])
def test_frames_that_waited_for_their_link_hide_compute_and_have_no_price(mode: Traffic, tmp_path: Path) -> None:
    found = swept(tmp_path, (Network("slow", 0.005, 20e3),), (mode,))
    (priced,) = prices(found, LinkModel.parsed("10ms", "1Gbit")).to_dict("records")
    assert math.isnan(priced["itl_ms"]) and math.isnan(priced["tokens_per_s"])
    assert (
        priced["itl_ms_reason"] == "compute was less than 10% of the link over every network that was run: too little to separate the two"
    )


def test_windows_sent_for_ahead_wait_for_a_slow_link_too(tmp_path: Path) -> None:
    fast = swept(tmp_path / "fast", NETWORKS[:1], (AHEAD,))
    for kbit in (64, 20):
        measured = itl(swept(tmp_path / f"{kbit}", (Network("slow", 0.005, kbit * 1e3),), (AHEAD,))).iloc[0]
        priced = prices(fast, LinkModel.parsed("10ms", f"{kbit}kbit")).iloc[0]
        assert priced["itl_ms"] == pytest.approx(measured["latency_ms"], rel=0.01)


@pytest.mark.parametrize("off", [0.97, 1.03])
def test_compute_within_the_probes_error_has_no_price(off: float, tmp_path: Path) -> None:
    """It might be below 0."""
    trials = [simulated(NAIVE, Network("slow", 0.005, 100e6), number, COMPUTE_S) for number in (1, 2)]
    goodputs = ("goodput_up_bytes_per_s", "goodput_down_bytes_per_s")
    probes = [trial.probe | {name: trial.probe[name] * off for name in goodputs} for trial in trials]
    probed = [dataclasses.replace(trial, probe=probe) for trial, probe in zip(trials, probes, strict=True)]
    found = results(tmp_path, *probed)
    (priced,) = prices(found, LinkModel.parsed("1ms", "10Gbit")).to_dict("records")
    assert math.isnan(priced["itl_ms"]) and "compute was less than 10% of the link" in priced["itl_ms_reason"]
    (cell,) = itl(found).to_dict("records")
    assert math.isnan(cell["compute_ms"])


def test_a_trial_number_counts_once_in_any_sessions(sweep: Results) -> None:
    link = LinkModel.parsed("25ms", "400Mbit")
    later = sweep.rows.assign(session=sweep.rows["session"].where(sweep.rows["network"] != "10ms-1000Mbit", "a later one"))
    assert later["session"].nunique() > sweep.rows["session"].nunique()
    split = dataclasses.replace(sweep, rows=later)
    pd.testing.assert_frame_equal(prices(split, link), prices(sweep, link))


def test_the_measured_value_lies_in_the_interval_of_the_worst_price() -> None:
    errors = _Errors(above=0.25, below=0.4)
    priced = Interval(2.0, 2.0, 2.0, 2)
    found = errors.widened(priced)
    assert (found.low, found.high) == pytest.approx((2.0 / 1.25, 2.0 / 0.6))
    rate = errors.inverse.widened(Interval(0.5, 0.5, 0.5, 2))
    assert (rate.low, rate.high) == pytest.approx((0.6 / 2.0, 1.25 / 2.0))


def test_prices_have_rates_and_ratios_and_leave_bytes_alone(loopback: Results) -> None:
    table = prices(loopback, LinkModel.parsed("25ms", "400Mbit")).set_index("mode")
    itl_ms = 6 + 25 + 196_700 * 8 / 400e3
    assert table.loc["remote_cache", "tokens_per_s"] == pytest.approx(1e3 / itl_ms, rel=0.01)
    assert table.loc["remote_cache", "ratio_to_local"] == pytest.approx(itl_ms / 6, rel=0.01)
    assert table.loc["remote_cache", "payload_bytes_per_token"] == 196_760
    assert table.loc["local", "itl_ms"] == pytest.approx(6, rel=0.01)
    assert table.loc["local", "ratio_to_local"] == 1


def test_the_interval_of_a_price_is_over_trials_widened_by_the_models_error(loopback: Results, sweep: Results) -> None:
    link = LinkModel.parsed("25ms", "400Mbit")
    alone = prices(loopback, link).set_index("mode").loc["sys"]
    assert math.isnan(alone["itl_model_error"])
    assert "the model's own error is not known" in alone["itl_ms_reason"]
    known = prices(sweep, link).set_index("mode").loc["sys"]
    worst = price_errors.table(sweep).query("mode == 'sys' and metric == 'ITL'")["worst_error"].iloc[0]
    assert known["itl_model_error"] == worst > 0
    per_trial = [prices(of_trial(sweep, "sys", trial), link)["itl_ms"].item() for trial in (1, 2)]
    half = 12.706 * abs(per_trial[0] - per_trial[1]) / 2
    errors = sweep.held_out.query("mode == 'sys' and metric == 'ITL'")["error"]
    assert known["itl_ms_high"] == pytest.approx((sum(per_trial) / 2 + half) / (1 + min(0, errors.min())), rel=1e-4)
    assert known["itl_ms_low"] == pytest.approx((sum(per_trial) / 2 - half) / (1 + max(0, errors.max())), rel=1e-4)


def test_local_over_one_network_stands_for_all_in_the_ratio(tmp_path: Path) -> None:
    trials = [simulated(SYS, at, 1, COMPUTE_S) for at in (LOOPBACK, NETWORKS[2])]
    found = results(tmp_path, simulated(LOCAL, LOOPBACK, 1, COMPUTE_S), *trials)
    row = prices(found, LinkModel.parsed("32ms", "400Mbit")).set_index("mode").loc["sys"]
    assert row["ratio_to_local"] == pytest.approx((6 + 32 / 32) / 6, rel=0.01)
    assert "no local one" not in str(row["ratio_to_local_reason"])


def of_trial(every: Results, mode: str, trial: int) -> Results:
    rows, calls = (frame[(frame["mode"] == mode) & (frame["trial"] == trial)] for frame in (every.rows, every.calls))
    return dataclasses.replace(every, rows=rows, calls=calls)


def test_calls_are_windows_and_steps_with_their_bytes_and_the_trials_link(tmp_path: Path) -> None:
    at = NETWORKS[2]
    found = results(tmp_path, simulated(COALESCED, at, 1, COMPUTE_S)).calls
    windows = found[found["metric"] == "ITL"]
    assert windows[["tokens", "frames", "round_trips", "up_bytes", "down_bytes"]].to_numpy().tolist() == [[16, 2, 1, 50, 92]] * 2
    assert windows["up_s_per_byte"].to_numpy() == pytest.approx(8 / at.bits_per_s, rel=1e-3)
    assert len(found) == 3  # with the prefill before them


def test_a_transfer_no_longer_than_its_round_trip_counts_as_compute_and_the_price_says_so(tmp_path: Path) -> None:
    trial = simulated(REMOTE_CACHE, NETWORKS[0], 1, COMPUTE_S)
    fast = dataclasses.replace(trial, probe=trial.probe | {"goodput_down_bytes_per_s": PROBED / trial.probe["rtt_s"]})
    (row,) = prices(results(tmp_path, fast), LinkModel.parsed("25ms", "400Mbit")).to_dict("records")
    assert row["itl_ms"] > 6 + 25
    assert "a probe's transfer took no longer than its round trip" in row["itl_ms_reason"]


@pytest.mark.parametrize(
    ("rtt", "rate", "link"),
    [
        ("25ms", "400Mbit", LinkModel(0.025, 2e-8, 2e-8)),
        ("200us", "1Gbit", LinkModel(0.0002, 8e-9, 8e-9)),
        ("1.5s", "8kbit/s", LinkModel(1.5, 1e-3, 1e-3)),
    ],
)
def test_a_link_is_named_with_units(rtt: str, rate: str, link: LinkModel) -> None:
    assert vars(LinkModel.parsed(rtt, rate)) == pytest.approx(vars(link))


@pytest.mark.parametrize(("rtt", "rate"), [("25", "1Gbit"), ("-1ms", "1Gbit"), ("25min", "1Gbit"), ("", "1Gbit")])
def test_a_round_trip_without_a_known_unit_is_refused(rtt: str, rate: str) -> None:
    with pytest.raises(ValueError, match=f"round trip '{rtt}' is no number with a unit; use us, ms or s"):
        LinkModel.parsed(rtt, rate)


@pytest.mark.parametrize("rate", ["400", "0Mbit", "400MB", "fast"])
def test_a_rate_is_refused_as_in_the_config(rate: str) -> None:
    with pytest.raises(ValueError, match=f"rate '{rate}' is not a number above 0 with one of bit, kbit, Mbit, Gbit"):
        LinkModel.parsed("25ms", rate)


@pytest.fixture(scope="module")
def figure(sweep: Results) -> Any:
    return network_figure.plot(sweep)


def test_the_figure_has_a_panel_for_each_rate_and_can_be_read(figure: Any) -> None:
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == ["100 Mbit/s", "1 Gbit/s"]
    assert unreadable_texts(figure) == []


def test_points_of_the_figure_are_the_measured_latencies_and_lines_the_prices(table: pd.DataFrame, figure: Any) -> None:
    own = table.query("metric == 'ITL' and mode == 'remote_cache' and asked_rate_mbit_per_s == 100").sort_values("rtt_ms")
    drawn = {tuple(line.get_ydata()) for line in figure.axes[0].lines if len(line.get_xdata()) == len(own)}
    assert tuple(own["latency_ms"]) in drawn
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == network_figure.POINTS]
    at_rtts = [np.interp(own["rtt_ms"], line.get_xdata(), line.get_ydata()) for line in lines]
    assert any(values == pytest.approx(own["latency_ms"].to_numpy(), rel=0.02) for values in at_rtts)


def test_the_figure_of_one_network_prices_the_round_trips_that_were_not_run(loopback: Results) -> None:
    (ax,) = network_figure.plot(loopback).axes
    lines = [line for line in ax.lines if len(line.get_xdata()) == network_figure.POINTS]
    assert len(lines) == len(MODES) - 1 and all(line.get_xdata()[-1] == pytest.approx(100) for line in lines)


def test_a_network_without_a_rate_has_a_panel_of_its_own(tmp_path: Path) -> None:
    found = swept(tmp_path, (LOOPBACK, NETWORKS[0]), (REMOTE_CACHE,))
    rates = found.rows["asked_rate_bits_per_s"].where(found.rows["network"] != "loopback")
    figure = network_figure.plot(dataclasses.replace(found, rows=found.rows.assign(asked_rate_bits_per_s=rates)))
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["100 Mbit/s", "no rate set"]
    assert texts(figure)


def test_recovery_phases_have_no_row(tmp_path: Path) -> None:
    found = results(tmp_path, *pressed("sys_delta", (Pressed(0.1, 0.5, "delta"),)))
    assert network.table(found).empty
    assert price_errors.table(found).empty
    assert prices(found, LinkModel(0, 0, 0)).empty


def test_close_latencies_have_an_axis_that_separates_them(tmp_path: Path) -> None:
    figure = network_figure.plot(swept(tmp_path, NETWORKS[:3:2], (LOCAL, SYS)))
    assert len(figure.axes[0].get_yticks()) >= 3
    assert unreadable_texts(figure) == []


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The results of a run over loopback."""
    trials = written(tmp_path / "results/trials", *every((LOOPBACK,), (LOCAL, SYS), trials=1))
    return recorded(results_of(trials), tmp_path / "results")


def recorded(found: Results, directory: Path) -> Path:
    """The directory of a run, with its results.csv."""
    trials = [str(manifest.parent) for manifest in directory.rglob("manifest.json")]
    with_directories(found.rows, trials, directory).to_csv(directory / "results.csv", index=False)
    return directory


def price(*arguments: object) -> int:
    return cli.main(["price", "--rtt", "25ms", "--rate", "400Mbit", *map(str, arguments)])


def test_the_command_prints_the_table_and_writes_it_unrounded(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert price(finished, "--as-recorded", "--csv", finished / "priced.csv") == 0
    printed = capsys.readouterr().out
    assert "Over a link of 25ms round trip and 400Mbit each way." in printed
    assert "from networks loopback" in printed
    assert {"local", "sys"} == set(pd.read_csv(finished / "priced.csv")["mode"])


def test_several_links_have_a_table_each_and_are_named_in_the_csv(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    several = ("price", "--rtt", "1ms,25ms", "--rate", "400Mbit..500Mbit", str(finished), "--as-recorded")
    assert cli.main([*several, "--csv", str(finished / "several.csv"), "--figure", str(finished / "several.pdf")]) == 0
    printed = capsys.readouterr().out
    assert "Over 4 links of 1ms, 25ms round trip and 400Mbit, 500Mbit each way." in printed
    titles = [line for line in printed.splitlines() if line.startswith("###")]
    links = [f"rtt {rtt}, rate {rate}" for rtt in ("1ms", "25ms") for rate in ("400Mbit", "500Mbit")]
    assert titles == [f"### Priced: {link}, model smollm2, phase decode, from networks loopback" for link in links]
    assert price(finished, "--as-recorded", "--csv", finished / "one.csv") == 0
    table, one = (pd.read_csv(finished / f"{name}.csv") for name in ("several", "one"))
    assert list(table.columns[:4]) == ["rtt", "rate", "rtt_ms", "rate_mbit_per_s"]
    pd.testing.assert_frame_equal(table[(table["rtt"] == "25ms") & (table["rate"] == "400Mbit")].reset_index(drop=True), one)
    assert (finished / "several.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("file", "message"),
    [("priced.jpg", "priced.jpg ends in none of .svg, .png, .pdf"), ("priced.svg", "one link (25ms, 400Mbit) draws no line")],
)
def test_a_figure_that_cannot_be_drawn_is_refused(finished: Path, file: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert price(finished, "--as-recorded", "--figure", finished / file, "--csv", finished / "priced.csv") == 1
    assert message in capsys.readouterr().err
    assert not (finished / file).exists() and not (finished / "priced.csv").exists()


def test_a_directory_without_results_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert price(tmp_path, "--as-recorded") == 1
    assert f"{tmp_path} has no results.csv" in capsys.readouterr().err


def test_results_of_recovery_phases_alone_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pressure = written(tmp_path / "results/trials", *pressed("sys_delta", (Pressed(0.1, 0.5, "delta"),)))
    assert price(recorded(results_of(pressure), tmp_path / "results"), "--as-recorded") == 1
    assert "holds no trials of prefill or decode phases" in capsys.readouterr().err


@pytest.mark.parametrize("column", ["cell_digest", "directory"])
def test_results_csv_without_digests_or_directories_asks_for_a_run(finished: Path, column: str, capsys: pytest.CaptureFixture[str]) -> None:
    pd.read_csv(finished / "results.csv").drop(columns=column).to_csv(finished / "results.csv", index=False)
    assert price(finished, "--as-recorded") == 1
    assert "names no trials with their digests and directories" in capsys.readouterr().err


def test_a_trial_of_another_experiments_directory_is_found(finished: Path) -> None:
    """As in results/mine, which took its trials from results/trials."""
    rows = pd.read_csv(finished / "results.csv")
    (finished / "mine").mkdir()
    rows.assign(directory="../" + rows["directory"]).to_csv(finished / "mine/results.csv", index=False)
    assert price(finished / "mine", "--as-recorded") == 0


def test_a_trial_that_was_measured_again_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (directory,) = finished.glob("trials/*/*/mode=sys/*/trial=1")
    reseal(directory, cell_digest="another")
    assert price(finished, "--as-recorded") == 1
    assert f"{finished}/results.csv and the trials are of two configurations" in capsys.readouterr().err


def test_a_trial_that_is_gone_is_named(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (steps,) = finished.glob("trials/*/*/mode=sys/*/trial=1/steps.parquet")
    steps.unlink()
    assert price(finished, "--as-recorded") == 1
    assert "has no steps.parquet" in capsys.readouterr().err
