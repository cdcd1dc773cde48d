"""`semgap run`: a trial without Snakemake, for people and for programs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from clone import CONFIG, Finished, environment

from semgap.analysis.calls import calls
from semgap.analysis.gaps import trial_gaps
from semgap.analysis.load import load_trials
from semgap.analysis.trial_rows import trial_rows
from semgap.experiment.trial_schemas import TrialResult, sealed_manifest

pytestmark = pytest.mark.alone


def run(finished: Finished, output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "semgap", "run", "--mode", "sys_simulated", "--config", CONFIG, "--output", str(output), *arguments]
    code = environment() | {"PYTHONPATH": str(finished.clone.root / "src")}
    done = subprocess.run(command, cwd=finished.clone.root, env=code, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def test_programs_get_one_object_with_the_numbers_of_the_tables(finished_run: Finished, tmp_path: Path) -> None:
    done = run(finished_run, tmp_path / "trial", "--json")
    (line,) = done.stdout.splitlines()
    assert "measuring sys_simulated, decode" in done.stderr
    told = json.loads(line)
    trial = tmp_path / "trial"
    manifest = json.loads((trial / "manifest.json").read_text())
    (trial / "manifest.json").write_bytes(sealed_manifest(manifest | {"apart": None}, trial))  # whatever else this machine does
    trials = load_trials([trial], {str(trial): manifest["cell_digest"]})
    (row,), (gap,) = trial_rows(trials).to_dict("records"), trial_gaps(trials, calls(trials)).to_dict("records")
    assert [told[key] for key in ("model", "network", "mode", "phase", "trial")] == ["tiny", "loopback", "sys_simulated", "decode", 1]
    assert told["up_bytes_per_token"] + told["down_bytes_per_token"] == pytest.approx(row["payload_bytes_per_token"])
    assert told["latency_ms"] == pytest.approx(1e3 * row["latency_mean_s"]) and told["metric"] == "ITL"
    assert told["gap_ms"] == pytest.approx(1e3 * gap["gap_s"]) and told["gap_reason"] is None
    assert told["codec_ms"] == pytest.approx(1e3 * (gap["client_codec_s"] + gap["worker_codec_s"]))
    assert told["exactness"]["keeps"] == row["keeps"] == "lossy" and told["exactness"]["tokens_compared"] == row["tokens_compared"]
    assert str(trial / "steps.parquet") in told["files"] and all(Path(file).is_file() for file in told["files"])


def test_whoever_waits_sees_the_steps_that_are_done_and_the_time_left(finished_run: Finished, tmp_path: Path) -> None:
    slow = {"define": {"modes": {"sys_simulated": {"plant_us": 700_000}}, "phases": {"decode": {"requests": 2}}}}
    (tmp_path / "slow.yaml").write_text(yaml.safe_dump(slow))
    done = run(finished_run, tmp_path / "trial", "--config", str(tmp_path / "slow.yaml"))
    # A warm-up of 3 steps and two requests of 4, 0.7 s each.
    assert re.search(r"measuring sys_simulated, decode\n3 of 11 steps, about \d+ s left\n7 of 11 steps, about \d+ s left\n", done.stdout)
    assert "progress: " not in done.stderr


def test_people_get_one_screen_that_says_which_trial_was_replaced(finished_run: Finished, tmp_path: Path) -> None:
    trial = tmp_path / "trial"
    TrialResult({}, {"provenance": {"utc": "2026-11-23T10:00:00+00:00"}}).write(trial)
    lines = run(finished_run, trial).stdout.splitlines()
    assert f"replacing the trial in {trial}, measured 2026-11-23T10:00:00+00:00" in lines and list(tmp_path.iterdir()) == [trial]
    assert len(lines) <= 24 and max(map(len, lines)) <= 140
    said = {line.split()[0]: line for line in lines}
    assert said.keys() >= {"sys_simulated,", "latency", "traffic", "exactness", "files"}
    assert " ms compute + " in said["latency"] and said["files"].endswith(str(trial))
