"""Between arrays of an executor, numpy's or torch's, and tensors on the wire. Imports torch for torch's tensors alone."""

import numpy as np

from semgap import codecs
from semgap.codecs import Codec, CodecError, Encoded
from semgap.tensors import Array, DType, Tensor, TensorClass, bytes_view


def to_wire(array: Array, cls: TensorClass, dtype: DType | None = None) -> Tensor:
    """The wire's view of an array; no copy for a contiguous one in host memory. `dtype`: BF16, for bit patterns in numpy."""
    if isinstance(array, np.ndarray):
        return Tensor.from_numpy(array, cls, dtype)
    import torch

    host = array.detach().contiguous().cpu()
    known = DType.from_torch_name(str(host.dtype))
    return Tensor(cls, known, tuple(host.shape), bytes_view(host.view(torch.uint8).numpy() if host.numel() else b""))


def from_wire(tensor: Tensor, device: str) -> Array:
    """A torch tensor over the same bytes (on the CPU), or a copy on the GPU."""
    import torch

    dtype = getattr(torch, tensor.dtype.torch_name)
    if not tensor.data.nbytes:
        return torch.empty(tensor.shape, dtype=dtype, device=device)
    return torch.frombuffer(tensor.data, dtype=dtype).view(tensor.shape).to(device)


def encode(array: Array, cls: TensorClass, by: str | Codec, dtype: DType | None = None) -> Encoded:
    """Encodes an array, on its GPU if the codec works there. CodecError as `codecs.encode`.

    On a GPU `encode_ns` is the device's own time, without the copy of the payload to host memory.
    """
    codec = codecs.codec_named(by) if isinstance(by, str) else by
    if not stays_on_device(array, codec):
        return codecs.encode(to_wire(array, cls, dtype), codec)
    if cls not in codec.accepts:
        raise CodecError(f"codec {codec.name!r} does not accept tensors of class {cls.name.lower()}")
    import torch

    from semgap.codecs import device

    payloads = device.encode(array.detach()[None], codec)
    host = torch.empty(payloads.body.numel(), dtype=torch.uint8, pin_memory=True)
    host.copy_(payloads.body, non_blocking=True)
    torch.cuda.current_stream(array.device).synchronize()
    buffers = tuple(part for part in (payloads.heads[0], bytes_view(host.numpy())) if part.nbytes)
    nbytes = sum(part.nbytes for part in buffers)
    return Encoded(cls, codec.code, DType.from_torch_name(str(array.dtype)), tuple(array.shape), buffers, nbytes, payloads.encode_ns)


def stays_on_device(array: Array, codec: Codec) -> bool:
    """True if the codec encodes the array on its GPU, so that the array itself need not come to host memory."""
    return codec.on_device and not isinstance(array, np.ndarray) and array.device.type == "cuda"
