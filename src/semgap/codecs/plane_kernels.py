"""Compiled kernels of byte planes, where a process has them. They come from above: no codec compiles anything."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from semgap.tensors import DType


@dataclass(frozen=True)
class Kernels:
    """Compiled functions between the words and the planes of one dtype, all arrays (n,): split_into(words, *planes) and
    merge_into(*planes, words), which write their last arguments.
    """

    split_into: Callable[..., None]
    merge_into: Callable[..., None]

    def split(self, words: np.ndarray) -> list[np.ndarray]:
        planes = [np.empty(words.size, np.uint8) for _ in range(words.itemsize)]
        self.split_into(_read_only(words), *planes)
        return planes

    def merge(self, planes: Sequence[np.ndarray], dtype: DType) -> np.ndarray:
        words = np.empty(planes[0].size, f"<u{dtype.itemsize}")
        self.merge_into(*map(_read_only, planes), words)
        return words


COMPILED: dict[DType, Kernels] = {}
"""Used instead of numpy. An executor that is compiled for the CPU brings them (engine/cpu_planes.py); no other process has a compiler."""


def _read_only(array: np.ndarray) -> np.ndarray:
    """A view that cannot be written: a kernel is compiled for such arrays alone."""
    view = array.view()
    view.flags.writeable = False
    return view
