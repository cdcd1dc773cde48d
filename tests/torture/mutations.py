"""Frames that differ from recorded ones: some a receiver must refuse, others are requests of other values."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from semgap.tensors import nbytes_of
from semgap.wire import frames
from semgap.wire.messages import REQUEST_HEADERS, Header, Operation, Ping
from torture.recording import RecordedFrame, sealed

INTEGERS = (0, 1, 2, 3, 5, 63, 64, 65, 95, 96, 97, 255, 256, 511, 512, 4095, 4096, 4097, 65535, 65536, (1 << 20) - 1)
INTEGERS += (1 << 31, (1 << 32) - 1, 1 << 32, 1 << 48, (1 << 48) + 1, (1 << 63) - 1, (1 << 64) - 1, -1, -(1 << 63))
_DECODERS = {operation: msgspec.msgpack.Decoder(header) for operation, header in REQUEST_HEADERS.items()}
_NEVER = {Operation.SHUTDOWN, Operation.HELLO}
"""A client with the secret may end a worker by its own request; only these frames would do that, or are no request."""


_RARE, _RARELY_CODED = {Operation.TELEMETRY: 0.99, Operation.PUT_WEIGHTS: 0.995}, 0.9
"""How often such frames are left out: the first start processes; weights, and damaged payloads of codecs, end most sessions early."""

_LARGEST_PING_BYTES, _LARGEST_TENSOR_BYTES = 1 << 20, 1 << 30


def header_of(frame: RecordedFrame) -> Header | None:
    """The header, if it is one of the frame's operation and its tensors have the payload's length; None for a frame that nobody takes."""
    operation = Operation(frame.operation)
    try:
        header = Header() if not frame.header and REQUEST_HEADERS[operation] is Header else _DECODERS[operation].decode(frame.header)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    raw = all(head.codec or head.nbytes == nbytes_of(head.dtype, head.shape) for head in header.tensors)
    return header if raw and sum(head.nbytes for head in header.tensors) == len(frame.payload) else None


def is_request(frame: RecordedFrame) -> bool:
    """True if a receiver takes the frame, and a campaign sends it: it is none that ends a worker by right, and none that is only slow."""
    header = header_of(frame)
    if header is None or frame.flags or Operation(frame.operation) in _NEVER:
        return False
    slow = isinstance(header, Ping) and header.reply_bytes > _LARGEST_PING_BYTES
    return not slow and all(head.tensor_bytes <= _LARGEST_TENSOR_BYTES for head in header.tensors)


def request(rng: random.Random, recorded: Sequence[RecordedFrame]) -> RecordedFrame:
    """A frame that a receiver takes as a request: one or two values of a recorded frame are others. Its contents may be nonsense."""
    while True:
        frame = rng.choice(recorded)
        if rng.random() < _RARE.get(Operation(frame.operation), 0):
            continue
        other = rng.choice((_other_values, _other_values, _other_payload, _other_operation))(rng, frame, recorded)
        if other is None or not is_request(other):
            continue
        header = header_of(other)
        if header and any(head.codec for head in header.tensors) and rng.random() < _RARELY_CODED:
            continue
        return other


def _replaced(frame: RecordedFrame, **changes: Any) -> RecordedFrame:
    return RecordedFrame(
        **{name: changes.get(name, getattr(frame, name)) for name in RecordedFrame.__dataclass_fields__}  # dataclasses.replace is slower
    )


def _other_values(rng: random.Random, frame: RecordedFrame, _: Sequence[RecordedFrame]) -> RecordedFrame | None:
    """Other numbers, bytes and texts in the header."""
    if not frame.header:
        return None
    header = msgspec.msgpack.decode(frame.header)
    for _ in range(rng.choice((1, 1, 2))):
        _change_a_leaf(rng, header)
    try:
        return _replaced(frame, header=msgspec.msgpack.encode(header))
    except (OverflowError, msgspec.MsgspecError):
        return None


def _change_a_leaf(rng: random.Random, value: list[Any]) -> None:
    """Changes something in nested lists, in place. Bodies and tensors' headers are less likely than the fields of the operation."""
    at = rng.randrange(len(value)) if value else None
    if at == 0 and len(value) > 1 and rng.random() < 0.7:
        at = rng.randrange(1, len(value))
    if at is None:
        return
    each = value[at]
    if isinstance(each, list) and each and rng.random() < 0.9:
        _change_a_leaf(rng, each)
    elif isinstance(each, list):
        value[at] = each * rng.choice((0, 2, 3)) + rng.choice(([], [rng.choice(INTEGERS)]))
    elif isinstance(each, bool):
        value[at] = not each
    elif isinstance(each, int):
        value[at] = rng.choice((*INTEGERS, each + 1, each - 1, rng.randrange(8), rng.randrange(1 << 16)))
    elif isinstance(each, bytes):
        value[at] = damaged(rng, each) if each else rng.randbytes(rng.choice((1, 16, 32)))
    elif isinstance(each, str):
        value[at] = rng.choice(("", each * 2, each[:-1], "\0", "ü" * 8, "float32", "start", "x" * 200))
    elif isinstance(each, float):
        value[at] = rng.choice((0.0, -1.0, 1e-9, 1e308, float("inf"), float("nan"), 0.05))


