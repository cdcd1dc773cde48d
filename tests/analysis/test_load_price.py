"""Prices of closed loops: exact for an engine whose throughput depends on the requests that are there, and held out by network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import virtual_loads

from semgap.analysis.link_grid import LinkGrid
from semgap.analysis.load_price import AWAY, load_held_out, loads_over
from semgap.experiment.config import read_config
from semgap.policy import Batching, policy_from


def batched(there: float) -> float:
    """Tokens/s of an engine whose step takes 10 ms and 2 ms a request. Less than one request is one that is there at times."""
    return there / (0.01 + 0.002 * max(1.0, there))


def loop(rate: Callable[[float], float], live: int, away_s: float) -> float:
    """The rate of a closed loop by iteration, slowly."""
    found = rate(live)
    for _ in range(2000):
        found += 0.05 * (rate(max(0.0, live - found * away_s)) - found)
    return found


def levels(
    network: str, rtt_s: float, calls: float = 1.0, counts: tuple[int, ...] = (1, 2, 4, 8, 16), turns: str = "steps"
) -> pd.DataFrame:
    rows = []
    for level, live in enumerate(counts):
        whole = turns == "whole"
        rate = 1 / (0.012 + rtt_s * calls) if whole else loop(batched, live, rtt_s * calls)
        itl_s = 1 / rate if whole else live / rate
        at = {"model": "m", "network": network, "mode": "x", "phase": "load", "trial": 1, "level": level, "concurrency": live}
        rows.append(at | {"tokens_per_s": rate, "itl_mean_ms": 1e3 * itl_s, "rtt_s": rtt_s, "turns": turns})
    return pd.DataFrame(rows).assign(calls_per_token=calls, calls_per_gap=calls, inner_calls_per_token=calls)


@pytest.mark.parametrize("calls", [1.0, 0.125])
def test_a_level_over_a_slower_network_has_the_rate_of_the_requests_that_are_then_there(calls: float) -> None:
    held = load_held_out(pd.concat([levels("near", 0.0, calls), levels("far", 0.05, calls)])).set_index(["network", "level"])
    far = held.loc["far"]
    assert far["error_tokens_per_s"].abs().max() < 0.03 and far["error_itl_mean_ms"].abs().max() < 0.03  # of lines between points
    assert set(far["from_networks"]) == {"near"} and far["reason"].isna().all()
    without = held.loc[("near", 4), "occupancy"]
    assert without == pytest.approx(16) and far.loc[4, "occupancy"] < 16


def test_requests_there_are_n_steps_over_round_trip_and_step() -> None:
    priced = loads_over(levels("near", 0.0, counts=(1, 16)), LinkGrid.parsed("50ms", "1Gbit")).set_index("concurrency")
    for live in (1, 16):
        itl_s = priced.loc[live, "itl_mean_ms"] / 1e3
        step_s = itl_s - 0.05
        assert priced.loc[live, "occupancy"] == pytest.approx(live * step_s / (0.05 + step_s))
        assert priced.loc[live, "tokens_per_s"] == pytest.approx(live / itl_s)


def test_a_mode_that_runs_requests_to_their_end_waits_for_the_round_trips_of_each() -> None:
    both = pd.concat([levels("near", 0.001, turns="whole"), levels("far", 0.05, turns="whole")])
    held = load_held_out(both)
    assert held["error_tokens_per_s"].abs().max() < 1e-9 and held["error_itl_mean_ms"].abs().max() < 1e-9


def test_levels_of_one_network_and_open_loops_have_no_price() -> None:
    alone = load_held_out(levels("near", 0.0))
    assert alone["priced_tokens_per_s"].isna().all() and set(alone["reason"]) == {"one network was run: no other one to price it from"}
    assert load_held_out(levels("near", 0.0).assign(concurrency=None)).empty


@pytest.mark.parametrize(
    ("batching", "window", "to_far", "to_near"),
    [
        (Batching(turns="whole"), 1, 0.01, 0.02),
        (Batching(), 1, 0.05, 0.15),
        (Batching(merges="all", step_tokens=96), 1, 0.11, 0.3),
        (Batching(merges="all", step_tokens=96), 8, 0.13, 0.13),
    ],
)
def test_prices_of_the_workers_own_scheduler_in_virtual_time(batching: Batching, window: int, to_far: float, to_near: float) -> None:
    """Between 0.1 and 50 ms. Requests of one step stay together on the way, which the price does not know."""
    rows = []
    calls = virtual_loads.TOKENS // window
    for network, rtt_s in (("near", 1e-4), ("far", 0.05)):
        for level, live in enumerate((1, 2, 4, 8, 16)):
            rate, gap_s = virtual_loads.measured(batching, window, live, rtt_s, for_s=15)
            at = {"model": "m", "network": network, "mode": "x", "phase": "load", "trial": 1, "level": level, "concurrency": live}
            rows.append(at | {"tokens_per_s": rate, "itl_mean_ms": 1e3 * gap_s, "rtt_s": rtt_s, "turns": batching.turns})
    per_token = {"calls_per_token": calls / virtual_loads.TOKENS, "inner_calls_per_token": (calls - 1) / virtual_loads.TOKENS}
    held = load_held_out(pd.DataFrame(rows).assign(**per_token, calls_per_gap=(calls - 1) / (virtual_loads.TOKENS - 1)))
    worst = held.groupby("network")[["error_tokens_per_s", "error_itl_mean_ms"]].agg(lambda errors: errors.abs().max()).max(axis=1)
    assert worst["far"] < to_far and worst["near"] < to_near, held.to_string()


def test_the_default_chunks_hold_up_running_requests_less_than_a_third_of_what_whole_prefills_do() -> None:
    """A call that comes while a step runs waits for the next one, so a gap is two steps."""
    config, p99 = read_config([], Path(__file__).resolve().parents[2]), {}
    for mode in ("position", "phase", "prefix"):
        batching = policy_from(config.policy(mode), mode).batching
        assert batching is not None
        times = virtual_loads.token_times(batching, 1, 8, 5e-4, for_s=40, kinds=[(64, 16)] * 3 + [(448, 4)])
        p99[mode] = np.percentile(np.concatenate([np.diff(of) for of in times]), 99)
    assert p99["phase"] < 0.28 * p99["position"] and p99["prefix"] < 0.28 * p99["position"], p99


def test_levels_whose_requests_were_hardly_ever_there_give_no_price() -> None:
    away = levels("far", 0.0509).assign(tokens_per_s=lambda rows: rows["concurrency"] / 0.0507)
    held = load_held_out(pd.concat([away, levels("near", 0.0)])).set_index("network")
    assert held.loc["near", "priced_tokens_per_s"].isna().all() and set(held.loc["near", "reason"]) == {AWAY}
    assert held.loc["far", "priced_tokens_per_s"].notna().all()
    assert loads_over(away, LinkGrid.parsed("1ms", "1Gbit"))["tokens_per_s"].isna().all()
    whole = levels("far", 0.05, turns="whole").assign(tokens_per_s=1 / 0.0501)
    assert loads_over(whole, LinkGrid.parsed("1ms", "1Gbit"))["tokens_per_s"].isna().all()
