"""What a run needs is checked before its first trial: what this machine lacks, and networks, each once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from clone import Clone, job_names

if TYPE_CHECKING:
    from started_workers import StartedWorker

pytestmark = pytest.mark.alone

LOOSE = {"rtt_ms": 1000, "goodput": 100, "lateness_ms": 10_000}  # other work runs beside these tests
CHOSEN = ("--config", "modes=local,remote_cache", "trials=1", "networks=lan")
COLLECTED = ("--", "results/results.csv")  # which takes whole trials only


def _over(fresh: Clone, directory: Path, row: dict[str, Any], **more: Any) -> Clone:
    clone = fresh.copy(directory / "clone")
    probe = {"payload_bytes": 4 << 20}
    clone.configure({"define": {"networks": {"lan": row}}, "probe": probe, **more})
    return clone


def test_a_network_is_checked_first_and_once_and_the_trials_over_it_are_whole(finished: Clone, tmp_path: Path) -> None:
    clone = _over(finished, tmp_path / "over", {"kind": "relay", "delay_ms": 2, "rate": "1Gbit", "tolerance": LOOSE})
    ran = job_names(clone.run(*CHOSEN, *COLLECTED))
    measured = [index for index, name in enumerate(ran) if name.startswith("measuring ")]
    assert len(measured) == 2 and ran.index("checking network lan") < min(measured)
    (manifest,) = (clone.root / "results/trials").glob("model=tiny/network=lan/mode=remote_cache/phase=decode/trial=1/manifest.json")
    assert json.loads(manifest.read_text())["network"]["asked"] == {"rtt_s": 0.004, "goodput_bytes_per_s": 125e6}
    assert clone.planned(*CHOSEN, *COLLECTED) == set()


def test_an_external_worker_that_is_up_is_checked_over_loopback_too_and_serves_the_trials(
    finished: Clone, start_worker: Callable[..., StartedWorker], tmp_path: Path
) -> None:
    clone, worker = finished.copy(tmp_path / "external"), start_worker()
    clone.configure({"worker": {"launch": "external", "address": worker.address, "secret_file": str(worker.secret_file)}})
    ran = job_names(clone.run("--config", "modes=remote_cache", "trials=1", *COLLECTED))
    measured = [index for index, name in enumerate(ran) if name.startswith("measuring ")]
    assert measured and ran.index("checking network loopback") < min(measured)
    checked = (clone.root / "results/logs/check_network/network=loopback.log").read_text()
    assert json.loads(checked.splitlines()[-1])["measured"]["rtt_s"] > 0
    (manifest,) = (clone.root / "results/trials").glob("model=tiny/network=loopback/mode=remote_cache/phase=decode/trial=1/manifest.json")
    assert worker.process.poll() is None and worker.address in manifest.read_text()


@pytest.mark.parametrize(
    ("row", "more", "message"),
    [
        ({"kind": "relay", "rate": "100Gbit", "tolerance": LOOSE | {"goodput": 0.5}}, {}, "network 'lan': the link's goodput up is "),
        ({"kind": "hosts"}, {"worker": {"launch": "external", "address": "127.0.0.1:1"}}, "no worker answers at 127.0.0.1:1"),
    ],
)
def test_a_network_that_cannot_be_had_ends_the_run_before_any_trial(
    fresh: Clone, tmp_path: Path, row: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    done = _over(fresh, tmp_path, row, **more).snakemake(*CHOSEN)
    assert done.returncode == 1 and message in done.stdout, done.stdout
    assert not [name for name in job_names(done.stdout) if name.startswith(("measuring local", "measuring remote_cache"))]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, and what is tested is that it has none")
def test_what_this_machine_lacks_ends_the_run_before_its_first_job(fresh: Clone, tmp_path: Path) -> None:
    clone = fresh.copy(tmp_path / "clone")
    clone.configure({"device": "cuda"})
    done = clone.snakemake()
    assert done.returncode == 1 and "device 'cuda' needs a usable GPU, which this machine lacks" in done.stdout
    assert job_names(done.stdout) == []
