"""A decoder layer on the CPU, compiled by numba: products that read each weight once, norms, rotary embedding, attention, activations.

All numbers are float32. Matrices are passed by address, so that nothing is copied or converted on the way.
A dot product always sums in the same order: 32 lanes (two vectors of 16) over the columns, then the lanes as a tree, then the rest. The
order depends neither on alignment nor on how many rows a product has. So a row's result has the same bits alone and beside any
neighbours, and a prefill the same bits as its tokens one by one.
"""

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from semgap.engine import kernel_cache

_LANES = 16
_VECTORS = 2  # that a dot product sums in
_FLOAT, _INT = ir.FloatType(), ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, _LANES)
_MANY = 20  # inputs, from which on three rows of weights at a time are faster than one
_X_BYTES = 1 << 19  # of the inputs that a product keeps in a core's own cache while weights pass by

_Body = Callable[[ir.Value, list[ir.Value]], list[ir.Value]]
FLAGS: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy", "cache": kernel_cache.is_usable()}


class _Emitter:
    """Writes the vector instructions of one intrinsic."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder
        self._fma = {
            kind: cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, (kind,) * 3), name)
            for kind, name in ((_VECTOR, f"llvm.fma.v{_LANES}f32"), (_FLOAT, "llvm.fma.f32"))
        }

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        return self.builder.call(self._fma[a.type], (a, b, c))

    def row(self, base: ir.Value, stride: ir.Value, index: int) -> ir.Value:
        """The address of row `index` of a matrix, rows `stride` floats apart."""
        return self.builder.add(base, self.builder.mul(stride, _INT(4 * index)))

    def pointer(self, base: ir.Value, offset: ir.Value, kind: ir.Type) -> ir.Value:
        """A pointer to element `offset` (floats) from an address."""
        address = self.builder.add(base, self.builder.mul(offset, _INT(4)))
        return self.builder.inttoptr(address, kind.as_pointer())

    def load(self, base: ir.Value, offset: ir.Value, kind: ir.Type) -> ir.Value:
        return self.builder.load(self.pointer(base, offset, kind), align=4, typ=kind)

    def store(self, value: ir.Value, base: ir.Value, offset: ir.Value) -> None:
        self.builder.store(value, self.pointer(base, offset, value.type), align=4)

    def loop(
        self,
        start: ir.Value,
        stop: ir.Value,
        step: int,
        carried: list[ir.Value],
        body: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
    ) -> list[ir.Value]:
        """`for i in range(start, stop, step)`: `body` takes i and the carried values and gives their next ones."""
        builder, before = self.builder, self.builder.block
        head, inside, after = (builder.append_basic_block(name) for name in ("head", "inside", "after"))
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(_INT)
        index.add_incoming(start, before)
        now = [builder.phi(value.type) for value in carried]
        for phi, value in zip(now, carried, strict=True):
            phi.add_incoming(value, before)
        builder.cbranch(builder.icmp_signed("<", index, stop), inside, after)
        builder.position_at_end(inside)
        for phi, value in zip(now, body(index, now), strict=True):
            phi.add_incoming(value, builder.block)
        index.add_incoming(builder.add(index, _INT(step)), builder.block)
        builder.branch(head)
        builder.position_at_end(after)
        return list(now)

    def sum_of_lanes(self, vector: ir.Value) -> ir.Value:
        """The lanes of a vector, halves onto halves."""
        width = _LANES
        while width > 1:
            width //= 2
            low, high = (ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(at, at + width))) for at in (0, width))
            vector = self.builder.fadd(*(self.builder.shuffle_vector(vector, vector, half) for half in (low, high)))
        return self.builder.extract_element(vector, ir.IntType(32)(0))


def _whole(builder: ir.IRBuilder, count: ir.Value, step: int) -> ir.Value:
    """`count` rounded down to a multiple of `step`, a power of two."""
    return builder.and_(count, _INT(-step))


def _dots(rows: int, inputs: int) -> Any:
    """An intrinsic: y[b * y_input + r * y_row] = dot(w[r], x[b]) over n columns, for `rows` rows of weights and `inputs` inputs at once.

    Arguments, all intp: address of w, floats between its rows, address of x, floats between its rows, n, address of y, y_row, y_input.
    """
    pairs = [(r, b) for r in range(rows) for b in range(inputs)]

    @intrinsic
    def dots(context, w, ws, x, xs, n, y, y_row, y_input):
        def generate(context, builder, signature, arguments):
            w, ws, x, xs, n, y, y_row, y_input = arguments
            emit = _Emitter(builder)
            at_w, at_x = [emit.row(w, ws, r) for r in range(rows)], [emit.row(x, xs, b) for b in range(inputs)]

            def step(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                made = []
                for vector in range(_VECTORS):
                    offset = builder.add(i, _INT(vector * _LANES))
                    w_parts = [emit.load(address, offset, _VECTOR) for address in at_w]
                    x_parts = [emit.load(address, offset, _VECTOR) for address in at_x]
                    made += [emit.fma(w_parts[r], x_parts[b], sums[vector * len(pairs) + at]) for at, (r, b) in enumerate(pairs)]
                return made

            def rest(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                w_parts, x_parts = ([emit.load(address, i, _FLOAT) for address in ats] for ats in (at_w, at_x))
                return [emit.fma(w_parts[r], x_parts[b], total) for (r, b), total in zip(pairs, sums, strict=True)]

            whole = _whole(builder, n, _LANES * _VECTORS)
            zeros = [ir.Constant(_VECTOR, [0.0] * _LANES)] * (_VECTORS * len(pairs))
            sums = emit.loop(_INT(0), whole, _LANES * _VECTORS, zeros, step)
            tails = emit.loop(whole, n, 1, [_FLOAT(0.0)] * len(pairs), rest)
            for at, (r, b) in enumerate(pairs):
                total = builder.fadd(emit.sum_of_lanes(builder.fadd(sums[at], sums[len(pairs) + at])), tails[at])
                emit.store(total, y, builder.add(builder.mul(y_row, _INT(r)), builder.mul(y_input, _INT(b))))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 8), generate

    return dots


def _axpys(rows: int, inputs: int) -> Any:
    """An intrinsic: y[b][o] += x[b][0] w[0][o] + ... + x[b][rows - 1] w[rows - 1][o], one after the other, for all o < n.

    For weights that lie transposed. Arguments, all intp: as those of `dots`, and y with its floats between inputs.
    """

    @intrinsic
    def axpys(context, w, ws, x, xs, n, y, ys):
        def generate(context, builder, signature, arguments):
            w, ws, x, xs, n, y, ys = arguments
            emit = _Emitter(builder)
            at_w, at_y = [emit.row(w, ws, r) for r in range(rows)], [emit.row(y, ys, b) for b in range(inputs)]
            scalars = [[emit.load(emit.row(x, xs, b), _INT(r), _FLOAT) for r in range(rows)] for b in range(inputs)]
            undefined, lanes = ir.Constant(_VECTOR, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [0] * _LANES)
            spread = [
                [builder.shuffle_vector(builder.insert_element(undefined, s, ir.IntType(32)(0)), undefined, lanes) for s in of]
                for of in scalars
            ]

            def add(o: ir.Value, kind: ir.Type, factors: list[list[ir.Value]]) -> list[ir.Value]:
                parts = [emit.load(address, o, kind) for address in at_w]
                for b, address in enumerate(at_y):
                    total = emit.load(address, o, kind)
                    for part, factor in zip(parts, factors[b], strict=True):
                        total = emit.fma(factor, part, total)
                    emit.store(total, address, o)
                return []

            whole = _whole(builder, n, _LANES)
            emit.loop(_INT(0), whole, _LANES, [], lambda o, _: add(o, _VECTOR, spread))
            emit.loop(whole, n, 1, [], lambda o, _: add(o, _FLOAT, scalars))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 7), generate

    return axpys


def _exp_of(emit: _Emitter, x: ir.Value) -> ir.Value:
    """exp(x), elementwise, within 2 units in the last place: 2^n times a polynomial of the rest (Cephes' expf)."""
    builder, kind = emit.builder, x.type
    integers = ir.VectorType(ir.IntType(32), _LANES) if kind == _VECTOR else ir.IntType(32)

    def number(value: float, of: ir.Type = kind) -> ir.Constant:
        return ir.Constant(of, [value] * _LANES) if isinstance(of, ir.VectorType) else ir.Constant(of, value)

    def call(name: str, *values: ir.Value) -> ir.Value:
        function = ir.FunctionType(kind, (kind,) * len(values))
        suffix = f"v{_LANES}f32" if kind == _VECTOR else "f32"
        return builder.call(cgutils.get_or_insert_function(builder.module, function, f"llvm.{name}.{suffix}"), values)

    for limit, is_beyond in ((-87.3, "<"), (88.3, ">")):  # false for NaN, which stays
        x = builder.select(builder.fcmp_ordered(is_beyond, x, number(limit)), number(limit), x)
    n = call("rint", builder.fmul(x, number(1.4426950408889634)))
    rest = emit.fma(n, number(2.1219444e-4), emit.fma(n, number(-0.693359375), x))
    total = number(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        total = emit.fma(total, rest, number(coefficient))
    total = builder.fadd(emit.fma(total, builder.fmul(rest, rest), rest), number(1.0))
    power = builder.shl(builder.add(builder.fptosi(n, integers), number(127, integers)), number(23, integers))
    return builder.fmul(total, builder.bitcast(power, kind))


@intrinsic
def _exps(context, x, n):
    """exp of n floats from address x on, in place; both intp. The same bits for a number wherever it stands."""

    def generate(context, builder, signature, arguments):
        x, n = arguments
        emit = _Emitter(builder)

        def put(i: ir.Value, kind: ir.Type) -> list[ir.Value]:
            emit.store(_exp_of(emit, emit.load(x, i, kind)), x, i)
            return []

        whole = _whole(builder, n, _LANES)
        emit.loop(_INT(0), whole, _LANES, [], lambda i, _: put(i, _VECTOR))
        emit.loop(whole, n, 1, [], lambda i, _: put(i, _FLOAT))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


_dots11, _dots12, _dots14, _dots18, _dots34 = _dots(1, 1), _dots(1, 2), _dots(1, 4), _dots(1, 8), _dots(3, 4)
_axpys11, _axpys14, _axpys41, _axpys44 = _axpys(1, 1), _axpys(1, 4), _axpys(4, 1), _axpys(4, 4)


@numba.njit(**FLAGS)
def _rows_product(w, rows, columns, x, xs, count, y, ys):
    """y[count, rows] = x[count, columns] w[rows, columns]^T.

    Weights pass by once for each block of inputs. Up to 8 inputs meet a row of weights at once, as many as a core has registers for;
    of many inputs 4 meet 3 rows, which takes fewer loads.
    """
    block = max(8, _X_BYTES // (4 * columns) // 8 * 8)
    for first in range(0, count, block):
        some = min(block, count - first)
        threes, fours = (rows // 3 * 3, some // 4 * 4) if some >= _MANY else (0, 0)
        for r in range(0, threes, 3):
            for b in range(first, first + fours, 4):
                _dots34(w + 4 * r * columns, columns, x + 4 * b * xs, xs, columns, y + 4 * (b * ys + r), 1, ys)
        for r in range(rows):
            at_w, b = w + 4 * r * columns, first + (fours if r < threes else 0)
            while b < first + some:
                left, at_x, at_y = first + some - b, x + 4 * b * xs, y + 4 * (b * ys + r)
                if left >= 8:
                    _dots18(at_w, columns, at_x, xs, columns, at_y, 1, ys)
                    b += 8
                elif left >= 4:
                    _dots14(at_w, columns, at_x, xs, columns, at_y, 1, ys)
                    b += 4
                elif left >= 2:
                    _dots12(at_w, columns, at_x, xs, columns, at_y, 1, ys)
                    b += 2
                else:
                    _dots11(at_w, columns, at_x, xs, columns, at_y, 1, ys)
                    b += 1


@numba.njit(**FLAGS)
def _columns_product(w, rows, columns, x, xs, count, y, ys):
    """y[count, rows] = x[count, columns] w[columns, rows]."""
    for b in range(count):
        out = numba.carray(_floats(y + 4 * b * ys), rows)
        out[:] = 0
    i = 0
    while i < columns:
        four = i + 4 <= columns
        at_w, b = w + 4 * i * rows, 0
        while b < count:
            at_x, at_y, many = x + 4 * (b * xs + i), y + 4 * b * ys, b + 4 <= count
            if four:
                if many:
                    _axpys44(at_w, rows, at_x, xs, rows, at_y, ys)
                else:
                    _axpys41(at_w, rows, at_x, xs, rows, at_y, ys)
            elif many:
                _axpys14(at_w, rows, at_x, xs, rows, at_y, ys)
            else:
                _axpys11(at_w, rows, at_x, xs, rows, at_y, ys)
            b += 4 if many else 1
        i += 4 if four else 1


@intrinsic
def _floats(context, address):
    """A pointer to float32 from an address (intp), for numba.carray."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], _FLOAT.as_pointer())

    return types.CPointer(types.float32)(types.intp), generate


@numba.njit(**FLAGS)
def product(linear, x, xs, count, y, ys):
    """y[count, rows] = x[count, columns] W^T + bias, for a row of `LINEAR` and addresses x and y with their floats between rows."""
    rows, columns = linear[1], linear[2]
    if linear[4]:
        _columns_product(linear[0], rows, columns, x, xs, count, y, ys)
    else:
        _rows_product(linear[0], rows, columns, x, xs, count, y, ys)
    if linear[3]:
        bias = numba.carray(_floats(linear[3]), rows)
        for b in range(count):
            out = numba.carray(_floats(y + 4 * b * ys), rows)
            for r in range(rows):
                out[r] += bias[r]


@numba.njit(**FLAGS)
def normalise(weight, bias, eps, x, out):
    """out[n, hidden] = RMS norm of x[n, hidden] (bias 0), or layer norm. `weight` and `bias` are addresses. Sums in float64."""
    n, hidden = x.shape
    scale = numba.carray(_floats(weight), hidden)
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
            shift = numba.carray(_floats(bias), hidden)
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
def attend(queries, slab, position, heads, scale, scores, out):
    """out[n, heads * head_dim]: causal attention of queries (row b at `position` + b) over the filled prefix of a slab.

    A single row takes the heads of a group together, several rows take each head by itself; `scores`: [8 or more, max_length].
    """
    kv_heads, max_length, head_dim = slab.shape[1:]
    group, n = heads // kv_heads, queries.shape[0]
    at_q, at_out = types.intp(queries.ctypes.data), types.intp(out.ctypes.data)
    q_row, out_row = queries.strides[0] // 4, out.strides[0] // 4
    for kv in range(kv_heads):
        keys = types.intp(slab.ctypes.data) + 4 * kv * max_length * head_dim
        values = keys + 4 * kv_heads * max_length * head_dim
        if n == 1:
            for head in range(kv * group, (kv + 1) * group, 8):
                some = min(8, (kv + 1) * group - head)
                at = 4 * head * head_dim
                _attend_some(at_q + at, head_dim, some, keys, values, head_dim, position + 1, 0, scale, scores, at_out + at, head_dim)
        else:
            for head in range(kv * group, (kv + 1) * group):
                for first in range(0, n, 8):
                    some, seen = min(8, n - first), position + first + 1
                    here, there = at_q + 4 * (first * q_row + head * head_dim), at_out + 4 * (first * out_row + head * head_dim)
                    _attend_some(here, q_row, some, keys, values, head_dim, seen, 1, scale, scores, there, out_row)


@numba.njit(**FLAGS)
def _attend_some(q, q_row, some, keys, values, head_dim, seen, growing, scale, scores, out, out_row):
    """Up to 8 queries over one KV head: the first sees `seen` positions, each further one `growing` (0 or 1) more."""
    most, row = seen + growing * (some - 1), scores.shape[1]
    _rows_product(keys, most, head_dim, q, q_row, some, types.intp(scores.ctypes.data), row)
    for b in range(some):
        own = seen + growing * b
        softmax(scores[b, :own], scale)
        scores[b, own:most] = 0
    _columns_product(values, head_dim, most, types.intp(scores.ctypes.data), row, some, out, out_row)


@numba.njit(**FLAGS)
def softmax(scores, scale):
    """softmax(scale * scores), in place."""
    highest = np.float32(-np.inf)
    for p in range(scores.size):
        highest = max(highest, scores[p] * scale)
    for p in range(scores.size):
        scores[p] = scores[p] * scale - highest
    _exps(types.intp(scores.ctypes.data), scores.size)
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
    _exps(types.intp(powers.ctypes.data), powers.size)
    for i in range(gate.size):
        up[i] *= gate[i] / (np.float32(1) + powers[i])


@numba.njit(**FLAGS)
def gelu(x, powers):
    """GELU by tanh ('gelu_new'), in place: x / (1 + exp(-2u)). `powers`: memory of its size."""
    for i in range(x.size):
        powers[i] = np.float32(-2 * 0.7978845608028654) * (x[i] + np.float32(0.044715) * x[i] * x[i] * x[i])
    _exps(types.intp(powers.ctypes.data), powers.size)
    for i in range(x.size):
        x[i] /= np.float32(1) + powers[i]


@numba.njit(**FLAGS)
def _add(x, delta):
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            x[b, i] += delta[b, i]


@numba.njit(**FLAGS)
def _project(linear, x, out):
    """out[n, rows] = the product with x[n, columns]; rows of both may lie apart."""
    at_x, at_out = types.intp(x.ctypes.data), types.intp(out.ctypes.data)
    product(linear, at_x, x.strides[0] // 4, x.shape[0], at_out, out.strides[0] // 4)


@numba.njit(**FLAGS)
def run_layers(first, last, x, position, shape, weights, rope, slabs, work):
    """Runs layers first..last - 1 over x[n, hidden], in place, and appends their keys and values to the slabs.

    shape: (heads, kv_heads, head_dim, max_length, eps).
    weights: (linears [layers, 7, 5], norms [layers, 2, 2], scales [layers], joint, gated, parallel). A layer's linears are query, key,
    value (or one `joint`), attention's output, gate (if `gated`), up, down; its norms, of attention and feed-forward, are addresses of
    weight and bias (0: none). In a `parallel` layer the feed-forward reads attention's norm.
    rope: (cosines, sines, interleaved). slabs: addresses, one a layer.
    work: normed, qkv, attended, gate, up (n rows each), powers [feed], delta [n, hidden], scores [8, max_length].
    """
    heads, kv_heads, head_dim, max_length, eps = shape
    linears, norms, scales, joint, gated, parallel = weights
    cosines, sines, interleaved = rope
    normed, qkv, attended, gate, up, powers, delta, scores = work
    n, width, kv_width = x.shape[0], heads * head_dim, kv_heads * head_dim
    for layer in range(first, last):
        own, norm = linears[layer], norms[layer]
        normalise(norm[0, 0], norm[0, 1], eps, x, normed)
        if joint:
            _project(own[0], normed, qkv)
        else:
            _project(own[0], normed, qkv[:, :width])
            _project(own[1], normed, qkv[:, width : width + kv_width])
            _project(own[2], normed, qkv[:, width + kv_width :])
        if cosines.shape[1]:
            rotate(qkv, heads + kv_heads, head_dim, position, cosines, sines, interleaved)
        slab = numba.carray(_floats(slabs[layer]), (2, kv_heads, max_length, head_dim))
        append(qkv[:, width:], slab, position, kv_heads, head_dim)
        attend(qkv[:, :width], slab, position, heads, scales[layer], scores, attended)
        _project(own[3], attended, delta)
        _add(x, delta)
        if not parallel:
            normalise(norm[1, 0], norm[1, 1], eps, x, normed)
        _project(own[5], normed, up)
        if gated:
            _project(own[4], normed, gate)
            for b in range(n):
                silu_gate(gate[b], up[b], powers)
        else:
            for b in range(n):
                gelu(up[b], powers)
        _project(own[6], up, delta)
        _add(x, delta)


@numba.njit(**FLAGS)
def read_all(memory):
    """A sum over memory (n,) float32: reads it once, as a product does, and does nothing else. For the floor of a step."""
    total = np.zeros(1, np.float32)
    ones = np.ones(1024, np.float32)
    out, at = types.intp(total.ctypes.data), types.intp(memory.ctypes.data)
    kept = np.float32(0)
    for begin in range(0, memory.size - 1023, 1024):
        _dots11(at + 4 * begin, 1024, types.intp(ones.ctypes.data), 1024, 1024, out, 1, 1)
        kept += total[0]
    return kept


def project(linear: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The product (n, rows) of x (n, columns) with a linear (address, rows, columns, address of the bias, transposed), float32."""
    out = np.empty((len(x), linear[1]), np.float32)
    _project(linear, x, out)
    return out


def load() -> None:
    """Compiles the kernels, or loads them from their cache, before any step is timed: seconds the first time, then about half a second."""
    floats, ints = np.zeros((1, 1), np.float32), np.zeros((1, 1, 1), np.int64)
    weights = (ints, ints, floats[0], False, False, False)
    work = (*[floats] * 5, floats[0], floats, floats)
    run_layers(0, 0, floats, 0, (1, 1, 1, 1, 1.0), weights, (floats, floats, False), ints[0, 0], work)
    normalise(floats.ctypes.data, 0, 1.0, floats, np.empty_like(floats))
    project(np.array([floats.ctypes.data, 1, 1, 0, 0], np.int64), floats)
