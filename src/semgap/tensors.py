"""Tensors on the wire: a class, a dtype, a shape, and flat bytes.

Needs neither torch nor pickle: a thin client sends weights from a mapped file without loading a framework.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from typing_extensions import Buffer

Array = Any
"""An array of an executor: numpy's, or a torch tensor on a GPU and with executor eager."""


class TensorClass(enum.IntEnum):
    """The role of a tensor in an LLM runtime. CONTROL: bytes that are not a tensor of the model (probes, hashes, counters)."""

    CONTROL = 0
    WEIGHTS = 1
    TOKENS = 2
    LOGITS = 3
    HIDDEN = 4
    KV = 5


class DType(enum.IntEnum):
    """The dtypes that may cross; never object dtypes."""

    U8 = 1
    U16 = 2
    U32 = 3
    I32 = 4
    I64 = 5
    F16 = 6
    BF16 = 7
    F32 = 8

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return _ITEMSIZE[self]

    @property
    def numpy(self) -> np.dtype:
        """The numpy dtype that holds the same bytes; numpy has no bfloat16, so BF16 gives uint16 bit patterns."""
        return _NUMPY[self]

    @property
    def is_float(self) -> bool:
        return self in (DType.F16, DType.BF16, DType.F32)

    @property
    def torch_name(self) -> str:
        """Name of the attribute of `torch` for this dtype, e.g. 'float32'."""
        return _TORCH_NAMES[self]

    @classmethod
    def from_torch_name(cls, name: str) -> DType:
        """The DType of 'float32' or 'torch.float32'; ValueError lists the allowed names."""
        found = next((dtype for dtype, known in _TORCH_NAMES.items() if known == name.removeprefix("torch.")), None)
        if found is None:
            raise ValueError(f"dtype {name!r} cannot cross the wire; use one of {', '.join(_TORCH_NAMES.values())}")
        return found


_NUMPY: dict[DType, np.dtype] = {
    DType.U8: np.dtype("<u1"),
    DType.U16: np.dtype("<u2"),
    DType.U32: np.dtype("<u4"),
    DType.I32: np.dtype("<i4"),
    DType.I64: np.dtype("<i8"),
    DType.F16: np.dtype("<f2"),
    DType.BF16: np.dtype("<u2"),
    DType.F32: np.dtype("<f4"),
}
_ITEMSIZE = {dtype: numpy.itemsize for dtype, numpy in _NUMPY.items()}
_TORCH_NAMES = {dtype: numpy.name for dtype, numpy in _NUMPY.items()} | {DType.BF16: "bfloat16"}


def nbytes_of(dtype: DType, shape: tuple[int, ...]) -> int:
    """Bytes of a dense tensor."""
    return math.prod(shape) * _ITEMSIZE[dtype]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A dense C-order tensor: `data` is a flat memoryview of unsigned bytes, nbytes_of(dtype, shape) long."""

    cls: TensorClass
    dtype: DType
    shape: tuple[int, ...]
    data: memoryview

    @classmethod
    def from_numpy(cls, array: np.ndarray, tensor_class: TensorClass, dtype: DType | None = None) -> Tensor:
        """Wraps `array` without a copy when it is contiguous; pass dtype=BF16 for uint16 bit patterns of bfloat16."""
        known = dtype or _DTYPE_OF_NUMPY.get(array.dtype)
        if known is None or known.numpy != array.dtype:
            raise ValueError(f"array of dtype {array.dtype} cannot cross the wire as {known}")
        return cls(tensor_class, known, array.shape, bytes_view(np.ascontiguousarray(array)))

    def numpy(self) -> np.ndarray:
        """A view of the bytes as an array of self.shape (BF16 as uint16 bit patterns)."""
        return np.frombuffer(self.data, dtype=self.dtype.numpy).reshape(self.shape)

    def as_float32(self) -> np.ndarray:
        """The values as float32; a view when the tensor is F32 already, else a converted copy (exact for F16 and BF16)."""
        array = self.numpy()
        if self.dtype is DType.BF16:
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(np.float32, copy=False)


_DTYPE_OF_NUMPY: dict[np.dtype, DType] = {numpy: dtype for dtype, numpy in _NUMPY.items() if dtype is not DType.BF16}


def bytes_view(buffer: Buffer) -> memoryview:
    """A flat view of unsigned bytes over a contiguous buffer. An empty buffer gives b'': memoryview cannot cast it."""
    view = memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(b"")
