"""KV memory: one pool under a byte budget, handed out as slabs, one slab for one layer of one handle, read in place.

A slab is [K, V][heads, max_length, head_dim], contiguous. On the CPU attention reads a view of its filled prefix: no copy, and
no work on empty positions. A slab is cut into blocks of 64 positions, which is what leaves and comes back. Memory that holds
nothing is NaN, so that a stale read shows in the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from semgap.kv.gpu_streams import Event, GpuStreams
from semgap.tensors import bytes_view

BLOCK = 64  # positions


@dataclass(frozen=True)
class KVShape:
    """The shape of one handle's cache. heads are KV heads: fewer than query heads under grouped-query attention."""

    layers: int
    heads: int
    max_length: int
    head_dim: int

    @property
    def blocks(self) -> int:
        """Blocks of one layer, filled or not."""
        return blocks_of(self.max_length)

    def filled(self, positions: int) -> tuple[int, int, int, int, int]:
        """Shape of the filled part as it crosses: [layers, 2, heads, positions, head_dim]."""
        return (self.layers, 2, self.heads, positions, self.head_dim)

    def block(self, positions: int) -> tuple[int, int, int, int, int]:
        """Shape of one layer's block of so many positions as it crosses."""
        return (1, 2, self.heads, positions, self.head_dim)

    def nbytes(self, itemsize: int) -> int:
        """Bytes of a whole cache, filled or not, in a dtype of `itemsize` bytes."""
        return math.prod(self.filled(self.max_length)) * itemsize


class KVOverflow(ValueError):
    """A handle was asked to hold more positions than it was made for."""


class KVBudgetError(ValueError):
    """A pool that is too small for what must be in it at once. `code` travels in error frames."""

    code = "kv_budget"


class KVPool:
    """KV memory of `budget_bytes`, all of it allocated at once: as many whole slabs as fit.

    `copies` are the streams by which blocks leave a GPU and come back; None on the CPU, where they are used in place. KVBudgetError where
    not even one cache fits, which is what a single step needs.
    """

    def __init__(self, shape: KVShape, dtype: torch.dtype, device: torch.device, budget_bytes: int) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.copies = GpuStreams(device) if device.type == "cuda" else None
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
        return len(self._free)

    @property
    def free_bytes(self) -> int:
        """Bytes that no handle holds."""
        return len(self._free) * self.slab_nbytes

    @property
    def budget_bytes(self) -> int:
        """Bytes of all slabs."""
        return len(self._memory) * self.slab_nbytes

    def take(self) -> int:
        """The number of a slab that is free, all NaN. KVBudgetError where there is none."""
        if not self._free:
            raise KVBudgetError(f"all {len(self._memory)} slabs of the KV pool are in use; release a handle or raise kv_budget")
        return self._free.pop()

    def give_back(self, slab: int, filled: int) -> None:
        """Frees a slab whose first `filled` positions hold something, and overwrites them."""
        self._memory[slab, :, :, :, :filled] = float("nan")
        self._free.append(slab)

    def slab(self, number: int) -> torch.Tensor:
        """[2, 1, heads, max_length, head_dim], in place."""
        return self._memory[number]

    def pieces(self, number: int, begin: int, end: int) -> list[memoryview] | None:
        """The memory of positions begin..end of a slab, in the order of a block as it crosses; None where it is not the host's."""
        if self._bytes is None:
            return None
        row = self.shape.head_dim * self.dtype.itemsize
        starts = [(number * 2 * self.shape.heads + part) * self.shape.max_length for part in range(2 * self.shape.heads)]
        return [self._bytes[(start + begin) * row : (start + end) * row] for start in starts]


