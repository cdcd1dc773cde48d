"""Trials of requests whose beginning another session has computed: their rows, their books over a link of the KV host, and their tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from semgap.analysis.load import load_trials
from semgap.analysis.results import EXACTNESS_COLUMNS, Results, pd
from semgap.analysis.sums import fault_of_trial
from semgap.analysis.tables import prefix
from semgap.engine.model_files import load_digest
from semgap.experiment.check_exactness import check_exactness
from semgap.experiment.compute_exactness_reference import compute_exactness_reference
from semgap.experiment.compute_reference import compute_reference
from semgap.experiment.config import Config, Coordinates, check_config
from semgap.experiment.measure_trial import measure_trial
from semgap.experiment.staleness import content_digest
from semgap.experiment.trial_schemas import TrialResult
from semgap.experiment.trial_setup import Paths, TrialError
from semgap.kv.prefix_store import LAYER_BYTES, PREFIX_BLOCK_BYTES

pytestmark = [pytest.mark.alone, pytest.mark.usefixtures("own_run")]

ROOT = Path(__file__).resolve().parents[2]
LOOSE = {"rtt_ms": 100, "goodput": 10, "lateness_ms": 1000}  # other work runs beside these tests
MODES = ("prefix_recompute", "prefix_whole", "prefix_blocks", "prefix_planes", "prefix_int8", "prefix_auto", "local")
BLOCK_BYTES = 3 * 2 * 2 * 64 * 32 * 4  # of the tiny llama: layers, keys and values, heads, positions, head size


@pytest.fixture(scope="module")
def config(llama: Path) -> Config:
    """config/kv.yaml over the tiny llama, short prompts and one network."""
    raw = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    preset = yaml.safe_load((ROOT / "config/kv.yaml").read_text())
    phase = {"kind": "prefix", "prompt_lengths": [100], "prefix_lengths": [0, 64], "requests": 2}
    raw["define"]["models"], raw["models"] = {"tiny": load_digest(llama).source}, ["tiny"]
    raw["define"]["phases"], raw["phases"] = {"prefix": phase}, ["prefix"]
    raw["define"]["networks"] = {
        "far": {"kind": "relay", "delay_ms": 5, "rate": "1Gbit", "tolerance": LOOSE},
        "kv_far": {"kind": "loopback", "kv": "far"},
    }
    raw["define"]["modes"] = {name: preset["define"]["modes"][name] | {"networks": None, "phases": ["prefix"]} for name in MODES}
    raw |= {"networks": ["kv_far"], "modes": list(MODES), "max_length": 128, "device": "cpu"}
    raw |= {"probe": {"round_trips": 3, "payload_bytes": 1 << 20}, "telemetry": {"interval_s": 0.05, "sources": ["host"]}}
    raw["exactness"] = {"prompts": 2, "prompt_length": 80, "tokens": 4, "passages": []}
    return check_config(raw, ROOT)


@pytest.fixture(scope="module")
def run(config: Config, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., TrialResult]]:
    """The result of a mode's trial, run once; all trials are of one session."""
    place, reference = Paths(llama, ROOT), tmp_path_factory.mktemp("reference") / "reference.npz"
    compute_reference(config.reference_cell("tiny", "prefix"), place, reference)
    done: dict[str, TrialResult] = {}

    def run(mode: str, **over: Any) -> TrialResult:
        cell = config.cell(Coordinates("tiny", "kv_far", mode, "prefix", 1))
        if over:
            return measure_trial(cell | over, place, reference)
        if mode not in done:
            done[mode] = measure_trial(cell, place, reference)
        return done[mode]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEMGAP_SESSION", "one")
        yield run


def _measured(result: TrialResult) -> list[dict[str, Any]]:
    return [row for row in result.tables["steps"].to_pylist() if row["measured"]]


@pytest.mark.parametrize("mode", MODES[:-1])
def test_each_request_finds_what_the_session_before_published_for_it_and_nothing_else(run: Callable[..., TrialResult], mode: str) -> None:
    result = run(mode)
    rows, policy = _measured(result), result.manifest["cell"]["policy"]
    fetches = policy["prefix"] != "recompute"
    assert [(row["kind"], row["prefix_tokens"], row["tokens_in"]) for row in rows] == [("prefill", length, 100) for length in (0, 64) * 2]
    assert [row["missing_bytes"] for row in rows] == [BLOCK_BYTES * (fetches and row["prefix_tokens"] > 0) for row in rows]
    ways = {"fetch_whole", "fetch_blocks", "recompute"} if policy["prefix"] == "auto" else {policy["prefix"]}
    assert all(row["recovery"] in ways for row in rows if row["prefix_tokens"]) or not fetches
    assert all(row["fallback"] is None for row in rows) and result.manifest["kv"]["fallbacks"] == []
    assert all(row["logits_bitwise"] for row in rows) == (mode != "prefix_int8") and result.manifest["exactness"]["promise_kept"]
    assert result.manifest["reconciliation"]["connections"] == 1 + fetches
    if fetches:
        known = [row for row in rows if row["prefix_tokens"]]
        assert all(row["stall_s"] > 0.01 for row in rows)  # a round trip of the link
        assert all(row["predicted_recompute_s"] > 0 for row in known)
        assert all(row["predicted_fetch_s"] > 0.01 for row in known)


