"""Handshake, requests and kernel counters of a connection with two real ends."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from semgap import codecs
from semgap.tensors import DType, Tensor, TensorClass
from semgap.wire import frames, messages
from semgap.wire.frames import FrameError
from semgap.wire.handshake import AuthError, read_secret, shake_hands_as_client, shake_hands_as_worker, write_secret
from semgap.wire.ledger import Direction, frame_bytes
from semgap.wire.link import Link, RemoteError, connect
from semgap.wire.messages import Hello, Kind, Operation
from semgap.wire.tcp import Timeouts, congestion_control, parse_address, segments, tcp_info

Pair = tuple[socket.socket, socket.socket]
SECRET, OTHER = b"s" * 64, b"o" * 64


@pytest.fixture
def links(tcp_pair: Pair) -> Iterator[tuple[Link, Link]]:
    """A client's and a worker's end of one connection."""
    client, worker = (Link(sock, way, Timeouts(3.0, 3.0)) for sock, way in zip(tcp_pair, (Direction.UP, Direction.DOWN), strict=True))
    yield client, worker
    client.close()
    worker.close()


class Worker(threading.Thread):
    """The worker's half of a handshake in a thread; keeps the requested session and the error."""

    def __init__(self, link: Link, secret: bytes) -> None:
        super().__init__(daemon=True)
        self.link, self.secret = link, secret
        self.asked: dict[str, Any] | None = None
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            shake_hands_as_worker(self.link, self.secret, self._grant)
        except Exception as error:
            self.error = error
            self.link.close()

    def _grant(self, asked: dict[str, Any]) -> dict[str, Any]:
        self.asked = asked
        return {"granted": asked}

    def outcome(self) -> Exception | None:
        self.join(10)
        assert not self.is_alive()
        return self.error


def _bytes(count: int) -> codecs.Encoded:
    return codecs.encode(Tensor(TensorClass.CONTROL, DType.U8, (count,), memoryview(bytes(count))), "raw")


@pytest.mark.parametrize("secret", [SECRET, b""])
def test_two_sides_with_the_same_secret_agree_on_a_session(links: tuple[Link, Link], secret: bytes) -> None:
    worker = Worker(links[1], secret)
    assert shake_hands_as_client(links[0], secret, {"model": None, "n": 3}) == {"granted": {"model": None, "n": 3}}
    assert worker.outcome() is None
    assert links[1].timeouts == Timeouts(3.0, 3.0)


@pytest.mark.parametrize(("ours", "theirs"), [(SECRET, OTHER), (b"", SECRET), (SECRET, b"")])
def test_a_client_refuses_a_worker_that_does_not_hold_its_secret(links: tuple[Link, Link], ours: bytes, theirs: bytes) -> None:
    worker = Worker(links[1], theirs)
    with pytest.raises(AuthError, match="same token file"):
        shake_hands_as_client(links[0], ours, {})
    links[0].close()
    worker.outcome()
    assert worker.asked is None


class _Hands:
    """A client that goes through the handshake by hand."""

    def __init__(self, link: Link) -> None:
        self.link = link
        link.limits = frames.Limits()
        self.nonce = b"n" * 32

    def open(self, **fields: Any) -> Hello:
        fields = {"step": 1, "versions": (frames.VERSION,), "nonce": self.nonce} | fields
        header = self.link.request(Operation.HELLO, Hello(**fields)).header
        assert isinstance(header, Hello)
        return header

    def prove(self, mac: bytes, body: bytes = b"{}", step: int = 3) -> Hello:
        header = self.link.request(Operation.HELLO, Hello((), step, (frames.VERSION,), b"", mac, body)).header
        assert isinstance(header, Hello)
        return header


def _attempt(worker: Worker, attack: Callable[[], object]) -> Exception | None:
    """The worker's error after an attack, which must not end in a granted session."""
    with pytest.raises(frames.WireError):
        attack()
    error = worker.outcome()
    assert worker.asked is None
    return error


def test_a_worker_refuses_a_client_without_its_secret(links: tuple[Link, Link]) -> None:
    hands, worker = _Hands(links[0]), Worker(links[1], SECRET)
    hands.open()
    assert isinstance(_attempt(worker, lambda: hands.prove(b"m" * 32)), AuthError)