class SlabLayer(DynamicLayer):
    """A transformers cache layer over one slab; gives bitwise the logits of DynamicLayer, without its copies."""

    def __init__(self, cache: KVCache, index: int) -> None:
        super().__init__()
        self._cache, self._index = cache, index
        self.dtype, self.device = cache.pool.dtype, cache.pool.device
        self.is_initialized = True
        self.number: int | None = None  # of its slab; None while it has none
        self.slab: torch.Tensor | None = None
        self.filled = 0

    def update(self, key_states, value_states, *args, **kwargs):  # type: ignore[no-untyped-def]
        """Appends [1, heads, n, head_dim] keys and values; gives views of all that is filled. Waits for blocks that are on their way."""
        if self._cache.awaited is not None:
            self._cache.awaited(self._index)
        assert self.slab is not None
        end = self.filled + key_states.shape[-2]
        if end > self.slab.shape[-2]:
            raise KVOverflow(f"{end} positions do not fit a KV cache of max_length {self.slab.shape[-2]}")
        self.slab[0, :, :, self.filled : end] = key_states
        self.slab[1, :, :, self.filled : end] = value_states
        self.set_filled(end)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Positions that the layer stands for, in its slab or not."""
        return self.filled

    def set_filled(self, positions: int) -> None:
        """Declares how many positions hold keys and values."""
        self.filled = positions
        if self.slab is not None:
            self.keys, self.values = self.slab[0, :, :, :positions], self.slab[1, :, :, :positions]

    @property
    def held_slab(self) -> torch.Tensor:
        """Its slab, which it must have."""
        assert self.slab is not None, f"layer {self._index} has no slab"
        return self.slab

    def admit(self) -> None:
        """Takes a slab from the pool."""
        self.number = self._cache.pool.take()
        self.slab = self._cache.pool.slab(self.number)
        self.set_filled(self.filled)

    def drop(self) -> None:
        """Gives the slab back."""
        self._cache.settle(self._index)
        if self.number is not None:
            self._cache.pool.give_back(self.number, self.filled)
        self.number = self.slab = None
        self.keys = self.values = torch.empty(0)


class KVCache:
    """The cache of one handle: its slabs, the transformers cache that reads them, and which blocks are where.

    `missing` [layers, blocks] is true for filled blocks that are not in their slab. `saved` [layers, blocks] counts the positions of a
    block that its shadow holds as they are here. An append touches neither: a block is dirty where it holds more than was saved.
    `awaited`, where it is set, is called with a layer's index before the layer is used, and returns once its blocks are there, or on a
    GPU once the current stream waits for them.
    """

    def __init__(self, pool: KVPool) -> None:
        if pool.free_slabs < pool.shape.layers:
            raise KVBudgetError(
                f"a cache takes {pool.shape.layers} slabs and {pool.free_slabs} are free; release a handle or raise kv_budget"
            )
        self.pool, self.shape = pool, pool.shape
        self.cache = DynamicCache()
        self.layers = [SlabLayer(self, index) for index in range(self.shape.layers)]
        self.cache.layers = list(self.layers)
        self.missing = np.zeros((self.shape.layers, self.shape.blocks), dtype=bool)
        self.saved = np.zeros((self.shape.layers, self.shape.blocks), dtype=np.int64)
        self.awaited: Callable[[int], None] | None = None
        self._arriving: dict[int, Event] = {}
        self._host: torch.Tensor | None = None  # pinned, for `offload`
        self._offloaded: tuple[int, ...] | None = None  # shape of what lies there
        for layer in self.layers:
            layer.admit()

    @property
    def filled(self) -> int:
        """Positions that hold keys and values in all layers, here or in the shadow."""
        return self.layers[-1].filled

    @property
    def counts(self) -> np.ndarray:
        """Filled positions of each block of a layer, (blocks,)."""
        return np.clip(self.filled - BLOCK * np.arange(self.shape.blocks), 0, BLOCK)

    @property
    def resident(self) -> np.ndarray:
        """[layers, blocks]: filled and in their slab."""
        return (self.counts > 0) & ~self.missing

    @property
    def dirty(self) -> np.ndarray:
        """[layers, blocks]: in their slab, and newer than the shadow."""
        return self.resident & (self.saved < self.counts)

    @property
    def position_bytes(self) -> int:
        """Bytes of one position of one layer."""
        return 2 * self.shape.heads * self.shape.head_dim * self.pool.dtype.itemsize

    def bytes_of(self, blocks: np.ndarray) -> int:
        """Bytes of the filled positions of the blocks that are true in [layers, blocks]."""
        return int((blocks * self.counts).sum()) * self.position_bytes

    def bounds(self, block: int) -> tuple[int, int]:
        """First position of a block and the end of what it holds."""
        return BLOCK * block, min(BLOCK * (block + 1), self.filled)

    def block(self, layer: int, block: int) -> torch.Tensor:
        """What a resident block holds: a view [2, heads, positions, head_dim]."""
        slab = self.layers[layer].slab
        assert slab is not None and not self.missing[layer, block]
        begin, end = self.bounds(block)
        return slab[:, 0, :, begin:end]

    def pieces(self, layer: int, block: int) -> list[memoryview] | None:
        """The memory of a block in the order in which it crosses; None where it is not the host's."""
        number = self.layers[layer].number
        assert number is not None
        return self.pool.pieces(number, *self.bounds(block))

    def place(self, layer: int, block: int, held: torch.Tensor) -> None:
        """Puts [1, 2, heads, n, head_dim] into a block that is missing; of more positions than it holds now, the first."""
        slab = self.layers[layer].slab
        assert slab is not None
        begin, end = self.bounds(block)
        slab[:, 0, :, begin:end] = held[0, :, :, : end - begin]

    def arrives(self, layer: int, event: Event) -> None:
        """Blocks are being put into a layer's slab on another stream, until the event. Any thread."""
        if event is not None:
            self._arriving[layer] = event

    def settle(self, layer: int | None = None) -> None:
        """Has the current stream wait for what is being put into a layer's slab, or into all. The host does not wait."""
        for index in [layer] if layer is not None else list(self._arriving):
            event = self._arriving.pop(index, None)
            if event is not None:
                torch.cuda.current_stream(self.pool.device).wait_event(event)

    def here(self, layer: int, blocks: np.ndarray) -> None:
        """Declares that the blocks (indices) of a layer have been put in their slab."""
        self.missing[layer, blocks] = False

    def drop(self, layer: int) -> None:
        """Gives a layer's slab back to the pool; what it held is missing from now on."""
        self.missing[layer] = self.counts > 0
        self.layers[layer].drop()

    def without_slab(self) -> list[int]:
        """Layers that have no slab."""
        return [index for index, layer in enumerate(self.layers) if layer.number is None]

    def admit(self) -> None:
        """Takes slabs for the layers that have none; their blocks stay missing."""
        for index in self.without_slab():
            self.layers[index].admit()

    def blank_missing(self) -> None:
        """Overwrites the blocks that are missing: what came of them in a restore that failed is not to be read."""
        self.settle()
        for layer, block in np.argwhere(self.missing):
            slab = self.layers[layer].slab
            if slab is not None:
                slab[:, 0, :, BLOCK * block : BLOCK * (block + 1)] = float("nan")

    def stand_for(self, positions: int, saved: np.ndarray, here: np.ndarray) -> None:
        """Declares a cache of `positions`; by [layers, blocks], the shadow holds `saved` of them, and `here` tells what is in its slab.

        A block of which the slab holds fewer positions than are declared is missing, whatever `here` says.
        """
        held = self.counts
        self.truncate(positions)
        for layer in self.layers:
            layer.set_filled(positions)
        self.saved = np.minimum(saved, self.counts)
        self.missing = (self.counts > 0) & ~(here & (self.saved >= self.counts) & (held >= self.counts))
        self.blank_missing()

    def export(self) -> torch.Tensor:
        """The filled part, packed: [layers, 2, heads, filled, head_dim]. All of it must be here."""
        self.settle()
        return torch.stack([layer.held_slab[:, 0, :, : self.filled] for layer in self.layers])

    def load(self, packed: torch.Tensor) -> None:
        """Replaces the contents by [layers, 2, heads, n, head_dim] as `export` gives it."""
        positions = packed.shape[3]
        if tuple(packed.shape) != self.shape.filled(positions) or positions > self.shape.max_length:
            raise ValueError(f"a KV cache of shape {tuple(packed.shape)} for {self.shape}")
        self.truncate(positions)
        for layer, held in zip(self.layers, packed, strict=True):
            layer.held_slab[:, 0, :, :positions] = held
            layer.set_filled(positions)
        self.missing[:] = False
        self.saved[:] = 0

    def truncate(self, positions: int) -> None:
        """Forgets what lies beyond `positions`, also in layers that are ahead of the others after a pass that failed."""
        self.settle()
        for layer in self.layers:
            if positions < layer.filled:
                if layer.slab is not None:
                    layer.slab[:, :, :, positions : layer.filled] = float("nan")
                layer.set_filled(positions)
        self.saved = np.minimum(self.saved, self.counts)
        self.missing &= self.counts > 0

    def clear(self) -> None:
        """Forgets everything; slabs stay."""
        self.truncate(0)
        self._offloaded = None

    def release(self) -> None:
        """Gives all slabs back to the pool."""
        for layer in self.layers:
            layer.drop()
            layer.set_filled(0)
        self.missing[:] = False
        self.saved[:] = 0
        self._offloaded = None

    def offload(self) -> int:
        """Moves the filled part to pinned memory, without waiting; gives the bytes that cross PCIe, 0 where the device is the host."""
        copies = self.pool.copies
        if copies is None or not self.filled:
            return 0
        packed = self.export()
        if self._host is None:
            self._host = copies.host_memory(self.shape.nbytes(self.pool.dtype.itemsize))
        copies.to_host([(packed.view(-1).view(torch.uint8), self._host[: packed.nbytes])])
        for layer in self.layers:
            layer.held_slab[:, :, :, : self.filled] = float("nan")
        self._offloaded = tuple(packed.shape)
        return packed.nbytes

    def restore(self) -> int:
        """Brings back what `offload` moved: the current stream waits for it, the host does not. Gives the bytes that cross PCIe."""
        copies = self.pool.copies
        if self._offloaded is None or copies is None:
            return 0
        assert self._host is not None
        nbytes = math.prod(self._offloaded) * self.pool.dtype.itemsize
        copies.begin_incoming()
        with copies.incoming():
            packed = self._host[:nbytes].to(self.pool.device, non_blocking=True)
        self.arrives(0, copies.arrived())
        self.settle()
        self.load(packed.view(self.pool.dtype).view(self._offloaded))
        if copies.is_cuda:
            packed.record_stream(torch.cuda.current_stream(self.pool.device))
        self._offloaded = None
        return nbytes


def blocks_of(positions: int) -> int:
    """Blocks that so many positions take."""
    return -(-positions // BLOCK)
