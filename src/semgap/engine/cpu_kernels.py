"""A decoder layer on the CPU, compiled by numba: products that read each weight once, norms, rotary embedding, attention, activations.

All numbers are float32. A product is made of the dot products of cpu_vectors.py, so a row has the same bits in any batch, computed by
any number of threads. A function with `own` does its thread's share, see cpu_threads.py.
"""

import math

import numba
import numpy as np
from numba import types

from semgap.engine import kernel_cache
from semgap.engine.cpu_threads import ALONE, FLAGS, Team, meet, share
from semgap.engine.cpu_vectors import axpys, dots, exps, floats

_X_BYTES = 1 << 19  # of the inputs that a product keeps in a core's own cache while weights pass by
_UNIT = 48  # rows of weights that stay with one thread: whole groups of three, whole cache lines of results

_first31, _first32, _first34, _dots34 = dots(3, 1, True), dots(3, 2, True), dots(3, 4, True), dots(3, 4)
_dots11, _dots12, _dots14 = dots(1, 1), dots(1, 2), dots(1, 4)
_axpys11, _axpys14, _axpys41, _axpys44 = axpys(1, 1), axpys(1, 4), axpys(4, 1), axpys(4, 4)


@numba.njit(**FLAGS)
def _rows_product(w, rows, columns, x, xs, count, y, ys):
    """y[count, rows] = x[count, columns] w[rows, columns]^T.

    Weights pass by once for each block of inputs, three rows at a time. Three rows meet up to 4 inputs at once, for which a core has
    registers; the first inputs that they meet also fetch the next three rows from memory.
    """
    block = max(4, _X_BYTES // (4 * columns) // 4 * 4)
    for first in range(0, count, block):
        some = min(block, count - first)
        for r in range(0, rows, 3):
            three, at_w, b = r + 3 <= rows, w + 4 * r * columns, first
            while b < first + some:
                left, at_x, at_y = first + some - b, x + 4 * b * xs, y + 4 * (b * ys + r)
                taken = 4 if left >= 4 else 2 if left >= 2 else 1
                if not three:
                    for row in range(rows - r):
                        _one_row(at_w + 4 * row * columns, columns, at_x, xs, taken, at_y + 4 * row, ys)
                elif taken == 4 and b > first:
                    _dots34(at_w, columns, at_x, xs, columns, at_y, 1, ys)
                elif taken == 4:
                    _first34(at_w, columns, at_x, xs, columns, at_y, 1, ys)
                elif taken == 2:
                    _first32(at_w, columns, at_x, xs, columns, at_y, 1, ys)
                else:
                    _first31(at_w, columns, at_x, xs, columns, at_y, 1, ys)
                b += taken


@numba.njit(**FLAGS)
def _one_row(w, columns, x, xs, inputs, y, ys):
    """The products of one row of weights with 1, 2 or 4 inputs."""
    if inputs == 4:
        _dots14(w, columns, x, xs, columns, y, 1, ys)
    elif inputs == 2:
        _dots12(w, columns, x, xs, columns, y, 1, ys)
    else:
        _dots11(w, columns, x, xs, columns, y, 1, ys)


@numba.njit(**FLAGS)
def _columns_product(w, ws, rows, columns, x, xs, count, y, ys):
    """y[count, rows] = x[count, columns] w[columns, rows], rows of w `ws` floats apart."""
    for b in range(count):
        out = numba.carray(floats(y + 4 * b * ys), rows)
        out[:] = 0
    i = 0
    while i < columns:
        four = i + 4 <= columns
        at_w, b = w + 4 * i * ws, 0
        while b < count:
            at_x, at_y, many = x + 4 * (b * xs + i), y + 4 * b * ys, b + 4 <= count
            if four:
                if many:
                    _axpys44(at_w, ws, at_x, xs, rows, at_y, ys)
                else:
                    _axpys41(at_w, ws, at_x, xs, rows, at_y, ys)
            elif many:
                _axpys14(at_w, ws, at_x, xs, rows, at_y, ys)
            else:
                _axpys11(at_w, ws, at_x, xs, rows, at_y, ys)
            b += 4 if many else 1
        i += 4 if four else 1


@numba.njit(**FLAGS)
def _product(linear, x, out, own):
    """out[n, rows] = x[n, columns] W^T + bias, for a linear as of `project`; rows of x and out may lie apart. Gives (begin, end)."""
    n, rows, columns = x.shape[0], linear[1], linear[2]
    begin, end = share(rows, own, _UNIT)
    at_x, xs, at_out, ys = types.intp(x.ctypes.data), x.strides[0] // 4, types.intp(out.ctypes.data) + 4 * begin, out.strides[0] // 4
    if linear[4]:
        _columns_product(linear[0] + 4 * begin, rows, end - begin, columns, at_x, xs, n, at_out, ys)
    else:
        _rows_product(linear[0] + 4 * begin * columns, end - begin, columns, at_x, xs, n, at_out, ys)
    if linear[3]:
        bias = numba.carray(floats(linear[3]), rows)
        for b in range(n):
            for r in range(begin, end):
                out[b, r] += bias[r]
    return begin, end


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
def rotate(vectors, heads, head_dim, position, cosines, sines, interleaved):
    """Rotary embedding of vectors[n, >= heads * head_dim], in place; row b stands at `position` + b.

    `cosines`, `sines`: [max_length, pairs]. Pair i is (2i, 2i + 1) if `interleaved`, else (i, pairs + i); other dimensions stay.
    """
    pairs = cosines.shape[1]
    apart, step = (1, 2) if interleaved else (pairs, 1)
    for b in range(vectors.shape[0]):
        for head in range(heads):
            for i in range(pairs):
                at = head * head_dim + step * i
                u, v, c, s = vectors[b, at], vectors[b, at + apart], cosines[position + b, i], sines[position + b, i]
                vectors[b, at], vectors[b, at + apart] = u * c - v * s, v * c + u * s


@numba.njit(**FLAGS)
def append(keys_values, slab, position, kv_heads, head_dim):
    """Writes keys_values[n, 2 * kv_heads * head_dim], keys first, into slab[2, kv_heads, max_length, head_dim] from `position` on."""
    for b in range(keys_values.shape[0]):
        for part in range(2):
            for head in range(kv_heads):
                begin = (part * kv_heads + head) * head_dim
                for i in range(head_dim):
                    slab[part, head, position + b, i] = keys_values[b, begin + i]


@numba.njit(**FLAGS)
def attend(queries, slab, position, heads, scale, scores, out, own):
    """out[n, heads * head_dim]: causal attention of queries (row b at `position` + b) over the filled prefix of a slab.

    A single row takes the heads of a group together, several rows take each head by itself; `scores`: [threads, 8, max_length].
    """
    kv_heads, max_length, head_dim = slab.shape[1:]
    group, n = heads // kv_heads, queries.shape[0]
    at_q, at_out = types.intp(queries.ctypes.data), types.intp(out.ctypes.data)
    q_row, out_row = queries.strides[0] // 4, out.strides[0] // 4
    head, end = share(heads, own, 1)
    while head < end:
        keys = types.intp(slab.ctypes.data) + 4 * (head // group) * max_length * head_dim
        values, at, taken = keys + 4 * kv_heads * max_length * head_dim, 4 * head * head_dim, 1
        if n == 1:
            taken = min(8, end - head, group - head % group)
            here, there = at_q + at, at_out + at
            _attend_some(here, head_dim, taken, keys, values, head_dim, position + 1, 0, scale, scores[own[0]], there, head_dim)
        else:
            for first in range(0, n, 8):
                some, seen = min(8, n - first), position + first + 1
                here, there = at_q + 4 * first * q_row + at, at_out + 4 * first * out_row + at
                _attend_some(here, q_row, some, keys, values, head_dim, seen, 1, scale, scores[own[0]], there, out_row)
        head += taken


@numba.njit(**FLAGS)
def _attend_some(q, q_row, some, keys, values, head_dim, seen, growing, scale, scores, out, out_row):
    """Up to 8 queries over one KV head: the first sees `seen` positions, each further one `growing` (0 or 1) more."""
    most, row = seen + growing * (some - 1), scores.shape[1]
    _rows_product(keys, most, head_dim, q, q_row, some, types.intp(scores.ctypes.data), row)
    for b in range(some):
        own = seen + growing * b
        softmax(scores[b, :own], scale)
        scores[b, own:most] = 0
    _columns_product(values, head_dim, head_dim, most, types.intp(scores.ctypes.data), row, some, out, out_row)


@numba.njit(**FLAGS)
def softmax(scores, scale):
    """softmax(scale * scores), in place."""
    highest = np.float32(-np.inf)
    for p in range(scores.size):
        highest = max(highest, scores[p] * scale)
    for p in range(scores.size):
        scores[p] = scores[p] * scale - highest
    exps(types.intp(scores.ctypes.data), scores.size)
    total = np.float32(0)
    for p in range(scores.size):
        total += scores[p]
    for p in range(scores.size):
        scores[p] /= total


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
    begin, end = _product(linear, x, delta, own)
    for b in range(total.shape[0]):
        for r in range(begin, end):
            total[b, r] += delta[b, r]


@numba.njit(**FLAGS)
def run_layers(first, last, x, position, shape, weights, rope, slabs, work, own):
    """Runs layers first..last - 1 over x[n, hidden], in place, and appends their keys and values to the slabs.

    shape: (heads, kv_heads, head_dim, max_length, eps).
    weights: (linears [layers, 7, 5], norms [layers, 2, 2], scales [layers], joint, gated, parallel). A layer's linears are query, key,
    value (or one `joint`), attention's output, gate (if `gated`), up, down; its norms, of attention and feed-forward, are addresses of
    weight and bias (0: none). In a `parallel` layer the feed-forward reads attention's norm.
    rope: (cosines, sines, interleaved). slabs: addresses, one a layer.
    work: normed, qkv, attended, gate, up (n rows each), powers [feed], delta [n, hidden], scores [threads, 8, max_length].
    """
    heads, kv_heads, head_dim, max_length, eps = shape
    linears, norms, scales, joint, gated, parallel = weights
    cosines, sines, interleaved = rope
    normed, qkv, attended, gate, up, powers, delta, scores = work
    n, width, kv_width = x.shape[0], heads * head_dim, kv_heads * head_dim
    b0, b1 = share(n, own, 1)
    met = 0
    for layer in range(first, last):
        linear, norm = linears[layer], norms[layer]
        normalise(norm[0, 0], norm[0, 1], eps, x[b0:b1], normed[b0:b1])
        met = meet(own, met)
        if joint:
            _product(linear[0], normed, qkv, own)
        else:
            _product(linear[0], normed, qkv[:, :width], own)
            _product(linear[1], normed, qkv[:, width : width + kv_width], own)
            _product(linear[2], normed, qkv[:, width + kv_width :], own)
        met = meet(own, met)
        if cosines.shape[1]:
            rotate(qkv[b0:b1], heads + kv_heads, head_dim, position + b0, cosines, sines, interleaved)
        slab = numba.carray(floats(slabs[layer]), (2, kv_heads, max_length, head_dim))
        append(qkv[b0:b1, width:], slab, position + b0, kv_heads, head_dim)
        met = meet(own, met)
        attend(qkv[:, :width], slab, position, heads, scales[layer], scores, attended, own)
        met = meet(own, met)
        _add_product(linear[3], attended, delta, x, own)
        met = meet(own, met)
        if not parallel:
            normalise(norm[1, 0], norm[1, 1], eps, x[b0:b1], normed[b0:b1])
            met = meet(own, met)
        r0, r1 = _product(linear[5], normed, up, own)
        if gated:
            _product(linear[4], normed, gate, own)
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
    _product(linear, x, out, own)
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


def load() -> None:
    """Compiles the kernels, or loads them from their cache, before any step is timed: seconds the first time, then 0.3."""
    floats, ints = np.zeros((1, 1), np.float32), np.zeros((1, 1, 1), np.int64)
    weights = (ints, ints, floats[0], False, False, False)
    work = (*[floats] * 5, floats[0], floats, floats[None])
    with kernel_cache.without_scipy():
        ALONE.run(run_layers, 0, 0, floats, 0, (1, 1, 1, 1, 1.0), weights, (floats, floats, False), ints[0, 0], work)
        normalise(floats.ctypes.data, 0, 1.0, floats, np.empty_like(floats))
        project(np.array([floats.ctypes.data, 1, 1, 0, 0], np.int64), floats)
