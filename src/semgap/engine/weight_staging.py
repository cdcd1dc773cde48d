"""Host memory through which bytes pass on their way to a device: two slots, one being filled while the other is copied."""

from __future__ import annotations

import torch

from semgap.tensors import Array, bytes_view

SLOT_BYTES = 8 << 20  # large enough for PCIe's full speed, and two of them small enough to stay in a CPU's cache


class WeightStaging:
    """Two slots of host memory, pinned for a GPU, and the stream that copies out of them.

    A slot is filled piece by piece by one tensor after another. Its content is copied when a tensor is complete or the slot full, and the
    slot is filled again once its copies are done. A CPU as the target is for tests: copies are then done at once.
    """

    def __init__(self, device: str, slot_bytes: int = SLOT_BYTES) -> None:
        on_gpu = device == "cuda"
        self.device, self.slot_bytes = device, slot_bytes
        self._slots = [torch.empty(slot_bytes, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
        self._views = [bytes_view(slot.numpy()) for slot in self._slots]
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._copied = [torch.cuda.Event() for _ in range(2)] if on_gpu else []
        self._slot, self._used, self._count = 0, 0, 0

    def into(self, target: Array) -> Passage:
        """A sink that fills `target`, flat u8 on the device (numpy's on a CPU). One at a time: fill it before the next call.

        The copies wait for all enqueued work on the target's memory.
        """
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return Passage(self, torch.as_tensor(target))

    def settle(self) -> None:
        """Waits until all copies are done."""
        if self._stream:
            self._stream.synchronize()

    def take_copied(self) -> int:
        """Bytes copied since the last call."""
        count, self._count = self._count, 0
        return count

    def window(self, wanted: int) -> memoryview:
        """Memory for up to `wanted` bytes: the rest of a slot."""
        if self._used == self.slot_bytes:
            self._turn()
        return self._views[self._slot][self._used : self._used + wanted]

    def took(self, count: int) -> bool:
        """`count` more bytes lie in the slot. True if it is now full."""
        self._used += count
        return self._used == self.slot_bytes

    def copy(self, target: torch.Tensor) -> None:
        """Copies the last bytes of the slot to `target`, as many as fill it."""
        self._count += target.numel()
        source = self._slots[self._slot][self._used - target.numel() : self._used]
        if self._stream is None:
            target.copy_(source)
            return
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def _turn(self) -> None:
        """Moves on to the other slot, once its content is copied."""
        if self._stream:
            self._copied[self._slot].record(self._stream)
        self._slot, self._used = 1 - self._slot, 0
        if self._stream:
            self._copied[self._slot].synchronize()  # at once for an event that was never recorded


class Passage:
    """A wire.Sink that passes bytes through the slots into one piece of device memory."""

    def __init__(self, staging: WeightStaging, target: torch.Tensor) -> None:
        self.nbytes = target.numel()
        self._staging, self._target = staging, target
        self._copied, self._done = 0, 0

    def window(self) -> memoryview:
        return self._staging.window(self.nbytes - self._done)

    def took(self, count: int) -> None:
        full = self._staging.took(count)
        self._done += count
        if full or self._done == self.nbytes:
            self._staging.copy(self._target[self._copied : self._done])
            self._copied = self._done
