"""Trials whose requests move from one worker to another: what they record, and what they refuse."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from killed_workers import second_worker_killed

from semgap.analysis.figures import codecs
from semgap.analysis.figures.plot_figures import FIGURES
from semgap.analysis.figures.style import save
from semgap.analysis.load import load_trials
from semgap.analysis.results import Results, load_codecs, load_exactness
from semgap.analysis.sums import fault_of_trial
from semgap.analysis.tables import handover
from semgap.analysis.tables.make_tables import TABLES
from semgap.engine.model_files import load_digest
from semgap.experiment.check_exactness import check_exactness
from semgap.experiment.compute_exactness_reference import compute_exactness_reference
from semgap.experiment.compute_reference import compute_reference
from semgap.experiment.config import Config, ConfigError, Coordinates, check_config
from semgap.experiment.measure_trial import measure_trial
from semgap.experiment.trial_schemas import TrialResult
from semgap.experiment.trial_setup import Paths, TrialError
from semgap.kv.block_store import BLOCK_BYTES

pytestmark = [pytest.mark.alone, pytest.mark.usefixtures("own_run")]

ROOT = Path(__file__).resolve().parents[2]
LOOSE = {"rtt_ms": 100, "goodput": 10, "lateness_ms": 1000}  # other work runs beside these tests
MODES = ("handover_opaque", "handover_layers", "handover_planes", "handover_int8", "handover_recompute", "handover_auto")
WHOLE = 70 * 3 * 2 * 2 * 32 * 4  # positions, layers, keys and values, KV heads, head_dim, float32


def raw_config(llama: Path) -> dict[str, Any]:
    """The handover modes of config/kv.yaml over the tiny llama, with a relay before the KV host."""
    raw = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    own = yaml.safe_load((ROOT / "config/kv.yaml").read_text())["define"]["modes"]
    raw["define"]["modes"] |= {mode: own[mode] | {"networks": None} for mode in MODES}
    raw["define"]["models"], raw["models"] = {"tiny": load_digest(llama).source}, ["tiny"]
    raw["define"]["phases"] = {"handover": {"kind": "handover", "prompt_lengths": [70], "requests": 4, "steps": 3}}
    raw["define"]["networks"] = {
        "near": {"kind": "relay", "rate": "1Gbit", "rtt_ms": 1, "tolerance": LOOSE},
        "kv_near": {"kind": "loopback", "kv": "near"},
    }
    raw |= {"modes": list(MODES), "phases": ["handover"], "networks": ["kv_near"], "max_length": 128, "device": "cpu"}
    raw |= {"probe": {"round_trips": 3, "payload_bytes": 1 << 20}, "telemetry": {"interval_s": 0.05, "sources": ["host"]}}
    raw["exactness"] = {"prompts": 2, "prompt_length": 80, "tokens": 4, "passages": []}
    return raw


@pytest.fixture(scope="module")
def config(llama: Path) -> Config:
    return check_config(raw_config(llama), ROOT)


@pytest.fixture(scope="module")
def reference(config: Config, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("reference") / "reference.npz"
    compute_reference(config.reference_cell("tiny", "handover"), Paths(llama, ROOT), file)
    return file


@pytest.fixture(scope="module")
def run(config: Config, llama: Path, reference: Path) -> Callable[[str], TrialResult]:
    """The result of a mode's trial, run once."""
    done: dict[str, TrialResult] = {}

    def measure(mode: str) -> TrialResult:
        if mode not in done:
            cell = config.cell(Coordinates("tiny", "kv_near", mode, "handover", 1))
            done[mode] = measure_trial(cell, Paths(llama, ROOT), reference)
        return done[mode]

    return measure


