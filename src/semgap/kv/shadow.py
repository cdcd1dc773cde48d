"""The shadow: where KV blocks lie while the device does not hold them.

A shadow saves blocks of a cache and puts them back, and counts what that moves. It knows handles by their `kv_id` alone.
"""

from __future__ import annotations

import contextlib
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
import xxhash

from semgap import codecs, wire
from semgap.books import close_books
from semgap.bridge import from_wire, to_wire
from semgap.codecs import Encoded, device
from semgap.kv import staged
from semgap.kv.blocks import BLOCK, KVCache, KVPool
from semgap.kv.copies import Copies, Event, Regions, Staging
from semgap.ledger import Direction, Ledger, LedgerError, LinkKind
from semgap.link import Link, RemoteError
from semgap.tensors import DType, Tensor, TensorClass, bytes_view, nbytes_of
from semgap.wire import Flag, FrameError, Kind, Operation, WireError

Kept = TypeVar("Kept")

_PUT_FRAME_BYTES = 8 << 20
_PUT_FRAME_BLOCKS = 512  # their places must fit a header
_STAGING_SLACK = 4096  # for what payloads are longer than raw blocks
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
        """Asks at once for saved blocks, true in [layers, blocks]; gives each layer's index when its blocks are in their slab, in order,
        or on a GPU on their way there: `cache.settle` then has a stream wait for them.

        ShadowError where one cannot be had, also midway; what has not been given then holds anything. Called by the thread that runs
        forward passes, and consumed by any.
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
        self._device = device
        self._link = LinkKind.PCIE if device.type == "cuda" else LinkKind.MEMORY
        self._held: dict[bytes, dict[tuple[int, int], Encoded]] = {}
        self._pinned: dict[bytes, _Pinned] = {}
        self._regions: Regions | None = None

    def save(self, kv_id: bytes, cache: KVCache, blocks: np.ndarray, codec: str, tokens: np.ndarray) -> Moved:
        places = [(layer, block) for layer, block in np.argwhere(blocks).tolist()]
        if cache.pool.copies is not None:
            moved = self._save_staged(kv_id, cache, places, codec, cache.pool.copies)
        else:
            moved = Moved()
            for layer, block in places:
                encoded = codecs.encode(_copied(cache.block(layer, block)), codec)
                self._held.setdefault(kv_id, {})[layer, block] = encoded
                moved += self._count_saved(nbytes_of(encoded.dtype, encoded.shape), encoded.nbytes, encoded.encode_ns)
        cache.saved[blocks] = np.broadcast_to(cache.counts, blocks.shape)[blocks]
        return moved

    def fetch(self, kv_id: bytes, cache: KVCache, blocks: np.ndarray) -> Iterator[int]:
        if cache.pool.copies is not None:
            cache.pool.copies.begin_incoming()
        return self._arrivals(kv_id, cache, blocks)

    def _arrivals(self, kv_id: bytes, cache: KVCache, blocks: np.ndarray) -> Iterator[int]:
        for layer in np.flatnonzero(blocks.any(axis=1)).tolist():
            wanted = np.flatnonzero(blocks[layer]).tolist()
            if cache.pool.copies is not None:
                self._put_staged(kv_id, cache, layer, wanted)
            else:
                for block in wanted:
                    encoded = _found(self._held.get(kv_id, {}), layer, block)
                    cache.place(layer, block, from_wire(_decoded(encoded, self._ledger, self._link), cache.pool.device))
                    self._count(Direction.UP, Operation.FETCH_MISSING_KV_LAYERS, nbytes_of(encoded.dtype, encoded.shape), encoded.nbytes)
            cache.here(layer, np.array(wanted))
            yield layer

    def _save_staged(self, kv_id: bytes, cache: KVCache, places: list[tuple[int, int]], codec: str, copies: Copies) -> Moved:
        """By way of the device's codecs, into regions of pinned memory, one for each layer."""
        copies.quiesce()  # the host writes into the regions too
        if self._regions is None:
            self._regions = Regions(copies, cache.pool.slab_nbytes)
        pinned = self._pinned.setdefault(kv_id, _Pinned())
        gathered = staged.gather(cache, places, codec)
        order = [place for group in gathered for place in group.places]
        memory = [
            pinned.memory(place, nbytes, cache, self._regions, copies) for place, nbytes in zip(order, staged.sizes(gathered), strict=True)
        ]
        held, event = staged.to_host(cache, gathered, memory)
        encode_ns = sum(group.payloads.encode_ns for group in gathered)
        if not staged.works_on_device(codecs.codec_named(codec)):
            if event is not None:
                event.synchronize()
            raw, held = held, []
            for one in raw:
                encoded = staged.encoded(one, codec, 0)
                encode_ns += encoded.encode_ns
                held.append(staged.Held(encoded.codec, one.dtype, one.shape, _as_bytes(encoded)))
        moved = Moved()
        for place, one in zip(order, held, strict=True):
            pinned.held[place] = one
            raw_bytes, crossed = staged.moved_bytes(one)
            moved += self._count_saved(raw_bytes, crossed, 0)
        self._ledger.count_codec(Direction.DOWN, Operation.PUT_KV_BLOCKS, Kind.DELTA, TensorClass.KV, encode_ns=encode_ns, link=self._link)
        return moved

    def _put_staged(self, kv_id: bytes, cache: KVCache, layer: int, wanted: list[int]) -> None:
        known = self._pinned.get(kv_id, _Pinned()).held
        held = [_found(known, layer, block) for block in wanted]
        try:
            _, decode_ns = staged.put(cache, layer, wanted, held)
        except codecs.CodecError as error:
            raise ShadowError("payload", str(error)) from error
        for one in held:
            self._count(Direction.UP, Operation.FETCH_MISSING_KV_LAYERS, *staged.moved_bytes(one))
        operation = Operation.FETCH_MISSING_KV_LAYERS
        self._ledger.count_codec(Direction.UP, operation, Kind.DELTA, TensorClass.KV, decode_ns=decode_ns, link=self._link)

    def forget(self, kv_id: bytes) -> None:
        self._held.pop(kv_id, None)
        pinned = self._pinned.pop(kv_id, None)
        if pinned is not None and self._regions is not None:
            for region in pinned.regions.values():
                self._regions.give_back(region)

    def probe(self) -> tuple[float, float]:
        copies = Copies(self._device)
        source = copies.host_memory(_PROBE_BYTES).zero_()
        target = torch.empty(_PROBE_BYTES, dtype=torch.uint8, device=self._device)
        for _ in range(2):  # the first one pages in
            begin = time.perf_counter()
            with copies.incoming():
                target.copy_(source, non_blocking=True)
            copies.quiesce()
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
        self._pinned.clear()

    def _count_saved(self, raw_bytes: int, crossed: int, encode_ns: int) -> Moved:
        self._count(Direction.DOWN, Operation.PUT_KV_BLOCKS, raw_bytes, crossed)
        if encode_ns:
            operation = Operation.PUT_KV_BLOCKS
            self._ledger.count_codec(Direction.DOWN, operation, Kind.DELTA, TensorClass.KV, encode_ns=encode_ns, link=self._link)
        return Moved(1, raw_bytes, crossed)

    def _count(self, direction: Direction, operation: Operation, raw_bytes: int, crossed: int) -> None:
        """Counts a copy of so many bytes of a tensor, of which `crossed` moved: the payload's where the codec works on the device."""
        self._ledger.count_copy(direction, operation, Kind.DELTA, TensorClass.KV, raw_bytes, payload_bytes=crossed, link=self._link)


