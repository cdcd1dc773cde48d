"""The byte planes of float32, compiled by numba: one pass over the words each way, where numpy takes ten (codecs/planes.py)."""

import numba
import numpy as np

from semgap.codecs.plane_kernels import COMPILED, Kernels
from semgap.engine import kernel_cache
from semgap.engine.cpu_threads import FLAGS
from semgap.tensors import DType

_EIGHT = np.uint32(8)


@numba.njit(**FLAGS)
def _split(words, low, middle, tail, exponents):
    """Planes (n,) uint8 of words (n,) uint32. `tail` is the sign behind the highest 7 bits of the mantissa."""
    for i in range(words.size):
        word = words[i]
        low[i] = np.uint8(word)
        middle[i] = np.uint8(word >> _EIGHT)
        tail[i] = np.uint8((word >> np.uint32(15)) & np.uint32(0xFE) | word >> np.uint32(31))
        exponents[i] = np.uint8(word >> np.uint32(23))


@numba.njit(**FLAGS)
def _merge(low, middle, tail, exponents, words):
    """The reverse."""
    for i in range(words.size):
        last = np.uint32(tail[i])
        high = last << np.uint32(31) | np.uint32(exponents[i]) << np.uint32(23) | last >> np.uint32(1) << np.uint32(16)
        words[i] = high | np.uint32(middle[i]) << _EIGHT | np.uint32(low[i])


def load() -> None:
    """Compiles the kernels, or loads them from their cache, and has codec planes_zstd of this process use them."""
    compiled = Kernels(_split, _merge)
    with kernel_cache.without_scipy():
        compiled.merge(compiled.split(np.zeros(1, np.uint32)), DType.F32)
    COMPILED[DType.F32] = compiled
