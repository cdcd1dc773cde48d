"""Codecs on a real GPU: bitwise the host's payloads, and nvcomp_ans over dtypes and sizes."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no usable GPU: torch.cuda.is_available() is false", allow_module_level=True)

from semgap import codecs
from semgap.codecs import CODECS, CodecError, ans_format, arrays, device
from semgap.tensors import DType, Tensor, TensorClass

CUDA = torch.device("cuda")
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
NVCOMP = CODECS["nvcomp_ans"]
reason = NVCOMP.unavailable()
with_nvcomp = pytest.mark.skipif(reason is not None, reason=str(reason))


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Any bit patterns, NaN and infinities among them."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    made = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return made.view(dtype).view(shape)


def like_a_cache(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Bell-shaped values whose scale differs from channel to channel, as those of a KV cache do."""
    generator = torch.Generator(CUDA).manual_seed(seed)
    scales = torch.randn(shape[-1], generator=generator, device=CUDA).exp()
    return (torch.randn(shape, generator=generator, device=CUDA) * scales).to(dtype)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def back_from(payloads: device.Payloads, index: int, codec: codecs.Codec, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    host = bytes(payloads.heads[index]) + payloads.part(index).cpu().numpy().tobytes()
    uploaded = torch.frombuffer(bytearray(host), dtype=torch.uint8).to(CUDA)
    decoded, intact = device.decode(codec, uploaded, memoryview(host), DType.from_torch_name(str(dtype)), shape)
    device.require(intact)
    return decoded


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(1, 2, 1, 1, 1), (2, 2, 3, 33, 40), (1, 2, 16, 64, 256), (1, 2, 4, 37, 64)])
@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-7, 1.0, 12_000.0])
def test_groups_on_the_gpu_are_bitwise_the_host_s(dtype: torch.dtype, name: str, shape: tuple[int, ...], scale: float) -> None:
    drawn = torch.randn((3, *shape), generator=torch.Generator().manual_seed(5))
    tensors = (scale * drawn).clamp(-65_000, 65_000).to(dtype)
    payloads = device.encode(tensors.to(CUDA), CODECS[name])
    for index, tensor in enumerate(tensors):
        wire = arrays.to_wire(tensor, TensorClass.KV)
        expected = b"".join(codecs.encode(wire, name).buffers)
        assert payloads.part(index).cpu().numpy().tobytes() == expected
        theirs = codecs.decode(CODECS[name].code, wire.cls, wire.dtype, wire.shape, memoryview(expected))[0]
        assert bytes(arrays.to_wire(back_from(payloads, index, CODECS[name], dtype, shape), TensorClass.KV).data) == bytes(theirs.data)
    assert payloads.encode_ns > 0


def test_values_that_no_grid_holds_are_refused_on_the_gpu() -> None:
    for bad in (float("nan"), float("inf"), 1e5):
        values = torch.zeros(1, 1, 2, 1, 40, 40, device=CUDA)
        values[0, 0, 1, 0, 39, 39] = bad
        with pytest.raises(CodecError, match="finite"):
            device.encode(values, CODECS["int8"])
    assert device.encode(torch.zeros(1, 1, 2, 1, 40, 40, device=CUDA), CODECS["int8"]).part(0).numel()


