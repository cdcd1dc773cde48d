"""The blocks of a KV host by handle and place: opened, put and fetched by the one writer that each handle has at a time."""

import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from semgap.kv.room import Key, Room
from semgap.tensors import TensorClass
from semgap.wire import messages
from semgap.wire.link import Refused
from semgap.wire.messages import TensorHeader

_MAX_POSITIONS = 1 << 28  # of all layers of a handle
BLOCK_BYTES = 1280
HANDLE_BYTES = 2048
"""What the books of a block, and of a handle, take in memory, rounded up (measured with CPython 3.11: 1,120 and 420 to 1,400 bytes)."""

_MOST_CLAIMED_EPOCH = 1 << 32  # after a restart of this host, by a writer whose handle is new here; each take-over adds 1
_MAX_BLOCKS = 1 << 20  # of all layers of a handle: an answer to an open holds a number for each, stored or not


@dataclass(frozen=True)
class Block:
    head: TensorHeader
    payload: memoryview
    version: int
    text: int


class News:
    """Can be read once a handle has changed, until `clear`."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return self._fd

    def tell(self) -> None:
        os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)

    def close(self) -> None:
        os.close(self._fd)


@dataclass
class _Handle:
    layout: messages.KVLayout
    epoch: int = 1
    version: int = field(default_factory=lambda: secrets.randbits(31))  # random: a restarted host repeats no version
    blocks: dict[tuple[int, int], Block] = field(default_factory=dict)
    ends_with: object = None  # the connection of its writer, if it is dropped with that

    @property
    def shape(self) -> tuple[int, int]:
        return self.layout.layers, -(-self.layout.max_length // self.layout.block)


_ITSELF = (-1, -1)  # the place of a handle's own entry among those of its blocks


class BlockStore:
    """Blocks by handle and place, within a budget in bytes; drops the least recently used. Safe for several threads.

    A block counts with its payload and BLOCK_BYTES, a handle with HANDLE_BYTES. A handle goes after the last of its blocks.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.room = Room(budget_bytes)
        self._handles: dict[bytes, _Handle] = {}
        self._watchers: list[tuple[bytes, News]] = []
        self._drop_entry = self._drop_of  # one object, not one a block

    @property
    def budget_bytes(self) -> int:
        return self.room.budget_bytes

    @property
    def used_bytes(self) -> int:
        return self.room.used_bytes

    def open(self, request: messages.OpenKV, opener: object = None) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        """The writer's epoch, and [layers, blocks] of versions, positions and texts. Refused: unknown, fenced, layout."""
        layout, kv_id = request.layout, request.kv_id
        if layout is None or layout.layers * layout.max_length > _MAX_POSITIONS:
            raise Refused("layout", f"a handle must be opened with the layout of its blocks, up to {_MAX_POSITIONS} layers x positions")
        if layout.layers * -(-layout.max_length // layout.block) > _MAX_BLOCKS:
            raise Refused("layout", f"a handle has more than {_MAX_BLOCKS} layers x blocks; use larger blocks")
        with self.room.lock:
            handle = self._handles.get(kv_id)
            if handle is None:
                if not request.new:
                    raise _unknown(kv_id)
                handle = self._new_handle(request, layout)
            else:
                if 0 < request.epoch < handle.epoch:
                    raise _fenced(kv_id, handle, request.epoch)
                _check_layout(handle, layout)
                _check_claim(request, handle.epoch)
                # A higher epoch was granted before a restart of this host, to which a stale writer came back first.
                handle.epoch = request.epoch or handle.epoch + 1
            handle.ends_with = opener if request.bound else None
            versions, positions, texts = (np.zeros(handle.shape, dtype) for dtype in (np.uint32, np.uint32, np.int64))
            for place, block in handle.blocks.items():
                versions[place], positions[place], texts[place] = block.version, block.head.shape[3], block.text
            self._use(kv_id, handle.blocks)  # or the opener's next blocks would push them out first
            return handle.epoch, versions, positions, texts

    def put(self, request: messages.PutKVBlocks, payloads: Sequence[memoryview]) -> int:
        """Stores blocks and gives their new version. Refused: unknown, fenced, place, layout, budget; then it stores nothing."""
        with self.room.lock:
            handle = self._checked(request.kv_id, request.epoch)
            _check_places(handle, request)
            self.room.require(HANDLE_BYTES + sum(BLOCK_BYTES + payload.nbytes for payload in payloads))
            handle.version += 1
            texts = request.texts or (0,) * len(payloads)
            for place, head, payload, text in zip(request.places, request.tensors, payloads, texts, strict=True):
                self._forget(request.kv_id, place)
                handle.blocks[place] = Block(head, payload, handle.version, text)
                self.room.keep((request.kv_id, *place), BLOCK_BYTES + payload.nbytes, self._drop_entry)
            self._use(request.kv_id)
            self.room.make()
            self._tell(request.kv_id)
            return handle.version

    def fetch(self, request: messages.FetchMissing, mask: np.ndarray) -> list[tuple[int, tuple[int, ...], list[Block]]]:
        """(layer, block indices, blocks) for each layer of the mask, in order. Refused: unknown, fenced, mask, gone."""
        with self.room.lock:
            handle = self._checked(request.kv_id, request.epoch)
            if mask.shape != handle.shape:
                raise Refused("mask", f"a mask of shape {mask.shape} came for a handle of {handle.shape} (layers, blocks)")
            layers = []
            for layer in np.flatnonzero(mask.any(axis=1)).tolist():
                places = [(layer, block) for block in np.flatnonzero(mask[layer]).tolist()]
                gone = [place for place in places if place not in handle.blocks]
                if gone:
                    raise Refused("gone", f"block {gone[0][1]} of layer {gone[0][0]} is not kept here (any more)")
                self._use(request.kv_id, places)
                layers.append((layer, tuple(block for _, block in places), [handle.blocks[place] for place in places]))
            if not layers:
                raise Refused("mask", "the mask selects no block")
            return layers

    @contextlib.contextmanager
    def watched(self, kv_id: bytes) -> Iterator[News]:
        """What tells of each put to a handle, and of its end."""
        news = News()
        with self.room.lock:
            self._watchers.append((kv_id, news))
        try:
            yield news
        finally:
            with self.room.lock:
                self._watchers.remove((kv_id, news))
            news.close()

    def layer_of(self, kv_id: bytes, layout: messages.KVLayout, positions: int, layer: int) -> list[Block] | None:
        """A layer's blocks, once all of a handle's first `positions` are here; None before. Refused: unknown, layout, place."""
        with self.room.lock:
            handle = self._handles.get(kv_id)
            if handle is None:
                raise _unknown(kv_id)
            _check_layout(handle, layout)
            if positions > layout.max_length:
                raise Refused("place", f"{positions} positions are more than the handle's {layout.max_length}")
            blocks: list[Block] = []
            for begin in range(0, positions, layout.block):
                block = handle.blocks.get((layer, len(blocks)))
                if block is None or block.head.shape[3] < min(layout.block, positions - begin):
                    return None
                blocks.append(block)
            self._use(kv_id, [(layer, index) for index in range(len(blocks))])
            return blocks

    def drop(self, request: messages.DropKV) -> None:
        """Drops a handle. Refused: unknown, fenced."""
        with self.room.lock:
            self._checked(request.kv_id, request.epoch)
            self._forget_all(request.kv_id)

    def end(self, opener: object) -> None:
        """Drops the handles whose last opening was by `opener`, and bound."""
        with self.room.lock:
            for kv_id in [kv_id for kv_id, handle in self._handles.items() if handle.ends_with is opener]:
                self._forget_all(kv_id)

    def _new_handle(self, request: messages.OpenKV, layout: messages.KVLayout) -> _Handle:
        self.room.require(HANDLE_BYTES)
        _check_claim(request, 0)
        handle = self._handles[request.kv_id] = _Handle(layout, max(1, request.epoch))
        self.room.keep((request.kv_id, *_ITSELF), HANDLE_BYTES, self._drop_entry)
        self.room.make()
        return handle

    def _checked(self, kv_id: bytes, epoch: int) -> _Handle:
        handle = self._handles.get(kv_id)
        if handle is None or epoch > handle.epoch:  # a handle that was dropped, and that its worker of before opened again
            raise _unknown(kv_id)
        if handle.epoch != epoch:
            raise _fenced(kv_id, handle, epoch)
        return handle

    def _use(self, kv_id: bytes, places: Iterable[tuple[int, int]] = ()) -> None:
        """Moves blocks to the end of the order, and behind them their handle."""
        self.room.use((kv_id, *place) for place in (*places, _ITSELF))

    def _drop_of(self, key: Key) -> None:
        kv_id, *place = key
        if tuple(place) == _ITSELF:  # all its blocks came before it
            self._forget_handle(kv_id)
        else:
            self._forget(kv_id, (place[0], place[1]))

    def _forget(self, kv_id: bytes, place: tuple[int, int]) -> None:
        if self._handles[kv_id].blocks.pop(place, None) is not None:
            self.room.forget((kv_id, *place))

    def _forget_all(self, kv_id: bytes) -> None:
        for place in list(self._handles[kv_id].blocks):
            self._forget(kv_id, place)
        self._forget_handle(kv_id)

    def _forget_handle(self, kv_id: bytes) -> None:
        del self._handles[kv_id]
        self.room.forget((kv_id, *_ITSELF))
        self._tell(kv_id)

    def _tell(self, kv_id: bytes) -> None:
        for watched, news in self._watchers:
            if watched == kv_id:
                news.tell()


def _unknown(kv_id: bytes) -> Refused:
    return Refused("unknown", f"handle {kv_id.hex()} is not kept here; it was dropped, or never saved")


def _fenced(kv_id: bytes, handle: _Handle, epoch: int) -> Refused:
    return Refused("fenced", f"handle {kv_id.hex()} belongs to another worker now (epoch {handle.epoch}, this one's is {epoch})")


def _check_claim(request: messages.OpenKV, known: int) -> None:
    """Refused for an epoch that no host can have granted: a higher one would leave no room for those to come."""
    if request.epoch > max(known, _MOST_CLAIMED_EPOCH):
        raise Refused("fenced", f"epoch {request.epoch} of handle {request.kv_id.hex()} was never granted; open it with epoch 0")


def _check_layout(handle: _Handle, layout: messages.KVLayout) -> None:
    if handle.layout != layout:
        ours, theirs = _described(handle.layout), _described(layout)
        raise Refused("layout", f"the handle's blocks are {ours}, the request's {theirs}; use the same model, dtype and lossy codec")


def _check_places(handle: _Handle, request: messages.PutKVBlocks) -> None:
    layers, blocks = handle.shape
    if not request.places or len(request.places) != len(request.tensors):
        raise Refused("place", f"{len(request.tensors)} blocks came for {len(request.places)} places")
    if request.texts and len(request.texts) != len(request.places):
        raise Refused("place", f"{len(request.texts)} digests of texts came for {len(request.places)} places")
    layout = handle.layout
    for (layer, block), head in zip(request.places, request.tensors, strict=True):
        positions = head.shape[3] if len(head.shape) == 5 else 0
        shape = (1, 2, layout.heads, positions, layout.head_dim)
        if layer >= layers or block >= blocks or not 0 < positions <= layout.block:
            where = f"block {block} of layer {layer} with {positions} positions"
            raise Refused("place", f"{where} does not fit a cache of {(layers, blocks)} (layers, blocks) of {layout.block} positions")
        if head.cls is not TensorClass.KV or head.dtype is not layout.dtype or head.shape != shape:
            raise Refused("layout", f"a block of {head.dtype.name} {head.shape} came; the handle's are {_described(layout)}")


def _described(layout: messages.KVLayout) -> str:
    sizes = f"{layout.layers} layers, {layout.heads} heads of {layout.head_dim}, {layout.max_length} positions in blocks of {layout.block}"
    return f"{layout.dtype.name} of model {layout.model[:12]} ({sizes})"
