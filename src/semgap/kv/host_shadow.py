"""The shadow: where KV blocks lie while the device does not hold them.

A shadow saves blocks of a cache and puts them back, and counts what that moves. It knows handles by their `kv_id` alone.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash

from semgap import codecs
from semgap.codecs import Encoded
from semgap.codecs.torch_tensors import from_wire
from semgap.kv import gpu_transfer
from semgap.kv.blocks import BLOCK, KVCache
from semgap.kv.gpu_streams import BounceBuffer, Event
from semgap.kv.shadow import PROBE_BYTES, Moved, Shadow, ShadowError, encoded_block
from semgap.tensors import DType, Tensor, TensorClass, bytes_view, nbytes_of
from semgap.wire import frames, messages
from semgap.wire.frames import Flag, FrameError, WireError
from semgap.wire.ledger import Direction, Ledger, LedgerError
from semgap.wire.link import Link, RemoteError
from semgap.wire.messages import Kind, Operation
from semgap.wire.reconcile import reconcile

_PUT_FRAME_BYTES = 8 << 20


_PUT_FRAME_BLOCKS = 512  # their places must fit a header


_STAGING_SLACK = 4096  # for what payloads are longer than raw blocks


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
    layout: messages.KVLayout
    ledger: Ledger | None = None
    broken_links: int = 0
    _staging: BounceBuffer | None = None
    _link: Link | None = None
    _handles: dict[bytes, _Opened] = field(default_factory=dict)
    _on_link: set[bytes] = field(default_factory=set)

    def save(self, kv_id: bytes, cache: KVCache, blocks: np.ndarray, codec: str, tokens: np.ndarray) -> Moved:
        opened = self._open(kv_id, cache)
        texts = texts_of(tokens, [cache.bounds(block)[1] for block in range(cache.shape.blocks)])
        moved = Moved()
        for named, encoded in self._encoded(cache, _batches(np.argwhere(blocks).tolist(), cache), codec):
            header = messages.PutKVBlocks((), kv_id, opened.epoch, named, tuple(texts[cache.bounds(block)[1]] for _, block in named))
            put = self._ask(Operation.PUT_KV_BLOCKS, header, encoded, Kind.DELTA).header
            assert isinstance(put, messages.KVPut)
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
                    [encoded_block(cache, layer, block, codec) for layer, block in places],
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
        gathered = gpu_transfer.gather(cache, places, codec)
        lengths = gpu_transfer.sizes(gathered)
        held, event = gpu_transfer.to_host(cache, gathered, gpu_transfer.split(staging.take(gpu_transfer.room_for(lengths)), lengths))
        staging.used_until(event)
        for one in held:
            self._count_copy(Direction.DOWN, Operation.PUT_KV_BLOCKS, one)
        order = tuple(place for group in gathered for place in group.places)
        return _Leaving(order, held, event, sum(group.payloads.encode_ns for group in gathered))

    def _staged(self, cache: KVCache) -> BounceBuffer:
        assert cache.pool.copies is not None
        if self._staging is None:
            self._staging = BounceBuffer(cache.pool.copies, cache.pool.slab_nbytes + _STAGING_SLACK)
        return self._staging

    def _count_copy(self, direction: Direction, operation: Operation, held: gpu_transfer.Held) -> None:
        if self.ledger is not None:
            raw, crossed = gpu_transfer.moved_bytes(held)
            self.ledger.count_copy(direction, operation, Kind.DELTA, TensorClass.KV, raw, payload_bytes=crossed)

    def fetch(self, kv_id: bytes, cache: KVCache, blocks: np.ndarray) -> Iterator[int]:
        opened = self._open(kv_id, cache)
        if cache.pool.copies is not None:
            cache.pool.copies.begin_incoming()
            self._staged(cache)
        mask = Tensor.from_numpy(blocks.astype(np.uint8), TensorClass.CONTROL)
        header = messages.FetchMissing((), kv_id, opened.epoch)
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
                header: messages.Header,
                layer: int = layer,
                wanted: np.ndarray = wanted,
                memory: list[torch.Tensor] = memory,
            ) -> list[frames.Memory | None]:
                in_place = _memory_for(header, cache, layer, wanted)
                if self._staging is None or cache.pool.copies is None:
                    return in_place
                lengths = [tensor.nbytes for tensor in header.tensors]
                memory += gpu_transfer.split(self._staging.take(gpu_transfer.room_for(lengths)), lengths)
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

    def _put_staged(
        self, link: Link, cache: KVCache, layer: int, wanted: list[int], frame: frames.Frame, memory: list[torch.Tensor]
    ) -> None:
        """From pinned memory, which the frame was received into, to the slab. FrameError for a payload that is damaged."""
        assert self._staging is not None
        heads = frame.header.tensors
        held = [gpu_transfer.Held(head.codec, head.dtype, head.shape, part) for head, part in zip(heads, memory, strict=True)]
        try:
            event, decode_ns = gpu_transfer.put(cache, layer, wanted, held)
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
            self._ask(Operation.DROP_KV, messages.DropKV((), kv_id, opened.epoch))
        except ShadowError as error:
            if error.code not in ("fenced", "unknown") and self._link is not None:
                raise

    def take_over(self, kv_id: bytes, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Becomes the writer of a handle that the KV host holds. Gives [layers, blocks]: the positions of each block there that was
        computed from `tokens`, and whether what this side saved or fetched last is still the newest. ShadowError (unknown, layout)."""
        before = self._handles.get(kv_id)
        opened, positions, texts = self._ask_to_open(messages.OpenKV((), kv_id, self.layout, 0, False))
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
            link.request(Operation.PING, messages.Ping((), 64))
            begin = time.perf_counter()
            link.request(Operation.PING, messages.Ping((), 64))
            rtt_s = time.perf_counter() - begin
            link.request(Operation.PING, messages.Ping((), PROBE_BYTES))
            begin = time.perf_counter()
            link.request(Operation.PING, messages.Ping((), PROBE_BYTES))
            return rtt_s, PROBE_BYTES / max(1e-9, time.perf_counter() - begin - rtt_s)
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
            return {"agreed": True, "reason": None} | reconcile(self._link, "KV host")
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

    def _ask(
        self, operation: Operation, header: messages.Header, tensors: list[Encoded] | None = None, kind: Kind = Kind.SETUP
    ) -> frames.Frame:
        try:
            return self._linked().request(operation, header, tensors or [], kind)
        except WireError as error:
            raise self._given_up(error) from error

    def _open(self, kv_id: bytes, cache: KVCache) -> _Opened:
        """The handle as it stands at the KV host. One that it lost (it was started anew) is opened again, with nothing saved."""
        if self._link is not None and kv_id in self._on_link:
            return self._handles[kv_id]
        before = self._handles.get(kv_id)
        opened, _, _ = self._ask_to_open(messages.OpenKV((), kv_id, self.layout, before.epoch if before else 0, True))
        if before is not None:
            cache.saved[before.versions != opened.versions] = 0
        else:
            cache.saved[:] = 0
        self._handles[kv_id] = opened
        return opened

    def _ask_to_open(self, header: messages.OpenKV) -> tuple[_Opened, np.ndarray, np.ndarray]:
        frame = self._ask(Operation.OPEN_KV, header)
        assert isinstance(frame.header, messages.KVOpened) and self._link is not None
        versions, positions, texts = (self._link.decode(frame, index).numpy().astype(np.int64) for index in range(3))
        self._on_link.add(header.kv_id)
        return _Opened(frame.header.epoch, versions), positions, texts


