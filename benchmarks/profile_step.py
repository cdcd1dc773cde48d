"""Where the time of a decode step on a CPU goes, by executor `fused`: python benchmarks/profile_step.py [--model DIRECTORY]

Each part is the median over the rounds, in one process on one core. The products of a kind run by themselves over all layers, so that
weights come from memory as in a step. The rest is a step less its products; by the context's length it divides into attention, which
grows with it, and what does not grow.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from semgap.engine import cpu_kernels
from semgap.engine.architecture import architecture_of
from semgap.engine.decoder_weights import Linear, read_decoder
from semgap.engine.executor import Executor
from semgap.engine.executor_choice import make_executor
from semgap.engine.fused import linear_row
from semgap.engine.model_files import ModelFiles, load_digest
from semgap.engine.weights import Weights
from semgap.processes.machine import measuring

_MODEL = Path(__file__).resolve().parents[1] / "resources/models/smollm2-135m"
_SHORT, _LONG = 16, 240


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=_MODEL)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
    model = ModelFiles(options.model, load_digest(options.model))
    weights = Weights(model.specs(), "cpu")
    weights.read_file(model.weights_file, [tensor.offset for tensor in model.digest.tensors])
    executor = make_executor("fused", model.config, weights, "float32", 1, _LONG + 1)
    kinds = _products(model, weights)
    work: dict[str, Callable[[], object]] = {name: _Products(linears) for name, linears in kinds.items()}
    work |= {f"step after {context}": _Step(executor, context) for context in (_SHORT, _LONG)}
    times: dict[str, list[float]] = {name: [] for name in work}
    with measuring():
        for _ in range(options.rounds):
            for name, run in work.items():
                begin = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - begin)
    _print({name: statistics.median(taken) for name, taken in times.items()}, kinds, executor)


def _products(model: ModelFiles, weights: Weights) -> dict[str, list[Linear]]:
    decoder = read_decoder(architecture_of(model.config), weights.arrays(), _LONG + 1)
    kinds: dict[str, list[Linear]] = {}
    for layer in decoder.layers:
        kinds.setdefault("query, key, value", []).extend(layer.first)
        kinds.setdefault("attention's output", []).append(layer.attention_out)
        kinds.setdefault("feed-forward, in", []).extend(each for each in (layer.gate, layer.feed_in) if each is not None)
        kinds.setdefault("feed-forward, out", []).append(layer.feed_out)
    return kinds | {"output head": [decoder.head]}


class _Products:
    def __init__(self, linears: Sequence[Linear]) -> None:
        self._pairs = [(np.array(linear_row(linear), np.int64), np.ones((1, linear.columns), np.float32)) for linear in linears]

    def __call__(self) -> None:
        for row, x in self._pairs:
            cpu_kernels.project(row, x)


class _Step:
    def __init__(self, executor: Executor, context: int) -> None:
        self._executor, self._cache, self._context = executor, executor.new_cache(), context
        executor.forward(np.arange(context) * 37 % 1000, self._cache)

    def __call__(self) -> None:
        self._executor.logits(self._executor.forward(np.array([7]), self._cache))
        self._cache.truncate(self._context)


def _print(times: dict[str, float], kinds: dict[str, list[Linear]], executor: Executor) -> None:
    floor, step = executor.floor(), times[f"step after {_LONG}"]
    assert floor.read_bytes_per_s is not None and floor.step_bytes is not None
    print(f"{'part':<36}{'ms':>8}{'share':>8}{'GB/s':>8}")
    for name, linears in kinds.items():
        nbytes = sum(linear.weight.nbytes for linear in linears)
        print(f"{name:<36}{1e3 * times[name]:>8.2f}{times[name] / step:>8.1%}{nbytes / times[name] / 1e9:>8.1f}")
    growing = (step - times[f"step after {_SHORT}"]) * _LONG / (_LONG - _SHORT)
    rest = step - sum(times[name] for name in kinds) - growing
    print(f"{f'attention over {_LONG} positions':<36}{1e3 * growing:>8.2f}{growing / step:>8.1%}")
    print(f"{'norms, rotary, activations, calls':<36}{1e3 * rest:>8.2f}{rest / step:>8.1%}")
    least = floor.step_bytes / floor.read_bytes_per_s
    print(f"{'step':<36}{1e3 * step:>8.2f}{1:>8.1%}{floor.step_bytes / step / 1e9:>8.1f}")
    print(f"{'reading the weights once':<36}{1e3 * least:>8.2f}{least / step:>8.1%}{floor.read_bytes_per_s / 1e9:>8.1f}")


if __name__ == "__main__":
    main()
