"""The tensor's own bytes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from semgap.codecs.base import Codec, CodecError, Payloads
from semgap.tensors import DType, Tensor, nbytes_of

if TYPE_CHECKING:
    import torch


class Raw(Codec):
    """No change and no copy. Exact. Its payload is a tensor's memory wherever that lies, so `on_device` would add nothing."""

    name, code, exact = "raw", 0, True

    def encode(self, tensor: Tensor) -> Sequence[memoryview]:
        return (tensor.data,)

    def decode(self, payload: memoryview, dtype: DType, shape: tuple[int, ...]) -> memoryview:
        _check_length(payload, dtype, shape)
        return payload

    def encode_on_device(self, tensors: torch.Tensor, dtype: DType) -> Payloads:
        import torch

        return Payloads.of_rows(tensors.view(len(tensors), prod(tensors.shape[1:])).view(torch.uint8), 0)

    def decode_on_device(
        self, payloads: Sequence[torch.Tensor], hosts: Sequence[memoryview], dtype: DType, shapes: Sequence[tuple[int, ...]]
    ) -> tuple[list[torch.Tensor], None]:
        import torch

        for host, shape in zip(hosts, shapes, strict=True):
            _check_length(host, dtype, shape)
        torch_dtype = getattr(torch, dtype.torch_name)
        return [payload.view(torch_dtype).view(shape) for payload, shape in zip(payloads, shapes, strict=True)], None


def _check_length(payload: memoryview, dtype: DType, shape: tuple[int, ...]) -> None:
    if payload.nbytes != nbytes_of(dtype, shape):
        raise CodecError(f"raw payload of {payload.nbytes} bytes for {dtype.name} {shape}")
