"""Codecs by name: each turns a tensor of one class into bytes and back, and says whether it is exact.

One file per family. Call a codec through `encode` and `decode` below: they check its tensor classes and time the work.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from semgap.codecs.ans import NvcompAns
from semgap.codecs.base import Codec, CodecError
from semgap.codecs.cast import Fp16, Fp16Zlib
from semgap.codecs.compact import Compact
from semgap.codecs.groups import Int4, Int8
from semgap.codecs.planes import PlanesZstd
from semgap.codecs.raw import Raw
from semgap.codecs.topk import TopK
from semgap.codecs.zstd import Zstd
from semgap.tensors import DType, Tensor, TensorClass, nbytes_of

_ALL = (Raw(), Fp16(), Fp16Zlib(), Zstd(), PlanesZstd(), Compact(), Int8(), Int4(), TopK(), NvcompAns())


def indexed(codecs: Iterable[Codec], key: str) -> dict[Any, Codec]:
    """Codecs by their `key`, name or code. CodecError for two that share one."""
    found: dict[Any, Codec] = {}
    for codec in codecs:
        value = getattr(codec, key)
        if found.setdefault(value, codec) is not codec:
            names = f"{found[value].name!r} and {codec.name!r}"
            raise CodecError(f"codecs {names} share the {key} {value!r}; give the new one a {key} of its own")
    return found


CODECS: dict[str, Codec] = indexed(_ALL, "name")
_BY_CODE: dict[int, Codec] = indexed(_ALL, "code")


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoded tensor: class, dtype and shape, the codec's wire code, the payload as buffers to gather, and the time of encoding."""

    cls: TensorClass
    codec: int
    dtype: DType
    shape: tuple[int, ...]
    buffers: tuple[memoryview, ...]
    nbytes: int
    encode_ns: int


def codec_named(name: str) -> Codec:
    """The codec of that name. CodecError lists the known names."""
    if name not in CODECS:
        raise CodecError(f"codec {name!r} is not known; use one of {', '.join(CODECS)}")
    return CODECS[name]


def codec_of(code: int) -> Codec:
    """The codec of a wire code. CodecError for an unknown code."""
    if code not in _BY_CODE:
        raise CodecError(f"codec code {code} is not known to this version")
    return _BY_CODE[code]


def encode(tensor: Tensor, by: str | Codec) -> Encoded:
    """Encodes `tensor` by a registered codec's name, or by a codec with parameters, such as TopK(50).

    CodecError if the codec does not accept the tensor's class.
    """
    codec = by if isinstance(by, Codec) else codec_named(by)
    if tensor.cls not in codec.accepts:
        raise CodecError(f"codec {codec.name!r} does not accept tensors of class {tensor.cls.name.lower()}")
    begin = time.perf_counter_ns()
    buffers = tuple(codec.encode(tensor))
    took = time.perf_counter_ns() - begin
    nbytes = sum(buffer.nbytes for buffer in buffers)
    return Encoded(tensor.cls, codec.code, tensor.dtype, tensor.shape, buffers, nbytes, took)


def decode(code: int, cls: TensorClass, dtype: DType, shape: tuple[int, ...], payload: memoryview) -> tuple[Tensor, int]:
    """The tensor, and the nanoseconds of decoding. CodecError for a payload that is not exactly that tensor."""
    begin = time.perf_counter_ns()
    data = codec_of(code).decode(payload, dtype, shape)
    if data.nbytes != nbytes_of(dtype, shape):
        raise CodecError(f"codec {codec_of(code).name!r} gave {data.nbytes} bytes for {dtype.name} {shape}")
    return Tensor(cls, dtype, shape, data), time.perf_counter_ns() - begin


__all__ = ["CODECS", "Codec", "CodecError", "Encoded", "TopK", "codec_named", "codec_of", "decode", "encode"]
