"""Codecs where the tensor is: the very payloads of the host's, and nvcomp_ans as far as it goes without a GPU."""

from __future__ import annotations

import ctypes
from math import prod
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semgap import codecs
from semgap.codecs import CODECS, CodecError, ans_format, device, nvcomp
from semgap.codecs.arrays import from_wire, to_wire
from semgap.engine.gpu_failure import gpu_failure
from semgap.policy import CodecChoice, Policy, Reply, coded_by, refused_codec
from semgap.tensors import DType, Tensor, TensorClass, bytes_view

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = ("bell", "tiny", "subnormal", "large", "constant", "zeros of both signs", "ends", "outliers")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, and what is tested is that it has none")


def values_of(kind: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Float32 of a kind; all but 'ends' fit every dtype after its rounding."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    made = {
        "bell": drawn,
        "tiny": 1e-7 * drawn,
        "subnormal": 1e-40 * drawn,
        "large": (15_000 * drawn).clamp(-65_000, 65_000),
        "constant": torch.full_like(drawn, -2.7),
        "zeros of both signs": torch.where(drawn > 0, 0.0, -0.0),
        "ends": 65_504 * drawn.sign(),
        "outliers": torch.where(drawn > 2, 900 * drawn, drawn),
    }
    return made[kind]


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(["int8", "int4"]),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    count=st.integers(1, 3),
    dims=st.tuples(st.integers(0, 2), st.integers(0, 2), st.sampled_from([0, 1, 5, 31, 32, 33, 70]), st.sampled_from([0, 1, 32, 33, 64])),
    seed=st.integers(0, 2**32),
)
def test_groups_on_the_device_give_the_host_s_payloads_and_tensors_bit_for_bit(
    name: str, dtype: torch.dtype, kind: str, count: int, dims: tuple[int, int, int, int], seed: int
) -> None:
    layers, heads, positions, head_dim = dims
    tensors = values_of(kind, (count, layers, 2, heads, positions, head_dim), seed).to(dtype)
    if kind == "ends" and dtype is torch.bfloat16:
        tensors = tensors.clamp(-65_280, 65_280)  # the largest that fp16 holds too
    payloads = device.encode(tensors, CODECS[name])
    for index, tensor in enumerate(tensors):
        wire = to_wire(tensor, TensorClass.KV)
        expected = memoryview(b"".join(codecs.encode(wire, name).buffers))
        assert payloads.part(index).numpy().tobytes() == expected
        decoded, intact = device.decode(CODECS[name], payloads.part(index), expected, wire.dtype, wire.shape)
        assert intact is not None and intact.item()
        there = codecs.decode(CODECS[name].code, wire.cls, wire.dtype, wire.shape, expected)[0]
        assert bytes(to_wire(decoded, TensorClass.KV).data) == bytes(there.data)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e5, -1e5])
def test_groups_on_the_device_refuse_what_the_host_s_refuse(name: str, bad: float) -> None:
    values = torch.zeros(2, 1, 2, 1, 40, 40)
    values[1, 0, 1, 0, 39, 39] = bad
    with pytest.raises(CodecError, match="finite"):
        device.encode(values, CODECS[name])
    with pytest.raises(CodecError, match=r"\[layers, 2, heads"):
        device.encode(values[:, :, :1], CODECS[name])


def test_a_damaged_payload_of_groups_is_found_on_the_device_too() -> None:
    tensor = values_of("bell", (1, 2, 2, 33, 40), 1)
    payload = device.encode(tensor[None], CODECS["int8"]).part(0).clone()
    payload[:2] = torch.tensor([0, 0x7C], dtype=torch.uint8)  # a zero that is infinite
    _, intact = device.decode(CODECS["int8"], payload, bytes_view(payload.numpy()), DType.F32, tuple(tensor.shape))
    with pytest.raises(CodecError, match="damaged"):
        device.require(intact)
    with pytest.raises(CodecError, match="which takes"):
        device.decode(CODECS["int8"], payload[:-1], bytes_view(payload[:-1].numpy()), DType.F32, tuple(tensor.shape))


@pytest.mark.parametrize("dtype", DTYPES)
def test_raw_on_the_device_is_the_bytes(dtype: torch.dtype) -> None:
    tensors = values_of("bell", (3, 1, 2, 2, 5, 4), 2).to(dtype)
    payloads = device.encode(tensors, CODECS["raw"])
    wire = to_wire(tensors[2], TensorClass.KV)
    assert payloads.part(2).numpy().tobytes() == bytes(wire.data) and payloads.encode_ns == 0
    decoded, intact = device.decode(CODECS["raw"], payloads.part(2), wire.data, wire.dtype, wire.shape)
    assert torch.equal(decoded, tensors[2]) and intact is None
    with pytest.raises(CodecError, match="raw payload"):
        device.decode(CODECS["raw"], payloads.part(2), wire.data[1:], wire.dtype, wire.shape)


def stored(dtype: DType, shape: tuple[int, ...]) -> bytearray:
    """A payload of nvcomp_ans in which every chunk is stored."""
    sizes = ans_format.chunk_sizes(dtype, shape)
    return bytearray(bytes(ans_format.heads_of(sizes[None])[0]) + bytes(int(ans_format.padded(sizes).sum())))


