"""Codecs that promise the very bits back: raw, zstd, planes_zstd and compact."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semgap import codecs
from semgap.codecs import CODECS, CodecError, planes
from semgap.codecs.plane_kernels import COMPILED
from semgap.codecs.zstd import Zstd
from semgap.engine import cpu_planes
from semgap.tensors import DType, Tensor, TensorClass, bytes_view, nbytes_of

ANY_CLASS_EXACT = ("raw", "zstd", "planes_zstd")
SPECIALS = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-42, -65504.0, 1.0], dtype=np.float32)


def round_trip(tensor: Tensor, by: str | codecs.Codec) -> Tensor:
    """The tensor after its payload went through one joined, unaligned, read-only buffer, as a receiver may hold it."""
    encoded = codecs.encode(tensor, by)
    payload = b"".join([b"-", *encoded.buffers])
    assert encoded.nbytes == len(payload) - 1
    return codecs.decode(encoded.codec, tensor.cls, tensor.dtype, tensor.shape, memoryview(payload)[1:])[0]


@given(st.integers(0, 2**32), st.integers(0, 3000), st.booleans())
@settings(max_examples=200, deadline=None)
def test_compiled_planes_are_numpys_bit_for_bit(seed: int, count: int, unaligned: bool) -> None:
    words = np.random.default_rng(seed).integers(0, 1 << 32, count, dtype=np.uint32)
    memory = memoryview(bytes(unaligned) + words.tobytes())[unaligned:]
    cpu_planes.load()
    compiled = planes._split(memory, DType.F32)
    assert np.array_equal(planes._merge(compiled, DType.F32), words)
    kernels = COMPILED.pop(DType.F32)
    try:
        for ours, theirs in zip(planes._split(memory, DType.F32), compiled, strict=True):
            assert np.array_equal(ours, theirs)
        assert np.array_equal(planes._merge(compiled, DType.F32), words)
    finally:
        COMPILED[DType.F32] = kernels


def test_a_low_plane_that_is_no_noise_is_compressed() -> None:
    values = np.random.default_rng(3).standard_normal(1 << 15).astype(np.float32)
    noisy, short = values, (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    sizes = [codecs.encode(Tensor.from_numpy(each, TensorClass.KV), "planes_zstd").nbytes / each.nbytes for each in (noisy, short)]
    assert 0.7 < sizes[0] < 0.9 and sizes[1] < 0.45, "float32 that holds bfloat16 values has two planes of zeros"


@pytest.mark.parametrize("level", [3, 6, 19])
def test_a_frame_of_any_level_decodes_as_one_of_level_1(level: int) -> None:
    values = np.resize(np.random.default_rng(5).integers(0, 40, 5 << 14).astype(np.float32), 3 << 20)  # more than level 19's window
    for count in (100, values.size):
        tensor = Tensor.from_numpy(values[:count], TensorClass.WEIGHTS)
        assert round_trip(tensor, Zstd(level)).data == tensor.data


@st.composite
def tensors(draw: st.DrawFn, cls: TensorClass = TensorClass.LOGITS) -> Tensor:
    """A tensor of any dtype and shape: random bits (every NaN), bell-shaped values, or special values."""
    dtype = draw(st.sampled_from(list(DType)))
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=4)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = int(np.prod(shape, dtype=int))
    kind = draw(st.sampled_from(["bits", "bell", "specials"]))
    if kind == "bits" or not dtype.is_float:
        data = rng.bytes(nbytes_of(dtype, shape))
    else:
        values = rng.normal(size=count).astype(np.float32) if kind == "bell" else rng.choice(SPECIALS, count)
        data = values.view(np.uint16)[1::2].tobytes() if dtype is DType.BF16 else values.astype(dtype.numpy).tobytes()
    return Tensor(cls, dtype, shape, memoryview(data))


@pytest.mark.parametrize("name", ANY_CLASS_EXACT)
@given(tensor=tensors())
def test_every_bit_of_any_tensor_comes_back(name: str, tensor: Tensor) -> None:
    assert bytes(round_trip(tensor, name).data) == bytes(tensor.data)


@pytest.mark.parametrize("name", ANY_CLASS_EXACT)
@pytest.mark.parametrize("dtype", list(DType))
def test_a_tensor_of_many_blocks_comes_back(name: str, dtype: DType) -> None:
    values = np.random.default_rng(1).normal(scale=50, size=300_000).astype(np.float32)
    bits = values.view(np.uint32) if dtype is not DType.BF16 else values.view(np.uint16)[1::2]
    array = bits.astype(dtype.numpy) if not dtype.is_float or dtype is DType.BF16 else values.astype(dtype.numpy)
    tensor = Tensor.from_numpy(array, TensorClass.WEIGHTS, dtype)
    assert bytes(round_trip(tensor, name).data) == bytes(tensor.data)


@pytest.mark.parametrize("name", ANY_CLASS_EXACT)
def test_a_source_that_is_not_contiguous_comes_back(name: str) -> None:
    array = np.random.default_rng(2).normal(size=(40, 60, 3)).astype(np.float32)[::2, ::-3].transpose(2, 0, 1)
    back = round_trip(Tensor.from_numpy(array, TensorClass.KV), name)
    np.testing.assert_array_equal(back.numpy(), array)


@pytest.mark.parametrize("dtype", [DType.F32, DType.F16, DType.BF16])
def test_planes_are_smaller_than_plain_zstd_on_bell_shaped_floats(dtype: DType) -> None:
    values = np.random.default_rng(3).normal(scale=5, size=49_152).astype(np.float32)
    array = values.view(np.uint16)[1::2] if dtype is DType.BF16 else values.astype(dtype.numpy)
    tensor = Tensor.from_numpy(array, TensorClass.LOGITS, dtype)
    assert codecs.encode(tensor, "planes_zstd").nbytes < 0.95 * codecs.encode(tensor, "zstd").nbytes


def test_bytes_that_do_not_shrink_cross_as_they_are() -> None:
    noise = Tensor(TensorClass.WEIGHTS, DType.F32, (1000,), memoryview(np.random.default_rng(4).bytes(4000)))
    assert codecs.encode(noise, "zstd").nbytes == 4000
    assert codecs.encode(noise, "planes_zstd").nbytes == 4000 + 4 * 4  # a length for each plane


@given(ids=st.lists(st.integers(0, 2**32 - 1), max_size=20), limit=st.sampled_from([2**8, 2**16, 2**32]))
def test_compact_ids_come_back_in_the_fewest_bytes_that_hold_the_largest(ids: list[int], limit: int) -> None:
    array = np.array([i % limit for i in ids], dtype=np.int64)
    tensor = Tensor.from_numpy(array, TensorClass.TOKENS)
    largest = int(array.max(initial=0))
    assert codecs.encode(tensor, "compact").nbytes == array.size * (1 if largest < 2**8 else 2 if largest < 2**16 else 4)
    np.testing.assert_array_equal(round_trip(tensor, "compact").numpy(), array)


@pytest.mark.parametrize("dtype", [dtype for dtype in DType if not dtype.is_float])
def test_compact_takes_ids_of_every_integer_dtype_in_any_shape(dtype: DType) -> None:
    array = np.array([[0, 1], [200, 7]], dtype=dtype.numpy).T
    np.testing.assert_array_equal(round_trip(Tensor.from_numpy(array, TensorClass.TOKENS), "compact").numpy(), array)


@pytest.mark.parametrize("ids", [[-1, 5], [2**32]])
def test_compact_refuses_ids_that_no_vocabulary_has(ids: list[int]) -> None:
    with pytest.raises(CodecError, match=str(ids[0])):
        codecs.encode(Tensor.from_numpy(np.array(ids), TensorClass.TOKENS), "compact")


def test_compact_refuses_floats() -> None:
    with pytest.raises(CodecError, match="F32"):
        codecs.encode(Tensor.from_numpy(np.zeros(3, dtype=np.float32), TensorClass.TOKENS), "compact")


@pytest.mark.parametrize(
    ("dtype", "payload", "shape"),
    [
        (DType.I64, b"\x01\x02\x03", (1,)),  # 3 bytes an id
        (DType.I64, b"\x01" * 8, (1,)),  # 8 bytes an id
        (DType.I64, b"", (1,)),
        (DType.I64, b"\x01", (0,)),
        (DType.U16, b"\x01\x00\x00\x00", (1,)),  # wider than the tensor
        (DType.I32, b"\xff\xff\xff\xff", (1,)),  # beyond the tensor's range
        (DType.F32, b"\x01", (1,)),
    ],
)
def test_compact_refuses_payloads_that_hold_no_such_ids(dtype: DType, payload: bytes, shape: tuple[int, ...]) -> None:
    with pytest.raises(CodecError):
        codecs.decode(CODECS["compact"].code, TensorClass.TOKENS, dtype, shape, memoryview(payload))


def test_a_codec_refuses_classes_that_it_does_not_take() -> None:
    logits = Tensor.from_numpy(np.zeros((1, 300), dtype=np.float32), TensorClass.LOGITS)
    tokens = Tensor.from_numpy(np.zeros(3, dtype=np.int64), TensorClass.TOKENS)
    for tensor, name in ((logits, "compact"), (logits, "int8"), (logits, "int4"), (tokens, "topk")):
        with pytest.raises(CodecError, match=f"{name}.*does not accept"):
            codecs.encode(tensor, name)


def test_numbers_on_the_wire_never_change_their_meaning() -> None:
    expected = ["raw", "fp16", "fp16_zlib", "zstd", "planes_zstd", "compact", "int8", "int4", "topk", "nvcomp_ans"]
    assert {codec.code: name for name, codec in CODECS.items()} == dict(enumerate(expected))


@given(data=st.binary(max_size=200))
@settings(max_examples=50)
def test_fp16_of_what_is_fp16_already_is_exact(data: bytes) -> None:
    half = np.frombuffer(data[: len(data) // 2 * 2], dtype=np.float16)
    tensor = Tensor(TensorClass.LOGITS, DType.F16, half.shape, bytes_view(half))
    for name in ("fp16", "fp16_zlib"):
        assert bytes(round_trip(tensor, name).data) == half.tobytes()
