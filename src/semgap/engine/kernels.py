"""The kernels of one decode step, batch 1, in Triton: every product is a matrix-vector product, bound by memory bandwidth.

Sums are float32, in a fixed order: the same input gives bitwise the same output, whichever graph or process launches the kernel.
A kernel rounds its results to the dtype of the output tensor. TRITON_INTERPRET=1, set before this module is imported, runs the kernels
on the CPU.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from semgap.engine.decoder_weights import Linear, Norm
from semgap.engine.rope import Rope
from semgap.engine.side_by_side import compiling_threads

if "SEMGAP_KERNEL_CACHE" in os.environ:  # else Triton keeps them in ~/.triton/cache
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(os.environ["SEMGAP_KERNEL_CACHE"]) / "triton"))
_REGISTERS = 128


@dataclass(frozen=True)
class Tile:
    """The outputs and inputs of a product that one program holds at a time, the warps that share them, and the registers that a thread
    may take (None: as many as ptxas likes)."""

    rows: int
    columns: int
    warps: int
    registers: int | None = _REGISTERS


# In half precision each thread has 4 loads of 16 B of a weight on their way at a time. Left alone, ptxas takes fewer registers, and loads
# wait for each other: docs/gpu.md has every kernel with and without the bound. A merge has few rows and many columns. Its programs are
# smaller, so that all run at once and none runs alone at the end.
TILES = {"project": Tile(4, 1024, 4), "merge": Tile(4, 512, 2), "transposed": Tile(16, 256, 4), "transposed_merge": Tile(8, 512, 4)}
_POSITIONS = 16  # keys and values that a program of the attention holds at a time
_MAX_SPLITS = 16
_compiles_only = ContextVar("compiles_only", default=False)


@triton.jit
def _dot(x, weight, first, rows, K: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows first..first+BLOCK_N of [rows, K] (or of [K, rows], transposed) times x (K,): float32 (BLOCK_N,)."""
    n = first + tl.arange(0, BLOCK_N)
    inside = n < rows
    # If ptxas knows the number of turns, it unrolls loops; float32 then spills. The second program id is 0, which ptxas does not know.
    begin = tl.program_id(1) * BLOCK_K if weight.dtype.element_ty.primitive_bitwidth > 16 else 0
    if TRANSPOSED:
        sums = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
        for start in range(begin, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            given = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
            offsets = k.to(tl.int64)[:, None] * rows + n[None, :]
            held = tl.load(weight + offsets, mask=(k < K)[:, None] & inside[None, :], other=0.0, eviction_policy="evict_first")
            sums += held.to(tl.float32) * given[:, None]
        return tl.sum(sums, 0)
    else:
        sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        offsets = n.to(tl.int64)[:, None] * K + tl.arange(0, BLOCK_K)[None, :]
        for start in range(begin, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            if K % BLOCK_K == 0:
                given = tl.load(x + k).to(tl.float32)
                held = tl.load(weight + offsets + start, mask=inside[:, None], other=0.0, eviction_policy="evict_first")
            else:
                given = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
                mask = inside[:, None] & (k < K)[None, :]
                held = tl.load(weight + offsets + start, mask=mask, other=0.0, eviction_policy="evict_first")
            sums += held.to(tl.float32) * given[None, :]
        return tl.sum(sums, 1)


@triton.jit
def _gelu(x):
    """The tanh form (Hendrycks and Gimpel, 2016), which transformers calls gelu_new: 0.5 (1 + tanh(u)) is sigmoid(2u)."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _project(
    x, weight, bias, out,
    weight1: tl.int64, weight2: tl.int64, weight3: tl.int64, bias1: tl.int64, bias2: tl.int64, bias3: tl.int64,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, K: tl.constexpr,
    HAS_BIAS: tl.constexpr, GELU_FROM: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Up to four weights times one x, results back to back. weight1..3, bias1..3: distances of the others from the first, in elements."""
    program = tl.program_id(0)
    B0: tl.constexpr = (N0 + BLOCK_N - 1) // BLOCK_N
    B1: tl.constexpr = (N1 + BLOCK_N - 1) // BLOCK_N
    B2: tl.constexpr = (N2 + BLOCK_N - 1) // BLOCK_N
    second, third, fourth = program >= B0, program >= B0 + B1, program >= B0 + B1 + B2
    from_weight = tl.where(fourth, weight3, tl.where(third, weight2, tl.where(second, weight1, 0)))
    from_bias = tl.where(fourth, bias3, tl.where(third, bias2, tl.where(second, bias1, 0)))
    block = program - tl.where(fourth, B0 + B1 + B2, tl.where(third, B0 + B1, tl.where(second, B0, 0)))
    before = tl.where(fourth, N0 + N1 + N2, tl.where(third, N0 + N1, tl.where(second, N0, 0)))
    rows = tl.where(fourth, N3, tl.where(third, N2, tl.where(second, N1, N0)))
    y = _dot(x, weight + from_weight, block * BLOCK_N, rows, K, TRANSPOSED, BLOCK_N, BLOCK_K)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        y += tl.load(bias + from_bias + n, mask=n < rows, other=0.0).to(tl.float32)
    y = tl.where(program >= GELU_FROM, _gelu(y), y)
    tl.store(out + before + n, y.to(out.dtype.element_ty), mask=n < rows)


@triton.jit
def _gate(
    x, gate, up, gate_bias, up_bias, out, N: tl.constexpr, K: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """silu(gate x) * (up x)."""
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    g = _dot(x, gate, first, N, K, False, BLOCK_N, BLOCK_K)
    u = _dot(x, up, first, N, K, False, BLOCK_N, BLOCK_K)
    if HAS_BIAS:
        g += tl.load(gate_bias + n, mask=n < N, other=0.0).to(tl.float32)
        u += tl.load(up_bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + n, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=n < N)


@triton.jit
def _merge(
    residual, x1, weight1, bias1, x2, weight2, bias2, N: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    HAS_BIAS1: tl.constexpr, HAS_BIAS2: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """residual += weight1 x1 + bias1, and weight2 x2 + bias2 if K2 > 0."""
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    y = _dot(x1, weight1, first, N, K1, TRANSPOSED, BLOCK_N, BLOCK_K)
    if HAS_BIAS1:
        y += tl.load(bias1 + n, mask=n < N, other=0.0).to(tl.float32)
    if K2:
        y += _dot(x2, weight2, first, N, K2, TRANSPOSED, BLOCK_N, BLOCK_K)
    if HAS_BIAS2:
        y += tl.load(bias2 + n, mask=n < N, other=0.0).to(tl.float32)
    y += tl.load(residual + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(residual + n, y.to(residual.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["width"])
def _embed(state, tokens, positions, out, width, H: tl.constexpr, HAS_POSITIONS: tl.constexpr, BLOCK: tl.constexpr):
    """The embedding of the token of one row of `state`, plus the learnt embedding of its position, if any; of 0 for position -1."""
    row = tl.program_id(1)
    state += row * width
    h = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(tokens + tl.load(state) * H + h, mask=h < H, other=0.0)
    if HAS_POSITIONS:
        x += tl.load(positions + tl.maximum(tl.load(state + 1), 0) * H + h, mask=h < H, other=0.0)
    tl.store(out + row * H + h, x, mask=h < H)


@triton.jit
def _norm(x, weight, bias, added, out, eps, H: tl.constexpr, RMS: tl.constexpr, HAS_ADDED: tl.constexpr, BLOCK: tl.constexpr):
    """LayerNorm, or RMSNorm, of one row; `added` is added to x before, in place."""
    x += tl.program_id(0) * H
    out += tl.program_id(0) * H
    h = tl.arange(0, BLOCK)
    inside = h < H
    given = tl.load(x + h, mask=inside, other=0.0).to(tl.float32)
    if HAS_ADDED:
        sum_ = (given + tl.load(added + h, mask=inside, other=0.0).to(tl.float32)).to(x.dtype.element_ty)
        tl.store(x + h, sum_, mask=inside)
        given = sum_.to(tl.float32)
    scale = tl.load(weight + h, mask=inside, other=0.0).to(tl.float32)
    if RMS:
        spread = tl.sum(given * given, 0) / H
        y = (given * tl.rsqrt(spread + eps)).to(out.dtype.element_ty).to(tl.float32) * scale
    else:
        centred = tl.where(inside, given - tl.sum(given, 0) / H, 0.0)
        spread = tl.sum(centred * centred, 0) / H
        y = centred * tl.rsqrt(spread + eps) * scale + tl.load(bias + h, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + h, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_heads(qkv, query_weight, key_weight, eps, HEADS: tl.constexpr, D: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr):
    """RMSNorm of one head of query or key of one row, in place."""
    head, d = tl.program_id(0), tl.arange(0, BLOCK)
    qkv += tl.program_id(1) * ROW
    inside = d < D
    given = tl.load(qkv + head * D + d, mask=inside, other=0.0).to(tl.float32)
    query_scale = tl.load(query_weight + d, mask=inside, other=0.0).to(tl.float32)
    key_scale = tl.load(key_weight + d, mask=inside, other=0.0).to(tl.float32)
    scale = tl.where(head < HEADS, query_scale, key_scale)
    spread = tl.sum(given * given, 0) / D
    y = (given * tl.rsqrt(spread + eps)).to(qkv.dtype.element_ty).to(tl.float32) * scale
    tl.store(qkv + head * D + d, y.to(qkv.dtype.element_ty), mask=inside)


@triton.jit
def _rotated(vector, cosines, sines, d, D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """A head's vector (D,) with rotary position embedding on its first ROTARY dims; float32, rounded to the vector's dtype."""
    x = tl.load(vector + d, mask=d < D, other=0.0).to(tl.float32)
    if ROTARY:
        turns = d < ROTARY
        if INTERLEAVED:
            lower, partner = d % 2 == 0, d ^ 1
        else:
            lower = d < ROTARY // 2
            partner = tl.where(lower, d + ROTARY // 2, d - ROTARY // 2)
        y = tl.load(vector + partner, mask=turns, other=0.0).to(tl.float32)
        cosine = tl.load(cosines + d, mask=turns, other=1.0)
        sine = tl.load(sines + d, mask=turns, other=0.0)
        x = x * cosine + tl.where(lower, -y, y) * sine
    return x.to(vector.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=["layer"])
def _attend(
    qkv, slabs, state, cosines, sines, sums, stats, scale, layer,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, MAX_LENGTH: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr, SPLITS: tl.constexpr, UNIT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One head's attention over one part of the earlier positions; the first part includes this position, and writes it to the slab.

    A slab is [K, V][KV_HEADS, MAX_LENGTH, D]; `slabs` [layers] holds its distance from qkv in units of UNIT elements. Gives the part's
    weighted sum of values, unnormalised, its largest score and the sum of its weights (Milakov and Gimelshein, 2018, arXiv:1805.02867).
    """
    head, split = tl.program_id(0), tl.program_id(1)
    kv_head = head // (HEADS // KV_HEADS)
    position = tl.load(state + 1)
    keys = qkv + tl.load(slabs + layer) * UNIT + kv_head * (MAX_LENGTH * D)
    values = keys + KV_HEADS * MAX_LENGTH * D
    d = tl.arange(0, BLOCK_D)
    in_head = d < D
    cosines += position * ROTARY
    sines += position * ROTARY
    query = _rotated(qkv + head * D, cosines, sines, d, D, ROTARY, INTERLEAVED)
    key = _rotated(qkv + (HEADS + kv_head) * D, cosines, sines, d, D, ROTARY, INTERLEAVED)
    value = tl.load(qkv + (HEADS + KV_HEADS + kv_head) * D + d, mask=in_head, other=0.0).to(tl.float32)
    has_this = split == 0
    writes = in_head & has_this & (head % (HEADS // KV_HEADS) == 0)
    tl.store(keys + position * D + d, key.to(qkv.dtype.element_ty), mask=writes)
    tl.store(values + position * D + d, value.to(qkv.dtype.element_ty), mask=writes)
    top = tl.where(has_this, tl.sum(query * key, 0) * scale, float("-inf"))
    total = tl.where(has_this, 1.0, 0.0)
    sum_ = tl.where(has_this, value, 0.0)
    part = ((position + SPLITS - 1) // SPLITS + BLOCK_P - 1) // BLOCK_P * BLOCK_P
    end = tl.minimum((split + 1) * part, position)
    for start in range(split * part, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        here = p < end
        offsets = p[:, None] * D + d[None, :]
        mask = here[:, None] & in_head[None, :]
        scores = tl.sum(tl.load(keys + offsets, mask=mask, other=0.0).to(tl.float32) * query[None, :], 1) * scale
        scores = tl.where(here, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 0))
        weights = tl.exp(scores - new_top)
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(weights, 0)
        sum_ = sum_ * shrink + tl.sum(weights[:, None] * tl.load(values + offsets, mask=mask, other=0.0).to(tl.float32), 0)
        top = new_top
    part_index = head * SPLITS + split
    tl.store(sums + part_index * BLOCK_D + d, sum_)
    tl.store(stats + part_index * 2, top)
    tl.store(stats + part_index * 2 + 1, total)


@triton.jit
def _combine(sums, stats, out, D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Combines the parts of one head's attention."""
    head = tl.program_id(0)
    d, parts = tl.arange(0, BLOCK_D), head * SPLITS + tl.arange(0, SPLITS)
    tops = tl.load(stats + parts * 2)
    weights = tl.exp(tops - tl.max(tops, 0))
    total = tl.sum(weights * tl.load(stats + parts * 2 + 1), 0)
    y = tl.sum(weights[:, None] * tl.load(sums + parts[:, None] * BLOCK_D + d[None, :]), 0) / total
    tl.store(out + head * D + d, y.to(out.dtype.element_ty), mask=d < D)


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    kernel.run(*args, grid=grid, warmup=_compiles_only.get(), **options)


@contextlib.contextmanager
def compiled_side_by_side() -> Iterator[None]:
    """Launches within only compile their kernels, with their launchers, and run nothing. The end waits for all of them."""
    token = _compiles_only.set(True)
    try:
        with compiling_threads():
            yield
    finally:
        _compiles_only.reset(token)


def splits_for(max_length: int) -> int:
    """The parts of a head's attention: one for each 64 positions, up to 16."""
    return min(_MAX_SPLITS, triton.next_power_of_2(max(1, max_length // 64)))


def project(x: torch.Tensor, linears: Sequence[Linear], out: torch.Tensor, gelu_last: bool = False) -> None:
    """out = the products of up to four linears with x (K,), back to back, in one launch; `gelu_last` applies gelu_new to the last product.

    ValueError if some linears have a bias and others have none.
    """
    first, rows = linears[0], [linear.rows for linear in linears] + [0] * (4 - len(linears))
    biases = [linear.bias for linear in linears if linear.bias is not None]
    if biases and len(biases) != len(linears):
        raise ValueError(f"{len(biases)} of {len(linears)} linears have a bias; give the others one of zeros")
    tile = TILES["transposed" if first.transposed else "project"]
    programs = [triton.cdiv(n, tile.rows) for n in rows]
    _launch(_project, (sum(programs),),
        x, first.weight, biases[0] if biases else x, out, *_distances([linear.weight for linear in linears]), *_distances(biases),
        *rows, first.columns, HAS_BIAS=bool(biases), GELU_FROM=sum(programs[: len(linears) - gelu_last]),
        TRANSPOSED=first.transposed, **_blocks(tile),
    )  # fmt: skip


def gate(x: torch.Tensor, gate_linear: Linear, up: Linear, out: torch.Tensor) -> None:
    """out (N,) = silu(gate x) * (up x), of a gated feed-forward layer (Shazeer, 2020, arXiv:2002.05202)."""
    tile, has_bias = TILES["project"], gate_linear.bias is not None
    _launch(_gate, (triton.cdiv(gate_linear.rows, tile.rows),),
        x, gate_linear.weight, up.weight, gate_linear.bias if has_bias else x, up.bias if has_bias else x, out,
        gate_linear.rows, gate_linear.columns, HAS_BIAS=has_bias, **_blocks(tile),
    )  # fmt: skip


def merge(residual: torch.Tensor, x1: torch.Tensor, linear1: Linear, x2: torch.Tensor | None = None, linear2: Linear | None = None) -> None:
    """residual (N,) += linear1(x1), and linear2(x2) if given. In place."""
    tile = TILES["transposed_merge" if linear1.transposed else "merge"]
    bias1, bias2 = linear1.bias, linear2.bias if linear2 else None
    _launch(_merge, (triton.cdiv(linear1.rows, tile.rows),),
        residual, x1, linear1.weight, x1 if bias1 is None else bias1,
        x1 if x2 is None else x2, linear2.weight if linear2 else linear1.weight, x1 if bias2 is None else bias2,
        linear1.rows, linear1.columns, linear2.columns if linear2 else 0, HAS_BIAS1=bias1 is not None, HAS_BIAS2=bias2 is not None,
        TRANSPOSED=linear1.transposed, **_blocks(tile),
    )  # fmt: skip


def embed(state: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor | None, out: torch.Tensor) -> None:
    """out [n, H] = the embeddings of tokens state[:, 0], plus those of positions state[:, 1] if `positions` is given; -1 counts as 0.

    state is int64 [n, 2 or more]. One row may come without its first axis.
    """
    hidden, block = out.shape[-1], 1024
    _launch(_embed, (triton.cdiv(hidden, block), out.numel() // hidden),
        state, tokens, tokens if positions is None else positions, out, state.shape[-1], hidden,
        HAS_POSITIONS=positions is not None, BLOCK=block,
    )  # fmt: skip


def norm(x: torch.Tensor, given: Norm, out: torch.Tensor, added: torch.Tensor | None = None) -> None:
    """out [n, H] = the norm of each row of x [n, H], to which `added` (H,) is added before, in place.

    One row may come without its first axis.
    """
    hidden = x.shape[-1]
    bias = given.weight if given.bias is None else given.bias
    block = triton.next_power_of_2(hidden)
    _launch(_norm, (x.numel() // hidden,),
        x, given.weight, bias, given.weight if added is None else added, out, given.eps, hidden, RMS=given.bias is None,
        HAS_ADDED=added is not None, BLOCK=block, num_warps=8,
    )  # fmt: skip


def norm_heads(qkv: torch.Tensor, query: Norm, key: Norm, heads: int, kv_heads: int) -> None:
    """The norms (head_dim,) of the heads of query and key in qkv [n, W], whose rows hold query, key and value back to back. In place.

    One row may come without its first axis.
    """
    head_dim, width = query.weight.numel(), qkv.shape[-1]
    block = triton.next_power_of_2(head_dim)
    _launch(_norm_heads, (heads + kv_heads, qkv.numel() // width),
        qkv, query.weight, key.weight, query.eps, heads, head_dim, ROW=width, BLOCK=block, num_warps=1,
    )  # fmt: skip


def attend(
    qkv: torch.Tensor, slabs: torch.Tensor, layer: int, state: torch.Tensor, rope: Rope | None, scale: float, sums: torch.Tensor,
    stats: torch.Tensor, out: torch.Tensor, *, heads: int, kv_heads: int, head_dim: int, max_length: int,
) -> None:  # fmt: skip
    """out (heads * head_dim,) = attention of the token at state[1] over all positions up to its own; its key and value go into the slab.

    qkv holds query, key and value of the token back to back; slabs int64 [layers] is `distances_to` the slabs, [K, V][kv_heads,
    max_length, head_dim]; sums [heads, splits, head_dim's next power of 2] and stats [heads, splits, 2], float32, are scratch.
    """
    splits, block_d = stats.shape[1], sums.shape[2]
    rotary, cosines = (rope.cosines.shape[1], rope.cosines) if rope else (0, sums)
    _launch(_attend, (heads, splits),
        qkv, slabs, state, cosines, rope.sines if rope else sums, sums, stats, scale, layer, heads, kv_heads, head_dim, max_length,
        rotary, INTERLEAVED=bool(rope and rope.interleaved), SPLITS=splits, UNIT=_unit(qkv, head_dim), BLOCK_D=block_d, BLOCK_P=_POSITIONS,
        maxnreg=_REGISTERS,
    )  # fmt: skip
    _launch(_combine, (heads,), sums, stats, out, head_dim, SPLITS=splits, BLOCK_D=block_d)


def distances_to(slabs: Sequence[torch.Tensor], qkv: torch.Tensor, head_dim: int) -> list[int]:
    """The distances of slabs from `qkv`, as `attend` reads them: in units of 16 bytes, its widest load, if rows are aligned to it."""
    nbytes, start = qkv.element_size() * _unit(qkv, head_dim), qkv.data_ptr()
    apart = [divmod(slab.data_ptr() - start, nbytes) for slab in slabs]
    if any(rest for _, rest in apart):
        raise ValueError(f"a slab's distance from the step's buffers is no multiple of {nbytes} bytes")
    return [distance for distance, _ in apart]


def _unit(qkv: torch.Tensor, head_dim: int) -> int:
    row = head_dim * qkv.element_size()
    return 16 // qkv.element_size() if row % 16 == 0 and qkv.data_ptr() % 16 == 0 else 1


def _blocks(tile: Tile) -> dict[str, int | None]:
    return {"BLOCK_N": tile.rows, "BLOCK_K": tile.columns, "num_warps": tile.warps, "maxnreg": tile.registers}


def _distances(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Distances in elements from the first tensor to three others, 0 for missing ones: a kernel reads all through one pointer."""
    distances = [(other.data_ptr() - tensors[0].data_ptr()) // other.element_size() for other in tensors[1:]]
    return distances + [0] * (3 - len(distances))
