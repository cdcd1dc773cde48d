"""KV blocks by content, in a KV host: the beginnings of prompts, which any session with the same salt may fetch."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from semgap.kv.prefix_names import layout_of_blocks
from semgap.kv.room import Key, Room
from semgap.tensors import TensorClass
from semgap.wire.link import Refused
from semgap.wire.messages import FindPrefix, KVLayout, PutPrefixBlock, TensorHeader

PREFIX_BLOCK_BYTES = 2048
LAYER_BYTES = 640
"""What the books of a block, and of each of its layers, take in memory, rounded up."""

_START = 0  # the number before the first block of a prefix


@dataclass(frozen=True)
class PrefixBlock:
    """The contents of 64 positions in all layers, computed from `tokens` (u32) after the block number `before`."""

    number: int
    before: int
    layout: KVLayout
    tokens: bytes
    heads: tuple[TensorHeader, ...]
    payloads: tuple[memoryview, ...]

    @property
    def payload_bytes(self) -> int:
        return sum(payload.nbytes for payload in self.payloads)


@dataclass(frozen=True)
class Held:
    """Leading blocks of a request's chain. The store drops none of them until they are given back."""

    keys: tuple[Key, ...] = ()
    blocks: tuple[PrefixBlock, ...] = ()


NOTHING = Held()


class PrefixStore:
    """Blocks by (space, name), in the room of a KV host. Safe for several threads.

    A block has a number that is used once, and names the number of the block before it: so comparing its own tokens compares all tokens
    up to its end. Two texts of one name stay apart, the first one is kept. A block is used together with all before it, last ones first,
    so that a prefix outlives its ends.
    """

    def __init__(self, room: Room) -> None:
        self.room = room
        self._blocks: dict[Key, PrefixBlock] = {}
        self._numbers = count(_START + 1)

    def put(self, request: PutPrefixBlock, tokens: np.ndarray, payloads: Sequence[memoryview]) -> bool:
        """Keeps the last block of a chain, of which `tokens` (n,) are all. True if it can be found now.

        Refused: gone (a block before it is not kept), layout, place, budget; then it keeps nothing.
        """
        layout = _checked(request, tokens)
        _check_layers(layout, request.tensors[1:])
        with self.room.lock:
            keys, before = self._walk(request, layout, tokens)
            if len(keys) >= len(request.chain) - 1:
                keys, before = keys[: len(request.chain) - 1], before[: len(request.chain) - 1]
            else:
                raise Refused("gone", f"block {len(keys)} of the prefix is not kept here (any more)")
            key = (request.space, request.chain[-1])
            parent, own = before[-1].number if before else _START, _id_bytes(tokens, layout.block, len(keys))
            there = self._blocks.get(key)
            if there is not None:
                self._use((*keys, key))
                return _is(there, parent, layout, own)
            nbytes = PREFIX_BLOCK_BYTES + sum(LAYER_BYTES + payload.nbytes for payload in payloads)
            self.room.hold(keys)
            try:
                self.room.require(nbytes)
                self._blocks[key] = PrefixBlock(next(self._numbers), parent, layout, own, request.tensors[1:], tuple(payloads))
                self.room.keep(key, nbytes, self._drop)
                self.room.make()
            finally:
                self.room.let_go(keys)
            self._use((*keys, key))
            return True

    def find(self, request: FindPrefix, tokens: np.ndarray) -> Held:
        """The leading blocks of a chain that were computed from these tokens, held for the caller. Refused: layout, place."""
        layout = _checked(request, tokens)
        with self.room.lock:
            keys, blocks = self._walk(request, layout, tokens)
            self._use(keys)
            self.room.hold(keys)
            return Held(keys, blocks)

    def give_back(self, held: Held) -> None:
        """Ends a hold."""
        with self.room.lock:
            self.room.let_go(held.keys)

    def _walk(
        self, request: FindPrefix | PutPrefixBlock, layout: KVLayout, tokens: np.ndarray
    ) -> tuple[tuple[Key, ...], tuple[PrefixBlock, ...]]:
        keys: list[Key] = []
        blocks: list[PrefixBlock] = []
        for index, name in enumerate(request.chain):
            block = self._blocks.get((request.space, name))
            parent = blocks[-1].number if blocks else _START
            if block is None or not _is(block, parent, layout, _id_bytes(tokens, layout.block, index)):
                break
            keys.append((request.space, name))
            blocks.append(block)
        return tuple(keys), tuple(blocks)

    def _use(self, keys: Sequence[Key]) -> None:
        self.room.use(reversed(keys))

    def _drop(self, key: Key) -> None:
        del self._blocks[key]
        self.room.forget(key)


def _is(block: PrefixBlock, parent: int, layout: KVLayout, tokens: bytes) -> bool:
    """True if a block is that of `tokens` after the block `parent`: names may collide, contents are compared."""
    return (block.before, block.layout, block.tokens) == (parent, layout, tokens)


def _id_bytes(tokens: np.ndarray, block: int, index: int) -> bytes:
    return tokens[index * block : (index + 1) * block].tobytes()


def _checked(request: FindPrefix | PutPrefixBlock, tokens: np.ndarray) -> KVLayout:
    """The layout of the request's blocks. Refused without one, or if the tokens are not those of its chain."""
    if request.layout is None:
        raise Refused("layout", "a prefix is put and found with the layout of its blocks")
    layout = layout_of_blocks(request.layout)
    if tokens.dtype != np.uint32 or tokens.shape != (len(request.chain) * layout.block,):
        what = f"{tokens.dtype} {tokens.shape} tokens came for {len(request.chain)} blocks of {layout.block}"
        raise Refused("place", f"{what}; send the ids of whole blocks as u32")
    return layout


def _check_layers(layout: KVLayout, heads: Sequence[TensorHeader]) -> None:
    shape = (1, 2, layout.heads, layout.block, layout.head_dim)
    if len(heads) != layout.layers:
        raise Refused("place", f"{len(heads)} layers came of a block of {layout.layers}")
    for head in heads:
        if head.cls is not TensorClass.KV or head.dtype is not layout.dtype or head.shape != shape:
            raise Refused("layout", f"a layer of {head.dtype.name} {head.shape} came; the block's are {layout.dtype.name} {shape}")
