"""Between torch's tensors and the wire's."""

from __future__ import annotations

import torch

from semgap.tensors import DType, TensorClass, bytes_view
from semgap.tensors import Tensor as WireTensor


def to_wire(tensor: torch.Tensor, cls: TensorClass) -> WireTensor:
    """The wire's view of a tensor; no copy for a contiguous one in host memory."""
    host = tensor.detach().contiguous().cpu()
    dtype = DType.from_torch_name(str(host.dtype))
    return WireTensor(cls, dtype, tuple(host.shape), bytes_view(host.view(torch.uint8).numpy() if host.numel() else b""))


def from_wire(tensor: WireTensor, device: torch.device) -> torch.Tensor:
    """A torch tensor over the same bytes (on the CPU), or a copy on the device."""
    if not tensor.data.nbytes:
        return torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype.torch_name), device=device)
    flat = torch.frombuffer(tensor.data, dtype=getattr(torch, tensor.dtype.torch_name))
    return flat.view(tensor.shape).to(device)
