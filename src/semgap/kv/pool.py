"""KV memory: one pool under a byte budget, divided into slabs. A slab holds one layer of one handle.

A slab is [K, V][heads, max_length, head_dim], contiguous. Empty memory is NaN: a stale read shows in the logits.
"""

import math
from dataclasses import dataclass

import torch

from semgap.kv.gpu_streams import GpuStreams
from semgap.tensors import DType, bytes_view

BLOCK = 64  # positions


@dataclass(frozen=True)
class KVShape:
    """The shape of one handle's cache. `heads` are KV heads: grouped-query attention has fewer of them than query heads."""

    layers: int
    heads: int
    max_length: int
    head_dim: int

    @property
    def blocks(self) -> int:
        """Blocks of one layer, filled or not."""
        return -(-self.max_length // BLOCK)

    def filled(self, positions: int) -> tuple[int, int, int, int, int]:
        """Shape of the filled part on the wire: [layers, 2, heads, positions, head_dim]."""
        return (self.layers, 2, self.heads, positions, self.head_dim)

    def block(self, positions: int) -> tuple[int, int, int, int, int]:
        """Shape of one layer's block of `positions` on the wire."""
        return (1, 2, self.heads, positions, self.head_dim)

    def nbytes(self, itemsize: int) -> int:
        """Bytes of a whole cache, filled or not, in a dtype of `itemsize` bytes."""
        return math.prod(self.filled(self.max_length)) * itemsize


class KVBudgetError(ValueError):
    """A pool too small for the slabs that are needed at once. `code` travels in error frames."""

    code = "kv_budget"


class KVPool:
    """KV memory of `budget_bytes`, all of it allocated at once: as many whole slabs as fit.

    `streams` carry blocks between a GPU and pinned memory; None on the CPU, whose slabs are used in place. KVBudgetError if not even one
    cache fits, which is the need of a single step.
    """

    def __init__(self, shape: KVShape, dtype: torch.dtype, device: torch.device, budget_bytes: int) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.wire_dtype = DType.from_torch_name(str(dtype))
        self.streams = GpuStreams(device) if device.type == "cuda" else None
        self.slab_nbytes = shape.nbytes(dtype.itemsize) // shape.layers
        count = budget_bytes // self.slab_nbytes
        if count < shape.layers:
            needed = shape.layers * self.slab_nbytes
            raise KVBudgetError(f"a KV budget of {budget_bytes:,} bytes is less than one step needs, {needed:,}; raise kv_budget")
        size = (count, 2, 1, shape.heads, shape.max_length, shape.head_dim)
        self._memory = torch.full(size, float("nan"), dtype=dtype, device=device)
        self._bytes = bytes_view(self._memory.view(torch.uint8).numpy()) if device.type == "cpu" else None
        self._free = list(reversed(range(count)))

    @property
    def free_slabs(self) -> int:
        """Slabs that no handle holds."""
        return len(self._free)

    @property
    def budget_bytes(self) -> int:
        """Bytes of all slabs."""
        return len(self._memory) * self.slab_nbytes

    def take(self) -> int:
        """The number of a free slab, all NaN. KVBudgetError if all are in use."""
        if not self._free:
            raise KVBudgetError(f"all {len(self._memory)} slabs of the KV pool are in use; release a handle or raise kv_budget")
        return self._free.pop()

    def give_back(self, slab: int, filled: int) -> None:
        """Frees a slab and overwrites its first `filled` positions."""
        self._memory[slab, :, :, :, :filled] = float("nan")
        self._free.append(slab)

    def slab(self, number: int) -> torch.Tensor:
        """[2, 1, heads, max_length, head_dim], in place."""
        return self._memory[number]

    def pieces(self, number: int, begin: int, end: int) -> list[memoryview]:
        """The memory of positions begin..end of a slab in host memory, in the order of a block on the wire."""
        assert self._bytes is not None, "slabs on a GPU have no host memory"
        row = self.shape.head_dim * self.dtype.itemsize
        starts = [(number * 2 * self.shape.heads + part) * self.shape.max_length for part in range(2 * self.shape.heads)]
        return [self._bytes[(start + begin) * row : (start + end) * row] for start in starts]
