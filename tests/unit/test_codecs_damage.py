"""A damaged payload never yields a tensor of another size, and never takes the memory that it claims."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from semgap import codecs
from semgap.codecs import CODECS, CodecError, TopK
from semgap.tensors import DType, Tensor, TensorClass

RNG = np.random.default_rng(5)
LOGITS = Tensor.from_numpy(RNG.normal(scale=5, size=(3, 400)).astype(np.float32), TensorClass.LOGITS)
KV = Tensor.from_numpy(RNG.normal(size=(2, 2, 2, 37, 40)).astype(np.float32), TensorClass.KV)
TOKENS = Tensor.from_numpy(RNG.integers(0, 49_152, 257), TensorClass.TOKENS)
CASES = [
    *[(name, LOGITS) for name in ("raw", "fp16", "fp16_zlib", "zstd", "planes_zstd", "topk")],
    *[(name, KV) for name in ("zstd", "planes_zstd", "int8", "int4")],
    *[(name, TOKENS) for name in ("zstd", "planes_zstd", "compact")],
]


def payload_of(name: str, tensor: Tensor) -> bytes:
    return b"".join(codecs.encode(tensor, TopK(20) if name == "topk" else name).buffers)


def decode(name: str, tensor: Tensor, payload: bytes) -> Tensor:
    return codecs.decode(CODECS[name].code, tensor.cls, tensor.dtype, tensor.shape, memoryview(payload))[0]


@pytest.mark.parametrize(("name", "tensor"), CASES)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_flipped_bytes_give_an_error_or_a_tensor_of_the_announced_size(name: str, tensor: Tensor, data: st.DataObject) -> None:
    payload = bytearray(payload_of(name, tensor))
    for at in data.draw(st.lists(st.integers(0, min(len(payload), 80) - 1) | st.integers(0, len(payload) - 1), min_size=1, max_size=4)):
        payload[at] ^= data.draw(st.integers(1, 255))
    try:
        back = decode(name, tensor, bytes(payload))
    except CodecError:
        return
    assert (back.dtype, back.shape, back.data.nbytes) == (tensor.dtype, tensor.shape, tensor.data.nbytes)


@pytest.mark.parametrize(("name", "tensor"), CASES)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_payload_that_is_cut_is_an_error(name: str, tensor: Tensor, data: st.DataObject) -> None:
    payload = payload_of(name, tensor)
    keep = data.draw(st.integers(0, len(payload) - 1))
    if name == "compact" and keep == len(payload) // 2:  # half the bytes are as many ids of half the size
        return
    with pytest.raises(CodecError):
        decode(name, tensor, payload[:keep])


@pytest.mark.parametrize(("name", "tensor"), CASES)
@given(extra=st.binary(min_size=1, max_size=40))
@settings(max_examples=20, deadline=None)
def test_a_payload_with_more_behind_it_is_an_error(name: str, tensor: Tensor, extra: bytes) -> None:
    with pytest.raises(CodecError):
        decode(name, tensor, payload_of(name, tensor) + extra)


@pytest.mark.parametrize(("name", "tensor"), CASES)
@given(junk=st.binary(max_size=3000))
@settings(max_examples=40, deadline=None)
def test_junk_is_an_error_or_a_tensor_of_the_announced_size(name: str, tensor: Tensor, junk: bytes) -> None:
    try:
        assert decode(name, tensor, junk).data.nbytes == tensor.data.nbytes
    except CodecError:
        return


@pytest.mark.parametrize("name", ["zstd", "fp16_zlib"])
def test_a_bomb_does_not_go_off(name: str) -> None:
    zeros = Tensor.from_numpy(np.zeros(50_000_000, dtype=np.float16), TensorClass.LOGITS)
    payload = payload_of(name, zeros) if name == "fp16_zlib" else zstandard.compress(bytes(zeros.data))
    small = Tensor.from_numpy(np.zeros(70_000, dtype=np.float16), TensorClass.LOGITS)
    assert len(payload) < small.data.nbytes
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            decode(name, small, payload)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_frame_that_does_not_say_how_much_it_holds_is_an_error() -> None:
    stream = zstandard.ZstdCompressor(level=1).compressobj()
    payload = stream.compress(bytes(LOGITS.data)) + stream.flush()
    with pytest.raises(CodecError, match="exactly"):
        decode("zstd", LOGITS, payload)


def test_a_frame_that_asks_for_a_large_window_is_an_error() -> None:
    magic, descriptor, window = b"\x28\xb5\x2f\xfd", b"\x80", bytes([17 << 3])  # 128 MiB for contents of 4,800 bytes
    frame = magic + descriptor + window + LOGITS.data.nbytes.to_bytes(4, "little") + b"\0\0"
    assert zstandard.get_frame_parameters(frame).window_size == 1 << 27
    with pytest.raises(CodecError, match="exactly"):
        decode("zstd", LOGITS, frame)


@pytest.mark.parametrize("held", [b"", b"\0" * 50])
def test_a_frame_for_an_empty_tensor_is_an_error(held: bytes) -> None:
    empty = Tensor.from_numpy(np.zeros((0, 4), dtype=np.float32), TensorClass.LOGITS)
    with pytest.raises(CodecError):
        decode("zstd", empty, zstandard.compress(held))


@pytest.mark.parametrize("count", [399, 401, 100_000])
def test_a_plane_of_another_length_is_an_error(count: int) -> None:
    row = Tensor.from_numpy(np.zeros(400, dtype=np.float16), TensorClass.LOGITS)
    other = Tensor.from_numpy(np.zeros(count, dtype=np.float16), TensorClass.LOGITS)
    assert decode("planes_zstd", row, payload_of("planes_zstd", row)).data == row.data
    with pytest.raises(CodecError, match="exactly"):
        decode("planes_zstd", row, payload_of("planes_zstd", other))


def test_quantised_groups_without_a_finite_scale_are_an_error() -> None:
    payload = bytearray(payload_of("int8", KV))
    payload[0:2] = np.array([np.nan], dtype=np.float16).tobytes()
    with pytest.raises(CodecError, match="not finite"):
        decode("int8", KV, bytes(payload))


@pytest.mark.parametrize("shape", [(2, 3), (1, 3, 1, 4, 4)])
def test_quantised_payloads_for_what_is_no_kv_cache_are_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(CodecError, match="layers, 2, heads"):
        codecs.decode(CODECS["int4"].code, TensorClass.KV, DType.F32, shape, memoryview(b"abc"))
