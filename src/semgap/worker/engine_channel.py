"""The messages between a session and its engine, over a Unix stream socket: each a length (u32) and MessagePack."""

from __future__ import annotations

import socket
import struct
from typing import Generic, TypeVar

import msgspec

from semgap.policy import SamplingRule
from semgap.wire.batches import EngineState
from semgap.wire.messages import Call, Gained
from semgap.wire.waiting import ready

_LENGTH = struct.Struct("<I")
_READ_BYTES = 1 << 18
_ENCODER = msgspec.msgpack.Encoder()


class Message(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """A message; its tag is its type's name."""


class Member(Message, frozen=True):
    """A session's first message: how its requests draw."""

    sampling: SamplingRule
    seed: int
    stop_tokens: tuple[int, ...]


class Calls(Message, frozen=True):
    """The calls of a client's frame, and the ids that they feed, u32 one after the other."""

    calls: tuple[Call, ...]
    ids: bytes


class AskBatches(Message, frozen=True):
    """Asks for the rows of the last steps, and the engine's state."""


class Welcome(Message, frozen=True):
    """The engine's first message."""

    pid: int
    executor_s: float
    kv_budget_bytes: int


class Stepped(Message, frozen=True):
    """The ids that a step drew for the session, those of each of `gained` one after the other."""

    gained: tuple[Gained, ...]
    ids: tuple[int, ...]


class CallRefused(Message, frozen=True):
    """A call that the engine does not take, or a request that it has given up."""

    request: int
    code: str
    message: str


class Batches(Message, frozen=True):
    """The engine's state, and rows of wire.batches.Batch in JSON."""

    state: EngineState
    rows: bytes


class Fault(Message, frozen=True):
    """The engine's last message: why it ends, or does not begin."""

    message: str


FromSession = Member | Calls | AskBatches
FromEngine = Welcome | Stepped | CallRefused | Batches | Fault
Received = TypeVar("Received")


class Gone(Exception):
    """The other end is closed."""


class Channel(Generic[Received]):
    """One end. `send` never waits for the other side: bytes that the socket does not take wait in `unsent`."""

    def __init__(self, sock: socket.socket, received: object) -> None:
        self.sock = sock
        self.unsent = bytearray()
        self._decoder: msgspec.msgpack.Decoder[Received] = msgspec.msgpack.Decoder(received)
        self._have = bytearray()
        sock.setblocking(False)

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, message: Message) -> None:
        """Sends a message, as much of it as fits now. Gone if the other end is closed."""
        data = _ENCODER.encode(message)
        self.unsent += _LENGTH.pack(len(data)) + data
        self.flush()

    def flush(self) -> None:
        """Sends what fits now. Gone if the other end is closed."""
        while self.unsent:
            try:
                sent = self.sock.send(self.unsent)
            except BlockingIOError:
                return
            except OSError as error:
                raise Gone(str(error)) from error
            del self.unsent[:sent]

    def send_whole(self, message: Message) -> None:
        """Sends a message and waits until the other side has room for all of it. Gone if the other end is closed."""
        self.send(message)
        while self.unsent:
            ready((), [self.sock])
            self.flush()

    def receive(self) -> list[Received]:
        """The messages that are whole by now, maybe none. Gone if the other end is closed and all has been received."""
        try:
            read = self.sock.recv(_READ_BYTES)
        except BlockingIOError:
            return []
        except OSError as error:
            raise Gone(str(error)) from error
        if not read:
            raise Gone("the other end is closed")
        self._have += read
        return self._whole()

    def next(self) -> list[Received]:
        """Waits for something to receive, and receives it."""
        ready([self.sock])
        return self.receive()

    def close(self) -> None:
        self.sock.close()

    def _whole(self) -> list[Received]:
        messages, begin = [], 0
        while len(self._have) >= begin + _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._have, begin)
            end = begin + _LENGTH.size + length
            if len(self._have) < end:
                break
            messages.append(self._decoder.decode(bytes(self._have[begin + _LENGTH.size : end])))
            begin = end
        del self._have[:begin]
        return messages
