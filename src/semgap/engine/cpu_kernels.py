"""Decoder layers on the CPU, compiled by numba: norms, products, attention and activations of the rows of one request or of many.

All numbers are float32. A row has the same bits in any batch, computed by any number of threads. A function with `own` does its thread's
share, see cpu_threads.py.
"""

import math

import numba
import numpy as np
from numba import types

from semgap.engine import cpu_planes, kernel_cache
from semgap.engine.cpu_attention import GROUP, TILE, append, attend, rotate
from semgap.engine.cpu_products import product
from semgap.engine.cpu_threads import ALONE, FLAGS, Team, meet, share
from semgap.engine.cpu_vectors import exps, floats


@numba.njit(**FLAGS)
def normalise(weight, bias, eps, x, out):
    """out[n, hidden] = RMS norm of x[n, hidden] (bias 0), or layer norm. `weight` and `bias` are addresses. Sums in float64."""
    n, hidden = x.shape
    scale = numba.carray(floats(weight), hidden)
    for b in range(n):
        mean = 0.0
        if bias:
            for i in range(hidden):
                mean += x[b, i]
            mean /= hidden
        square = 0.0
        for i in range(hidden):
            square += (x[b, i] - mean) ** 2
        factor = np.float32(1 / math.sqrt(square / hidden + eps))
        centre = np.float32(mean)
        for i in range(hidden):
            out[b, i] = (x[b, i] - centre) * factor * scale[i]
        if bias:
            shift = numba.carray(floats(bias), hidden)
            for i in range(hidden):
                out[b, i] += shift[i]


@numba.njit(**FLAGS)
def normalise_heads(weight, eps, vectors, begin, heads, head_dim):
    """RMS norm of each head of vectors[n, >= begin + heads * head_dim], from column `begin` on, in place. Sums in float64."""
    scale = numba.carray(floats(weight), head_dim)
    for b in range(vectors.shape[0]):
        for head in range(heads):
            at, square = begin + head * head_dim, 0.0
            for i in range(head_dim):
                square += np.float64(vectors[b, at + i]) ** 2
            factor = np.float32(1 / math.sqrt(square / head_dim + eps))
            for i in range(head_dim):
                vectors[b, at + i] = vectors[b, at + i] * factor * scale[i]


@numba.njit(**FLAGS)
def silu_gate(gate, up, powers):
    """up = silu(gate) * up, elementwise, in place. `powers`: memory of their size."""
    for i in range(gate.size):
        powers[i] = -gate[i]
    exps(types.intp(powers.ctypes.data), powers.size)
    for i in range(gate.size):
        up[i] *= gate[i] / (np.float32(1) + powers[i])


@numba.njit(**FLAGS)
def gelu(x, powers):
    """GELU by tanh ('gelu_new'), in place: x / (1 + exp(-2u)). `powers`: memory of its size."""
    for i in range(x.size):
        powers[i] = np.float32(-2 * 0.7978845608028654) * (x[i] + np.float32(0.044715) * x[i] * x[i] * x[i])
    exps(types.intp(powers.ctypes.data), powers.size)
    for i in range(x.size):
        x[i] /= np.float32(1) + powers[i]


@numba.njit(**FLAGS)
def _add_product(linear, x, delta, total, own):
    """total[n, rows] += the product with x, in the rows `own`. `delta`: memory of the size of `total`."""
    begin, end = product(linear, x, delta, own)
    for b in range(total.shape[0]):
        for r in range(begin, end):
            total[b, r] += delta[b, r]


