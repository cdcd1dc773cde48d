"""A step of executor `fused` against the floor of its cores, its own batches, executor `eager`, and on request llama.cpp.

Ratios of medians, one a round, all work of a round in turns. `make bench` prints them too, but for llama.cpp's.
For llama.cpp's step on the same core, build it (cmake -B build -DCMAKE_BUILD_TYPE=Release; cmake --build build --target llama-bench), make
a GGUF file of the same weights in float32 (python convert_hf_to_gguf.py resources/models/smollm2-135m --outtype f32 --outfile f32.gguf,
of llama.cpp), and give both: --llama-bench build/bin/llama-bench --gguf f32.gguf. Its weights lie in huge pages, as ours do: mapped from
the file, as it does by default, they took it 1.4 times as long. So it must be recent enough to know --load-mode.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from semgap.analysis.stats import geometric_mean_interval
from semgap.engine.cpu_bandwidth import read_bandwidth
from semgap.engine.device import limit_threads
from semgap.engine.executor import Executor
from semgap.engine.executor_choice import make_executor
from semgap.engine.model_files import ModelFiles, load_digest
from semgap.engine.weights import Weights
from semgap.kv.blocks import KVCache
from semgap.processes import machine

MODEL = Path(__file__).resolve().parents[1] / "resources/models/smollm2-135m"
CORES = sorted(os.sched_getaffinity(0))[-2:]
_STEPS, _PROMPT, _ROWS, _MAX_LENGTH, _TOKENS = 8, 128, (4, 16), 256, 32


class Promise(NamedTuple):
    """What a ratio is called, and its bound: ratio <= bound, or >= bound where `at_least`."""

    what: str
    bound: float
    at_least: bool = False


PROMISES = {
    "floor": Promise("step / reading the weights once", 1.35),
    "floor of 2": Promise("step of 2 threads / 2 cores reading the weights once", 1.5),
    "eager": Promise("step of eager / of fused", 2.2, at_least=True),
    "prefill": Promise("prefill of 128 tokens, fused / eager", 1.0),
    "4 rows": Promise("pass of 4 rows / of one", 1.5),
    "16 rows": Promise("pass of 16 rows / of one", 4.5),
    "llama.cpp": Promise("step of fused / of llama.cpp, F32", 1.05),
}


class LlamaBench(NamedTuple):
    """llama.cpp's benchmark and its model."""

    program: Path
    gguf: Path

    def step_s(self) -> float:
        """Median seconds of a token, in one thread, over `_TOKENS` tokens from an empty context."""
        options = ["--threads", "1", "--n-prompt", "0", "--n-gen", str(_TOKENS), "--repetitions", "3", "--output", "json"]
        command = [self.program, "--model", self.gguf, "--load-mode", "none", *options]
        huge = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        (found,) = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=huge).stdout)
        if not found["model_type"].endswith("all F32"):
            raise SystemExit(f"{self.gguf} is {found['model_type']}, not all F32; convert it with --outtype f32")
        return statistics.median(found["samples_ns"]) / _TOKENS / 1e9


