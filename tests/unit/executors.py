"""An executor over a model's directory, a pool of its KV blocks, and a request by itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from semgap.engine.executor import Executor
from semgap.engine.executor_choice import make_executor
from semgap.engine.model_files import ModelFiles, load_digest
from semgap.engine.weights import Weights
from semgap.kv.block_pool import BlockPool
from semgap.kv.pool import BLOCK, KVShape

MAX_LENGTH = 96


def executor_of(kind: str, directory: Path, threads: int = 1, dtype: str = "float32") -> Executor:
    model = ModelFiles(directory, load_digest(directory))
    weights = Weights(model.specs(), "cpu")
    weights.read_file(model.weights_file, [tensor.offset for tensor in model.digest.tensors])
    torchs = torch.get_num_threads()
    executor = make_executor(kind, model.config, weights, dtype, threads, MAX_LENGTH)
    torch.set_num_threads(torchs)
    return executor


def pool_of(executor: Executor, blocks: int) -> BlockPool:
    shape = executor.kv_shape
    one = KVShape(shape.layers, shape.heads, BLOCK, shape.head_dim)
    return BlockPool(shape, executor.dtype, blocks * one.nbytes(executor.dtype.itemsize))


def alone(executor: Executor, tokens: np.ndarray) -> np.ndarray:
    """The hidden states of a request by itself, over slabs."""
    return np.asarray(executor.forward(tokens, executor.new_cache()))
