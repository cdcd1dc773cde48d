"""A connection: requests, answers and streams of frames, counted in a ledger. Blocking TCP, for one sending and one receiving thread."""

from __future__ import annotations

import functools
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from semgap import codecs
from semgap.tensors import DType, Tensor, TensorClass
from semgap.wire import frames, messages, receive
from semgap.wire.frames import Coded, Flag, Frame, FrameError, Limits, WireError
from semgap.wire.ledger import Direction, Ledger
from semgap.wire.messages import Header, Kind, Operation
from semgap.wire.tcp import Timeouts, parse_address, prepare, unacknowledged_bytes

if TYPE_CHECKING:
    from semgap.wire.tls import TlsStream  # most links need no ssl

_MAX_PING_BYTES = 1 << 28


class Refused(Coded, ValueError):
    """The serving side cannot do a request; the connection goes on. `code` is stable and travels in error frames."""


class RemoteError(Coded, WireError):
    """The worker refused a request; `code` says why, the message is the worker's, `sequence` is the request's (0: of none)."""

    def __init__(self, code: str, message: str, sequence: int = 0) -> None:
        super().__init__(code, message)
        self.sequence = sequence


@dataclass(frozen=True, slots=True)
class _Packed:
    """A frame ready to send: its first bytes, checksum included, and the payload's buffers."""

    operation: Operation
    kind: Kind
    header: Header
    tensors: Sequence[codecs.Encoded]
    start: bytes
    buffers: Sequence[memoryview]


