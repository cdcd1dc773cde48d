"""The tables of a real run, against what code that shares nothing with semgap computes from its raw files."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from clone import CONFIG, REPOSITORY, Clone, environment

SCRIPT = Path(__file__).with_name("recompute")

pytestmark = pytest.mark.alone
MOVING = ("prefix_recompute", "prefix_blocks", "prefix_auto", "handover_layers", "handover_recompute", "remote_cache_reload", "sys_delta")
LOOSE = {"rtt_ms": 100, "goodput": 10, "lateness_ms": 1000}  # other work runs beside these tests
KV = {
    "modes": list(MOVING),
    "phases": ["recovery-evict", "prefix", "handover"],
    "networks": ["kv_near"],
    "max_length": 128,
    "define": {
        "networks": {
            "near": {"kind": "relay", "rate": "1Gbit", "rtt_ms": 1, "tolerance": LOOSE},
            "kv_near": {"kind": "loopback", "kv": "near"},
        },
        "phases": {
            "recovery-evict": {"kind": "recovery", "prompt_lengths": [16], "steps": 4, "evict_fractions": [0, 1]},
            "prefix": {"kind": "prefix", "prompt_lengths": [100], "prefix_lengths": [0, 64], "requests": 1},
            "handover": {"kind": "handover", "prompt_lengths": [70], "requests": 4, "steps": 2},
        },
    },
}


def recompute(clone: Clone, *tables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tests/workflow/recompute", "results", "--configfile", CONFIG]
    command += ["--tables", *tables] if tables else []
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
    assert empty == {"recovery", "recovery_pairs", "prefix", "handover", "facts", "load"}, "no such phase or rung"
    assert len(counted) == 16


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


def test_every_number_of_a_run_that_moves_kv_is_found_again_and_a_changed_one_is_named(finished: Clone) -> None:
    rows = yaml.safe_load((REPOSITORY / "config/kv.yaml").read_text())["define"]["modes"]
    finished.configure(KV)
    own = {mode: (rows.get(mode) or {}) | {"networks": ["kv_near"]} for mode in MOVING}
    finished.configure({"define": {"modes": own}})
    tables = ("results", "recovery", "recovery_pairs", "prefix", "handover")
    finished.run("--", "results/results.csv", *(f"results/tables/{table}.csv" for table in tables[1:]))
    done = recompute(finished, *tables)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = {line.partition(":")[0]: int(line.split()[1]) for line in done.stdout.splitlines()}
    assert set(counted) == set(tables) and min(counted.values()) > 30
    assert "not recomputed" not in done.stdout
    file = finished.root / "results/tables/handover.csv"
    handover = pd.read_csv(file).set_index("mode", drop=False)
    handover.loc["handover_layers", "adds_ms"] *= 1 + 1e-8
    handover.to_csv(file, index=False)
    said = recompute(finished, "handover")
    assert said.returncode == 1 and "handover_layers: adds_ms: theirs" in said.stdout
