"""A trial of many requests at once, with real processes: its tokens, its windows, its books, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from semgap.analysis.load import load_trials
from semgap.analysis.marks import marks_of
from semgap.analysis.results import Results, load_codecs, load_exactness
from semgap.analysis.tables import load, load_facts
from semgap.engine.model_files import load_digest
from semgap.experiment.compute_reference import compute_reference
from semgap.experiment.config import Config, Coordinates, check_config
from semgap.experiment.measure_capacity import measure_capacity
from semgap.experiment.measure_trial import measure_trial
from semgap.experiment.trial_load import capacity_of
from semgap.experiment.trial_schemas import TrialResult
from semgap.experiment.trial_setup import Paths, TrialError

pytestmark = [pytest.mark.alone, pytest.mark.usefixtures("own_run")]

ROOT = Path(__file__).resolve().parents[2]
MODES = ("serial", "phase", "loop")
PHASES: dict[str, dict[str, Any]] = {
    "closed": {
        "prompt_lengths": [8, 20],
        "steps": 5,
        "requests": 12,
        "concurrency": [1, 4],
        "deadlines": {"ttft_ms": 5000, "tpot_ms": 1000},
    },
    "carried": {"prompt_lengths": [8], "steps": 5, "requests": 12, "concurrency": [4], "connections": 1},
    "open": {"prompt_lengths": [8], "steps": 3, "requests": 12, "arrivals": {"share": [0.05], "of": "serial"}},
    "slow": {"prompt_lengths": [8], "steps": 3, "requests": 24, "arrivals": {"per_s": [2]}},
    "flooded": {"prompt_lengths": [40], "steps": 20, "requests": 60, "arrivals": {"per_s": [5000]}},
}


@pytest.fixture(scope="module")
def config(llama: Path) -> Config:
    raw = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    raw["define"]["models"], raw["models"] = {"tiny": load_digest(llama).source}, ["tiny"]
    raw["define"]["phases"] = {name: {"kind": "load", **phase} for name, phase in PHASES.items()}
    raw |= {"phases": list(PHASES), "modes": list(MODES), "max_length": 64, "device": "cpu", "networks": ["loopback"]}
    raw["exactness"] = {"prompts": 1, "prompt_length": 8, "tokens": 6}
    raw |= {"probe": {"round_trips": 3, "payload_bytes": 65536}, "telemetry": {"interval_s": 0.05, "sources": ["host"]}}
    return check_config(raw, ROOT)


@pytest.fixture(scope="module")
def place(llama: Path) -> Paths:
    return Paths(llama, ROOT)


@pytest.fixture(scope="module")
def reference_of(config: Config, place: Paths, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    directory = tmp_path_factory.mktemp("reference")

    def make(phase: str) -> Path:
        file = directory / f"{phase}.npz"
        if not file.exists():
            compute_reference(config.reference_cell("tiny", phase), place, file)
        return file

    return make


@pytest.fixture(scope="module")
def measured(config: Config, place: Paths, reference_of: Callable[[str], Path]) -> Callable[..., TrialResult]:
    """One trial a mode and phase; `more` replaces parts of its cell."""
    done: dict[tuple[str, str], TrialResult] = {}

    def measure(mode: str, phase: str, capacity_per_s: float | None = None, **more: Any) -> TrialResult:
        if more or (mode, phase) not in done:
            cell = deepcopy(config.cell(Coordinates("tiny", "loopback", mode, phase, 1))) | more
            result = measure_trial(cell, place, reference_of(phase), capacity_per_s)
            if more:
                return result
            done[mode, phase] = result
        return done[mode, phase]

    return measure


@pytest.mark.parametrize("mode", MODES)
def test_every_request_gets_the_tokens_of_its_own_run_alone(mode: str, measured: Callable[..., TrialResult]) -> None:
    result = measured(mode, "closed")
    rows = result.tables["load"].to_pylist()
    assert result.manifest["exactness"]["promise_kept"] is True
    assert result.manifest["exactness"]["tokens_compared"] + result.manifest["exactness"]["edge_draws"] == len(rows)
    assert all(row["token"] == row["reference_token"] for row in rows if row["token_match"])
    whole = [row for row in result.tables["requests"].to_pylist() if row["e2e_s"] is not None and not row["warmup"]]
    assert {row["prompt_tokens"] for row in whole} == {8, 20} and {row["new_tokens"] for row in whole[4:]} <= {1, 2, 3, 4, 5, 6}


def test_each_level_measures_its_requests_between_ramp_and_drain(measured: Callable[..., TrialResult]) -> None:
    result = measured("phase", "closed")
    requests, tokens = result.tables["requests"].to_pylist(), result.tables["load"].to_pylist()
    for level, concurrency in zip(result.manifest["load"]["levels"], (1, 4), strict=True):
        own = [row for row in requests if row["level"] == level["level"]]
        inside = [row for row in tokens if row["level"] == level["level"] and row["measured"]]
        assert (level["concurrency"], level["requests"], len(inside)) == (concurrency, 12, level["tokens"])
        assert sum(level["half_tokens"]) == level["tokens"]
        assert all(level["start_s"] < row["came_s"] <= level["end_s"] for row in inside)
        assert sum(row["measured"] for row in own) == 12 and all(row["e2e_s"] for row in own if row["measured"])
        assert all(row["in_time"] is not None for row in own if row["measured"])
        assert level["live_start"] < concurrency and level["live_end"] < concurrency  # the one that ended is not followed yet
    assert max(row["level"] for row in requests) == 1 and min(row["level"] for row in requests) == -1


def test_requests_that_still_queue_when_their_level_ends_are_taken_back_unserved(measured: Callable[..., TrialResult]) -> None:
    unserved = [row for row in measured("serial", "carried").tables["requests"].to_pylist() if not row["new_tokens"]]
    assert len(unserved) in (2, 3)  # of the 3 alive, the engine may have begun one more
    assert all(row["ttft_s"] is None and row["e2e_s"] is None for row in unserved)


def test_an_engine_that_knows_phases_merges_requests_and_one_that_knows_nothing_does_not(measured: Callable[..., TrialResult]) -> None:
    most = {mode: max(measured(mode, "closed").tables["batches"].column("requests").to_pylist()) for mode in ("serial", "phase")}
    assert most["serial"] == 1 < most["phase"]


def test_a_window_takes_fewer_round_trips(measured: Callable[..., TrialResult]) -> None:
    trips = {mode: measured(mode, "closed").manifest["load"]["levels"][1] for mode in ("phase", "loop")}
    per_token = {mode: level["round_trips"] / level["tokens"] for mode, level in trips.items()}
    assert per_token["loop"] < 0.5 < per_token["phase"] < 1.1  # some calls more or less at the window's ends


def test_each_connection_reconciles_by_itself(measured: Callable[..., TrialResult]) -> None:
    result = measured("phase", "closed")
    assert result.manifest["reconciliation"]["connections"] == 4
    ledger, tcp = (result.tables[name].to_pandas() for name in ("ledger", "tcp"))
    assert set(ledger["connection"]) == set(tcp["connection"]) == {0, 1, 2, 3}
    for number in range(4):
        own = ledger[(ledger["connection"] == number) & (ledger["operation"] == "advance")]
        ours, theirs = (
            own[own["side"] == side].drop(columns=["side", "round_trips", "encode_ns", "decode_ns"]) for side in ("client", "worker")
        )
        assert sorted(map(tuple, ours.to_numpy().tolist())) == sorted(map(tuple, theirs.to_numpy().tolist())) and len(ours)


def test_one_connection_carries_many_requests_a_frame_for_all_of_them(measured: Callable[..., TrialResult]) -> None:
    result = measured("phase", "carried")
    (level,) = result.manifest["load"]["levels"]
    assert result.manifest["reconciliation"]["connections"] == 1
    assert level["round_trips"] < 0.6 * level["tokens"]


def test_arrivals_are_shares_of_a_measured_capacity(
    config: Config, place: Paths, reference_of: Callable[[str], Path], measured: Callable[..., TrialResult], tmp_path: Path
) -> None:
    measure_capacity(config.capacity_cell("tiny", "loopback", "open"), place, reference_of("open"), tmp_path / "capacity.json")
    per_s = capacity_of(tmp_path / "capacity.json")
    (level,) = measured("phase", "open", per_s).manifest["load"]["levels"]
    assert level["rate_per_s"] == pytest.approx(0.05 * per_s) and level["share"] == 0.05
    assert json.loads((tmp_path / "capacity.json").read_text())["mode"] == "serial"


def test_a_rate_that_nothing_can_serve_ends_the_trial_with_a_word_on_the_queue(measured: Callable[..., TrialResult]) -> None:
    with pytest.raises(TrialError, match=r"the queue is unstable: 60 requests came at 5e\+03/s, and \d+ more were alive"):
        measured("serial", "flooded")


def test_a_full_queue_of_the_worker_ends_the_trial_too(config: Config, measured: Callable[..., TrialResult]) -> None:
    policy = deepcopy(config.policy("serial"))
    policy["batching"]["max_queue"] = 1
    with pytest.raises(TrialError, match=r"the worker refuses a request, \d+ are alive"):
        measured("serial", "flooded", policy=policy)


def _kill_the_engine(others: set[psutil.Process]) -> int:
    """Kills the first engine of a worker that is none of `others`, and gives its pid: the worker's fork without a connection."""
    ends_s = time.monotonic() + 60
    while time.monotonic() < ends_s:
        for worker in set(psutil.Process().children(recursive=True)) - others:
            with contextlib.suppress(psutil.Error):
                listens = any(each.status == psutil.CONN_LISTEN for each in worker.net_connections("tcp"))
                for fork in worker.children() if listens else ():
                    if time.time() - fork.create_time() > 2 and not fork.net_connections("tcp"):
                        fork.kill()
                        return fork.pid
        time.sleep(0.1)
    raise AssertionError("no engine began")


