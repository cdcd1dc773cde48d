"""KV blocks by content, in a KV host: the beginnings of prompts, which any session with the same salt may fetch."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from semgap.kv.prefix_names import MOST_BLOCKS, layout_of_blocks
from semgap.kv.room import Key, Room
from semgap.tensors import TensorClass
from semgap.wire.link import Refused
from semgap.wire.messages import FindPrefix, KVLayout, PutPrefixBlock, TensorHeader

PREFIX_BLOCK_BYTES = 2048
LAYER_BYTES = 640
"""Memory that the books of a block, and of each of its layers, take, rounded up."""

_START = 0  # the number before the first block of a prefix


@dataclass(frozen=True)
class PrefixBlock:
    """The contents of 64 positions in all layers, computed from `tokens` (u32) after the block number `before`, which lies at `parent`.

    `depth` counts the blocks up to this one.
    """

    number: int
    depth: int
    before: int
    parent: Key | None
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
        self._keys: dict[int, Key] = {}
        self._numbers = count(_START + 1)
        self._drop_entry = self._drop_of  # one object, not one a block

    def put(self, request: PutPrefixBlock, tokens: np.ndarray, payloads: Sequence[memoryview]) -> int:
        """Keeps a block of `tokens` (64,) and gives its number, or that of the equal one that is there; 0 if its name is another text's.

        Refused: gone (the block before it is not kept), layout, place (also beyond MOST_BLOCKS), budget; then it keeps nothing.
        """
        layout = _checked(request.layout, tokens, 1)
        _check_layers(layout, request.tensors[1:])
        key, own = (request.space, request.name), tokens.tobytes()
        with self.room.lock:
            parent = self._keys.get(request.before)
            if request.before and (parent is None or parent[0] != request.space):
                raise Refused("gone", f"block {request.before}, before the one that came, is not kept here (any more)")
            depth = 1 + (self._blocks[parent].depth if parent else 0)
            if depth > MOST_BLOCKS:
                raise Refused("place", f"a prefix has {MOST_BLOCKS} blocks at most, this one is number {depth}")
            there, line = self._blocks.get(key), self._line(parent)
            if there is not None:
                if not _is(there, request.before, layout, own):
                    return _START
                self._use((*line, key))
                return there.number
            nbytes = PREFIX_BLOCK_BYTES + sum(LAYER_BYTES + payload.nbytes for payload in payloads)
            self.room.hold(line)
            try:
                self.room.require(nbytes)
                number = next(self._numbers)
                self._blocks[key] = PrefixBlock(number, depth, request.before, parent, layout, own, request.tensors[1:], tuple(payloads))
                self._keys[number] = key
                self.room.keep(key, nbytes, self._drop_entry)
                self.room.make()
            finally:
                self.room.let_go(line)
            self._use((*line, key))
            return number

    def find(self, request: FindPrefix, tokens: np.ndarray) -> Held:
        """The leading blocks of a chain that were computed from these tokens, held for the caller. Refused: layout, place."""
        layout = _checked(request.layout, tokens, len(request.chain))
        with self.room.lock:
            keys, blocks = self._walk(request, layout, tokens)
            self._use(keys)
            self.room.hold(keys)
            return Held(keys, blocks)

    def give_back(self, held: Held) -> None:
        """Ends a hold."""
        with self.room.lock:
            self.room.let_go(held.keys)

    def _line(self, key: Key | None) -> tuple[Key, ...]:
        """The keys of all blocks up to the one at `key`, from the first on."""
        line = []
        while key is not None:
            line.append(key)
            key = self._blocks[key].parent
        return tuple(reversed(line))

    def _walk(self, request: FindPrefix, layout: KVLayout, tokens: np.ndarray) -> tuple[tuple[Key, ...], tuple[PrefixBlock, ...]]:
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

    def _drop_of(self, key: Key) -> None:
        del self._keys[self._blocks.pop(key).number]
        self.room.forget(key)


def _is(block: PrefixBlock, parent: int, layout: KVLayout, tokens: bytes) -> bool:
    """True if a block is that of `tokens` after the block `parent`: names may collide, contents are compared."""
    return (block.before, block.layout, block.tokens) == (parent, layout, tokens)


def _id_bytes(tokens: np.ndarray, block: int, index: int) -> bytes:
    return tokens[index * block : (index + 1) * block].tobytes()


def _checked(given: KVLayout | None, tokens: np.ndarray, blocks: int) -> KVLayout:
    """The layout of a request's blocks. Refused without one, or if the tokens are not those of so many blocks."""
    if given is None:
        raise Refused("layout", "a prefix is put and found with the layout of its blocks")
    layout = layout_of_blocks(given)
    if tokens.dtype != np.uint32 or tokens.shape != (blocks * layout.block,):
        what = f"{tokens.dtype} {tokens.shape} tokens came for {blocks} blocks of {layout.block}"
        raise Refused("place", f"{what}; send the ids of whole blocks as u32")
    return layout


def _check_layers(layout: KVLayout, heads: Sequence[TensorHeader]) -> None:
    shape = (1, 2, layout.heads, layout.block, layout.head_dim)
    if len(heads) != layout.layers:
        raise Refused("place", f"{len(heads)} layers came of a block of {layout.layers}")
    for head in heads:
        if head.cls is not TensorClass.KV or head.dtype is not layout.dtype or head.shape != shape:
            raise Refused("layout", f"a layer of {head.dtype.name} {head.shape} came; the block's are {layout.dtype.name} {shape}")
