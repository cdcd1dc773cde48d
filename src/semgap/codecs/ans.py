"""Byte planes split on the GPU, then nvCOMP's ANS: lossless at more than 100 GB/s, for whoever has a GPU at both ends."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from semgap.codecs.base import Codec, CodecError
from semgap.tensors import DType, Tensor, TensorClass, bytes_view

if TYPE_CHECKING:
    import torch

Bytes = TypeVar("Bytes", int, np.ndarray, "torch.Tensor")

CHUNK = 1 << 16  # bytes of a plane that are coded together; what nvCOMP is at its best with
ALIGNMENT = 16  # of each chunk within a payload, which nvCOMP asks for
_LENGTH = np.dtype("<u4")
EXTRA = "pip install 'semgap[gpu]'"


class NvcompAns(Codec):
    """The byte planes of `planes_zstd`, each in chunks of 64 KiB through nvCOMP's rANS; a chunk that does not shrink is stored.

    Exact, for floats. 1.40x on a bf16 KV cache. Needs torch with CUDA, Triton and nvCOMP 6 to encode and to decode.
    Payload: a length (u32) per chunk, plane by plane, least significant first, then zeros up to a multiple of 16; then the chunks, each
    with zeros up to a multiple of 16. A chunk as long as what it holds is stored. Damage gives a CodecError or other values, never
    another size.
    """

    name, code, exact = "nvcomp_ans", 9, True
    accepts = frozenset({TensorClass.WEIGHTS, TensorClass.LOGITS, TensorClass.HIDDEN, TensorClass.KV})
    on_device = needs_gpu = True

    def unavailable(self) -> str | None:
        return _unavailable()

    def encode(self, tensor: Tensor) -> Sequence[memoryview]:
        self._require(tensor.dtype)
        from semgap.codecs import device

        return device.encode_host(tensor, self)

    def decode(self, payload: memoryview, dtype: DType, shape: tuple[int, ...]) -> memoryview:
        chunk_lengths(payload, dtype, shape)  # what is wrong with the payload itself comes first
        self._require(dtype)
        from semgap.codecs import device

        return device.decode_host(payload, dtype, shape, self)

    def _require(self, dtype: DType) -> None:
        check_dtype(dtype)
        reason = _unavailable()
        if reason:
            raise CodecError(f"codec 'nvcomp_ans' cannot be used here: {reason}")


def check_dtype(dtype: DType) -> None:
    """CodecError for anything but floats."""
    if not dtype.is_float:
        raise CodecError(f"codec 'nvcomp_ans' takes floats, and the tensor is {dtype.name}; use codec zstd or raw")


def chunk_sizes(dtype: DType, shape: tuple[int, ...]) -> np.ndarray:
    """Bytes (int64) that each chunk of a tensor holds, plane by plane."""
    count = prod(shape)
    whole, rest = divmod(count, CHUNK)
    plane = np.array([CHUNK] * whole + [rest] * (rest > 0), dtype=np.int64)
    return np.tile(plane, dtype.itemsize)


def padded(nbytes: Bytes) -> Bytes:
    """Rounded up to ALIGNMENT."""
    return (nbytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def heads_of(lengths: np.ndarray) -> list[memoryview]:
    """What payloads begin with, by [payloads, chunks] of their chunks' lengths: these, padded."""
    payloads, chunks = lengths.shape
    heads = np.zeros((payloads, padded(chunks * _LENGTH.itemsize) // _LENGTH.itemsize), dtype=_LENGTH)
    heads[:, :chunks] = lengths
    joined, each = bytes_view(heads), heads.shape[1] * _LENGTH.itemsize
    return [joined[start : start + each] for start in range(0, joined.nbytes, each)]


def chunk_lengths(payload: memoryview, dtype: DType, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(lengths, offsets) of the chunks in a payload, int64. CodecError where they cannot be."""
    check_dtype(dtype)
    sizes = chunk_sizes(dtype, shape)
    start = padded(sizes.size * _LENGTH.itemsize)
    if payload.nbytes < start:
        raise CodecError(f"nvcomp_ans payload of {payload.nbytes} bytes; the lengths of its chunks alone take {start}")
    lengths = np.frombuffer(payload[: sizes.size * _LENGTH.itemsize], dtype=_LENGTH).astype(np.int64)
    if (lengths > sizes).any() or (lengths == 0).any():
        raise CodecError("nvcomp_ans payload is damaged: a chunk is empty, or longer than what it holds")
    ends = start + np.cumsum(padded(lengths))
    expected = int(ends[-1]) if ends.size else start
    if payload.nbytes != expected:
        raise CodecError(f"nvcomp_ans payload of {payload.nbytes} bytes, its chunks say {expected}")
    return lengths, ends - padded(lengths)


def _unavailable() -> str | None:
    """Why this process can neither encode nor decode: what is missing, and how to get it. Imports torch."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return "there is no usable GPU"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton, which comes with torch for CUDA, is not installed"
    from semgap.codecs import nvcomp

    try:
        nvcomp.library()
    except ImportError:
        return f"nvCOMP is not installed; {EXTRA}"
    except OSError as error:
        return f"nvCOMP cannot be loaded: {error}"
    except CodecError as error:
        return f"{error}; {EXTRA}"
    return None
