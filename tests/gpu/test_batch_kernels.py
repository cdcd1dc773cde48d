"""Each kernel of a pass over many requests against torch, over sizes that do not fit its tiles."""

from __future__ import annotations

import pytest
import torch
from rotations import rope_of, turned

from semgap.engine import batch_kernels
from semgap.engine.batch_kernels import Parts
from semgap.engine.kernels import Rope
from semgap.kv.pool import BLOCK

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
POSITIONS = (130, -1, 0, 63, 64, 200)  # the second row pads; the fourth and the fifth stand in one request
LAYERS, LAYER = 2, 1


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE)


def _state(tables: list[list[int]]) -> torch.Tensor:
    state = torch.zeros(len(POSITIONS), 2 + 4, dtype=torch.int64, device=DEVICE)
    state[:, 1] = torch.tensor(POSITIONS)
    for row, table in zip(state, tables, strict=True):
        row[2 : 2 + len(table)] = torch.tensor(table)
    return state


@pytest.mark.parametrize("parts", [Parts(4, 64), Parts(2, 128), Parts(1, 256)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary", "interleaved"),
    [(6, 2, 24, 0, False), (2, 2, 16, 8, True), (4, 2, 32, 32, False), (2, 1, 7, 4, True)],
)
def test_attention_over_blocks(heads: int, kv_heads: int, head_dim: int, rotary: int, interleaved: bool, parts: Parts) -> None:
    """Two rows share a block; the rest of every block in use is blank, and so are the blocks of nobody."""
    tables = [[5, 9, 2], [], [7], [4], [4, 8], [5, 1, 3, 6]]
    memory = torch.full((11, LAYERS, 2, kv_heads, BLOCK, head_dim), float("nan"), device=DEVICE)
    for position, table in zip(POSITIONS, tables, strict=True):
        for p in range(position):
            if memory[table[p // BLOCK], LAYER, 0, 0, p % BLOCK, 0].isnan():
                memory[table[p // BLOCK], LAYER, :, :, p % BLOCK] = _random(2, kv_heads, head_dim)
    memory[4, LAYER, :, :, 63] = float("nan")  # the fourth row writes it, and the fifth reads it in the same pass
    before, width = memory.clone(), (heads + 2 * kv_heads) * head_dim
    qkv, out = _random(len(POSITIONS), width), torch.full((len(POSITIONS), heads * head_dim), float("nan"), device=DEVICE)
    rope = rope_of(rotary, interleaved, 256, DEVICE) if rotary else None
    block_d = 1 << (head_dim - 1).bit_length()
    sums = torch.full((len(POSITIONS) * heads * parts.count * block_d,), float("nan"), device=DEVICE)
    stats = torch.full((len(POSITIONS) * heads * parts.count * 2,), float("nan"), device=DEVICE)
    batch_kernels.attend(qkv, memory, LAYER, _state(tables), rope, 0.3, sums, stats, parts, out)
    written = before.clone()
    for row, (position, table) in enumerate(zip(POSITIONS, tables, strict=True)):
        if position >= 0:
            _, key, value = _vectors(qkv[row], heads, kv_heads, head_dim, rope, position)
            written[table[position // BLOCK], LAYER, :, :, position % BLOCK] = torch.stack([key, value])
    assert torch.allclose(memory, written, atol=1e-6, equal_nan=True)
    for row, (position, table) in enumerate(zip(POSITIONS, tables, strict=True)):
        if position < 0:
            assert not out[row].any()
            continue
        query, _, _ = _vectors(qkv[row], heads, kv_heads, head_dim, rope, position)
        keys, values = (
            written[table, LAYER].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : position + 1].repeat_interleave(heads // kv_heads, 1)
        )
        weights = (torch.einsum("hd,hpd->hp", query, keys) * 0.3).softmax(1)
        assert torch.allclose(out[row].view(heads, head_dim), torch.einsum("hp,hpd->hd", weights, values), atol=1e-4), row


def _vectors(
    qkv: torch.Tensor, heads: int, kv_heads: int, head_dim: int, rope: Rope | None, position: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A row's query and key, rotated, and its value, [heads, head_dim] each."""
    query, key, value = (part.view(-1, head_dim) for part in qkv.split([n * head_dim for n in (heads, kv_heads, kv_heads)]))
    return (turned(query, rope, position), turned(key, rope, position), value) if rope else (query, key, value)


@pytest.mark.parametrize("rows", [1, 37])
def test_activations(rows: int) -> None:
    fed, gate = _random(rows, 50), _random(rows, 50)
    gated, plain = fed.clone(), fed.clone()
    batch_kernels.activate(gated, gate)
    assert torch.allclose(gated, torch.nn.functional.silu(gate) * fed, atol=1e-6)
    batch_kernels.activate(plain)
    assert torch.allclose(plain, torch.nn.functional.gelu(fed, approximate="tanh"), atol=1e-6)


def test_a_part_is_a_block_while_rows_are_few() -> None:
    found = [Parts.of(rows, max_length) for rows, max_length in ((1, 80), (32, 2048), (64, 2048), (256, 100))]
    assert found == [Parts(2, 64), Parts(32, 64), Parts(4, 512), Parts(2, 64)]


@pytest.mark.parametrize("max_length", [1, 64, 65, 100, 4096, 40960])
def test_parts_cover_all_positions_and_begin_with_blocks(max_length: int) -> None:
    for rows in (1, 8, 256, 4096):
        parts = Parts.of(rows, max_length)
        assert parts.count * parts.positions >= max_length and parts.positions % BLOCK == 0 and parts.count & (parts.count - 1) == 0
