"""KV blocks between a device's slabs and payloads in host memory, where a block cannot be sent from, and received into, its slab.

Codecs that have a form for the device (raw, nvcomp_ans, int8, int4) work there, and what crosses PCIe is the payload; others work on the
host, and what crosses is raw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from semgap import codecs
from semgap.codecs import Encoded, device
from semgap.codecs.gpu_clock import Clock
from semgap.codecs.torch_tensors import from_wire
from semgap.kv.blocks import BLOCK, KVCache
from semgap.kv.gpu_streams import Event
from semgap.tensors import DType, Tensor, TensorClass, bytes_view, nbytes_of

ALIGNMENT = 16  # of payloads in memory; the device's codecs ask for it


LayerBlock = tuple[int, int]


@dataclass(frozen=True)
class Gathered:
    """Blocks of one shape, in the order of `places`: their payloads on the device, in `codec`, or raw where the host is to encode them."""

    places: list[LayerBlock]
    shape: tuple[int, ...]
    payloads: device.Payloads
    codec: codecs.Codec


@dataclass(frozen=True)
class Held:
    """A block's payload in host memory, (n,) uint8, and what it is a payload of."""

    code: int
    dtype: DType
    shape: tuple[int, ...]
    payload: torch.Tensor

    @property
    def crosses_raw(self) -> bool:
        """Its codec works on the host: what crosses PCIe is the tensor."""
        return not works_on_device(codecs.codec_of(self.code))


def works_on_device(codec: codecs.Codec) -> bool:
    """The codec needs no bytes of the tensor in host memory."""
    return codec.on_device or codec.name == "raw"


def gather(cache: KVCache, places: Sequence[LayerBlock], codec: str) -> list[Gathered]:
    """Blocks out of their slabs, one contiguous gather per layer and run of blocks, encoded on the device where `codec` can be."""
    cache.settle()
    named = codecs.codec_named(codec)
    there = named if works_on_device(named) else codecs.codec_named("raw")
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
    rows = torch.empty((len(places), *shape), dtype=cache.pool.dtype, device=cache.pool.device)
    first = 0
    while first < len(places):
        run = 1
        while first + run < len(places) and places[first + run] == (places[first][0], places[first][1] + run):
            run += 1
        layer, block = places[first]
        slab = cache.layers[layer].slab
        assert slab is not None and not cache.missing[layer, block : block + run].any()
        begin = BLOCK * block
        part = slab[:, 0, :, begin : begin + run * count].unflatten(2, (run, count))  # a run of more than one is of whole blocks
        rows[first : first + run, 0].copy_(part.permute(2, 0, 1, 3, 4))
        first += run
    return rows


def to_host(cache: KVCache, gathered: Sequence[Gathered], memory: Sequence[torch.Tensor]) -> tuple[list[Held], Event]:
    """Starts to copy payloads into `memory`, (n,) uint8 for each in order, as long as its head and body; they are there after the event."""
    copies = cache.pool.copies
    assert copies is not None
    dtype = DType.from_torch_name(str(cache.pool.dtype))
    held: list[Held] = []
    pairs = []
    for group in gathered:
        for index in range(len(group.places)):
            target, head = memory[len(held)], group.payloads.heads[index]
            if head.nbytes:
                target.numpy()[: head.nbytes] = np.frombuffer(head, dtype=np.uint8)
            pairs.append((group.payloads.part(index), target[head.nbytes :]))
            held.append(Held(group.codec.code, dtype, group.shape, target))
    return held, copies.to_host(pairs)


def sizes(gathered: Sequence[Gathered]) -> list[int]:
    """Bytes of each payload, head and body, in order."""
    return [group.payloads.heads[i].nbytes + group.payloads.part(i).numel() for group in gathered for i in range(len(group.places))]


def split(memory: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    """Parts of `memory` of those lengths, each aligned."""
    parts, at = [], 0
    for length in lengths:
        parts.append(memory[at : at + length])
        at += _aligned(length)
    return parts


def room_for(lengths: Sequence[int]) -> int:
    """Bytes that `split` needs."""
    return sum(_aligned(length) for length in lengths)


def encoded(held: Held, codec: str, encode_ns: int) -> Encoded:
    """What crosses the wire of a payload that has arrived in host memory; encoded here where its codec works on the host."""
    named, view = codecs.codec_named(codec), bytes_view(held.payload.numpy())
    if works_on_device(named):
        return Encoded(TensorClass.KV, held.code, held.dtype, held.shape, (view,), view.nbytes, encode_ns)
    return codecs.encode(Tensor(TensorClass.KV, held.dtype, held.shape, view), named)


def put(cache: KVCache, layer: int, blocks: Sequence[int], held: Sequence[Held]) -> tuple[Event, int]:
    """Starts to bring a layer's blocks back into their slab, on the stream of what comes in; they are there after the event. Gives the
    nanoseconds of decoding too. CodecError for a payload that is damaged, which nvcomp_ans, int8 and int4 wait for.
    """
    copies = cache.pool.copies
    assert copies is not None
    decode_ns = 0
    try:
        with copies.incoming():
            flags = []
            clock = Clock(cache.pool.device)
            by_code: dict[int, list[tuple[int, Held]]] = {}
            for block, one in zip(blocks, held, strict=True):
                if one.crosses_raw:
                    view = bytes_view(one.payload.numpy())
                    tensor, took_ns = codecs.decode(one.code, TensorClass.KV, one.dtype, one.shape, view)
                    cache.place(layer, block, from_wire(tensor, cache.pool.device))
                    decode_ns += took_ns
                else:
                    by_code.setdefault(one.code, []).append((block, one))
            for code, alike in by_code.items():
                uploaded = [one.payload.to(cache.pool.device, non_blocking=True) for _, one in alike]
                views = [bytes_view(one.payload.numpy()) for _, one in alike]
                dtype, shapes = alike[0][1].dtype, [one.shape for _, one in alike]
                values, intact = codecs.codec_of(code).decode_on_device(uploaded, views, dtype, shapes)
                for (block, _), value in zip(alike, values, strict=True):
                    cache.place(layer, block, value)
                flags += [] if intact is None else [intact]
            clock.stop()
            if flags:
                device.require(torch.stack(flags).all())
                decode_ns += clock.took_ns()
    finally:  # also where it failed midway: what was begun is still being written
        event = copies.arrived()
        cache.arrives(layer, event)
    return event, decode_ns


def measure(cache: KVCache, layer: int, block: int, codec: str) -> tuple[float, float]:
    """(tensor bytes over payload bytes, tensor bytes decoded in a second) of a device's codec on a resident block, copies left out."""
    named = codecs.codec_named(codec)
    (group,) = gather(cache, [(layer, block)], codec)
    head, body = group.payloads.heads[0], group.payloads.part(0)
    whole = torch.frombuffer(bytearray(bytes(head) + body.cpu().numpy().tobytes()), dtype=torch.uint8)
    uploaded, view = whole.to(cache.pool.device), bytes_view(whole.numpy())
    dtype = DType.from_torch_name(str(cache.pool.dtype))
    for _ in range(2):  # the first one compiles
        clock = Clock(cache.pool.device)
        _, intact = device.decode(named, uploaded, view, dtype, group.shape)
        clock.stop()
        device.require(intact)
    raw = nbytes_of(dtype, group.shape)
    return raw / whole.numel(), raw / (max(1, clock.took_ns()) / 1e9)


def moved_bytes(held: Held) -> tuple[int, int]:
    """(bytes of the tensor, bytes that cross PCIe)."""
    raw = nbytes_of(held.dtype, held.shape)
    return raw, raw if held.crosses_raw else held.payload.numel()


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT
