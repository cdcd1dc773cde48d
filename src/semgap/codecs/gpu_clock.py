"""Time of a stretch of work on the GPU, by CUDA events: from where the stream reaches its begin to where it reaches its end."""

from __future__ import annotations

import torch


class GpuTimer:
    """Begins where it is made, on the device's current stream; `elapsed_ns` ends it. Costs two events; None of it on a CPU.

    The time holds what the stream did and what it waited for the host: in eager decoding the gaps between kernels are in it.
    """

    def __init__(self, device: torch.device) -> None:
        self._begin: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.current_stream(device)
            self._begin, self._end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._begin.record(self._stream)

    def elapsed_ns(self) -> int | None:
        """Nanoseconds on the GPU (events resolve about 500), after it has done all; None on a CPU."""
        if self._begin is None:
            return None
        self._end.record(self._stream)
        self._end.synchronize()
        return int(1e6 * self._begin.elapsed_time(self._end))
