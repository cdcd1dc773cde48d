"""A step of the engine over many requests against a step over one, its own slab, and plain transformers over the same padded batch.

Ratios of medians, one a round, all work of a round in turns. `make bench` prints them too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from bench_executor import CORES, MODEL, Promise, print_ratios
from transformers import DynamicCache, PreTrainedModel

from semgap.engine.batch import Run
from semgap.engine.device import limit_threads
from semgap.engine.executor import Executor
from semgap.engine.executor_choice import make_executor
from semgap.engine.model import build_model
from semgap.engine.model_files import ModelFiles, load_digest
from semgap.engine.weights import Weights
from semgap.kv.block_pool import BlockPool
from semgap.kv.blocks import KVCache
from semgap.kv.pool import BLOCK
from semgap.processes import machine

_STEPS, _FILLED, _MAX_LENGTH = 6, 128, 256
_REQUESTS = (1, 4, 16)
_BLOCKS = _FILLED // BLOCK + 1  # of a request: the filled ones and the one that the step writes

PROMISES = {
    "slab": Promise("step of 1 request over blocks / over its slab", 1.03),
    "4 requests": Promise("step of 4 requests / of 1", 1.5),
    "16 requests": Promise("step of 16 requests / of 1", 3.6),
    "shared": Promise("step of 16 requests, 128 positions shared / not shared", 1.0),
    "padded": Promise("step of 16 requests / of plain transformers, padded", 0.8),
}


def main() -> None:
    """Prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    with machine.measuring():
        os.sched_setaffinity(0, CORES[-1:])
        limit_threads(1)
        print_ratios(batch_ratios(ModelFiles(options.model, load_digest(options.model)), options.rounds), PROMISES)


def batch_ratios(model: ModelFiles, rounds: int) -> dict[str, list[float]]:
    """A ratio a round for each of PROMISES. Each round has weight memory of its own. Call it pinned to one core."""
    ratios: dict[str, list[float]] = {name: [] for name in PROMISES}
    pairs = {"slab": ("1 requests", "slab"), "shared": ("shared", "16 requests"), "padded": ("16 requests", "padded")}
    pairs |= {f"{count} requests": (f"{count} requests", "1 requests") for count in _REQUESTS[1:]}
    for number in range(rounds):
        print(f"batches: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        times = _round_s(model)
        for name, (above, below) in pairs.items():
            ratios[name].append(times[above] / times[below])
    return ratios


def _round_s(model: ModelFiles) -> dict[str, float]:
    """Median seconds of each piece of work, all in turns; the first turn warms up."""
    weights = Weights(model.specs(), "cpu")
    weights.read_file(model.weights_file, [tensor.offset for tensor in model.digest.tensors])
    executor = make_executor("fused", model.config, weights, "float32", 1, _MAX_LENGTH)
    plain = build_model(model.config, weights, "float32")
    times: dict[str, list[float]] = {}
    works = dict(_works(executor, plain))
    for turn in range(_STEPS + 1):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            if turn:
                times.setdefault(name, []).append(time.perf_counter() - begin)
    return {name: statistics.median(taken) for name, taken in times.items()}


def _works(executor: Executor, plain: PreTrainedModel) -> Iterator[tuple[str, Callable[[], object]]]:
    """Names of work, and what does it. Keys and values are random numbers: their time is that of real ones."""
    cache, (pool, blocks), padded = _filled_slab(executor), _filled_blocks(executor), _padded_cache(executor)
    yield "slab", partial(_slab_step, executor, cache)
    for count in _REQUESTS:
        yield f"{count} requests", partial(_step, executor, pool, blocks[:count])
    shared = np.concatenate([np.broadcast_to(blocks[0, :-1], (len(blocks), _BLOCKS - 1)), blocks[:, -1:]], axis=1)
    yield "shared", partial(_step, executor, pool, shared)
    yield "padded", partial(_padded_step, plain, padded)


def _slab_step(executor: Executor, cache: KVCache) -> None:
    executor.logits(executor.forward(np.array([7]), cache))
    cache.truncate(_FILLED)


def _step(executor: Executor, pool: BlockPool, blocks: np.ndarray) -> None:
    runs = [Run(np.array([7 + i]), _FILLED, own, True) for i, own in enumerate(blocks)]
    executor.logits(executor.forward_batch(runs, pool))


@torch.inference_mode()
def _padded_step(plain: PreTrainedModel, cache: DynamicCache) -> None:
    """As generate() does it: a mask over the padded batch, and a cache that grows by copies."""
    rows = _REQUESTS[-1]
    ids, mask = torch.arange(7, 7 + rows)[:, None], torch.ones(rows, _FILLED + 1, dtype=torch.long)
    plain(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    cache.crop(-1)


def _filled_slab(executor: Executor) -> KVCache:
    cache, generator = executor.new_cache(), np.random.default_rng(0)
    for layer in cache.layers:
        slab = layer.held_slab
        slab[:, :, :, :_FILLED] = generator.standard_normal(slab[:, :, :, :_FILLED].shape, np.float32)
        layer.filled = _FILLED
    return cache


def _filled_blocks(executor: Executor) -> tuple[BlockPool, np.ndarray]:
    """A pool, and the numbers of each request's blocks, [requests, blocks]."""
    shape, count = executor.kv_shape, _REQUESTS[-1] * _BLOCKS
    pool = BlockPool(shape, executor.dtype, executor.cache_nbytes * count * BLOCK // shape.max_length)
    pool.memory[:] = np.random.default_rng(0).standard_normal(pool.memory.shape, np.float32)
    return pool, np.random.default_rng(1).permutation(count).reshape(-1, _BLOCKS)


def _padded_cache(executor: Executor) -> DynamicCache:
    cache, shape = DynamicCache(), executor.kv_shape
    for layer in range(shape.layers):
        keys, values = torch.randn(2, _REQUESTS[-1], shape.heads, _FILLED, shape.head_dim)
        cache.update(keys, values, layer)
    return cache


if __name__ == "__main__":
    main()
