"""Byte planes on a GPU, in Triton: planes split and joined in one pass, and chunks of planes packed into a payload.

The planes are those of planes.py: F32 and BF16 move the sign behind the exponent.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 2048
_LAYOUTS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


@triton.jit
def _split_kernel(words, planes, count, stride, LAYOUT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    blocks = (count + BLOCK - 1) // BLOCK  # of a row; one dimension, since only the first takes more than 65,535
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    word = tl.load(words + row * count + at, mask=inside, other=0).to(tl.int32)
    if LAYOUT == 2:
        base = planes + row * 4 * stride + at
        tl.store(base, (word & 0xFF).to(tl.uint8), mask=inside)
        tl.store(base + stride, ((word >> 8) & 0xFF).to(tl.uint8), mask=inside)
        base += 2 * stride
        word = word >> 16
    else:
        base = planes + row * 2 * stride + at
    half = word & 0xFFFF
    if LAYOUT == 0:
        tl.store(base, (half & 0xFF).to(tl.uint8), mask=inside)
        tl.store(base + stride, (half >> 8).to(tl.uint8), mask=inside)
    else:
        tl.store(base, (((half << 1) | (half >> 15)) & 0xFF).to(tl.uint8), mask=inside)
        tl.store(base + stride, ((half >> 7) & 0xFF).to(tl.uint8), mask=inside)


@triton.jit
def _join_kernel(planes, words, count, stride, LAYOUT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    base = planes + at
    if LAYOUT == 2:
        base += 2 * stride
    low = tl.load(base, mask=inside, other=0).to(tl.int32)
    high = tl.load(base + stride, mask=inside, other=0).to(tl.int32)
    half = low | (high << 8) if LAYOUT == 0 else ((low & 1) << 15) | (high << 7) | (low >> 1)
    if LAYOUT == 2:
        lowest = tl.load(planes + at, mask=inside, other=0).to(tl.int32)
        lower = tl.load(planes + stride + at, mask=inside, other=0).to(tl.int32)
        tl.store(words + at, (half << 16) | (lower << 8) | lowest, mask=inside)
    else:
        tl.store(words + at, half.to(tl.int16), mask=inside)


# The table's rows may begin at any address: one kernel serves all alignments, and the warm-up compiles it before any timed step.
@triton.jit(do_not_specialize_on_alignment=["froms", "tos", "lengths"])
def _move_kernel(source, target, froms, tos, lengths, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copies chunk by chunk in words of 4 bytes; offsets are in bytes, multiples of 16; the padding of a chunk to 16 bytes becomes 0."""
    chunk = tl.program_id(0)  # the only dimension of a grid that takes more than 65,535
    length = tl.load(lengths + chunk)
    begin, end = tl.load(froms + chunk) // 4, tl.load(tos + chunk) // 4
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.multiple_of((length + 15) // 16 * 4, 4)
    word = tl.load(source + tl.multiple_of(begin, 4) + at, mask=inside, other=0)
    left = length - 4 * at.to(tl.int64)  # bytes of the chunk from this word on
    kept = tl.where(left >= 4, -1, (1 << (8 * tl.minimum(tl.maximum(left, 0), 3)).to(tl.int32)) - 1)
    tl.store(target + tl.multiple_of(end, 4) + at, word & kept, mask=inside)


def split(rows: torch.Tensor, stride: int) -> torch.Tensor:
    """Byte planes (b, itemsize, stride), uint8, of b contiguous rows of floats (b, n), n <= stride; undefined beyond n."""
    size = rows.dtype.itemsize
    planes = torch.empty((len(rows), size, stride), dtype=torch.uint8, device=rows.device)
    words = rows.view(torch.int16 if size == 2 else torch.int32)
    grid = (triton.cdiv(rows.shape[1], _BLOCK) * len(rows),)
    _split_kernel[grid](words, planes, rows.shape[1], stride, LAYOUT=_LAYOUTS[rows.dtype], BLOCK=_BLOCK)
    return planes


def join(planes: torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor:
    """The floats (n,) of byte planes (itemsize, stride)."""
    size = dtype.itemsize
    words = torch.empty(count, dtype=torch.int16 if size == 2 else torch.int32, device=planes.device)
    _join_kernel[(triton.cdiv(count, _BLOCK),)](planes, words, count, planes.shape[1], LAYOUT=_LAYOUTS[dtype], BLOCK=_BLOCK)
    return words.view(dtype)


def move(source: torch.Tensor, target: torch.Tensor, froms: torch.Tensor, tos: torch.Tensor, lengths: torch.Tensor, longest: int) -> None:
    """Copies chunk i, `lengths[i]` <= `longest` bytes, from byte froms[i] of `source` to byte tos[i] of `target`.

    All offsets (i64) are multiples of 16; a chunk takes a multiple of 16 bytes, padded with zeros. `froms` may lead out of `source`, to
    other memory of the device.
    """
    if len(lengths):
        grid = (len(lengths), triton.cdiv(longest, 4 * _BLOCK))
        _move_kernel[grid](source.view(torch.int32), target.view(torch.int32), froms, tos, lengths, BLOCK=_BLOCK)
