"""Byte planes, then zstd: lossless for every dtype, and stronger than zstd by knowing the layout of floats."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from semgap.codecs.base import Codec, CodecError
from semgap.codecs.plane_kernels import COMPILED
from semgap.codecs.zstd import Frames
from semgap.tensors import DType, Tensor, bytes_view, nbytes_of

_LENGTH = np.dtype("<u4")
# Matches in a plane are chance, and coding them costs more than entropy coding alone: a table of 64 entries makes a bf16 KV cache 0.7%
# smaller at twice the speed. The window is also the reach of one entropy table. Rows of logits differ: a window of 32 KiB makes fp16
# logits 1% smaller than the usual 128 KiB, at four fifths of the speed; 16 KiB would gain another 0.5% at two thirds (SmolLM2).
_PARAMETERS = {"hash_log": 6, "window_log": 15}
_NOISY, _SAMPLE_BYTES = {DType.F32: 2}, 4096
"""The lowest planes of computed floats are noise, which zstd tries in vain: a sample that does not shrink says so sooner."""


class PlanesZstd(Codec):
    """Bytes of equal significance side by side, each plane through zstd level 1: exponents repeat, low mantissa bits do not.

    F32 and BF16 first move the sign behind the exponent, so that the exponent is one byte: nearly 2% smaller on bf16 logits. F16 would
    gain nothing, since its exponent takes 5 bits. A plane that does not shrink is stored.
    Payload: one length (u32) per plane, then the planes, least significant first. Exact. No checksum of its own: damage within a
    plane may give other values, never another size.
    """

    name, code, exact = "planes_zstd", 4, True

    def __init__(self) -> None:
        self._frames = Frames(**_PARAMETERS)

    def encode(self, tensor: Tensor) -> Sequence[memoryview]:
        count = tensor.data.nbytes // tensor.dtype.itemsize
        if count > np.iinfo(_LENGTH).max:
            raise CodecError(f"planes_zstd takes up to {np.iinfo(_LENGTH).max} elements, and the tensor has {count}; use codec zstd")
        planes = [self._packed(bytes_view(plane), tensor.dtype, place) for place, plane in enumerate(_split(tensor.data, tensor.dtype))]
        lengths = np.array([plane.nbytes for plane in planes], dtype=_LENGTH)
        return (bytes_view(lengths), *planes)

    def _packed(self, plane: memoryview, dtype: DType, place: int) -> memoryview:
        sample = plane[:_SAMPLE_BYTES]
        is_noise = place < _NOISY.get(dtype, 0) and sample.nbytes < plane.nbytes and self._frames.pack(sample) is sample
        return plane if is_noise else self._frames.pack(plane)

    def decode(self, payload: memoryview, dtype: DType, shape: tuple[int, ...]) -> memoryview:
        start = dtype.itemsize * _LENGTH.itemsize
        if payload.nbytes < start:
            raise CodecError(f"planes_zstd payload of {payload.nbytes} bytes; the lengths of its planes alone take {start}")
        ends = start + np.cumsum(np.frombuffer(payload[:start], dtype=_LENGTH), dtype=np.uint64)
        if ends[-1] != payload.nbytes:
            raise CodecError(f"planes_zstd payload of {payload.nbytes} bytes, its planes say {ends[-1]}")
        count = nbytes_of(dtype, shape) // dtype.itemsize
        bounds = [start, *ends.tolist()]
        parts = [payload[begin:end] for begin, end in pairwise(bounds)]
        planes = [np.frombuffer(self._frames.unpack(part, count), dtype=np.uint8) for part in parts]
        return bytes_view(_merge(planes, dtype))


def _split(data: memoryview, dtype: DType) -> list[np.ndarray]:
    """The byte planes (uint8), least significant first. Shifts and narrowing casts: several times as fast as strided copies."""
    words = np.frombuffer(data, dtype=f"<u{dtype.itemsize}")
    if dtype in COMPILED and words.flags.aligned:
        return COMPILED[dtype].split(words)
    if dtype not in (DType.F32, DType.BF16):
        return [(words >> shift if shift else words).astype(np.uint8, copy=False) for shift in range(0, 8 * dtype.itemsize, 8)]
    high = (words >> 16).astype(np.uint16) if dtype is DType.F32 else words
    low = [words.astype(np.uint8), (words >> 8).astype(np.uint8)] if dtype is DType.F32 else []
    return [*low, (high << 1 | high >> 15).astype(np.uint8), (high >> 7).astype(np.uint8)]


def _merge(planes: Sequence[np.ndarray], dtype: DType) -> np.ndarray:
    """The words (unsigned, of the dtype's size) of these planes."""
    if dtype in COMPILED:
        return COMPILED[dtype].merge(planes, dtype)
    if dtype is DType.F32:
        return _join(_join(planes[0], planes[1]), _sign_first(planes[2], planes[3]))
    if dtype is DType.BF16:
        return _sign_first(*planes)
    parts = list(planes)
    while len(parts) > 1:
        parts = [_join(low, high) for low, high in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _join(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Words of twice the size out of their halves."""
    words = high.astype(f"<u{2 * high.itemsize}")
    words <<= 8 * high.itemsize
    words |= low
    return words


def _sign_first(mantissa_and_sign: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns: sign, exponent, mantissa."""
    tail = mantissa_and_sign.astype(np.uint16)
    words = exponent.astype(np.uint16)
    words <<= 7
    words |= tail >> 1
    words |= tail << 15
    return words
