"""A connection: handshake, deadlines, calls, and the kernel's own counters. Blocking TCP, one thread."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import hmac
import os
import secrets
import socket
import stat
import struct
import termios
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from semgap import codecs, wire
from semgap.ledger import Direction, Ledger
from semgap.tensors import DType, Tensor, TensorClass
from semgap.wire import Flag, Frame, FrameError, Header, Hello, Kind, Limits, Operation, WireError

HANDSHAKE_S = 5.0  # for each of its four frames
_WAKE_S = 0.2  # how often a blocked call looks at its deadline
_NONCE_BYTES = 32
_MAX_PING_BYTES = 1 << 28
_TCP_INFO_BYTES = 280
_TCP_INFO_FIELDS = {  # offset, format: struct tcp_info of linux/tcp.h, fixed since Linux 4.19
    "total_retrans": (100, "I"),
    "rtt_us": (68, "I"),
    "segs_out": (136, "I"),
    "segs_in": (140, "I"),
    "bytes_received": (128, "Q"),
    "bytes_sent": (200, "Q"),
    "bytes_retrans": (208, "Q"),
}
_TCPI_OPT_TIMESTAMPS = 1


class AuthError(WireError):
    """The peer does not hold the shared secret, or this side has none that works."""

    code = "auth"


class Refused(ValueError):
    """A request that the serving side cannot do; the connection goes on. `code` is stable and travels in error frames."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class RemoteError(WireError):
    """The worker refused a request; `code` says why, the message is the worker's."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Timeouts:
    """Seconds. `idle_s`: for a frame to begin; `frame_s`: for it to be whole (plus its length at 1 MiB/s)."""

    idle_s: float = 120.0
    frame_s: float = 30.0


@dataclass(frozen=True, slots=True)
class _Packed:
    """A frame that is ready to be sent: its first bytes, checksum included, and the payload's buffers."""

    operation: Operation
    kind: Kind
    header: Header
    tensors: Sequence[codecs.Encoded]
    start: bytes
    buffers: Sequence[memoryview]


