"""The cache of one handle, and the place of each of its blocks: 64 positions of one layer, which leave a slab and come back.

On the CPU attention reads a view of a slab's filled prefix: no copy, and no work on empty positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from semgap.kv.gpu_streams import Event
from semgap.kv.pool import BLOCK, KVBudgetError, KVPool


class KVOverflow(ValueError):
    """More positions than a handle's slabs hold."""


class SlabLayer(DynamicLayer):
    """A transformers cache layer over one slab: bitwise the logits of DynamicLayer, without its copies."""

    def __init__(self, cache: KVCache, index: int) -> None:
        super().__init__()
        self._cache, self._index = cache, index
        self.dtype, self.device = cache.pool.dtype, cache.pool.device
        self.is_initialized = True
        self.number: int | None = None  # of its slab, or None while it has no slab
        self.slab: torch.Tensor | None = None
        self.filled = 0

    def update(self, key_states, value_states, *args, **kwargs):  # type: ignore[no-untyped-def]
        """Appends [1, heads, n, head_dim] keys and values and gives views of all filled ones. Waits for blocks on their way."""
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
        """Its slab. The layer must have one."""
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
    """The cache of one handle: its slabs, the transformers cache that reads them, and the place of each block.

    `missing` [layers, blocks] is true for filled blocks that are not in their slab. `saved` [layers, blocks] counts the positions of a
    block that its shadow holds with the same contents. An append changes neither: a block is dirty if it holds more than was saved.
    `awaited` (or None) is called with a layer's index before the layer is used. It returns when the layer's blocks are in their slab, or
    on a GPU when the current stream waits for them.
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
        self._offloaded: tuple[int, ...] | None = None  # the shape of its contents
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
        """First position of a block and the end of its filled positions."""
        return BLOCK * block, min(BLOCK * (block + 1), self.filled)

    def block_shape(self, block: int) -> tuple[int, int, int, int, int]:
        """Shape of the filled positions of one layer's block on the wire."""
        begin, end = self.bounds(block)
        return self.shape.block(end - begin)

    def block(self, layer: int, block: int) -> torch.Tensor:
        """The filled positions of a resident block: a view [2, heads, positions, head_dim]."""
        assert not self.missing[layer, block]
        begin, end = self.bounds(block)
        return self.layers[layer].held_slab[:, 0, :, begin:end]

    def pieces(self, layer: int, block: int) -> list[memoryview]:
        """The host memory of the filled positions of a block, in the order of a block on the wire."""
        number = self.layers[layer].number
        assert number is not None, f"layer {layer} has no slab"
        return self.pool.pieces(number, *self.bounds(block))

    def place(self, layer: int, block: int, held: torch.Tensor) -> None:
        """Puts [1, 2, heads, n, head_dim] into a missing block; if n is more than its filled positions, the first ones."""
        begin, end = self.bounds(block)
        self.layers[layer].held_slab[:, 0, :, begin:end] = held[0, :, :, : end - begin]

    def arrives(self, layer: int, event: Event) -> None:
        """Notes that another stream puts blocks into a layer's slab until `event`. Any thread may call it."""
        if event is not None:
            self._arriving[layer] = event

    def settle(self, layer: int | None = None) -> None:
        """Makes the current stream wait for blocks on their way into a layer's slab, or into all slabs. The host does not wait."""
        for index in [layer] if layer is not None else list(self._arriving):
            event = self._arriving.pop(index, None)
            if event is not None:
                torch.cuda.current_stream(self.pool.device).wait_event(event)

    def drop(self, layer: int) -> None:
        """Gives a layer's slab back to the pool; its blocks are missing from now on."""
        self.missing[layer] = self.counts > 0
        self.layers[layer].drop()

    def without_slab(self) -> list[int]:
        """Layers that have no slab."""
        return [index for index, layer in enumerate(self.layers) if layer.number is None]

    def admit(self) -> None:
        """Takes slabs for the layers without one; their blocks stay missing."""
        for index in self.without_slab():
            self.layers[index].admit()

    def blank_missing(self) -> None:
        """Overwrites missing blocks, which a failed restore may have left half filled."""
        self.settle()
        for layer, block in np.argwhere(self.missing):
            slab = self.layers[layer].slab
            if slab is not None:
                slab[:, 0, :, BLOCK * block : BLOCK * (block + 1)] = float("nan")

    def stand_for(self, positions: int, saved: np.ndarray, here: np.ndarray) -> None:
        """Declares a cache of `positions`. Per block, [layers, blocks]: `saved` positions are in the shadow; `here` is true for a block in
        its slab.

        A block is missing, whatever `here` says, if its slab holds fewer positions than declared.
        """
        held = self.counts
        self.truncate(positions)
        for layer in self.layers:
            layer.set_filled(positions)
        self.saved = np.minimum(saved, self.counts)
        self.missing = (self.counts > 0) & ~(here & (self.saved >= self.counts) & (held >= self.counts))
        self.blank_missing()

    def export(self) -> torch.Tensor:
        """The filled part, packed: [layers, 2, heads, filled, head_dim]. All blocks must be in their slabs."""
        self.settle()
        return torch.stack([layer.held_slab[:, 0, :, : self.filled] for layer in self.layers])

    def load(self, packed: torch.Tensor) -> None:
        """Replaces the contents by [layers, 2, heads, n, head_dim], as from `export`."""
        positions = packed.shape[3]
        if tuple(packed.shape) != self.shape.filled(positions) or positions > self.shape.max_length:
            raise ValueError(f"a KV cache of shape {tuple(packed.shape)} does not fit {self.shape}")
        self.truncate(positions)
        for layer, held in zip(self.layers, packed, strict=True):
            layer.held_slab[:, 0, :, :positions] = held
            layer.set_filled(positions)
        self.missing[:] = False
        self.saved[:] = 0

    def truncate(self, positions: int) -> None:
        """Forgets all beyond `positions`, also in layers that a failed pass left ahead of the others."""
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
        """Starts to move the filled part to pinned memory; gives the bytes that cross PCIe, 0 on the CPU."""
        streams = self.pool.streams
        if streams is None or not self.filled:
            return 0
        packed = self.export()
        if self._host is None:
            self._host = streams.host_memory(self.shape.nbytes(self.pool.dtype.itemsize))
        streams.to_host([(packed.view(-1).view(torch.uint8), self._host[: packed.nbytes])])
        for layer in self.layers:
            layer.held_slab[:, :, :, : self.filled] = float("nan")
        self._offloaded = tuple(packed.shape)
        return packed.nbytes

    def restore(self) -> int:
        """Brings back what `offload` moved; the current stream waits for it, the host does not. Gives the bytes that cross PCIe."""
        streams = self.pool.streams
        if self._offloaded is None or streams is None:
            return 0
        assert self._host is not None
        nbytes = math.prod(self._offloaded) * self.pool.dtype.itemsize
        streams.begin_incoming()
        with streams.incoming():
            packed = self._host[:nbytes].to(self.pool.device, non_blocking=True)
        self.arrives(0, streams.arrived())
        self.settle()
        self.load(packed.view(self.pool.dtype).view(self._offloaded))
        if streams.is_cuda:
            packed.record_stream(torch.cuda.current_stream(self.pool.device))
        self._offloaded = None
        return nbytes
