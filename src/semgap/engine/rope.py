"""Tables of rotary position embedding, as transformers computes them, in numpy."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from semgap.tensors import Array

STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # their frequencies do not depend on the length of the text


@dataclass(frozen=True)
class Rope:
    """Cosines and sines, float32 [positions, pairs of dimensions], in numpy (in torch, one column a dimension, for kernels.py).

    `interleaved`: neighbouring dimensions rotate together; otherwise dimension i and i + pairs.
    """

    cosines: Array
    sines: Array
    interleaved: bool


def rope_tables(rope: Mapping[str, Any], dims: int, positions: int, interleaved: bool) -> Rope:
    """The tables for `dims` rotating dimensions. KeyError, TypeError, ValueError or ZeroDivisionError for an invalid rope.

    The steps and their precision are transformers', which computes in float32. Powers, cosines and sines are computed in float64 and
    rounded, which is at most one unit in the last place from transformers' own.
    """
    frequencies, factor = _frequencies(rope, dims)
    angles = (np.arange(positions, dtype=np.float32)[:, None] * frequencies).astype(np.float64)
    cosines, sines = (function(angles).astype(np.float32) * np.float32(factor) for function in (np.cos, np.sin))
    return Rope(cosines, sines, interleaved)


def _frequencies(rope: Mapping[str, Any], dims: int) -> tuple[np.ndarray, float]:
    """Inverse frequencies (dims / 2,), float32, and the factor of cosines and sines."""
    kind, base = rope["rope_type"], float(rope["rope_theta"])
    powers = (base ** (np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)).astype(np.float64)).astype(np.float32)
    plain = np.float32(1) / powers
    if kind == "linear":
        return plain / np.float32(rope["factor"]), 1.0
    if kind == "llama3":
        return _llama3(rope, plain), 1.0
    if kind == "yarn":
        return _yarn(rope, powers, dims, base)
    return plain, 1.0


def _llama3(rope: Mapping[str, Any], plain: np.ndarray) -> np.ndarray:
    """Long waves are slowed by `factor`, short ones are not, those between in part."""
    context, factor = rope["original_max_position_embeddings"], np.float32(rope["factor"])
    low, high = np.float32(rope["low_freq_factor"]), np.float32(rope["high_freq_factor"])
    waves = np.float32(2 * math.pi) / plain
    slowed = np.where(waves > context / low, plain / factor, plain)
    share = (np.float32(context) / waves - low) / (high - low)
    between = ~(waves < context / high) & ~(waves > context / low)
    return np.where(between, (1 - share) * slowed / factor + share * slowed, slowed).astype(np.float32)


def _yarn(rope: Mapping[str, Any], powers: np.ndarray, dims: int, base: float) -> tuple[np.ndarray, float]:
    """Interpolated frequencies for slow dimensions, plain ones for fast dimensions, a ramp between (YaRN, Peng et al. 2023)."""
    context, factor = rope["original_max_position_embeddings"], rope["factor"]

    def dimension(rotations: float) -> float:
        return dims * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    ramp = np.clip((np.arange(dims // 2, dtype=np.float32) - low) / (high - low or 0.001), 0, 1).astype(np.float32)
    frequencies = 1 / (np.float32(factor) * powers) * ramp + 1 / powers * (1 - ramp)
    return frequencies.astype(np.float32), _yarn_scaling(rope, factor)


def _yarn_scaling(rope: Mapping[str, Any], factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]

    def scaling(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, mscale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    return scaling(mscale) / scaling(mscale_all) if mscale and mscale_all else scaling(1.0)
