"""Frames: what travels over a connection, with every limit checked before memory is allocated.

One frame is a 28-byte prefix (little endian), a msgspec header and the tensors' payloads back to back:

    magic u16 | version u8 | operation u8 | kind u8 | flags u8 | header length u16 | sequence u32 | payload length u64 | xxh3-64

The checksum covers everything but itself. Headers are array-encoded structs, one type per operation and direction; a frame
that fails any check raises FrameError, after which the connection is of no more use.
"""

from __future__ import annotations

import enum
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

import msgspec
import numpy as np
import xxhash

from semgap.codecs import Encoded
from semgap.tensors import DType, TensorClass, nbytes_of

MAGIC = 0x6753
VERSION = 1
PREFIX_BYTES = 28
_PREFIX = struct.Struct("<HBBBBHIQ")
_DIGEST = struct.Struct("<Q")
_RECEIVE_CHUNK_BYTES = 1 << 19  # hashed while it is still in a core's own cache
_SPIN_NS = 50_000  # about what falling asleep in a read and being woken costs; a reply that is near comes sooner
_GATHER = 512  # buffers a sendmsg call, half of Linux's IOV_MAX
_SLOWEST_BYTES_PER_S = 1 << 20  # a frame's deadline grows with its length, at 1 MiB/s
_NOTHING = memoryview(b"")


class Operation(enum.IntEnum):
    """What a frame asks for. Numbers never change meaning."""

    HELLO = 1
    OFFER_WEIGHTS = 2
    PUT_WEIGHTS = 3
    FORWARD = 4
    DECODE_WINDOW = 5
    CANCEL = 6
    EVICT = 7
    RELEASE = 8
    GET_NETWORK_COUNTERS = 9
    TELEMETRY = 10
    PING = 11
    SHUTDOWN = 12
    RESTORE = 13
    FLUSH = 14
    ATTACH = 15
    OPEN_KV = 16  # from here on of a worker to a KV host
    PUT_KV_BLOCKS = 17
    FETCH_MISSING_KV_LAYERS = 18
    DROP_KV = 19


