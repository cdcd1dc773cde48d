"""What crosses, by an independent capture of the wire: TCP payload by sequence numbers is what both kernels and both ledgers counted."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from captured_wire import Stream, captured
from torture.recording import expected_tokens, remote_modes, tiny_model, whole_session

from semgap.policy import Policy
from semgap.wire.ledger import Row, frame_bytes
from semgap.wire.tcp import parse_address

if TYPE_CHECKING:
    from conftest import StartedWorker

MODES = remote_modes()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("captured") / "model")


@pytest.fixture(scope="module")
def may_capture() -> None:
    try:
        socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM).close()
    except PermissionError:
        pytest.skip("capturing packets (AF_PACKET) needs root, or CAP_NET_RAW")


def application_bytes(tcp: Mapping[str, int]) -> int:
    return tcp["bytes_sent"] - tcp["bytes_retrans"]


def require_equal(up: int, down: int, books: Mapping[str, Any], answering: str) -> None:
    """The payload of a connection is what its kernels counted. The answer that closes the books is behind the counts that it brings."""
    ours, theirs, closing = books["tcp"], books["peer_tcp"], books["closing_frame_bytes"]
    assert closing > 28
    assert up == application_bytes(ours) == theirs["bytes_received"], f"up, {answering}"
    assert down == ours["bytes_received"] == application_bytes(theirs) + closing, f"down, {answering}"


@pytest.mark.parametrize("mode", MODES)
def test_captured_payload_is_what_both_kernels_counted_on_both_links(
    may_capture: None, kv_pair: tuple[StartedWorker, StartedWorker], model: Path, mode: str
) -> None:
    policy: Policy = MODES[mode]
    host, worker = kv_pair
    to_worker, to_host = (parse_address(server.address)[1] for server in (worker, host))
    with captured(to_worker, to_host) as capture:
        session = whole_session(worker.address, worker.secret, policy, model)
    assert capture.lost == 0
    if policy.keeps != "lossy":
        assert session.tokens == expected_tokens(model)
    up, down = capture.of(session.port, to_worker)
    require_equal(up, down, session.books, "the client's link")
    rows = [Row(**row) for row in session.books["rows"]]
    assert up == frame_bytes(rows, "up")  # type: ignore[arg-type]
    assert down == frame_bytes(rows, "down") + session.books["closing_frame_bytes"]  # type: ignore[arg-type]
    ports = capture.clients_of(to_host)
    assert len(ports) == (policy.shadow == "kvhost")
    for port in ports:
        kv_host = session.books["peer"]["kv_host"]
        assert kv_host["agreed"] and kv_host["peer"]["frame_bytes_by_kind"]["delta"] > 0
        require_equal(*capture.of(port, to_host), kv_host, "the KV host's link")


def test_a_capture_that_missed_a_packet_says_so() -> None:
    stream = Stream(first=0xFFFFFFF0)
    stream.take(0xFFFFFFF0, 32)
    stream.take(0x10, 8)
    stream.take(0x10, 8)  # sent again
    assert stream.payload_bytes == 40
    stream.take(0x30, 1)
    with pytest.raises(AssertionError, match="the capture lacks bytes 40 to 64"):
        _ = stream.payload_bytes
