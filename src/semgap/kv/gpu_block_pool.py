"""The blocks of many requests on a GPU, as one torch tensor."""

from typing import Any

import torch

from semgap.kv.block_pool import BlockPool
from semgap.kv.pool import KVShape
from semgap.tensors import DType


class GpuBlockPool(BlockPool):
    """Blocks in the memory of a torch device. Tests use it on a CPU too."""

    def __init__(self, shape: KVShape, dtype: DType, device: str, budget_bytes: int) -> None:
        self._device = device
        super().__init__(shape, dtype, budget_bytes)

    def blank(self, block: int) -> None:
        self.memory[block] = float("nan")

    def _blank_memory(self, parts: tuple[int, ...]) -> Any:
        return torch.full(parts, float("nan"), dtype=getattr(torch, self.dtype.torch_name), device=self._device)
