"""Codecs: what they promise holds for every tensor, and no damaged payload becomes a tensor."""

import math
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from semgap.codecs import CODECS, CodecError, codec_named, codec_of, decode, encode, indexed
from semgap.codecs.raw import Raw
from semgap.tensors import DType, Tensor, TensorClass, nbytes_of

GENERAL = sorted(name for name, codec in CODECS.items() if codec.accepts == frozenset(TensorClass))  # others have files of their own
SPECIAL = np.array([0x7F800000, 0xFF800000, 0x7FC00001, 0x00000001, 0x477FF000, 0x7F7FFFFF], dtype="<u4")
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6)


@st.composite
def _tensors(draw: st.DrawFn, dtypes: list[DType]) -> Tensor:
    """Any bit patterns, so NaNs of every payload, infinities and subnormals come along; or only a few of them, which compress."""
    dtype, shape = draw(st.sampled_from(dtypes)), draw(SHAPES)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    bits = np.frombuffer(rng.bytes(dtype.itemsize * math.prod(shape)), f"<u{dtype.itemsize}").reshape(shape)
    if bits.size and draw(st.booleans()):
        special = dtype is DType.F32 and draw(st.booleans())
        bits = rng.choice(SPECIAL if special else bits.flatten()[:3], shape)
    return Tensor.from_numpy(bits.view(dtype.numpy), TensorClass.KV, dtype)


def _payload(tensor: Tensor, name: str) -> bytes:
    return b"".join(encode(tensor, name).buffers)


def _there_and_back(tensor: Tensor, name: str) -> Tensor:
    encoded = encode(tensor, name)
    payload = b"".join(encoded.buffers)
    assert encoded.nbytes == len(payload)
    return decode(encoded.codec, tensor.cls, tensor.dtype, tensor.shape, memoryview(payload))[0]


@pytest.mark.parametrize("name", [name for name in GENERAL if CODECS[name].exact])
@given(tensor=_tensors(list(DType)))
def test_an_exact_codec_gives_back_the_very_bytes(name: str, tensor: Tensor) -> None:
    back = _there_and_back(tensor, name)
    assert bytes(back.data) == bytes(tensor.data)
    assert (back.cls, back.dtype, back.shape) == (tensor.cls, tensor.dtype, tensor.shape)


@pytest.mark.parametrize("name", ["fp16", "fp16_zlib"])
@given(tensor=_tensors([DType.U8, DType.U16, DType.U32, DType.I32, DType.I64, DType.F16]))
def test_fp16_codecs_leave_integers_and_fp16_as_they_are(name: str, tensor: Tensor) -> None:
    assert bytes(_there_and_back(tensor, name).data) == bytes(tensor.data)


@pytest.mark.parametrize("name", ["fp16", "fp16_zlib"])
@given(tensor=_tensors([DType.F32]))
def test_fp16_codecs_give_float32_values_as_cast_to_half_and_back(name: str, tensor: Tensor) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        expected = tensor.numpy().astype(np.float16).astype(np.float32)
    back = _there_and_back(tensor, name)
    assert back.dtype is DType.F32 and back.shape == tensor.shape
    assert np.array_equal(back.numpy(), expected, equal_nan=True)


@pytest.mark.parametrize("name", ["fp16", "fp16_zlib"])
@given(tensor=_tensors([DType.BF16]))
def test_fp16_codecs_give_bf16_values_as_torch_casts_them(name: str, tensor: Tensor) -> None:
    import torch

    there = torch.from_numpy(tensor.numpy().view(np.int16).copy()).view(torch.bfloat16)
    expected = there.to(torch.float16).to(torch.bfloat16)
    back = torch.from_numpy(_there_and_back(tensor, name).numpy().view(np.int16).copy()).view(torch.bfloat16)
    assert torch.equal(back.nan_to_num(nan=12345.0), expected.nan_to_num(nan=12345.0))


@given(st.sampled_from(GENERAL), hnp.arrays(np.float32, (5, 7)))
def test_a_non_contiguous_array_crosses_as_its_contiguous_copy(name: str, array: np.ndarray) -> None:
    strided = Tensor.from_numpy(array.T[::2], TensorClass.KV)
    dense = Tensor.from_numpy(np.ascontiguousarray(array.T[::2]), TensorClass.KV)
    assert _payload(strided, name) == _payload(dense, name)


