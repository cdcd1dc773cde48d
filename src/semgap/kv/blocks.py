"""The cache of one handle, and the place of each of its blocks: 64 positions of one layer, which leave a slab and come back.

Attention reads a slab's filled prefix in place: no copy, and no work on empty positions.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from semgap.kv.pool import BLOCK, KVBudgetError, KVPool
from semgap.tensors import Array


class KVOverflow(ValueError):
    """More positions than a handle's slabs hold."""


class SlabLayer:
    """One layer of a handle: its slab, or None, with the slab's number in the pool, and the positions that hold keys and values."""

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        self.filled = 0
        self.admit()

    @property
    def held_slab(self) -> Array:
        """Its slab. The layer must have one."""
        assert self.slab is not None, "the layer has no slab"
        return self.slab

    def admit(self) -> None:
        """Takes a slab from the pool."""
        self.number: int | None = self._pool.take()
        self.slab: Array | None = self._pool.slab(self.number)

    def drop(self) -> None:
        """Gives the slab back."""
        if self.number is not None:
            self._pool.give_back(self.number, self.filled)
        self.number = self.slab = None

    def blank(self, begin: int, end: int) -> None:
        """Overwrites positions begin..end of its slab, if it has one."""
        if self.slab is not None:
            self._pool.blank(self.slab, begin, end)


