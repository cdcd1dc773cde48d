"""The cluster of a session, or the reason why there is none here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from cluster import DAEMONS, FILES, Cluster

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "workflow"))  # clone.py


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Slurm with nodes n1 and n2. Skips, with the reason, where this is no Debian with root, or somebody's Slurm is here."""
    command = [sys.executable, str(Path(__file__).with_name("cluster.py"))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdin is not None and process.stdout is not None
    told = json.loads(process.stdout.readline() or '{"died": true}')
    try:
        assert "died" not in told, "cluster.py died; its words are in this test's stderr"
        if "reason" in told:
            pytest.skip(f"no Slurm for these tests: {told['reason']}")
        yield Cluster(Path(told["directory"]), process.stdin)
    finally:
        process.stdin.close()
        status = process.wait(60)
        process.stdout.close()
    assert status == 0
    assert [path for path in (*FILES, Path(told["directory"])) if path.exists()] == []
    assert [process for process in psutil.process_iter(["name"]) if process.info["name"] in DAEMONS[:3]] == []
