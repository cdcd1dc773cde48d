"""Trials of recovery phases with real workers and KV hosts: what is missing, what moves for it, and whose row it stands in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from semgap.analysis.load import checked_trials
from semgap.engine.model_files import load_digest
from semgap.experiment.by_hand import NO_GAP, screen, summary_of
from semgap.experiment.cell import Cell
from semgap.experiment.check_exactness import check_exactness
from semgap.experiment.compute_exactness_reference import compute_exactness_reference
from semgap.experiment.compute_reference import compute_reference
from semgap.experiment.config import Config, Coordinates, check_config
from semgap.experiment.measure_trial import measure_trial
from semgap.experiment.staleness import content_digest
from semgap.experiment.trial_schemas import TrialResult
from semgap.experiment.trial_setup import Paths, client_spec

pytestmark = [pytest.mark.alone, pytest.mark.usefixtures("own_run")]

ROOT = Path(__file__).resolve().parents[2]
PROMPT, LAYERS = 70, 3
FRACTIONS = [0, 0.5, 1]
EVICTED = {0: 0, 0.5: 2, 1: 3}


@pytest.fixture(scope="module")
def config(llama: Path) -> Config:
    """The default config's recovery modes over the tiny llama, and one whose cost model chooses."""
    raw = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    raw["define"]["models"], raw["models"] = {"tiny": load_digest(llama).source}, ["tiny"]
    phases = raw["define"]["phases"]
    phases["recovery-evict"] |= {"prompt_lengths": [PROMPT], "steps": 6, "evict_fractions": FRACTIONS}
    phases["recovery-budget_1_2"] |= {"prompt_lengths": [PROMPT], "steps": 2}
    modes = raw["define"]["modes"]
    modes["sys_auto"] = modes["sys_delta"] | {"recovery": "auto", "phases": ["recovery-evict"]}
    modes["lossy_delta"] = {"recovery": "delta", "codec": {"kv": "int4"}, "keeps": "lossy", "phases": ["recovery-evict"]}
    raw["modes"] = ["local", "remote_cache_reload", "remote_cache_recompute", "sys_delta", "sys_auto", "lossy_delta"]
    raw |= {"phases": ["decode", "recovery-evict", "recovery-budget_1_2"], "max_length": 100, "device": "cpu"}
    phases["decode"] |= {"prompt_lengths": [PROMPT], "steps": 2}
    raw |= {"probe": {"round_trips": 3, "payload_bytes": 65536}, "telemetry": {"interval_s": 0.05, "sources": ["host"]}}
    raw["exactness"] = {"prompts": 1, "prompt_length": PROMPT, "tokens": 8}
    return check_config(raw, ROOT)


@pytest.fixture(scope="module")
def place(llama: Path) -> Paths:
    return Paths(llama, ROOT)


@pytest.fixture(scope="module")
def trial_of(config: Config, place: Paths, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], TrialResult]:
    """The result of a mode's trial of a phase, run once."""
    references: dict[str, Path] = {}
    done: dict[tuple[str, str], TrialResult] = {}

    def run(mode: str, phase: str = "recovery-evict") -> TrialResult:
        if phase not in references:
            references[phase] = tmp_path_factory.mktemp("reference") / "reference.npz"
            compute_reference(config.reference_cell("tiny", phase), place, references[phase])
        if (mode, phase) not in done:
            done[mode, phase] = measure_trial(config.cell(Coordinates("tiny", "loopback", mode, phase, 1)), place, references[phase])
        return done[mode, phase]

    return run


def _measured(result: TrialResult) -> list[dict[str, Any]]:
    return [row for row in result.tables["steps"].to_pylist() if row["measured"]]


def _bytes(layers: int, positions: int) -> int:
    """Of layers of the tiny llama: [K, V] x KV heads x positions x head_dim x 4 bytes."""
    return layers * 2 * 2 * positions * 32 * 4


