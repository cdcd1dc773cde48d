"""Products with weights on the CPU, compiled by numba: each weight is read once for all rows that it meets.

All numbers are float32. A product is made of the dot products of cpu_vectors.py, so a row has the same bits in any batch. A function with
`own` does its thread's share, see cpu_threads.py.
"""

import numba
from numba import types

from semgap.engine.cpu_threads import FLAGS, share
from semgap.engine.cpu_vectors import axpys, dots, floats

_X_BYTES = 1 << 19  # of the inputs that a product keeps in a core's own cache while weights pass by
_AHEAD_BYTES = 2048  # of each of three streams: what memory gives while a core computes what it has
_UNIT = 48  # rows of weights that stay with one thread: whole groups of three, whole cache lines of results

_dots31, _dots34, _fetch32, _fetch33, _fetch34 = dots(3, 1), dots(3, 4), dots(3, 2, True), dots(3, 3, True), dots(3, 4, True)
_dots11, _dots14 = dots(1, 1), dots(1, 4)
_axpys11, _axpys14, _axpys41, _axpys44 = axpys(1, 1), axpys(1, 4), axpys(4, 1), axpys(4, 4)


@numba.njit(**FLAGS)
def rows_product(w, rows, columns, x, xs, count, y, ys):
    """y[count, rows] = x[count, columns] w[rows, columns]^T. Weights pass by once, three rows at a time; which three changes no bit."""
    if count <= 4:
        _from_three_places(w, rows, columns, x, xs, count, y, ys)
    else:
        _three_after_three(w, rows, columns, x, xs, count, y, ys)


@numba.njit(**FLAGS)
def _from_three_places(w, rows, columns, x, xs, count, y, ys):
    """The product with up to 4 inputs, which memory bounds: one row of each third of w, since a core reads long streams faster."""
    third = rows // 3
    for r in range(third):
        at_w, apart, at_y = w + 4 * r * columns, third * columns, y + 4 * r
        if count == 1:
            _dots31(at_w, apart, x, xs, columns, at_y, third, ys, 0)
        elif count == 2:
            _fetch32(at_w, apart, x, xs, columns, at_y, third, ys, _AHEAD_BYTES)
        elif count == 3:
            _fetch33(at_w, apart, x, xs, columns, at_y, third, ys, _AHEAD_BYTES)
        else:
            _fetch34(at_w, apart, x, xs, columns, at_y, third, ys, _AHEAD_BYTES)
    for r in range(3 * third, rows):
        _one_row(w + 4 * r * columns, columns, x, xs, count, y + 4 * r, ys)


@numba.njit(**FLAGS)
def _three_after_three(w, rows, columns, x, xs, count, y, ys):
    """The product with many inputs, which arithmetic bounds: three rows beside each other, for each block of inputs.

    They meet up to 4 inputs at once, for which a core has registers; the first inputs that they meet also fetch the next three rows.
    """
    block = max(4, _X_BYTES // (4 * columns) // 4 * 4)
    for first in range(0, count, block):
        end = min(count, first + block)
        for r in range(0, rows, 3):
            at_w = w + 4 * r * columns
            for b in range(first, end, 4):
                inputs, at_x, at_y = min(4, end - b), x + 4 * b * xs, y + 4 * (b * ys + r)
                if r + 3 <= rows:
                    _three_rows(at_w, columns, columns, at_x, xs, inputs, at_y, 1, ys, 12 * columns if b == first else 0)
                else:
                    for row in range(rows - r):
                        _one_row(at_w + 4 * row * columns, columns, at_x, xs, inputs, at_y + 4 * row, ys)


@numba.njit(**FLAGS)
def _three_rows(w, apart, columns, x, xs, inputs, y, y_row, ys, ahead):
    """The products of three rows of weights, `apart` floats from each other, with up to 4 inputs.

    For 2 or more it fetches weights so many bytes `ahead`, unless that is 0.
    """
    if inputs == 4:
        if ahead:
            _fetch34(w, apart, x, xs, columns, y, y_row, ys, ahead)
        else:
            _dots34(w, apart, x, xs, columns, y, y_row, ys, 0)
    elif inputs == 3:
        _fetch33(w, apart, x, xs, columns, y, y_row, ys, ahead)
    elif inputs == 2:
        _fetch32(w, apart, x, xs, columns, y, y_row, ys, ahead)
    else:
        _dots31(w, apart, x, xs, columns, y, y_row, ys, 0)


@numba.njit(**FLAGS)
def _one_row(w, columns, x, xs, inputs, y, ys):
    """The products of one row of weights with up to 4 inputs."""
    if inputs == 4:
        _dots14(w, columns, x, xs, columns, y, 1, ys, 0)
    else:
        for b in range(inputs):
            _dots11(w, columns, x + 4 * b * xs, xs, columns, y + 4 * b * ys, 1, ys, 0)


@numba.njit(**FLAGS)
def add_columns_product(w, ws, rows, columns, x, xs, count, y, ys):
    """y[count, rows] += x[count, columns] w[columns, rows], rows of w `ws` floats apart. Adds one row of w after the other."""
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
def product(linear, x, out, own):
    """out[n, rows] = x[n, columns] W^T + bias, for a linear as of `project`; rows of x and out may lie apart. Gives (begin, end)."""
    n, rows, columns = x.shape[0], linear[1], linear[2]
    begin, end = share(rows, own, _UNIT)
    at_x, xs, at_out, ys = types.intp(x.ctypes.data), x.strides[0] // 4, types.intp(out.ctypes.data) + 4 * begin, out.strides[0] // 4
    if linear[4]:
        out[:, begin:end] = 0
        add_columns_product(linear[0] + 4 * begin, rows, end - begin, columns, at_x, xs, n, at_out, ys)
    else:
        rows_product(linear[0] + 4 * begin * columns, end - begin, columns, at_x, xs, n, at_out, ys)
    if linear[3]:
        bias = numba.carray(floats(linear[3]), rows)
        for b in range(n):
            for r in range(begin, end):
                out[b, r] += bias[r]
    return begin, end
