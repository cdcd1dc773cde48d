"""Frames over real sockets: they arrive unchanged however the stream is cut, and every check comes before allocation."""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from semgap import codecs
from semgap.tensors import DType, Tensor, TensorClass
from semgap.wire import frames, messages, receive
from semgap.wire.frames import Frame, FrameError, Limits
from semgap.wire.messages import Header, Kind, Operation, TensorHeader

Pair = tuple[socket.socket, socket.socket]
PING_BODY = msgspec.msgpack.encode([[], 0])


@contextlib.contextmanager
def _pair(kind: int = socket.AF_UNIX) -> Iterator[Pair]:
    """Two connected sockets whose blocked reads and writes wake every 50 ms."""
    if kind == socket.AF_UNIX:
        one, other = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            one = socket.create_connection(listener.getsockname())
            other, _ = listener.accept()
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for sock in (one, other):
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", 0, 50_000))
    with one, other:
        yield one, other


def _raw(
    body: bytes = PING_BODY,
    payload: bytes = b"",
    magic: int = frames.MAGIC,
    version: int = frames.VERSION,
    operation: int = Operation.PING,
    kind: int = 0,
    flags: int = 0,
    header_length: int | None = None,
    payload_length: int | None = None,
) -> bytes:
    """A frame with a right checksum, and any other fault."""
    lengths = (len(body) if header_length is None else header_length, len(payload) if payload_length is None else payload_length)
    prefix = struct.pack("<HBBBBHIQ", magic, version, operation, kind, flags, lengths[0], 1, lengths[1])
    return prefix + struct.pack("<Q", xxhash.xxh3_64_intdigest(struct.pack("<Q", 1) + prefix + body + payload)) + body + payload


def _receive(data: bytes, limits: Limits = Limits(), destinations: frames.Destinations | None = None) -> Frame:  # noqa: B008
    """The frame that a receiver reads from `data` and the end of the connection."""
    with _pair() as (one, other):
        feeder = threading.Thread(target=_feed, args=(one, [data]))
        feeder.start()
        try:
            frame = receive.Receiver(other, limits).receive(5.0, 5.0, destinations)
        finally:
            other.close()
            feeder.join()
        return frame


def _feed(sock: socket.socket, pieces: Sequence[bytes], pause_s: float = 0.0) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the receiver refused the rest
        for piece in pieces:
            sock.sendall(piece)
            time.sleep(pause_s)
        sock.shutdown(socket.SHUT_WR)


def _encoded(*arrays: np.ndarray, codec: str = "raw") -> list[codecs.Encoded]:
    return [codecs.encode(Tensor.from_numpy(array, TensorClass.KV), codec) for array in arrays]


def _packed(
    tensors: Sequence[codecs.Encoded], operation: Operation = Operation.FORWARD, header: Header | None = None, number: int = 1
) -> bytes:
    header = msgspec.structs.replace(header or messages.Forward((), 3, 5), tensors=frames.tensor_headers(tensors))
    buffers = [buffer for tensor in tensors for buffer in tensor.buffers]
    return b"".join([frames.pack(operation, Kind.REGULAR, 0, 1, header, buffers, number), *buffers])


def _tensor_body(*tensors: list[Any]) -> bytes:
    return msgspec.msgpack.encode([list(tensors), 0])


ARRAYS = st.lists(
    st.tuples(st.sampled_from(["<u1", "<u2", "<i4", "<i8", "<f2", "<f4"]), st.lists(st.integers(0, 5), max_size=3)).map(
        lambda spec: np.random.default_rng(len(spec[1])).integers(0, 100, spec[1]).astype(spec[0])
    ),
    max_size=6,
)


