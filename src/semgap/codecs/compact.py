"""Token ids in few bytes."""

from collections.abc import Sequence
from math import prod

import numpy as np

from semgap.codecs.base import Codec, CodecError
from semgap.tensors import DType, Tensor, TensorClass, bytes_view

_ITEMS = {np.dtype(name).itemsize: np.dtype(name) for name in ("<u1", "<u2", "<u4")}


class Compact(Codec):
    """Token ids in the smallest unsigned type (1, 2 or 4 bytes) that holds the largest id. Exact.

    The type follows from payload length / count, so only the ids cross. CodecError for negative ids, ids of 2^32 and more, and floats.
    """

    name, code, exact = "compact", 5, True
    accepts = frozenset({TensorClass.TOKENS})

    def encode(self, tensor: Tensor) -> Sequence[memoryview]:
        _check_integer(tensor.dtype)
        ids = tensor.numpy()
        if not ids.size:
            return (memoryview(b""),)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= 1 << 32:
            raise CodecError(f"codec 'compact' takes token ids in 0..2^32 - 1, and these lie in {low}..{high}; use codec raw or zstd")
        size = 1 if high < 1 << 8 else 2 if high < 1 << 16 else 4
        return (bytes_view(ids.astype(_ITEMS[size], copy=False)),)

    def decode(self, payload: memoryview, dtype: DType, shape: tuple[int, ...]) -> memoryview:
        _check_integer(dtype)
        count = prod(shape)
        if not count and not payload.nbytes:
            return payload
        size = payload.nbytes // count if count and not payload.nbytes % count else 0
        if size not in _ITEMS or size > dtype.itemsize:
            raise CodecError(f"compact payload of {payload.nbytes} bytes for {count} ids of {dtype.name}")
        ids = np.frombuffer(payload, dtype=_ITEMS[size])
        if ids.max() > np.iinfo(dtype.numpy).max:
            raise CodecError(f"compact payload holds id {ids.max()}, which {dtype.name} does not")
        return bytes_view(ids.astype(dtype.numpy, copy=False))


def _check_integer(dtype: DType) -> None:
    if dtype.is_float:
        raise CodecError(f"codec 'compact' takes token ids, which are integers, and the tensor is {dtype.name}; use codec raw or zstd")
