"""topk: the largest logits exactly, and the weight of the rest."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semgap import codecs
from semgap.codecs import CodecError, TopK
from semgap.tensors import DType, Tensor, TensorClass

FLOATS = (DType.F32, DType.F16, DType.BF16)


def logits_tensor(values: np.ndarray, dtype: DType = DType.F32) -> Tensor:
    if dtype is DType.BF16:
        return Tensor.from_numpy((values.view(np.uint32) >> 16).astype(np.uint16), TensorClass.LOGITS, DType.BF16)
    return Tensor.from_numpy(values.astype(dtype.numpy), TensorClass.LOGITS)


def round_trip(tensor: Tensor, k: int) -> Tensor:
    encoded = codecs.encode(tensor, TopK(k))
    payload = memoryview(b"".join(encoded.buffers))
    return codecs.decode(encoded.codec, tensor.cls, tensor.dtype, tensor.shape, payload)[0]


def log_sum_exp(rows: np.ndarray) -> np.ndarray:
    wide = rows.astype(np.float64)
    top = wide.max(axis=-1, keepdims=True)
    return np.log(np.exp(wide - top).sum(axis=-1)) + top[..., 0]


def best(row: np.ndarray, k: int) -> list[int]:
    """The k largest, largest first and the lowest ids first among equals, by the plainest means."""
    return sorted(range(row.size), key=lambda i: (-row[i], i))[:k]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, int]:
    vocab = draw(st.integers(1, 60))
    shape = (*draw(st.lists(st.integers(0, 3), max_size=2)), vocab)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = rng.normal(scale=draw(st.sampled_from([1e-3, 1.0, 30.0])), size=shape)
    if draw(st.booleans()):
        values = np.round(values)  # ties
    if draw(st.booleans()):
        values[rng.random(shape) < 0.3] = -np.inf
    return logits_tensor(values.astype(np.float32), draw(st.sampled_from(FLOATS))), draw(st.integers(1, vocab))


@given(case=cases())
@settings(max_examples=300, deadline=None)
def test_the_k_largest_keep_their_bits_and_their_order(case: tuple[Tensor, int]) -> None:
    tensor, k = case
    back = round_trip(tensor, k)
    vocab = tensor.shape[-1]
    pairs = zip(tensor.as_float32().reshape(-1, vocab), back.as_float32().reshape(-1, vocab), strict=True)
    bits = zip(tensor.numpy().reshape(-1, vocab), back.numpy().reshape(-1, vocab), strict=True)
    for (row, got), (row_bits, got_bits) in zip(pairs, bits, strict=True):
        kept = best(row, k)
        assert (row_bits[kept] == got_bits[kept]).all()
        if np.isfinite(row[kept[-1]]):
            assert best(got, k) == kept
            assert np.argmax(got) == np.argmax(row)
            others = np.delete(got, kept)
            assert (others < row[kept[-1]]).all()
            assert np.unique(others).size <= 1


@given(seed=st.integers(0, 2**32), k=st.integers(1, 300), scale=st.sampled_from([0.0, 0.1, 3.0, 20.0]), shift=st.sampled_from([0.0, 800.0]))
@settings(max_examples=60, deadline=None)
def test_softmax_is_right_for_the_kept_and_in_sum(seed: int, k: int, scale: float, shift: float) -> None:
    rows = (np.random.default_rng(seed).normal(scale=scale, size=(4, 300)) + shift).astype(np.float32)
    got = round_trip(logits_tensor(rows), k).as_float32()
    np.testing.assert_allclose(log_sum_exp(got), log_sum_exp(rows), atol=2e-6 * max(1, np.abs(rows).max()))


def test_the_weight_of_the_rest_is_right_where_it_lies_far_below() -> None:
    row = np.array([[1000.0, 0.0, np.log(3.0), -np.inf]], dtype=np.float32)
    got = round_trip(logits_tensor(row), 1).as_float32()
    np.testing.assert_allclose(got, [[1000.0, *[np.log(4 / 3)] * 3]], rtol=1e-6)


def test_the_lowest_ids_are_kept_among_equals() -> None:
    row = np.array([1.0, 5.0, 1.0, 5.0, 1.0], dtype=np.float32)
    got = round_trip(logits_tensor(row), 3).as_float32()
    assert got[[1, 3, 0]].tolist() == [5.0, 5.0, 1.0]
    assert (got[[2, 4]] < 1.0).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [0.0, -3.0, 100.0])
def test_greedy_agrees_where_rounding_would_lift_the_rest_to_the_top(dtype: DType, value: float) -> None:
    row = np.full(50, value, dtype=np.float32)
    row[30] += {DType.F32: 1e-5, DType.F16: 0.0625, DType.BF16: 0.5}[dtype]  # at most one step of the dtype at 100
    tensor = logits_tensor(row, dtype)
    assert np.argmax(tensor.as_float32()) == 30
    assert np.argmax(round_trip(tensor, 1).as_float32()) == np.argmax(tensor.as_float32())


@given(case=cases())
@settings(max_examples=50, deadline=None)
def test_k_of_the_whole_vocabulary_is_exact(case: tuple[Tensor, int]) -> None:
    tensor, _ = case
    assert bytes(round_trip(tensor, tensor.shape[-1]).data) == bytes(tensor.data)


def test_a_row_of_a_large_vocabulary_takes_what_256_values_and_ids_take() -> None:
    row = np.random.default_rng(1).normal(size=(1, 49_152)).astype(np.float32)
    encoded = codecs.encode(logits_tensor(row), "topk")
    assert encoded.nbytes == 4 + 256 * (4 + 2) + 4
    larger = codecs.encode(logits_tensor(np.zeros((1, 70_000), dtype=np.float32)), "topk")
    assert larger.nbytes == 4 + 256 * (4 + 4) + 4


def test_the_receiver_need_not_know_k() -> None:
    tensor = logits_tensor(np.arange(90, dtype=np.float32)[None])
    for k in (1, 7, 90):
        assert (round_trip(tensor, k).as_float32()[0] >= 90 - k).sum() == k


@pytest.mark.parametrize("k", [0, 6])
def test_k_outside_the_vocabulary_is_refused(k: int) -> None:
    with pytest.raises(CodecError, match=f"k = {k} over a vocabulary of 5"):
        codecs.encode(logits_tensor(np.zeros((2, 5), dtype=np.float32)), TopK(k))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_without_a_softmax_are_refused(bad: float) -> None:
    with pytest.raises(CodecError, match="NaN and"):
        codecs.encode(logits_tensor(np.array([0.0, bad, 1.0], dtype=np.float32)), TopK(1))


@pytest.mark.parametrize(
    ("values", "ids", "rest"),
    [
        ([2.0, 1.0], [3, 3], 0.0),  # one id twice
        ([2.0, 1.0], [3, 9], 0.0),  # beyond the vocabulary
        ([1.0, 2.0], [3, 4], 0.0),  # rising
        ([1.0, 1.0], [4, 3], 0.0),  # equals out of order
        ([np.nan, 1.0], [3, 4], 0.0),
        ([2.0, 1.0], [3, 4], np.nan),
        ([2.0, 1.0], [3, 4], np.inf),
    ],
)
def test_rows_that_no_encoder_writes_are_refused(values: list[float], ids: list[int], rest: float) -> None:
    parts = (np.uint32(2), np.array(values, dtype=np.float32), np.array(ids, dtype=np.uint16), np.float32(rest))
    payload = memoryview(b"".join(part.tobytes() for part in parts))
    with pytest.raises(CodecError, match="damaged"):
        codecs.decode(8, TensorClass.LOGITS, DType.F32, (1, 9), payload)
