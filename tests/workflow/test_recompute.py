"""The tables of a real run, against what code that shares nothing with semgap computes from its raw files."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from clone import CONFIG, Clone, environment

SCRIPT = Path(__file__).with_name("recompute")

pytestmark = pytest.mark.alone


def recompute(clone: Clone) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tests/workflow/recompute", "results", "--configfile", CONFIG]
    return subprocess.run(command, cwd=clone.root, env=environment(), capture_output=True, text=True, timeout=120)


def test_the_script_shares_no_code_with_the_tables() -> None:
    nodes = [node for file in SCRIPT.glob("*.py") for node in ast.walk(ast.parse(file.read_text()))]
    imported = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    imported |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported and not any(name.partition(".")[0] in ("semgap", "importlib") for name in imported)


def test_every_number_of_a_run_is_found_again(finished: Clone) -> None:
    done = recompute(finished)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = {line.partition(":")[0]: int(line.split()[1]) for line in done.stdout.splitlines()}
    empty = {table for table, values in counted.items() if not values}
    assert empty == {"recovery", "recovery_pairs", "prefix", "facts", "load"}, "no such phase or rung"
    assert len(counted) == 15


def test_a_changed_number_is_named(finished: Clone) -> None:
    file = finished.root / "results/tables/summary.csv"
    summary = pd.read_csv(file)
    row = summary.index[summary["mode"] == "remote_cache"][0]
    before = float(summary.loc[row, "payload_bytes_per_token"])
    summary.loc[row, "payload_bytes_per_token"] = before * (1 + 1e-8)
    summary.to_csv(file, index=False)
    done = recompute(finished)
    assert done.returncode == 1
    named = [line for line in done.stdout.splitlines() if "theirs" in line]
    assert len(named) == 1
    assert named[0].startswith("summary: tiny loopback decode remote_cache: payload_bytes_per_token: theirs")
    assert f"ours {before!r}" in named[0]


def test_a_changed_trial_is_named(finished: Clone) -> None:
    manifest = finished.trial("remote_cache", 1) / "manifest.json"
    changed = json.loads(manifest.read_text())
    changed["probe"]["rtt_s"] *= 2
    manifest.write_text(json.dumps(changed))
    done = recompute(finished)
    assert done.returncode == 1
    assert "results: tiny loopback remote_cache decode 1: probe_rtt_s: theirs" in done.stdout