class KVCache:
    """The cache of one handle: its slabs, and the place of each block.

    `missing` [layers, blocks] is true for filled blocks that are not in their slab. `saved` [layers, blocks] counts the positions of a
    block that its shadow holds with the same contents. An append changes neither: a block is dirty if it holds more than was saved.
    `awaited` (or None) is called with a layer's index before the layer is used. It returns when the layer's blocks are in their slab, or
    on a GPU when the current stream waits for them. `computed` (or None) is called with a layer's index once a pass has appended its keys
    and values there.
    """

    def __init__(self, pool: KVPool) -> None:
        if pool.free_slabs < pool.shape.layers:
            raise KVBudgetError(
                f"a cache takes {pool.shape.layers} slabs and {pool.free_slabs} are free; release a handle or raise kv_budget"
            )
        self.pool, self.shape = pool, pool.shape
        self.layers = [SlabLayer(pool) for _ in range(self.shape.layers)]
        self.missing = np.zeros((self.shape.layers, self.shape.blocks), dtype=bool)
        self.saved = np.zeros((self.shape.layers, self.shape.blocks), dtype=np.int64)
        self._known_whole = True  # asked before every step, when the step before has pushed all else out of a core's cache
        self.awaited: Callable[[int], None] | None = None
        self.computed: Callable[[int], None] | None = None
        self._stands_at: int | None = None  # its positions, if they do not grow any more
        self._arriving: dict[int, Any] = {}
        self._host: Array | None = None  # pinned, for `offload`
        self._offloaded: tuple[int, ...] | None = None  # the shape of its contents

    @property
    def filled(self) -> int:
        """Positions that hold keys and values in all layers, here or in the shadow."""
        return self.layers[-1].filled if self._stands_at is None else self._stands_at

    def as_of(self, layer: int) -> "KVCache":
        """This cache as it stands now that a pass has computed `layer`: the same slabs and books, with that layer's positions, whatever
        is appended later.
        """
        view = copy.copy(self)
        view._stands_at = self.layers[layer].filled
        return view

    @property
    def by_layer(self) -> bool:
        """True if a pass must run layer by layer: one is awaited, or announced."""
        return self.awaited is not None or self.computed is not None

    @property
    def is_whole(self) -> bool:
        """True if no block is missing and every layer has a slab."""
        if not self._known_whole:
            self._known_whole = not self.missing.any() and not self.without_slab()
        return self._known_whole

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

    def block(self, layer: int, block: int) -> Array:
        """The filled positions of a resident block: a view [2, heads, positions, head_dim]."""
        assert not self.missing[layer, block]
        begin, end = self.bounds(block)
        return self.layers[layer].held_slab[:, 0, :, begin:end]

    def pieces(self, layer: int, block: int) -> list[memoryview]:
        """The host memory of the filled positions of a block, in the order of a block on the wire."""
        number = self.layers[layer].number
        assert number is not None, f"layer {layer} has no slab"
        return self.pool.pieces(number, *self.bounds(block))

    def place(self, layer: int, block: int, held: Array) -> None:
        """Puts [1, 2, heads, n, head_dim] into a missing block; if n is more than its filled positions, the first ones."""
        begin, end = self.bounds(block)
        self.layers[layer].held_slab[:, 0, :, begin:end] = held[0, :, :, : end - begin]

    def arrives(self, layer: int, event: Any) -> None:
        """Notes that another stream puts blocks into a layer's slab until `event`. Any thread may call it."""
        if event is not None:
            self._arriving[layer] = event

    def settle(self, layer: int | None = None) -> None:
        """Makes the current stream wait for blocks on their way into a layer's slab, or into all slabs. The host does not wait."""
        for index in [layer] if layer is not None else list(self._arriving):
            event = self._arriving.pop(index, None)
            if event is not None and self.pool.streams is not None:
                self.pool.streams.wait(event)

    def drop(self, layer: int) -> None:
        """Gives a layer's slab back to the pool; its blocks are missing from now on."""
        self.missing[layer] = self.counts > 0
        self.settle(layer)
        self.layers[layer].drop()
        self._known_whole = False

    def miss(self, blocks: np.ndarray) -> None:
        """Declares filled blocks, true in [layers, blocks], not to be in their slabs."""
        self.missing |= blocks
        self._known_whole = False

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
            self.layers[layer].blank(BLOCK * block, BLOCK * (block + 1))

    def stand_for(self, positions: int, saved: np.ndarray, here: np.ndarray) -> None:
        """Declares a cache of `positions`. Per block, [layers, blocks]: `saved` positions are in the shadow; `here` is true for a block in
        its slab.

        A block is missing, whatever `here` says, if its slab holds fewer positions than declared.
        """
        held = self.counts
        self.truncate(positions)
        for layer in self.layers:
            layer.filled = positions
        self.saved = np.minimum(saved, self.counts)
        self.missing = (self.counts > 0) & ~(here & (self.saved >= self.counts) & (held >= self.counts))
        self._known_whole = False
        self.blank_missing()

    def expect(self, positions: int) -> None:
        """Declares an empty cache, in which nothing was written, to hold `positions` whose blocks are all on their way, or 0 again."""
        for layer in self.layers:
            layer.filled = positions
        self.missing = np.broadcast_to(self.counts > 0, self.missing.shape).copy()
        self.saved = np.broadcast_to(self.counts, self.saved.shape).copy()

    def export(self) -> Array:
        """The filled part, packed: [layers, 2, heads, filled, head_dim]. All blocks must be in their slabs."""
        self.settle()
        return self.pool.pack([layer.held_slab[:, 0, :, : self.filled] for layer in self.layers])

    def load(self, packed: Array) -> None:
        """Replaces the contents by [layers, 2, heads, n, head_dim], as from `export`."""
        positions = packed.shape[3] if len(packed.shape) == 5 else 0
        if tuple(packed.shape) != self.shape.filled(positions) or positions > self.shape.max_length:
            raise ValueError(f"a KV cache of shape {tuple(packed.shape)} does not fit {self.shape}")
        self.truncate(positions)
        for layer, held in zip(self.layers, packed, strict=True):
            layer.held_slab[:, 0, :, :positions] = held
            layer.filled = positions
        self.missing[:] = False
        self.saved[:] = 0

    def truncate(self, positions: int) -> None:
        """Forgets all beyond `positions`, also in layers that a failed pass left ahead of the others."""
        self.settle()
        for layer in self.layers:
            if positions < layer.filled:
                layer.blank(positions, layer.filled)
                layer.filled = positions
        self.saved = np.minimum(self.saved, self.counts)
        self.missing &= self.counts > 0

    def clear(self) -> None:
        """Forgets everything; slabs stay."""
        self.truncate(0)
        self._offloaded = None

    def release(self) -> None:
        """Gives all slabs back to the pool."""
        self.settle()
        for layer in self.layers:
            layer.drop()
            layer.filled = 0
        self.missing[:], self._known_whole = False, False
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
        streams.take_out(packed, self._host[: packed.nbytes])
        for layer in self.layers:
            layer.blank(0, self.filled)
        self._offloaded = tuple(packed.shape)
        return packed.nbytes

    def restore(self) -> int:
        """Brings back what `offload` moved; the current stream waits for it, the host does not. Gives the bytes that cross PCIe."""
        streams = self.pool.streams
        if self._offloaded is None or streams is None:
            return 0
        assert self._host is not None
        nbytes = math.prod(self._offloaded) * self.pool.dtype.itemsize
        packed = streams.bring(self._host[:nbytes], self.pool.dtype, self._offloaded)
        self.arrives(0, streams.arrived())
        self.settle()
        self.load(packed)
        self._offloaded = None
        return nbytes
