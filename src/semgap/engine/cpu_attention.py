"""Attention of rows of many requests over their KV blocks, with rotary embedding, compiled by numba. All numbers are float32.

A block is [2, kv_heads, positions, head_dim], keys before values; a slab is one block of max_length positions. A row's scores, softmax and
sum of values go over its positions in order, whatever blocks they lie in and whatever rows stand beside it. So a row has the same bits
over a slab and over blocks, alone and in any batch.

`rows`: (positions (n,), places (n,), edges [m + 1, 2]) as of batch.Rows. A function with `own` does its thread's share, see cpu_threads.py.
"""

import numba
import numpy as np
from numba import types

from semgap.engine.cpu_products import add_columns_product, rows_product
from semgap.engine.cpu_threads import FLAGS, share
from semgap.engine.cpu_vectors import exps, floats

TILE = 16  # rows that visit a block together, and read its keys from memory once
GROUP = 8  # the most query heads of a KV head that do


@numba.njit(**FLAGS)
def rotate(vectors, heads, head_dim, positions, cosines, sines, interleaved):
    """Rotary embedding of vectors[n, >= heads * head_dim], in place; row b stands at positions[b].

    `cosines`, `sines`: [max_length, pairs]. Pair i is (2i, 2i + 1) if `interleaved`, else (i, pairs + i); other dimensions stay.
    """
    pairs = cosines.shape[1]
    apart, step = (1, 2) if interleaved else (pairs, 1)
    for b in range(vectors.shape[0]):
        position = positions[b]
        for head in range(heads):
            for i in range(pairs):
                at = head * head_dim + step * i
                u, v, c, s = vectors[b, at], vectors[b, at + apart], cosines[position, i], sines[position, i]
                vectors[b, at], vectors[b, at + apart] = u * c - v * s, v * c + u * s


@numba.njit(**FLAGS)
def append(keys_values, blocks, positions, places, sizes):
    """Writes keys_values[n, 2 * kv_heads * head_dim], keys first: row b into block places[b], at positions[b] modulo its positions.

    `blocks`: addresses. sizes: (kv_heads, positions of a block, head_dim).
    """
    kv_heads, length, head_dim = sizes
    for b in range(keys_values.shape[0]):
        block = numba.carray(floats(blocks[places[b]]), (2, kv_heads, length, head_dim))
        at = positions[b] % length
        for part in range(2):
            for head in range(kv_heads):
                begin = (part * kv_heads + head) * head_dim
                for i in range(head_dim):
                    block[part, head, at, i] = keys_values[b, begin + i]


@numba.njit(**FLAGS)
def attend(queries, rows, blocks, sizes, heads, scale, work, out, own):
    """out[n, heads * head_dim]: causal attention of queries over their requests' blocks; `sizes` as of `append`.

    The heads of a group and up to TILE rows go together. work: packed queries and their sums [threads, 2, TILE * GROUP, head_dim], scores
    [threads, TILE * GROUP, >= positions seen]; fewer than TILE * GROUP rows do where there are fewer.
    """
    group, n, edges = heads // sizes[0], queries.shape[0], rows[2]
    packed, sums, scores = work[0][own[0], 0], work[0][own[0], 1], work[1][own[0]]
    head, end = share(heads, own, 1)
    while head < end:
        taken, run = min(GROUP, end - head, group - head % group), 0
        for first in range(0, n, TILE):
            last = min(n, first + TILE)
            while edges[run + 1, 0] <= first:
                run += 1
            _pack(queries, first, last, head, taken, packed)
            sums[: (last - first) * taken] = 0
            tile = (first, last, run, taken)
            _visit(rows, blocks, sizes, tile, 4 * (head // group) * sizes[1] * sizes[2], packed, scores, sums, False)
            _weigh(rows, tile, scale, scores)
            _visit(rows, blocks, sizes, tile, 4 * (head // group + sizes[0]) * sizes[1] * sizes[2], packed, scores, sums, True)
            _unpack(sums, first, last, head, taken, out)
        head += taken


@numba.njit(**FLAGS)
def _pack(queries, first, last, head, taken, packed):
    """Rows first..last - 1 of heads head..head + taken - 1, a row's heads below each other."""
    head_dim = packed.shape[1]
    for b in range(first, last):
        for h in range(taken):
            for i in range(head_dim):
                packed[(b - first) * taken + h, i] = queries[b, (head + h) * head_dim + i]


@numba.njit(**FLAGS)
def _unpack(sums, first, last, head, taken, out):
    head_dim = sums.shape[1]
    for b in range(first, last):
        for h in range(taken):
            for i in range(head_dim):
                out[b, (head + h) * head_dim + i] = sums[(b - first) * taken + h, i]


@numba.njit(**FLAGS)
def _visit(rows, blocks, sizes, tile, part, packed, scores, sums, weighs):
    """Scores of a tile's rows with the keys of the blocks that they see or, if it `weighs`, the sums of values by those scores.

    It goes by depth, a block's place in its request: requests that stand next to each other and share a block visit it together.
    tile: (first row, last + 1, the first row's run, rows of `packed` a row). `part`: bytes from a block to its keys or values.
    """
    positions, _, edges = rows
    first, last, run, taken = tile
    length, head_dim, row = sizes[1], sizes[2], scores.shape[1]
    at_q, at_scores, at_sums = types.intp(packed.ctypes.data), types.intp(scores.ctypes.data), types.intp(sums.ctypes.data)
    for depth in range(_depths(rows, tile, length)):
        at = run
        while edges[at, 0] < last:
            begin, end = max(first, edges[at, 0]), min(last, edges[at + 1, 0])
            seen, block = min(length, positions[end - 1] + 1 - depth * length), blocks[edges[at, 1] + depth]
            at += 1
            if seen <= 0:
                continue
            while edges[at, 0] < last and edges[at, 1] + depth < edges[at + 1, 1] and blocks[edges[at, 1] + depth] == block:
                at += 1
            q, some = (begin - first) * taken, (min(last, edges[at, 0]) - begin) * taken
            score = at_scores + 4 * (q * row + depth * length)
            if weighs:
                add_columns_product(block + part, head_dim, head_dim, seen, score, row, some, at_sums + 4 * q * head_dim, head_dim)
            else:
                rows_product(block + part, seen, head_dim, at_q + 4 * q * head_dim, head_dim, some, score, row)


@numba.njit(**FLAGS)
def _depths(rows, tile, length):
    """The most blocks that a run of a tile sees."""
    positions, _, edges = rows
    _, last, at, _ = tile
    most = 0
    while edges[at, 0] < last:
        most = max(most, positions[min(last, edges[at + 1, 0]) - 1] // length + 1)
        at += 1
    return most


@numba.njit(**FLAGS)
def _weigh(rows, tile, scale, scores):
    """Softmax of a tile's scores: each row over the positions that it sees. Those that only later rows of its run see get 0."""
    positions, _, edges = rows
    begin, last, run, taken = tile
    first = begin
    while begin < last:
        end = min(last, edges[run + 1, 0])
        most = positions[end - 1] + 1
        for at in range((begin - first) * taken, (end - first) * taken):
            seen = positions[first + at // taken] + 1
            softmax(scores[at, :seen], scale)
            scores[at, seen:most] = 0
        begin, run = end, run + 1


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
