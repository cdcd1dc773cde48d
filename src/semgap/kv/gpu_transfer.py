"""KV blocks between a GPU's slabs and payloads in pinned memory.

Codecs with a form for the device (raw, nvcomp_ans, int8, int4) work there, and their payloads cross PCIe. Other codecs work on the host,
and raw blocks cross PCIe.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from semgap import codecs
from semgap.codecs import Encoded, device
from semgap.codecs.arrays import from_wire, to_wire
from semgap.codecs.base import Payloads
from semgap.codecs.clock import Clock
from semgap.kv.blocks import KVCache
from semgap.kv.codec_choice import CodecSpeed
from semgap.kv.gpu_streams import BounceBuffer, Event, GpuStreams, Regions
from semgap.kv.pool import BLOCK, KVPool
from semgap.kv.transfer import BlockTransfer, Held, Kept, LayerBlock, Leaving, joined, measure_on_host
from semgap.tensors import Tensor, TensorClass, bytes_view, nbytes_of
from semgap.wire.frames import Frame, Memory
from semgap.wire.ledger import LinkKind
from semgap.wire.messages import TensorHeader

_PAYLOAD_ALIGNMENT = 16  # in memory; the device's codecs need it
_BOUNCE_SLACK = 4096  # for payloads that are longer than raw blocks
Pinned = Held[torch.Tensor]
"""A payload in pinned memory, (n,) uint8, from which copies to the device need not wait."""

_MemoryOf = Callable[[list[LayerBlock], list[int]], list[torch.Tensor]]


@dataclass(frozen=True)
class Gathered:
    """Blocks of one shape on the device, in the order of `places`: their payloads in `codec`, or raw if the host is to encode them."""

    places: list[LayerBlock]
    shape: tuple[int, ...]
    payloads: Payloads
    codec: codecs.Codec


class StagedTransfer(BlockTransfer[torch.Tensor]):
    """For slabs on a GPU. Payloads that stay lie in regions of pinned memory, one per layer of a handle; payloads between the GPU and the
    wire pass through a bounce buffer.
    """

    is_staged = True

    def __init__(self, pool: KVPool, streams: GpuStreams) -> None:
        self.link = LinkKind.PCIE if streams.is_cuda else LinkKind.MEMORY
        self._streams, self._slab_nbytes = streams, pool.slab_nbytes
        self._free = Regions(streams, pool.slab_nbytes)
        self._regions: dict[bytes, dict[int, torch.Tensor]] = {}  # handle -> layer -> region
        self._bounce: BounceBuffer | None = None

    def keep(self, kv_id: bytes, cache: KVCache, places: Sequence[LayerBlock], by_layer: Sequence[str]) -> Kept[torch.Tensor]:
        self._streams.quiesce()  # the host writes to the regions too
        held, event, encode_ns = self._take_out(cache, places, by_layer, partial(self._kept_memory, kv_id, cache))
        left = {place: raw for place, raw in held.items() if not _works_on_device(codecs.codec_named(by_layer[place[0]]))}
        if left and event is not None:
            event.synchronize()
        for place, raw in left.items():
            encoded = _encoded(raw, by_layer[place[0]], 0)
            payload = torch.frombuffer(bytearray(joined(encoded.buffers)), dtype=torch.uint8)
            held[place] = Held(encoded.codec, raw.dtype, raw.shape, payload)
            encode_ns += encoded.encode_ns
        return held, encode_ns

    def forget(self, kv_id: bytes) -> None:
        for region in self._regions.pop(kv_id, {}).values():
            self._free.give_back(region)

    def leave(self, cache: KVCache, places: Sequence[LayerBlock], by_layer: Sequence[str]) -> Leaving[torch.Tensor]:
        held, event, encode_ns = self._take_out(cache, places, by_layer, lambda _, lengths: self._bounced(lengths))
        assert self._bounce is not None
        self._bounce.used_until(event)

        def encoded() -> list[Encoded]:
            """The time of encoding stands with the first payload."""
            if event is not None:
                event.synchronize()
            return [_encoded(held[place], by_layer[place[0]], encode_ns if index == 0 else 0) for index, place in enumerate(places)]

        return Leaving(tuple(places), tuple(held[place] for place in places), encoded)

    def begin_incoming(self) -> None:
        self._streams.begin_incoming()

    def memory_for(self, cache: KVCache, layer: int, blocks: Sequence[int], heads: Sequence[TensorHeader]) -> list[Memory | None]:
        return [bytes_view(part.numpy()) for part in self._bounced([head.nbytes for head in heads])]

    def received(self, blocks: Sequence[int], frame: Frame) -> dict[int, Pinned]:
        heads = frame.header.tensors
        assert self._bounce is not None
        parts = split(self._bounce.taken, [head.nbytes for head in heads])
        arrived = zip(blocks, heads, parts, strict=True)
        return {block: Held(head.codec, head.dtype, head.shape, part) for block, head, part in arrived}

    def put(self, cache: KVCache, layer: int, held: Mapping[int, Pinned]) -> int:
        decode_ns = 0
        try:
            with self._streams.incoming():
                clock = Clock(cache.pool.device)
                by_code: dict[int, dict[int, Pinned]] = {}
                for block, one in held.items():
                    if _crosses_raw(one):
                        decode_ns += _put_from_host(cache, layer, block, one)
                    else:
                        by_code.setdefault(one.code, {})[block] = one
                flags = [flag for code, alike in by_code.items() if (flag := _put_on_device(cache, layer, code, alike)) is not None]
                clock.stop()
                if flags:
                    device.require(torch.stack(flags).all())
                    decode_ns += clock.took_ns()
        finally:  # also after a failure: copies that have begun still write
            event = self._streams.arrived()
            cache.arrives(layer, event)
            if self._bounce is not None:
                self._bounce.used_until(event)
        return decode_ns

    def moved_bytes(self, held: Pinned) -> tuple[int, int]:
        raw = nbytes_of(held.dtype, held.shape)
        return raw, raw if _crosses_raw(held) else held.payload.numel()

    def copy_s(self, nbytes: int) -> float:
        source = self._streams.host_memory(nbytes).zero_()
        target = torch.empty(nbytes, dtype=torch.uint8, device=self._streams.device)
        for _ in range(2):  # the first one pages in
            begin = time.perf_counter()
            with self._streams.incoming():
                target.copy_(source, non_blocking=True)
            self._streams.quiesce()
        return time.perf_counter() - begin

    def measure(self, cache: KVCache, layer: int, block: int, codec: str) -> CodecSpeed:
        named = codecs.codec_named(codec)
        if not named.on_device:
            return measure_on_host(to_wire(cache.block(layer, block)[None], TensorClass.KV), codec)
        for _ in range(2):  # the first one compiles
            (group,) = gather(cache, [(layer, block)], codec)
        parts = (group.payloads.heads[0], bytes_view(group.payloads.part(0).cpu().numpy()))
        whole = torch.frombuffer(bytearray().join(parts), dtype=torch.uint8)
        uploaded, view = whole.to(cache.pool.device), bytes_view(whole.numpy())
        for _ in range(2):  # the first one compiles
            clock = Clock(cache.pool.device)
            _, intact = device.decode(named, uploaded, view, cache.pool.dtype, group.shape)
            clock.stop()
            device.require(intact)
        raw = nbytes_of(cache.pool.dtype, group.shape)
        return CodecSpeed(raw / whole.numel(), 1e9 * raw / max(1, group.payloads.encode_ns), 1e9 * raw / max(1, clock.took_ns()))

    def warm_up(self, pool: KVPool, codec: str) -> None:
        named = codecs.codec_named(codec)
        if named.on_device:
            device.warm_up(named, _torch_dtype(pool), pool.shape.block(min(BLOCK, pool.shape.max_length)), pool.device)

    def _take_out(
        self, cache: KVCache, places: Sequence[LayerBlock], by_layer: Sequence[str], memory_of: _MemoryOf
    ) -> tuple[dict[LayerBlock, Pinned], Event, int]:
        """Starts to copy blocks, in their codec or raw, into `memory_of(places, payload bytes)`. The copies end with the event. Gives the
        nanoseconds of encoding on the device too.
        """
        by_codec: dict[str, list[LayerBlock]] = {}
        for place in places:
            by_codec.setdefault(by_layer[place[0]], []).append(place)
        gathered = [group for codec, own in by_codec.items() for group in gather(cache, own, codec)]
        items = [(place, group, index) for group in gathered for index, place in enumerate(group.places)]
        lengths = [group.payloads.heads[index].nbytes + group.payloads.part(index).numel() for _, group, index in items]
        memory = memory_of([place for place, _, _ in items], lengths)
        held, pairs = {}, []
        for (place, group, index), target in zip(items, memory, strict=True):
            head = group.payloads.heads[index]
            if head.nbytes:
                target.numpy()[: head.nbytes] = np.frombuffer(head, dtype=np.uint8)
            pairs.append((group.payloads.part(index), target[head.nbytes :]))
            held[place] = Held(group.codec.code, cache.pool.dtype, group.shape, target)
        return held, self._streams.to_host(pairs), sum(group.payloads.encode_ns for group in gathered)

    def _kept_memory(self, kv_id: bytes, cache: KVCache, places: list[LayerBlock], lengths: list[int]) -> list[torch.Tensor]:
        """Memory for payloads: part b of its layer's region for block b, or memory of its own for one that is longer than the raw block."""
        regions = self._regions.setdefault(kv_id, {})
        part_bytes, memory = BLOCK * cache.position_bytes, []
        for (layer, block), nbytes in zip(places, lengths, strict=True):
            begin, end = block * part_bytes, block * part_bytes + nbytes
            if nbytes > part_bytes or end > self._slab_nbytes:
                memory.append(self._streams.host_memory(nbytes))
                continue
            if layer not in regions:
                regions[layer] = self._free.take()
            memory.append(regions[layer][begin:end])
        return memory

    def _bounced(self, lengths: Sequence[int]) -> list[torch.Tensor]:
        """Parts of the next piece of the bounce buffer."""
        if self._bounce is None:
            self._bounce = BounceBuffer(self._streams, self._slab_nbytes + _BOUNCE_SLACK)
        return split(self._bounce.take(sum(_aligned(length) for length in lengths)), lengths)


