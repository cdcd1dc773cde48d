"""The kernels that split, join and move byte planes: on a GPU as they are, on a CPU in Triton's interpreter; and what the compiler makes
of them for an H100."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


_COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from semgap.codecs import device_planes as d

def made(kernel, types, constants):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    anywhere = {*constants, *kernel.do_not_specialize_on_alignment}
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if name not in anywhere}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    ptx = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    print(kernel.fn.__name__, ptx.count("ld.global.v4.b32"), ptx.count("st.global.v4.b32"), ".local" in ptx)

for layout in d._LAYOUTS.values():
    types = {"words": "*i32" if layout == 2 else "*i16", "planes": "*u8", "count": "i32", "stride": "i32"}
    made(d._split_kernel, types, {"LAYOUT": layout, "BLOCK": d._BLOCK})
    made(d._join_kernel, types, {"LAYOUT": layout, "BLOCK": d._BLOCK})
made(d._move_kernel, {"source": "*i32", "target": "*i32", "froms": "*i64", "tos": "*i64", "lengths": "*i64"}, {"BLOCK": d._BLOCK})
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="other tests compile for the GPU that is here")
def test_for_an_h100_everything_is_read_and_written_16_bytes_at_a_time(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    script = tmp_path / "compile_for_h100.py"  # Triton reads a kernel's source from its file
    script.write_text(_COMPILE)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in found] == ["_split_kernel", "_join_kernel"] * 3 + ["_move_kernel"]
    assert all(int(reads) >= 2 and int(writes) >= 2 and spills == "False" for _, reads, writes, spills in found), found