@dataclass
class _Pinned:
    """Payloads of one handle in regions of pinned memory, one for each layer: block b lies in part b of its layer's."""

    regions: dict[int, torch.Tensor] = field(default_factory=dict)
    held: dict[tuple[int, int], staged.Held] = field(default_factory=dict)

    def memory(self, place: tuple[int, int], nbytes: int, cache: KVCache, regions: Regions, copies: Copies) -> torch.Tensor:
        """(nbytes,) uint8 for a payload; memory of its own where that is longer than the raw block."""
        layer, block = place
        part_bytes = BLOCK * cache.position_bytes
        begin, end = block * part_bytes, block * part_bytes + nbytes
        if nbytes > part_bytes or end > cache.pool.slab_nbytes:
            return copies.host_memory(nbytes)
        if layer not in self.regions:
            self.regions[layer] = regions.take()
        return self.regions[layer][begin:end]


@dataclass
class _Opened:
    """What this side knows of a handle at the KV host: the epoch that it writes under, and the versions of what it has saved."""

    epoch: int
    versions: np.ndarray


@dataclass
class KVHostShadow(Shadow):
    """In a KV host, a process of its own behind the same wire. `connect` gives an authenticated link to it, or raises WireError.

    A link that breaks is given up; the next use makes a new one. Its books are then lost, and `books` says so. A GPU's blocks go by way
    of pinned memory, and `ledger`, the session's, counts those copies as PCIe.
    """

    connect: Callable[[], Link]
    layout: wire.KVLayout
    ledger: Ledger | None = None
    broken_links: int = 0
    _staging: Staging | None = None
    _link: Link | None = None
    _handles: dict[bytes, _Opened] = field(default_factory=dict)
    _on_link: set[bytes] = field(default_factory=set)

    def save(self, kv_id: bytes, cache: KVCache, blocks: np.ndarray, codec: str, tokens: np.ndarray) -> Moved:
        opened = self._open(kv_id, cache)
        texts = texts_of(tokens, [cache.bounds(block)[1] for block in range(cache.shape.blocks)])
        moved = Moved()
        for named, encoded in self._encoded(cache, _batches(np.argwhere(blocks).tolist(), cache), codec):
            header = wire.PutKVBlocks((), kv_id, opened.epoch, named, tuple(texts[cache.bounds(block)[1]] for _, block in named))
            put = self._ask(Operation.PUT_KV_BLOCKS, header, encoded, Kind.DELTA).header
            assert isinstance(put, wire.KVPut)
            for (layer, block), tensor in zip(named, encoded, strict=True):
                opened.versions[layer, block] = put.version
                cache.saved[layer, block] = cache.counts[block]
                moved += Moved(1, nbytes_of(tensor.dtype, tensor.shape), tensor.nbytes)
        return moved

    def _encoded(
        self, cache: KVCache, batches: Iterator[list[list[int]]], codec: str
    ) -> Iterator[tuple[tuple[tuple[int, int], ...], list[Encoded]]]:
        """What is to cross of each batch, and its places in that order. A GPU's next batch leaves it while one is sent."""
        if cache.pool.copies is None:
            for places in batches:
                yield (
                    tuple((layer, block) for layer, block in places),
                    [_encoded_block(cache, layer, block, codec) for layer, block in places],
                )
            return
        begun: _Leaving | None = None
        for places in batches:
            after = self._leaving(cache, [(layer, block) for layer, block in places], codec)
            if begun is not None:
                yield begun.places, begun.encoded(codec)
            begun = after
        if begun is not None:
            yield begun.places, begun.encoded(codec)

    def _leaving(self, cache: KVCache, places: list[tuple[int, int]], codec: str) -> _Leaving:
        staging = self._staged(cache)
        gathered = staged.gather(cache, places, codec)
        lengths = staged.sizes(gathered)
        held, event = staged.to_host(cache, gathered, staged.split(staging.take(staged.room_for(lengths)), lengths))
        staging.used_until(event)
        for one in held:
            self._count_copy(Direction.DOWN, Operation.PUT_KV_BLOCKS, one)
        order = tuple(place for group in gathered for place in group.places)
        return _Leaving(order, held, event, sum(group.payloads.encode_ns for group in gathered))

    def _staged(self, cache: KVCache) -> Staging:
        assert cache.pool.copies is not None
        if self._staging is None:
            self._staging = Staging(cache.pool.copies, cache.pool.slab_nbytes + _STAGING_SLACK)
        return self._staging

    def _count_copy(self, direction: Direction, operation: Operation, held: staged.Held) -> None:
        if self.ledger is not None:
            raw, crossed = staged.moved_bytes(held)
            self.ledger.count_copy(direction, operation, Kind.DELTA, TensorClass.KV, raw, payload_bytes=crossed)

    def fetch(self, kv_id: bytes, cache: KVCache, blocks: np.ndarray) -> Iterator[int]:
        opened = self._open(kv_id, cache)
        if cache.pool.copies is not None:
            cache.pool.copies.begin_incoming()
            self._staged(cache)
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
            memory: list[torch.Tensor] = []

            def place(
                _: Operation,
                header: wire.Header,
                layer: int = layer,
                wanted: np.ndarray = wanted,
                memory: list[torch.Tensor] = memory,
            ) -> list[wire.Memory | None]:
                in_place = _memory_for(header, cache, layer, wanted)
                if self._staging is None or cache.pool.copies is None:
                    return in_place
                lengths = [tensor.nbytes for tensor in header.tensors]
                memory += staged.split(self._staging.take(staged.room_for(lengths)), lengths)
                return [bytes_view(part.numpy()) for part in memory]

            try:
                frame = link.receive_stream(Operation.FETCH_MISSING_KV_LAYERS, sequence, place)
                if bool(frame.flags & Flag.LAST) != (layer == layers[-1]):
                    raise FrameError("sequence", f"the stream of KV blocks ended at layer {layer}, expected layers {layers}")
                if cache.pool.copies is not None:
                    self._put_staged(link, cache, layer, wanted.tolist(), frame, memory)
                else:
                    for index, (tensor, block) in enumerate(zip(frame.header.tensors, wanted.tolist(), strict=True)):
                        if tensor.nbytes and not frame.payloads[index]:
                            continue  # it lies in its slab
                        cache.place(layer, block, from_wire(link.decode(frame, index), cache.pool.device))
            except WireError as error:
                raise self._given_up(error) from error
            cache.here(layer, wanted)
            yield layer

    def _put_staged(self, link: Link, cache: KVCache, layer: int, wanted: list[int], frame: wire.Frame, memory: list[torch.Tensor]) -> None:
        """From pinned memory, which the frame was received into, to the slab. FrameError for a payload that is damaged."""
        assert self._staging is not None
        heads = frame.header.tensors
        held = [staged.Held(head.codec, head.dtype, head.shape, part) for head, part in zip(heads, memory, strict=True)]
        try:
            event, decode_ns = staged.put(cache, layer, wanted, held)
        except codecs.CodecError as error:
            raise FrameError("payload", str(error)) from error
        self._staging.used_until(event)
        link.ledger.count_codec(link.receiving, frame.operation, frame.kind, TensorClass.KV, decode_ns=decode_ns)
        for one in held:
            self._count_copy(Direction.UP, Operation.FETCH_MISSING_KV_LAYERS, one)

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


