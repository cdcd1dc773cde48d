"""The shadow: where KV blocks lie while the device does not hold them.

A shadow saves blocks of a cache and puts them back, and counts what that moves. It knows handles by their `kv_id` alone.
"""

from __future__ import annotations

import contextlib
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash

from semgap import codecs, wire
from semgap.books import close_books
from semgap.bridge import from_wire, to_wire
from semgap.codecs import Encoded
from semgap.kv.blocks import BLOCK, KVCache
from semgap.ledger import Direction, Ledger, LedgerError, LinkKind
from semgap.link import Link, RemoteError
from semgap.tensors import DType, Tensor, TensorClass, nbytes_of
from semgap.wire import Flag, FrameError, Kind, Operation, WireError

_PUT_FRAME_BYTES = 8 << 20
_PUT_FRAME_BLOCKS = 512  # their places must fit a header
_PROBE_BYTES = 4 << 20


class ShadowError(ValueError):
    """Blocks that could not be saved or brought back. `code` says why: gone, fenced, layout, budget, unknown, or the wire's own."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Moved:
    """Blocks that went to a shadow, and their bytes before and after the codec."""

    blocks: int = 0
    tensor_bytes: int = 0
    payload_bytes: int = 0

    def __add__(self, other: Moved) -> Moved:
        return Moved(self.blocks + other.blocks, self.tensor_bytes + other.tensor_bytes, self.payload_bytes + other.payload_bytes)


class Shadow(ABC):
    """Where a session's KV blocks lie while they are not on its device. One thread at a time."""

    @abstractmethod
    def save(self, kv_id: bytes, cache: KVCache, blocks: np.ndarray, codec: str, tokens: np.ndarray) -> Moved:
        """Takes a copy of resident blocks, true in [layers, blocks], of a cache of `tokens`. `cache.saved` tells which are, also after a
        ShadowError.
        """

    @abstractmethod
    def fetch(self, kv_id: bytes, cache: KVCache, blocks: np.ndarray) -> Iterator[int]:
        """Asks at once for saved blocks, true in [layers, blocks]; gives each layer's index when its blocks are in their slab, in order.

        ShadowError where one cannot be had, also midway; what has not been given then holds anything.
        """

    @abstractmethod
    def forget(self, kv_id: bytes) -> None:
        """The handle is gone for good."""

    @abstractmethod
    def probe(self) -> tuple[float, float]:
        """Measures (round trip in s, bytes/s) of bringing raw blocks back."""

    @abstractmethod
    def abort(self) -> None:
        """Ends a fetch that another thread is consuming: it raises ShadowError there, or comes to its end."""

    @abstractmethod
    def reach(self) -> None:
        """ShadowError where the shadow cannot be had, before anything depends on it."""

    @abstractmethod
    def books(self) -> dict[str, Any] | None:
        """The books of the link to a KV host, `agreed` where they are reconciled, else with the reason; None where there is none."""

    @property
    @abstractmethod
    def network_bytes(self) -> tuple[int, int]:
        """Frame bytes so far, both directions, of (saving to, fetching from) a KV host."""

    @abstractmethod
    def close(self) -> None:
        """The session is over."""


