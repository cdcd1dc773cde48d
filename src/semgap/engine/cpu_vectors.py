"""Vector instructions for the CPU's kernels, which numba compiles into them: dot products, sums of scaled vectors, exp.

All numbers are float32. Matrices are passed by address, so that nothing is copied or converted on the way.
A dot product always sums in the same order: 32 lanes (two vectors of 16) over the columns, then the lanes as a tree, then the rest. The
order depends neither on alignment nor on how many rows a product has. So a row's result has the same bits alone and beside any
neighbours, and a prefill the same bits as its tokens one by one.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_LANES = 16
_DOT_LANES = 32  # that a dot product sums in
_FLOAT, _INT, _INDEX = ir.FloatType(), ir.IntType(64), ir.IntType(32)
_VECTOR, _HALF = ir.VectorType(_FLOAT, _LANES), ir.VectorType(_FLOAT, _LANES // 2)

_Body = Callable[[ir.Value, list[ir.Value]], list[ir.Value]]


class _Emitter:
    """Writes the vector instructions of one intrinsic."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder
        self._fma = {
            kind: cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, (kind,) * 3), name)
            for kind, name in ((_VECTOR, f"llvm.fma.v{_LANES}f32"), (_HALF, f"llvm.fma.v{_LANES // 2}f32"), (_FLOAT, "llvm.fma.f32"))
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

    def prefetch(self, address: ir.Value) -> None:
        """Asks for the cache line at an address, into all levels. An address without memory does no harm."""
        kind = ir.IntType(8).as_pointer()
        function = ir.FunctionType(ir.VoidType(), (kind, _INDEX, _INDEX, _INDEX))
        read, level, data = _INDEX(0), _INDEX(3), _INDEX(1)
        prefetch = cgutils.get_or_insert_function(self.builder.module, function, "llvm.prefetch.p0i8")
        self.builder.call(prefetch, (self.builder.inttoptr(address, kind), read, level, data))

    def loop(self, start: ir.Value, stop: ir.Value, step: int, carried: list[ir.Value], body: _Body) -> list[ir.Value]:
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

    def joined(self, parts: list[list[ir.Value]]) -> list[ir.Value]:
        """Vectors of 16 lanes from one part of each, the lower lanes first."""
        if len(parts) == 1:
            return parts[0]
        lanes = ir.Constant(ir.VectorType(_INDEX, _LANES), list(range(_LANES)))
        return [self.builder.shuffle_vector(low, high, lanes) for low, high in zip(*parts, strict=True)]

    def sums_of_lanes(self, vectors: list[ir.Value]) -> list[ir.Value]:
        """The sum of each vector's lanes, halves onto halves. Up to 16 vectors go together: with each halving two become one."""
        count, own = len(vectors), _LANES
        while own > 1:
            own //= 2
            lanes = [[at for at in range(2 * _LANES) if at // own % 2 == half] for half in range(2)]
            halves = [ir.Constant(ir.VectorType(_INDEX, _LANES), of) for of in lanes]
            pairs = zip(vectors[::2], [*vectors[1::2], ir.Constant(_VECTOR, ir.Undefined)], strict=False)
            vectors = [self.builder.fadd(*(self.builder.shuffle_vector(a, b, half) for half in halves)) for a, b in pairs]
        return [self.builder.extract_element(vectors[0], _INDEX(at)) for at in range(count)]


def _whole(builder: ir.IRBuilder, count: ir.Value, step: int) -> ir.Value:
    """`count` rounded down to a multiple of `step`, a power of two."""
    return builder.and_(count, _INT(-step))


def _lanes_at_once(context: Any, pairs: int) -> int:
    """Of a dot product's lanes, those whose sums for so many pairs of rows and inputs fit into the CPU's registers.

    A pass over the columns sums so many. Several passes give the same bits: no lane's sum depends on another's.
    """
    room = 24 * 16 if "+avx512f" in context.codegen().magic_tuple()[2].split(",") else 12 * 8
    return next(lanes for lanes in (32, 16, 8) if pairs * lanes <= room or lanes == 8)


def _lane_sums(
    emit: _Emitter, at_w: list[ir.Value], at_x: list[ir.Value], behind: list[ir.Value], n: ir.Value, place: tuple[int, int]
) -> list[list[ir.Value]]:
    """Pass number `place[0]` of `place[1]` over n columns: a part of the lanes, each vector of them with the sums of all pairs.

    It also fetches its part of as much memory from the addresses `behind` on.
    """
    builder, (number, passes), count = emit.builder, place, len(at_w) * len(at_x)
    at_once = _DOT_LANES // passes
    kind = ir.VectorType(_FLOAT, min(at_once, _LANES))
    lanes = range(number * at_once, (number + 1) * at_once, kind.count)
    begin = builder.mul(builder.udiv(n, _INT(passes)), _INT(number))

    def step(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        made = []
        for at, lane in enumerate(lanes):
            ahead = builder.add(builder.add(begin, builder.udiv(i, _INT(passes))), _INT(at * _LANES))
            for address in behind:
                emit.prefetch(builder.add(address, builder.mul(ahead, _INT(4))))
            offset = builder.add(i, _INT(lane))
            w_parts, x_parts = ([emit.load(address, offset, kind) for address in ats] for ats in (at_w, at_x))
            factors = [(w, x) for x in x_parts for w in w_parts]
            made += [emit.fma(w, x, total) for (w, x), total in zip(factors, sums[at * count : (at + 1) * count], strict=True)]
        return made

    zeros = [ir.Constant(kind, [0.0] * kind.count)] * (len(lanes) * count)
    sums = emit.loop(_INT(0), _whole(builder, n, _DOT_LANES), _DOT_LANES, zeros, step)
    return [sums[at : at + count] for at in range(0, len(sums), count)]


def dots(rows: int, inputs: int, fetches: bool = False) -> Any:
    """An intrinsic: y[b * y_input + r * y_row] = dot(w[r], x[b]) over n columns, for `rows` rows of weights and `inputs` inputs at once.

    If it `fetches`, it also asks for as much memory `ahead` of each row, so that a later call need not wait for it. For 6 pairs or fewer
    in one pass it does not: a core then waits for memory alone, and runs ahead by itself.
    Arguments, all intp: address of w, floats between its rows, address of x, floats between its rows, n, address of y, y_row, y_input,
    ahead (bytes; without effect if it does not fetch).
    """
    pairs = [(r, b) for b in range(inputs) for r in range(rows)]

    @intrinsic
    def dots(context, w, ws, x, xs, n, y, y_row, y_input, ahead):
        def generate(context, builder, signature, arguments):
            w, ws, x, xs, n, y, y_row, y_input, ahead = arguments
            emit = _Emitter(builder)
            at_w, at_x = [emit.row(w, ws, r) for r in range(rows)], [emit.row(x, xs, b) for b in range(inputs)]
            passes = _DOT_LANES // _lanes_at_once(context, len(pairs))
            behind = [builder.add(row, ahead) for row in at_w] if fetches and (passes > 1 or len(pairs) > 6) else []

            def rest(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                w_parts, x_parts = ([emit.load(address, i, _FLOAT) for address in ats] for ats in (at_w, at_x))
                return [emit.fma(w_parts[r], x_parts[b], total) for (r, b), total in zip(pairs, sums, strict=True)]

            whole = _whole(builder, n, _DOT_LANES)
            parts = [part for number in range(passes) for part in _lane_sums(emit, at_w, at_x, behind, n, (number, passes))]
            low, high = (emit.joined(half) for half in (parts[: len(parts) // 2], parts[len(parts) // 2 :]))
            totals = emit.sums_of_lanes([builder.fadd(*two) for two in zip(low, high, strict=True)])
            tails = emit.loop(whole, n, 1, [_FLOAT(0.0)] * len(pairs), rest)
            for (r, b), total, tail in zip(pairs, totals, tails, strict=True):
                emit.store(builder.fadd(total, tail), y, builder.add(builder.mul(y_row, _INT(r)), builder.mul(y_input, _INT(b))))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 9), generate

    return dots


def axpys(rows: int, inputs: int) -> Any:
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
            undefined, lanes = ir.Constant(_VECTOR, ir.Undefined), ir.Constant(ir.VectorType(_INDEX, _LANES), [0] * _LANES)
            spread = [
                [builder.shuffle_vector(builder.insert_element(undefined, s, _INDEX(0)), undefined, lanes) for s in of] for of in scalars
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
    integers = ir.VectorType(_INDEX, _LANES) if kind == _VECTOR else _INDEX

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
def exps(context, x, n):
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


@intrinsic
def floats(context, address):
    """A pointer to float32 from an address (intp), for numba.carray."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], _FLOAT.as_pointer())

    return types.CPointer(types.float32)(types.intp), generate
