"""A frame: its 28-byte prefix, its checksum, its limits, and how it is sent."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import xxhash

from semgap.codecs import Encoded
from semgap.wire.messages import Header, Kind, Operation, TensorHeader, Tokens

MAGIC = 0x6753


VERSION = 1


PREFIX_BYTES = 28


PREFIX = struct.Struct("<HBBBBHIQ")


DIGEST = struct.Struct("<Q")


GATHER = 512  # buffers a sendmsg call, half of Linux's IOV_MAX


_SLOWEST_BYTES_PER_S = 1 << 20  # a frame's deadline grows with its length, at 1 MiB/s


NOTHING = memoryview(b"")


class Flag:
    """Bits of the flags byte; plain integers, since every frame is tested for them."""

    REPLY = 1
    ERROR = 2
    LAST = 4  # of a stream of token frames
    WIDE = 8  # a token frame's ids are u32, not u16


class WireError(Exception):
    """Anything that ends a connection. `code` is stable and travels in error frames."""

    code = "wire"


class FrameError(WireError):
    """A frame that fails a check: `code` names which one."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class DeadlineError(WireError):
    code = "deadline"


class ClosedError(WireError):
    """The other side closed the connection between frames."""

    code = "closed"


_ENCODER = msgspec.msgpack.Encoder()


@dataclass(frozen=True)
class Limits:
    """What a receiver accepts at most. Checked before anything is allocated."""

    header_bytes: int = 65_535
    payload_bytes: int = 1 << 30
    buffers: int = 4096


UNAUTHENTICATED = Limits(header_bytes=32_768, payload_bytes=0, buffers=0)


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame as it was received. `payloads[i]` belongs to `header.tensors[i]` and is valid until the next receive.

    A payload that `place` gave several buffers or a sink is in them, and b"" here.
    """

    operation: Operation
    kind: Kind
    flags: int
    sequence: int
    header: Header
    payloads: tuple[memoryview, ...]
    header_bytes: int  # prefix and msgspec header
    payload_bytes: int


class Sink(Protocol):
    """Takes a payload piece by piece, as it arrives, and before its frame's checksum is known to be right: a frame that fails ends the
    connection, and what the sink took is of no use.
    """

    nbytes: int

    def window(self) -> memoryview:
        """Where the next bytes are to lie: 1 or more, and no more than are to come. May wait for memory to become free."""

    def took(self, count: int) -> None:
        """The first `count` bytes of that window are there."""


Memory = memoryview | list[memoryview] | Sink
"""Where a payload is to lie: one buffer, several that it fills one after the other, or a sink."""


Destinations = Callable[[Operation, Header], Sequence[Memory | None]]


def describe(encoded: Sequence[Encoded]) -> tuple[TensorHeader, ...]:
    """The tensor headers of encoded tensors."""
    return tuple(TensorHeader(e.cls, e.codec, e.dtype, e.shape, e.nbytes) for e in encoded)


def pack(operation: Operation, kind: Kind, flags: int, sequence: int, header: Header, buffers: Sequence[memoryview]) -> bytes:
    """Prefix and header of a frame, checksummed over them and `buffers`; an empty header and a token frame's take no bytes."""
    bare = type(header) is Tokens or (type(header) is Header and not header.tensors)
    body = b"" if bare else _ENCODER.encode(header)
    if len(body) > 0xFFFF:
        raise FrameError("header", f"header of {operation.name.lower()} takes {len(body)} bytes, more than 65535")
    nbytes = sum(buffer.nbytes for buffer in buffers)
    prefix = PREFIX.pack(MAGIC, VERSION, operation, kind, flags, len(body), sequence, nbytes)
    digest = xxhash.xxh3_64(prefix)
    digest.update(body)
    for buffer in buffers:
        digest.update(buffer)
    return prefix + DIGEST.pack(digest.intdigest()) + body


def send(sock: socket.socket, start: bytes, buffers: Sequence[memoryview], timeout_s: float) -> None:
    """Gathers and sends a whole frame; DeadlineError when the peer does not drain it in time."""
    pending = [memoryview(start), *[buffer for buffer in buffers if buffer.nbytes]]
    deadline = deadline_of(timeout_s, sum([buffer.nbytes for buffer in pending]))
    first = 0  # pending[:first] has gone
    while first < len(pending):
        sent = _send_some(sock, pending[first : first + GATHER], deadline)
        while first < len(pending) and sent >= pending[first].nbytes:
            sent -= pending[first].nbytes
            first += 1
        if sent:
            pending[first] = pending[first][sent:]


def _send_some(sock: socket.socket, buffers: Sequence[memoryview], deadline: float) -> int:
    while True:
        try:
            return sock.sendmsg(buffers)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise DeadlineError("the peer did not take a frame in time") from None
        except OSError as error:  # also what keepalive and TCP_USER_TIMEOUT make of a peer that is gone
            raise ClosedError(f"the peer closed the connection while a frame was sent: {error}") from error


def deadline_of(timeout_s: float, nbytes: int) -> float:
    return time.monotonic() + timeout_s + nbytes / _SLOWEST_BYTES_PER_S
