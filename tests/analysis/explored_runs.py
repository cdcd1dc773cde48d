"""Runs for the explorer: one that has all that it can show, and one that lacks what a run can lack."""

import dataclasses

from simulated_links import Network, Traffic, simulated
from written_trials import Trial

LOCAL = Traffic("local", 0, 0)
REMOTE_CACHE = Traffic("remote_cache", 60, 196_700)
KNOW_CONSUMER = Traffic("know_consumer", 60, 30)
SYS = Traffic("sys", 50, 30, window=8)
NAIVE = Traffic("naive", 5_000_000, 9_000_000)
NETWORKS = (Network("near", 20e-6, 12e9), Network("far", 0.005, 1e9))
COMPUTE_S = 0.006


def decoded(traffic: Traffic, at: Network, trial: int) -> Trial:
    """A trial of a decode phase, with its compute by the worker's clock."""
    return dataclasses.replace(simulated(traffic, at, trial, COMPUTE_S), compute_s=COMPUTE_S)


def prefilled(mode: str, trial: int) -> Trial:
    """A trial of a prefill phase over the near network."""
    size = {} if mode == "local" else {"tokens": 8, "logits": 196_608}
    return Trial(mode, "prefill", trial, (0.06, 0.061 + trial / 1e4), network="near", sizes=size)


def whole_run() -> list[Trial]:
    """Two networks, two trials, a local mode, a ladder with a mode with windows, decode and prefill phases."""
    modes = (LOCAL, REMOTE_CACHE, KNOW_CONSUMER, SYS)
    trials = [decoded(mode, at, trial) for trial in (1, 2) for at in NETWORKS for mode in modes]
    return [*trials, *(prefilled(mode, trial) for trial in (1, 2) for mode in ("local", "remote_cache"))]


def wide_run() -> list[Trial]:
    """A run whose tables are as wide as the default run's: long names, long numbers, intervals, and a reason for each."""
    modes = (LOCAL, NAIVE, dataclasses.replace(REMOTE_CACHE, mode="remote_cache_planted"))
    near = [decoded(mode, NETWORKS[0], trial) for trial in (1, 2) for mode in modes]
    return [*near, *(decoded(REMOTE_CACHE, NETWORKS[1], trial) for trial in (1, 2))]


def poor_run() -> list[Trial]:
    """One network, one trial, no local mode, no prefill phase; and a mode that is no rung."""
    return [decoded(mode, NETWORKS[0], 1) for mode in (dataclasses.replace(REMOTE_CACHE, mode="sys_simulated"), SYS)]
