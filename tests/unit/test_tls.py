"""TLS under a link: right bytes, counted to the byte, nobody in between, and clear words where one side speaks none."""

from __future__ import annotations

import contextlib
import itertools
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from semgap import codecs
from semgap.client.probe import ping
from semgap.policy import SessionSpec
from semgap.tensors import Tensor, TensorClass
from semgap.wire import frames, messages, receive, tls
from semgap.wire.frames import ClosedError, DeadlineError, WireError
from semgap.wire.handshake import AuthError, ShakeHands, _proof, handshake_of_worker, shake_hands_as_client
from semgap.wire.ledger import Direction, LedgerError, Row
from semgap.wire.link import Link, RemoteError, control
from semgap.wire.messages import Kind, Operation
from semgap.wire.reconcile import reconcile
from semgap.wire.tcp import Timeouts, tcp_info
from semgap.worker.session import Resources, Session
from semgap.worker.weight_store import WeightStore

Pair = tuple[socket.socket, socket.socket]
SECRET, OTHER = b"s" * 64, b"o" * 64
RECORD_BYTES = 22  # what TLS 1.3 adds to a record of application data: header, type, tag


class Worker(threading.Thread):
    """A worker's session in a thread of this process, with the code of a real one."""

    def __init__(self, sock: socket.socket, shake_hands: ShakeHands) -> None:
        super().__init__(daemon=True)
        self.link = Link(sock, Direction.DOWN, Timeouts(5.0, 5.0))
        self.session = Session(self.link, "cpu", 1, Resources(WeightStore(1 << 20)))
        self.asked: dict[str, Any] | None = None
        self.error: Exception | None = None
        self._shake_hands = shake_hands
        self.start()

    def run(self) -> None:
        try:
            self._shake_hands(self.link, self._grant)
            self.session.run()
        except WireError as error:
            self.error = error
            with contextlib.suppress(WireError, OSError):
                self.link.reply_error(None, error.code, str(error))
            self.link.close()

    def _grant(self, asked: dict[str, Any]) -> dict[str, Any]:
        self.asked = asked
        return self.session.grant(asked)

    def outcome(self) -> Exception | None:
        self.join(10)
        assert not self.is_alive()
        return self.error


def _client(sock: socket.socket) -> Link:
    return Link(sock, Direction.UP, Timeouts(5.0, 5.0))


def _opened(pair: Pair, with_tls: bool) -> tuple[Link, Worker]:
    """A client's link to a worker, after the handshake."""
    client, worker = _client(pair[0]), Worker(pair[1], handshake_of_worker(SECRET, with_tls))
    shake_hands_as_client(client, SECRET, msgspec.to_builtins(SessionSpec()), with_tls)
    client.limits = frames.Limits()
    return client, worker


@pytest.fixture
def pairs() -> Iterator[Callable[[], Pair]]:
    """Both ends of new loopback TCP connections."""
    made: list[socket.socket] = []

    def pair() -> Pair:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            one = socket.create_connection(listener.getsockname())
            other, _ = listener.accept()
        made.extend((one, other))
        return one, other

    yield pair
    for sock in made:
        sock.close()


def _rows(books: dict[str, Any], side: str = "rows") -> list[Row]:
    return msgspec.convert(books[side], list[Row])


