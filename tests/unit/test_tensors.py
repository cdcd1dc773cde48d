"""Tensors as flat bytes: what may cross, and that wrapping and viewing changes nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from semgap.tensors import DType, Tensor, TensorClass, bytes_view, nbytes_of

NUMPY_DTYPES = [dtype.numpy for dtype in DType if dtype is not DType.BF16]
ARRAYS = st.sampled_from(NUMPY_DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
)


@given(ARRAYS)
def test_an_array_comes_back_from_its_flat_bytes_bit_for_bit(array: np.ndarray) -> None:
    tensor = Tensor.from_numpy(array, TensorClass.LOGITS)
    assert tensor.data.nbytes == nbytes_of(tensor.dtype, tensor.shape) == array.nbytes
    assert tensor.data.format == "B" and tensor.data.ndim == 1
    assert tensor.shape == array.shape
    assert tensor.numpy().tobytes() == array.tobytes()


@given(hnp.arrays(np.float32, (6, 4)))
def test_a_transposed_array_crosses_in_c_order(array: np.ndarray) -> None:
    assert np.array_equal(Tensor.from_numpy(array.T, TensorClass.KV).numpy(), array.T, equal_nan=True)


def test_wrapping_a_contiguous_array_copies_nothing() -> None:
    array = np.zeros(8, np.float32)
    tensor = Tensor.from_numpy(array, TensorClass.KV)
    array[3] = 7
    assert tensor.numpy()[3] == 7


@pytest.mark.parametrize("array", [np.array(["text"]), np.array([object()]), np.zeros(3), np.zeros(2, np.complex64), np.zeros(2, ">f4")])
def test_a_dtype_that_may_not_cross_is_refused_by_name(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="cannot cross the wire"):
        Tensor.from_numpy(array, TensorClass.LOGITS)


def test_an_array_is_refused_under_another_dtype_than_its_own() -> None:
    with pytest.raises(ValueError, match="float32 cannot cross the wire as"):
        Tensor.from_numpy(np.zeros(2, np.float32), TensorClass.LOGITS, DType.BF16)


@given(hnp.arrays(np.uint16, st.integers(0, 50)))
def test_bf16_bit_patterns_are_the_upper_halves_of_float32(patterns: np.ndarray) -> None:
    values = Tensor.from_numpy(patterns, TensorClass.LOGITS, DType.BF16).as_float32()
    assert values.dtype == np.float32
    assert (values.view(np.uint32) >> 16).astype(np.uint16).tobytes() == patterns.tobytes()


@given(hnp.arrays(np.float16, st.integers(0, 50)))
def test_fp16_widens_exactly_to_float32(array: np.ndarray) -> None:
    assert np.array_equal(Tensor.from_numpy(array, TensorClass.LOGITS).as_float32(), array.astype(np.float32), equal_nan=True)


def test_every_dtype_is_known_to_torch_under_its_name_with_its_size() -> None:
    import torch

    for dtype in DType:
        assert getattr(torch, dtype.torch_name).itemsize == dtype.itemsize
        assert DType.from_torch_name(str(getattr(torch, dtype.torch_name))) is dtype
        assert dtype.is_float == getattr(torch, dtype.torch_name).is_floating_point


@pytest.mark.parametrize("name", ["float64", "torch.complex64", "object", ""])
def test_an_unknown_torch_dtype_is_refused_with_what_is_allowed(name: str) -> None:
    with pytest.raises(ValueError, match="float32"):
        DType.from_torch_name(name)


def test_an_empty_buffer_gives_an_empty_flat_view() -> None:
    assert bytes_view(np.zeros((0, 3), np.float32)).nbytes == 0
