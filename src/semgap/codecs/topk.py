"""The head of a distribution: the largest logits exactly, and the weight of the rest."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from semgap.codecs.base import Codec, CodecError
from semgap.codecs.cast import from_float32
from semgap.codecs.largest import largest
from semgap.tensors import DType, Tensor, TensorClass, bytes_view

_COUNT = np.dtype("<u4")
_REST = np.dtype("<f4")
DEFAULT_K = 256


@dataclass(frozen=True)
class TopK(Codec):
    """The k largest logits of each row bit for bit with their ids, and the log-sum-exp of all others. Lossy, except for the k kept ones.

    Rows lie along the last axis. Among equal logits the lowest ids are kept. A decoded row has every other entry at
    rest - log(vocab - k), so that the softmax of the whole and of each kept id is right; and below the smallest kept logit, so that
    greedy and top-k up to k choose the same tokens as from the full row.
    Payload: k (u32), then for all rows the values (the tensor's dtype, largest first), the ids (u16, or u32 for a vocabulary over
    65,536) and the rest (f32). Only encoding reads `k`. CodecError for k over the vocabulary, integers, NaN and +infinity.
    """

    k: int = DEFAULT_K

    name, code, exact = "topk", 8, False
    accepts = frozenset({TensorClass.LOGITS})

    def encode(self, tensor: Tensor) -> Sequence[memoryview]:
        rows, vocab = _rows_of(tensor.dtype, tensor.shape)
        if not 1 <= self.k <= vocab:
            raise CodecError(f"topk with k = {self.k} over a vocabulary of {vocab}; use k in 1..{vocab}")
        logits = tensor.as_float32().reshape(rows, vocab)
        if not (logits.max(axis=1, initial=-np.inf) < np.inf).all():  # one NaN makes the maximum NaN
            raise CodecError("codec 'topk' takes no NaN and no +infinity, which have no softmax; use codec raw or planes_zstd")
        ids = largest(logits, self.k)
        order = np.argsort(-np.take_along_axis(logits, ids, axis=1), axis=1, kind="stable")
        ids = np.take_along_axis(ids, order, axis=1)
        values = np.take_along_axis(tensor.numpy().reshape(rows, vocab), ids, axis=1)
        rest = _log_sum_exp_without(logits, ids)
        count = np.array([self.k], dtype=_COUNT)
        return tuple(bytes_view(part) for part in (count, values, ids.astype(_id_type(vocab)), rest))

    def decode(self, payload: memoryview, dtype: DType, shape: tuple[int, ...]) -> memoryview:
        rows, vocab = _rows_of(dtype, shape)
        values, ids, rest = _parts(payload, dtype, rows, vocab)
        _check_parts(Tensor.from_numpy(values, TensorClass.LOGITS, dtype).as_float32(), ids, rest, vocab)
        out = np.empty((rows, vocab), dtype=dtype.numpy)
        if values.shape[1] < vocab:
            out[...] = _fill(rest, values[:, -1], vocab - values.shape[1], dtype)[:, None]
        np.put_along_axis(out, ids, values, axis=1)
        return bytes_view(out)


def _rows_of(dtype: DType, shape: tuple[int, ...]) -> tuple[int, int]:
    if not dtype.is_float or not shape:
        raise CodecError(f"codec 'topk' takes rows of float logits, not {dtype.name} {shape}")
    return prod(shape[:-1]), shape[-1]


def _id_type(vocab: int) -> np.dtype:
    return np.dtype("<u2") if vocab <= 1 << 16 else np.dtype("<u4")


def _log_sum_exp_without(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """log sum exp (float32) of each row without the entries at `ids` (n, k); -infinity if no entry remains."""
    others = logits.copy()
    np.put_along_axis(others, ids, -np.inf, axis=1)
    top = others.max(axis=1, keepdims=True, initial=-np.inf)
    shift = np.where(np.isneginf(top), 0, top)
    others -= shift
    np.exp(others, out=others)
    with np.errstate(divide="ignore"):
        return (np.log(others.sum(axis=1, dtype=np.float64)) + shift[:, 0]).astype(_REST)


def _parts(payload: memoryview, dtype: DType, rows: int, vocab: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values (rows, k) in the tensor's dtype, ids (rows, k) and rest (rows,) of a payload. CodecError for another length."""
    if payload.nbytes < _COUNT.itemsize:
        raise CodecError(f"topk payload of {payload.nbytes} bytes; its k alone takes {_COUNT.itemsize}")
    k = int(np.frombuffer(payload[: _COUNT.itemsize], dtype=_COUNT)[0])
    row_bytes = k * (dtype.itemsize + _id_type(vocab).itemsize) + _REST.itemsize
    if not 1 <= k <= vocab or payload.nbytes != _COUNT.itemsize + rows * row_bytes:
        raise CodecError(f"topk payload of {payload.nbytes} bytes with k = {k} for {rows} rows of {vocab}")
    at = _COUNT.itemsize + rows * k * dtype.itemsize
    end = payload.nbytes - rows * _REST.itemsize
    values = np.frombuffer(payload[_COUNT.itemsize : at], dtype=dtype.numpy).reshape(rows, k)
    ids = np.frombuffer(payload[at:end], dtype=_id_type(vocab)).reshape(rows, k).astype(np.int64)
    return values, ids, np.frombuffer(payload[end:], dtype=_REST)


def _check_parts(values: np.ndarray, ids: np.ndarray, rest: np.ndarray, vocab: int) -> None:
    """CodecError unless values (rows, k) fall, ids are distinct, below `vocab` and rising among equals, and rest is below infinity."""
    falls = values[:, 1:] < values[:, :-1]
    ties = (values[:, 1:] == values[:, :-1]) & (ids[:, 1:] > ids[:, :-1])
    by_id = np.sort(ids, axis=1)
    ordered = (falls | ties).all() and not np.isnan(values).any()
    distinct = (by_id[:, 1:] > by_id[:, :-1]).all() and (by_id[:, -1] < vocab).all()
    if not (ordered and distinct) or np.isnan(rest).any() or np.isposinf(rest).any():
        raise CodecError("topk payload is damaged: its rows are not distinct ids in falling order of their logits")


def _fill(rest: np.ndarray, smallest: np.ndarray, count: int, dtype: DType) -> np.ndarray:
    """The value (rows,), in the tensor's dtype, of the `count` other entries of each row: below `smallest` even if rounding ties."""
    even = rest - np.float32(np.log(count))
    fill = np.frombuffer(from_float32(even.astype(np.float32, copy=False), dtype), dtype=dtype.numpy)
    as_float32 = [Tensor.from_numpy(part, TensorClass.LOGITS, dtype).as_float32() for part in (fill, smallest)]
    return np.where(as_float32[0] < as_float32[1], fill, _next_below(smallest, dtype))


def _next_below(values: np.ndarray, dtype: DType) -> np.ndarray:
    """The next smaller number in the same dtype for each of `values`; -infinity stays."""
    word = np.dtype(f"<u{dtype.itemsize}")
    bits = np.ascontiguousarray(values).view(word)
    sign = word.type(1 << (8 * dtype.itemsize - 1))
    infinity = np.frombuffer(from_float32(np.full(1, -np.inf, dtype=np.float32), dtype), dtype=word)[0]
    is_zero = bits & ~sign == 0
    below = np.where(is_zero, sign | word.type(1), np.where(bits & sign, bits + word.type(1), bits - word.type(1)))
    return np.where(bits == infinity, bits, below).astype(word).view(dtype.numpy)