def _other_payload(rng: random.Random, frame: RecordedFrame, _: Sequence[RecordedFrame]) -> RecordedFrame | None:
    """Other bytes in the tensors: ids, codes, weights, blocks of KV."""
    if not frame.payload:
        return None
    return _replaced(frame, payload=rng.choice((damaged(rng, frame.payload), rng.randbytes(len(frame.payload)), bytes(len(frame.payload)))))


def _other_operation(rng: random.Random, frame: RecordedFrame, recorded: Sequence[RecordedFrame]) -> RecordedFrame | None:
    """The header of one frame under another one's operation, or an untouched frame where it does not belong."""
    if rng.random() < 0.5:
        return frame
    return _replaced(frame, operation=rng.choice(recorded).operation, kind=rng.randrange(3))


def damaged(rng: random.Random, data: bytes, most_bits: int = 8) -> bytes:
    """The bytes with one to `most_bits` bits flipped."""
    copy = bytearray(data)
    for _ in range(rng.randint(1, most_bits)):
        at = rng.randrange(len(copy) * 8)
        copy[at // 8] ^= 1 << at % 8
    return bytes(copy)


def broken(rng: random.Random, recorded: Sequence[RecordedFrame], number: int) -> tuple[str, bytes]:
    """Bytes that no receiver may take as frame `number`, and the way in which they are broken."""
    while True:
        name = rng.choice(list(BROKEN))
        frame = rng.choice(recorded)
        data = BROKEN[name](rng, frame, number)
        if data is not None and data != frame.packed(number):
            return name, data


def _flipped(rng: random.Random, frame: RecordedFrame, number: int) -> bytes | None:
    return damaged(rng, frame.packed(number))


def _at_another_place(rng: random.Random, frame: RecordedFrame, number: int) -> bytes | None:
    return frame.packed(number + rng.choice((-1, 1, 2, 1000)))


def _garbage(rng: random.Random, frame: RecordedFrame, number: int) -> bytes | None:
    """Noise, of at least the length of a prefix, that does not begin like a frame."""
    data = rng.randbytes(rng.choice((28, 64, 4096)))
    return None if data[:2] == struct.pack("<H", frames.MAGIC) else data


def _cut(rng: random.Random, frame: RecordedFrame, number: int) -> bytes | None:
    whole = frame.packed(number)
    return whole[: rng.randrange(1, len(whole))]


_OTHER_FIELDS = ((0, 0x5367), (0, 1, 2, 255), (0, 24, 99, 255), (3, 9, 255), (1, 2, 4, 8, 16, 255), (1, 65535), (0, 1 << 31))
_OTHER_FIELDS += ((1, 1 << 20, 1 << 40, (1 << 64) - 1),)


def _other_prefix(rng: random.Random, frame: RecordedFrame, number: int) -> bytes | None:
    """A field of the prefix that is not as it should be, under a right checksum."""
    fields = [frames.MAGIC, frames.VERSION, frame.operation, frame.kind, frame.flags, len(frame.header), number, len(frame.payload)]
    at = rng.randrange(len(fields))
    fields[at] = rng.choice(_OTHER_FIELDS[at])
    if at in (5, 7) and fields[at] == (len(frame.header), None, len(frame.payload))[at - 5]:
        return None
    if fields[2] in REQUEST_HEADERS and fields[2] != frame.operation and header_of(_replaced(frame, operation=fields[2])):
        return None  # a request of that operation
    return sealed(frames.PREFIX.pack(*fields), frame.header, frame.payload, number)


def _other_header(rng: random.Random, frame: RecordedFrame, number: int) -> bytes | None:
    """A header that is none of its operation, or does not fit its payload, under a right checksum."""
    other = _replaced(frame, header=damaged(rng, frame.header, 3)) if frame.header else _replaced(frame, header=rng.randbytes(9))
    return None if header_of(other) else other.packed(number)


def _other_length(rng: random.Random, frame: RecordedFrame, number: int) -> bytes | None:
    if not frame.payload:
        return None
    payload = rng.choice((frame.payload[:-1], frame.payload + b"\0", frame.payload * 2))
    other = _replaced(frame, payload=payload)
    return None if header_of(other) else other.packed(number)


BROKEN: dict[str, Callable[[random.Random, RecordedFrame, int], bytes | None]] = {
    "flipped bits": _flipped,
    "another place": _at_another_place,
    "noise": _garbage,
    "cut off": _cut,
    "prefix": _other_prefix,
    "header": _other_header,
    "length": _other_length,
}
