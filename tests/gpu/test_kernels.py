"""Each kernel against torch, over sizes that do not fit its tiles."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from rotations import rope_of, turned

from semgap.engine import kernels
from semgap.engine.kernels import Linear, Norm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE)


def _blank(size: int) -> torch.Tensor:
    return torch.full((size,), float("nan"), device=DEVICE)


def _linear(rows: int, columns: int, bias: bool, transposed: bool = False) -> Linear:
    weight = _random(columns, rows) if transposed else _random(rows, columns)
    return Linear(weight, _random(rows) if bias else None, transposed)


def _applied(linear: Linear, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, linear.weight.T if linear.transposed else linear.weight, linear.bias)


@pytest.mark.parametrize(("columns", "bias", "transposed"), [*product((96, 2048), (True, False), (True, False))])
@pytest.mark.parametrize(("rows", "gelu"), [((13,), False), ((8, 30, 30), False), ((8, 30, 5, 61), True)])
def test_products_come_back_to_back(rows: tuple[int, ...], gelu: bool, columns: int, bias: bool, transposed: bool) -> None:
    linears, x, out = [_linear(n, columns, bias, transposed) for n in rows], _random(columns), _blank(sum(rows))
    kernels.project(x, linears, out, gelu)
    expected = [_applied(linear, x) for linear in linears]
    if gelu:
        expected[-1] = torch.nn.functional.gelu(expected[-1], approximate="tanh")
    assert torch.allclose(out, torch.cat(expected), atol=1e-3)


def test_a_bias_on_some_linears_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="1 of 2 linears have a bias"):
        kernels.project(_random(8), [_linear(4, 8, True), _linear(4, 8, False)], _blank(8))


@pytest.mark.parametrize("bias", [True, False])
def test_a_gated_feed_forward(bias: bool) -> None:
    x, gate, up, out = _random(96), _linear(50, 96, bias), _linear(50, 96, bias), _blank(50)
    kernels.gate(x, gate, up, out)
    assert torch.allclose(out, torch.nn.functional.silu(_applied(gate, x)) * _applied(up, x), atol=1e-3)


@pytest.mark.parametrize(("bias", "transposed"), [*product((True, False), (True, False))])
def test_products_are_added_to_the_residual(bias: bool, transposed: bool) -> None:
    x, y, residual = _random(96), _random(200), _random(50)
    one, other = _linear(50, 96, bias, transposed), _linear(50, 200, not bias, transposed)
    expected = residual + _applied(one, x)
    kernels.merge(residual, x, one)
    assert torch.allclose(residual, expected, atol=1e-3)
    expected = residual + _applied(one, x) + _applied(other, y)
    kernels.merge(residual, x, one, y, other)
    assert torch.allclose(residual, expected, atol=1e-3)


def test_norms() -> None:
    x, weight, bias, out = 5 + 3 * _random(96), _random(96), _random(96), _blank(96)
    kernels.norm(x, Norm(weight, bias, 1e-5), out)
    assert torch.allclose(out, torch.nn.functional.layer_norm(x, (96,), weight, bias, 1e-5), atol=1e-5)
    kernels.norm(x, Norm(weight, None, 1e-5), out)
    assert torch.allclose(out, torch.nn.functional.rms_norm(x, (96,), weight, 1e-5), atol=1e-5)


def test_norms_of_rows_to_which_a_bias_is_added_before() -> None:
    rows, added, out = 5 + 3 * _random(3, 96), _random(96), _blank(3 * 96).view(3, 96)
    weight, expected = _random(96), rows + added
    kernels.norm(rows, Norm(weight, None, 1e-5), out, added)
    assert torch.equal(rows, expected)
    assert torch.allclose(out, torch.nn.functional.rms_norm(expected, (96,), weight, 1e-5), atol=1e-5)
    kernels.norm(rows, Norm(weight, added, 1e-5), out)
    assert torch.equal(rows, expected)
    assert torch.allclose(out, torch.nn.functional.layer_norm(expected, (96,), weight, added, 1e-5), atol=1e-5)


@pytest.mark.parametrize("position", [0, 1, 17, 130, 255])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary", "interleaved"),
    [(6, 2, 24, 0, False), (2, 2, 16, 8, True), (4, 2, 32, 32, False), (2, 1, 7, 4, True)],
)
def test_attention_over_a_slab(heads: int, kv_heads: int, head_dim: int, rotary: int, interleaved: bool, position: int) -> None:
    length = 256
    splits = kernels.splits_for(length)
    assert splits > 1
    slab = torch.full((2, 1, kv_heads, length, head_dim), float("nan"), device=DEVICE)
    slab[:, :, :, :position] = _random(2, 1, kv_heads, position, head_dim)
    before, qkv, out = slab.clone(), _random((heads + 2 * kv_heads) * head_dim), _blank(heads * head_dim)
    rope = rope_of(rotary, interleaved, length, DEVICE) if rotary else None
    slabs = torch.tensor([-1, *kernels.distances_to([slab], qkv, head_dim)], device=DEVICE)
    sums, stats = torch.full((heads, splits, 32), float("nan"), device=DEVICE), torch.full((heads, splits, 2), float("nan"), device=DEVICE)
    sums = sums[:, :, : 1 << (head_dim - 1).bit_length()].contiguous()
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "max_length": length}
    kernels.attend(qkv, slabs, 1, torch.tensor([9, position], device=DEVICE), rope, 0.3, sums, stats, out, **sizes)
    query, key, value = (part.view(-1, head_dim) for part in qkv.split([n * head_dim for n in (heads, kv_heads, kv_heads)]))
    if rope:
        query, key = turned(query, rope, position), turned(key, rope, position)
    keys = torch.cat([before[0, 0, :, :position], key[:, None]], 1)
    values = torch.cat([before[1, 0, :, :position], value[:, None]], 1)
    each = heads // kv_heads
    weights = (torch.einsum("hd,hpd->hp", query, keys.repeat_interleave(each, 0)) * 0.3).softmax(1)
    assert torch.allclose(out.view(heads, head_dim), torch.einsum("hp,hpd->hd", weights, values.repeat_interleave(each, 0)), atol=1e-4)
    assert torch.allclose(slab[0, 0, :, : position + 1], keys, atol=1e-6) and torch.equal(slab[1, 0, :, : position + 1], values)
    assert slab[:, :, :, position + 1 :].isnan().all()


def test_a_slab_that_no_distance_reaches_is_refused() -> None:
    memory = torch.zeros(100, device=DEVICE)
    with pytest.raises(ValueError, match="no multiple of 16 bytes"):
        kernels.distances_to([memory[1:]], memory, 32)
