"""KV memory on a GPU, as torch tensors."""

from collections.abc import Sequence

import torch

from semgap.codecs.arrays import from_wire
from semgap.kv.gpu_streams import GpuStreams
from semgap.kv.pool import KVPool, KVShape
from semgap.tensors import DType, Tensor


class GpuPool(KVPool):
    """Slabs of a torch device, and the streams that carry their blocks. Tests use it on a CPU too."""

    def __init__(self, shape: KVShape, dtype: DType, device: str, budget_bytes: int) -> None:
        super().__init__(shape, dtype, device, budget_bytes)
        self.streams = GpuStreams(device)
        size, torch_dtype = (self.slabs, *shape.slab()), getattr(torch, dtype.torch_name)
        self._memory = torch.full(size, float("nan"), dtype=torch_dtype, device=device)

    def slab(self, number: int) -> torch.Tensor:
        return self._memory[number]

    def blank(self, slab: torch.Tensor, begin: int, end: int) -> None:
        slab[:, :, :, begin:end] = float("nan")

    def pieces(self, number: int, begin: int, end: int) -> list[memoryview]:
        raise TypeError("slabs on a GPU have no host memory")

    def pack(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack(list(parts))

    def unpack(self, packed: Tensor) -> torch.Tensor:
        return from_wire(packed, self.device)
