"""A worker's side of the blocks that a KV host keeps by content: publishes, finds and fetches the beginnings of prompts."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from semgap.codecs import Encoded, encode
from semgap.kv.blocks import KVCache
from semgap.kv.host_shadow import KVHostShadow
from semgap.kv.pool import BLOCK
from semgap.kv.prefix_names import chain_of, layout_of_blocks, space_of
from semgap.kv.shadow import Moved, Shadow
from semgap.tensors import Tensor, TensorClass, nbytes_of
from semgap.wire import messages
from semgap.wire.messages import Kind, Operation


class PrefixShadow(Shadow):
    """Blocks of a session's KV host by content, over the link of its other blocks. Sessions share them that use the same `salt` and are
    `computed_by` executors of the same name and device.

    A save keeps a prefix of whole blocks; a fetch brings the first blocks of what `find` found last. Nothing belongs to a handle.
    """

    def __init__(self, host: KVHostShadow, salt: str, computed_by: str) -> None:
        self.transfer, self.came = host.transfer, host.came
        self._host, self._layout = host, layout_of_blocks(host.layout)
        self._space = space_of(host.layout, salt, computed_by)

    def find(self, tokens: np.ndarray) -> messages.PrefixFound:
        """The leading whole blocks of `tokens` (n,) that the KV host keeps. ShadowError."""
        chain = chain_of(self._space, tokens, BLOCK)
        if not chain:
            return messages.PrefixFound()
        header = messages.FindPrefix((), self._space, self._layout, chain)
        return self._host.ask(Operation.FIND_PREFIX, header, [_ids(tokens, 0, len(chain))], Kind.DELTA).header_as(messages.PrefixFound)

    def save(self, kv_id: bytes, cache: KVCache, blocks: np.ndarray, by_layer: Sequence[str], tokens: np.ndarray) -> Moved:
        """Keeps the leading blocks of all layers, true in [layers, blocks], up to one whose name another text has. Those that are kept
        already do not cross.
        """
        found, chain = self.find(tokens), chain_of(self._space, tokens, BLOCK)
        whole = min(len(chain), int(np.logical_and.accumulate(blocks.all(axis=0)).sum()))
        moved, before = Moved(min(found.blocks, whole)), found.last
        batches = [[(layer, block) for layer in range(cache.shape.layers)] for block in range(found.blocks, whole)]
        for places, encoded in self._host.leaving(cache, batches, by_layer):
            block = places[0][1]
            header = messages.PutPrefixBlock((), self._space, self._layout, chain[block], before)
            put = self._host.ask(Operation.PUT_PREFIX_BLOCK, header, [_ids(tokens, block, block + 1), *encoded], Kind.DELTA)
            before = put.header_as(messages.PrefixBlockPut).number
            if not before:
                break
            moved += Moved(1, sum(nbytes_of(one.dtype, one.shape) for one in encoded), sum(one.nbytes for one in encoded))
        return moved

    def fetch(self, kv_id: bytes, cache: KVCache, blocks: np.ndarray, patience_s: float | None = None) -> Iterator[int]:
        count = int(blocks.any(axis=0).sum())
        return self._host.stream(Operation.FETCH_PREFIX, messages.FetchPrefix((), count), [], cache, blocks, patience_s)

    def forget(self, kv_id: bytes) -> None:
        pass

    def probe(self) -> tuple[float, float]:
        return self._host.probe()

    def abort(self) -> None:
        self._host.abort()

    def books(self) -> dict[str, Any] | None:
        return self._host.books()

    @property
    def network_bytes(self) -> tuple[int, int]:
        return self._host.network_bytes

    def close(self) -> None:
        self._host.close()


def _ids(tokens: np.ndarray, begin: int, end: int) -> Encoded:
    """The token ids of blocks begin..end."""
    return encode(Tensor.from_numpy(tokens[begin * BLOCK : end * BLOCK].astype(np.uint32), TensorClass.CONTROL), "raw")