@pytest.mark.parametrize("mode", ["remote_cache_reload", "remote_cache_recompute", "sys_delta", "sys_auto"])
def test_each_step_misses_its_fraction_of_what_is_filled_and_gets_it_back_as_its_mode_says(
    trial_of: Callable[..., TrialResult], mode: str
) -> None:
    rows = _measured(trial_of(mode))
    assert [sorted(row["evict_fraction"] for row in block) for block in (rows[:3], rows[3:])] == [FRACTIONS] * 2
    for row in rows:
        layers = EVICTED[row["evict_fraction"]]
        assert row["evicted_layers"] == layers and row["missing_bytes"] == _bytes(layers, row["position"])
        ways = {"remote_cache_reload": {"reload"}, "remote_cache_recompute": {"recompute"}, "sys_delta": {"delta"}}
        expected = ways.get(mode, {"delta", "recompute"}) if layers else {None}
        assert row["recovery"] in expected and row["recovery"] == row["recovery_planned"] and row["fallback"] is None
        assert (row["stall_s"] > 0) is bool(layers)
        assert (row["predicted_s"] is not None) is (mode == "sys_auto" and bool(layers))
    alone = [row["evict_fraction"] for row in rows if row["restore_alone_s"] is not None]
    assert sorted(alone) == ([0.5, 1] if mode in ("sys_delta", "sys_auto") else [])  # one of two steps with a fraction


@pytest.mark.parametrize("mode", ["remote_cache_reload", "remote_cache_recompute", "sys_delta", "sys_auto"])
def test_the_sums_of_a_trial_hold_when_it_is_loaded_also_those_of_its_kv_host(
    trial_of: Callable[..., TrialResult], config: Config, tmp_path: Path, mode: str
) -> None:
    trial_of(mode).write(tmp_path / "trial")
    digest = content_digest(config.cell(Coordinates("tiny", "loopback", mode, "recovery-evict", 1)))
    (checked,) = checked_trials([tmp_path / "trial"], {str(tmp_path / "trial"): digest})
    assert bool(checked.manifest["reconciliation"]["kv_host"]) is (mode != "remote_cache_recompute")


def test_modes_evict_the_same_layers_before_the_same_steps(trial_of: Callable[..., TrialResult]) -> None:
    orders = [[row["evict_fraction"] for row in _measured(trial_of(mode))] for mode in ("remote_cache_reload", "sys_delta", "sys_auto")]
    assert orders[0] == orders[1] == orders[2] != FRACTIONS * 2


def test_the_client_of_a_trial_knows_its_number_which_the_order_of_fractions_depends_on(
    config: Config, place: Paths, tmp_path: Path
) -> None:
    cells = [Cell.of(config.cell(Coordinates("tiny", "loopback", "sys_delta", "recovery-evict", trial))) for trial in (1, 3)]
    assert [client_spec(cell, place, tmp_path).trial for cell in cells] == [1, 3]


@pytest.mark.parametrize("mode", ["remote_cache_reload", "remote_cache_recompute", "sys_delta", "sys_auto"])
def test_the_control_decodes_the_positions_of_the_steps_and_takes_no_memory_from_them(
    trial_of: Callable[..., TrialResult], mode: str
) -> None:
    result = trial_of(mode)
    control, rows = result.tables["control"].to_pylist(), _measured(result)
    assert [(row["step"], row["position"]) for row in control] == [(row["step"], row["position"]) for row in rows]
    assert all(row["compute_s"] > 0 for row in control) and result.manifest["control"]["reason"] is None
    assert result.manifest["kv"]["budget_bytes"] == 2 * _bytes(LAYERS, 100)


def test_requests_that_share_memory_have_no_control_and_the_manifest_says_why(trial_of: Callable[..., TrialResult]) -> None:
    result = trial_of("sys_delta", "recovery-budget_1_2")
    assert result.tables["control"].num_rows == 0 and "share KV memory" in result.manifest["control"]["reason"]


def test_reload_fetches_all_that_is_filled_and_delta_what_is_missing_through_its_codec(trial_of: Callable[..., TrialResult]) -> None:
    for row in _measured(trial_of("remote_cache_reload")):
        if row["recovery"]:
            assert 0 <= row["fetched_network_bytes"] - _bytes(LAYERS, row["position"]) < 600
    for row in _measured(trial_of("sys_delta")):
        if row["recovery"]:
            assert 0.5 * row["missing_bytes"] < row["fetched_network_bytes"] < row["missing_bytes"]
    assert all(row["fetched_network_bytes"] == 0 for row in _measured(trial_of("remote_cache_recompute")))


def test_what_is_saved_before_a_step_is_what_is_newer_than_the_shadow(trial_of: Callable[..., TrialResult]) -> None:
    evicted = [row for row in _measured(trial_of("remote_cache_reload")) if row["evicted_layers"]]
    whole, tails = _bytes(LAYERS, evicted[0]["position"]), [_bytes(LAYERS, row["position"] - 64) for row in evicted]
    assert [row["saved_tensor_bytes"] for row in evicted] == [whole, *tails[1:]]


