"""Whole trials on a real GPU: their figures come of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

if not torch.cuda.is_available():
    pytest.skip("no CUDA GPU here", allow_module_level=True)

from semgap.analysis.load import load_trials
from semgap.analysis.trial_rows import trial_rows
from semgap.experiment import compute_reference, fetch_model, measure_trial, trial_setup
from semgap.experiment.config import Coordinates, check_config
from semgap.experiment.trial_schemas import TrialResult

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.usefixtures("own_run")
def test_a_trial_on_a_gpu_has_its_time_use_and_energy_per_token(tmp_path: Path) -> None:
    rows = trial_rows_of(("local", "remote_cache"), tmp_path, "cuda")
    for _, row in rows.iterrows():
        assert row["device"] == "cuda"
        assert row["gpu_s_per_token"] > 0 and 0 < row["gpu_time_share"] <= 1.001
        assert row["gpu_power_w"] > 0 and 0 <= row["gpu_util_percent"] <= 100, row["gpu_reason"]
        assert row["joules_per_token"] > 0, row["joules_reason"]
        assert 0 < row["samplers_core_share"] < 2  # two sides' samplers, beside other tests
        if pd.isna(row["gpu_sm_activity_percent"]):  # steps of half a millisecond may fill too little of a window
            assert "GPM" in row["gpm_reason"]
        else:
            assert 0 <= row["gpu_sm_activity_percent"] <= 101


def trial_rows_of(modes: tuple[str, ...], directory: Path, device: str) -> Any:
    """Rows of results.csv of one trial each, of a small llama with long requests."""
    shape = {"vocab_size": 512, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8}
    decode = {"kind": "decode", "prompt_lengths": [16], "requests": 2, "steps": 600}
    define: dict[str, Any] = {"networks": {"loopback": {"kind": "loopback"}}, "phases": {"decode": decode}}
    define["models"] = {"small": {"source": "random", "architecture": "llama", "config": shape, "seed": 1}}
    define["modes"] = {"local": {"placement": "local"}, "remote_cache": {}}
    raw = {"define": define, "max_length": 1024, "device": device, "probe": {"round_trips": 3, "payload_bytes": 65536}}
    config = check_config(raw | {"telemetry": {"interval_s": 0.05, "sources": ["host", "gpu", "dmon"]}}, ROOT)
    place = trial_setup.Paths(directory / "model", ROOT)
    fetch_model.fetch_model(define["models"]["small"], "small", "float32", place.model_directory)
    reference = directory / "reference.npz"
    compute_reference.compute_reference(config.reference_cell("small", "decode"), place, reference)
    expected = {}
    for mode in modes:
        into = directory / mode
        measure_trial.measure_trial(config.cell(Coordinates("small", "loopback", mode, "decode", 1)), place, reference).write(into)
        expected[str(into)] = json.loads((into / "manifest.json").read_text())["cell_digest"]
    return trial_rows(load_trials([Path(each) for each in expected], expected))


@pytest.mark.usefixtures("own_run")
def test_a_load_on_a_gpu_runs_in_batches_of_graphs_and_gives_each_request_its_own_tokens(tmp_path: Path) -> None:
    result = load_trial_of("prefix", tmp_path, "cuda")
    assert (result.manifest["device"], result.manifest["executor"]) == ("cuda", "cuda_graph")
    assert result.manifest["exactness"]["promise_kept"] is True and result.manifest["exactness"]["tokens_compared"] > 0
    assert max(row["requests"] for row in result.tables["batches"].to_pylist()) == 4
    assert "not counted" in result.manifest["pcie_reason"]


def load_trial_of(mode: str, directory: Path, device: str) -> TrialResult:
    """A load of 1 and of 4 requests that begin alike, of a tiny llama."""
    raw = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    shape = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    raw["define"]["models"] = {"tiny": {"source": "random", "architecture": "llama", "config": shape, "seed": 1}}
    shared = {"prompt_lengths": [72, 80], "shared_prefix": 64, "steps": 12, "requests": 12, "concurrency": [1, 4]}
    raw["define"]["phases"] = {"closed": {"kind": "load", **shared}}
    raw |= {"models": ["tiny"], "phases": ["closed"], "modes": [mode], "max_length": 128, "device": device, "networks": ["loopback"]}
    raw["exactness"] = {"prompts": 1, "prompt_length": 8, "tokens": 6}
    raw |= {"probe": {"round_trips": 3, "payload_bytes": 65536}, "telemetry": {"interval_s": 0.05, "sources": ["host"]}}
    config, place = check_config(raw, ROOT), trial_setup.Paths(directory / "model", ROOT)
    fetch_model.fetch_model(raw["define"]["models"]["tiny"], "tiny", "float32", place.model_directory)
    compute_reference.compute_reference(config.reference_cell("tiny", "closed"), place, directory / "reference.npz")
    return measure_trial.measure_trial(config.cell(Coordinates("tiny", "loopback", mode, "closed", 1)), place, directory / "reference.npz")
