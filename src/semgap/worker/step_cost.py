"""What one forward pass cost on the worker: wall, CPU and GPU time."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from semgap.codecs.gpu_clock import GpuTimer
from semgap.kv.handles import Recovered


@dataclass
class StepCost:
    """What one forward pass took on the worker. gpu_ns is None without a GPU, recovered where no block was missing, no room to be made."""

    sequence: int
    compute_ns: int
    cpu_ns: int
    gpu_ns: int | None
    recovered: Recovered | None


class Stopwatch:
    """Wall and, on a GPU, device time of one forward pass, and the CPU time of all that it took from here to `cost`."""

    def __init__(self, device: torch.device) -> None:
        self._cpu_begin = time.process_time_ns()
        self._device = device

    def start(self) -> None:
        self._begin = time.perf_counter_ns()
        self._timer = GpuTimer(self._device)

    def stop(self) -> None:
        self.stop_at(self._timer.elapsed_ns())

    def stop_at(self, gpu_ns: int | None) -> None:
        """Stops where the step's time on the GPU is known already."""
        self._gpu_ns = gpu_ns
        self.compute_ns = time.perf_counter_ns() - self._begin

    def cost(self, sequence: int, recovered: Recovered | None) -> StepCost:
        return StepCost(sequence, self.compute_ns, time.process_time_ns() - self._cpu_begin, self._gpu_ns, recovered)
