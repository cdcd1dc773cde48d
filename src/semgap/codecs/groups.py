"""Codecs int8 and int4: KV caches in few bits, keys per channel, values per token, in small groups with a scale and a zero each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from semgap.codecs.base import Codec, CodecError, Payloads
from semgap.codecs.cast import from_float32
from semgap.codecs.groups_format import GROUP, HALF, LARGEST, OUT_OF_RANGE, check_payload, check_shape
from semgap.tensors import DType, Tensor, TensorClass, bytes_view

if TYPE_CHECKING:
    import torch

_CHANNEL_AXIS, _POSITION_AXIS = -1, -2


class Groups(Codec):
    """Asymmetric integers for KV tensors [layers, 2, heads, positions, head_dim], where index 0 is keys and 1 values.

    The scheme of KIVI (Liu et al., ICML 2024, arXiv:2402.02750): keys have outlying channels, so a key group is one channel over 32
    positions; a value group is one position over 32 channels. The remainder, positions % 32 or head_dim % 32, forms shorter groups,
    which pay the same 4 bytes for scale and zero (KIVI keeps the newest keys in full precision instead): a cache of very few positions
    does not shrink.
    A value decodes to zero + code x scale; both are fp16, the zero rounded down and the scale up, so that the largest error is half a
    step of the stored scale, plus the rounding of the tensor's own dtype.
    Payload: per section (keys, their rest, values, their rest) zeros, scales; then all codes. CodecError for another shape,
    for integers, and for values that are not finite or beyond fp16's +-65504.
    """

    bits: ClassVar[int]
    exact, on_device = False, True
    accepts = frozenset({TensorClass.KV})

    def encode(self, tensor: Tensor) -> Sequence[memoryview]:
        check_shape(self.name, tensor.dtype, tensor.shape)
        codes = np.empty(prod(tensor.shape), dtype=np.uint8)
        buffers, done = [], 0
        for section in _sections(tensor.as_float32()):
            zeros, scales = _grid(section, self.bits)
            buffers += [bytes_view(zeros), bytes_view(scales)]
            _quantise(section, zeros, scales, codes[done : done + section.values.size], self.bits)
            done += section.values.size
        return (*buffers, bytes_view(self._pack(codes)))

    def decode(self, payload: memoryview, dtype: DType, shape: tuple[int, ...]) -> memoryview:
        check_payload(self.name, self.bits, payload.nbytes, dtype, shape)
        out = np.empty(shape, dtype=np.float32)
        sections = list(_sections(out))
        start = sum([2 * section.grid_bytes for section in sections])
        codes = self._unpack(np.frombuffer(payload[start:], dtype=np.uint8), out.size)
        at, done = 0, 0
        for section in sections:
            zeros = _finite(payload[at : at + section.grid_bytes], section)
            scales = _finite(payload[at + section.grid_bytes : at + 2 * section.grid_bytes], section)
            np.multiply(codes[done : done + section.values.size].reshape(section.values.shape), scales, out=section.values)
            np.add(section.values, zeros, out=section.values)
            at, done = at + 2 * section.grid_bytes, done + section.values.size
        if dtype is DType.F16:  # half a step beyond the largest value would round to infinity
            np.clip(out, -LARGEST, LARGEST, out=out)
        return from_float32(out, dtype)

    def encode_on_device(self, tensors: torch.Tensor, dtype: DType) -> Payloads:
        from semgap.codecs import device_groups

        check_shape(self.name, dtype, tuple(tensors.shape[1:]))
        return device_groups.encode(tensors, self.bits)

    def decode_on_device(
        self, payloads: Sequence[torch.Tensor], hosts: Sequence[memoryview], dtype: DType, shapes: Sequence[tuple[int, ...]]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        from semgap.codecs import device_groups

        for host, shape in zip(hosts, shapes, strict=True):
            check_payload(self.name, self.bits, host.nbytes, dtype, shape)
        return device_groups.decode_all(payloads, shapes, dtype, self.bits)

    def _pack(self, codes: np.ndarray) -> np.ndarray:
        """Codes (n,) as bytes; below 8 bits, byte i of n holds code i and, shifted by 4, code i + n."""
        if self.bits == 8:
            return codes
        half = -(-codes.size // 2)
        packed = codes[:half].copy()
        packed[: codes.size - half] |= codes[half:] << 4
        return packed

    def _unpack(self, packed: np.ndarray, count: int) -> np.ndarray:
        if self.bits == 8:
            return packed
        codes = np.empty(count, dtype=np.uint8)
        np.bitwise_and(packed, 15, out=codes[: packed.size])
        np.right_shift(packed[: count - packed.size], 4, out=codes[packed.size :])
        return codes


class Int8(Groups):
    """256 steps per group; see Groups. Lossy: KL of the next token 2e-5 on SmolLM2 (3 texts, 128 and 140 positions)."""

    name, code, bits = "int8", 6, 8


class Int4(Groups):
    """16 steps per group; see Groups. Lossy: KL of the next token 5e-3 on SmolLM2 (the same)."""

    name, code, bits = "int4", 7, 4


@dataclass(frozen=True, slots=True)
class _Section:
    """A view of a part of a KV array; each run along `axis` is one group."""

    values: np.ndarray
    axis: int

    @property
    def grid_shape(self) -> tuple[int, ...]:
        """Shape of the section's zeros, and of its scales; broadcasts against `values`."""
        shape = list(self.values.shape)
        shape[self.axis] = 1
        return tuple(shape)

    @property
    def grid_bytes(self) -> int:
        return HALF.itemsize * prod(self.grid_shape)


