"""The names of KV blocks by their content: a chain of digests over model, lossy codecs, dtype, shape, executor, a tenant's salt, and
the tokens.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from semgap.codecs import codec_named
from semgap.wire.messages import KVLayout

MOST_BLOCKS = 2048  # of a chain on the wire


def model_name(model_id: str, config: Mapping[str, Any], weights_codec: str, lossy_kv: str | None = None) -> str:
    """A model's name in a KV host: a digest of all that its keys and values depend on beside the tokens. That is the weights, by their
    `model_id` and a codec that changes them; the Hugging Face config, which has what no weight shows, as rope_theta; and `lossy_kv`,
    `Policy.lossy_kv`: a session whose own blocks may come back changed computes others from them, and shares none with exact ones.
    """
    digest = hashlib.blake2b(model_id.encode(), digest_size=32)
    changed = None if codec_named(weights_codec).exact else weights_codec
    digest.update(msgspec.json.encode([config, changed, lossy_kv], order="sorted"))
    return digest.hexdigest()


def layout_of_blocks(layout: KVLayout) -> KVLayout:
    """The layout of single blocks: sessions of any max_length share them."""
    return msgspec.structs.replace(layout, max_length=layout.block)


def space_of(layout: KVLayout, salt: str, computed_by: str = "") -> bytes:
    """The 32 bytes within which blocks are shared: those that executors of one name `computed_by` compute, since others give other last
    bits. Who does not know the salt can neither name nor find them.
    """
    digest = hashlib.blake2b(digest_size=32, key=hashlib.blake2b(salt.encode()).digest())
    digest.update(msgspec.json.encode([layout_of_blocks(layout), computed_by]))
    return digest.digest()


def chain_of(space: bytes, tokens: np.ndarray, block: int) -> tuple[bytes, ...]:
    """The 16-byte name of each whole block of `tokens` (n,), at most MOST_BLOCKS: a digest of the name before it and its own tokens."""
    names, before = [], space
    for begin in range(0, min(len(tokens) // block, MOST_BLOCKS) * block, block):
        before = hashlib.blake2b(before + id_bytes(tokens[begin : begin + block]), digest_size=16).digest()
        names.append(before)
    return tuple(names)


def id_bytes(tokens: np.ndarray) -> bytes:
    """Token ids as they cross and are compared: u32, little endian."""
    return np.ascontiguousarray(tokens, dtype="<u4").tobytes()