def gather(cache: KVCache, places: Sequence[LayerBlock], codec: str) -> list[Gathered]:
    """Copies blocks out of their slabs, one copy per layer and run of blocks, and encodes them on the device if `codec` can."""
    cache.settle()
    named = codecs.codec_named(codec)
    there = named if _works_on_device(named) else codecs.codec_named("raw")
    by_count: dict[int, list[LayerBlock]] = {}
    for layer, block in places:
        begin, end = cache.bounds(block)
        by_count.setdefault(end - begin, []).append((layer, block))
    gathered = []
    for count, alike in by_count.items():
        rows = _rows(cache, alike, count)
        gathered.append(Gathered(alike, tuple(rows.shape[1:]), device.encode(rows, there), there))
    return gathered


def _rows(cache: KVCache, places: Sequence[LayerBlock], count: int) -> torch.Tensor:
    """[b, 1, 2, heads, count, head_dim]: blocks of `count` positions each, one after the other."""
    shape = cache.shape.block(count)
    rows = torch.empty((len(places), *shape), dtype=_torch_dtype(cache.pool), device=cache.pool.device)
    first = 0
    while first < len(places):
        run = 1
        while first + run < len(places) and places[first + run] == (places[first][0], places[first][1] + run):
            run += 1
        layer, block = places[first]
        assert not cache.missing[layer, block : block + run].any()
        begin = BLOCK * block
        part = (
            cache.layers[layer].held_slab[:, 0, :, begin : begin + run * count].unflatten(2, (run, count))
        )  # a longer run has whole blocks
        rows[first : first + run, 0].copy_(part.permute(2, 0, 1, 3, 4))
        first += run
    return rows


