"""A shadow in the worker's own memory, pinned if the device is a GPU."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from semgap import codecs
from semgap.kv.blocks import KVCache
from semgap.kv.shadow import PROBE_BYTES, Moved, Shadow, ShadowError, codecs_of
from semgap.kv.transfer import BlockTransfer, Held, LayerBlock
from semgap.tensors import TensorClass
from semgap.wire.ledger import Direction, Ledger
from semgap.wire.messages import Kind, Operation


class WorkerShadow(Shadow):
    """Keeps blocks in the worker's host memory, up to `budget_bytes` (None: without a limit). Counts its copies as PCIe, or on a CPU as
    memory.
    """

    def __init__(self, ledger: Ledger, transfer: BlockTransfer[Any], budget_bytes: int | None = None) -> None:
        self.transfer = transfer
        self.came = []
        self._ledger, self._budget_bytes = ledger, budget_bytes
        self._held_bytes: dict[bytes, int] = {}  # by handle, of tensors before their codec
        self._held: dict[bytes, dict[LayerBlock, Held[Any]]] = {}

    def save(self, kv_id: bytes, cache: KVCache, blocks: np.ndarray, by_layer: Sequence[str], tokens: np.ndarray) -> Moved:
        self._require_room(kv_id, cache, blocks)
        places = [(layer, block) for layer, block in np.argwhere(blocks).tolist()]
        kept, encode_ns = self.transfer.keep(kv_id, cache, places, by_layer)
        self._held.setdefault(kv_id, {}).update(kept)
        moved = self._count(Direction.DOWN, Operation.PUT_KV_BLOCKS, kept.values(), encode_ns=encode_ns)
        cache.saved[blocks] = np.broadcast_to(cache.counts, blocks.shape)[blocks]
        return moved

    def fetch(self, kv_id: bytes, cache: KVCache, blocks: np.ndarray, patience_s: float | None = None) -> Iterator[int]:
        self.transfer.begin_incoming()
        self.came = []
        return self._arrivals(kv_id, cache, blocks)

    def _arrivals(self, kv_id: bytes, cache: KVCache, blocks: np.ndarray) -> Iterator[int]:
        for layer in np.flatnonzero(blocks.any(axis=1)).tolist():
            wanted = np.flatnonzero(blocks[layer]).tolist()
            held = {block: self._found(kv_id, layer, block) for block in wanted}
            try:
                decode_ns = self.transfer.put(cache, layer, held)
            except codecs.CodecError as error:
                raise ShadowError("payload", str(error)) from error
            self._count(Direction.UP, Operation.FETCH_MISSING_KV_LAYERS, held.values(), decode_ns=decode_ns)
            self.came.append(codecs_of(one.code for one in held.values()))
            cache.missing[layer, wanted] = False
            yield layer

    def forget(self, kv_id: bytes) -> None:
        self._held.pop(kv_id, None)
        self._held_bytes.pop(kv_id, None)
        self.transfer.forget(kv_id)

    def probe(self) -> tuple[float, float]:
        return 0.0, PROBE_BYTES / self.transfer.copy_s(PROBE_BYTES)

    def abort(self) -> None:
        pass

    def books(self) -> None:
        return None

    def close(self) -> None:
        self._held.clear()

    def _require_room(self, kv_id: bytes, cache: KVCache, blocks: np.ndarray) -> None:
        """Counts the blocks of a handle that are kept once these are, at their present sizes. ShadowError if that is over the budget."""
        needed = cache.bytes_of(blocks | (cache.saved > 0))
        others = sum(self._held_bytes.values()) - self._held_bytes.get(kv_id, 0)
        if self._budget_bytes is not None and others + needed > self._budget_bytes:
            raise ShadowError(
                "budget",
                f"{others + needed:,} bytes of blocks are more than this session keeps in memory, {self._budget_bytes:,}; use fewer live "
                "requests, a smaller max_length, or a KV host",
            )
        self._held_bytes[kv_id] = needed

    def _found(self, kv_id: bytes, layer: int, block: int) -> Held[Any]:
        held = self._held.get(kv_id, {})
        if (layer, block) not in held:
            raise ShadowError("gone", f"block {block} of layer {layer} is not in the worker's shadow")
        return held[layer, block]

    def _count(self, direction: Direction, operation: Operation, held: Iterable[Held[Any]], **codec_ns: int) -> Moved:
        """Counts copies of blocks and the time of their codec. Gives the sum of the copies."""
        moved, link = Moved(), self.transfer.link
        for one in held:
            raw_bytes, copied_bytes = self.transfer.moved_bytes(one)
            self._ledger.count_copy(direction, operation, Kind.DELTA, TensorClass.KV, raw_bytes, payload_bytes=copied_bytes, link=link)
            moved += Moved(1, raw_bytes, copied_bytes)
        self._ledger.count_codec(direction, operation, Kind.DELTA, TensorClass.KV, link=link, **codec_ns)
        return moved
