"""The payload of codec nvcomp_ans: the chunks of a tensor's planes, and their places in a payload.

A payload is a length (u32) per chunk, plane by plane, least significant first, then zeros up to a multiple of 16; then the chunks, each
with zeros up to a multiple of 16. A chunk as long as its content is stored.
"""

from math import prod
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from semgap.codecs.base import CodecError
from semgap.tensors import DType, bytes_view

if TYPE_CHECKING:
    import torch

Bytes = TypeVar("Bytes", int, np.ndarray, "torch.Tensor")
CHUNK = 1 << 16  # bytes of a plane that are coded together; nvCOMP's best size
ALIGNMENT = 16  # of each chunk within a payload; nvCOMP requires it
_LENGTH = np.dtype("<u4")


def check_dtype(dtype: DType) -> None:
    """CodecError for anything but floats."""
    if not dtype.is_float:
        raise CodecError(f"codec 'nvcomp_ans' takes floats, and the tensor is {dtype.name}; use codec zstd or raw")


def chunk_sizes(dtype: DType, shape: tuple[int, ...]) -> np.ndarray:
    """Content bytes (int64) of each chunk of a tensor, plane by plane."""
    whole, rest = divmod(prod(shape), CHUNK)
    plane = np.array([CHUNK] * whole + [rest] * (rest > 0), dtype=np.int64)
    return np.tile(plane, dtype.itemsize)


def padded(nbytes: Bytes) -> Bytes:
    """Rounded up to ALIGNMENT."""
    return (nbytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def heads_of(lengths: np.ndarray) -> list[memoryview]:
    """The heads of payloads: `lengths` [payloads, chunks] of their chunks, padded."""
    payloads, chunks = lengths.shape
    heads = np.zeros((payloads, padded(chunks * _LENGTH.itemsize) // _LENGTH.itemsize), dtype=_LENGTH)
    heads[:, :chunks] = lengths
    joined, each = bytes_view(heads), heads.shape[1] * _LENGTH.itemsize
    return [joined[start : start + each] for start in range(0, joined.nbytes, each)]


def chunk_lengths(payload: memoryview, dtype: DType, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(lengths, offsets) of the chunks in a payload, int64. CodecError if the payload cannot be the tensor's."""
    check_dtype(dtype)
    sizes = chunk_sizes(dtype, shape)
    start = padded(sizes.size * _LENGTH.itemsize)
    if payload.nbytes < start:
        raise CodecError(f"nvcomp_ans payload of {payload.nbytes} bytes; the lengths of its chunks alone take {start}")
    lengths = np.frombuffer(payload[: sizes.size * _LENGTH.itemsize], dtype=_LENGTH).astype(np.int64)
    if (lengths > sizes).any() or (lengths == 0).any():
        raise CodecError("nvcomp_ans payload is damaged: a chunk is empty, or longer than its content")
    ends = start + np.cumsum(padded(lengths))
    expected = int(ends[-1]) if ends.size else start
    if payload.nbytes != expected:
        raise CodecError(f"nvcomp_ans payload of {payload.nbytes} bytes, its chunks say {expected}")
    return lengths, ends - padded(lengths)
