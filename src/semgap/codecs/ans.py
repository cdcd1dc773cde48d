"""Codec nvcomp_ans: byte planes split on the GPU, then nvCOMP's ANS. Lossless at more than 100 GB/s, with a GPU at both ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from semgap.codecs.ans_format import check_dtype, chunk_lengths
from semgap.codecs.base import Codec, CodecError, Payloads
from semgap.tensors import DType, Tensor, TensorClass

if TYPE_CHECKING:
    import torch

_EXTRA = "pip install 'semgap[gpu]'"


class NvcompAns(Codec):
    """The byte planes of `planes_zstd`, in chunks of 64 KiB through nvCOMP's rANS; a chunk that does not shrink is stored.

    Exact, for floats. 1.40x on a bf16 KV cache. Encoding and decoding need torch with CUDA, Triton and nvCOMP 6.
    Payload: ans_format.py. Damage gives a CodecError or other values, never another size.
    """

    name, code, exact = "nvcomp_ans", 9, True
    accepts = frozenset({TensorClass.WEIGHTS, TensorClass.LOGITS, TensorClass.HIDDEN, TensorClass.KV})
    on_device = needs_gpu = True

    def unavailable(self) -> str | None:
        """What is missing and how to get it, or None. Imports torch."""
        try:
            import torch
        except ImportError:
            return "torch is not installed"
        if not torch.cuda.is_available():
            return "there is no usable GPU"
        try:
            import triton  # noqa: F401
        except ImportError:
            return "Triton, which comes with torch for CUDA, is not installed"
        from semgap.codecs import nvcomp

        try:
            nvcomp.library()
        except ImportError:
            return f"nvCOMP is not installed; {_EXTRA}"
        except OSError as error:
            return f"nvCOMP cannot be loaded: {error}"
        except CodecError as error:
            return f"{error}; {_EXTRA}"
        return None

    def encode(self, tensor: Tensor) -> Sequence[memoryview]:
        self._require(tensor.dtype)
        from semgap.codecs import device

        return device.encode_host(tensor, self)

    def decode(self, payload: memoryview, dtype: DType, shape: tuple[int, ...]) -> memoryview:
        chunk_lengths(payload, dtype, shape)  # a payload that is wrong in itself is refused first
        self._require(dtype)
        from semgap.codecs import device

        return device.decode_host(payload, dtype, shape, self)

    def encode_on_device(self, tensors: torch.Tensor, dtype: DType) -> Payloads:
        from semgap.codecs import device_ans

        return device_ans.encode(tensors, dtype)

    def decode_on_device(
        self, payloads: Sequence[torch.Tensor], hosts: Sequence[memoryview], dtype: DType, shapes: Sequence[tuple[int, ...]]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        from semgap.codecs import device_ans

        return device_ans.decode(payloads, hosts, dtype, shapes)

    def _require(self, dtype: DType) -> None:
        check_dtype(dtype)
        reason = self.unavailable()
        if reason:
            raise CodecError(f"codec 'nvcomp_ans' cannot be used here: {reason}")