@with_nvcomp
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [1, 15, 16, 100, 4096, 65_535, 65_536, 65_537, 300_000])
@pytest.mark.parametrize("kind", ["bits", "cache", "constant"])
def test_nvcomp_ans_gives_back_the_very_bits(dtype: torch.dtype, count: int, kind: str) -> None:
    makes = {"bits": lambda: random_bits((3, count), dtype).to(CUDA), "cache": lambda: like_a_cache((3, count), dtype)}
    tensors = makes[kind]() if kind in makes else torch.full((3, count), -2.5, dtype=dtype, device=CUDA)
    payloads = device.encode(tensors, NVCOMP)
    for index in range(3):
        assert same_bits(back_from(payloads, index, NVCOMP, dtype, (count,)), tensors[index])
    raw = 3 * count * dtype.itemsize
    assert payloads.body.numel() <= raw + 3 * 16 * dtype.itemsize * (count // ans_format.CHUNK + 1)
    if kind == "constant" and count >= 65_536:
        assert payloads.body.numel() < raw / 4


@with_nvcomp
def test_a_payload_does_not_depend_on_the_batch_that_it_was_made_in() -> None:
    tensors = like_a_cache((4, 1, 2, 3, 64, 64))
    together = device.encode(tensors, NVCOMP)
    for index in range(4):
        alone = device.encode(tensors[index : index + 1], NVCOMP)
        assert bytes(alone.heads[0]) == bytes(together.heads[index])
        assert torch.equal(alone.part(0), together.part(index))


@pytest.mark.parametrize("name", ["raw", "int8", "int4", pytest.param("nvcomp_ans", marks=with_nvcomp)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_payloads_of_several_lengths_decode_together_as_each_alone(name: str, dtype: torch.dtype) -> None:
    codec, kinds = CODECS[name], [like_a_cache((1, 1, 2, 3, positions, 64), dtype, seed=positions) for positions in (64, 1, 64, 37, 64)]
    made = [device.encode(tensors, codec) for tensors in kinds]
    hosts = [bytes(one.heads[0]) + one.part(0).cpu().numpy().tobytes() for one in made]
    uploaded = [torch.frombuffer(bytearray(host), dtype=torch.uint8).to(CUDA) for host in hosts]
    shapes, wire_dtype = [tuple(tensors.shape[1:]) for tensors in kinds], DType.from_torch_name(str(dtype))
    values, intact = codec.decode_on_device(uploaded, [memoryview(host) for host in hosts], wire_dtype, shapes)
    device.require(intact)
    for value, one, shape in zip(values, made, shapes, strict=True):
        assert same_bits(value, back_from(one, 0, codec, dtype, shape))


@with_nvcomp
@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16, DType.F32])
def test_nvcomp_ans_takes_tensors_in_host_memory_too(dtype: DType) -> None:
    drawn = np.random.default_rng(1).normal(size=70_000).astype(np.float32)
    array = (drawn.view(np.uint32) >> 16).astype(np.uint16) if dtype is DType.BF16 else drawn.astype(dtype.numpy)
    for cls in (TensorClass.LOGITS, TensorClass.HIDDEN, TensorClass.WEIGHTS):
        tensor = Tensor.from_numpy(array.reshape(2, -1), cls, dtype)
        encoded = codecs.encode(tensor, "nvcomp_ans")
        payload = memoryview(b"".join(encoded.buffers))
        assert payload.nbytes == encoded.nbytes < tensor.data.nbytes
        assert bytes(codecs.decode(encoded.codec, cls, dtype, tensor.shape, payload)[0].data) == bytes(tensor.data)
    empty = Tensor(TensorClass.KV, dtype, (0, 3), memoryview(b""))
    assert codecs.encode(empty, "nvcomp_ans").nbytes == 0
    assert codecs.decode(9, TensorClass.KV, dtype, (0, 3), memoryview(b""))[0].data.nbytes == 0


@with_nvcomp
def test_a_reply_is_encoded_where_it_is_and_decodes_to_its_bits() -> None:
    for cls, shape in ((TensorClass.LOGITS, (3, 50_400)), (TensorClass.HIDDEN, (1, 4096))):
        tensor = like_a_cache(shape, torch.float16)[-1:]
        encoded = arrays.encode(tensor, cls, "nvcomp_ans")
        back = codecs.decode(encoded.codec, cls, encoded.dtype, encoded.shape, memoryview(b"".join(encoded.buffers)))[0]
        assert bytes(back.data) == bytes(arrays.to_wire(tensor, cls).data) and encoded.encode_ns > 0
    with pytest.raises(CodecError, match="does not accept"):
        arrays.encode(tensor, TensorClass.HIDDEN, "int8")


@with_nvcomp
def test_a_damaged_chunk_is_an_error_or_other_values_of_the_same_size() -> None:
    tensor = like_a_cache((1, 200_000))
    payloads = device.encode(tensor, NVCOMP)
    good = bytes(payloads.heads[0]) + payloads.body.cpu().numpy().tobytes()
    for at in (len(payloads.heads[0]), len(payloads.heads[0]) + 3, len(good) - 20_000):
        damaged = bytearray(good)
        damaged[at] ^= 0x5A
        try:
            back = codecs.decode(9, TensorClass.KV, DType.BF16, (200_000,), memoryview(damaged))[0]
        except CodecError:
            continue
        assert back.data.nbytes == 400_000
    assert same_bits(back_from(payloads, 0, NVCOMP, torch.bfloat16, (200_000,)), tensor[0])  # the GPU is none the worse


@with_nvcomp
def test_a_cache_in_bf16_shrinks_by_a_third() -> None:
    tensors = like_a_cache((64, 1, 2, 16, 64, 256))
    sizes = [device.encode(tensors, NVCOMP) for _ in range(3)]
    payload = sum(head.nbytes for head in sizes[-1].heads) + sizes[-1].body.numel()
    ratio, speed = tensors.nbytes / payload, tensors.nbytes / min(one.encode_ns for one in sizes)
    print(f"nvcomp_ans, bf16 like a cache, {tensors.nbytes / 1e6:.0f} MB: {ratio:.2f}x, encode {speed:.0f} GB/s")
    assert ratio >= 1.3