@dataclass(frozen=True)
class _Leaving:
    """A batch on its way from a GPU to pinned memory."""

    places: tuple[tuple[int, int], ...]
    held: list[staged.Held]
    event: Event
    encode_ns: int

    def encoded(self, codec: str) -> list[Encoded]:
        """Waits for it. The time of encoding stands with the first."""
        if self.event is not None:
            self.event.synchronize()
        return [staged.encoded(one, codec, self.encode_ns if index == 0 else 0) for index, one in enumerate(self.held)]


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
    if cache.pool.copies is not None and codecs.codec_named(codec).on_device:
        return staged.measure(cache, layer, block, codec)
    held = _copied(cache.block(layer, block))
    encoded = codecs.encode(held, codec)
    _, took_ns = codecs.decode(encoded.codec, held.cls, held.dtype, held.shape, _payload(encoded))
    return held.data.nbytes / encoded.nbytes, held.data.nbytes / (took_ns / 1e9)


def warm_up(pool: KVPool, codec: str) -> None:
    """Runs the device's form of a KV codec once, which compiles it; nothing for codecs of the host."""
    named = codecs.codec_named(codec)
    if named.on_device:
        device.warm_up(named, pool.dtype, pool.shape.block(min(BLOCK, pool.shape.max_length)), pool.device)


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
    return codecs.encode(_copied(cache.block(layer, block)), codec)


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


