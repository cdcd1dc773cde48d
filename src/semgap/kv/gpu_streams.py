"""How KV blocks cross between a device and host memory: on streams of their own, from and to pinned memory.

A forward pass runs on the current stream of the thread that asks for it. What leaves is gathered there, so that its slab is free for
what follows, and is copied out on one stream; what comes back is copied and put in place on another, and the current stream waits for an
event before it reads. On the CPU everything happens at once, and there are no events.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

_REGIONS_AT_ONCE = 16


_ALIGNMENT = 64


Event = torch.cuda.Event | None
"""What marks the end of a copy; None where it has ended."""


class GpuStreams:
    """The two streams of a device, and the order between them and the current one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"
        # A step may wait for what comes in: its small kernels go before what is left of the large ones that compute.
        self._streams = (torch.cuda.Stream(device, priority=-1), torch.cuda.Stream(device)) if self.is_cuda else None

    def host_memory(self, nbytes: int) -> torch.Tensor:
        """(nbytes,) uint8 in host memory, pinned where the device is a GPU."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.is_cuda)

    def to_host(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Event:
        """GpuStreams from the device to pinned memory, after all that the current stream has been given and all that comes in."""
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
                source.record_stream(out)  # or its memory would be handed out again while it is read
        return out.record_event()

    def begin_incoming(self) -> None:
        """What comes in from now on, on whichever thread, comes after all that the current stream was given, and all that goes out."""
        if self._streams is not None:
            into, out = self._streams
            into.wait_stream(torch.cuda.current_stream(self.device))
            into.wait_stream(out)

    def incoming(self) -> contextlib.AbstractContextManager:
        """The stream of what comes in is this thread's current one. Never held across a yield: it would become the caller's."""
        return torch.cuda.stream(self._streams[0]) if self._streams is not None else contextlib.nullcontext()

    def arrived(self) -> Event:
        """An event behind all that came in so far."""
        return self._streams[0].record_event() if self._streams is not None else None

    def quiesce(self) -> None:
        """Waits until nothing is on its way, either way: pinned memory may be written by the host."""
        for stream in self._streams or ():
            stream.synchronize()


class Regions:
    """Host memory in regions of one size, taken and given back. Many are allocated at once, since to pin memory takes milliseconds."""

    def __init__(self, copies: GpuStreams, region_bytes: int) -> None:
        self._copies, self._size = copies, -(-region_bytes // _ALIGNMENT) * _ALIGNMENT
        self._free: list[torch.Tensor] = []

    def take(self) -> torch.Tensor:
        """A region, (bytes,) uint8, that nobody else has."""
        if not self._free:
            memory = self._copies.host_memory(_REGIONS_AT_ONCE * self._size)
            self._free = list(memory.view(_REGIONS_AT_ONCE, -1))
        return self._free.pop()

    def give_back(self, region: torch.Tensor) -> None:
        self._free.append(region)


class BounceBuffer:
    """Pieces of host memory used in turns; one comes again once the event of the copy that used it last has passed.

    They are `nbytes` long at first, and grow with what is asked for.
    """

    def __init__(self, copies: GpuStreams, nbytes: int, pieces: int = 4) -> None:
        self._copies = copies
        self._pieces = [copies.host_memory(nbytes) for _ in range(pieces)]
        self._events: list[Event] = [None] * pieces
        self._next = 0

    def take(self, nbytes: int) -> torch.Tensor:
        """The next piece, of which (nbytes,) uint8. Waits for the copy that uses it."""
        self._next = (self._next + 1) % len(self._pieces)
        event = self._events[self._next]
        if event is not None:
            event.synchronize()
        if self._pieces[self._next].numel() < nbytes:
            self._pieces[self._next] = self._copies.host_memory(1 << (nbytes - 1).bit_length())
        return self._pieces[self._next][:nbytes]

    def used_until(self, event: Event) -> None:
        """The piece taken last is in use until then."""
        self._events[self._next] = event
