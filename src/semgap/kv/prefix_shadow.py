"""A worker's side of the blocks that a KV host keeps by content: publishes, finds and fetches the beginnings of prompts."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from semgap.codecs import Encoded, encode
from semgap.kv.blocks import KVCache
from semgap.kv.host_shadow import KVHostShadow
from semgap.kv.pool import BLOCK
from semgap.kv.prefix_names import MOST_BLOCKS, chain_of, layout_of_blocks, space_of
from semgap.kv.shadow import Moved, Shadow
from semgap.tensors import Tensor, TensorClass, nbytes_of
from semgap.wire import messages
from semgap.wire.messages import Kind, Operation


class PrefixShadow(Shadow):
    """Blocks of a session's KV host by content, over the link of its other blocks. Sessions share them that use the same `salt`.

    A save keeps a prefix of whole blocks; a fetch brings the first blocks of what `find` found last. Nothing belongs to a handle.
    """

    def __init__(self, host: KVHostShadow, salt: str) -> None:
        self.transfer = host.transfer
        self._host, self._layout = host, layout_of_blocks(host.layout)
        self._space = space_of(host.layout, salt)

    def find(self, tokens: np.ndarray) -> messages.PrefixFound:
        """The leading whole blocks of `tokens` (n,) that the KV host keeps, at most all but the last token. ShadowError."""
        whole = _whole(len(tokens) - 1)
        if not whole:
            return messages.PrefixFound()
        header = messages.FindPrefix((), self._space, self._layout, chain_of(self._space, tokens[: whole * BLOCK], BLOCK))
        return self._host.ask(Operation.FIND_PREFIX, header, [_ids(tokens, whole)], Kind.DELTA).header_as(messages.PrefixFound)

    def save(self, kv_id: bytes, cache: KVCache, blocks: np.ndarray, codec: str, tokens: np.ndarray) -> Moved:
        """Keeps the whole blocks of all layers that are true in [layers, blocks], from the first one on, up to one that another text's
        name keeps out.
        """
        last = min(int(blocks.all(axis=0).argmin()) if not blocks.all() else blocks.shape[1], _whole(len(tokens)))
        moved, chain = Moved(), chain_of(self._space, tokens, BLOCK)
        batches = [[(layer, block) for layer in range(cache.shape.layers)] for block in range(last)]
        for number, (_, encoded) in enumerate(self._host.leaving(cache, batches, codec), start=1):
            header = messages.PutPrefixBlock((), self._space, self._layout, chain[:number])
            put = self._host.ask(Operation.PUT_PREFIX_BLOCK, header, [_ids(tokens, number), *encoded], Kind.DELTA)
            if not put.header_as(messages.PrefixBlockPut).kept:
                break
            moved += Moved(1, sum(nbytes_of(one.dtype, one.shape) for one in encoded), sum(one.nbytes for one in encoded))
        return moved

    def fetch(self, kv_id: bytes, cache: KVCache, blocks: np.ndarray) -> Iterator[int]:
        count = int(blocks.any(axis=0).sum())
        return self._host.stream(Operation.FETCH_PREFIX, messages.FetchPrefix((), count), [], cache, blocks)

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


def _whole(positions: int) -> int:
    return min(positions // BLOCK, MOST_BLOCKS)


def _ids(tokens: np.ndarray, blocks: int) -> Encoded:
    return encode(Tensor.from_numpy(tokens[: blocks * BLOCK].astype(np.uint32), TensorClass.CONTROL), "raw")