class Link:
    """One connection with its ledger; `sending` is this side's direction (the client's is UP)."""

    def __init__(self, sock: socket.socket, sending: Direction, timeouts: Timeouts | None = None) -> None:
        self.sock = sock
        self.sending = sending
        self.receiving = Direction.DOWN if sending is Direction.UP else Direction.UP
        self.ledger = Ledger()
        self.timeouts = timeouts or Timeouts()
        self._receiver = wire.Receiver(sock, wire.UNAUTHENTICATED)
        self._sequence = 0
        _prepare(sock, self.timeouts)

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
        place: wire.Place | None = None,
    ) -> Frame:
        """Client: sends a request and waits for its answer. RemoteError when the worker refuses it."""
        self.post(operation, header, tensors, kind)
        return self.await_reply(operation, kind, place)

    def await_reply(self, operation: Operation, kind: Kind = Kind.SETUP, place: wire.Place | None = None) -> Frame:
        """Client: the answer to the request posted last, which makes it a round trip."""
        self.ledger.count_round_trip(self.sending, operation, kind)
        reply = self._receive(place)
        if reply.flags & Flag.ERROR:
            _raise_remote(reply.header)
        if reply.operation is not operation or reply.sequence != self._sequence or not reply.flags & Flag.REPLY:
            raise FrameError("sequence", f"answer {reply.operation.name} {reply.sequence} to {operation.name} {self._sequence}")
        return reply

    def post(
        self, operation: Operation, header: Header | None = None, tensors: Sequence[codecs.Encoded] = (), kind: Kind = Kind.SETUP
    ) -> int:
        """Client: sends a request without waiting; gives its sequence number. RemoteError when it was refused before it had come whole."""
        self._sequence = _after(self._sequence)
        self._post(_pack(operation, kind, 0, header or Header(), tensors, self._sequence))
        return self._sequence

    def post_all(self, operation: Operation, requests: Iterable[tuple[Header, Sequence[codecs.Encoded]]], kind: Kind = Kind.SETUP) -> None:
        """Client: sends requests of which the last one alone is answered. While one is on its way, a thread makes the next one ready:
        takes it from `requests`, which may encode it, and checksums it. Raises as `post`.
        """
        frames = self._packed(operation, requests, kind)
        with ThreadPoolExecutor(1, "pack") as ahead:
            coming = ahead.submit(next, frames, None)
            while (frame := coming.result()) is not None:
                coming = ahead.submit(next, frames, None)
                self._post(frame)

    def _packed(self, operation: Operation, requests: Iterable[tuple[Header, Sequence[codecs.Encoded]]], kind: Kind) -> Iterator[_Packed]:
        for header, tensors in requests:
            self._sequence = _after(self._sequence)
            yield _pack(operation, kind, 0, header, tensors, self._sequence)

    def _post(self, frame: _Packed) -> None:
        try:
            self._send_packed(frame)
        except wire.ClosedError:
            self._raise_last_word()
            raise

    def next_request(self, place: wire.Place | None = None) -> Frame:
        """Worker: the next request, which must follow the last one in sequence."""
        frame = self._receive(place)
        expected = _after(self._sequence)
        if frame.flags or frame.sequence != expected:
            raise FrameError("sequence", f"request {frame.sequence} with flags {frame.flags}, expected {expected}")
        self._sequence = expected
        return frame

    def reply(self, request: Frame, header: Header | None = None, tensors: Sequence[codecs.Encoded] = (), flags: int = 0) -> None:
        """Worker: answers a request, in its kind. One that is answered by several frames has Flag.LAST in the last one's `flags`."""
        self._send(request.operation, request.kind, Flag.REPLY | flags, header or Header(), tensors, request.sequence)

    def stream(self, request: Frame, tokens: Sequence[int], wide: bool, last: bool) -> None:
        """Worker: sends tokens in answer to a request that is answered by more than one frame."""
        dtype = DType.U32 if wide else DType.U16
        ids = Tensor.from_numpy(np.array(tokens, dtype=dtype.numpy), TensorClass.TOKENS)
        flags = Flag.REPLY | (Flag.WIDE if wide else 0) | (Flag.LAST if last else 0)
        self._send(request.operation, request.kind, flags, wire.Tokens(), [codecs.encode(ids, "raw")], request.sequence)

    def receive_stream(self, operation: Operation, sequence: int, place: wire.Place | None = None) -> Frame:
        """Client: the next frame of the stream that answers request `sequence`. RemoteError when the worker gave up."""
        frame = self._receive(place)
        if frame.flags & Flag.ERROR:
            _raise_remote(frame.header)
        if frame.operation is not operation or frame.sequence != sequence:
            raise FrameError("sequence", f"{frame.operation.name} {frame.sequence} in a stream of {operation.name} {sequence}")
        return frame

    def has_input(self) -> bool:
        """A frame has begun to arrive, or the peer is gone: the next receive will not wait for it to begin."""
        return self._receiver.has_input()

    def reply_error(self, request: Frame | None, code: str, message: str) -> None:
        """Worker: refuses a request, or says why the connection is about to end."""
        operation, kind = (request.operation, request.kind) if request else (Operation.HELLO, Kind.SETUP)
        sequence = request.sequence if request else self._sequence
        self._send(operation, kind, Flag.REPLY | Flag.ERROR, wire.ErrorHeader((), code, message[:4000]), (), sequence)

    def decode(self, frame: Frame, index: int) -> Tensor:
        """Tensor `index` of a received frame, decoded, its time counted. It may alias receive memory."""
        head = frame.header.tensors[index]
        try:
            tensor, took = codecs.decode(head.codec, head.cls, head.dtype, head.shape, frame.payloads[index])
        except codecs.CodecError as error:
            raise FrameError("payload", str(error)) from error
        self.ledger.count_codec(self.receiving, frame.operation, frame.kind, head.cls, decode_ns=took)
        return tensor

    def drain(self, timeout_s: float = 30.0) -> None:
        """Waits until the peer's kernel has acknowledged all that was sent; until then TCP_INFO lags by megabytes."""
        deadline = time.monotonic() + timeout_s
        while _unacknowledged_bytes(self.sock):
            if time.monotonic() > deadline:
                raise wire.DeadlineError(f"the peer did not acknowledge all bytes within {timeout_s} s")
            time.sleep(0.0005)

    def close(self) -> None:
        self.sock.close()

    def _send(self, operation: Operation, kind: Kind, flags: int, header: Header, tensors: Sequence[codecs.Encoded], sequence: int) -> None:
        self._send_packed(_pack(operation, kind, flags, header, tensors, sequence))

    def _send_packed(self, frame: _Packed) -> None:
        wire.send(self.sock, frame.start, frame.buffers, self.timeouts.frame_s)
        self.ledger.count_frame(self.sending, frame.operation, frame.kind, frame.header.tensors, len(frame.start))
        for tensor in frame.tensors:
            if tensor.encode_ns:
                self.ledger.count_codec(self.sending, frame.operation, frame.kind, tensor.cls, encode_ns=tensor.encode_ns)

    def _raise_last_word(self) -> None:
        """Raises what the worker said before it closed the connection, if it said anything."""
        try:
            reply = self._receiver.receive(1.0, 1.0)
        except WireError:
            return
        if reply.flags & Flag.ERROR:
            _raise_remote(reply.header)

    def _receive(self, place: wire.Place | None) -> Frame:
        frame = self._receiver.receive(self.timeouts.idle_s, self.timeouts.frame_s, place)
        self.ledger.count_frame(self.receiving, frame.operation, frame.kind, frame.header.tensors, frame.header_bytes)
        return frame


