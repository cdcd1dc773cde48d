"""What a codec is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from semgap.tensors import DType, Tensor, TensorClass


class CodecError(ValueError):
    """A tensor that a codec does not accept, or a payload that does not decode to the tensor it was announced as."""


class Codec(ABC):
    """Turns a tensor into payload bytes and back. Stateless: both ends hold the same one and share nothing else.

    `code` is its number on the wire and never changes meaning; `exact` says that decode(encode(x)) is bitwise x.
    """

    name: ClassVar[str]
    code: ClassVar[int]
    exact: ClassVar[bool]
    on_device: ClassVar[bool] = False  # it has a form that is computed where the tensor is (device.py)
    needs_gpu: ClassVar[bool] = False
    accepts: ClassVar[frozenset[TensorClass]] = frozenset(TensorClass)

    def unavailable(self) -> str | None:
        """Why this process can neither encode nor decode with it; None where it can."""
        return None

    @abstractmethod
    def encode(self, tensor: Tensor) -> Sequence[memoryview]:
        """The payload, as flat byte buffers to be gathered; may alias the tensor's own memory."""

    @abstractmethod
    def decode(self, payload: memoryview, dtype: DType, shape: tuple[int, ...]) -> memoryview:
        """The tensor's bytes in C order; may alias `payload`. CodecError for a payload of the wrong length or damaged."""
