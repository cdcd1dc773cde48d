"""The memory of a model's weights: allocated before their bytes arrive, from a file or from the wire."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from semgap.engine.architecture import ModelError
from semgap.engine.memory_check import require_free
from semgap.tensors import Array, bytes_view, nbytes_of
from semgap.wire.frames import Sink
from semgap.wire.messages import WeightSpec

if TYPE_CHECKING:
    import torch

    from semgap.engine.weight_staging import Passage, WeightStaging

_ALIGNMENT = 64  # a cache line, as of torch's own allocator


class Weights:
    """The memory of a model's weights, on its device alone. On a CPU bytes land in it, unless `slot_bytes` of staging are wanted; on a GPU
    they come through staging memory.

    A model read from a file and one received over the wire have the same layout, so that the source cannot change a step's time.
    """

    def __init__(self, specs: Sequence[WeightSpec], device: str, slot_bytes: int = 0) -> None:
        self.specs = tuple(specs)
        self.device = device
        self.sizes = [nbytes_of(spec.dtype, spec.shape) for spec in self.specs]
        self._offsets: list[int] = []
        end = 0
        for nbytes in self.sizes:
            self._offsets.append(end)
            end += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        require_free("the model's weights need", end, device)
        self._memory, self._staging = _device_memory(end, device), _staging(device, slot_bytes)
        self._bytes = None if self._staging else bytes_view(self._memory)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, without padding."""
        return sum(self.sizes)

    @property
    def slot_bytes(self) -> int | None:
        """Bytes of a staging slot, or None if weights land in their memory directly."""
        return self._staging.slot_bytes if self._staging else None

    def destination(self, index: int) -> "memoryview | Passage":
        """Where a receiver puts the bytes of weight `index`: its memory, or a sink that copies to the device as they arrive."""
        part = slice(self._offsets[index], self._offsets[index] + self.sizes[index])
        if self._staging:
            return self._staging.into(self._memory[part])
        assert self._bytes is not None
        return self._bytes[part]

    def sink(self, index: int) -> Sink:
        """The same, always as a sink."""
        destination = self.destination(index)
        return _Direct(destination) if isinstance(destination, memoryview) else destination

    def take_copied(self) -> int:
        """Bytes copied to a device since the last call; 0 without staging."""
        return self._staging.take_copied() if self._staging else 0

    def settle(self) -> None:
        """Waits until all received bytes are in the model's memory. Call it before a forward pass."""
        if self._staging:
            self._staging.settle()

    @property
    def memory(self) -> np.ndarray:
        """All weights on a CPU in their order, float32 (n,), with the gaps that align them."""
        return self._memory[: self._memory.size // 4 * 4].view(np.float32)

    def arrays(self) -> dict[str, Array]:
        """Views of the weights by name, in memory of the device: numpy arrays on a CPU (bfloat16 as bit patterns), else torch tensors."""
        return {spec.name: self._view(index, spec) for index, spec in enumerate(self.specs)}

    def tensors(self) -> "dict[str, torch.Tensor]":
        """The same as torch tensors."""
        import torch

        dtypes = {spec.name: getattr(torch, spec.dtype.torch_name) for spec in self.specs}
        flat = {name: torch.from_numpy(array) if isinstance(array, np.ndarray) else array for name, array in self.arrays().items()}
        return {name: tensor.view(dtypes[name]) for name, tensor in flat.items()}

    def read_file(self, path: Path, offsets: Sequence[int]) -> None:
        """Fills all weights from `path`, weight i at byte offsets[i]."""
        with path.open("rb", buffering=0) as file:
            for index, offset in enumerate(offsets):
                sink, done = self.sink(index), 0
                while done < sink.nbytes:
                    got = os.preadv(file.fileno(), [sink.window()], offset + done)
                    if not got:
                        raise ModelError(f"{path} ends inside weight {self.specs[index].name!r}")
                    sink.took(got)
                    done += got
        self.settle()

    def _view(self, index: int, spec: WeightSpec) -> Array:
        flat = self._memory[self._offsets[index] : self._offsets[index] + self.sizes[index]]
        if isinstance(flat, np.ndarray):
            return flat.view(spec.dtype.numpy).reshape(spec.shape)
        import torch

        return flat.view(getattr(torch, spec.dtype.torch_name)).view(spec.shape)


def _device_memory(nbytes: int, device: str) -> Array:
    """Memory (nbytes,) uint8 on a cache line. numpy requests huge pages, which a core reads faster than torch's small ones."""
    if device == "cpu":
        memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
        return memory[-memory.ctypes.data % _ALIGNMENT :][:nbytes]
    import torch

    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def _staging(device: str, slot_bytes: int) -> "WeightStaging | None":
    if device == "cpu" and not slot_bytes:
        return None
    from semgap.engine.weight_staging import SLOT_BYTES, WeightStaging

    return WeightStaging(device, slot_bytes or SLOT_BYTES)


class _Direct:
    """A wire.Sink over the final memory."""

    def __init__(self, memory: memoryview) -> None:
        self.nbytes = memory.nbytes
        self._left = memory

    def window(self) -> memoryview:
        return self._left

    def took(self, count: int) -> None:
        self._left = self._left[count:]


def fill(sink: Sink, data: memoryview) -> None:
    """Puts `data`, already in memory and as long as the sink, through the sink."""
    done = 0
    while done < sink.nbytes:
        window = sink.window()
        count = min(window.nbytes, sink.nbytes - done)
        window[:count] = data[done : done + count]
        sink.took(count)
        done += count
