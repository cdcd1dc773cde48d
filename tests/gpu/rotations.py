"""Rotary position embedding by its definition, for tests of the kernels."""

from __future__ import annotations

import torch

from semgap.engine.rope import Rope


def turned(vectors: torch.Tensor, rope: Rope, position: int) -> torch.Tensor:
    """Rotary position embedding by its definition: dims turn in pairs, by complex multiplication. [heads, D]."""
    rotary = rope.cosines.shape[1]
    pairs = (rotary // 2, 2) if rope.interleaved else (2, rotary // 2)
    x = vectors[:, :rotary].reshape(-1, *pairs)
    x = x if rope.interleaved else x.transpose(1, 2)
    turns = torch.complex(rope.cosines[position], rope.sines[position])
    turns = turns[::2] if rope.interleaved else turns[: rotary // 2]
    turned = torch.view_as_real(torch.view_as_complex(x.contiguous()) * turns)
    turned = turned if rope.interleaved else turned.transpose(1, 2)
    return torch.cat([turned.reshape(-1, rotary), vectors[:, rotary:]], 1)


def rope_of(rotary: int, interleaved: bool, positions: int, device: torch.device) -> Rope:
    """Tables of random angles, one column a dimension."""
    angles = torch.rand(positions, rotary // 2, device=device) * 6
    angles = angles.repeat_interleave(2, 1) if interleaved else torch.cat([angles, angles], 1)
    return Rope(angles.cos(), angles.sin(), interleaved)