def firsts(result: TrialResult) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The measured first decode steps of requests that moved, and of those that stayed."""
    steps = [row for row in result.tables["steps"].to_pylist() if row["measured"] and row["step"] == 1]
    return [row for row in steps if row["moves"]], [row for row in steps if not row["moves"]]


@pytest.mark.parametrize("mode", MODES)
def test_half_of_the_requests_move_and_all_keep_what_the_mode_promises(run: Callable[[str], TrialResult], mode: str) -> None:
    result = run(mode)
    moved, stayed = firsts(result)
    assert len(moved) == len(stayed) == 2 and result.manifest["exactness"]["promise_kept"] and not result.manifest["kv"]["fallbacks"]
    assert all(row["recovery"] is None and row["handed"] is None for row in stayed)
    if mode != "handover_int8":
        assert all(row["logits_bitwise"] for row in result.tables["steps"].to_pylist() if not row["warmup"])
    for row in moved:
        assert row["missing_bytes"] == WHOLE and row["up_frame_bytes"] > stayed[0]["up_frame_bytes"]
        if row["handed"]:
            assert row["saved_tensor_bytes"] == WHOLE and 0 <= row["sent_after_s"] <= row["latency_s"] and row["sent_s"] > 0
            assert row["saved_payload_bytes"] <= row["sent_network_bytes"] <= 1.01 * row["saved_payload_bytes"] + 4000
        else:
            assert mode in ("handover_recompute", "handover_auto") and row["recovery"] == "recompute" and row["sent_network_bytes"] == 0


def test_codecs_send_fewer_bytes_and_the_books_of_both_workers_agree(run: Callable[[str], TrialResult]) -> None:
    sent = {mode: firsts(run(mode))[0][0]["sent_network_bytes"] for mode in MODES[:4]}
    assert sent["handover_int8"] < sent["handover_planes"] < sent["handover_layers"]
    assert abs(sent["handover_opaque"] - sent["handover_layers"]) < 4000
    result = run("handover_layers")
    assert result.manifest["reconciliation"]["connections"] == 2
    ledger = result.tables["ledger"].to_pylist()
    assert {(row["connection"], row["side"]) for row in ledger} == {
        (number, side) for number in (0, 1) for side in ("client", "worker", "worker_to_kv_host", "kv_host")
    }
    (relayed,) = {row["side"] for row in result.tables["relay"].to_pylist()}
    assert relayed == "kv_relay"


def test_every_table_and_figure_is_made_of_such_trials(run: Callable[[str], TrialResult], tmp_path: Path) -> None:
    directories = [tmp_path / mode for mode in MODES]
    for directory, mode in zip(directories, MODES, strict=True):
        run(mode).write(directory)
    expected = {str(directory): run(mode).manifest["cell_digest"] for directory, mode in zip(directories, MODES, strict=True)}
    results = Results.of(load_trials(directories, expected), load_exactness([], {}), load_codecs([], {}), {})
    tables = {each.__name__.rpartition(".")[2]: each.table(results) for each in TABLES}
    own = tables["handover"].set_index("mode")
    assert set(own.index) == set(MODES) and own["adds_ms"].notna().all() and (own["moved_per_trial"] == 2).all()
    assert own.loc["handover_recompute", "hidden_share_reason"] == "no request's blocks were sent"
    assert own.loc["handover_layers", "codec_ratio"] == 1 < own.loc["handover_int8", "codec_ratio"]
    for figure in FIGURES:
        if figure is not codecs:  # no codec was measured
            save(figure.plot(results), tmp_path / figure.__name__.rpartition(".")[2])
    assert (tmp_path / "handover.svg").stat().st_size > 5000
    assert [fault for each in directories if (fault := fault_of_trial(each, json.loads((each / "manifest.json").read_text())))] == []


def test_the_exactness_check_of_a_lossy_mode_moves_blocks_so_that_its_codec_shows(config: Config, llama: Path, tmp_path: Path) -> None:
    cells = {mode: config.exactness_cell("tiny", mode) for mode in ("handover_int8", "handover_planes")}
    assert all(cell["phase_spec"]["evict_fractions"] == [0.5] for cell in cells.values())
    drawn, text = tmp_path / "drawn.npz", tmp_path / "text.npz"
    compute_exactness_reference(config.exactness_reference_cell("tiny"), Paths(llama, ROOT), drawn, text)
    rows = {mode: check_exactness(cell, Paths(llama, ROOT), drawn, text) for mode, cell in cells.items()}
    assert rows["handover_int8"]["text_mean_kl_nats"] > 0 == rows["handover_planes"]["text_mean_kl_nats"]


def test_requests_move_in_each_of_several_sessions_of_the_same_two_workers(llama: Path, tmp_path: Path) -> None:
    raw = raw_config(llama) | {"modes": ["handover_layers"]}
    raw["define"]["phases"]["handover"] |= {"sessions": 2}
    config = check_config(raw, ROOT)
    compute_reference(config.reference_cell("tiny", "handover"), Paths(llama, ROOT), tmp_path / "reference.npz")
    cell = config.cell(Coordinates("tiny", "kv_near", "handover_layers", "handover", 1))
    result = measure_trial(cell, Paths(llama, ROOT), tmp_path / "reference.npz")
    assert [row["handed"] for row in firsts(result)[0]] == [True, True] and result.manifest["exactness"]["promise_kept"]
    assert result.manifest["setup"]["weights_bytes_by_session"][1] == 0  # both workers hold them


@pytest.mark.usefixtures("started_anew")
def test_a_kv_host_without_room_is_a_fallback_of_each_request_that_moved(llama: Path, reference: Path, tmp_path: Path) -> None:
    raw = raw_config(llama) | {"modes": ["handover_layers"]}
    raw["worker"] = raw.get("worker", {}) | {"kv_host_bytes": 2 * BLOCK_BYTES}  # not even a layer
    at = Coordinates("tiny", "kv_near", "handover_layers", "handover", 1)
    result = measure_trial(check_config(raw, ROOT).cell(at), Paths(llama, ROOT), reference)
    moved, _ = firsts(result)
    assert [row["handed"] for row in moved] == [False, False] and all("this KV host keeps" in row["fallback"] for row in moved)
    result.write(tmp_path / "trial")
    trials = load_trials([tmp_path / "trial"], {str(tmp_path / "trial"): result.manifest["cell_digest"]})
    (row,) = handover.table(Results.of(trials, load_exactness([], {}), load_codecs([], {}), {})).to_dict("records")
    assert (row["recomputed_requests"], row["fallback_requests"]) == (2, 2)


@pytest.mark.usefixtures("started_anew")
def test_a_second_worker_that_dies_fails_the_trial_and_leaves_nothing(config: Config, llama: Path, reference: Path) -> None:
    cell = config.cell(Coordinates("tiny", "kv_near", "handover_layers", "handover", 1))
    with second_worker_killed(signal.SIGKILL), pytest.raises(TrialError, match="the client failed"):
        measure_trial(cell, Paths(llama, ROOT), reference)
    assert not [child for child in psutil.Process().children(recursive=True) if {"serve", "kvhost", "relay"} & set(child.cmdline())]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modes": {"handover_layers": {"shadow": "worker"}}}, "a request moves through a KV host, use shadow: kvhost"),
        ({"modes": {"handover_layers": {"prefix": "fetch_blocks"}}}, "with prefix fetch_blocks; the first worker computes all"),
        ({"phases": {"handover": {"requests": 3}}}, "with requests: 3; every second request stays, .* set requests to an even number"),
        ({"phases": {"handover": {"prompt_lengths": [70, 80]}}}, "with several prompt_lengths; a request that moves is compared with"),
        ({"phases": {"handover": {"steps": 0}}}, "it needs 1 or more"),
    ],
)
def test_what_cannot_move_is_refused_before_any_trial(llama: Path, change: dict[str, Any], message: str) -> None:
    raw = raw_config(llama)
    for axis, rows in change.items():
        for name, row in rows.items():
            raw["define"][axis][name] = raw["define"][axis][name] | row
    with pytest.raises(ConfigError, match=message):
        check_config(raw, ROOT)


def test_over_a_relay_of_the_client_no_request_moves(llama: Path) -> None:
    raw = raw_config(llama) | {"networks": ["near", "kv_near"]}
    assert {at.network for at in check_config(raw, ROOT).grid()} == {"kv_near"}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"networks": ["near"]}, r"phases with two workers \(handover\) run over networks of kind loopback"),
        (
            {"networks": ["kv_near"], "phases": ["decode"], "modes": ["plain"]},
            r"over one with kv \(kv_near\) only phases of kinds .*handover",
        ),
        ({"networks": ["near", "other"], "phases": ["decode"], "modes": ["plain"]}, "the rows .* name no network in common"),
    ],
)
def test_where_nothing_runs_the_config_says_why(llama: Path, change: dict[str, Any], why: str) -> None:
    raw = raw_config(llama)
    raw["define"]["networks"]["other"] = {"kind": "loopback"}
    raw["define"]["phases"]["decode"] = {"kind": "decode", "prompt_lengths": [8], "steps": 2, "networks": ["other"]}
    raw["define"]["modes"]["plain"] = {"networks": ["near"]}
    with pytest.raises(ConfigError, match=f"nothing runs over networks .*: {why}"):
        check_config(raw | change, ROOT)
