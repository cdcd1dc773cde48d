"""Casts to fp16, alone and followed by zlib: the original experiment's compression, split into its two parts."""

import zlib
from collections.abc import Sequence

import numpy as np

from semgap.codecs.base import Codec, CodecError
from semgap.tensors import DType, Tensor, bytes_view, nbytes_of


class Fp16(Codec):
    """Floats as IEEE half precision; integers (token ids) unchanged. Lossy for float32 and bfloat16.

    Values beyond 65504 become infinite, as in a plain cast.
    """

    name, code, exact = "fp16", 1, False

    def encode(self, tensor: Tensor) -> Sequence[memoryview]:
        return (_half_bytes(tensor),)

    def decode(self, payload: memoryview, dtype: DType, shape: tuple[int, ...]) -> memoryview:
        if payload.nbytes != _half_nbytes(dtype, shape):
            raise CodecError(f"fp16 payload of {payload.nbytes} bytes for {dtype.name} {shape}")
        return _from_half(payload, dtype)


class Fp16Zlib(Codec):
    """Fp16, then zlib at its default level: the original experiment's `_compress_tensor`. 1.2x beyond the cast, 26 MB/s."""

    name, code, exact = "fp16_zlib", 2, False

    def encode(self, tensor: Tensor) -> Sequence[memoryview]:
        return (memoryview(zlib.compress(_half_bytes(tensor))),)

    def decode(self, payload: memoryview, dtype: DType, shape: tuple[int, ...]) -> memoryview:
        expected = _half_nbytes(dtype, shape)
        return _from_half(memoryview(_inflate(payload, expected)), dtype)


def _inflate(payload: memoryview, expected: int) -> bytes:
    """Exactly `expected` bytes out of a whole zlib stream. Never allocates more, whatever the stream claims."""
    inflater = zlib.decompressobj()
    try:
        data = inflater.decompress(payload, expected + 1)
    except zlib.error as error:
        raise CodecError(f"zlib payload is damaged: {error}") from error
    if len(data) != expected or not inflater.eof or inflater.unused_data:
        raise CodecError(f"zlib payload does not hold exactly the {expected} announced bytes")
    return data


def _half_nbytes(dtype: DType, shape: tuple[int, ...]) -> int:
    return nbytes_of(DType.F16 if dtype.is_float else dtype, shape)


def _half_bytes(tensor: Tensor) -> memoryview:
    if tensor.dtype in (DType.F32, DType.BF16):
        with np.errstate(over="ignore"):  # the cast makes values beyond fp16's range infinite
            return bytes_view(tensor.as_float32().astype(np.float16))
    return tensor.data


def _from_half(half: memoryview, dtype: DType) -> memoryview:
    if dtype not in (DType.F32, DType.BF16):
        return half
    return from_float32(np.frombuffer(half, dtype=np.float16).astype(np.float32), dtype)


def from_float32(values: np.ndarray, dtype: DType) -> memoryview:
    """The bytes of C-order float32 `values` as a tensor of a float dtype, each value rounded to nearest even.

    F16 beyond 65504 becomes infinite; an alias of `values` for F32.
    """
    if dtype is DType.BF16:
        return bytes_view(_round_to_bf16(values))
    with np.errstate(over="ignore"):
        return bytes_view(values.astype(dtype.numpy, copy=False))


def _round_to_bf16(values: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns (uint16) of float32 values; NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