def main() -> None:
    """Prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--llama-bench", type=Path, help="llama.cpp's program; needs --gguf")
    parser.add_argument("--gguf", type=Path, help="the model for llama.cpp, all float32")
    options = parser.parse_args()
    llama = None
    if options.llama_bench or options.gguf:
        for option, path in (("--llama-bench", options.llama_bench), ("--gguf", options.gguf)):
            if path is None or not path.is_file():
                parser.error(f"{option} {path} is not a file; llama.cpp's step needs --llama-bench and --gguf, see --help")
        llama = LlamaBench(options.llama_bench.resolve(), options.gguf)
    with machine.measuring():
        os.sched_setaffinity(0, CORES[-1:])
        limit_threads(1)
        ratios = executor_ratios(ModelFiles(options.model, load_digest(options.model)), options.rounds, llama)
    print_ratios(ratios, PROMISES)


def print_ratios(ratios: dict[str, list[float]], promises: dict[str, Promise]) -> None:
    """A line for each name: the mean ratio with its interval, and the bound."""
    for name, values in ratios.items():
        promise, found = promises[name], geometric_mean_interval(values)
        interval = "" if found.low is None else f"[{found.low:.3f} to {found.high:.3f}]"
        print(f"{promise.what:<54} {found.value:>7.3f} {interval:<18} {'>=' if promise.at_least else '<='} {promise.bound}")


def executor_ratios(model: ModelFiles, rounds: int, llama: LlamaBench | None = None) -> dict[str, list[float]]:
    """A ratio a round for each of PROMISES; without `floor of 2` on a machine of one core. Each round has weight memory of its own.

    Call it pinned to the last core; two threads use the last two.
    """
    ratios: dict[str, list[float]] = {}
    for number in range(rounds):
        print(f"executor: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        times = _round_s(model, llama)
        pairs = {"floor": ("step", "read"), "floor of 2": ("step of 2", "read of 2"), "eager": ("eager step", "step")}
        pairs |= {"prefill": ("prefill", "eager prefill")} | {f"{rows} rows": (f"{rows} rows", "step") for rows in _ROWS}
        for name, (above, below) in (pairs | {"llama.cpp": ("step from 0", "llama.cpp")}).items():
            if above in times:
                ratios.setdefault(name, []).append(times[above] / times[below])
    return ratios


def _round_s(model: ModelFiles, llama: LlamaBench | None) -> dict[str, float]:
    """Median seconds of each piece of work, all in turns."""
    weights = Weights(model.specs(), "cpu")
    weights.read_file(model.weights_file, [tensor.offset for tensor in model.digest.tensors])
    memory = np.concatenate([array.reshape(-1) for array in weights.arrays().values()])

    def made(kind: str, threads: int) -> Executor:
        return make_executor(kind, model.config, weights, "float32", threads, _MAX_LENGTH)

    fused, double = made("fused", 1), made("fused", 2)
    times: dict[str, list[float]] = {}
    for _ in range(2):
        for name, work in _turn(fused, double, made("eager", 1), memory):
            times.setdefault(name, []).append(work())
        if llama:
            times.setdefault("step from 0", []).append(_steps_s(fused))
            times.setdefault("llama.cpp", []).append(llama.step_s())
            times["step from 0"].append(_steps_s(fused))
    return {name: statistics.median(taken) for name, taken in times.items()}


def _turn(fused: Executor, double: Executor, eager: Executor, memory: np.ndarray) -> Iterator[tuple[str, Callable[[], float]]]:
    """Names of work, and what does it and gives its seconds."""
    cache, double_cache, eager_cache = (executor.new_cache() for executor in (fused, double, eager))
    yield "prefill", partial(_pass_s, fused, cache, _PROMPT)
    yield "eager prefill", partial(_pass_s, eager, eager_cache, _PROMPT)
    with _two_cores():
        _pass_s(double, double_cache, _PROMPT)
    for _ in range(_STEPS):
        yield "read", partial(_read_s, memory, 1)
        yield "step", partial(_pass_s, fused, cache, 1)
        yield "eager step", partial(_pass_s, eager, eager_cache, 1)
        for rows in _ROWS:
            filled = cache.filled
            yield f"{rows} rows", partial(_pass_s, fused, cache, rows)
            cache.truncate(filled)
        if len(CORES) == 2:
            with _two_cores():
                yield "read of 2", partial(_read_s, memory, 2)
                yield "step of 2", partial(_pass_s, double, double_cache, 1)


def _pass_s(executor: Executor, cache: KVCache, rows: int) -> float:
    """Seconds of a pass with the logits of its rows; of a prompt, of its last row."""
    begin = time.perf_counter()
    hidden = executor.forward(np.arange(rows) * 37 % 1000, cache)
    executor.logits(hidden[-1 if rows == _PROMPT else 0 :])
    return time.perf_counter() - begin


def _steps_s(executor: Executor) -> float:
    """Mean seconds of a step from an empty context on, as llama-bench measures."""
    cache = executor.new_cache()
    return statistics.mean(_pass_s(executor, cache, 1) for _ in range(_TOKENS))


def _read_s(memory: np.ndarray, threads: int) -> float:
    return memory.nbytes / read_bandwidth(memory, threads, passes=1)


@contextmanager
def _two_cores() -> Iterator[None]:
    """Two cores for this thread, and for those that it starts meanwhile."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CORES)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


if __name__ == "__main__":
    main()
