"""Copies of KV blocks between a device and pinned host memory, on two streams of their own.

A forward pass runs on its thread's current stream. Blocks that leave are gathered on that stream, so that their slab is free for later
work, and copied out on one stream. Blocks that come back are copied and put in place on another; the current stream waits for an event
before it reads them. On the CPU every copy is done at once, and there are no events.
"""

import contextlib
from collections.abc import Sequence

import torch

from semgap.tensors import DType

_REGIONS_AT_ONCE = 16
_ALIGNMENT = 64
Event = torch.cuda.Event | None
"""Marks the end of a copy; None for a copy that has ended."""


class GpuStreams:
    """The two streams of a device, and their order behind each other and behind the current stream."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.is_cuda = device == "cuda"
        # A step may wait for what comes in: the small incoming kernels go before the rest of the large ones that compute.
        self._streams = (torch.cuda.Stream(device, priority=-1), torch.cuda.Stream(device)) if self.is_cuda else None

    def host_memory(self, nbytes: int) -> torch.Tensor:
        """(nbytes,) uint8 in host memory, pinned if the device is a GPU."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.is_cuda)

    def to_host(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Event:
        """Starts copies from the device to pinned memory, behind the current stream and behind all that comes in."""
        if self._streams is None:
            for source, target in pairs:
                target.copy_(source)
            return None
        into, out = self._streams
        out.wait_stream(torch.cuda.current_stream(self.device))
        out.wait_stream(into)
        with torch.cuda.stream(out):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
                source.record_stream(out)  # or torch would hand its memory out again during the copy
        return out.record_event()

    def take_out(self, tensor: torch.Tensor, host: torch.Tensor) -> None:
        """Starts to copy the bytes of a contiguous tensor to pinned memory, as `to_host`."""
        self.to_host([(tensor.view(-1).view(torch.uint8), host)])

    def begin_incoming(self) -> None:
        """Orders all that comes in from now on, on any thread, behind the current stream and all that goes out."""
        if self._streams is not None:
            into, out = self._streams
            into.wait_stream(torch.cuda.current_stream(self.device))
            into.wait_stream(out)

    def incoming(self) -> contextlib.AbstractContextManager:
        """Makes the incoming stream this thread's current one. Never hold it across a yield: it would become the caller's."""
        return torch.cuda.stream(self._streams[0]) if self._streams is not None else contextlib.nullcontext()

    def arrived(self) -> Event:
        """An event behind all that came in so far."""
        return self._streams[0].record_event() if self._streams is not None else None

    def wait(self, event: torch.cuda.Event) -> None:
        """Makes the current stream wait for an event."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def bring(self, host: torch.Tensor, dtype: DType, shape: tuple[int, ...]) -> torch.Tensor:
        """Starts to copy bytes of pinned memory to the device, as a tensor that the current stream may use after `arrived`."""
        self.begin_incoming()
        with self.incoming():
            brought = host.to(self.device, non_blocking=True)
        if self.is_cuda:
            brought.record_stream(torch.cuda.current_stream(self.device))
        return brought.view(getattr(torch, dtype.torch_name)).view(shape)

    def quiesce(self) -> None:
        """Waits for all copies in both directions; then the host may write to pinned memory."""
        for stream in self._streams or ():
            stream.synchronize()


class Regions:
    """Regions of host memory of one size, taken and given back. Allocates many at once: pinning memory takes milliseconds."""

    def __init__(self, streams: GpuStreams, region_bytes: int) -> None:
        self._streams, self._size = streams, -(-region_bytes // _ALIGNMENT) * _ALIGNMENT
        self._free: list[torch.Tensor] = []

    def take(self) -> torch.Tensor:
        """A free region, (bytes,) uint8."""
        if not self._free:
            memory = self._streams.host_memory(_REGIONS_AT_ONCE * self._size)
            self._free = list(memory.view(_REGIONS_AT_ONCE, -1))
        return self._free.pop()

    def give_back(self, region: torch.Tensor) -> None:
        """Frees a region."""
        self._free.append(region)


class BounceBuffer:
    """Pieces of host memory, used in turns. A piece is used again after the event of its last copy.

    Pieces have `nbytes` at first, and grow with the requests.
    """

    def __init__(self, streams: GpuStreams, nbytes: int, pieces: int = 4) -> None:
        self._streams = streams
        self._pieces = [streams.host_memory(nbytes) for _ in range(pieces)]
        self._events: list[Event] = [None] * pieces
        self._next = 0

    @property
    def taken(self) -> torch.Tensor:
        """The piece that was taken last, in its full length."""
        return self._pieces[self._next]

    def take(self, nbytes: int) -> torch.Tensor:
        """(nbytes,) uint8 of the next piece. Waits for the copy that uses it."""
        self._next = (self._next + 1) % len(self._pieces)
        event = self._events[self._next]
        if event is not None:
            event.synchronize()
        if self.taken.numel() < nbytes:
            self._pieces[self._next] = self._streams.host_memory(1 << (nbytes - 1).bit_length())
        return self.taken[:nbytes]

    def used_until(self, event: Event) -> None:
        """Reserves the piece that was taken last until `event`."""
        self._events[self._next] = event
