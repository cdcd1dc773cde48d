"""Trials of modes with `codec.kv: auto`, over a slow link of the KV host: the codecs that they choose, record and show, and their check."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from semgap.analysis.load import load_trials
from semgap.analysis.results import Results, load_codecs, load_exactness
from semgap.analysis.sums import fault_of_trial
from semgap.analysis.tables import handover, prefix, recovery
from semgap.engine.model_files import load_digest
from semgap.experiment.check_exactness import check_exactness
from semgap.experiment.compute_exactness_reference import compute_exactness_reference
from semgap.experiment.compute_reference import compute_reference
from semgap.experiment.config import Config, Coordinates, check_config
from semgap.experiment.measure_trial import measure_trial
from semgap.experiment.trial_schemas import TrialResult
from semgap.experiment.trial_setup import Paths

pytestmark = [pytest.mark.alone, pytest.mark.usefixtures("own_run")]

ROOT = Path(__file__).resolve().parents[2]
LOOSE = {"rtt_ms": 100, "goodput": 10, "lateness_ms": 1000}  # other work runs beside these tests
LOSSY = {"prefix_codec_auto": "prefix", "handover_codec_auto": "handover", "delta_codec_auto": "recovery-evict"}
EXACT = {f"{mode}_exact": phase for mode, phase in LOSSY.items()}
PHASES = LOSSY | EXACT


@pytest.fixture(scope="module")
def config(llama: Path) -> Config:
    """The modes of config/kv.yaml that choose codecs, and the same with equal bits, over the tiny llama and a link of 8 Mbit."""
    raw = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    preset = yaml.safe_load((ROOT / "config/kv.yaml").read_text())["define"]["modes"]
    modes = {mode: preset[mode] | {"networks": None} for mode in LOSSY}
    raw["define"]["modes"] = modes | {f"{mode}_exact": row | {"keeps": "bitwise"} for mode, row in modes.items()}
    raw["define"]["models"], raw["models"] = {"tiny": load_digest(llama).source}, ["tiny"]
    raw["define"]["phases"] = {
        "prefix": {"kind": "prefix", "prompt_lengths": [100], "prefix_lengths": [0, 64], "requests": 2},
        "handover": {"kind": "handover", "prompt_lengths": [70], "requests": 4, "steps": 2},
        "recovery-evict": {"kind": "recovery", "prompt_lengths": [70], "steps": 8, "evict_fractions": [0, 0.5]},
    }
    raw["define"]["networks"] = {
        "far": {"kind": "relay", "rtt_ms": 1, "rate": "8Mbit", "tolerance": LOOSE},
        "kv_far": {"kind": "loopback", "kv": "far"},
    }
    raw |= {"modes": list(PHASES), "phases": list(LOSSY.values()), "networks": ["kv_far"], "max_length": 128, "device": "cpu"}
    raw |= {"probe": {"round_trips": 3, "payload_bytes": 65536}, "telemetry": {"interval_s": 0.05, "sources": ["host"]}}
    raw["exactness"] = {"prompts": 2, "prompt_length": 80, "tokens": 4, "passages": []}
    return check_config(raw, ROOT)


@pytest.fixture(scope="module")
def run(config: Config, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TrialResult]:
    """The result of a mode's trial, run once."""
    references: dict[str, Path] = {}
    done: dict[str, TrialResult] = {}

    def measure(mode: str) -> TrialResult:
        phase, paths = PHASES[mode], Paths(llama, ROOT)
        if phase not in references:
            references[phase] = tmp_path_factory.mktemp("reference") / "reference.npz"
            compute_reference(config.reference_cell("tiny", phase), paths, references[phase])
        if mode not in done:
            done[mode] = measure_trial(config.cell(Coordinates("tiny", "kv_far", mode, phase, 1)), paths, references[phase])
        return done[mode]

    return measure


def measured(result: TrialResult) -> list[dict[str, Any]]:
    return [row for row in result.tables["steps"].to_pylist() if row["measured"]]


def layers(text: str) -> dict[str, int]:
    """Layers by codec."""
    return {name: int(count) for name, count in (run.split(" x ") for run in text.split(", "))}


@pytest.mark.parametrize("mode", PHASES)
def test_each_step_that_fetched_says_in_which_codec_each_layer_came_and_the_others_nothing(
    run: Callable[..., TrialResult], mode: str
) -> None:
    result = run(mode)
    rows = measured(result)
    fetched = [row for row in rows if row["fetched_network_bytes"] and row["missing_bytes"]]
    assert fetched and result.manifest["exactness"]["promise_kept"] and result.manifest["kv"]["fallbacks"] == []
    for row in rows:
        assert (row["kv_codecs"] is not None) is (row in fetched)
    for row in fetched:
        came = layers(row["kv_codecs"])
        assert sum(came.values()) == (2 if row["evict_fraction"] == 0.5 else 3)
        if mode in EXACT:
            assert set(came) <= {"raw", "planes_zstd"} and row["logits_bitwise"] and row["kl_nats"] == 0
    if mode in LOSSY:
        assert any(set(layers(row["kv_codecs"])) & {"int8", "int4"} and row["kl_nats"] > 0 for row in fetched)


def test_tables_show_the_codecs_and_the_sums_of_such_trials_add_up(run: Callable[..., TrialResult], tmp_path: Path) -> None:
    directories = [tmp_path / mode for mode in LOSSY]
    for directory, mode in zip(directories, LOSSY, strict=True):
        run(mode).write(directory)
    assert [fault for each in directories if (fault := fault_of_trial(each, json.loads((each / "manifest.json").read_text())))] == []
    trials = load_trials(directories, {str(tmp_path / mode): run(mode).manifest["cell_digest"] for mode in LOSSY})
    results = Results.of(trials, load_exactness([], {}), load_codecs([], {}), {})
    known = prefix.table(results).set_index("prefix_tokens")
    assert known["kv_codec"].eq("auto").all() and known["kv_codecs"].isna().tolist() == [True, False] and known.loc[64, "max_kl_nats"] > 0
    (moved,) = handover.table(results).to_dict("records")
    assert moved["kv_codec"] == "auto" and "int" in moved["kv_codecs"] and moved["codec_ratio"] > 2
    evicted = recovery.table(results).set_index("evict_fraction")
    assert evicted["kv_codec"].eq("auto").all() and "int" in evicted.loc[0.5, "kv_codecs"] and evicted["kv_codecs"].isna()[0.0]
    assert results.restores_held_out["priced_s"].isna().all()


@pytest.mark.parametrize("mode", LOSSY)
def test_the_check_of_a_lossy_mode_shows_the_worst_that_it_may_choose(config: Config, llama: Path, tmp_path: Path, mode: str) -> None:
    """Over loopback, where it would choose nothing lossy."""
    drawn, text = tmp_path / "drawn.npz", tmp_path / "text.npz"
    compute_exactness_reference(config.exactness_reference_cell("tiny"), Paths(llama, ROOT), drawn, text)
    row = check_exactness(config.exactness_cell("tiny", mode), Paths(llama, ROOT), drawn, text)
    assert row["text_mean_kl_nats"] > 0 and row["promise_kept"]
