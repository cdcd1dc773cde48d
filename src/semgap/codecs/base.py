"""The interface of a codec, and the payloads of its form for a GPU."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from semgap.tensors import DType, Tensor, TensorClass

if TYPE_CHECKING:
    import torch


class CodecError(ValueError):
    """A codec does not accept the tensor, or the payload does not decode to the announced tensor."""


class Codec(ABC):
    """Turns a tensor into payload bytes and back. Stateless: both ends hold the same codec and share nothing else.

    `code` is its number on the wire and never changes meaning; `exact` promises that decode(encode(x)) is bitwise x.
    `on_device`: a tensor on a GPU is encoded there, by `encode_on_device`, instead of in host memory.
    """

    name: ClassVar[str]
    code: ClassVar[int]
    exact: ClassVar[bool]
    on_device: ClassVar[bool] = False
    needs_gpu: ClassVar[bool] = False
    accepts: ClassVar[frozenset[TensorClass]] = frozenset(TensorClass)

    def unavailable(self) -> str | None:
        """Why this process can neither encode nor decode with the codec, or None."""
        return None

    @abstractmethod
    def encode(self, tensor: Tensor) -> Sequence[memoryview]:
        """The payload, as flat byte buffers to gather; may alias the tensor's own memory."""

    @abstractmethod
    def decode(self, payload: memoryview, dtype: DType, shape: tuple[int, ...]) -> memoryview:
        """The tensor's bytes in C order; may alias `payload`. CodecError for a damaged payload or one of the wrong length."""

    def encode_on_device(self, tensors: torch.Tensor, dtype: DType) -> Payloads:
        """The payloads of b contiguous tensors of one shape, stacked [b, ...]: the bytes that `encode` gives for each."""
        raise CodecError(f"codec {self.name!r} works in host memory alone; it cannot encode on a device")

    def decode_on_device(
        self, payloads: Sequence[torch.Tensor], hosts: Sequence[memoryview], dtype: DType, shapes: Sequence[tuple[int, ...]]
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """The tensors of payloads (n,) uint8 on one device; `hosts` hold the same bytes. CodecError for a payload of another tensor.

        Memory that begins with a payload must be aligned to 16 bytes. The second value is a flag (bool, []) on the device, true if all
        payloads were undamaged, or None if the codec has no such check.
        """
        raise CodecError(f"codec {self.name!r} works in host memory alone; it cannot decode on a device")


@dataclass(frozen=True)
class Payloads:
    """Payloads of tensors of one shape, still on the device: payload i is `heads[i]`, on the host, then body[bounds[i] : bounds[i + 1]].

    `body` is (n,) uint8. `encode_ns` is the time of encoding on the device.
    """

    heads: list[memoryview]
    body: torch.Tensor
    bounds: list[int]
    encode_ns: int

    @classmethod
    def of_rows(cls, rows: torch.Tensor, encode_ns: int) -> Payloads:
        """Each row of `rows` (b, n), uint8, is one payload, without a head."""
        count, nbytes = rows.shape
        return cls([memoryview(b"")] * count, rows.flatten(), [nbytes * index for index in range(count + 1)], encode_ns)

    def part(self, index: int) -> torch.Tensor:
        """The body of one payload."""
        return self.body[self.bounds[index] : self.bounds[index + 1]]
