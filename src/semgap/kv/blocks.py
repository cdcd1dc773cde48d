"""KV memory: one slab per layer of a handle, allocated before it is needed and read in place.

A slab is [K, V][heads, max_length, head_dim], contiguous. On the CPU attention reads a view of its filled prefix: no copy, and
no work on empty positions. Memory that holds nothing is NaN, so that a stale read shows in the logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


@dataclass(frozen=True)
class KVShape:
    """The shape of one handle's cache. heads are KV heads: fewer than query heads under grouped-query attention."""

    layers: int
    heads: int
    max_length: int
    head_dim: int

    def filled(self, positions: int) -> tuple[int, int, int, int, int]:
        """Shape of the filled part as it crosses: [layers, 2, heads, positions, head_dim]."""
        return (self.layers, 2, self.heads, positions, self.head_dim)

    def nbytes(self, itemsize: int) -> int:
        """Bytes of a whole cache, filled or not, in a dtype of `itemsize` bytes."""
        return math.prod(self.filled(self.max_length)) * itemsize


class KVOverflow(ValueError):
    """A handle was asked to hold more positions than it was made for."""


class SlabLayer(DynamicLayer):
    """A transformers cache layer over one slab; gives bitwise the logits of DynamicLayer, without its copies."""

    def __init__(self, slab: torch.Tensor) -> None:
        super().__init__()
        self.slab = slab  # [2, 1, heads, max_length, head_dim]
        self.dtype, self.device = slab.dtype, slab.device
        self.is_initialized = True
        self.set_filled(0)

    def update(self, key_states, value_states, *args, **kwargs):  # type: ignore[no-untyped-def]
        """Appends [1, heads, n, head_dim] keys and values; gives views of all that is filled."""
        end = self.filled + key_states.shape[-2]
        if end > self.slab.shape[-2]:
            raise KVOverflow(f"{end} positions do not fit a KV cache of max_length {self.slab.shape[-2]}")
        self.slab[0, :, :, self.filled : end] = key_states
        self.slab[1, :, :, self.filled : end] = value_states
        self.set_filled(end)
        return self.keys, self.values

    def set_filled(self, positions: int) -> None:
        """Declares how many positions of the slab hold keys and values."""
        self.filled = positions
        self.keys, self.values = self.slab[0, :, :, : self.filled], self.slab[1, :, :, : self.filled]


class KVCache:
    """The cache of one handle: its slabs and the transformers cache that reads them."""

    def __init__(self, shape: KVShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        size = (shape.layers, 2, 1, shape.heads, shape.max_length, shape.head_dim)
        self.slabs = torch.full(size, float("nan"), dtype=dtype, device=device)
        self.cache = DynamicCache()
        self.cache.layers = [SlabLayer(slab) for slab in self.slabs]
        self._host: torch.Tensor | None = None

    @property
    def filled(self) -> int:
        """Positions that hold keys and values."""
        return self.cache.layers[0].filled

    def export(self) -> torch.Tensor:
        """The filled part, packed: [layers, 2, heads, filled, head_dim]."""
        return self.slabs[:, :, 0, :, : self.filled].contiguous()

    def load(self, packed: torch.Tensor) -> None:
        """Replaces the contents by [layers, 2, heads, n, head_dim] as `export` gives it."""
        positions = packed.shape[3]
        if tuple(packed.shape) != self.shape.filled(positions) or positions > self.shape.max_length:
            raise ValueError(f"a KV cache of shape {tuple(packed.shape)} for {self.shape}")
        self.truncate(positions)
        self.slabs[:, :, 0, :, :positions] = packed
        self._set_filled(positions)

    def truncate(self, positions: int) -> None:
        """Forgets what lies beyond `positions`."""
        if positions < self.filled:
            self.slabs[:, :, 0, :, positions : self.filled] = float("nan")
            self._set_filled(positions)

    def clear(self) -> None:
        """Forgets everything."""
        self.slabs.fill_(float("nan"))
        self._host = None
        self._set_filled(0)

    def offload(self) -> int:
        """Moves the filled part to host memory; gives the bytes that crossed PCIe, 0 where the device is the host."""
        if self.slabs.device.type == "cpu":
            return 0
        self._host = self.export().cpu()
        self.slabs.fill_(float("nan"))
        return self._host.nbytes

    def restore(self) -> int:
        """Brings back what `offload` moved; gives the bytes that crossed PCIe."""
        if self._host is None:
            return 0
        packed, self._host = self._host, None
        self.load(packed.to(self.slabs.device))
        return packed.nbytes

    def _set_filled(self, positions: int) -> None:
        for layer in self.cache.layers:
            layer.set_filled(positions)