@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16, DType.F32])
@pytest.mark.parametrize("shape", [(), (1,), (3, 7), (ans_format.CHUNK,), (2, ans_format.CHUNK + 1)])
def test_the_chunks_of_a_payload_hold_each_plane_and_lie_at_multiples_of_16(dtype: DType, shape: tuple[int, ...]) -> None:
    sizes = ans_format.chunk_sizes(dtype, shape)
    assert sizes.sum() == prod(shape) * dtype.itemsize and sizes.max() <= ans_format.CHUNK
    lengths, offsets = ans_format.chunk_lengths(memoryview(stored(dtype, shape)), dtype, shape)
    assert (lengths == sizes).all() and not (offsets % ans_format.ALIGNMENT).any()
    assert offsets[0] >= 4 * len(sizes) and (np.diff(offsets) >= sizes[:-1]).all()


def test_payloads_whose_chunks_cannot_be_are_refused_before_any_gpu_is_asked_for() -> None:
    dtype, shape = DType.BF16, (2, ans_format.CHUNK + 1)
    good = stored(dtype, shape)
    for damaged in (good[:-1], good + b"x", good[:15], b""):
        with pytest.raises(CodecError, match=r"nvcomp_ans payload of \d+ bytes"):
            codecs.decode(9, TensorClass.KV, dtype, shape, memoryview(damaged))
    for length in (0, ans_format.CHUNK + 1, 1 << 31):
        damaged = bytearray(good)
        damaged[:4] = length.to_bytes(4, "little")
        with pytest.raises(CodecError, match="a chunk is empty, or longer"):
            codecs.decode(9, TensorClass.KV, dtype, shape, memoryview(damaged))
    with pytest.raises(CodecError, match="takes floats, and the tensor is I64"):
        codecs.encode(Tensor.from_numpy(np.zeros(3, dtype=np.int64), TensorClass.WEIGHTS), "nvcomp_ans")


def test_a_cuda_error_that_nvcomp_meets_is_one_of_the_gpu_and_no_refused_batch() -> None:
    with pytest.raises(RuntimeError) as error:
        nvcomp._check(1000)
    assert not isinstance(error.value, CodecError) and gpu_failure(error.value) is not None


def test_nvcomp_s_structures_are_as_long_as_its_header_says() -> None:
    assert ctypes.sizeof(nvcomp._Options) == 64


@without_gpu
def test_nvcomp_ans_without_a_gpu_says_so() -> None:
    tensor = Tensor.from_numpy(np.zeros(3, dtype=np.float32), TensorClass.KV)
    with pytest.raises(CodecError, match="codec 'nvcomp_ans' cannot be used here: there is no usable GPU"):
        codecs.encode(tensor, "nvcomp_ans")
    assert CODECS["nvcomp_ans"].unavailable() == "there is no usable GPU" and CODECS["int8"].unavailable() is None


def test_a_missing_nvcomp_is_told_with_the_extra_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(__import__("sys").modules, "triton", torch)
    nvcomp.library.cache_clear()
    monkeypatch.setattr(nvcomp, "sys", SimpleNamespace(path=["/nowhere"]))
    assert CODECS["nvcomp_ans"].unavailable() == "nvCOMP is not installed; pip install 'semgap[gpu]'"


NVCOMP = {field: CodecChoice(**{field: "nvcomp_ans"}) for field in ("weights", "kv", "reply")}


@pytest.mark.parametrize(
    ("policy", "client", "worker"),
    [
        (Policy(codec=NVCOMP["reply"]), "reply", "reply"),
        (Policy(codec=NVCOMP["reply"], reply=Reply("token")), None, None),
        (Policy(codec=NVCOMP["weights"]), "weights", "weights"),
        (Policy(codec=NVCOMP["kv"], kv_cache="every_step"), "kv", "kv"),
        (Policy(codec=NVCOMP["kv"], recovery="delta", shadow="kvhost"), None, "kv"),
        (Policy(codec=NVCOMP["kv"], recovery="reload"), None, None),
        (Policy(codec=NVCOMP["kv"], placement="local"), None, None),
    ],
)
def test_a_codec_matters_to_the_sides_that_encode_or_decode_with_it(policy: Policy, client: str | None, worker: str | None) -> None:
    for side, field in (("client", client), ("worker", worker)):
        coded = coded_by(policy, side)  # type: ignore[arg-type]
        assert [name for name, codec in coded.items() if codec == "nvcomp_ans"] == ([field] if field else [])
        refused = refused_codec(policy, side)  # type: ignore[arg-type]
        if not torch.cuda.is_available():
            said = (
                f"codec.{field} 'nvcomp_ans' cannot be encoded or decoded by the {side}: there is no usable GPU; or use codec planes_zstd"
            )
            assert refused == (said if field else None)


def test_a_tensor_on_the_cpu_goes_through_the_host_s_codec() -> None:
    from semgap.codecs import arrays

    tensor = values_of("bell", (1, 2, 2, 33, 40), 3)
    ours, theirs = arrays.encode(tensor, TensorClass.KV, "int8"), codecs.encode(to_wire(tensor, TensorClass.KV), "int8")
    assert b"".join(ours.buffers) == b"".join(theirs.buffers)
    back = codecs.decode(ours.codec, TensorClass.KV, ours.dtype, ours.shape, memoryview(b"".join(ours.buffers)))[0]
    assert from_wire(back, "cpu").shape == tensor.shape