def _sections(kv: np.ndarray) -> Iterator[_Section]:
    """Keys in whole groups, their remaining positions, values in whole groups, their remaining channels; without empty sections."""
    layers, _, heads, positions, head_dim = kv.shape
    keys, values = kv[:, 0], kv[:, 1]
    whole, wide = positions - positions % GROUP, head_dim - head_dim % GROUP
    # Splitting an axis never copies: these are views of `kv`, which encoding reads and decoding writes.
    parts = (
        _Section(keys[..., :whole, :].reshape(layers, heads, whole // GROUP, GROUP, head_dim), _POSITION_AXIS),
        _Section(keys[..., whole:, :], _POSITION_AXIS),
        _Section(values[..., :wide].reshape(layers, heads, positions, wide // GROUP, GROUP), _CHANNEL_AXIS),
        _Section(values[..., wide:], _CHANNEL_AXIS),
    )
    return (part for part in parts if part.values.size)


def _grid(section: _Section, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Zeros and scales (fp16) such that zero <= value <= zero + (2^bits - 1) x scale for every value of a group."""
    low = section.values.min(axis=section.axis, keepdims=True) + np.float32(0)  # -0 becomes 0: which of the two is the least is chance
    high = section.values.max(axis=section.axis, keepdims=True) + np.float32(0)
    if not (low.min() >= -LARGEST and high.max() <= LARGEST):  # NaN fails too
        raise CodecError(OUT_OF_RANGE)
    zeros = low.astype(HALF)
    with np.errstate(over="ignore"):  # computes the neighbour of -65504 too, even if it is not used
        zeros = np.where(zeros > low, np.nextafter(zeros, HALF.type(-np.inf)), zeros)
    ideal = (high - zeros) / np.float32((1 << bits) - 1)
    scales = ideal.astype(HALF)
    scales = np.where(scales < ideal, np.nextafter(scales, HALF.type(np.inf)), scales)
    return zeros, scales


def _quantise(section: _Section, zeros: np.ndarray, scales: np.ndarray, codes: np.ndarray, bits: int) -> None:
    """Writes the nearest code of every value into `codes` (n,)."""
    steps = scales.astype(np.float32)
    inverse = np.divide(1, steps, out=np.zeros_like(steps), where=steps > 0)  # no step: all values are the zero
    scaled = section.values - zeros.astype(np.float32)
    scaled *= inverse
    np.rint(scaled, out=scaled)
    np.minimum(scaled, np.float32((1 << bits) - 1), out=scaled)
    codes.reshape(scaled.shape)[...] = scaled


def _finite(part: memoryview, section: _Section) -> np.ndarray:
    numbers = np.frombuffer(part, dtype=HALF).reshape(section.grid_shape).astype(np.float32)
    if not np.isfinite(numbers).all():
        raise CodecError("a quantised KV payload is damaged: a group's zero or scale is not finite")
    return numbers