def test_ledgers_and_kernels_agree_and_tls_is_a_class_of_its_own_beside_the_bytes_of_a_session_without(pairs: Callable[[], Pair]) -> None:
    found = {}
    for with_tls in (False, True):
        client, _ = _opened(pairs(), with_tls)
        for size in (0, 1, 16_384, 70_000, 3_000_000):
            ping(client, size, size // 2)
        books = reconcile(client)
        assert {row.key: row.counted for row in _rows(books)} == {row.key: row.counted for row in _rows(books, "peer_rows")}
        found[with_tls] = books
    with_it, without = ({row.key: row.counted for row in _rows(found[each]) if row.operation == "ping"} for each in (True, False))
    added = {key: with_it.pop(key) for key in list(with_it) if key[-1] == "tls"}
    assert with_it == without
    records = {"up": [1, 1, 2, 5, 184], "down": [1, 1, 1, 3, 92]}  # of a frame with its header, 16,384 bytes at most in each
    assert {key[1]: counts for key, counts in added.items()} == {way: (0, 0, 0, RECORD_BYTES * sum(records[way])) for way in records}
    assert found[True]["tls"].startswith("TLSv1.3 TLS_") and found[False]["tls"] is None


def test_the_first_frame_has_the_bytes_of_tls_own_handshake(pairs: Callable[[], Pair]) -> None:
    client, _ = _opened(pairs(), True)
    first = {row.direction: row.header_bytes for row in client.ledger.copy_rows() if (row.operation, row.tensor_class) == ("hello", "tls")}
    assert min(first.values()) > 200 + 2 * RECORD_BYTES
    kernel = tcp_info(client.sock)
    assert (client.ledger.up.frame, client.ledger.down.frame) == (kernel["bytes_sent"], kernel["bytes_received"])


def test_a_byte_of_tls_that_one_side_did_not_count_fails_the_books(pairs: Callable[[], Pair]) -> None:
    client, _ = _opened(pairs(), True)
    next(row for row in client.ledger.rows.values() if row.tensor_class == "tls").header_bytes += 1
    with pytest.raises(LedgerError, match="tls"):
        reconcile(client)


class _Between(threading.Thread):
    """Passes bytes on between two sockets, and keeps them. `change` gets each piece."""

    def __init__(self, source: socket.socket, sink: socket.socket, change: Callable[[bytes], bytes] = lambda piece: piece) -> None:
        super().__init__(daemon=True)
        self.source, self.sink, self.change, self.seen = source, sink, change, b""
        self.start()

    def run(self) -> None:
        try:
            while piece := self.source.recv(1 << 16):
                self.seen += piece
                self.sink.sendall(self.change(piece))
            self.sink.shutdown(socket.SHUT_WR)
        except OSError:
            return


def test_nothing_readable_crosses_and_everything_arrives(pairs: Callable[[], Pair]) -> None:
    (client_end, near), (far, worker_end) = pairs(), pairs()
    up, down = _Between(near, far), _Between(far, near)
    client, _ = _opened((client_end, worker_end), True)
    filler = codecs.encode(Tensor.from_numpy(np.frombuffer(b"prompt " * 5000, np.uint8), TensorClass.CONTROL), "raw")
    client.request(Operation.PING, messages.Ping((), 100), [filler])
    reconcile(client)
    for seen in (up.seen, down.seen):
        assert len(seen) > 500 and b"prompt" not in seen and b'"policy"' not in seen and frames.MAGIC.to_bytes(2, "little") * 2 not in seen
    assert len(up.seen) > 35_000


def test_a_third_party_in_between_that_has_no_secret_is_found_out_by_the_client_before_it_says_anything(pairs: Callable[[], Pair]) -> None:
    (client_end, near), (far, worker_end) = pairs(), pairs()
    worker = Worker(worker_end, handshake_of_worker(SECRET, True))
    read: list[bytes] = []

    def stand_between() -> None:
        to_client = tls.TlsStream(near, tls.new_identity().context, server_side=True)
        to_worker = tls.as_client(far)
        to_client.shake_hands(5.0)
        to_worker.shake_hands(5.0)
        buffer = memoryview(bytearray(1 << 16))
        try:
            for source, sink in ((to_client, to_worker), (to_worker, to_client), (to_client, to_worker)):
                count = source.recv_into(buffer)
                read.append(bytes(buffer[:count]))
                if count:
                    sink.sendmsg([buffer[:count]])
        except (WireError, OSError):
            return
        far.shutdown(socket.SHUT_RDWR)

    thread = threading.Thread(target=stand_between, daemon=True)
    thread.start()
    client = _client(client_end)
    with pytest.raises(AuthError, match="stands between"):
        shake_hands_as_client(client, SECRET, {"prompt": "mine"}, tls=True)
    client.close()
    thread.join(10)
    worker.outcome()
    assert worker.asked is None and not any(b"mine" in each for each in read)
    assert read[0] and read[1]  # the two hellos passed: it could have read on


def test_a_worker_refuses_proofs_that_came_through_another_ones_certificate(pairs: Callable[[], Pair]) -> None:
    """A third party that opens TLS with the worker, and passes on the frames of a client that speaks none."""
    (client_end, near), (far, worker_end) = pairs(), pairs()
    worker = Worker(worker_end, handshake_of_worker(SECRET, True))
    outer = tls.as_client(far)
    outer.shake_hands(5.0)

    def pass_on() -> None:
        buffer = memoryview(bytearray(1 << 16))
        try:
            while True:
                outer.sendmsg([buffer[: near.recv_into(buffer)]])
                near.sendall(buffer[: outer.recv_into(buffer)])
        except (WireError, OSError, ValueError):
            return

    threading.Thread(target=pass_on, daemon=True).start()
    with pytest.raises(AuthError):
        shake_hands_as_client(_client(client_end), SECRET, {})
    for sock in (near, far):
        sock.shutdown(socket.SHUT_RDWR)
    worker.outcome()
    assert worker.asked is None


@pytest.mark.parametrize("covered", ["this", "another", "none"])
def test_a_client_s_proof_counts_alone_if_it_covers_the_certificate_of_this_connection(pairs: Callable[[], Pair], covered: str) -> None:
    """A client that holds the secret, and would take any worker's proof."""
    one, other = pairs()
    worker, client, stream = Worker(other, handshake_of_worker(SECRET, True)), _client(one), tls.as_client(one)
    stream.shake_hands(5.0)
    client.secure(stream)
    client.limits = frames.Limits()
    seen = {"this": (stream.peer_fingerprint,), "another": (tls.new_identity().fingerprint,), "none": ()}[covered]
    nonce, body = bytes(32), msgspec.json.encode(msgspec.to_builtins(SessionSpec()))
    challenge = client.request(Operation.HELLO, messages.Hello((), 1, (frames.VERSION,), nonce)).header_as(messages.Hello)
    proof = _proof(SECRET, b"client", nonce, challenge.nonce, body, *seen)
    last = messages.Hello((), 3, (frames.VERSION,), b"", proof, body)
    if covered == "this":
        client.request(Operation.HELLO, last)
        assert worker.asked is not None
        return
    with pytest.raises(RemoteError, match="does not hold this worker's secret"):
        client.request(Operation.HELLO, last)
    assert isinstance(worker.outcome(), AuthError) and worker.asked is None


@pytest.mark.parametrize("where", [0, 5, 40, -1])
def test_a_changed_byte_ends_the_connection_and_is_never_other_bytes(pairs: Callable[[], Pair], where: int) -> None:
    (client_end, near), (far, worker_end) = pairs(), pairs()
    armed = threading.Event()

    def change(piece: bytes) -> bytes:
        if not armed.is_set():
            return piece
        place = where % len(piece)
        return piece[:place] + bytes([piece[place] ^ 1]) + piece[place + 1 :]

    _Between(near, far)
    _Between(far, near, change)
    client, _ = _opened((client_end, worker_end), True)
    armed.set()
    with pytest.raises(WireError) as error:
        client.request(Operation.PING, messages.Ping((), 1000))
    assert error.value.code in ("tls", "deadline", "truncated")  # a changed length may make the client wait for more
    if where in (40, -1):
        assert isinstance(error.value, tls.TlsError) and "changed on its way" in str(error.value)


def test_after_a_changed_record_nothing_more_is_sent_and_the_error_says_so(pairs: Callable[[], Pair]) -> None:
    (client_end, near), (far, worker_end) = pairs(), pairs()
    armed = threading.Event()
    _Between(far, near)
    _Between(near, far, lambda piece: piece[:-1] + bytes([piece[-1] ^ armed.is_set()]))
    client, server = _streams((client_end, worker_end))
    armed.set()
    client.sendmsg([memoryview(b"anything")])
    with pytest.raises(tls.TlsError, match="changed on its way"):
        _received(server, 8)
    with pytest.raises(tls.TlsError, match="TLS sends no more"):
        frames.send(server, b"why", [], 1.0)


@pytest.mark.parametrize("with_tls", [False, True])
def test_after_a_frame_that_was_not_sent_whole_none_follows(pairs: Callable[[], Pair], with_tls: bool) -> None:
    one, other = pairs()
    for sock, option in ((one, socket.SO_SNDBUF), (other, socket.SO_RCVBUF)):
        sock.setsockopt(socket.SOL_SOCKET, option, 1 << 14)
    link = Link(one, Direction.DOWN)
    if with_tls:
        link.secure(_streams((one, other))[0])
    link.timeouts = Timeouts(1.0, 0.1)
    with pytest.raises(DeadlineError):
        link.post(Operation.PING, messages.Ping((), 1), [control(bytes(400_000))])
    other.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while other.recv(1 << 20):  # the peer takes it now
            time.sleep(0.05)
    with pytest.raises(ClosedError, match="not sent whole"):
        link.reply_error(None, "deadline", "why")


@pytest.mark.parametrize(("ours", "theirs"), [(SECRET, OTHER), (OTHER, SECRET)])
def test_another_secret_is_refused_under_tls_too(pairs: Callable[[], Pair], ours: bytes, theirs: bytes) -> None:
    one, other = pairs()
    worker, client = Worker(other, handshake_of_worker(theirs, True)), _client(one)
    with pytest.raises(AuthError, match="same token file"):
        shake_hands_as_client(client, ours, {}, tls=True)
    client.close()
    worker.outcome()
    assert worker.asked is None


@pytest.mark.parametrize("client_has", [False, True])
def test_where_one_side_alone_speaks_tls_both_are_told_so(pairs: Callable[[], Pair], client_has: bool) -> None:
    one, other = pairs()
    worker, client = Worker(other, handshake_of_worker(SECRET, not client_has)), _client(one)
    with pytest.raises(RemoteError, match="start both with tls") as error:
        shake_hands_as_client(client, SECRET, {}, client_has)
    told = worker.outcome()
    assert error.value.code == "tls" and isinstance(told, WireError) and told.code == "tls" and "start both with tls" in str(told)
    assert worker.asked is None


def test_a_word_before_tls_begins_is_heard(pairs: Callable[[], Pair]) -> None:
    one, other = pairs()
    Link(other, Direction.DOWN, Timeouts(1.0, 1.0)).reply_error(None, "busy", "8 sessions are open")
    with pytest.raises(RemoteError, match="8 sessions are open"):
        shake_hands_as_client(_client(one), SECRET, {}, tls=True)


def test_another_protocol_is_no_tls(pairs: Callable[[], Pair]) -> None:
    one, other = pairs()
    other.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    other.shutdown(socket.SHUT_WR)
    with pytest.raises(tls.NoTlsError):
        shake_hands_as_client(_client(one), SECRET, {}, tls=True)


def test_tls_needs_a_secret_on_either_side(pairs: Callable[[], Pair]) -> None:
    with pytest.raises(AuthError, match="--secret-file"):
        handshake_of_worker(b"", True)
    one, other = pairs()
    with pytest.raises(AuthError, match="--secret-file"):
        shake_hands_as_client(_client(one), b"", {}, tls=True)
    other.setblocking(False)
    with pytest.raises(BlockingIOError):
        other.recv(1)


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01"])
def test_a_client_that_stops_in_the_middle_of_tls_handshake_is_given_up(pairs: Callable[[], Pair], said: bytes) -> None:
    one, other = pairs()
    stream = tls.TlsStream(Link(other, Direction.DOWN).sock, tls.new_identity().context, server_side=True)
    one.sendall(said)
    begin = time.monotonic()
    with pytest.raises(DeadlineError):
        stream.shake_hands(0.5)
    assert time.monotonic() - begin < 5
    one.close()
    with pytest.raises(ClosedError):
        stream.shake_hands(0.5)


def _drip(step: Callable[[int], object]) -> threading.Event:
    """Does 100 steps in a thread, one every 0.04 s. The event says that they are over."""
    over = threading.Event()

    def drip() -> None:
        with contextlib.suppress(OSError):  # the test has ended
            for number in range(100):
                step(number)
                time.sleep(0.04)
        over.set()

    threading.Thread(target=drip, daemon=True).start()
    return over


def _ping_of(filler_bytes: int) -> tuple[bytes, bytes]:
    """A ping's frame: its beginning, its payload."""
    filler = codecs.encode(Tensor.from_numpy(np.zeros(filler_bytes, np.uint8), TensorClass.CONTROL), "raw")
    header = messages.Ping(frames.tensor_headers([filler]), 1)
    return frames.pack(Operation.PING, Kind.SETUP, 0, 1, header, filler.buffers), bytes(filler_bytes)


def test_a_client_that_drips_tls_handshake_is_given_up_before_it_ends(pairs: Callable[[], Pair]) -> None:
    one, other = pairs()
    stream = tls.TlsStream(Link(other, Direction.DOWN).sock, tls.new_identity().context, server_side=True)
    hello = b"\x16\x03\x01\x3f\xff\x01\x00\x3f\xfb\x03\x03" + bytes(200)  # the beginning of 16 KiB
    over = _drip(lambda number: one.sendall(hello[number : number + 1]))
    with pytest.raises(DeadlineError):
        stream.shake_hands(0.5)
    assert not over.is_set()


def test_a_frame_whose_record_drips_is_given_up_before_it_ends(pairs: Callable[[], Pair]) -> None:
    (client_end, near), (far, worker_end) = pairs(), pairs()
    armed, kept = threading.Event(), queue.Queue[bytes]()

    def change(piece: bytes) -> bytes:
        if not armed.is_set():
            return piece
        kept.put(piece)
        return b""

    _Between(far, near)
    _Between(near, far, change)
    client, server = _streams((client_end, worker_end))
    armed.set()
    client.sendmsg([memoryview(piece) for piece in _ping_of(1000)])
    record = kept.get(timeout=5)
    over = _drip(lambda number: far.sendall(record[number : number + 1]))
    with pytest.raises(DeadlineError):
        receive.Receiver(server, frames.Limits()).receive(0.5, 0.5)
    assert not over.is_set()


def test_a_payload_in_records_of_a_byte_each_is_given_up_before_it_ends(pairs: Callable[[], Pair]) -> None:
    client, server = _streams(pairs())
    start, payload = _ping_of(1000)
    client.sendmsg([memoryview(start)])
    over = _drip(lambda number: client.sendmsg([memoryview(payload[:1])]))
    with pytest.raises(DeadlineError):
        receive.Receiver(server, frames.Limits()).receive(0.5, 0.5)
    assert not over.is_set()


@pytest.mark.parametrize(("with_tls", "nbytes"), [(False, 3_000_000), (True, 260_000)], ids=["plain", "chunk of tls"])
def test_a_peer_that_takes_a_frame_in_drips_is_given_up_before_it_has_it(pairs: Callable[[], Pair], with_tls: bool, nbytes: int) -> None:
    one, other = pairs()
    for sock, option in ((one, socket.SO_SNDBUF), (other, socket.SO_RCVBUF)):
        sock.setsockopt(socket.SOL_SOCKET, option, 1 << 14)
    sender = _streams((one, other))[0] if with_tls else Link(one, Direction.UP).sock
    over = _drip(lambda _: other.recv(12_000))
    with pytest.raises(DeadlineError):
        frames.send(sender, b"start", [memoryview(bytes(nbytes))], 0.2 - nbytes / (1 << 20))  # its length gives it more time
    assert not over.is_set()


def _key_updates(secret: bytes) -> Iterator[bytes]:
    """Records that hold a KeyUpdate(update_requested) and nothing else (RFC 8446, 4.6.3), under a logged traffic secret of SHA-384."""

    def expanded(label: bytes, length: int) -> bytes:
        info = length.to_bytes(2, "big") + bytes([6 + len(label)]) + b"tls13 " + label + b"\0"
        return HKDFExpand(hashes.SHA384(), length, info).derive(secret)

    head = b"\x17\x03\x03" + RECORD_BYTES.to_bytes(2, "big")
    while True:
        yield head + AESGCM(expanded(b"key", 32)).encrypt(expanded(b"iv", 12), b"\x18\x00\x00\x01\x01" + b"\x16", head)
        secret = expanded(b"traffic upd", 48)


def _of_a_logged_client(pair: Pair, log: Path) -> tuple[tls.TlsStream, Iterator[bytes]]:
    """The worker's end of TLS, and records of key updates of its client, who has sent nothing else."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode, context.keylog_filename = False, ssl.CERT_NONE, str(log)
    server = tls.TlsStream(Link(pair[1], Direction.DOWN).sock, tls.new_identity().context, server_side=True)
    other = threading.Thread(target=lambda: server.shake_hands(5.0), daemon=True)
    other.start()
    tls.TlsStream(pair[0], context, server_side=False).shake_hands(5.0)
    other.join(5)
    assert server.cipher == "TLSv1.3 TLS_AES_256_GCM_SHA384"
    secrets = dict(line.split()[::2] for line in log.read_text().splitlines() if not line.startswith("#"))
    return server, _key_updates(bytes.fromhex(secrets["CLIENT_TRAFFIC_SECRET_0"]))


def test_a_peer_that_asks_for_new_keys_without_end_is_ended_and_takes_no_memory(pairs: Callable[[], Pair], tmp_path: Path) -> None:
    one, other = pairs()
    server, updates = _of_a_logged_client((one, other), tmp_path / "keys")
    threading.Thread(target=lambda: one.sendall(b"".join(itertools.islice(updates, 3000))), daemon=True).start()
    with pytest.raises(tls.TlsError, match="new keys again and again"):
        receive.Receiver(server, frames.Limits()).receive(3.0, 3.0)


def test_a_peer_that_sends_no_more_than_key_updates_meets_the_deadline(pairs: Callable[[], Pair], tmp_path: Path) -> None:
    one, other = pairs()
    server, updates = _of_a_logged_client((one, other), tmp_path / "keys")

    over = _drip(lambda _: one.sendall(next(updates)))
    with pytest.raises(DeadlineError):
        receive.Receiver(server, frames.Limits()).receive(0.5, 0.5)
    assert not over.is_set()
    server.sendmsg([memoryview(b"answers")])  # and what it was asked for


def test_an_older_version_than_1_3_is_refused(pairs: Callable[[], Pair]) -> None:
    one, other = pairs()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode, context.maximum_version = False, ssl.CERT_NONE, ssl.TLSVersion.TLSv1_2
    old = tls.TlsStream(one, context, server_side=False)
    threading.Thread(target=lambda: _suppressed(lambda: old.shake_hands(2.0)), daemon=True).start()
    with pytest.raises(tls.TlsError, match="protocol"):
        tls.TlsStream(other, tls.new_identity().context, server_side=True).shake_hands(2.0)


def _suppressed(call: Callable[[], object]) -> None:
    try:
        call()
    except WireError:
        return


def test_a_frame_that_the_peer_takes_slowly_goes_on_where_it_stopped(pairs: Callable[[], Pair]) -> None:
    client, server = _streams(pairs())
    data = np.random.default_rng(1).integers(0, 256, 20_000_000, dtype=np.uint8)  # more than both kernels hold
    sender = threading.Thread(target=lambda: frames.send(client, b"start", [memoryview(data)], 20.0), daemon=True)
    sender.start()
    time.sleep(0.7)  # several of the socket's 0.2 s in which a blocked send wakes
    got = _received(server, 5 + data.nbytes)
    sender.join(10)
    assert got == b"start" + data.tobytes()
    assert client.added_by_sending(len(got)) == server.added_by_receiving(len(got))


def _received(stream: tls.TlsStream, count: int) -> bytes:
    buffer, have = memoryview(bytearray(count)), 0
    while have < count:
        have += stream.recvmsg_into([buffer[have:]], 0, socket.MSG_WAITALL)[0]
    return bytes(buffer)


def _streams(pair: Pair) -> tuple[tls.TlsStream, tls.TlsStream]:
    """Both ends of TLS, after its handshake."""
    client = tls.as_client(Link(pair[0], Direction.UP).sock)
    server = tls.TlsStream(Link(pair[1], Direction.DOWN).sock, tls.new_identity().context, server_side=True)
    other = threading.Thread(target=lambda: server.shake_hands(5.0), daemon=True)
    other.start()
    client.shake_hands(5.0)
    other.join(5)
    return client, server


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 40_000), min_size=1, max_size=8), cuts=st.lists(st.integers(1, 50_000), min_size=1, max_size=5))
def test_frames_of_any_pieces_arrive_in_any_pieces(pairs: Callable[[], Pair], sizes: list[int], cuts: list[int]) -> None:
    client, server = _streams(pairs())
    pieces = [np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes() for size in sizes]
    whole = b"start" + b"".join(pieces)
    sender = threading.Thread(target=lambda: frames.send(client, b"start", [memoryview(piece) for piece in pieces], 5.0), daemon=True)
    sender.start()
    got, number = b"", 0
    while len(got) < len(whole):
        wanted = min(cuts[number % len(cuts)], len(whole) - len(got))
        buffers = [memoryview(bytearray(wanted // 2)), memoryview(bytearray(wanted - wanted // 2))]
        try:
            count = server.recvmsg_into(buffers, 0, socket.MSG_WAITALL)[0]
        except BlockingIOError:
            continue
        got, number = got + b"".join(bytes(buffer) for buffer in buffers)[:count], number + 1
    sender.join(5)
    assert got == whole
    assert client.added_by_sending(len(whole)) == server.added_by_receiving(len(whole)) > 0
    assert server.added_by_receiving(0) == 0


def test_a_link_under_tls_sees_input_that_the_socket_no_longer_shows(pairs: Callable[[], Pair]) -> None:
    client, worker = _opened(pairs(), True)
    assert not client.has_input()
    for _ in range(2):
        client.post(Operation.PING, messages.Ping((), 10))
    deadline = time.monotonic() + 5
    while not client.has_input() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)  # both lie in the kernel by now, and one read takes both
    client.receive_any(Operation.PING)
    assert client.has_input()
    client.receive_any(Operation.PING)
    assert not client.has_input()
    worker.link.sock.shutdown(socket.SHUT_RDWR)
    time.sleep(0.1)
    assert client.has_input()
    with pytest.raises(ClosedError):
        client.receive_any(Operation.PING)


def test_a_window_frame_of_tokens_costs_one_record(pairs: Callable[[], Pair]) -> None:
    client, _worker = _opened(pairs(), True)
    before = client.ledger.up.frame
    client.post(Operation.CANCEL, kind=Kind.REGULAR)
    assert client.ledger.up.frame - before == frames.PREFIX_BYTES + RECORD_BYTES


def test_each_worker_has_a_key_of_its_own() -> None:
    assert tls.new_identity().fingerprint != tls.new_identity().fingerprint


def test_one_thread_may_send_while_another_one_receives(pairs: Callable[[], Pair]) -> None:
    one, other = pairs()
    count, errors = 3000, list[BaseException]()

    def in_a_thread(run: Callable[[], None]) -> threading.Thread:
        def caught() -> None:
            try:
                run()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=caught, daemon=True)
        thread.start()
        return thread

    link = Link(other, Direction.DOWN, Timeouts(5.0, 5.0))

    def serve() -> None:
        handshake_of_worker(SECRET, True)(link, lambda asked: {})
        request = link.next_request()
        sender = in_a_thread(lambda: [link.reply(request, None, [control(bytes([n % 251]) * 3000)]) for n in range(count)] and None)
        for _ in range(count):
            assert link.next_request().operation is Operation.CANCEL
        sender.join(10)

    server, client = in_a_thread(serve), _client(one)
    shake_hands_as_client(client, SECRET, {}, True)
    client.limits = link.limits = frames.Limits()
    sequence = client.post(Operation.PING, messages.Ping())

    def receive_all() -> None:
        for n in range(count):
            (payload,) = client.receive_stream(Operation.PING, sequence).payloads
            assert bytes(payload) == bytes([n % 251]) * 3000

    receiver = in_a_thread(receive_all)
    for _ in range(count):
        client.post(Operation.CANCEL)
    for thread in (receiver, server):
        thread.join(20)
        assert not thread.is_alive()
    assert not errors, errors
