"""Receiving frames: every check comes before memory is allocated or a tensor is used."""

import socket
import time
from collections.abc import Sequence

import msgspec
import numpy as np
import xxhash

from semgap.tensors import DType, TensorClass
from semgap.wire.frames import (
    DIGEST,
    GATHER,
    MAGIC,
    NOTHING,
    PREFIX,
    PREFIX_BYTES,
    TLS_MISMATCH,
    VERSION,
    ClosedError,
    DeadlineError,
    Destinations,
    Flag,
    Frame,
    FrameError,
    Limits,
    Memory,
    Sink,
    Stream,
    deadline_of,
    digest_of,
)
from semgap.wire.messages import REPLY_HEADERS, REQUEST_HEADERS, ErrorHeader, Header, Kind, Operation, TensorHeader, Tokens

_RECEIVE_CHUNK_BYTES = 1 << 19  # hashed while it is still in the core's own cache
_SPIN_NS = 50_000  # about the cost of sleeping in a read and waking; a near reply comes sooner
_DECODERS = {
    (reply, operation): msgspec.msgpack.Decoder(header)
    for reply, table in ((False, REQUEST_HEADERS), (True, REPLY_HEADERS))
    for operation, header in table.items()
}
_OPERATIONS = {operation.value: operation for operation in Operation}
_TLS_RECORD = 0x0316  # the beginning of a client's first record
_FLAGS = Flag.REPLY | Flag.ERROR | Flag.LAST | Flag.WIDE
_KINDS = {kind.value: kind for kind in Kind}
_ERROR_DECODER = msgspec.msgpack.Decoder(ErrorHeader)


class Receiver:
    """Reads frames from a socket into existing memory: a staging buffer, an arena, or the caller's `destinations`.

    The socket has a short SO_RCVTIMEO (tcp.py), so that a blocked read wakes to check its deadline.
    """

    def __init__(self, sock: Stream, limits: Limits) -> None:
        self.limits = limits
        self._sock = sock
        self._staging = memoryview(bytearray(PREFIX_BYTES + 65_535))
        self._have = 0
        self._number = 1  # of the next frame
        self._arena = memoryview(np.empty(1 << 16, dtype=np.uint8))

    def receive(self, idle_s: float, timeout_s: float, destinations: Destinations | None = None) -> Frame:
        """The next frame. It must begin within `idle_s`, then be whole within `timeout_s` plus its length at 1 MiB/s.

        `destinations` gives memory for each tensor's payload; None for one means the arena.
        """
        if self._have == 0 and not self._spin():
            self._fill(1, time.monotonic() + idle_s)
        try:
            return self._rest_of_frame(timeout_s, destinations)
        except ClosedError as error:
            raise FrameError("truncated", "the connection ended in the middle of a frame") from error

    def _rest_of_frame(self, timeout_s: float, destinations: Destinations | None) -> Frame:
        if self._have < PREFIX_BYTES:
            self._fill(PREFIX_BYTES, time.monotonic() + timeout_s)
        operation, kind, flags, header_length, sequence, payload_bytes, expected = self._check_prefix()
        deadline = deadline_of(timeout_s, payload_bytes)
        start = PREFIX_BYTES + header_length
        if self._have < start:
            self._fill(start, deadline)
        body = self._staging[PREFIX_BYTES:start]
        digest = digest_of(self._number, self._staging[: PREFIX.size])
        digest.update(body)
        header = _decode_header(operation, flags, body, payload_bytes)
        self._check_tensors(header.tensors, payload_bytes)
        memories = self._memories(operation, header, destinations)
        self._drop(start)
        for memory in memories:
            if isinstance(memory, list):
                self._read_pieces(memory, digest, deadline)
            else:
                self._read_payload(memory, digest, deadline)
        if digest.intdigest() != expected:
            name = operation.name.lower()
            raise FrameError("checksum", f"checksum of a {name} frame does not match its bytes, or its place as frame {self._number}")
        self._number += 1
        payloads = tuple([memory if isinstance(memory, memoryview) else NOTHING for memory in memories])
        return Frame(operation, kind, flags, sequence, header, payloads, start, payload_bytes)

    def has_input(self) -> bool:
        """True if a frame has begun to arrive, or the connection is at its end. Looks without waiting."""
        try:
            self._have = self._have or self._sock.recv_into(self._staging, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            pass  # the next read raises it
        return True

    def _check_prefix(self) -> tuple[Operation, Kind, int, int, int, int, int]:
        magic, version, op, kind, flags, header_length, sequence, payload_bytes = PREFIX.unpack_from(self._staging)
        if magic == _TLS_RECORD:
            raise FrameError("tls", TLS_MISMATCH)
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
        (digest,) = DIGEST.unpack_from(self._staging, PREFIX.size)
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

    def _memories(self, operation: Operation, header: Header, destinations: Destinations | None) -> tuple[Memory, ...]:
        """Memory for each tensor's payload. Raw tensors in the arena begin at multiples of their item size."""
        tensors = header.tensors
        if not tensors:
            return ()
        given = destinations(operation, header) if destinations else [None] * len(tensors)
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

    def _read_payload(self, memory: memoryview | Sink, digest: xxhash.xxh3_64, deadline: float) -> None:
        """Reads a payload into one buffer, or through a sink's windows, about one chunk a call."""
        done = 0
        while done < memory.nbytes:
            window = (memory[done:] if isinstance(memory, memoryview) else memory.window())[:_RECEIVE_CHUNK_BYTES]
            if self._have:
                got = min(self._have, window.nbytes)
                window[:got] = self._staging[:got]
                self._drop(got)
            else:
                got = self._read([window], deadline)
            digest.update(window[:got])
            if not isinstance(memory, memoryview):
                memory.took(got)
            done += got

    def _read_pieces(self, pieces: Sequence[memoryview], digest: xxhash.xxh3_64, deadline: float) -> None:
        """Reads a payload into several buffers, about one chunk a call."""
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
            for piece in pending[first : first + GATHER]:
                chunk.append(piece)
                size += piece.nbytes
                if size >= _RECEIVE_CHUNK_BYTES:
                    break
            got = self._read(chunk, deadline)
            for piece in chunk:
                taken = min(got, piece.nbytes)
                digest.update(piece[:taken])
                got -= taken
                if taken < piece.nbytes:
                    pending[first] = piece[taken:]
                    break
                first += 1

    def _spin(self) -> bool:
        """Polls for the first bytes of a frame, for as long as a sleep and its wake-up would take."""
        until = time.perf_counter_ns() + _SPIN_NS
        while time.perf_counter_ns() < until:
            try:
                self._have = self._sock.recv_into(self._staging, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError:
                return False  # the blocking read raises it
            return self._have > 0
        return False

    def _fill(self, wanted: int, deadline: float) -> None:
        """Reads until the staging buffer holds `wanted` bytes; may read further bytes too."""
        while self._have < wanted:
            self._have += self._read([self._staging[self._have :]], deadline, flags=0)

    def _drop(self, count: int) -> None:
        left = self._have - count
        if left:
            self._staging[:left] = bytes(self._staging[count : self._have])
        self._have = left

    def _read(self, pieces: Sequence[memoryview], deadline: float, flags: int = socket.MSG_WAITALL) -> int:
        """Waits for bytes; gives their number."""
        while True:
            try:
                got = self._sock.recvmsg_into(pieces, 0, flags)[0]
            except BlockingIOError:
                got = -1
            except OSError as error:  # keepalive and TCP_USER_TIMEOUT raise it too, if the peer is gone
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
