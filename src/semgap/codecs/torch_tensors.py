"""Conversion between torch's tensors and the wire's."""

import torch

from semgap import codecs
from semgap.codecs import Codec, CodecError, Encoded
from semgap.tensors import DType, TensorClass, bytes_view
from semgap.tensors import Tensor as WireTensor


def to_wire(tensor: torch.Tensor, cls: TensorClass) -> WireTensor:
    """The wire's view of a tensor; no copy for a contiguous tensor in host memory."""
    host = tensor.detach().contiguous().cpu()
    dtype = DType.from_torch_name(str(host.dtype))
    return WireTensor(cls, dtype, tuple(host.shape), bytes_view(host.view(torch.uint8).numpy() if host.numel() else b""))


def from_wire(tensor: WireTensor, device: torch.device) -> torch.Tensor:
    """A torch tensor over the same bytes (on the CPU), or a copy on the GPU."""
    if not tensor.data.nbytes:
        return torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype.torch_name), device=device)
    flat = torch.frombuffer(tensor.data, dtype=getattr(torch, tensor.dtype.torch_name))
    return flat.view(tensor.shape).to(device)


def stays_on_device(tensor: torch.Tensor, codec: Codec) -> bool:
    """True if the codec encodes the tensor on its GPU, so that the tensor itself need not come to host memory."""
    return tensor.device.type == "cuda" and codec.on_device


def encode(tensor: torch.Tensor, cls: TensorClass, by: str | Codec) -> Encoded:
    """Encodes a tensor, on its GPU if the codec works there. CodecError as `codecs.encode`.

    On a GPU `encode_ns` is the device's own time, without the copy of the payload to host memory.
    """
    codec = codecs.codec_named(by) if isinstance(by, str) else by
    if not stays_on_device(tensor, codec):
        return codecs.encode(to_wire(tensor, cls), codec)
    if cls not in codec.accepts:
        raise CodecError(f"codec {codec.name!r} does not accept tensors of class {cls.name.lower()}")
    from semgap.codecs import device

    payloads = device.encode(tensor.detach()[None], codec)
    host = torch.empty(payloads.body.numel(), dtype=torch.uint8, pin_memory=True)
    host.copy_(payloads.body, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    buffers = tuple(part for part in (payloads.heads[0], bytes_view(host.numpy())) if part.nbytes)
    nbytes = sum(part.nbytes for part in buffers)
    dtype = DType.from_torch_name(str(tensor.dtype))
    return Encoded(cls, codec.code, dtype, tuple(tensor.shape), buffers, nbytes, payloads.encode_ns)
