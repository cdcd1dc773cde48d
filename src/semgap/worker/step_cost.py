"""Measures one forward pass on the worker: wall, CPU and GPU time."""

import time

from semgap.codecs.clock import Clock
from semgap.wire.ledger import Ledger
from semgap.wire.step_cost import Recovered, StepCost


class Stopwatch:
    """Wall and GPU time of one forward pass, from `start` to `stop`; CPU time, and `ledger`'s of codecs, from its making to `cost`."""

    def __init__(self, device: str, ledger: Ledger) -> None:
        self._cpu_begin, self._codec_begin = time.process_time_ns(), ledger.codec_ns
        self._device, self._ledger = device, ledger

    def start(self) -> None:
        self._begin = time.perf_counter_ns()
        self._clock = Clock(self._device)

    def stop(self) -> None:
        """Waits for the GPU."""
        self._clock.stop()
        self.stop_at(self._clock.gpu_ns())

    def stop_at(self, gpu_ns: int | None) -> None:
        """Stops, for a step whose time on the GPU is known already."""
        self._gpu_ns = gpu_ns
        self.compute_ns = time.perf_counter_ns() - self._begin

    def cost(self, sequence: int, recovered: Recovered | None) -> StepCost:
        cpu_ns, codec_ns = time.process_time_ns() - self._cpu_begin, self._ledger.codec_ns - self._codec_begin
        return StepCost(sequence, self.compute_ns, cpu_ns, codec_ns, self._gpu_ns, recovered)