@pytest.mark.parametrize("mode", ["remote_cache_reload", "sys_delta"])
def test_the_ledger_holds_both_sides_of_the_link_to_the_kv_host_and_all_that_the_steps_fetched(
    trial_of: Callable[..., TrialResult], mode: str
) -> None:
    result = trial_of(mode)
    rows = result.tables["ledger"].to_pylist()
    ours, theirs = ([row for row in rows if row["side"] == side] for side in ("worker_to_kv_host", "kv_host"))
    counted = ("direction", "operation", "kind", "tensor_class", "frames", "tensor_bytes", "payload_bytes", "header_bytes")
    assert {tuple(row[name] for name in counted) for row in ours if row["frames"] or row["payload_bytes"]} == {
        tuple(row[name] for name in counted) for row in theirs if row["frames"] or row["payload_bytes"]
    }
    books = result.manifest["reconciliation"]["kv_host"]
    assert books["agreed"] and books["frame_bytes_by_kind"]["delta"] > 0
    in_steps = sum(row["fetched_network_bytes"] for row in result.tables["steps"].to_pylist() if row["fetched_network_bytes"])
    fetches = [row for row in ours if row["operation"] == "fetch_missing_kv_layers"]
    in_ledger = sum(row["payload_bytes"] + row["header_bytes"] for row in fetches)
    assert in_steps == in_ledger if mode == "remote_cache_reload" else in_steps < in_ledger  # delta's lone restores are not in steps


@pytest.mark.parametrize("mode", ["remote_cache_reload", "sys_delta"])
def test_live_requests_share_the_budget_and_each_step_has_its_own_costs(trial_of: Callable[..., TrialResult], mode: str) -> None:
    result = trial_of(mode, "recovery-budget_1_2")
    rows = _measured(result)
    assert len(rows) == 4 * 2
    for row in rows:
        assert row["missing_bytes"] == _bytes(LAYERS, row["position"])  # round robin: the least recently used is the next one
        assert row["saved_network_bytes"] > 0 and row["evict_fraction"] is None
    assert result.manifest["kv"]["budget_bytes"] == 2 * _bytes(LAYERS, 100)
    order = [(row["request"], row["step"]) for row in rows]
    assert order == [(request, step) for request in range(1, 5) for step in (1, 2)]


def test_what_a_run_by_hand_says_of_a_trial_holds_recovery_and_fallbacks_also_without_logits(trial_of: Callable[..., TrialResult]) -> None:
    result = trial_of("sys_delta")
    summary = summary_of(result, Path("files"))
    said = screen(summary)
    assert (summary["gap_ms"], summary["gap_reason"]) == (None, NO_GAP) and NO_GAP in said
    assert "7 of 7 tokens equal, the client saw no logits" in said and "4 steps missed KV blocks" in said and "fallbacks" not in said
    assert "fallbacks 2: " in screen(summary | {"fallbacks": ["gone: block 0"] * 2})
    assert "logits bitwise equal" in screen(summary_of(trial_of("remote_cache_reload"), Path("files")))


@pytest.mark.parametrize("mode", ["remote_cache_reload", "remote_cache_recompute", "sys_delta", "sys_auto"])
def test_promises_are_kept_under_pressure(trial_of: Callable[..., TrialResult], mode: str) -> None:
    summary = trial_of(mode).manifest["exactness"]
    assert summary["promise_kept"] and summary["tokens_compared"] == summary["tokens_equal"] == 7


def test_the_exactness_of_a_recovery_mode_is_measured_with_layers_evicted(config: Config, place: Paths, tmp_path: Path) -> None:
    compute_exactness_reference(config.exactness_reference_cell("tiny"), place, tmp_path / "drawn.npz", tmp_path / "text.npz")
    lossy, reload = (
        check_exactness(config.exactness_cell("tiny", mode), place, tmp_path / "drawn.npz", tmp_path / "text.npz")
        for mode in ("lossy_delta", "remote_cache_reload")
    )
    assert lossy["text_max_kl_nats"] > 0 and not lossy["text_logits_bitwise"]
    assert reload["text_logits_bitwise"] and reload["promise_kept"]
    assert config.exactness_cell("tiny", "local")["phase_spec"]["evict_fractions"] == []