def test_a_trial_whose_engine_is_killed_fails_with_its_name_and_leaves_no_process(measured: Callable[..., TrialResult]) -> None:
    with ThreadPoolExecutor(1) as killer:
        killed = killer.submit(_kill_the_engine, set(psutil.Process().children(recursive=True)))
        with pytest.raises(TrialError, match=r"engine \d+, which ran this session's requests, has ended") as error:
            measured("phase", "slow")
    assert f"engine {killed.result()}, which" in str(error.value)
    assert not psutil.pid_exists(killed.result())


def test_the_tables_show_each_level_and_the_worth_of_each_fact(measured: Callable[..., TrialResult], tmp_path: Path) -> None:
    directories = {}
    for mode in MODES:
        result = measured(mode, "closed")
        result.write(tmp_path / mode)
        directories[str(tmp_path / mode)] = result.manifest["cell_digest"]
    trials = load_trials([Path(name) for name in directories], directories)
    rows = yaml.safe_load((ROOT / "config/config.yaml").read_text())["define"]["modes"]
    results = Results.of(trials, load_exactness([], {}), load_codecs([], {}), marks_of(rows))
    table, facts = load.table(results), load_facts.table(results)
    assert results.rows.empty and list(table["load"]) == ["N = 1"] * 3 + ["N = 4"] * 3
    assert (table["tokens_equal"] + table["edge_draws"]).sum() and table["promise_kept"].all() and set(table["blind"]) == {"serial"}
    assert table["step_to_floor"].notna().all() and all(trial["floor"]["step_bytes"] for trial in trials.manifests)
    assert set(table["price_reason"]) == {"one network was run: no other one to price it from"}
    assert (table["requests"] == 12).all() and table["goodput_per_s"].notna().all() and table["itl_p90_ms"].notna().all()
    serial = table[table["mode"] == "serial"]
    assert np.allclose(serial["throughput_to_blind"].astype("float64"), 1) and np.allclose(serial["batch"].astype("float64"), 1)
    four = facts[facts["load"] == "N = 4"]
    assert list(four["fact"]) == ["weights, position, phase", "prefix, loop"] and set(four["orders"]) == {1}
    whole = four["ms_per_token_nothing_known"] / four["ms_per_token_all_known"]
    assert np.prod(four["factor"]) == pytest.approx(whole.iloc[0])
    assert pq.read_table(tmp_path / "loop/batches.parquet", partitioning=None).column_names[:2] == ["level", "begin_s"]
