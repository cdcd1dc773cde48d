"""Codecs int8 and int4 on a GPU, in torch, many tensors at a time; payloads are bitwise those of groups.py.

Each step is an operation of its own, in groups.py's order, and no divisor is a Python number: on a GPU torch multiplies by a number's
reciprocal, and fuses multiply and add if one operation does both. Either would change the last bits.
"""

from collections.abc import Iterator, Sequence
from math import prod

import torch

from semgap.codecs.base import CodecError, Payloads
from semgap.codecs.clock import Clock
from semgap.codecs.groups_format import GROUP, LARGEST, OUT_OF_RANGE
from semgap.tensors import DType

_LEAST_NEGATIVE = -32767  # 0x8001, the bits of fp16's negative number nearest to 0
_MINUS_ZERO = -32768  # 0x8000


def encode(kv: torch.Tensor, bits: int) -> Payloads:
    """The payloads of b tensors [b, layers, 2, heads, positions, head_dim]. CodecError for values out of range."""
    clock = Clock(kv.device)
    rows, fits = _encoded(kv, bits)
    clock.stop()
    if not fits.item():
        raise CodecError(OUT_OF_RANGE)
    return Payloads.of_rows(rows, clock.took_ns())


def _encoded(kv: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Payloads (b, n) uint8, and a flag (bool, []), true if all values are in range."""
    grids, codes = [], []
    fits = torch.ones((), dtype=torch.bool, device=kv.device)
    for values, axis in _sections(kv.float()):
        low, high = values.amin(axis, keepdim=True) + 0.0, values.amax(axis, keepdim=True) + 0.0
        fits = fits & (low.amin() >= -LARGEST) & (high.amax() <= LARGEST)  # NaN fails too
        zeros, scales = _grid(low, high, bits)
        grids += [_bytes(zeros), _bytes(scales)]
        codes.append(_quantise(values, zeros, scales, bits).flatten(1))
    empty = kv.new_empty((len(kv), 0), dtype=torch.uint8)
    return torch.cat([*grids, _pack(torch.cat([empty, *codes], dim=1), bits)], dim=1), fits


def decode_all(
    payloads: Sequence[torch.Tensor], shapes: Sequence[tuple[int, ...]], dtype: DType, bits: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The tensors of payloads (n,) uint8 of the right lengths, and a flag (bool, []), true if all are undamaged."""
    torch_dtype = getattr(torch, dtype.torch_name)
    decoded = [_decoded(payload, shape, torch_dtype, bits) for payload, shape in zip(payloads, shapes, strict=True)]
    return [value for value, _ in decoded], torch.stack([intact for _, intact in decoded]).all()


def _decoded(payload: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty(shape, dtype=torch.float32, device=payload.device)
    intact = torch.ones((), dtype=torch.bool, device=payload.device)
    sections = list(_sections(out[None]))
    sizes = [2 * values.numel() // values.shape[axis] for values, axis in sections]  # bytes of the zeros, and of the scales
    codes = _unpack(payload[2 * sum(sizes) :], prod(shape), bits)
    at, done = 0, 0
    for (values, axis), size in zip(sections, sizes, strict=True):
        grid = list(values.shape)
        grid[axis] = 1
        zeros, scales = (_halves(payload[begin : begin + size]).view(grid).float() for begin in (at, at + size))
        intact = intact & zeros.isfinite().all() & scales.isfinite().all()
        values.copy_(codes[done : done + values.numel()].view(values.shape))
        values.mul_(scales)
        values.add_(zeros)
        at, done = at + 2 * size, done + values.numel()
    if dtype is torch.float16:  # half a step beyond the largest value would round to infinity
        out.clamp_(-LARGEST, LARGEST)
    return out.to(dtype), intact


def _sections(kv: torch.Tensor) -> Iterator[tuple[torch.Tensor, int]]:
    """groups.py's sections of [b, layers, 2, heads, positions, head_dim], as views, and the axis along which each run is one group."""
    positions, head_dim = kv.shape[-2:]
    keys, values = kv[:, :, 0], kv[:, :, 1]
    whole, wide = positions - positions % GROUP, head_dim - head_dim % GROUP
    parts = (
        (keys[..., :whole, :].unflatten(-2, (whole // GROUP, GROUP)), -2),
        (keys[..., whole:, :], -2),
        (values[..., :wide].unflatten(-1, (wide // GROUP, GROUP)), -1),
        (values[..., wide:], -1),
    )
    return (part for part in parts if part[0].numel())


def _grid(low: torch.Tensor, high: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeros (fp16), rounded down, and scales (fp16), rounded up."""
    zeros = low.to(torch.float16)
    zeros = torch.where(zeros.float() > low, _below(zeros), zeros)
    ideal = (high - zeros.float()) / torch.full((), (1 << bits) - 1, dtype=torch.float32, device=low.device)
    scales = ideal.to(torch.float16)
    return zeros, torch.where(scales.float() < ideal, _above(scales), scales)


def _below(values: torch.Tensor) -> torch.Tensor:
    """The fp16 numbers next to fp16 `values` towards minus infinity."""
    bits = values.view(torch.int16)
    next_bits = torch.where(bits > 0, bits - 1, torch.where((bits == 0) | (bits == _MINUS_ZERO), _LEAST_NEGATIVE, bits + 1))
    return next_bits.to(torch.int16).view(torch.float16)


def _above(values: torch.Tensor) -> torch.Tensor:
    """The fp16 numbers next to fp16 `values` >= 0 towards infinity."""
    return (values.view(torch.int16) + 1).view(torch.float16)


def _quantise(values: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest code (uint8) of every value."""
    steps = scales.float()
    inverse = torch.where(steps > 0, torch.ones_like(steps) / steps, torch.zeros_like(steps))  # no step: all values are the zero
    scaled = values - zeros.float()
    scaled.mul_(inverse)
    return scaled.round_().clamp_(max=(1 << bits) - 1).to(torch.uint8)


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (b, n) as bytes, packed as in groups.py."""
    if bits == 8:
        return codes
    half = -(-codes.shape[1] // 2)
    packed = codes[:, :half].clone()
    packed[:, : codes.shape[1] - half] |= codes[:, half:] << 4
    return packed


def _unpack(packed: torch.Tensor, count: int, bits: int) -> torch.Tensor:
    if bits == 8:
        return packed
    return torch.cat([packed & 15, packed[: count - len(packed)] >> 4])


def _bytes(halves: torch.Tensor) -> torch.Tensor:
    """(b, bytes) of fp16 [b, ...]."""
    return halves.flatten(1).contiguous().view(torch.uint8)


def _halves(part: torch.Tensor) -> torch.Tensor:
    """The fp16 numbers of bytes at any alignment."""
    return part.clone().view(torch.float16)