def _pack(operation: Operation, kind: Kind, flags: int, header: Header, tensors: Sequence[codecs.Encoded], sequence: int) -> _Packed:
    if tensors:
        header = msgspec.structs.replace(header, tensors=wire.describe(tensors))
    buffers = [buffer for tensor in tensors for buffer in tensor.buffers]
    return _Packed(operation, kind, header, tensors, wire.pack(operation, kind, flags, sequence, header, buffers), buffers)


def _after(sequence: int) -> int:
    """The sequence number that follows."""
    return (sequence + 1) & 0xFFFFFFFF


def control(data: bytes | memoryview) -> codecs.Encoded:
    """Bytes that are no tensor of the model, as they cross."""
    return codecs.encode(Tensor(TensorClass.CONTROL, DType.U8, (len(data),), memoryview(data)), "raw")


def answer_ping(link: Link, request: Frame) -> None:
    """Answers with as many bytes of filler as were asked for. Refused for more than is ever needed."""
    header = request.header
    assert isinstance(header, wire.Ping)
    if header.reply_bytes > _MAX_PING_BYTES:
        raise Refused("ping", f"{header.reply_bytes} bytes asked for, more than {_MAX_PING_BYTES}")
    link.reply(request, None, [control(_filler(header.reply_bytes))] if header.reply_bytes else [])


@functools.lru_cache(maxsize=1)
def _filler(nbytes: int) -> bytes:
    """Zeros, which are the same ones when asked for again: touching new memory would count as the link's time."""
    return bytes(nbytes)


def connect(address: str, timeouts: Timeouts | None = None, connect_s: float = 10.0, command: str = "serve") -> Link:
    """A link to the worker at HOST:PORT, not yet authenticated. ClosedError names the address that does not answer, and what
    `command` of semgap would have there.
    """
    host, port = parse_address(address)
    try:
        sock = socket.create_connection((host, port), timeout=connect_s)
    except OSError as error:
        role = {"serve": "worker", "kvhost": "KV host"}[command]
        raise wire.ClosedError(f"no {role} answers at {address}: {error}; start one with `semgap {command}`") from error
    sock.settimeout(None)
    return Link(sock, Direction.UP, timeouts)


def parse_address(address: str) -> tuple[str, int]:
    """('host', port) of 'host:port' or '[v6]:port'; ValueError for anything else."""
    host, colon, port = address.rpartition(":")
    bare = not (host.startswith("[") and host.endswith("]"))
    if not colon or not host or (bare and ":" in host) or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise ValueError(f"address {address!r} is not HOST:PORT, e.g. 127.0.0.1:5005")
    return host.strip("[]"), int(port)


def shake_hands_as_client(link: Link, secret: bytes, session: dict) -> dict:
    """Proves to each side that the other holds `secret`, asks for `session`, and gives what the worker granted.

    Four frames: nonce; nonce and the worker's proof; the client's proof and the session; what was granted. A proof is
    HMAC-SHA256 over a label, both nonces and, for the client, the session, so that none can be replayed or turned round.
    """
    ours = secrets.token_bytes(_NONCE_BYTES)
    link.limits = Limits(header_bytes=65_535, payload_bytes=0, buffers=0)
    challenge = link.request(Operation.HELLO, Hello((), 1, (wire.VERSION,), ours)).header
    assert isinstance(challenge, Hello)
    if not hmac.compare_digest(challenge.mac, _proof(secret, b"worker", ours, challenge.nonce)):
        here = (
            "give both sides the same token file" if secret else "none was given: name the same token file as the worker's (--secret-file)"
        )
        raise AuthError(f"the worker does not hold this client's secret; {here}")
    body = msgspec.json.encode(session)
    mac = _proof(secret, b"client", ours, challenge.nonce, body)
    granted = link.request(Operation.HELLO, Hello((), 3, (wire.VERSION,), b"", mac, body)).header
    assert isinstance(granted, Hello)
    return msgspec.json.decode(granted.body)


