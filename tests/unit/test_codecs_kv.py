"""int8 and int4: groups of 32 along positions for keys and along channels for values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semgap import codecs
from semgap.codecs import CodecError
from semgap.tensors import DType, Tensor, TensorClass

STEPS = {"int8": 255, "int4": 15}
UNIT_ROUNDOFF = {DType.F32: 2.0**-24, DType.F16: 2.0**-11, DType.BF16: 2.0**-8}


def kv_tensor(values: np.ndarray, dtype: DType = DType.F32) -> Tensor:
    if dtype is DType.BF16:
        return Tensor.from_numpy((values.view(np.uint32) >> 16).astype(np.uint16), TensorClass.KV, DType.BF16)
    return Tensor.from_numpy(values.astype(dtype.numpy), TensorClass.KV)


def round_trip(tensor: Tensor, name: str) -> np.ndarray:
    encoded = codecs.encode(tensor, name)
    payload = memoryview(b"".join(encoded.buffers))
    return codecs.decode(encoded.codec, tensor.cls, tensor.dtype, tensor.shape, payload)[0].as_float32()


def largest_error(values: np.ndarray, steps: int, axis: int) -> np.ndarray:
    """Half a step of each value's own group, with the fp16 rounding of its zero and scale, in the shape of `values`."""
    out = np.empty_like(values)
    length = values.shape[axis]
    for begin in range(0, length, 32):
        part = np.take(values, range(begin, min(begin + 32, length)), axis=axis)
        low, high = part.min(axis=axis, keepdims=True), part.max(axis=axis, keepdims=True)
        spread = high - low + np.abs(low) * 2.0**-10 + 2.0**-23
        bound = 0.5 * (spread / steps * (1 + 2.0**-9) + 2.0**-23)
        target = out[..., begin : begin + 32] if axis == -1 else out[..., begin : begin + 32, :]
        target[...] = bound
    return out


@pytest.mark.parametrize("name", STEPS)
@given(
    dims=st.tuples(st.integers(0, 2), st.integers(0, 2), st.sampled_from([0, 1, 5, 31, 32, 33, 70]), st.sampled_from([0, 1, 32, 40, 64])),
    dtype=st.sampled_from(list(UNIT_ROUNDOFF)),
    scale=st.sampled_from([1e-6, 1.0, 300.0]),
    offset=st.sampled_from([0.0, -20.0, 1000.0]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_no_value_is_off_by_more_than_half_a_step_of_its_group(
    name: str, dims: tuple[int, int, int, int], dtype: DType, scale: float, offset: float, seed: int
) -> None:
    layers, heads, positions, head_dim = dims
    drawn = np.random.default_rng(seed).normal(offset, scale, (layers, 2, heads, positions, head_dim)).astype(np.float32)
    tensor = kv_tensor(drawn, dtype)
    values, back = tensor.as_float32(), round_trip(tensor, name)
    assert back.shape == values.shape
    if not values.size:
        return
    rounding = (np.abs(values) + scale) * 4 * UNIT_ROUNDOFF[dtype]
    for index, axis in ((0, -2), (1, -1)):
        bound = largest_error(values[:, index], STEPS[name], axis) + rounding[:, index]
        assert (np.abs(back - values)[:, index] <= bound).all()


@pytest.mark.parametrize(("name", "nbytes"), [("int8", 8 + 1), ("int4", 4 + 1)])
def test_whole_groups_of_32_take_their_codes_and_four_bytes(name: str, nbytes: float) -> None:
    tensor = kv_tensor(np.random.default_rng(1).normal(size=(3, 2, 2, 64, 64)).astype(np.float32))
    assert codecs.encode(tensor, name).nbytes == 3 * 2 * 2 * 64 * 64 * nbytes / 8


def test_an_outlying_key_channel_does_not_spoil_the_others() -> None:
    values = np.random.default_rng(2).normal(size=(1, 2, 1, 32, 64)).astype(np.float32)
    values[:, 0, :, :, 7] *= 1000
    error = np.abs(round_trip(kv_tensor(values), "int8") - values)
    assert np.delete(error[:, 0], 7, axis=-1).max() < 0.02


def test_an_outlying_value_token_does_not_spoil_the_others() -> None:
    values = np.random.default_rng(3).normal(size=(1, 2, 1, 32, 64)).astype(np.float32)
    values[:, 1, :, 7] *= 1000
    error = np.abs(round_trip(kv_tensor(values), "int8") - values)
    assert np.delete(error[:, 1], 7, axis=-2).max() < 0.02


@pytest.mark.parametrize("name", STEPS)
def test_a_constant_that_fp16_holds_comes_back_exactly(name: str) -> None:
    values = np.full((1, 2, 1, 33, 33), -2.5, dtype=np.float32)
    np.testing.assert_array_equal(round_trip(kv_tensor(values), name), values)


@pytest.mark.parametrize("name", STEPS)
def test_the_ends_of_fp16_come_back_finite(name: str) -> None:
    values = np.random.default_rng(4).choice([-65504.0, 65504.0, 65000.0, 1.0], (1, 2, 1, 40, 40)).astype(np.float32)
    assert np.isfinite(round_trip(kv_tensor(values, DType.F16), name)).all()


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e5, -1e5])
def test_values_that_no_grid_holds_are_refused(name: str, bad: float) -> None:
    for index in (0, 1):
        values = np.zeros((1, 2, 1, 40, 40), dtype=np.float32)
        values[0, index, 0, 39, 39] = bad
        with pytest.raises(CodecError, match="finite"):
            codecs.encode(kv_tensor(values), name)


def test_integers_and_other_shapes_are_refused() -> None:
    for array in (np.zeros((1, 2, 1, 4, 4), dtype=np.int64), np.zeros((1, 1, 1, 4, 4), dtype=np.float32)):
        with pytest.raises(CodecError, match="layers, 2, heads"):
            codecs.encode(Tensor.from_numpy(array, TensorClass.KV), "int8")