@numba.njit(**FLAGS)
def run_layers(first, last, x, rows, shape, weights, rope, blocks, work, own):
    """Runs layers first..last - 1 over x[n, hidden], in place, and appends their keys and values to the requests' blocks.

    rows: (positions, places, edges) as of batch.Rows. shape: (heads, kv_heads, head_dim, positions of a block, eps).
    weights: (linears [layers, 7, 5], norms [layers, 4, 2], scales [layers], joint, gated, parallel). A layer's linears are query, key,
    value (or one `joint`), attention's output, gate (if `gated`), up, down; its norms, of attention, feed-forward, and each head of query
    and key, are addresses of weight and bias (0: none). In a `parallel` layer the feed-forward reads attention's norm.
    rope: (cosines, sines, interleaved). blocks: addresses [layers, k].
    work: normed, qkv, attended, gate, up (n rows each), powers [feed], delta [n, hidden], and attention's, see `attend`.
    """
    heads, kv_heads, head_dim, length, eps = shape
    linears, norms, scales, joint, gated, parallel = weights
    cosines, sines, interleaved = rope
    normed, qkv, attended, gate, up, powers, delta, attention = work
    positions, places, _ = rows
    n, width, kv_width, sizes = x.shape[0], heads * head_dim, kv_heads * head_dim, (kv_heads, length, head_dim)
    b0, b1 = share(n, own, 1)
    met = 0
    for layer in range(first, last):
        linear, norm = linears[layer], norms[layer]
        normalise(norm[0, 0], norm[0, 1], eps, x[b0:b1], normed[b0:b1])
        met = meet(own, met)
        if joint:
            product(linear[0], normed, qkv, own)
        else:
            product(linear[0], normed, qkv[:, :width], own)
            product(linear[1], normed, qkv[:, width : width + kv_width], own)
            product(linear[2], normed, qkv[:, width + kv_width :], own)
        met = meet(own, met)
        if norm[2, 0]:
            normalise_heads(norm[2, 0], eps, qkv[b0:b1], 0, heads, head_dim)
            normalise_heads(norm[3, 0], eps, qkv[b0:b1], width, kv_heads, head_dim)
        if cosines.shape[1]:
            rotate(qkv[b0:b1], heads + kv_heads, head_dim, positions[b0:b1], cosines, sines, interleaved)
        append(qkv[b0:b1, width:], blocks[layer], positions[b0:b1], places[b0:b1], sizes)
        met = meet(own, met)
        attend(qkv[:, :width], rows, blocks[layer], sizes, heads, scales[layer], attention, attended, own)
        met = meet(own, met)
        _add_product(linear[3], attended, delta, x, own)
        met = meet(own, met)
        if not parallel:
            normalise(norm[1, 0], norm[1, 1], eps, x[b0:b1], normed[b0:b1])
            met = meet(own, met)
        r0, r1 = product(linear[5], normed, up, own)
        if gated:
            product(linear[4], normed, gate, own)
        for b in range(n):
            if gated:
                silu_gate(gate[b, r0:r1], up[b, r0:r1], powers[r0:r1])
            else:
                gelu(up[b, r0:r1], powers[r0:r1])
        met = meet(own, met)
        _add_product(linear[6], up, delta, x, own)
        met = meet(own, met)


@numba.njit(**FLAGS)
def _project(linear, x, out, own):
    product(linear, x, out, own)
    meet(own, 0)


def project(linear: np.ndarray, x: np.ndarray, team: Team = ALONE) -> np.ndarray:
    """The product (n, rows) of x (n, columns) with a linear (address, rows, columns, address of the bias, transposed), float32."""
    out = np.empty((len(x), linear[1]), np.float32)
    team.run(_project, linear, x, out)
    return out


def aligned(*shape: int) -> np.ndarray:
    """Float32 memory on a cache line, not filled. Several rows of a product read such an x faster."""
    size = math.prod(shape)
    memory = np.empty(size + 15, np.float32)
    return memory[-memory.ctypes.data % 64 // 4 :][:size].reshape(shape)


def attention_work(threads: int, rows: int, group: int, head_dim: int, seen: int) -> tuple[np.ndarray, np.ndarray]:
    """Memory for `attend`: of so many rows, heads of a group, and positions that one of them sees at most."""
    tile = min(rows, TILE) * min(group, GROUP)
    return aligned(threads, 2, tile, head_dim), aligned(threads, tile, -(-seen // 16) * 16)


def load() -> None:
    """Compiles the kernels, or loads them from their cache, before any step is timed: seconds the first time, then 0.3."""
    floats, ints = np.zeros((1, 1), np.float32), np.zeros((1, 1, 1), np.int64)
    weights = (ints, ints, floats[0], False, False, False)
    rows = (ints[0, 0], ints[0, 0], ints[0])
    work = (*[floats] * 5, floats[0], floats, attention_work(1, 1, 1, 1, 1))
    with kernel_cache.without_scipy():
        ALONE.run(run_layers, 0, 0, floats, rows, (1, 1, 1, 1, 1.0), weights, (floats, floats, False), ints[0], work)
        normalise(floats.ctypes.data, 0, 1.0, floats, np.empty_like(floats))
        project(np.array([floats.ctypes.data, 1, 1, 0, 0], np.int64), floats)
    cpu_planes.load()
