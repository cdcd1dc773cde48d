"""A step of executor `fused` against the floor of the core, its own batches, and executor `eager`; in one process, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import chain

import numpy as np

from semgap.engine import cpu_kernels
from semgap.engine.executor import Executor
from semgap.engine.executor_choice import make_executor
from semgap.engine.model_files import ModelFiles
from semgap.engine.weights import Weights

_STEPS, _PROMPT, _ROWS, _MAX_LENGTH = 8, 128, (4, 16), 256


def executor_ratios(model: ModelFiles, rounds: int) -> dict[str, list[float]]:
    """One ratio a round, each of medians: of a step to reading all weights once ('floor'), of eager's step and prefill to fused's ('eager',
    'prefill': fused's to eager's), of a pass of 4 and 16 rows to a step ('4 rows', '16 rows'). Each round has weight memory of its own.
    """
    ratios: dict[str, list[float]] = {name: [] for name in ("floor", "eager", "prefill", *(f"{rows} rows" for rows in _ROWS))}
    for _ in range(rounds):
        times = _round_s(model)
        ratios["floor"].append(times["step"] / times["floor"])
        ratios["eager"].append(times["eager step"] / times["step"])
        ratios["prefill"].append(times["prefill"] / times["eager prefill"])
        for rows in _ROWS:
            ratios[f"{rows} rows"].append(times[f"{rows} rows"] / times["step"])
    return ratios


def _round_s(model: ModelFiles) -> dict[str, float]:
    """Median seconds of each piece of work, all in turns."""
    weights = Weights(model.specs(), "cpu")
    weights.read_file(model.weights_file, [tensor.offset for tensor in model.digest.tensors])
    memory = np.concatenate([array.reshape(-1) for array in weights.arrays().values()])
    fused, eager = (make_executor(kind, model.config, weights, "float32", 1, _MAX_LENGTH) for kind in ("fused", "eager"))
    times: dict[str, list[float]] = {}
    for name, work in chain(_turn(fused, eager, memory), _turn(fused, eager, memory)):
        begin = time.perf_counter()
        work()
        times.setdefault(name, []).append(time.perf_counter() - begin)
    return {name: statistics.median(taken) for name, taken in times.items()}


def _turn(fused: Executor, eager: Executor, memory: np.ndarray) -> Iterator[tuple[str, Callable[[], object]]]:
    tokens = np.arange(_PROMPT) * 37 % 1000
    caches = fused.new_cache(), eager.new_cache()

    def run(executor: Executor, count: int) -> None:
        executor.logits(executor.forward(tokens[:count], caches[executor is eager])[-1 if count == _PROMPT else 0 :])

    yield "prefill", lambda: run(fused, _PROMPT)
    yield "eager prefill", lambda: run(eager, _PROMPT)
    for _ in range(_STEPS):
        yield "floor", lambda: cpu_kernels.read_all(memory)
        yield "step", lambda: run(fused, 1)
        yield "eager step", lambda: run(eager, 1)
        for rows in _ROWS:
            filled = caches[0].filled
            yield f"{rows} rows", lambda rows=rows: run(fused, rows)
            caches[0].truncate(filled)