def test_the_books_of_both_sessions_reconcile_with_the_relay_and_again_when_the_trial_is_read(
    run: Callable[..., TrialResult], tmp_path: Path
) -> None:
    result = run("prefix_blocks")
    assert result.manifest["network"]["kv"]["relay"]["connections"]
    saved = {
        number: sum(row["payload_bytes"] for row in result.tables["ledger"].to_pylist() if _is(row, number, "put_prefix_block"))
        for number in (0, 1)
    }
    assert saved == {0: 0, 1: 2 * (BLOCK_BYTES + 64 * 4)}  # published by the other session: blocks, and their token ids
    result.write(tmp_path / "trial")
    assert fault_of_trial(tmp_path / "trial", result.manifest | _written(tmp_path / "trial")) is None


def _is(row: dict[str, Any], connection: int, operation: str) -> bool:
    return (row["connection"], row["side"], row["operation"]) == (connection, "kv_host", operation)


def _written(directory: Path) -> dict[str, Any]:
    import json

    files: dict[str, Any] = json.loads((directory / "manifest.json").read_bytes())
    return {"files": files["files"]}


def test_the_table_compares_the_modes_with_the_one_that_computes(run: Callable[..., TrialResult], tmp_path: Path) -> None:
    trials = {}
    for mode in MODES:
        result = run(mode)
        result.write(tmp_path / mode)
        trials[str(tmp_path / mode)] = result.manifest["cell_digest"]
    read = load_trials([Path(name) for name in trials], trials)
    table = prefix.table(Results.of(read, pd.DataFrame(columns=list(EXACTNESS_COLUMNS)), pd.DataFrame(), {}))
    assert table[["mode", "prefix_tokens"]].to_numpy().tolist() == [[mode, length] for mode in MODES for length in (0, 64)]
    by = table.set_index(["mode", "prefix_tokens"])
    assert by.loc[("prefix_whole", 64), "fetched_to_missing"] == pytest.approx(1, abs=0.02)
    ratios = by["ratio_to_recompute"].unstack("prefix_tokens")
    assert ratios.drop("local").notna().all(axis=None) and ratios.loc["local"].isna().all()
    assert by.loc[("prefix_int8", 64), "max_kl_nats"] > 0 == by.loc[("prefix_planes", 64), "max_kl_nats"]
    assert by.loc[("prefix_auto", 64), ["fetch_requests", "recompute_requests"]].sum() == 2


def test_the_check_of_a_lossy_codec_runs_over_a_fetched_prefix(config: Config, llama: Path, tmp_path: Path) -> None:
    cell = config.exactness_cell("tiny", "prefix_int8")
    assert cell["phase_spec"]["prefix_lengths"] == [64]
    drawn, text = tmp_path / "drawn.npz", tmp_path / "text.npz"
    compute_exactness_reference(config.exactness_reference_cell("tiny"), Paths(llama, ROOT), drawn, text)
    row = check_exactness(cell, Paths(llama, ROOT), drawn, text)
    assert row["text_mean_kl_nats"] > 0 and row["cell_digest"] == content_digest(cell)


def test_a_kv_host_with_room_for_one_prefix_and_not_for_all_fails_the_trial_by_name(
    run: Callable[..., TrialResult], config: Config
) -> None:
    room = BLOCK_BYTES + PREFIX_BLOCK_BYTES + 3 * LAYER_BYTES + 50_000  # and the books of a handle
    with pytest.raises(TrialError, match=r"has 0 of the 64 tokens that were published for request 2: .* raise config.worker.kv_host_bytes"):
        run("prefix_blocks", worker=config["worker"] | {"kv_host_bytes": room})


def test_a_kv_host_that_is_too_small_for_the_prefixes_fails_the_trial_by_name(run: Callable[..., TrialResult], config: Config) -> None:
    with pytest.raises(TrialError, match=r"could not be published: the KV host: .* bytes of blocks and their books are more"):
        run("prefix_blocks", worker=config["worker"] | {"kv_host_bytes": 4096})
