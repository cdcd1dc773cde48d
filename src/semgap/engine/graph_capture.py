"""The capture of CUDA graphs: each of several runs of kernels becomes a replay."""

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence

import torch


def captured(runs: Sequence[Callable[[], None]], device: str) -> list[Callable[[], None]]:
    """A replay of each run. On a GPU each runs once before it is captured, so that its kernels are loaded. Call it in no_grad.

    On a CPU, where Triton's interpreter has nothing to capture, the runs themselves.
    """
    if device != "cuda":
        return list(runs)
    for run in runs:
        run()
    torch.cuda.synchronize(device)
    pool = torch.cuda.graph_pool_handle()
    replays: list[Callable[[], None]] = []
    with _no_collection(), torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        for run in runs:
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            run()
            graph.capture_end()
            replays.append(graph.replay)
    torch.cuda.synchronize(device)
    return replays


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Holds off garbage collection, which would end a capture if it freed an earlier graph or its memory."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
