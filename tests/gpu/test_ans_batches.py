"""Codec nvcomp_ans over batches of chunks, without a GPU: all of it but nvCOMP, the kernels in Triton's interpreter."""

from __future__ import annotations

import ctypes
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from semgap.codecs import CODECS, ans_format, device, nvcomp
from semgap.tensors import DType

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def aligned(payload: bytes) -> torch.Tensor:
    """A payload where a device's memory could begin with it."""
    memory = torch.empty(len(payload) + ans_format.ALIGNMENT, dtype=torch.uint8)
    begin = -memory.data_ptr() % ans_format.ALIGNMENT
    return memory[begin : begin + len(payload)].copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))


class DeflateForAns:
    """What nvCOMP does with a batch of chunks at addresses, here with zlib and in host memory; checks what nvCOMP asks for."""

    @staticmethod
    def numbers(address: int, count: int) -> np.ndarray:
        return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_int64)), (count,))

    def compress(self, *arrays: int, chunk_bytes: int, chunks: int, temp: tuple[int, int], stream: int) -> None:
        sources, sizes, lengths, targets = (self.numbers(address, chunks) for address in arrays[:4])
        assert not (sources % ans_format.ALIGNMENT).any() and not (targets % ans_format.ALIGNMENT).any() and sizes.max() <= chunk_bytes
        for index in range(chunks):
            made = zlib.compress(ctypes.string_at(int(sources[index]), int(sizes[index])), 1)
            ctypes.memmove(int(targets[index]), made, len(made))
            lengths[index] = len(made)

    def decompress(self, *arrays: int, chunks: int, temp: tuple[int, int], stream: int) -> None:
        sources, lengths, sizes, found, targets = (self.numbers(address, chunks) for address in arrays[:5])
        assert not (sources % ans_format.ALIGNMENT).any() and not (targets % ans_format.ALIGNMENT).any()
        for index in range(chunks):
            made = zlib.decompress(ctypes.string_at(int(sources[index]), int(lengths[index])))
            ctypes.memmove(int(targets[index]), made, min(len(made), int(sizes[index])))
            found[index] = len(made)


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_codecs_gpu.py has the codec itself")
@pytest.mark.parametrize(
    ("count", "dtype"), [*((count, dtype) for count in (100, 5_000) for dtype in DTYPES), (ans_format.CHUNK + 1, torch.bfloat16)]
)
def test_a_batch_s_chunks_go_to_the_coder_and_back_whatever_it_makes_of_them(
    monkeypatch: pytest.MonkeyPatch, count: int, dtype: torch.dtype
) -> None:
    """All of nvcomp_ans but nvCOMP itself, which needs a GPU; tests/gpu has that."""
    for name in ("compress", "decompress"):
        monkeypatch.setattr(nvcomp, name, getattr(DeflateForAns(), name))
        monkeypatch.setattr(nvcomp, f"{name}_temp_bytes", lambda *_: 0)
    monkeypatch.setattr(nvcomp, "largest_output", lambda nbytes: ans_format.padded(2 * nbytes + 64))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    bits = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    bell = torch.randn(count, generator=torch.Generator().manual_seed(4)).to(dtype)
    tensors = torch.stack([bell, torch.full((count,), -2.7, dtype=dtype), bits.view(dtype)])
    payloads = device.encode(tensors, CODECS["nvcomp_ans"])
    for index in range(3):
        assert (payloads.part(index).numel() < tensors[index].nbytes / 4) is (index == 1 and count > 100)
        host = bytes(payloads.heads[index]) + payloads.part(index).numpy().tobytes()
        wire_dtype = DType.from_torch_name(str(dtype))
        decoded, intact = device.decode(CODECS["nvcomp_ans"], aligned(host), memoryview(host), wire_dtype, (count,))
        assert intact is not None and intact.item()
        assert torch.equal(decoded.view(torch.uint8), tensors[index].view(torch.uint8))
        alone = device.encode(tensors[index : index + 1], CODECS["nvcomp_ans"])
        assert bytes(alone.heads[0]) == bytes(payloads.heads[index]) and torch.equal(alone.part(0), payloads.part(index))
    short = device.encode(tensors[:1, : count // 3], CODECS["nvcomp_ans"])
    hosts = [bytes(made.heads[index]) + made.part(index).numpy().tobytes() for made, index in ((payloads, 1), (short, 0), (payloads, 2))]
    uploaded = [aligned(host) for host in hosts]
    lengths = [(count,), (count // 3,), (count,)]
    back, intact = CODECS["nvcomp_ans"].decode_on_device(uploaded, [memoryview(h) for h in hosts], wire_dtype, lengths)
    assert intact is not None and intact.item()
    for value, tensor in zip(back, (tensors[1], tensors[0, : count // 3], tensors[2]), strict=True):
        assert torch.equal(value.view(torch.uint8), tensor.contiguous().view(torch.uint8))
