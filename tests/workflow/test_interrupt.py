"""A killed run leaves nothing running, a resumed one measures what is missing, and blocks of two sessions can be measured again."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import psutil
import pytest
from clone import AFTERWARDS, MODES, Clone, Finished, blocks, environment, trials

pytestmark = pytest.mark.alone

STARTS_WITHIN_S = 300.0  # another workflow of this machine may be measuring
ENDS_WITHIN_S = 10.0


@dataclass(frozen=True)
class Interrupted:
    """A clone whose Snakemake, of this pid, was killed: after trial 2 of sys_simulated, during that of local."""

    clone: Clone
    pid: int


@pytest.fixture(scope="module")
def interrupted(finished_run: Finished, tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    clone = finished_run.clone.copy(tmp_path_factory.mktemp("interrupted") / "clone")
    first, second = (at.mode for at in clone.config().run_order() if at.trial == 2 and at.mode != "remote_cache")
    for mode in (first, second):
        shutil.rmtree(clone.trial(mode, 2))
    with (clone.root / "interrupted.log").open("w") as log:
        process = subprocess.Popen(clone.command(), cwd=clone.root, env=environment(), stdout=log, stderr=log)
        wait_until(lambda: (clone.trial(first, 2) / "manifest.json").exists())
        wait_until(lambda: any(is_client(job) for job in jobs_of(process.pid)))
        process.kill()
        process.wait()
    return Interrupted(clone, process.pid)


@pytest.fixture(scope="module")
def resumed(interrupted: Interrupted) -> Clone:
    """Run to its tables in a new session, so that block 2 comes from three."""
    interrupted.clone.run("--unlock")
    interrupted.clone.run("--", "results/tables/summary.csv")
    return interrupted.clone


@pytest.fixture(scope="module")
def remeasured(resumed: Clone) -> Clone:
    resumed.run("--config", "remeasure=blocks")
    return resumed


def test_a_trial_whose_snakemake_was_killed_ends_by_itself(interrupted: Interrupted) -> None:
    wait_until(lambda: not jobs_of(interrupted.pid), ENDS_WITHIN_S)


def test_a_run_that_goes_on_after_a_kill_measures_only_what_was_not_finished(interrupted: Interrupted) -> None:
    last = [at.mode for at in interrupted.clone.config().run_order() if at.trial == 2 and at.mode != "remote_cache"][-1:]
    interrupted.clone.run("--unlock")
    assert interrupted.clone.planned() == trials(last, [2]) | AFTERWARDS


def test_latencies_of_different_sessions_do_not_pair_and_say_why(resumed: Clone) -> None:
    reason = summary_of(resumed)["ratio_to_base_reason"]
    assert reason.startswith("1 of 2 trials were measured in a different session than the baseline")
    assert "remeasure=blocks" in reason


def test_remeasuring_blocks_reruns_the_mixed_block_whole_and_no_other(resumed: Clone) -> None:
    assert resumed.planned() == AFTERWARDS - {"making the tables"}
    assert resumed.planned("--config", "remeasure=blocks") == blocks([2]) | trials(MODES, [2]) | AFTERWARDS


def test_after_remeasuring_latencies_pair_again(remeasured: Clone) -> None:
    row = summary_of(remeasured)
    assert row["ratio_to_base_pairs"] == 2 and pd.isna(row["ratio_to_base_reason"])


@pytest.mark.parametrize("arguments", [(), ("--config", "remeasure=blocks")])
def test_after_remeasuring_there_is_nothing_to_do(remeasured: Clone, arguments: tuple[str, ...]) -> None:
    assert remeasured.planned(*arguments) == set()


def summary_of(clone: Clone) -> pd.Series:
    return pd.read_csv(clone.root / "results/tables/summary.csv").set_index("mode").loc["sys_simulated"]


def jobs_of(snakemake_pid: int) -> list[psutil.Process]:
    """All processes that run for a Snakemake: scripts, workers, clients and samplers take its name along in their environment."""
    workflow = f"{socket.gethostname()}:{snakemake_pid}"
    return [process for process in psutil.process_iter() if environment_of(process).get("SEMGAP_WORKFLOW") == workflow]


def is_client(process: psutil.Process) -> bool:
    """True for a fork of the pristine parent that has the client's code."""
    try:
        parent = process.parent()
        words = " ".join(parent.cmdline()) if parent else ""
    except psutil.NoSuchProcess:
        return False
    return "pristine_parent" in words and "semgap.client.measure" in words


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return {}


def wait_until(condition: Callable[[], bool], timeout_s: float = STARTS_WITHIN_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not so within {timeout_s} s"
        time.sleep(0.05)
