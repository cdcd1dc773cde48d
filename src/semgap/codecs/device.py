"""Codecs on the device of the tensors: payloads from and to tensors of a GPU, which either side may decode.

All work is enqueued on the current stream. `encode` waits for it once, to learn the payloads' lengths.
"""

from collections.abc import Sequence

import torch

from semgap.codecs.base import Codec, CodecError, Payloads
from semgap.tensors import DType, Tensor, bytes_view


def encode(tensors: torch.Tensor, codec: Codec) -> Payloads:
    """The payloads of b tensors of one shape, stacked [b, ...]. CodecError as from the codec, which must have a form for a device."""
    return codec.encode_on_device(tensors.contiguous(), DType.from_torch_name(str(tensors.dtype)))


def decode(
    codec: Codec, payload: torch.Tensor, host: memoryview, dtype: DType, shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As Codec.decode_on_device, of one payload."""
    (value,), intact = codec.decode_on_device([payload], [host], dtype, [shape])
    return value, intact


def encode_host(tensor: Tensor, codec: Codec) -> Sequence[memoryview]:
    """The payload of a tensor in host memory, encoded on this process's GPU."""
    if not tensor.data.nbytes:
        return (memoryview(b""),)
    flat = torch.frombuffer(tensor.data, dtype=getattr(torch, tensor.dtype.torch_name))
    payloads = encode(flat.to("cuda").view(1, *tensor.shape), codec)
    return payloads.heads[0], bytes_view(payloads.body.cpu().numpy())


def decode_host(payload: memoryview, dtype: DType, shape: tuple[int, ...], codec: Codec) -> memoryview:
    """The tensor's bytes, out of a payload in host memory, decoded on this process's GPU."""
    if not payload.nbytes:
        return payload
    uploaded = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to("cuda")
    decoded, intact = decode(codec, uploaded, payload, dtype, shape)
    require(intact)
    return bytes_view(decoded.contiguous().view(torch.uint8).cpu().numpy())


def require(intact: torch.Tensor | None) -> None:
    """Waits for a flag that `decode` gave. CodecError if the payload was damaged."""
    if intact is not None and not intact.item():
        raise CodecError("a payload is damaged: a group's zero or scale is not finite, or nvCOMP did not find the announced content")


def warm_up(codec: Codec, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    """Encodes and decodes zeros of a block's shape, so that kernels are compiled before any measured step."""
    payloads = encode(torch.zeros((1, *shape), dtype=dtype, device=device), codec)
    host = memoryview(b"".join([payloads.heads[0], bytes_view(payloads.body.cpu().numpy())]))
    uploaded = torch.frombuffer(bytearray(host), dtype=torch.uint8).to(device)
    require(decode(codec, uploaded, host, DType.from_torch_name(str(dtype)), shape)[1])
