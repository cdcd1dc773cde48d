"""KV memory: one pool under a byte budget, divided into slabs. A slab holds one layer of one handle.

A slab is [K, V][1][heads, max_length, head_dim], contiguous. Empty memory is NaN: a stale read shows in the logits.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from semgap.tensors import Array, DType, Tensor, bytes_view

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

    def slab(self) -> tuple[int, int, int, int, int]:
        """Shape of a slab in memory."""
        return (2, 1, self.heads, self.max_length, self.head_dim)

    def nbytes(self, itemsize: int) -> int:
        """Bytes of a whole cache, filled or not, in a dtype of `itemsize` bytes."""
        return math.prod(self.filled(self.max_length)) * itemsize


class KVBudgetError(ValueError):
    """A pool too small for the slabs that are needed at once. `code` travels in error frames."""

    code = "kv_budget"


class KVPool(ABC):
    """KV memory of `budget_bytes` on a device, all of it allocated at once: as many whole slabs as fit.

    `streams` (GpuStreams) carry blocks between a GPU and pinned memory; None for slabs in host memory, which are used in place.
    KVBudgetError if not even one cache fits, which is the need of a single step.
    """

    streams: Any = None

    def __init__(self, shape: KVShape, dtype: DType, device: str, budget_bytes: int) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.slab_nbytes = shape.nbytes(dtype.itemsize) // shape.layers
        self.slabs = budget_bytes // self.slab_nbytes
        if self.slabs < shape.layers:
            needed = shape.layers * self.slab_nbytes
            raise KVBudgetError(f"a KV budget of {budget_bytes:,} bytes is less than one step needs, {needed:,}; raise kv_budget")
        self._free = list(reversed(range(self.slabs)))

    @abstractmethod
    def slab(self, number: int) -> Array:
        """[2, 1, heads, max_length, head_dim], in place: a numpy array, or a torch tensor on a GPU."""

    @abstractmethod
    def blank(self, slab: Array, begin: int, end: int) -> None:
        """Overwrites positions begin..end of a slab with NaN."""

    @abstractmethod
    def pieces(self, number: int, begin: int, end: int) -> list[memoryview]:
        """The host memory of positions begin..end of a slab, in the order of a block on the wire."""

    @abstractmethod
    def pack(self, parts: Sequence[Array]) -> Array:
        """One array of equal parts of slabs, along a new first axis."""

    @abstractmethod
    def unpack(self, packed: Tensor) -> Array:
        """A tensor from the wire as an array that slabs can take."""

    @property
    def free_slabs(self) -> int:
        """Slabs that no handle holds."""
        return len(self._free)

    @property
    def budget_bytes(self) -> int:
        """Bytes of all slabs."""
        return self.slabs * self.slab_nbytes

    def take(self) -> int:
        """The number of a free slab, all NaN. KVBudgetError if all are in use."""
        if not self._free:
            raise KVBudgetError(f"all {self.slabs} slabs of the KV pool are in use; release a handle or raise kv_budget")
        return self._free.pop()

    def give_back(self, slab: int, filled: int) -> None:
        """Frees a slab and overwrites its first `filled` positions."""
        self.blank(self.slab(slab), 0, filled)
        self._free.append(slab)


class HostPool(KVPool):
    """Slabs in host memory, as numpy arrays; bfloat16 as its bit patterns."""

    def __init__(self, shape: KVShape, dtype: DType, budget_bytes: int) -> None:
        super().__init__(shape, dtype, "cpu", budget_bytes)
        self._nan = 0x7FC0 if dtype is DType.BF16 else np.nan
        self._memory = np.full((self.slabs, *shape.slab()), self._nan, dtype.numpy)
        self._bytes, self._address = bytes_view(self._memory), self._memory.ctypes.data

    def slab(self, number: int) -> np.ndarray:
        return self._memory[number]

    def address(self, number: int | None) -> int:
        """Where a slab begins in memory. The slab must be held by a layer, which gives its number."""
        assert number is not None, "the layer has no slab"
        return self._address + number * self.slab_nbytes

    def blank(self, slab: Array, begin: int, end: int) -> None:
        slab[:, :, :, begin:end] = self._nan

    def pieces(self, number: int, begin: int, end: int) -> list[memoryview]:
        row = self.shape.head_dim * self.dtype.itemsize
        starts = [(number * 2 * self.shape.heads + part) * self.shape.max_length for part in range(2 * self.shape.heads)]
        return [self._bytes[(start + begin) * row : (start + end) * row] for start in starts]

    def pack(self, parts: Sequence[Array]) -> np.ndarray:
        return np.stack(parts)

    def unpack(self, packed: Tensor) -> np.ndarray:
        return packed.numpy()