def test_a_workers_own_proof_reflected_does_not_open_it(links: tuple[Link, Link]) -> None:
    hands, worker = _Hands(links[0]), Worker(links[1], SECRET)
    challenge = hands.open()
    assert isinstance(_attempt(worker, lambda: hands.prove(challenge.mac)), AuthError)


def test_a_proof_replayed_from_an_earlier_handshake_does_not_open_it(tcp_pair: Pair) -> None:
    recorded: list[bytes] = []

    class Recorder(Link):
        def request(self, operation: Operation, header: Any = None, *rest: Any, **more: Any) -> Any:
            recorded.append(header)
            return super().request(operation, header, *rest, **more)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        first = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
    worker = Worker(Link(accepted, Direction.DOWN, Timeouts(3.0, 3.0)), SECRET)
    shake_hands_as_client(Recorder(first, Direction.UP, Timeouts(3.0, 3.0)), SECRET, {"ask": "everything"})
    assert worker.outcome() is None

    link = Link(tcp_pair[0], Direction.UP, Timeouts(3.0, 3.0))
    link.limits = frames.Limits()
    again = Worker(Link(tcp_pair[1], Direction.DOWN, Timeouts(3.0, 3.0)), SECRET)
    link.request(Operation.HELLO, recorded[0])
    assert isinstance(_attempt(again, lambda: link.request(Operation.HELLO, recorded[1])), AuthError)
    first.close()
    accepted.close()


def test_a_proof_for_one_session_does_not_open_another(tcp_pair: Pair) -> None:
    """A man in the middle who changes the requested session breaks the client's proof."""

    class Meddler(Link):
        def request(self, operation: Operation, header: Any = None, *rest: Any, **more: Any) -> Any:
            if header.step == 3:
                header = msgspec.structs.replace(header, body=b'{"max_length": 9}')
            return super().request(operation, header, *rest, **more)

    worker = Worker(Link(tcp_pair[1], Direction.DOWN, Timeouts(3.0, 3.0)), SECRET)
    meddler = Meddler(tcp_pair[0], Direction.UP, Timeouts(3.0, 3.0))
    assert isinstance(_attempt(worker, lambda: shake_hands_as_client(meddler, SECRET, {"max_length": 1})), AuthError)


def test_a_client_of_another_version_is_told_both(links: tuple[Link, Link]) -> None:
    hands, worker = _Hands(links[0]), Worker(links[1], SECRET)
    error = _attempt(worker, lambda: hands.open(versions=(7, 8)))
    assert isinstance(error, FrameError) and error.code == "version" and "(7, 8)" in str(error)


