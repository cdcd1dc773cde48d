"""The grids and payload lengths of codecs int8 and int4, which their forms for the host and for a GPU share."""

from math import prod

import numpy as np

from semgap.codecs.base import CodecError
from semgap.tensors import DType

GROUP = 32
HALF = np.dtype("<f2")
LARGEST = float(np.finfo(np.float16).max)
OUT_OF_RANGE = f"KV values must be finite and within +-{LARGEST:g} for codecs int8 and int4; use planes_zstd or raw"


def check_shape(name: str, dtype: DType, shape: tuple[int, ...]) -> None:
    """CodecError for anything but a KV tensor of floats."""
    if not dtype.is_float or len(shape) != 5 or shape[1] != 2:
        raise CodecError(f"codec {name!r} takes floats [layers, 2, heads, positions, head_dim], not {dtype.name} {shape}")


def check_payload(name: str, bits: int, nbytes: int, dtype: DType, shape: tuple[int, ...]) -> None:
    """CodecError if a payload of `nbytes` cannot be a tensor of that dtype and shape."""
    check_shape(name, dtype, shape)
    layers, _, heads, positions, head_dim = shape
    groups = layers * heads * (-(-positions // GROUP) * head_dim + positions * -(-head_dim // GROUP))
    expected = 2 * HALF.itemsize * groups + -(-prod(shape) * bits // 8)
    if nbytes != expected:
        raise CodecError(f"{name} payload of {nbytes} bytes for {shape}, which takes {expected}")
