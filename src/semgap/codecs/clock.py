"""The time of work on a device: on a GPU by CUDA events, on a CPU the host's own. Imports torch for a GPU alone."""

import time
from typing import Any


class Clock:
    """Times the work given to a device's current stream between the making of the clock and `stop`. Costs two events.

    On a GPU the time runs from the stream reaching the first event to its reaching the second (resolution about 0.5 us). It includes the
    stream's waits for the host: in eager decoding, the gaps between kernels.
    """

    def __init__(self, device: Any) -> None:
        self._events = None
        if str(device).startswith("cuda"):  # a name, or a torch device
            import torch

            self._stream = torch.cuda.current_stream(device)
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record(self._stream)
        self._begin_ns = time.perf_counter_ns()

    def stop(self) -> None:
        """Ends the time. Does not wait."""
        self._host_ns = time.perf_counter_ns() - self._begin_ns
        if self._events:
            self._events[1].record(self._stream)

    def is_done(self) -> bool:
        """True if `took_ns` and `gpu_ns` need not wait."""
        return self._events is None or self._events[1].query()

    def took_ns(self) -> int:
        """Nanoseconds, on a CPU the host's. Waits for the stream."""
        gpu_ns = self.gpu_ns()
        return self._host_ns if gpu_ns is None else gpu_ns

    def gpu_ns(self) -> int | None:
        """Nanoseconds on a GPU, or None on a CPU. Waits for the stream."""
        if self._events is None:
            return None
        self._events[1].synchronize()
        return int(1e6 * self._events[0].elapsed_time(self._events[1]))


def wait_for(device: str) -> None:
    """Waits until all work on a GPU's current stream is done."""
    if device == "cuda":
        import torch

        torch.cuda.current_stream(device).synchronize()
