"""The holders of a pool's KV blocks, by number. block_pool.py has their memory, the scheduler a table of blocks for each request."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import count

import numpy as np

from semgap.kv.pool import BLOCK

PrefixKey = tuple[int, tuple[int, ...]]

_START = 0  # the name before the first block of a prefix


class BlockTables:
    """Counts the holders of each block, and finds full blocks by their tokens.

    A sealed block is full and is never written again, so it may have many holders. Each sealed block has a name that is used once. Its key
    is the name of the block before it and its own tokens, so a key stands for a whole prefix. The index compares keys, not only their
    hashes: two prefixes with one hash stay apart. A sealed block without holders stays findable until its memory is needed; the least
    recently freed one goes first. `on_reuse` is called with each block that is taken again: its old contents are still in memory.
    """

    def __init__(self, blocks: int, positions: int = BLOCK, on_reuse: Callable[[int], None] | None = None) -> None:
        self.blocks, self.positions = blocks, positions
        self.shared = 0  # blocks with two holders or more
        self._on_reuse = on_reuse
        self._holders = [0] * blocks
        self._names = [_START] * blocks
        self._keys: list[PrefixKey | None] = [None] * blocks
        self._was_used = [False] * blocks
        self._index: dict[PrefixKey, int] = {}
        self._free = OrderedDict.fromkeys(range(blocks))  # in the order in which they are taken
        self._next_name = count(_START + 1)

    @property
    def free(self) -> int:
        """Blocks without a holder, findable ones included."""
        return len(self._free)

    @property
    def held(self) -> int:
        """Blocks with a holder. A shared block counts once."""
        return self.blocks - len(self._free)

    def holders(self, block: int) -> int:
        """How many tables hold `block`."""
        return self._holders[block]

    def blocks_of(self, positions: int) -> int:
        """Blocks that hold so many positions."""
        return -(-positions // self.positions)

    def take(self) -> int | None:
        """A block with one holder, for writing; None if all blocks are held."""
        if not self._free:
            return None
        block, _ = self._free.popitem(last=False)
        key = self._keys[block]
        if key is not None:
            del self._index[key]
            self._keys[block], self._names[block] = None, _START
        if self._was_used[block] and self._on_reuse is not None:
            self._on_reuse(block)
        self._was_used[block] = True
        self._holders[block] = 1
        return block

    def key(self, before: Sequence[int], tokens: np.ndarray) -> PrefixKey:
        """The key of a block of `tokens` (positions,) after the sealed blocks `before` of one table."""
        return (self._names[before[-1]] if before else _START, tuple(tokens.tolist()))

    def adopt(self, key: PrefixKey) -> int | None:
        """The sealed block with this key, with one holder more; None if there is none."""
        block = self._index.get(key)
        if block is None:
            return None
        holders = self._holders[block]
        if not holders:
            del self._free[block]
        self.shared += holders == 1
        self._holders[block] = holders + 1
        return block

    def seal(self, block: int, key: PrefixKey) -> int:
        """Makes a full block findable. If an equal one is there already, its number, held in place of `block`; else `block`."""
        assert self._holders[block] == 1 and self._keys[block] is None, f"block {block} has other holders or is sealed"
        twin = self.adopt(key)
        if twin is not None:
            self.give_back([block])
            return twin
        self._index[key], self._keys[block], self._names[block] = block, key, next(self._next_name)
        return block

    def give_back(self, table: Sequence[int]) -> None:
        """One holder less for each block of a request's `table`. Its last blocks are forgotten first: a prefix outlives its ends."""
        for block in reversed(table):
            holders = self._holders[block] - 1
            assert holders >= 0, f"block {block} has no holder"
            self._holders[block] = holders
            self.shared -= holders == 1
            if not holders:
                self._free[block] = None
                if self._keys[block] is None:
                    self._free.move_to_end(block, last=False)
