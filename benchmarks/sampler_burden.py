"""What sampling does to the time of a step: blocks of steps with the samplers running and with them paused, in turns, in one process."""

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from semgap.telemetry import samplers


@dataclass(frozen=True)
class Block:
    """Steps in a row, with the samplers running or not; times are CLOCK_MONOTONIC seconds."""

    sampled: bool
    begin_s: float
    end_s: float
    steps: int

    @property
    def step_s(self) -> float:
        return (self.end_s - self.begin_s) / self.steps


@dataclass(frozen=True)
class Burden:
    """The blocks in order, two by two, one of each kind; and what each source left."""

    blocks: tuple[Block, ...]
    sources: Mapping[str, samplers.SourceResult]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Mean time of a step with samplers over that without, pair by pair."""
        pairs = zip(self.blocks[::2], self.blocks[1::2], strict=True)
        return tuple(a.step_s / b.step_s if a.sampled else b.step_s / a.step_s for a, b in pairs)

    @property
    def ratio(self) -> float:
        """Geometric mean of the ratios: 1.01 is 1% of the ITL."""
        return math.exp(math.fsum(map(math.log, self.ratios)) / len(self.ratios))


class Pauser:
    """Holds samplers, and the processes that they started (dmon), and lets them go on: while held they read nothing and take no CPU."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = tuple(pids)
        self._held: list[int] = []

    def pause(self) -> None:
        for pid in self._pids:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                for process in (pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))):
                    os.kill(process, signal.SIGSTOP)
                    self._held.append(process)

    def resume(self) -> None:
        """Ticks that were missed meanwhile are left out."""
        while self._held:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._held.pop(), signal.SIGCONT)


def measure_burden(
    step: Callable[[], object],
    directory: Path,
    *,
    pids: Mapping[str, int],
    interval_s: float,
    sources: Sequence[str] = samplers.SOURCES,
    cpus: Collection[int] | None = None,
    device_uuid: str | None = None,
    pairs: int = 8,
    block_s: float = 1.0,
) -> Burden:
    """Run `step`, which returns once its work is done, for 2 x `pairs` blocks of at least `block_s` seconds each.

    The order within a pair alternates (off on, on off, ...), so that a drift falls on both. A block should hold at least one sample of
    each source: dmon's come once a second. The other arguments are those of `sampling.start`; the samplers are stopped at the end.
    """
    running = samplers.start(directory, pids=pids, interval_s=interval_s, sources=sources, cpus=cpus, device_uuid=device_uuid)
    pauser = Pauser(running.pids.values())
    try:
        order = [sampled for pair in range(pairs) for sampled in ((False, True) if pair % 2 == 0 else (True, False))]
        blocks = tuple(_block(step, pauser, sampled, block_s) for sampled in order)
    finally:
        pauser.resume()  # a process that is held cannot end
        results = running.stop()
    return Burden(blocks, results)


def _block(step: Callable[[], object], pauser: Pauser, sampled: bool, block_s: float) -> Block:
    pauser.resume() if sampled else pauser.pause()
    step()  # what the change of state leaves behind falls on a step that does not count
    steps, begin_s = 0, time.monotonic()
    while time.monotonic() - begin_s < block_s:
        step()
        steps += 1
    return Block(sampled, begin_s, time.monotonic(), steps)