class Link:
    """One connection with its ledger; `sending` is this side's direction (a client's is UP)."""

    def __init__(self, sock: socket.socket, sending: Direction, timeouts: Timeouts | None = None) -> None:
        self.sock = sock
        self.sending = sending
        self.receiving = sending.opposite
        self.ledger = Ledger()
        self.timeouts = timeouts or Timeouts()
        self._tls: TlsStream | None = None
        self._receiver = receive.Receiver(sock, frames.UNAUTHENTICATED)
        self._sequence = 0
        self._packed_frames = 0  # of this side's direction
        self._is_sending = False  # stays True after a frame that was not sent whole
        prepare(sock, self.timeouts)

    def secure(self, stream: TlsStream) -> None:
        """From its first frame on, all goes through TLS."""
        self._tls = stream
        self._receiver = receive.Receiver(stream, self.limits)

    @property
    def tls(self) -> str | None:
        """TLS's version and cipher suite; None without TLS."""
        return self._tls.cipher if self._tls else None

    @property
    def limits(self) -> Limits:
        return self._receiver.limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self._receiver.limits = limits

    def request(
        self,
        operation: Operation,
        header: Header | None = None,
        tensors: Sequence[codecs.Encoded] = (),
        kind: Kind = Kind.SETUP,
        destinations: frames.Destinations | None = None,
    ) -> Frame:
        """Client: sends a request and waits for its answer. RemoteError if the worker refuses it."""
        self.post(operation, header, tensors, kind)
        return self.await_reply(operation, kind, destinations)

    def await_reply(self, operation: Operation, kind: Kind = Kind.SETUP, destinations: frames.Destinations | None = None) -> Frame:
        """Client: waits for the answer to the last request; counts a round trip."""
        self.ledger.count_round_trip(self.sending, operation, kind)
        reply = self._receive(destinations)
        _raise_refusal(reply)
        if reply.operation is not operation or reply.sequence != self._sequence or not reply.flags & Flag.REPLY:
            raise FrameError("sequence", f"answer {reply.operation.name} {reply.sequence} to {operation.name} {self._sequence}")
        return reply

    def post(
        self, operation: Operation, header: Header | None = None, tensors: Sequence[codecs.Encoded] = (), kind: Kind = Kind.SETUP
    ) -> int:
        """Client: sends a request without waiting; gives its sequence number. RemoteError if the worker refuses it before it is whole."""
        self._sequence = _after(self._sequence)
        self._post(self._pack(operation, kind, 0, header or Header(), tensors, self._sequence))
        return self._sequence

    def interject(self, operation: Operation) -> None:
        """Client: sends a request that has no answer while another thread receives, which hears the worker's last word. WireError."""
        self._sequence = _after(self._sequence)
        self._send(self._pack(operation, Kind.SETUP, 0, Header(), (), self._sequence))

    def post_all(self, operation: Operation, requests: Iterable[tuple[Header, Sequence[codecs.Encoded]]], kind: Kind = Kind.SETUP) -> None:
        """Client: sends requests; the worker answers the last one only. Raises as `post`.

        While one request is on its way, a thread prepares the next: takes it from `requests`, which may encode it, and checksums it.
        """
        packed = self._packed(operation, requests, kind)
        with ThreadPoolExecutor(1, "pack") as ahead:
            coming = ahead.submit(next, packed, None)
            while (frame := coming.result()) is not None:
                coming = ahead.submit(next, packed, None)
                self._post(frame)

    def _packed(self, operation: Operation, requests: Iterable[tuple[Header, Sequence[codecs.Encoded]]], kind: Kind) -> Iterator[_Packed]:
        for header, tensors in requests:
            self._sequence = _after(self._sequence)
            yield self._pack(operation, kind, 0, header, tensors, self._sequence)

    def _post(self, frame: _Packed) -> None:
        try:
            self._send(frame)
        except frames.ClosedError:
            self.raise_last_word()
            raise

    def next_request(self, destinations: frames.Destinations | None = None) -> Frame:
        """Worker: the next request, which must follow the last one in sequence."""
        frame = self._receive(destinations)
        expected = _after(self._sequence)
        if frame.flags or frame.sequence != expected:
            raise FrameError("sequence", f"request {frame.sequence} with flags {frame.flags}, expected {expected}")
        self._sequence = expected
        return frame

    def reply(self, request: Frame, header: Header | None = None, tensors: Sequence[codecs.Encoded] = (), flags: int = 0) -> None:
        """Worker: answers a request, in its kind. `flags` is Flag.LAST for the last of several answers."""
        self._send(self._pack(request.operation, request.kind, Flag.REPLY | flags, header or Header(), tensors, request.sequence))

    def stream(self, request: Frame, tokens: Sequence[int], wide: bool, last: bool) -> None:
        """Worker: sends one frame of a stream of tokens that answers a request."""
        dtype = DType.U32 if wide else DType.U16
        ids = Tensor.from_numpy(np.array(tokens, dtype=dtype.numpy), TensorClass.TOKENS)
        flags = Flag.REPLY | (Flag.WIDE if wide else 0) | (Flag.LAST if last else 0)
        self._send(self._pack(request.operation, request.kind, flags, messages.Tokens(), [codecs.encode(ids, "raw")], request.sequence))

    def receive_stream(self, operation: Operation, sequence: int, destinations: frames.Destinations | None = None) -> Frame:
        """Client: the next frame of the stream that answers request `sequence`. RemoteError if the worker gave up."""
        frame = self._receive(destinations)
        _raise_refusal(frame)
        if frame.operation is not operation or frame.sequence != sequence:
            raise FrameError("sequence", f"{frame.operation.name} {frame.sequence} in a stream of {operation.name} {sequence}")
        return frame

    def receive_any(self, operation: Operation) -> Frame:
        """Client: the next answer to any of its requests of `operation`, as of a stream that answers several. RemoteError for a refusal."""
        frame = self._receive(None)
        _raise_refusal(frame)
        if frame.operation is not operation or not frame.flags & Flag.REPLY:
            raise FrameError("sequence", f"{frame.operation.name} {frame.sequence} came where an answer to {operation.name} was expected")
        return frame

    def has_input(self) -> bool:
        """True if a frame has begun to arrive or the peer is gone: the next receive does not wait for a first byte."""
        return self._receiver.has_input()

    def reply_error(self, request: Frame | None, code: str, message: str) -> None:
        """Worker: refuses a request, or says why the connection ends."""
        operation, kind = (request.operation, request.kind) if request else (Operation.HELLO, Kind.SETUP)
        sequence = request.sequence if request else self._sequence
        self._send(self._pack(operation, kind, Flag.REPLY | Flag.ERROR, messages.ErrorHeader((), code, message[:4000]), (), sequence))

    def decode(self, frame: Frame, index: int) -> Tensor:
        """Tensor `index` of a received frame, decoded; counts the time. It may alias receive memory."""
        head = frame.header.tensors[index]
        try:
            tensor, took = codecs.decode(head.codec, head.cls, head.dtype, head.shape, frame.payloads[index])
        except codecs.CodecError as error:
            raise FrameError("payload", str(error)) from error
        self.ledger.count_codec(self.receiving, frame.operation, frame.kind, head.cls, decode_ns=took)
        return tensor

    def drain(self, timeout_s: float = 30.0) -> None:
        """Waits until the peer's kernel has acknowledged all sent bytes; until then TCP_INFO lags by megabytes."""
        deadline = time.monotonic() + timeout_s
        while unacknowledged_bytes(self.sock):
            if time.monotonic() > deadline:
                raise frames.DeadlineError(f"the peer did not acknowledge all bytes within {timeout_s} s")
            time.sleep(0.0005)

    def close(self) -> None:
        self.sock.close()

    def _pack(
        self, operation: Operation, kind: Kind, flags: int, header: Header, tensors: Sequence[codecs.Encoded], sequence: int
    ) -> _Packed:
        """This side's next frame. All packed frames must be sent, in this order."""
        if tensors:
            header = msgspec.structs.replace(header, tensors=frames.tensor_headers(tensors))
        buffers = [buffer for tensor in tensors for buffer in tensor.buffers]
        start = frames.pack(operation, kind, flags, sequence, header, buffers, self._packed_frames + 1)
        self._packed_frames += 1
        return _Packed(operation, kind, header, tensors, start, buffers)

    def _send(self, frame: _Packed) -> None:
        if self._is_sending:
            raise frames.ClosedError("a frame was not sent whole, so that no other can follow it")
        tensors, self._is_sending = frame.header.tensors, True
        frames.send(self._tls or self.sock, frame.start, frame.buffers, self.timeouts.frame_s)
        self._is_sending = False
        added = self._tls.added_by_sending(len(frame.start) + sum([tensor.nbytes for tensor in tensors])) if self._tls else 0
        self.ledger.count_frame(self.sending, frame.operation, frame.kind, tensors, len(frame.start), added)
        for tensor in frame.tensors:
            if tensor.encode_ns:
                self.ledger.count_codec(self.sending, frame.operation, frame.kind, tensor.cls, encode_ns=tensor.encode_ns)

    def raise_last_word(self) -> None:
        """Raises the worker's refusal, if it sent one before it closed the connection."""
        try:
            reply = self._receiver.receive(1.0, 1.0)
        except WireError:
            return
        _raise_refusal(reply)

    def _receive(self, destinations: frames.Destinations | None) -> Frame:
        frame = self._receiver.receive(self.timeouts.idle_s, self.timeouts.frame_s, destinations)
        added = self._tls.added_by_receiving(frame.header_bytes + frame.payload_bytes) if self._tls else 0
        self.ledger.count_frame(self.receiving, frame.operation, frame.kind, frame.header.tensors, frame.header_bytes, added)
        return frame


