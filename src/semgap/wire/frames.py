"""Frames: the bytes that cross a connection, their limits, and how they are sent.

One frame is a 28-byte prefix (little endian), a msgspec header and the tensors' payloads back to back:

    magic u16 | version u8 | operation u8 | kind u8 | flags u8 | header length u16 | sequence u32 | payload length u64 | xxh3-64

The checksum covers everything but itself, and the frame's number in its direction of the connection: 1, 2, 3, ... The number itself does
not cross. So a frame that comes at another place than it was sent at is damaged.
"""

import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec
import xxhash

from semgap.codecs import Encoded
from semgap.wire.messages import Header, Kind, Operation, TensorHeader, Tokens

MAGIC = 0x6753
VERSION = 4
PREFIX_BYTES = 28
PREFIX = struct.Struct("<HBBBBHIQ")
DIGEST = struct.Struct("<Q")
_NUMBER = struct.Struct("<Q")
GATHER = 512  # buffers a sendmsg call, half of Linux's IOV_MAX
_SLOWEST_BYTES_PER_S = 1 << 20  # a frame's deadline grows with its length, at 1 MiB/s
NOTHING = memoryview(b"")
TLS_MISMATCH = "one side of this connection speaks TLS and the other does not; start both with tls (--tls, worker.tls), or neither"
HeaderKind = TypeVar("HeaderKind", bound=Header)


class Flag:
    """Bits of the flags byte. Plain integers: every frame is tested for them."""

    REPLY = 1
    ERROR = 2
    LAST = 4  # of a stream of token frames
    WIDE = 8  # a token frame's ids are u32, not u16


class WireError(Exception):
    """An error that ends a connection. `code` is stable and travels in error frames."""

    code = "wire"


class Coded(Exception):
    """An error with a `code` of its own."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class FrameError(Coded, WireError):
    """A frame that fails a check; `code` names the check. The connection is of no more use."""


class DeadlineError(WireError):
    code = "deadline"


class ClosedError(WireError):
    """The other side closed the connection between frames."""

    code = "closed"


_ENCODER = msgspec.msgpack.Encoder()


@dataclass(frozen=True)
class Limits:
    """The most that a receiver accepts; checked before it allocates memory."""

    header_bytes: int = 65_535
    payload_bytes: int = 1 << 30
    buffers: int = 4096


UNAUTHENTICATED = Limits(header_bytes=32_768, payload_bytes=0, buffers=0)


@dataclass(frozen=True, slots=True)
class Frame:
    """A received frame. `payloads[i]` belongs to `header.tensors[i]` and is valid until the next receive.

    A payload that went to several buffers or to a sink is b"" here.
    """

    operation: Operation
    kind: Kind
    flags: int
    sequence: int
    header: Header
    payloads: tuple[memoryview, ...]
    header_bytes: int  # prefix and msgspec header
    payload_bytes: int

    def header_as(self, kind: type[HeaderKind]) -> HeaderKind:
        """The header, of the one type that its operation and direction have (messages.py)."""
        assert isinstance(self.header, kind)
        return self.header


class Stream(Protocol):
    """A socket, or TLS over one: the calls that frames are sent and received by."""

    def sendmsg(self, buffers: Sequence[memoryview], /) -> int: ...

    def recv_into(self, buffer: memoryview, nbytes: int = ..., flags: int = ..., /) -> int: ...

    def recvmsg_into(self, buffers: Sequence[memoryview], ancillary_bytes: int = ..., flags: int = ..., /) -> tuple[Any, ...]: ...


class Sink(Protocol):
    """Takes a payload piece by piece as it arrives.

    The receiver checks the frame's checksum afterwards: if it is wrong, the connection ends and the bytes are of no use.
    """

    nbytes: int

    def window(self) -> memoryview:
        """Memory for the next bytes: at least 1 byte, at most those still to come. May block until memory is free."""

    def took(self, count: int) -> None:
        """The first `count` bytes of that window have arrived."""


Memory = memoryview | list[memoryview] | Sink
"""Where a payload goes: one buffer, several buffers in order, or a sink."""


Destinations = Callable[[Operation, Header], Sequence[Memory | None]]
"""Gives memory for each payload of a frame; None: the receiver's own."""


def tensor_headers(encoded: Sequence[Encoded]) -> tuple[TensorHeader, ...]:
    """The tensor headers of encoded tensors."""
    return tuple(TensorHeader(e.cls, e.codec, e.dtype, e.shape, e.nbytes) for e in encoded)


def digest_of(number: int, prefix: bytes | memoryview) -> xxhash.xxh3_64:
    """The beginning of the checksum of frame `number` of its direction; header and payload follow."""
    digest = xxhash.xxh3_64(_NUMBER.pack(number))
    digest.update(prefix)
    return digest


def pack(
    operation: Operation, kind: Kind, flags: int, sequence: int, header: Header, buffers: Sequence[memoryview], number: int = 0
) -> bytes:
    """Prefix and header of a frame, with a checksum that covers `buffers` too. Empty headers and those of token frames take no bytes.

    `number` is the frame's in its direction; 0 for a request's, which is its `sequence`.
    """
    bare = type(header) is Tokens or (type(header) is Header and not header.tensors)
    body = b"" if bare else _ENCODER.encode(header)
    if len(body) > 0xFFFF:
        raise FrameError("header", f"header of {operation.name.lower()} takes {len(body)} bytes, more than 65535")
    nbytes = sum(buffer.nbytes for buffer in buffers)
    prefix = PREFIX.pack(MAGIC, VERSION, operation, kind, flags, len(body), sequence, nbytes)
    digest = digest_of(number or sequence, prefix)
    digest.update(body)
    for buffer in buffers:
        digest.update(buffer)
    return prefix + DIGEST.pack(digest.intdigest()) + body


def send(sock: Stream, start: bytes, buffers: Sequence[memoryview], timeout_s: float) -> None:
    """Sends a whole frame. DeadlineError if the peer does not drain it in time."""
    pending = [memoryview(start), *[buffer for buffer in buffers if buffer.nbytes]]
    deadline = deadline_of(timeout_s, sum([buffer.nbytes for buffer in pending]))
    first = 0  # pending[:first] is sent
    while first < len(pending):
        sent = _send_some(sock, pending[first : first + GATHER], deadline)
        while first < len(pending) and sent >= pending[first].nbytes:
            sent -= pending[first].nbytes
            first += 1
        if sent:
            pending[first] = pending[first][sent:]


def _send_some(sock: Stream, buffers: Sequence[memoryview], deadline: float) -> int:
    while time.monotonic() <= deadline:
        try:
            return sock.sendmsg(buffers)
        except BlockingIOError:
            pass
        except OSError as error:  # keepalive and TCP_USER_TIMEOUT raise it too, if the peer is gone
            raise ClosedError(f"the peer closed the connection while a frame was sent: {error}") from error
    raise DeadlineError("the peer did not take a frame in time")


def deadline_of(timeout_s: float, nbytes: int) -> float:
    return time.monotonic() + timeout_s + nbytes / _SLOWEST_BYTES_PER_S