def test_the_fp16_payload_is_half_of_float32_and_zlib_is_what_zlib_gives() -> None:
    logits = Tensor.from_numpy(np.linspace(-9, 9, 4096, dtype=np.float32), TensorClass.LOGITS)
    half = _payload(logits, "fp16")
    assert len(half) == logits.data.nbytes // 2
    assert _payload(logits, "fp16_zlib") == zlib.compress(half)


@pytest.mark.parametrize("name", GENERAL)
@given(tensor=_tensors([DType.F32, DType.BF16, DType.I64]), cut=st.integers(1, 1 << 20), more=st.binary(min_size=1, max_size=9))
def test_a_payload_that_is_too_short_or_too_long_never_yields_a_tensor(name: str, tensor: Tensor, cut: int, more: bytes) -> None:
    payload = _payload(tensor, name)
    wrong = [payload + more]
    if payload:
        wrong.append(payload[: -(1 + cut % len(payload))])
    for data in wrong:
        if name == "zstd" and len(data) == tensor.data.nbytes:
            continue  # is taken for a tensor that was stored as it is: the length tells which
        with pytest.raises(CodecError):
            decode(codec_named(name).code, tensor.cls, tensor.dtype, tensor.shape, memoryview(data))


@pytest.mark.parametrize("name", GENERAL)
@given(tensor=_tensors([DType.F32, DType.BF16, DType.I64]), junk=st.binary(max_size=200))
def test_any_bytes_give_a_tensor_of_the_announced_size_or_a_codec_error(name: str, tensor: Tensor, junk: bytes) -> None:
    try:
        back, _ = decode(codec_named(name).code, tensor.cls, tensor.dtype, tensor.shape, memoryview(junk))
    except CodecError:
        return
    assert back.data.nbytes == nbytes_of(tensor.dtype, tensor.shape)


@given(st.binary(min_size=64, max_size=400), st.data())
def test_a_flipped_byte_in_a_zlib_payload_is_noticed(content: bytes, data: st.DataObject) -> None:
    tensor = Tensor.from_numpy(np.frombuffer(content, np.uint8), TensorClass.TOKENS)
    payload = bytearray(_payload(tensor, "fp16_zlib"))
    payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        back, _ = decode(codec_named("fp16_zlib").code, tensor.cls, tensor.dtype, tensor.shape, memoryview(bytes(payload)))
    except CodecError:
        return
    assert bytes(back.data) == content  # zlib's header has bits that mean nothing to the reader


def test_a_zlib_bomb_is_refused_without_being_inflated() -> None:
    bomb = zlib.compress(bytes(1 << 26), 9)
    tracemalloc.start()
    with pytest.raises(CodecError, match="exactly the 2000 announced bytes"):
        decode(codec_named("fp16_zlib").code, TensorClass.KV, DType.F32, (1000,), memoryview(bomb))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_an_oversized_claim_allocates_no_more_than_the_payload_holds() -> None:
    tracemalloc.start()
    with pytest.raises(CodecError):
        decode(codec_named("fp16_zlib").code, TensorClass.KV, DType.F32, (1 << 46,), memoryview(zlib.compress(b"abcd")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_unknown_codecs_are_refused_with_the_known_ones() -> None:
    with pytest.raises(CodecError, match="'gzip' is not known; use one of raw, fp16, fp16_zlib"):
        codec_named("gzip")
    with pytest.raises(CodecError, match="code 200"):
        codec_of(200)


def test_codes_on_the_wire_never_change() -> None:
    known = {"raw": 0, "fp16": 1, "fp16_zlib": 2}
    assert {name: codec.code for name, codec in CODECS.items()}.items() >= known.items()
    assert len({codec.code for codec in CODECS.values()}) == len(CODECS)


def test_two_codecs_of_one_number_or_one_name_are_refused() -> None:
    class Numbered(Raw):
        name, code = "mine", CODECS["compact"].code

    class Named(Raw):
        name, code = "compact", 99

    with pytest.raises(CodecError, match="codecs 'compact' and 'mine' share the code 5; give the new one a code of its own"):
        indexed([*CODECS.values(), Numbered()], "code")
    with pytest.raises(CodecError, match="codecs 'compact' and 'compact' share the name 'compact'; give the new one a name of its own"):
        indexed([*CODECS.values(), Named()], "name")


def test_a_codec_refuses_a_class_that_it_does_not_accept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(CODECS["fp16"]), "accepts", frozenset({TensorClass.LOGITS}))
    with pytest.raises(CodecError, match="'fp16' does not accept tensors of class weights"):
        encode(Tensor.from_numpy(np.zeros(2, np.float32), TensorClass.WEIGHTS), "fp16")