def _after(sequence: int) -> int:
    return (sequence + 1) & 0xFFFFFFFF


def control(data: bytes | memoryview) -> codecs.Encoded:
    """Bytes that are not a tensor of the model, encoded for the wire."""
    return codecs.encode(Tensor(TensorClass.CONTROL, DType.U8, (len(data),), memoryview(data)), "raw")


def ping_ns(link: Link, up_bytes: int, down_bytes: int) -> int:
    """Client: the time of one round trip with `up_bytes` of filler up and `down_bytes` down. Refused above a limit."""
    _require_pingable(max(up_bytes, down_bytes))
    filler = [control(_filler(up_bytes))] if up_bytes else []
    begin_ns = time.perf_counter_ns()
    link.request(Operation.PING, messages.Ping((), down_bytes), filler)
    return time.perf_counter_ns() - begin_ns


def _require_pingable(nbytes: int) -> None:
    if nbytes > _MAX_PING_BYTES:
        raise Refused("ping", f"ping for {nbytes} bytes is over the limit {_MAX_PING_BYTES}")


def answer_ping(link: Link, request: Frame) -> None:
    """Answers with the requested bytes of filler. Refused above a limit."""
    nbytes = request.header_as(messages.Ping).reply_bytes
    _require_pingable(nbytes)
    link.reply(request, None, [control(_filler(nbytes))] if nbytes else [])


@functools.lru_cache(maxsize=2)
def _filler(nbytes: int) -> bytes:
    """Zeros, in the same memory each time: touching new memory would count as the link's time."""
    return bytes(nbytes)


def connect(address: str, timeouts: Timeouts | None = None, connect_s: float = 10.0, command: str = "serve") -> Link:
    """A link to HOST:PORT, not yet authenticated. ClosedError names the address and `command`, the semgap command to start there."""
    host, port = parse_address(address)
    try:
        sock = socket.create_connection((host, port), timeout=connect_s)
    except OSError as error:
        role = {"serve": "worker", "kvhost": "KV host"}[command]
        raise frames.ClosedError(f"no {role} answers at {address}: {error}; start one with `semgap {command}`") from error
    sock.settimeout(None)
    return Link(sock, Direction.UP, timeouts)


def _raise_refusal(reply: Frame) -> None:
    """RemoteError if `reply` is an error frame."""
    if reply.flags & Flag.ERROR:
        refusal = reply.header_as(messages.ErrorHeader)
        raise RemoteError(refusal.code, refusal.message, reply.sequence)
