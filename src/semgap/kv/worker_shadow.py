"""A shadow in the worker's own memory, pinned on a GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from semgap import codecs
from semgap.codecs import Encoded
from semgap.codecs.torch_tensors import from_wire
from semgap.kv import gpu_transfer
from semgap.kv.blocks import BLOCK, KVCache
from semgap.kv.gpu_streams import GpuStreams, Regions
from semgap.kv.shadow import PROBE_BYTES, Moved, Shadow, ShadowError, as_bytes, copied, decoded, found
from semgap.tensors import TensorClass, nbytes_of
from semgap.wire.ledger import Direction, Ledger, LinkKind
from semgap.wire.messages import Kind, Operation


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
                encoded = codecs.encode(copied(cache.block(layer, block)), codec)
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
                    encoded = found(self._held.get(kv_id, {}), layer, block)
                    cache.place(layer, block, from_wire(decoded(encoded, self._ledger, self._link), cache.pool.device))
                    self._count(Direction.UP, Operation.FETCH_MISSING_KV_LAYERS, nbytes_of(encoded.dtype, encoded.shape), encoded.nbytes)
            cache.here(layer, np.array(wanted))
            yield layer

    def _save_staged(self, kv_id: bytes, cache: KVCache, places: list[tuple[int, int]], codec: str, copies: GpuStreams) -> Moved:
        """By way of the device's codecs, into regions of pinned memory, one for each layer."""
        copies.quiesce()  # the host writes into the regions too
        if self._regions is None:
            self._regions = Regions(copies, cache.pool.slab_nbytes)
        pinned = self._pinned.setdefault(kv_id, _Pinned())
        gathered = gpu_transfer.gather(cache, places, codec)
        order = [place for group in gathered for place in group.places]
        memory = [
            pinned.memory(place, nbytes, cache, self._regions, copies)
            for place, nbytes in zip(order, gpu_transfer.sizes(gathered), strict=True)
        ]
        held, event = gpu_transfer.to_host(cache, gathered, memory)
        encode_ns = sum(group.payloads.encode_ns for group in gathered)
        if not gpu_transfer.works_on_device(codecs.codec_named(codec)):
            if event is not None:
                event.synchronize()
            raw, held = held, []
            for one in raw:
                encoded = gpu_transfer.encoded(one, codec, 0)
                encode_ns += encoded.encode_ns
                held.append(gpu_transfer.Held(encoded.codec, one.dtype, one.shape, as_bytes(encoded)))
        moved = Moved()
        for place, one in zip(order, held, strict=True):
            pinned.held[place] = one
            raw_bytes, crossed = gpu_transfer.moved_bytes(one)
            moved += self._count_saved(raw_bytes, crossed, 0)
        self._ledger.count_codec(Direction.DOWN, Operation.PUT_KV_BLOCKS, Kind.DELTA, TensorClass.KV, encode_ns=encode_ns, link=self._link)
        return moved

    def _put_staged(self, kv_id: bytes, cache: KVCache, layer: int, wanted: list[int]) -> None:
        known = self._pinned.get(kv_id, _Pinned()).held
        held = [found(known, layer, block) for block in wanted]
        try:
            _, decode_ns = gpu_transfer.put(cache, layer, wanted, held)
        except codecs.CodecError as error:
            raise ShadowError("payload", str(error)) from error
        for one in held:
            self._count(Direction.UP, Operation.FETCH_MISSING_KV_LAYERS, *gpu_transfer.moved_bytes(one))
        operation = Operation.FETCH_MISSING_KV_LAYERS
        self._ledger.count_codec(Direction.UP, operation, Kind.DELTA, TensorClass.KV, decode_ns=decode_ns, link=self._link)

    def forget(self, kv_id: bytes) -> None:
        self._held.pop(kv_id, None)
        pinned = self._pinned.pop(kv_id, None)
        if pinned is not None and self._regions is not None:
            for region in pinned.regions.values():
                self._regions.give_back(region)

    def probe(self) -> tuple[float, float]:
        copies = GpuStreams(self._device)
        source = copies.host_memory(PROBE_BYTES).zero_()
        target = torch.empty(PROBE_BYTES, dtype=torch.uint8, device=self._device)
        for _ in range(2):  # the first one pages in
            begin = time.perf_counter()
            with copies.incoming():
                target.copy_(source, non_blocking=True)
            copies.quiesce()
        return 0.0, PROBE_BYTES / (time.perf_counter() - begin)

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
    held: dict[tuple[int, int], gpu_transfer.Held] = field(default_factory=dict)

    def memory(self, place: tuple[int, int], nbytes: int, cache: KVCache, regions: Regions, copies: GpuStreams) -> torch.Tensor:
        """(nbytes,) uint8 for a payload; memory of its own where that is longer than the raw block."""
        layer, block = place
        part_bytes = BLOCK * cache.position_bytes
        begin, end = block * part_bytes, block * part_bytes + nbytes
        if nbytes > part_bytes or end > cache.pool.slab_nbytes:
            return copies.host_memory(nbytes)
        if layer not in self.regions:
            self.regions[layer] = regions.take()
        return self.regions[layer][begin:end]
