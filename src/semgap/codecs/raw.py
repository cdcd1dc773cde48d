"""The tensor's own bytes."""

from __future__ import annotations

from collections.abc import Sequence

from semgap.codecs.base import Codec, CodecError
from semgap.tensors import DType, Tensor, nbytes_of


class Raw(Codec):
    """No change and no copy. Exact."""

    name, code, exact = "raw", 0, True

    def encode(self, tensor: Tensor) -> Sequence[memoryview]:
        return (tensor.data,)

    def decode(self, payload: memoryview, dtype: DType, shape: tuple[int, ...]) -> memoryview:
        if payload.nbytes != nbytes_of(dtype, shape):
            raise CodecError(f"raw payload of {payload.nbytes} bytes for {dtype.name} {shape}")
        return payload