@dataclass(frozen=True)
class _Leaving:
    """A batch on its way from a GPU to pinned memory."""

    places: tuple[tuple[int, int], ...]
    held: list[gpu_transfer.Held]
    event: Event
    encode_ns: int

    def encoded(self, codec: str) -> list[Encoded]:
        """Waits for it. The time of encoding stands with the first."""
        if self.event is not None:
            self.event.synchronize()
        return [gpu_transfer.encoded(one, codec, self.encode_ns if index == 0 else 0) for index, one in enumerate(self.held)]


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


def _batches(places: list[list[int]], cache: KVCache) -> Iterator[list[list[int]]]:
    """Places of blocks, as many to a frame as fit."""
    block_bytes = cache.position_bytes * int(cache.counts.max(initial=1))
    count = max(1, min(_PUT_FRAME_BLOCKS, _PUT_FRAME_BYTES // block_bytes))
    for start in range(0, len(places), count):
        yield places[start : start + count]


def _memory_for(header: messages.Header, cache: KVCache, layer: int, wanted: np.ndarray) -> list[frames.Memory | None]:
    """Where the blocks of a frame are to lie: raw ones that are as long as they should be, straight in their slab."""
    if not isinstance(header, messages.KVBlocks) or header.layer != layer or header.blocks != tuple(wanted.tolist()):
        raise FrameError("blocks", f"KV blocks of another place came than those of layer {layer} that were asked for")
    if len(header.tensors) != len(wanted):
        raise FrameError("blocks", f"{len(header.tensors)} tensors came for {len(wanted)} KV blocks")
    dtype = DType.from_torch_name(str(cache.pool.dtype))
    memories: list[frames.Memory | None] = []
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
