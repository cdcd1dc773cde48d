"""`semgap price` on what a real run left, and on what is no longer of the current config."""

from __future__ import annotations

import subprocess
import sys

import pandas as pd
import pytest
from clone import CONFIG, MODES, Clone, environment

pytestmark = pytest.mark.alone

REMOTE = ("remote_cache", "sys_simulated")
PROBED_BYTES = 65536  # probe.payload_bytes of CONFIG


def price(clone: Clone, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "semgap", "price", "results/", "--rtt", "40ms", "--rate", "400Mbit", *arguments]
    code = environment() | {"PYTHONPATH": str(clone.root / "src")}
    return subprocess.run(command, cwd=clone.root, env=code, capture_output=True, text=True, timeout=120)


def over(rows: pd.DataFrame, rtt_s: float, s_per_byte: float) -> pd.Series:
    """Latency of each row of results.csv with the probed link replaced by another one."""
    seconds = rows["latency_mean_s"] + rows["round_trips_per_token"] * (rtt_s - rows["probe_rtt_s"])
    for way in ("up", "down"):
        probed = (1 / rows[f"probe_goodput_{way}_bytes_per_s"] - rows["probe_rtt_s"] / PROBED_BYTES).clip(lower=0)
        seconds += rows[f"{way}_payload_bytes_per_token"] * (s_per_byte - probed)
    return seconds


def test_a_run_over_loopback_is_priced_over_another_link(finished: Clone) -> None:
    """A planted wait is compute for the price: without it a tiny model on a busy machine computes too little to tell from its link."""
    finished.configure({"define": {"modes": {mode: {"plant_us": 200_000} for mode in REMOTE}}})
    finished.run("results/results.csv")
    done = price(finished, "--configfile", CONFIG, "--csv", "priced.csv")
    assert done.returncode == 0, done.stderr
    priced = pd.read_csv(finished.root / "priced.csv").set_index("mode")
    assert set(priced.index) == set(MODES)
    assert set(priced["from_networks"]) == {"loopback"}
    recorded = pd.read_csv(finished.root / "results/results.csv")
    assert priced.loc["local", "itl_ms"] == pytest.approx(1e3 * recorded.groupby("mode")["latency_mean_s"].mean()["local"])
    expected = 1e3 * over(recorded, 0.04, 8 / 400e6).groupby(recorded["mode"]).mean()
    for mode in REMOTE:
        assert priced.loc[mode, "itl_ms"] == pytest.approx(expected[mode], abs=0.1), "headers of frames"
        assert priced.loc[mode, "itl_ms"] > 100, "of the planted 200 ms, whatever a busy probe took"
    assert "the model's own error is not known" in done.stdout


def test_results_of_another_config_than_the_current_one_are_refused(finished: Clone) -> None:
    finished.configure({"define": {"modes": {"sys_simulated": {"codec": {"tokens": "fp16"}}}}})
    done = price(finished, "--configfile", CONFIG)
    assert done.returncode == 1
    assert "2 of 6 recorded trials are not of the current config and code" in done.stderr
    assert "sys_simulated, decode, trial 1 over loopback" in done.stderr
    assert "--as-recorded" in done.stderr
    assert price(finished, "--as-recorded").returncode == 0


def test_a_mode_that_the_config_no_longer_defines_is_stale(finished: Clone) -> None:
    finished.configure({"modes": ["local"]})
    assert price(finished, "--configfile", CONFIG).returncode == 0, "a choice of modes makes none stale"
    default = finished.root / "config/config.yaml"
    lines = default.read_text().splitlines(keepends=True)
    default.write_text("".join(line for line in lines if not line.startswith("    remote_cache: {")))
    done = price(finished, "--configfile", CONFIG)
    assert "2 of 6 recorded trials are not of the current config and code" in done.stderr
