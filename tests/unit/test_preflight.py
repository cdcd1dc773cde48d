"""What a machine lacks for a run is told before the first job, all of it at once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from semgap.cli import main
from semgap.experiment.config import check_config
from semgap.experiment.config_checks import ConfigError
from semgap.experiment.preflight import require_machine, require_slurm

ROOT = Path(__file__).resolve().parents[2]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, and what is tested is that it has none")


@pytest.fixture
def values() -> dict[str, Any]:
    return copy.deepcopy(yaml.safe_load((ROOT / "config/config.yaml").read_text()))


def _refusal(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as refused:
        require_machine(check_config(values, ROOT))
    return str(refused.value)


def test_the_default_run_needs_nothing_that_this_machine_lacks(values: dict[str, Any]) -> None:
    require_machine(check_config(values, ROOT))


@without_gpu
def test_a_gpu_and_the_codecs_of_all_chosen_modes_are_refused_together(values: dict[str, Any]) -> None:
    values["define"]["modes"] |= {name: {"codec": {"reply": "nvcomp_ans"}} for name in ("mine", "other", "unused")}
    said = _refusal(values | {"device": "cuda", "modes": ["local", "mine", "other"], "phases": ["decode"]}).splitlines()
    assert [line.split(":")[0] for line in said] == [
        "device 'cuda' needs a usable GPU, which this machine lacks",
        "mode 'mine' cannot be run on this machine",
        "mode 'other' cannot be run on this machine",
    ]


@without_gpu
def test_graphs_need_a_gpu_where_the_device_is_left_open(values: dict[str, Any]) -> None:
    assert "executor cuda_graph cannot run on cpu" in _refusal(values | {"device": "auto", "executor": "cuda_graph"})


@without_gpu
def test_what_an_external_worker_alone_needs_is_not_asked_here(values: dict[str, Any]) -> None:
    values["define"]["modes"]["mine"] = {"codec": {"kv": "nvcomp_ans"}, "recovery": "delta"}
    values |= {"device": "auto", "modes": ["local", "mine"], "phases": ["decode"]}
    assert "codec.kv 'nvcomp_ans' cannot be encoded or decoded by the worker" in _refusal(values)
    require_machine(check_config(values | {"worker": values["worker"] | {"launch": "external", "address": "h:1"}}, ROOT))


@without_gpu
def test_a_trial_by_hand_is_refused_before_anything_is_fetched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load((ROOT / "config/config.yaml").read_text()) | {"device": "cuda"}))
    assert main(["run", "--config", str(config), "--root", str(ROOT), "--mode", "remote_cache"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("semgap run: device 'cuda' needs a usable GPU, which this machine lacks")


def test_a_machine_without_slurm_is_refused_with_the_commands_that_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the first submission would fail, and Snakemake take the tables away."""
    for command in ("sbatch", "squeue", "scancel"):
        (tmp_path / command).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ConfigError, match="of Slurm's commands sacct cannot be found on PATH: run snakemake with this profile on the cluster's"
    ):
        require_slurm()
    (tmp_path / "sacct").touch(mode=0o755)
    require_slurm()