def shake_hands_as_worker(link: Link, secret: bytes, grant: Callable[[dict], dict]) -> None:
    """The worker's half; `grant` turns the session asked for into what is granted, or raises to refuse it."""
    idle, link.timeouts = link.timeouts, Timeouts(HANDSHAKE_S, HANDSHAKE_S)
    first = link.next_request()
    opening = _hello(first, 1)
    if wire.VERSION not in opening.versions:
        raise FrameError("version", f"the client speaks versions {opening.versions}, this worker {wire.VERSION}")
    if len(opening.nonce) != _NONCE_BYTES:
        raise FrameError("hello", f"a nonce of {len(opening.nonce)} bytes, expected {_NONCE_BYTES}")
    ours = secrets.token_bytes(_NONCE_BYTES)
    proof = _proof(secret, b"worker", opening.nonce, ours)
    link.reply(first, Hello((), 2, (wire.VERSION,), ours, proof))
    second = link.next_request()
    asked = _hello(second, 3)
    if not hmac.compare_digest(asked.mac, _proof(secret, b"client", opening.nonce, ours, asked.body)):
        raise AuthError("the client does not hold this worker's secret; give both sides the same token file")
    try:
        session = msgspec.json.decode(asked.body, type=dict)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FrameError("hello", f"the session asked for does not decode: {error}") from error
    link.reply(second, Hello((), 4, (wire.VERSION,), b"", b"", msgspec.json.encode(grant(session))))
    link.timeouts = idle


def write_secret(path: Path) -> None:
    """Makes a new token file, readable by its owner alone. AuthError where there is a file already."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise AuthError(f"{path} exists already and is left as it is; use it, or choose another name") from None
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))


def read_secret(path: Path | None) -> bytes:
    """The secret in a token file; no path gives the empty secret, which only loopback workers accept.

    AuthError for a file that is missing, too short, or that others can read.
    """
    if path is None:
        return b""
    path = path.expanduser()
    try:
        mode, secret = path.stat().st_mode, path.read_bytes().strip()
    except OSError as error:
        raise AuthError(f"token file {path} cannot be read: {error.strerror}; make one with `semgap secret {path}`") from error
    if stat.S_IMODE(mode) & 0o077:
        raise AuthError(f"token file {path} has mode {stat.S_IMODE(mode):04o}, so others can read it; chmod 600 {path}")
    if len(secret) < 32:
        raise AuthError(f"token file {path} holds {len(secret)} characters, fewer than 32; make one with `semgap secret {path}`")
    return secret


def tcp_info(sock: socket.socket) -> dict[str, int]:
    """The kernel's counters of a connection: bytes, segments, round trip (us), and bytes of a segment's IP and TCP headers."""
    raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    if len(raw) < 216:
        raise OSError(f"this kernel's TCP_INFO has {len(raw)} bytes and no bytes_sent; Linux 4.19 or newer is needed")
    info = {name: struct.unpack_from(form, raw, offset)[0] for name, (offset, form) in _TCP_INFO_FIELDS.items()}
    ip = 40 if sock.family == socket.AF_INET6 else 20
    return info | {"segment_header_bytes": ip + 20 + (12 if raw[5] & _TCPI_OPT_TIMESTAMPS else 0)}


def segments(sock: socket.socket) -> tuple[int, int]:
    """(sent, received) TCP segments of a connection, acknowledgements included."""
    raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    return struct.unpack_from("II", raw, _TCP_INFO_FIELDS["segs_out"][0])


def congestion_control(sock: socket.socket, wanted: str | None = None) -> str:
    """Sets the congestion control algorithm if one is wanted, and gives the one in force."""
    if wanted:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, wanted.encode())
        except OSError as error:
            raise ValueError(f"congestion control {wanted!r} is not available: {error.strerror}; see `semgap doctor`") from error
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()


def _hello(frame: Frame, step: int) -> Hello:
    if frame.operation is not Operation.HELLO or not isinstance(frame.header, Hello) or frame.header.step != step:
        raise FrameError("hello", f"{frame.operation.name.lower()} came where step {step} of the handshake was expected")
    return frame.header


def _proof(secret: bytes, label: bytes, *parts: bytes) -> bytes:
    message = b"semgap" + b"".join(len(part).to_bytes(8, "little") + part for part in (label, *parts))
    return hmac.new(secret, message, hashlib.sha256).digest()


def _raise_remote(header: Header) -> None:
    assert isinstance(header, wire.ErrorHeader)
    raise RemoteError(header.code, header.message)


def _prepare(sock: socket.socket, timeouts: Timeouts) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 5)):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * timeouts.frame_s))
    wake = struct.pack("ll", int(_WAKE_S), int(1e6 * (_WAKE_S % 1)))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wake)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wake)


def _unacknowledged_bytes(sock: socket.socket) -> int:
    return struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, b"\0\0\0\0"))[0]