def split(memory: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    """Parts of `memory` of those lengths, each aligned."""
    parts, at = [], 0
    for length in lengths:
        parts.append(memory[at : at + length])
        at += _aligned(length)
    return parts


def _works_on_device(codec: codecs.Codec) -> bool:
    """True if the codec needs no bytes of the tensor in host memory."""
    return codec.on_device or codec.name == "raw"


def _crosses_raw(held: Pinned) -> bool:
    """True if its codec works on the host, so that the tensor crosses PCIe."""
    return not _works_on_device(codecs.codec_of(held.code))


def _encoded(held: Pinned, codec: str, encode_ns: int) -> Encoded:
    """A payload in host memory for the wire. Encodes it here if its codec works on the host."""
    named, view = codecs.codec_named(codec), bytes_view(held.payload.numpy())
    if _works_on_device(named):
        return Encoded(TensorClass.KV, held.code, held.dtype, held.shape, (view,), view.nbytes, encode_ns)
    return codecs.encode(Tensor(TensorClass.KV, held.dtype, held.shape, view), named)


def _put_from_host(cache: KVCache, layer: int, block: int, held: Pinned) -> int:
    """Decodes on the host and starts to place the block. Gives the nanoseconds of decoding."""
    tensor, took_ns = codecs.decode(held.code, TensorClass.KV, held.dtype, held.shape, bytes_view(held.payload.numpy()))
    cache.place(layer, block, from_wire(tensor, cache.pool.device))
    return took_ns


def _put_on_device(cache: KVCache, layer: int, code: int, held: Mapping[int, Pinned]) -> torch.Tensor | None:
    """Starts to upload, decode and place payloads of one codec. Gives a flag on the device that they are intact, or None if known."""
    uploaded = [one.payload.to(cache.pool.device, non_blocking=True) for one in held.values()]
    views = [bytes_view(one.payload.numpy()) for one in held.values()]
    shapes = [one.shape for one in held.values()]
    values, intact = codecs.codec_of(code).decode_on_device(uploaded, views, next(iter(held.values())).dtype, shapes)
    for block, value in zip(held, values, strict=True):
        cache.place(layer, block, value)
    return intact


def _torch_dtype(pool: KVPool) -> torch.dtype:
    return getattr(torch, pool.dtype.torch_name)


def _aligned(length: int) -> int:
    return -(-length // _PAYLOAD_ALIGNMENT) * _PAYLOAD_ALIGNMENT
