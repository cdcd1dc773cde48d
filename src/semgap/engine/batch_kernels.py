"""The kernels of a pass over rows of many requests, in Triton, beside those of kernels.py: a row is one token at one position.

Keys and values lie in the blocks of a pool, memory [blocks, layers, 2, kv_heads, 64, head_dim]. `state` [n, 2 + k], int64, says of each row
its token, its position, and the numbers of its request's blocks in the pool. A row at position -1 pads: it writes nothing into the pool,
reads nothing from it, and its attention is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from semgap.engine.kernels import _REGISTERS, _gelu, _launch, _rotated
from semgap.engine.rope import Rope
from semgap.kv.pool import BLOCK

_POSITIONS = 16  # keys and values that a program of the attention holds at a time; BLOCK is a multiple of it
_FEW_ROWS = 32
_MOST_PARTS = {True: 32, False: 4}  # of a head's positions, for few rows or not: many rows are programs enough without
_ELEMENTS = 1024


@triton.jit(do_not_specialize=["width", "layer"])
def _place(
    qkv, memory, state, cosines, sines, width, layer, ROW: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    LAYERS: tl.constexpr, POSITIONS: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes the key, rotated, and the value of one head of one row into the block of its position."""
    row, head = tl.program_id(0), tl.program_id(1)
    state += row * width
    position = tl.load(state + 1).to(tl.int32)
    at = tl.maximum(position, 0)
    d = tl.arange(0, BLOCK_D)
    given = qkv + row * ROW + (HEADS + head) * D
    key = _rotated(given, cosines + at * ROTARY, sines + at * ROTARY, d, D, ROTARY, INTERLEAVED)
    value = tl.load(given + KV_HEADS * D + d, mask=d < D, other=0.0)
    block = tl.load(state + 2 + at // POSITIONS)
    keys = memory + ((block * LAYERS + layer) * 2 * KV_HEADS + head) * (POSITIONS * D) + at % POSITIONS * D
    writes = (d < D) & (position >= 0)
    tl.store(keys + d, key.to(qkv.dtype.element_ty), mask=writes)
    tl.store(keys + KV_HEADS * POSITIONS * D + d, value, mask=writes)


@triton.jit(do_not_specialize=["width", "layer", "parts"])
def _attend_blocks(
    qkv, memory, state, cosines, sines, width, layer, sums, stats, scale, parts, length, ROW: tl.constexpr, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, D: tl.constexpr, LAYERS: tl.constexpr, POSITIONS: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One head's attention of one row over one of `parts` of `length` positions, up to its own; a part that begins later is left as it is.

    Parts begin at the same positions in all rows, and the first program id is the row's: programs that run at the same time read the same
    part, so a block that several requests hold comes from memory once and for the others from the cache. Results as of kernels._attend.
    """
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    state += row * width
    position = tl.load(state + 1).to(tl.int32)
    first = part * length
    if first <= position:
        d = tl.arange(0, BLOCK_D)
        in_head = d < D
        query = _rotated(qkv + row * ROW + head * D, cosines + position * ROTARY, sines + position * ROTARY, d, D, ROTARY, INTERLEAVED)
        top = tl.max(tl.full((BLOCK_P,), float("-inf"), tl.float32), 0)
        total = tl.sum(tl.zeros((BLOCK_P,), tl.float32), 0)
        sum_ = tl.zeros((BLOCK_D,), tl.float32)
        end = tl.minimum(first + length, position + 1)
        for start in range(first, end, BLOCK_P):
            block = tl.load(state + 2 + start // POSITIONS)
            at = ((block * LAYERS + layer) * 2 * KV_HEADS + head // (HEADS // KV_HEADS)) * (POSITIONS * D) + start % POSITIONS * D
            p = tl.arange(0, BLOCK_P)
            here = start + p < end
            keys = memory + at + p[:, None] * D + d[None, :]
            mask = here[:, None] & in_head[None, :]
            scores = tl.sum(tl.load(keys, mask=mask, other=0.0).to(tl.float32) * query[None, :], 1) * scale
            scores = tl.where(here, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 0))
            weights = tl.exp(scores - new_top)
            shrink = tl.exp(top - new_top)
            total = total * shrink + tl.sum(weights, 0)
            values = tl.load(keys + KV_HEADS * POSITIONS * D, mask=mask, other=0.0).to(tl.float32)
            sum_ = sum_ * shrink + tl.sum(weights[:, None] * values, 0)
            top = new_top
        index = (row * HEADS + head) * parts + part
        tl.store(sums + index * BLOCK_D + d, sum_)
        tl.store(stats + index * 2, top)
        tl.store(stats + index * 2 + 1, total)


@triton.jit(do_not_specialize=["width"])
def _combine_parts(
    sums, stats, state, out, width, length, HEADS: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Combines the parts of one head's attention of one row that its position reaches."""
    row, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(state + row * width + 1).to(tl.int32)
    part, d = tl.arange(0, PARTS), tl.arange(0, BLOCK_D)
    used = part * length <= position
    index = (row * HEADS + head) * PARTS + part
    tops = tl.load(stats + index * 2, mask=used, other=float("-inf"))
    top = tl.where(position < 0, 0.0, tl.max(tops, 0))
    weights = tl.exp(tops - top)
    total = tl.sum(weights * tl.load(stats + index * 2 + 1, mask=used, other=0.0), 0)
    parts = tl.load(sums + index[:, None] * BLOCK_D + d[None, :], mask=used[:, None], other=0.0)
    y = tl.sum(weights[:, None] * parts, 0) / tl.where(position < 0, 1.0, total)
    tl.store(out + (row * HEADS + head) * D + d, y.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def _activate(gate, fed, elements, GATED: tl.constexpr, BLOCK: tl.constexpr):
    """fed = silu(gate) * fed, or gelu_new(fed). In place."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < elements
    y = tl.load(fed + i, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        g = tl.load(gate + i, mask=inside, other=0.0).to(tl.float32)
        y = g * tl.sigmoid(g) * y
    else:
        y = _gelu(y)
    tl.store(fed + i, y.to(fed.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Parts:
    """How the positions of a row are cut: into `count` parts, a power of two, of `positions` each, a multiple of BLOCK."""

    count: int
    positions: int

    @classmethod
    def of(cls, rows: int, max_length: int) -> Parts:
        """A part a block while the rows are few, up to 32 parts; 4 parts of many rows, in as much scratch memory."""
        blocks = triton.cdiv(max_length, BLOCK)
        count = min(triton.next_power_of_2(blocks), _MOST_PARTS[rows <= _FEW_ROWS])
        return cls(count, triton.cdiv(blocks, count) * BLOCK)


def attend(
    qkv: torch.Tensor, memory: torch.Tensor, layer: int, state: torch.Tensor, rope: Rope | None, scale: float, sums: torch.Tensor,
    stats: torch.Tensor, parts: Parts, out: torch.Tensor,
) -> None:  # fmt: skip
    """out [n, heads * head_dim] = attention of each row over the positions up to its own; its key and value go into its block before.

    qkv [n, (heads + 2 kv_heads) head_dim] holds query, key and value of a row back to back. `memory` and `state` as above; rows of one
    request may stand in one pass. `sums` and `stats`, float32, are scratch: room for [n, heads, parts.count, head_dim's next power of 2],
    and for [n, heads, parts.count, 2].
    """
    _, layers, _, kv_heads, _, head_dim = memory.shape
    rows, heads, block_d = len(qkv), out.shape[-1] // head_dim, triton.next_power_of_2(head_dim)
    cosines, sines = (rope.cosines, rope.sines) if rope else (sums, sums)
    rotary, interleaved = (rope.cosines.shape[1], rope.interleaved) if rope else (0, False)
    sizes = {"ROW": qkv.stride(0), "HEADS": heads, "KV_HEADS": kv_heads, "D": head_dim, "LAYERS": layers, "POSITIONS": BLOCK}
    sizes |= {"ROTARY": rotary, "INTERLEAVED": interleaved, "BLOCK_D": block_d}
    given = qkv, memory, state, cosines, sines, state.shape[1], layer
    _launch(_place, (rows, kv_heads), *given, **sizes, num_warps=1)
    _launch(_attend_blocks, (rows, heads, parts.count),
        *given, sums, stats, scale, parts.count, parts.positions, **sizes, BLOCK_P=_POSITIONS, maxnreg=_REGISTERS,
    )  # fmt: skip
    _launch(_combine_parts, (rows, heads),
        sums, stats, state, out, state.shape[1], parts.positions, HEADS=heads, D=head_dim, PARTS=parts.count, BLOCK_D=block_d,
    )  # fmt: skip


def activate(fed: torch.Tensor, gate: torch.Tensor | None = None) -> None:
    """fed = silu(gate) * fed, or gelu_new(fed) without a gate, element by element. In place; both contiguous."""
    grid = (triton.cdiv(fed.numel(), _ELEMENTS),)
    _launch(_activate, grid, fed if gate is None else gate, fed, fed.numel(), GATED=gate is not None, BLOCK=_ELEMENTS)