class WorkerShadow(Shadow):
    """In the worker's own host memory, pinned where the device is a GPU. Moves are counted as PCIe, or as memory on a CPU."""

    def __init__(self, ledger: Ledger, device: torch.device) -> None:
        self._ledger = ledger
        self._pinned = device.type == "cuda"
        self._link = LinkKind.PCIE if self._pinned else LinkKind.MEMORY
        self._held: dict[bytes, dict[tuple[int, int], Encoded]] = {}

    def save(self, kv_id: bytes, cache: KVCache, blocks: np.ndarray, codec: str, tokens: np.ndarray) -> Moved:
        held = self._held.setdefault(kv_id, {})
        moved = Moved()
        for layer, block in np.argwhere(blocks).tolist():
            copied = _to_host(cache.block(layer, block), self._pinned)
            encoded = codecs.encode(copied, codec)
            held[layer, block] = encoded
            moved += self._count(Direction.DOWN, Operation.PUT_KV_BLOCKS, encoded)
        cache.saved[blocks] = np.broadcast_to(cache.counts, blocks.shape)[blocks]
        return moved

    def fetch(self, kv_id: bytes, cache: KVCache, blocks: np.ndarray) -> Iterator[int]:
        held = self._held.get(kv_id, {})
        for layer in np.flatnonzero(blocks.any(axis=1)).tolist():
            wanted = np.flatnonzero(blocks[layer])
            for block in wanted.tolist():
                encoded = held.get((layer, block))
                if encoded is None:
                    raise ShadowError("gone", f"block {block} of layer {layer} is not in the worker's shadow")
                cache.place(layer, block, from_wire(_decoded(encoded, self._ledger, self._link), cache.pool.device))
                self._count(Direction.UP, Operation.FETCH_MISSING_KV_LAYERS, encoded)
            cache.here(layer, wanted)
            yield layer

    def forget(self, kv_id: bytes) -> None:
        self._held.pop(kv_id, None)

    def probe(self) -> tuple[float, float]:
        source = torch.zeros(_PROBE_BYTES // 4, pin_memory=self._pinned)
        target = torch.empty(_PROBE_BYTES // 4, device="cuda" if self._pinned else "cpu")
        target.copy_(source)
        begin = time.perf_counter()
        target.copy_(source)
        if self._pinned:
            torch.cuda.synchronize()
        return 0.0, _PROBE_BYTES / (time.perf_counter() - begin)

    def abort(self) -> None:
        pass

    def reach(self) -> None:
        pass

    def books(self) -> None:
        return None

    @property
    def network_bytes(self) -> tuple[int, int]:
        return 0, 0

    def close(self) -> None:
        self._held.clear()

    def _count(self, direction: Direction, operation: Operation, encoded: Encoded) -> Moved:
        """Counts a copy. A GPU's blocks cross PCIe as they are, since the codecs run on the host."""
        raw = nbytes_of(encoded.dtype, encoded.shape)
        crossed = raw if self._pinned else encoded.nbytes
        self._ledger.count_copy(direction, operation, Kind.DELTA, TensorClass.KV, raw, payload_bytes=crossed, link=self._link)
        if direction is Direction.DOWN:
            took = encoded.encode_ns
            self._ledger.count_codec(direction, operation, Kind.DELTA, TensorClass.KV, encode_ns=took, link=self._link)
        return Moved(1, raw, crossed)


@dataclass
class _Opened:
    """What this side knows of a handle at the KV host: the epoch that it writes under, and the versions of what it has saved."""

    epoch: int
    versions: np.ndarray


@dataclass
class KVHostShadow(Shadow):
    """In a KV host, a process of its own behind the same wire. `connect` gives an authenticated link to it, or raises WireError.

    A link that breaks is given up; the next use makes a new one. Its books are then lost, and `books` says so.
    """

    connect: Callable[[], Link]
    layout: wire.KVLayout
    broken_links: int = 0
    _link: Link | None = None
    _handles: dict[bytes, _Opened] = field(default_factory=dict)
    _on_link: set[bytes] = field(default_factory=set)

    def save(self, kv_id: bytes, cache: KVCache, blocks: np.ndarray, codec: str, tokens: np.ndarray) -> Moved:
        opened = self._open(kv_id, cache)
        texts = texts_of(tokens, [cache.bounds(block)[1] for block in range(cache.shape.blocks)])
        moved = Moved()
        for places in _batches(np.argwhere(blocks).tolist(), cache):
            encoded = [_encoded_block(cache, layer, block, codec) for layer, block in places]
            named = tuple((layer, block) for layer, block in places)
            header = wire.PutKVBlocks((), kv_id, opened.epoch, named, tuple(texts[cache.bounds(block)[1]] for _, block in places))
            put = self._ask(Operation.PUT_KV_BLOCKS, header, encoded, Kind.DELTA).header
            assert isinstance(put, wire.KVPut)
            for (layer, block), tensor in zip(places, encoded, strict=True):
                opened.versions[layer, block] = put.version
                cache.saved[layer, block] = cache.counts[block]
                moved += Moved(1, nbytes_of(tensor.dtype, tensor.shape), tensor.nbytes)
        return moved

    def fetch(self, kv_id: bytes, cache: KVCache, blocks: np.ndarray) -> Iterator[int]:
        opened = self._open(kv_id, cache)
        mask = Tensor.from_numpy(blocks.astype(np.uint8), TensorClass.CONTROL)
        header = wire.FetchMissing((), kv_id, opened.epoch)
        try:
            link = self._linked()
            sequence = link.post(Operation.FETCH_MISSING_KV_LAYERS, header, [codecs.encode(mask, "raw")], Kind.DELTA)
        except WireError as error:
            raise self._given_up(error) from error
        link.ledger.count_round_trip(link.sending, Operation.FETCH_MISSING_KV_LAYERS, Kind.DELTA)
        return self._arrivals(link, sequence, cache, blocks)

    def _arrivals(self, link: Link, sequence: int, cache: KVCache, blocks: np.ndarray) -> Iterator[int]:
        layers = np.flatnonzero(blocks.any(axis=1)).tolist()
        for layer in layers:
            wanted = np.flatnonzero(blocks[layer])

            def place(_: Operation, header: wire.Header, layer: int = layer, wanted: np.ndarray = wanted) -> list[wire.Memory | None]:
                return _memory_for(header, cache, layer, wanted)

            try:
                frame = link.receive_stream(Operation.FETCH_MISSING_KV_LAYERS, sequence, place)
                if bool(frame.flags & Flag.LAST) != (layer == layers[-1]):
                    raise FrameError("sequence", f"the stream of KV blocks ended at layer {layer}, expected layers {layers}")
                for index, (tensor, block) in enumerate(zip(frame.header.tensors, wanted.tolist(), strict=True)):
                    if tensor.nbytes and not frame.payloads[index]:
                        continue  # it lies in its slab
                    cache.place(layer, block, from_wire(link.decode(frame, index), cache.pool.device))
            except WireError as error:
                raise self._given_up(error) from error
            cache.here(layer, wanted)
            yield layer

    def forget(self, kv_id: bytes) -> None:
        opened = self._handles.pop(kv_id, None)
        if opened is None or self._link is None:
            return
        try:
            self._ask(Operation.DROP_KV, wire.DropKV((), kv_id, opened.epoch))
        except ShadowError as error:
            if error.code not in ("fenced", "unknown") and self._link is not None:
                raise

    def take_over(self, kv_id: bytes, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Becomes the writer of a handle that the KV host holds. Gives [layers, blocks]: the positions of each block there that was
        computed from `tokens`, and whether what this side saved or fetched last is still the newest. ShadowError (unknown, layout)."""
        before = self._handles.get(kv_id)
        opened, positions, texts = self._ask_to_open(wire.OpenKV((), kv_id, self.layout, 0, False))
        ends = positions + BLOCK * np.arange(positions.shape[1])
        known = texts_of(tokens, ends[(positions > 0) & (ends <= len(tokens))].tolist())
        positions[np.vectorize(lambda end: known.get(end, 0), otypes=[np.int64])(ends) != texts] = 0
        here = np.zeros(positions.shape, dtype=bool) if before is None else (before.versions == opened.versions) & (opened.versions > 0)
        self._handles[kv_id] = opened
        return positions, here

    def look_again(self, kv_id: bytes, cache: KVCache) -> None:
        """Asks what the KV host still holds of a handle, and has `cache.saved` say so. ShadowError."""
        self._on_link.discard(kv_id)
        self._open(kv_id, cache)

    def probe(self) -> tuple[float, float]:
        try:
            link = self._linked()
            link.request(Operation.PING, wire.Ping((), 64))
            begin = time.perf_counter()
            link.request(Operation.PING, wire.Ping((), 64))
            rtt_s = time.perf_counter() - begin
            link.request(Operation.PING, wire.Ping((), _PROBE_BYTES))
            begin = time.perf_counter()
            link.request(Operation.PING, wire.Ping((), _PROBE_BYTES))
            return rtt_s, _PROBE_BYTES / max(1e-9, time.perf_counter() - begin - rtt_s)
        except WireError as error:
            raise self._given_up(error) from error

    def abort(self) -> None:
        link = self._link  # of which the other thread may rid itself meanwhile
        if link is not None:  # the thread that reads from it is woken, and gives the link up
            with contextlib.suppress(OSError):
                link.sock.shutdown(socket.SHUT_RDWR)

    def reach(self) -> None:
        try:
            self._linked()
        except WireError as error:
            raise self._given_up(error) from error

    def books(self) -> dict[str, Any] | None:
        if self.broken_links:
            return {"agreed": False, "reason": f"{self.broken_links} links to the KV host broke, and their counters with them"}
        if self._link is None:
            return None
        try:
            return {"agreed": True, "reason": None} | close_books(self._link, "KV host")
        except (LedgerError, WireError) as error:
            return {"agreed": False, "reason": str(error)}

    @property
    def network_bytes(self) -> tuple[int, int]:
        if self._link is None:
            return 0, 0
        rows = [row for row in self._link.ledger.rows.values() if row.kind == "delta"]
        sums = {operation: sum(row.payload_bytes + row.header_bytes for row in rows if row.operation == operation) for operation in _MOVES}
        return sums["put_kv_blocks"], sums["fetch_missing_kv_layers"]

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    def _linked(self) -> Link:
        if self._link is None:
            self._link = self.connect()
            self._on_link.clear()
        return self._link

    def _given_up(self, error: WireError) -> ShadowError:
        """The link is of no more use; what went wrong, as a ShadowError. A request that was merely refused leaves it as it is."""
        if not (isinstance(error, RemoteError) and error.code in REFUSALS) and self._link is not None:
            self._link.close()
            self._link = None
            self.broken_links += 1
        return ShadowError(error.code, f"the KV host: {error}")

    def _ask(self, operation: Operation, header: wire.Header, tensors: list[Encoded] | None = None, kind: Kind = Kind.SETUP) -> wire.Frame:
        try:
            return self._linked().request(operation, header, tensors or [], kind)
        except WireError as error:
            raise self._given_up(error) from error

    def _open(self, kv_id: bytes, cache: KVCache) -> _Opened:
        """The handle as it stands at the KV host. One that it lost (it was started anew) is opened again, with nothing saved."""
        if self._link is not None and kv_id in self._on_link:
            return self._handles[kv_id]
        before = self._handles.get(kv_id)
        opened, _, _ = self._ask_to_open(wire.OpenKV((), kv_id, self.layout, before.epoch if before else 0, True))
        if before is not None:
            cache.saved[before.versions != opened.versions] = 0
        else:
            cache.saved[:] = 0
        self._handles[kv_id] = opened
        return opened

    def _ask_to_open(self, header: wire.OpenKV) -> tuple[_Opened, np.ndarray, np.ndarray]:
        frame = self._ask(Operation.OPEN_KV, header)
        assert isinstance(frame.header, wire.KVOpened) and self._link is not None
        versions, positions, texts = (self._link.decode(frame, index).numpy().astype(np.int64) for index in range(3))
        self._on_link.add(header.kv_id)
        return _Opened(frame.header.epoch, versions), positions, texts


REFUSALS = ("unknown", "fenced", "layout", "gone", "budget", "mask", "place", "ping")
"""What a KV host says where the connection goes on; after anything else that it says, it ends it."""
_MOVES = ("put_kv_blocks", "fetch_missing_kv_layers")


def texts_of(tokens: np.ndarray, ends: Sequence[int]) -> dict[int, int]:
    """By end: a digest above 0 of the tokens before it. Blocks hold the same keys and values only after the same tokens."""
    digest, begin, texts = xxhash.xxh3_64(), 0, {}
    for end in sorted(set(ends)):
        digest.update(np.ascontiguousarray(tokens[begin:end], dtype=np.int64))
        texts[end] = (digest.intdigest() >> 1) or 1
        begin = end
    return texts


def measure_codec(cache: KVCache, layer: int, block: int, codec: str) -> tuple[float, float]:
    """(tensor bytes over payload bytes, tensor bytes decoded in a second) of a KV codec on a resident block."""
    held = _to_host(cache.block(layer, block), pinned=False)
    encoded = codecs.encode(held, codec)
    _, took_ns = codecs.decode(encoded.codec, held.cls, held.dtype, held.shape, _payload(encoded))
    return held.data.nbytes / encoded.nbytes, held.data.nbytes / (took_ns / 1e9)


def _batches(places: list[list[int]], cache: KVCache) -> Iterator[list[list[int]]]:
    """Places of blocks, as many to a frame as fit."""
    block_bytes = cache.position_bytes * int(cache.counts.max(initial=1))
    count = max(1, min(_PUT_FRAME_BLOCKS, _PUT_FRAME_BYTES // block_bytes))
    for start in range(0, len(places), count):
        yield places[start : start + count]


def _encoded_block(cache: KVCache, layer: int, block: int, codec: str) -> Encoded:
    """A resident block as it is to cross; raw ones in host memory are gathered from their slab without a copy."""
    pieces = cache.pieces(layer, block)
    if codec == "raw" and pieces is not None:
        begin, end = cache.bounds(block)
        dtype = DType.from_torch_name(str(cache.pool.dtype))
        return Encoded(TensorClass.KV, 0, dtype, cache.shape.block(end - begin), tuple(pieces), sum([p.nbytes for p in pieces]), 0)
    return codecs.encode(_to_host(cache.block(layer, block), pinned=False), codec)


def _memory_for(header: wire.Header, cache: KVCache, layer: int, wanted: np.ndarray) -> list[wire.Memory | None]:
    """Where the blocks of a frame are to lie: raw ones that are as long as they should be, straight in their slab."""
    if not isinstance(header, wire.KVBlocks) or header.layer != layer or header.blocks != tuple(wanted.tolist()):
        raise FrameError("blocks", f"KV blocks of another place came than those of layer {layer} that were asked for")
    if len(header.tensors) != len(wanted):
        raise FrameError("blocks", f"{len(header.tensors)} tensors came for {len(wanted)} KV blocks")
    dtype = DType.from_torch_name(str(cache.pool.dtype))
    memories: list[wire.Memory | None] = []
    for tensor, block in zip(header.tensors, wanted.tolist(), strict=True):
        begin, end = cache.bounds(block)
        positions = tensor.shape[3] if len(tensor.shape) == 5 else 0
        if tensor.cls is not TensorClass.KV or tensor.dtype is not dtype or tensor.shape != cache.shape.block(positions):
            raise FrameError("blocks", f"a KV block of {tensor.dtype.name} {tensor.shape} for a cache of {dtype.name} {cache.shape}")
        if positions < end - begin:
            raise FrameError("blocks", f"a KV block of {positions} positions where {end - begin} are filled")
        in_place = tensor.codec == 0 and positions == end - begin
        memories.append(cache.pieces(layer, block) if in_place else None)
    return memories


def _to_host(block: torch.Tensor, pinned: bool) -> Tensor:
    """A copy [1, 2, heads, n, head_dim] in host memory of a block's own."""
    copied = torch.empty(block.shape, dtype=block.dtype, pin_memory=pinned)
    copied.copy_(block)
    return to_wire(copied[None], TensorClass.KV)


def _decoded(encoded: Encoded, ledger: Ledger, link: LinkKind) -> Tensor:
    tensor, took = codecs.decode(encoded.codec, encoded.cls, encoded.dtype, encoded.shape, _payload(encoded))
    operation = Operation.FETCH_MISSING_KV_LAYERS
    ledger.count_codec(Direction.UP, operation, Kind.DELTA, TensorClass.KV, decode_ns=took, link=link)
    return tensor


def _payload(encoded: Encoded) -> memoryview:
    return encoded.buffers[0] if len(encoded.buffers) == 1 else memoryview(b"".join(encoded.buffers))
