"""Waiting for descriptors: any number of them, to the microsecond. select fails at 1,024, poll and epoll round up to milliseconds."""

import ctypes
import errno
import os
import select
import time
from array import array
from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar

_TO_READ, _TO_WRITE = select.POLLIN, select.POLLOUT  # an error or an end shows as both
_TO_READ_OR_END, _TO_WRITE_OR_END = (events | select.POLLHUP | select.POLLERR | select.POLLNVAL for events in (_TO_READ, _TO_WRITE))
_ppoll = ctypes.CDLL(None, use_errno=True).ppoll
_ppoll.argtypes = (ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_void_p)


class Descriptor(Protocol):
    """A socket or another object with a descriptor."""

    def fileno(self) -> int: ...


Reader = TypeVar("Reader", bound=Descriptor)
Writer = TypeVar("Writer", bound=Descriptor)


def ready(readers: Iterable[Reader], writers: Iterable[Writer] = (), timeout_s: float | None = None) -> tuple[list[Reader], list[Writer]]:
    """Those that can be read, or are at their end, and those that can be written; waits until there are any.

    Both are empty after `timeout_s` (None: it waits on). Signals are handled meanwhile and end no wait. ValueError for a closed socket.
    """
    to_read, to_write = list(readers), list(writers)
    watched = _pollfds(to_read, _TO_READ) + _pollfds(to_write, _TO_WRITE)
    found = _found(watched, timeout_s)
    return (
        [each for each, events in zip(to_read, found, strict=False) if events & _TO_READ_OR_END],
        [each for each, events in zip(to_write, found[len(to_read) :], strict=True) if events & _TO_WRITE_OR_END],
    )


class Watch(Generic[Reader]):
    """The same readers, waited for again and again."""

    def __init__(self, readers: Iterable[Reader]) -> None:
        self._readers = list(readers)
        self._watched = _pollfds(self._readers, _TO_READ)

    def ready(self, timeout_s: float | None = None) -> list[Reader]:
        """As the function `ready`."""
        return [each for each, events in zip(self._readers, _found(self._watched, timeout_s), strict=True) if events & _TO_READ_OR_END]


def _found(watched: array, timeout_s: float | None) -> list[int]:
    """The events found at each descriptor, once there are any."""
    deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
    while _poll(watched, deadline_s) < 0:  # a signal came, and its handler has run
        pass
    return [events >> 16 for events in watched[1::2]]


def _pollfds(watched: Iterable[Descriptor], events: int) -> array:
    """struct pollfd of each: the descriptor, then wanted and found events as the halves of a little-endian int."""
    flat = array("i", [field for each in watched for field in (each.fileno(), events)])
    if flat and min(flat) < 0:
        raise ValueError("a closed socket cannot be waited for")
    return flat


def _poll(watched: array, deadline_s: float | None) -> int:
    """The number of ready descriptors; -1 after a signal. OSError."""
    left = None
    if deadline_s is not None:
        left_ns = max(0, int(1e9 * (deadline_s - time.monotonic())))
        left = array("l", divmod(left_ns, 10**9))
    count = _ppoll(watched.buffer_info()[0], len(watched) // 2, None if left is None else left.buffer_info()[0], None)
    if count < 0 and ctypes.get_errno() != errno.EINTR:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return count
