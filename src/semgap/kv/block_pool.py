"""KV memory of many requests: one pool of blocks, each of 64 positions of all layers. Who holds a block is block_tables.py's business."""

from typing import Any

import numpy as np

from semgap.kv.pool import BLOCK, KVBudgetError, KVShape
from semgap.tensors import DType


class BlockPool:
    """As many blocks as fit `budget_bytes`, in host memory: [blocks, layers, 2, kv_heads, BLOCK, head_dim], keys before values.

    Empty positions are NaN: a stale read shows in the logits. KVBudgetError if not even one block fits.
    """

    def __init__(self, shape: KVShape, dtype: DType, budget_bytes: int) -> None:
        self.shape, self.dtype = shape, dtype
        self.block_nbytes = shape.layers * 2 * shape.heads * BLOCK * shape.head_dim * dtype.itemsize
        self.blocks = budget_bytes // self.block_nbytes
        if not self.blocks:
            raise KVBudgetError(f"a KV budget of {budget_bytes:,} bytes holds no block of {self.block_nbytes:,}; raise kv_budget")
        self._nan = 0x7FC0 if dtype is DType.BF16 else np.nan
        self.memory = self._blank_memory((self.blocks, shape.layers, 2, shape.heads, BLOCK, shape.head_dim))

    @property
    def layer_nbytes(self) -> int:
        """Bytes from one layer of a block to the next."""
        return self.block_nbytes // self.shape.layers

    def addresses(self, blocks: np.ndarray) -> np.ndarray:
        """Where blocks (n,), int64, begin in memory: their first layer's keys."""
        address: int = self.memory.ctypes.data
        return address + blocks * self.block_nbytes

    def blank(self, block: int) -> None:
        """Overwrites a block with NaN."""
        self.memory[block] = self._nan

    def _blank_memory(self, parts: tuple[int, ...]) -> Any:
        """Empty memory [*parts]: a numpy array, bfloat16 as its bit patterns; or what a subclass says."""
        return np.full(parts, self._nan, self.dtype.numpy)
