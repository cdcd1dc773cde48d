"""The names of KV blocks by their content: a chain of digests over model, dtype, shape, executor, lossy codec, a tenant's salt, and
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


def model_name(model_id: str, config: Mapping[str, Any], weights_codec: str) -> str:
    """A model's name in a KV host: a digest of all that its keys and values depend on beside the tokens. That is the weights, by their
    `model_id` and a codec that changes them, and the Hugging Face config, which has what no weight shows, as rope_theta.
    """
    digest = hashlib.blake2b(model_id.encode(), digest_size=32)
    digest.update(msgspec.json.encode([config, _lossy(weights_codec)], order="sorted"))
    return digest.hexdigest()


def layout_of_blocks(layout: KVLayout) -> KVLayout:
    """The layout of single blocks: sessions of any max_length share them."""
    return msgspec.structs.replace(layout, max_length=layout.block)


def space_of(layout: KVLayout, salt: str, computed_by: str = "", codec: str = "raw") -> bytes:
    """The 32 bytes within which blocks are shared: those that executors of one name `computed_by` compute, since others give other last
    bits, and exact ones apart from those of a lossy `codec`. Who does not know the salt can neither name nor find them.
    """
    digest = hashlib.blake2b(digest_size=32, key=hashlib.blake2b(salt.encode()).digest())
    digest.update(msgspec.json.encode([layout_of_blocks(layout), computed_by, _lossy(codec)]))
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


def _lossy(codec: str) -> str | None:
    """A codec's name if it changes what it carries."""
    return None if codec_named(codec).exact else codec