@pytest.mark.parametrize(("fields", "code"), [({"nonce": b""}, "hello"), ({"nonce": b"n" * 31}, "hello"), ({"step": 3}, "hello")])
def test_a_crooked_opening_is_refused(links: tuple[Link, Link], fields: dict[str, Any], code: str) -> None:
    hands, worker = _Hands(links[0]), Worker(links[1], SECRET)
    error = _attempt(worker, lambda: hands.open(**fields))
    assert isinstance(error, FrameError) and error.code == code


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"a":"\xff"}', b'{"a":' + b"[" * 20_000])
def test_a_session_that_is_no_json_object_is_refused_as_hello(links: tuple[Link, Link], body: bytes) -> None:
    from semgap.wire.handshake import _proof

    hands, worker = _Hands(links[0]), Worker(links[1], SECRET)
    challenge = hands.open()
    error = _attempt(worker, lambda: hands.prove(_proof(SECRET, b"client", hands.nonce, challenge.nonce, body), body))
    assert isinstance(error, FrameError) and error.code == "hello"


def test_nothing_but_hello_comes_before_the_handshake(links: tuple[Link, Link]) -> None:
    worker = Worker(links[1], SECRET)
    links[0].limits = frames.Limits()
    error = _attempt(worker, lambda: links[0].request(Operation.SHUTDOWN))
    assert isinstance(error, FrameError) and error.code == "hello"


def test_an_unauthenticated_client_cannot_send_a_payload(links: tuple[Link, Link]) -> None:
    worker = Worker(links[1], SECRET)
    error = _attempt(worker, lambda: links[0].request(Operation.HELLO, Hello((), 1, (1,), b"n" * 32), [_bytes(1)]))
    assert isinstance(error, FrameError) and error.code == "payload_limit"


def test_an_answer_to_another_request_is_refused(links: tuple[Link, Link]) -> None:
    client, worker = links
    client.limits = worker.limits = frames.Limits()
    client.post(Operation.PING, messages.Ping())
    request = worker.next_request()
    worker.reply(request)
    client.post(Operation.SHUTDOWN)
    with pytest.raises(FrameError) as error:
        client.await_reply(Operation.SHUTDOWN)
    assert error.value.code == "sequence"


@pytest.fixture
def rearranged(links: tuple[Link, Link]) -> Iterator[Callable[[Callable[[list[bytes]], list[bytes]]], Link]]:
    """A client whose worker has answered it by token frames 10, 11, 12 and 13, which come as a function arranged them."""
    client, worker = links
    client.post(Operation.DECODE_WINDOW, messages.DecodeWindow((), 1, 1, 9, 4))
    request = worker.next_request()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    before = worker.sock
    worker.sock = near
    sent = []
    for token in (10, 11, 12, 13):
        worker.stream(request, [token], wide=False, last=token == 13)
        sent.append(far.recv(4096))

    def arranged(by: Callable[[list[bytes]], list[bytes]]) -> Link:
        before.sendall(b"".join(by(sent)))
        return client

    with before, near, far:
        yield arranged


def _tokens_of(client: Link) -> list[int]:
    return [int(client.decode(client.receive_stream(Operation.DECODE_WINDOW, 1), 0).numpy()[0]) for _ in range(4)]


Arranged = Callable[[Callable[[list[bytes]], list[bytes]]], Link]


def test_a_token_frame_takes_30_bytes_and_comes_in_its_place(rearranged: Arranged) -> None:
    client = rearranged(lambda sent: sent)
    client.limits = frames.Limits()
    begin = client.ledger.down.frame
    assert _tokens_of(client) == [10, 11, 12, 13]
    assert client.ledger.down.frame - begin == 4 * (frames.PREFIX_BYTES + 2)


@pytest.mark.parametrize(
    ("arrange", "place"),
    [
        (lambda sent: [sent[1], sent[0], *sent[2:]], 1),  # two swapped
        (lambda sent: [sent[0], sent[2], sent[1], sent[3]], 2),
        (lambda sent: [sent[0], sent[0], *sent[2:]], 2),  # one twice, in place of the next
        (lambda sent: [sent[0], *sent[2:]], 2),  # one lost
    ],
)
def test_a_stream_whose_frames_are_not_in_their_places_is_an_error_and_never_other_tokens(
    rearranged: Arranged, arrange: Callable[[list[bytes]], list[bytes]], place: int
) -> None:
    client = rearranged(arrange)
    client.limits = frames.Limits()
    with pytest.raises(FrameError, match=f"does not match its bytes, or its place as frame {place}") as error:
        _tokens_of(client)
    assert error.value.code == "checksum"


def test_a_request_out_of_sequence_is_refused(links: tuple[Link, Link]) -> None:
    client, worker = links
    client.post(Operation.PING, messages.Ping())
    client._sequence += 1
    client.post(Operation.PING, messages.Ping())
    worker.next_request()
    with pytest.raises(FrameError) as error:
        worker.next_request()
    assert error.value.code == "sequence"


def test_the_workers_refusal_reaches_the_client_with_its_code(links: tuple[Link, Link]) -> None:
    client, worker = links
    client.post(Operation.RELEASE, messages.Release((), 4))
    worker.reply_error(worker.next_request(), "handle", "handle 4 is not open" + "!" * 9000)
    with pytest.raises(RemoteError, match="handle 4 is not open") as error:
        client.await_reply(Operation.RELEASE)
    assert error.value.code == "handle"


def test_the_reason_of_a_refusal_is_heard_by_a_client_that_was_still_sending(links: tuple[Link, Link]) -> None:
    client, worker = links

    def refuse() -> None:
        with pytest.raises(FrameError):
            worker.next_request()
        worker.reply_error(None, "payload_limit", "payload is over the limit")
        worker.close()

    worker.limits = frames.Limits(payload_bytes=1 << 20)
    refusing = threading.Thread(target=refuse)
    refusing.start()
    with pytest.raises(RemoteError, match="over the limit") as error:
        client.request(Operation.PING, messages.Ping(), [_bytes(64 << 20)])
    refusing.join()
    assert error.value.code == "payload_limit"


def test_after_a_drain_the_kernel_counts_what_the_ledger_counts(links: tuple[Link, Link]) -> None:
    client, worker = links
    worker.limits = frames.Limits()
    answering = threading.Thread(target=lambda: [worker.reply(worker.next_request()) for _ in range(20)])
    answering.start()
    client.limits = frames.Limits()
    for size in range(20):
        client.request(Operation.PING, messages.Ping(), [_bytes(size * 50_000 + 1)], Kind.REGULAR)
    answering.join()
    client.drain()
    worker.drain()
    for link, ledger in ((client, client.ledger), (worker, worker.ledger)):
        tcp, rows = tcp_info(link.sock), ledger.copy_rows()
        assert tcp["bytes_sent"] - tcp["bytes_retrans"] == frame_bytes(rows, link.sending) > 0
        assert tcp["bytes_received"] == frame_bytes(rows, link.receiving) > 0
    assert segments(client.sock)[0] > 0 and tcp_info(client.sock)["segment_header_bytes"] in (40, 52)
    assert client.ledger.round_trips == 20


def test_a_drain_that_the_peer_never_acknowledges_ends(links: tuple[Link, Link]) -> None:
    client, _ = links

    def send() -> None:
        with pytest.raises(frames.WireError):
            client.post(Operation.PING, messages.Ping(), [_bytes(32 << 20)])

    sender = threading.Thread(target=send)
    sender.start()
    time.sleep(0.2)
    begin = time.monotonic()
    with pytest.raises(frames.DeadlineError):
        client.drain(0.3)
    assert time.monotonic() - begin < 2.0
    links[1].close()
    sender.join()


def test_a_written_secret_is_private_and_reads_back(tmp_path: Path) -> None:
    write_secret(tmp_path / "secret")
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    assert len(read_secret(tmp_path / "secret")) == 64
    with pytest.raises(AuthError, match="exists already"):
        write_secret(tmp_path / "secret")
    assert read_secret(None) == b""


def test_a_missing_token_file_is_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(AuthError, match=f"{tmp_path}/none cannot be read: No such file.*semgap secret"):
        read_secret(tmp_path / "none")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620, 0o604])
