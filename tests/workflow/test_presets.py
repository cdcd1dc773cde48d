"""The presets plan a whole run, and other models are chosen with one --config."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from clone import SNAKEMAKE, Clone, environment, job_names


def _planned(clone: Clone, preset: str, models: Sequence[str]) -> set[str]:
    """The jobs of a dry run."""
    command = [str(SNAKEMAKE), "--cores", "1", "-n", "--configfile", f"config/{preset}.yaml", "--config", f"models={','.join(models)}"]
    done = subprocess.run(command, cwd=clone.root, env=environment(), text=True, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return set(job_names(done.stdout + done.stderr))


def test_a_dry_run_of_the_gptj_preset_plans_the_model_every_mode_and_its_check(tmp_path: Path) -> None:
    clone, models = Clone.of_repository(tmp_path / "clone"), ["gptj-6b", "gptj-6b-random", "gptj-6b-path"]
    (clone.root / "models/gpt-j-6B").mkdir(parents=True)
    jobs = _planned(clone, "gptj-6b", models)
    for model in models:
        assert f"fetching model {model}" in jobs
        assert {f"measuring naive, decode, trial {number} ({model}, loopback)" for number in (1, 2, 3)} <= jobs
        assert f"measuring sys_delta, recovery-evict, trial 3 ({model}, loopback)" in jobs
        assert f"measuring know_layout_ans, decode, trial 1 ({model}, loopback)" in jobs
        assert f"checking what know_head keeps ({model})" in jobs
    assert {job.partition("(")[2].partition(",")[0].rstrip(")") for job in jobs if "(" in job} == set(models)


def test_a_dry_run_of_the_qwen3_preset_plans_both_sizes_from_every_source(tmp_path: Path) -> None:
    clone = Clone.of_repository(tmp_path / "clone")
    models = [f"qwen3-{size}{source}" for size in ("0.6b", "8b") for source in ("", "-path", "-random")]
    for name in ("Qwen3-0.6B", "Qwen3-8B"):
        (clone.root / "models" / name).mkdir(parents=True)
    jobs = _planned(clone, "qwen3", models)
    for model in models:
        assert {f"fetching model {model}", f"checking what know_head keeps ({model})"} <= jobs
        assert {f"measuring {mode}, decode, trial 3 ({model}, loopback)" for mode in ("local", "naive", "know_loop", "sys")} <= jobs
        assert f"measuring sys_delta, recovery-evict, trial 1 ({model}, loopback)" in jobs


def test_a_dry_run_of_the_network_sweep_checks_each_network_once_and_measures_every_mode_over_it(tmp_path: Path) -> None:
    clone = Clone.of_repository(tmp_path / "clone")
    command = [str(SNAKEMAKE), "--cores", "1", "-n", "--configfile", "config/network-sweep.yaml"]
    done = subprocess.run(command, cwd=clone.root, env=environment(), text=True, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    names = job_names(done.stdout + done.stderr)
    networks = [f"rtt{rtt}ms-{rate}" for rtt in ("0.2", "1", "10", "50") for rate in ("100mbit", "1gbit")]
    assert sorted(name for name in names if name.startswith("checking network ")) == sorted(f"checking network {name}" for name in networks)
    for mode in ("local", "remote_cache", "know_head", "sys", "sys_ahead"):
        assert {f"measuring {mode}, decode-96, trial 3 (smollm2-135m, {name})" for name in networks} <= set(names)