class Kind(enum.IntEnum):
    """Why a frame crossed: outside the measured steps, in one, or to save and restore KV blocks."""

    SETUP = 0
    REGULAR = 1
    DELTA = 2


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


Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]
U32 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class TensorHeader(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """One tensor of a frame: shape and dtype as they are before the codec, nbytes as they cross after it."""

    cls: TensorClass
    codec: Annotated[int, msgspec.Meta(ge=0, le=255)]
    dtype: DType
    shape: Annotated[tuple[Size, ...], msgspec.Meta(max_length=8)]
    nbytes: Size

    @property
    def tensor_bytes(self) -> int:
        """Bytes before the codec."""
        return nbytes_of(self.dtype, self.shape)


class Header(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """What every header starts with: the tensors whose payloads follow, in order."""

    tensors: tuple[TensorHeader, ...] = ()


class ErrorHeader(Header, frozen=True):
    code: str = ""
    message: str = ""


class Hello(Header, frozen=True):
    """One of the four steps of the handshake (see link.py); `body` is JSON of the session asked for or granted."""

    step: int = 0
    versions: tuple[int, ...] = ()
    nonce: bytes = b""
    mac: bytes = b""
    body: bytes = b""


class WeightSpec(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    name: str
    dtype: DType
    shape: Annotated[tuple[Size, ...], msgspec.Meta(max_length=8)]


class OfferWeights(Header, frozen=True):
    """The model's weights. One tensor goes along where they are offered by hash: 16 bytes (xxh3-128) for each, in order."""

    weights: tuple[WeightSpec, ...] = ()


class WantWeights(Header, frozen=True):
    """The indices into the offer that the worker lacks."""

    indices: tuple[Size, ...] = ()


class PutWeights(Header, frozen=True):
    """Tensor i of the frame is weight `indices[i]` of the offer. Only the last frame of an upload is answered."""

    indices: tuple[Size, ...] = ()
    last: bool = False


class Forward(Header, frozen=True):
    """Tokens for `handle` (0: a new one, or none where the cache crosses too) at `position` filled KV positions.

    `request` numbers the request that a new handle serves: a worker that draws tokens keys its generator with it.
    """

    handle: U32 = 0
    position: Size = 0
    request: U32 = 0


class DecodeWindow(Header, frozen=True):
    """Decode on: feed `token` at `position` and then what is drawn, `count` steps at most. Answered by a stream of token frames.

    Positions that `handle` holds beyond `position` are dropped: they belong to a window that was cancelled or failed.
    `follows`: go on with what the window before drew last, where it left the handle; `position` and `token` say nothing then.
    """

    handle: U32 = 0
    position: Size = 0
    token: U32 = 0
    count: Size = 1
    follows: bool = False


class Tokens(Header, frozen=True):
    """A token frame has no header on the wire: its payload is token ids, u16, or u32 under Flag.WIDE."""


class Forwarded(Header, frozen=True):
    handle: U32 = 0


class Release(Header, frozen=True):
    handle: U32 = 0


class Evict(Header, frozen=True):
    """Takes the KV blocks of some layers of a handle off the device."""

    handle: U32 = 0
    layers: Annotated[tuple[U32, ...], msgspec.Meta(max_length=4096)] = ()


class Evicted(Header, frozen=True):
    """Slabs that were given back, blocks that were saved before that (the dirty ones), and their bytes before and after the codec."""

    slabs: Size = 0
    saved_blocks: Size = 0
    saved_tensor_bytes: Size = 0
    saved_payload_bytes: Size = 0


class Restore(Header, frozen=True):
    """Brings a handle's missing blocks back now, not within its next step."""

    handle: U32 = 0


class Restored(Header, frozen=True):
    """What a restore took on the worker, in ns; 0 where nothing was missing."""

    took_ns: Size = 0


class Flush(Header, frozen=True):
    """Saves a handle's dirty blocks in the KV host, and asks for the name under which another worker can open it."""

    handle: U32 = 0


KVId = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]


class Flushed(Header, frozen=True):
    kv_id: KVId = bytes(16)
    positions: Size = 0


class Attach(Header, frozen=True):
    """Opens what the KV host holds under `kv_id` as a handle here, and fences off whoever held it. Brings all its tokens along: blocks
    that were computed from others are not used.
    """

    kv_id: KVId = bytes(16)
    request: U32 = 0


class Attached(Header, frozen=True):
    """`missing_blocks` have to be fetched: all, but for those that this session held already and nobody wrote since."""

    handle: U32 = 0
    missing_blocks: Size = 0


class KVLayout(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """What the blocks of a cache are: both sides of a KV host must mean the same."""

    model: str
    dtype: DType
    layers: Size
    heads: Size
    head_dim: Size
    max_length: Size
    block: Size


class OpenKV(Header, frozen=True):
    """Opens `kv_id`. Under the `epoch` that it was opened with before, its writer goes on; under 0 the one who opens becomes its only
    writer. One that the KV host does not know is made where `new` says so.
    """

    kv_id: KVId = bytes(16)
    layout: KVLayout | None = None
    epoch: Size = 0
    new: bool = True


class KVOpened(Header, frozen=True):
    """`epoch` names the writer. Three tensors [layers, blocks]: each block's version (u32, 0: not here), positions (u32), text (i64)."""

    epoch: Size = 0


class PutKVBlocks(Header, frozen=True):
    """Tensor i of the frame is the block (layer, block) = places[i], after the tokens of which texts[i] is the digest (0: not told)."""

    kv_id: KVId = bytes(16)
    epoch: Size = 0
    places: tuple[tuple[Size, Size], ...] = ()
    texts: tuple[Annotated[int, msgspec.Meta(ge=0)], ...] = ()


class KVPut(Header, frozen=True):
    """The version that all blocks of the put have now."""

    version: Size = 0


class FetchMissing(Header, frozen=True):
    """One tensor goes along: the mask [layers, blocks], u8. Answered by a stream of KVBlocks, a layer each, in order."""

    kv_id: KVId = bytes(16)
    epoch: Size = 0


class KVBlocks(Header, frozen=True):
    """Tensor i of the frame is block `blocks[i]` of `layer`."""

    layer: Size = 0
    blocks: tuple[Size, ...] = ()


class DropKV(Header, frozen=True):
    kv_id: KVId = bytes(16)
    epoch: Size = 0


class Ping(Header, frozen=True):
    """Asks for `reply_bytes` of filler back."""

    reply_bytes: Size = 0


class TelemetryRequest(Header, frozen=True):
    """action 'start' (with interval and sources), 'stop', which brings the samples back as Parquet files, or 'clock' (of their stamps)."""

    action: str = "start"
    interval_s: float = 0.1
    sources: tuple[str, ...] = ()
    cpus: tuple[int, ...] = ()


class Bodied(Header, frozen=True):
    """A header whose `body` is JSON: reports that no step's time depends on."""

    body: bytes = b"{}"


REQUEST_HEADERS: dict[Operation, type[Header]] = {
    Operation.HELLO: Hello,
    Operation.OFFER_WEIGHTS: OfferWeights,
    Operation.PUT_WEIGHTS: PutWeights,
    Operation.FORWARD: Forward,
    Operation.DECODE_WINDOW: DecodeWindow,
    Operation.CANCEL: Header,
    Operation.RELEASE: Release,
    Operation.GET_NETWORK_COUNTERS: Header,
    Operation.TELEMETRY: TelemetryRequest,
    Operation.PING: Ping,
    Operation.SHUTDOWN: Header,
    Operation.EVICT: Evict,
    Operation.RESTORE: Restore,
    Operation.FLUSH: Flush,
    Operation.ATTACH: Attach,
    Operation.OPEN_KV: OpenKV,
    Operation.PUT_KV_BLOCKS: PutKVBlocks,
    Operation.FETCH_MISSING_KV_LAYERS: FetchMissing,
    Operation.DROP_KV: DropKV,
}
REPLY_HEADERS: dict[Operation, type[Header]] = {
    **dict.fromkeys(Operation, Header),
    Operation.HELLO: Hello,
    Operation.OFFER_WEIGHTS: WantWeights,
    Operation.FORWARD: Forwarded,
    Operation.TELEMETRY: Bodied,
    Operation.EVICT: Evicted,
    Operation.RESTORE: Restored,
    Operation.FLUSH: Flushed,
    Operation.ATTACH: Attached,
    Operation.OPEN_KV: KVOpened,
    Operation.PUT_KV_BLOCKS: KVPut,
    Operation.FETCH_MISSING_KV_LAYERS: KVBlocks,
}
_ENCODER = msgspec.msgpack.Encoder()
_DECODERS = {
    (reply, operation): msgspec.msgpack.Decoder(header)
    for reply, table in ((False, REQUEST_HEADERS), (True, REPLY_HEADERS))
    for operation, header in table.items()
}
_OPERATIONS = {operation.value: operation for operation in Operation}
_FLAGS = Flag.REPLY | Flag.ERROR | Flag.LAST | Flag.WIDE
_KINDS = {kind.value: kind for kind in Kind}
_ERROR_DECODER = msgspec.msgpack.Decoder(ErrorHeader)


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
Place = Callable[[Operation, Header], Sequence[Memory | None]]


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
    prefix = _PREFIX.pack(MAGIC, VERSION, operation, kind, flags, len(body), sequence, nbytes)
    digest = xxhash.xxh3_64(prefix)
    digest.update(body)
    for buffer in buffers:
        digest.update(buffer)
    return prefix + _DIGEST.pack(digest.intdigest()) + body


def send(sock: socket.socket, start: bytes, buffers: Sequence[memoryview], timeout_s: float) -> None:
    """Gathers and sends a whole frame; DeadlineError when the peer does not drain it in time."""
    pending = [memoryview(start), *[buffer for buffer in buffers if buffer.nbytes]]
    deadline = _deadline(timeout_s, sum([buffer.nbytes for buffer in pending]))
    first = 0  # pending[:first] has gone
    while first < len(pending):
        sent = _send_some(sock, pending[first : first + _GATHER], deadline)
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


class Receiver:
    """Reads frames from a socket into memory that was there before: a staging buffer, an arena, or what `place` gives.

    The socket has a short SO_RCVTIMEO (see link.py), so that a blocked read comes back to look at its deadline.
    """

    def __init__(self, sock: socket.socket, limits: Limits) -> None:
        self.limits = limits
        self._sock = sock
        self._staging = memoryview(bytearray(PREFIX_BYTES + 65_535))
        self._have = 0
        self._arena = memoryview(np.empty(1 << 16, dtype=np.uint8))

    def receive(self, idle_s: float, timeout_s: float, place: Place | None = None) -> Frame:
        """The next frame; it must begin within `idle_s` and then be whole within `timeout_s` plus its length at 1 MiB/s.

        `place(operation, header)` may give memory for each tensor's payload; None for one means the arena.
        """
        if self._have == 0 and not self._spin():
            self._fill(1, time.monotonic() + idle_s)
        try:
            return self._rest_of_frame(timeout_s, place)
        except ClosedError as error:
            raise FrameError("truncated", "the connection ended in the middle of a frame") from error

    def _rest_of_frame(self, timeout_s: float, place: Place | None) -> Frame:
        if self._have < PREFIX_BYTES:
            self._fill(PREFIX_BYTES, time.monotonic() + timeout_s)
        operation, kind, flags, header_length, sequence, payload_bytes, expected = self._check_prefix()
        deadline = _deadline(timeout_s, payload_bytes)
        start = PREFIX_BYTES + header_length
        if self._have < start:
            self._fill(start, deadline)
        body = self._staging[PREFIX_BYTES:start]
        digest = xxhash.xxh3_64(self._staging[: _PREFIX.size])
        digest.update(body)
        header = _decode_header(operation, flags, body, payload_bytes)
        self._check_tensors(header.tensors, payload_bytes)
        memories = self._destinations(operation, header, place)
        self._drop(start)
        for memory in memories:
            if isinstance(memory, list):
                self._read_pieces(memory, digest, deadline)
            elif isinstance(memory, memoryview):
                self._read_payload(memory, digest, deadline)
            else:
                self._read_through(memory, digest, deadline)
        if digest.intdigest() != expected:
            raise FrameError("checksum", f"checksum of a {operation.name.lower()} frame does not match its bytes")
        payloads = tuple([memory if isinstance(memory, memoryview) else _NOTHING for memory in memories])
        return Frame(operation, kind, flags, sequence, header, payloads, start, payload_bytes)

    def has_input(self) -> bool:
        """Bytes are there to be read, or the end of the connection."""
        return self._have > 0 or bool(select.select([self._sock], [], [], 0)[0])

    def _check_prefix(self) -> tuple[Operation, Kind, int, int, int, int, int]:
        magic, version, op, kind, flags, header_length, sequence, payload_bytes = _PREFIX.unpack_from(self._staging)
        if magic != MAGIC:
            raise FrameError("magic", f"not a semgap frame: magic {magic:#06x}, expected {MAGIC:#06x}")
        if version != VERSION:
            raise FrameError("version", f"peer speaks wire version {version}, this side {VERSION}; install the same semgap")
        if op not in _OPERATIONS:
            raise FrameError("operation", f"operation {op} is not known")
        if kind not in _KINDS or flags & ~_FLAGS:
            raise FrameError("flags", f"kind {kind} with flags {flags} is not known")
        if header_length > self.limits.header_bytes:
            raise FrameError("header_limit", f"header of {header_length} bytes is over the limit {self.limits.header_bytes}")
        if payload_bytes > self.limits.payload_bytes:
            raise FrameError("payload_limit", f"payload of {payload_bytes} bytes is over the limit {self.limits.payload_bytes}")
        (digest,) = _DIGEST.unpack_from(self._staging, _PREFIX.size)
        return _OPERATIONS[op], _KINDS[kind], flags, header_length, sequence, payload_bytes, digest

    def _check_tensors(self, tensors: Sequence[TensorHeader], payload_bytes: int) -> None:
        if len(tensors) > self.limits.buffers:
            raise FrameError("buffers", f"{len(tensors)} tensors in a frame, over the limit {self.limits.buffers}")
        announced = 0
        for tensor in tensors:
            nbytes, tensor_bytes = tensor.nbytes, tensor.tensor_bytes
            if tensor_bytes > self.limits.payload_bytes:
                limit = self.limits.payload_bytes
                raise FrameError("payload_limit", f"a tensor {tensor.shape} of {tensor_bytes} bytes is over the limit {limit}")
            if tensor.codec == 0 and nbytes != tensor_bytes:
                raise FrameError("length", f"{nbytes} raw bytes for {tensor.dtype.name} {tensor.shape}")
            announced += nbytes
        if announced != payload_bytes:
            raise FrameError("length", f"payload of {payload_bytes} bytes is not the sum of its tensors, {announced}")

    def _destinations(self, operation: Operation, header: Header, place: Place | None) -> tuple[Memory, ...]:
        """Memory for each tensor's payload. Raw tensors in the arena begin at multiples of their item size."""
        tensors = header.tensors
        if not tensors:
            return ()
        given = place(operation, header) if place else [None] * len(tensors)
        in_arena = sum([_padded(t.nbytes) for t, memory in zip(tensors, given, strict=True) if memory is None])
        if in_arena > self._arena.nbytes:
            self._arena = memoryview(np.empty(in_arena, dtype=np.uint8))
        memories, used = [], 0
        for tensor, memory in zip(tensors, given, strict=True):
            if memory is None:
                memory = self._arena[used : used + tensor.nbytes]
                used += _padded(tensor.nbytes)
            elif _nbytes(memory) != tensor.nbytes:
                raise FrameError("length", f"{tensor.nbytes} bytes for a tensor of {_nbytes(memory)}")
            memories.append(memory)
        return tuple(memories)

    def _read_payload(self, payload: memoryview, digest: xxhash.xxh3_64, deadline: float) -> None:
        done = min(self._have, payload.nbytes)
        payload[:done] = self._staging[:done]
        digest.update(payload[:done])
        self._drop(done)
        while done < payload.nbytes:
            chunk = payload[done : done + _RECEIVE_CHUNK_BYTES]
            got = self._read(chunk, deadline, socket.MSG_WAITALL)
            digest.update(chunk[:got])
            done += got

    def _read_through(self, sink: Sink, digest: xxhash.xxh3_64, deadline: float) -> None:
        left = sink.nbytes
        while left:
            window = sink.window()[:_RECEIVE_CHUNK_BYTES]
            if self._have:
                got = min(self._have, window.nbytes)
                window[:got] = self._staging[:got]
                self._drop(got)
            else:
                got = self._read(window, deadline, socket.MSG_WAITALL)
            digest.update(window[:got])
            sink.took(got)
            left -= got

    def _read_pieces(self, pieces: Sequence[memoryview], digest: xxhash.xxh3_64, deadline: float) -> None:
        """Reads a payload into several buffers, as many to a call as make up about a chunk."""
        pending = list(pieces)
        while pending and self._have:
            done = min(self._have, pending[0].nbytes)
            pending[0][:done] = self._staging[:done]
            digest.update(self._staging[:done])
            self._drop(done)
            pending = [pending[0][done:], *pending[1:]] if done < pending[0].nbytes else pending[1:]
        first = 0  # pending[:first] is full
        while first < len(pending):
            chunk, size = [], 0
            for piece in pending[first : first + _GATHER]:
                chunk.append(piece)
                size += piece.nbytes
                if size >= _RECEIVE_CHUNK_BYTES:
                    break
            got = self._read_into(chunk, deadline)
            for piece in chunk:
                taken = min(got, piece.nbytes)
                digest.update(piece[:taken])
                got -= taken
                if taken < piece.nbytes:
                    pending[first] = piece[taken:]
                    break
                first += 1

    def _spin(self) -> bool:
        """Looks for the first bytes of a frame without sleeping, for as long as a sleep and its wake-up would take anyway."""
        until = time.perf_counter_ns() + _SPIN_NS
        while time.perf_counter_ns() < until:
            try:
                self._have = self._sock.recv_into(self._staging, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError:
                return False  # the read that waits says what is wrong
            return self._have > 0
        return False

    def _fill(self, wanted: int, deadline: float) -> None:
        """Reads until the staging buffer holds `wanted` bytes; it may take bytes of what follows as well."""
        while self._have < wanted:
            self._have += self._read(self._staging[self._have :], deadline)

    def _drop(self, count: int) -> None:
        left = self._have - count
        if left:
            self._staging[:left] = bytes(self._staging[count : self._have])
        self._have = left

    def _read(self, into: memoryview, deadline: float, flags: int = 0) -> int:
        return self._received(lambda: self._sock.recv_into(into, 0, flags), deadline)

    def _read_into(self, pieces: Sequence[memoryview], deadline: float) -> int:
        return self._received(lambda: self._sock.recvmsg_into(pieces, 0, socket.MSG_WAITALL)[0], deadline)

    def _received(self, receive: Callable[[], int], deadline: float) -> int:
        """Bytes that one call of `receive` brought, which is called again for as long as it brings none."""
        while True:
            try:
                got = receive()
            except BlockingIOError:
                got = -1
            except OSError as error:  # also what keepalive and TCP_USER_TIMEOUT make of a peer that is gone
                raise ClosedError(f"the connection is gone: {error}") from error
            if got == 0:
                raise ClosedError("the peer closed the connection")
            if time.monotonic() > deadline:
                raise DeadlineError("the peer sent no whole frame in time")
            if got > 0:
                return got


def _decode_header(operation: Operation, flags: int, body: memoryview, payload_bytes: int) -> Header:
    try:
        if flags & Flag.ERROR:
            return _ERROR_DECODER.decode(body)
        if flags & Flag.REPLY and operation is Operation.DECODE_WINDOW:
            return _token_header(flags, body, payload_bytes)
        decoder = _DECODERS[bool(flags & Flag.REPLY), operation]
        return Header() if not body and decoder.type is Header else decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise FrameError("header", f"header of {operation.name.lower()} does not decode: {error}") from error


def _token_header(flags: int, body: memoryview, payload_bytes: int) -> Tokens:
    dtype = DType.U32 if flags & Flag.WIDE else DType.U16
    if body or payload_bytes % dtype.itemsize:
        raise FrameError("length", f"a token frame with a header of {len(body)} bytes and a payload of {payload_bytes}")
    return Tokens((TensorHeader(TensorClass.TOKENS, 0, dtype, (payload_bytes // dtype.itemsize,), payload_bytes),))


def _nbytes(memory: Memory) -> int:
    return sum([piece.nbytes for piece in memory]) if isinstance(memory, list) else memory.nbytes


def _padded(nbytes: int) -> int:
    return (nbytes + 63) & ~63


def _deadline(timeout_s: float, nbytes: int) -> float:
    return time.monotonic() + timeout_s + nbytes / _SLOWEST_BYTES_PER_S