def test_a_token_file_that_others_can_reach_is_refused_with_its_mode(tmp_path: Path, mode: int) -> None:
    write_secret(tmp_path / "secret")
    (tmp_path / "secret").chmod(mode)
    with pytest.raises(AuthError, match=f"mode 0{mode:o}.*chmod 600"):
        read_secret(tmp_path / "secret")


def test_a_token_file_in_a_home_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_secret(tmp_path / ".semgap-token")
    assert read_secret(Path("~/.semgap-token")) == (tmp_path / ".semgap-token").read_bytes().strip()


@pytest.mark.parametrize("content", ["", "\n", "short", " " * 100, "x" * 31 + "\n\n"])
def test_a_token_file_that_is_too_short_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "secret").write_text(content)
    (tmp_path / "secret").chmod(0o600)
    with pytest.raises(AuthError, match="fewer than 32"):
        read_secret(tmp_path / "secret")


@pytest.mark.parametrize(("text", "parsed"), [("127.0.0.1:5005", ("127.0.0.1", 5005)), ("[::1]:0", ("::1", 0)), ("h:1", ("h", 1))])
def test_addresses_are_host_and_port(text: str, parsed: tuple[str, int]) -> None:
    assert parse_address(text) == parsed


@pytest.mark.parametrize("text", ["", "5005", ":5005", "host:", "host:port", "host:65536", "host:-1", "host:²", "::1", "::1:99"])
def test_anything_else_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="is not HOST:PORT"):
        parse_address(text)


def test_an_address_that_nobody_answers_at_is_named() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(frames.ClosedError, match=f"no worker answers at {address}.*semgap serve"):
            connect(address)


def test_congestion_control_is_set_and_read_back(tcp_pair: Pair) -> None:
    assert congestion_control(tcp_pair[0], "reno") == "reno" == congestion_control(tcp_pair[0])
    with pytest.raises(ValueError, match="'no_such_cc' is not available"):
        congestion_control(tcp_pair[0], "no_such_cc")