@pytest.mark.parametrize("family", [socket.AF_UNIX, socket.AF_INET])
@settings(max_examples=60, deadline=None)
@given(
    sent=st.lists(st.tuples(ARRAYS, st.integers(0, (1 << 32) - 1), st.integers(0, 1 << 48)), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 3000), max_size=8),
)
def test_frames_come_out_as_they_went_in_wherever_the_stream_is_cut(
    family: int, sent: list[tuple[list[np.ndarray], int, int]], cuts: list[int]
) -> None:
    stream = b"".join(
        _packed(_encoded(*arrays), header=messages.Forward((), handle, position), number=number)
        for number, (arrays, handle, position) in enumerate(sent, 1)
    )
    edges = sorted({0, len(stream), *(min(cut, len(stream)) for cut in cuts)})
    pieces = [stream[begin:end] for begin, end in itertools.pairwise(edges)]
    with _pair(family) as (one, other):
        feeder = threading.Thread(target=_feed, args=(one, pieces, 0.0005))
        feeder.start()
        receiver = receive.Receiver(other, Limits())
        for arrays, handle, position in sent:
            frame = receiver.receive(5.0, 5.0)
            assert isinstance(frame.header, messages.Forward)
            assert (frame.operation, frame.kind, frame.sequence) == (Operation.FORWARD, Kind.REGULAR, 1)
            assert (frame.header.handle, frame.header.position) == (handle, position)
            assert [bytes(payload) for payload in frame.payloads] == [array.tobytes() for array in arrays]
            assert [t.shape for t in frame.header.tensors] == [array.shape for array in arrays]
        with pytest.raises(frames.ClosedError):
            receiver.receive(5.0, 5.0)
        feeder.join()


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_a_flip_of_any_single_byte_is_never_received_as_a_frame(data: st.DataObject) -> None:
    stream = bytearray(_packed(_encoded(np.arange(5, dtype=np.float32), np.zeros((0, 2), np.int64), np.arange(7, dtype=np.uint8))))
    stream[data.draw(st.integers(0, len(stream) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(FrameError):
        _receive(bytes(stream))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_frame_cut_short_anywhere_is_truncated(data: st.DataObject) -> None:
    stream = _packed(_encoded(np.arange(40, dtype=np.float32)))
    with pytest.raises(FrameError) as error:
        _receive(stream[: data.draw(st.integers(1, len(stream) - 1))])
    assert error.value.code == "truncated"


@settings(max_examples=150, deadline=None)
@given(st.binary(min_size=1, max_size=200))
def test_no_random_bytes_are_a_frame(junk: bytes) -> None:
    with pytest.raises(FrameError):
        _receive(junk)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(Operation)), st.integers(0, 15), st.binary(max_size=120))
def test_any_header_bytes_decode_to_that_operations_header_or_raise_a_frame_error(operation: Operation, flags: int, body: bytes) -> None:
    with contextlib.suppress(FrameError):
        frame = _receive(_raw(body, operation=operation, flags=flags))
        known = {messages.ErrorHeader, messages.REQUEST_HEADERS[operation], messages.REPLY_HEADERS[operation]}
        assert type(frame.header) in known | ({messages.Tokens} if operation is Operation.DECODE_WINDOW else set())


@pytest.mark.parametrize(
    ("code", "stream"),
    [
        ("magic", _raw(magic=0x4547)),
        ("version", _raw(version=frames.VERSION + 1)),
        ("operation", _raw(operation=77)),
        ("operation", _raw(operation=255)),
        ("flags", _raw(kind=3)),
        ("flags", _raw(flags=16)),
        ("flags", _raw(flags=128)),
        ("header", _raw(b"")),
        ("header", _raw(b"\xc1")),
        ("header", _raw(b"\x92\x90")),
        ("header", _raw(PING_BODY + b"\x00")),
        ("header", _raw(msgspec.msgpack.encode([[], 0, "more"]))),
        ("header", _raw(msgspec.msgpack.encode({"reply_bytes": 0}))),
        ("header", _raw(msgspec.msgpack.encode([[], -1]))),
        ("header", _raw(msgspec.msgpack.encode([[], "8"]))),
        ("header", _raw(msgspec.msgpack.encode([[], (1 << 48) + 1]))),
        ("header", _raw(msgspec.msgpack.encode([[], {"a": 1}, 1]))),
        ("header", _raw(b"\x93\x90\xa1\xff\xa1\xff", flags=3)),
        ("header", _raw(_tensor_body([5, 0, 99, [1], 1]), b"x")),
        ("header", _raw(_tensor_body([5, 0, 0, [1], 1]), b"x")),
        ("header", _raw(_tensor_body([9, 0, 1, [1], 1]), b"x")),
        ("header", _raw(_tensor_body([5, 256, 1, [1], 1]), b"x")),
        ("header", _raw(_tensor_body([5, 0, 1, [-1], 1]), b"x")),
        ("header", _raw(_tensor_body([5, 0, 1, [1] * 9, 1]), b"x")),
        ("header", _raw(_tensor_body([5, 0, 1, [1], 1, "more"]), b"x")),
        ("header", _raw(_tensor_body([5, 0, 1, [1.0], 1]), b"x")),
        ("length", _raw(_tensor_body([5, 0, 8, [3], 11]), bytes(11))),
        ("length", _raw(_tensor_body([5, 0, 8, [3], 12]), bytes(13))),
        ("length", _raw(_tensor_body([5, 1, 8, [3], 6]), bytes(7))),
        ("length", _raw(payload=b"unannounced")),
        ("length", _raw(b"\x90", operation=5, flags=1)),
        ("length", _raw(payload=b"odd", operation=5, flags=1)),
        ("length", _raw(payload=b"no u32", operation=5, flags=9)),
        ("length", _raw(_tensor_body([5, 0, 1, [4], 4]))),
    ],
)
def test_each_check_refuses_its_frame_by_its_code(code: str, stream: bytes) -> None:
    with pytest.raises(FrameError) as error:
        _receive(stream)
    assert error.value.code == code


def test_a_header_over_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(FrameError) as error:
        _receive(_raw(header_length=201)[: frames.PREFIX_BYTES], Limits(header_bytes=200))
    assert error.value.code == "header_limit"


def test_more_tensors_than_the_limit_are_refused() -> None:
    stream = _packed(_encoded(*[np.zeros(0, np.uint8)] * 9))
    assert len(_receive(stream, Limits(buffers=9)).payloads) == 9
    with pytest.raises(FrameError) as error:
        _receive(stream, Limits(buffers=8))
    assert error.value.code == "buffers"


@pytest.mark.parametrize(
    ("code", "stream"),
    [
        ("payload_limit", _raw(payload_length=1 << 46)),
        ("payload_limit", _raw(_tensor_body([5, 0, 1, [1 << 46], 1 << 46]), payload_length=1 << 46)),
        ("payload_limit", _raw(_tensor_body([5, 2, 8, [1 << 46], 3]), b"abc")),
        ("payload_limit", _raw(_tensor_body([5, 2, 8, [1 << 47] * 8, 3]), b"abc")),
        ("length", _raw(_tensor_body([5, 0, 1, [1 << 29], 1 << 29]), payload_length=1 << 28)),
        ("length", _raw(_tensor_body(*[[5, 2, 1, [1], 1 << 29]] * 9), payload_length=1 << 29)),
    ],
)
def test_an_announced_size_is_checked_before_memory_is_allocated(code: str, stream: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(FrameError) as error:
            _receive(stream)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert error.value.code == code
    assert peak < 2 << 20


def test_an_unauthenticated_peer_may_announce_no_payload_at_all() -> None:
    with pytest.raises(FrameError) as error:
        _receive(_raw(_tensor_body([0, 0, 1, [1], 1]), b"x"), frames.UNAUTHENTICATED)
    assert error.value.code == "payload_limit"


def test_garbage_behind_a_frame_is_refused_as_the_next_frame() -> None:
    with _pair() as (one, other):
        one.sendall(_raw() + b"garbage that is long enough for a prefix")
        receiver = receive.Receiver(other, Limits())
        receiver.receive(1.0, 1.0)
        with pytest.raises(FrameError) as error:
            receiver.receive(1.0, 1.0)
    assert error.value.code == "magic"


def test_a_frame_that_drips_in_hits_its_deadline() -> None:
    stop = threading.Event()

    def drip(sock: socket.socket, stream: bytes) -> None:
        with contextlib.suppress(OSError):
            for byte in stream:
                sock.sendall(bytes([byte]))
                if stop.wait(0.03):
                    return

    for eager in (0, 20, frames.PREFIX_BYTES + 14):  # inside the prefix, the header, the payload
        stream = _packed(_encoded(np.zeros(20_000, np.uint8)))
        with _pair() as (one, other):
            one.sendall(stream[:eager])
            dripping = threading.Thread(target=drip, args=(one, stream[eager:]))
            dripping.start()
            begin = time.monotonic()
            with pytest.raises(frames.DeadlineError):
                receive.Receiver(other, Limits()).receive(1.0, 0.25)
            assert time.monotonic() - begin < 1.0
            stop.set()
            dripping.join()
            stop.clear()


def test_a_frame_that_does_not_begin_hits_the_idle_deadline() -> None:
    with _pair() as (_, other):
        begin = time.monotonic()
        with pytest.raises(frames.DeadlineError):
            receive.Receiver(other, Limits()).receive(0.2, 60.0)
        assert time.monotonic() - begin < 1.0


def test_a_peer_that_reads_nothing_hits_the_senders_deadline() -> None:
    tensors = _encoded(np.zeros(1 << 19, np.uint8))
    with _pair() as (one, _):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with pytest.raises(frames.DeadlineError):
            frames.send(one, b"start", [b for t in tensors for b in t.buffers], 0.1)


def test_a_peer_that_reads_a_little_at_a_time_hits_the_senders_deadline() -> None:
    stop = threading.Event()

    def sip(sock: socket.socket) -> None:
        while not stop.wait(0.008):
            with contextlib.suppress(BlockingIOError):
                sock.recv(4096)

    with _pair(socket.AF_INET) as (one, other):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader = threading.Thread(target=sip, args=(other,))
        reader.start()
        begin = time.monotonic()
        try:
            with pytest.raises(frames.DeadlineError):
                frames.send(one, b"start", [memoryview(bytes(1 << 19))], 0.1)
            assert time.monotonic() - begin < 5.0
        finally:
            stop.set()
            reader.join()


def test_sending_to_a_peer_that_left_says_that_it_closed() -> None:
    with _pair() as (one, other):
        other.close()
        with pytest.raises(frames.ClosedError):
            frames.send(one, b"x" * 100, [memoryview(bytes(1 << 20))], 1.0)


def test_a_connection_that_the_kernel_gave_up_on_counts_as_closed() -> None:
    with socket.socket() as unconnected, pytest.raises(frames.ClosedError):
        receive.Receiver(unconnected, Limits()).receive(1.0, 1.0)
    with socket.socket() as unconnected, pytest.raises(frames.ClosedError):
        frames.send(unconnected, b"x", [], 1.0)


def test_more_buffers_than_one_sendmsg_takes_are_gathered() -> None:
    arrays = [np.full(index % 4, index % 251, np.uint8) for index in range(3000)]
    with _pair(socket.AF_INET) as (one, other):
        tensors = _encoded(*arrays)
        header = messages.PutWeights(frames.tensor_headers(tensors), (), True)
        buffers = [buffer for tensor in tensors for buffer in tensor.buffers]
        start = frames.pack(Operation.PUT_WEIGHTS, Kind.SETUP, 0, 1, header, buffers)
        sender = threading.Thread(target=frames.send, args=(one, start, buffers, 5.0))
        sender.start()
        frame = receive.Receiver(other, Limits()).receive(5.0, 5.0)
        sender.join()
    assert [bytes(payload) for payload in frame.payloads] == [array.tobytes() for array in arrays]


def test_a_frame_larger_than_every_socket_buffer_arrives_whole() -> None:
    array = np.random.default_rng(1).integers(0, 255, 20 << 20, dtype=np.uint8)
    with _pair(socket.AF_INET) as (one, other):
        tensors = _encoded(array)
        buffers = list(tensors[0].buffers)
        start = frames.pack(Operation.FORWARD, Kind.REGULAR, 0, 1, messages.Forward(frames.tensor_headers(tensors)), buffers)
        sender = threading.Thread(target=frames.send, args=(one, start, buffers, 5.0))
        sender.start()
        frame = receive.Receiver(other, Limits()).receive(5.0, 5.0)
        sender.join()
    assert np.array_equal(np.frombuffer(frame.payloads[0], np.uint8), array)
    assert frame.header_bytes + frame.payload_bytes == len(start) + array.nbytes


def test_payloads_land_in_the_given_memory() -> None:
    given, array = bytearray(12), np.arange(3, dtype=np.float32)
    stream = _packed(_encoded(array, np.arange(2, dtype=np.uint8)))
    frame = _receive(stream, destinations=lambda operation, header: [memoryview(given), None])
    assert bytes(given) == array.tobytes()
    assert bytes(frame.payloads[1]) == b"\x00\x01"


def test_memory_of_another_size_than_the_tensor_is_refused() -> None:
    stream = _packed(_encoded(np.arange(3, dtype=np.float32)))
    with pytest.raises(FrameError) as error:
        _receive(stream, destinations=lambda operation, header: [memoryview(bytearray(11))])
    assert error.value.code == "length"


def test_an_empty_header_takes_no_bytes() -> None:
    packed = frames.pack(Operation.SHUTDOWN, Kind.SETUP, 0, 1, Header(), [])
    assert len(packed) == frames.PREFIX_BYTES == 28
    assert _receive(packed).header == Header()


def test_a_header_that_cannot_be_announced_is_refused_by_the_sender() -> None:
    with pytest.raises(FrameError, match="more than 65535"):
        frames.pack(Operation.HELLO, Kind.SETUP, 0, 1, messages.Hello(body=bytes(70_000)), [])


def test_tensor_headers_survive_their_encoding() -> None:
    header = TensorHeader(TensorClass.KV, 2, DType.BF16, (1, 2, 0), 17)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(header), type=TensorHeader) == header
    assert header.tensor_bytes == 0


def test_operations_and_kinds_keep_their_numbers() -> None:
    numbers = {"HELLO": 1, "OFFER_WEIGHTS": 2, "PUT_WEIGHTS": 3, "FORWARD": 4, "RELEASE": 8, "GET_NETWORK_COUNTERS": 9, "TELEMETRY": 10}
    assert {op.name: op.value for op in Operation}.items() >= (numbers | {"PING": 11, "SHUTDOWN": 12}).items()
    assert [kind.value for kind in (Kind.SETUP, Kind.REGULAR, Kind.DELTA)] == [0, 1, 2]


def test_every_operation_has_a_header_each_way() -> None:
    assert set(messages.REQUEST_HEADERS) == set(Operation) == set(messages.REPLY_HEADERS)
