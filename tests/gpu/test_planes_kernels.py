"""The kernels that split, join and move byte planes: on a GPU as they are, on a CPU in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from semgap.codecs import ans_format, device_planes, planes
from semgap.tensors import DType, bytes_view

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_bytes(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [1, 7, 64, 2047, 2048, 9_000])
def test_planes_are_split_and_joined_as_on_the_host(dtype: torch.dtype, count: int) -> None:
    rows, stride = random_bytes(3 * count * dtype.itemsize).view(dtype).view(3, count), ans_format.padded(count)
    made = device_planes.split(rows.to(DEVICE), stride)
    for row, own in zip(rows, made, strict=True):
        expected = planes._split(bytes_view(row.view(torch.uint8).numpy()), DType.from_torch_name(str(dtype)))
        for plane, ours in zip(expected, own, strict=True):
            assert np.array_equal(ours[:count].cpu().numpy(), plane)
        assert torch.equal(device_planes.join(own, count, dtype).cpu().view(torch.uint8), row.view(torch.uint8))


def test_chunks_move_to_where_they_belong_and_zeros_pad_them() -> None:
    source, lengths = random_bytes(1 << 16), torch.tensor([0, 1, 15, 16, 17, 33, 20_000])
    froms, taken = torch.tensor([0, 16, 32, 64, 128, 256, 1024]), ans_format.padded(lengths)
    tos = taken.cumsum(0) - taken
    target = torch.full((int(taken.sum()),), 99, dtype=torch.uint8, device=DEVICE)
    device_planes.move(source.to(DEVICE), target, froms.to(DEVICE), tos.to(DEVICE), lengths.to(DEVICE), 20_000)
    for length, begin, to, room in zip(*(numbers.tolist() for numbers in (lengths, froms, tos, taken)), strict=True):
        there = target.cpu()[to : to + room]
        assert torch.equal(there[:length], source[begin : begin + length]) and not there[length:].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="nothing is compiled for a CPU")
def test_tables_of_any_number_of_chunks_are_moved_by_one_kernel() -> None:
    """Their rows begin at multiples of 8 or of 16 bytes. A kernel for each would be compiled in the step that first has so many chunks."""
    source, target = random_bytes(4096).to(DEVICE), torch.zeros(4096, dtype=torch.uint8, device=DEVICE)
    made = []
    for chunks in (8, 7, 5, 1):
        table = torch.tensor([[16 * at for at in range(chunks)]] * 2 + [[16] * chunks], device=DEVICE)
        device_planes.move(source, target, table[0], table[1], table[2], 16)
        assert torch.equal(target[: 16 * chunks], source[: 16 * chunks])
        made.append(len(device_planes._move_kernel.device_caches[torch.cuda.current_device()][0]))
    assert made[1:] == made[:1] * 3