def _copied(block: torch.Tensor) -> Tensor:
    """A copy [1, 2, heads, n, head_dim] in host memory of a block's own."""
    return to_wire(block.cpu().clone(memory_format=torch.contiguous_format)[None], TensorClass.KV)


def _found(held: Mapping[tuple[int, int], Kept], layer: int, block: int) -> Kept:
    """What is held of a block; ShadowError where it is not."""
    if (layer, block) not in held:
        raise ShadowError("gone", f"block {block} of layer {layer} is not in the worker's shadow")
    return held[layer, block]


def _as_bytes(encoded: Encoded) -> torch.Tensor:
    """A payload as (n,) uint8 of its own."""
    return torch.frombuffer(bytearray(b"".join(encoded.buffers)), dtype=torch.uint8)


def _decoded(encoded: Encoded, ledger: Ledger, link: LinkKind) -> Tensor:
    tensor, took = codecs.decode(encoded.codec, encoded.cls, encoded.dtype, encoded.shape, _payload(encoded))
    operation = Operation.FETCH_MISSING_KV_LAYERS
    ledger.count_codec(Direction.UP, operation, Kind.DELTA, TensorClass.KV, decode_ns=took, link=link)
    return tensor


def _payload(encoded: Encoded) -> memoryview:
    return encoded.buffers[0] if len(encoded.buffers) == 1 else memoryview(b"".join(encoded.buffers))
