"""The ledger equals the other side's and the kernel's counts to the byte, or names the difference."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import msgspec
import pytest

from semgap import codecs
from semgap.client.probe import ping
from semgap.policy import SessionSpec
from semgap.tensors import DType, TensorClass
from semgap.wire import frames, messages
from semgap.wire.handshake import shake_hands_as_client, shake_hands_as_worker
from semgap.wire.ledger import (
    HEADER_CLASS,
    Direction,
    Ledger,
    LedgerError,
    LinkKind,
    Row,
    compare_ledgers,
    compare_with_kernel,
    frame_bytes,
)
from semgap.wire.link import Link
from semgap.wire.messages import Kind, Operation, TensorHeader
from semgap.wire.reconcile import reconcile
from semgap.wire.tcp import Timeouts
from semgap.worker.session import Resources, Session
from semgap.worker.weight_store import WeightStore

SECRET = b"s" * 64


@pytest.fixture
def session(tcp_pair) -> Iterator[tuple[Link, Session]]:  # type: ignore[no-untyped-def]
    """A client's link, and the session that serves it from a thread of this process, over loopback TCP."""
    client, link = (Link(sock, way, Timeouts(5.0, 5.0)) for sock, way in zip(tcp_pair, (Direction.UP, Direction.DOWN), strict=True))
    served = Session(link, "cpu", 1, Resources(WeightStore(1 << 20)))

    def serve() -> None:
        shake_hands_as_worker(link, SECRET, served.grant)
        try:
            served.run()
        except frames.WireError:
            link.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    shake_hands_as_client(client, SECRET, msgspec.to_builtins(SessionSpec()))
    client.limits = frames.Limits()
    yield client, served
    client.close()
    thread.join(10)


def _frame(direction: Direction, nbytes: int, kind: Kind = Kind.SETUP, ledger: Ledger | None = None) -> Ledger:
    ledger = ledger or Ledger()
    head = TensorHeader(TensorClass.LOGITS, 1, DType.F32, (nbytes // 2,), nbytes)
    ledger.count_frame(direction, Operation.FORWARD, kind, [head], 40)
    return ledger


def test_both_ledgers_and_both_kernels_agree_after_a_real_session(session: tuple[Link, Session]) -> None:
    client, _ = session
    for size in (0, 1, 70_000, 3_000_000):
        ping(client, size, size // 2)
    books = reconcile(client)
    client_rows = msgspec.convert(books["rows"], list[Row])
    worker_rows = msgspec.convert(books["peer_rows"], list[Row])
    assert {row.key: row.counted for row in client_rows} == {row.key: row.counted for row in worker_rows}
    up = frame_bytes(client_rows, Direction.UP)
    assert up == books["peer_tcp"]["bytes_received"] == books["tcp"]["bytes_sent"] - books["tcp"]["bytes_retrans"]
    assert books["tcp"]["bytes_received"] == frame_bytes(client_rows, Direction.DOWN) + books["closing_frame_bytes"]


def test_the_counters_keep_kinds_apart_and_hold_no_delta_where_nothing_was_missing(session: tuple[Link, Session]) -> None:
    client, _ = session
    client.request(Operation.PING, messages.Ping((), 1000), kind=Kind.REGULAR)
    ping(client, 0, 10)
    books = reconcile(client)
    by_kind = books["peer"]["frame_bytes_by_kind"]
    regular = [row for row in books["peer_rows"] if row["kind"] == "regular"]
    assert by_kind["delta"] == 0
    assert by_kind["regular"] == sum(row["payload_bytes"] + row["header_bytes"] for row in regular)
    assert sum(row["payload_bytes"] for row in regular) == 1000
    assert {row["operation"] for row in regular} == {"ping"}
    handshake = [row for row in books["peer_rows"] if row["operation"] == "hello"]
    assert {row["direction"]: row["frames"] for row in handshake} == {"up": 2, "down": 2}


def test_a_frame_that_the_kernel_did_not_send_fails_the_trial_by_name(session: tuple[Link, Session]) -> None:
    client, _ = session
    _frame(Direction.UP, 64, Kind.REGULAR, client.ledger)
    with pytest.raises(LedgerError) as error:
        reconcile(client)
    assert "up/forward/regular/header: client (frames, tensor, payload, header bytes) (1, 0, 0, 40), worker None" in str(error.value)
    assert "up/forward/regular/logits" in str(error.value)


def test_a_frame_written_behind_the_ledgers_back_fails_the_trial_by_name(session: tuple[Link, Session]) -> None:
    client, _ = session
    client._sequence += 1
    client._packed_frames += 1
    client.sock.sendall(frames.pack(Operation.PING, Kind.REGULAR, 0, client._sequence, messages.Ping((), 500), []))
    client._receiver.receive(5.0, 5.0)
    with pytest.raises(LedgerError) as error:
        reconcile(client)
    assert "down/ping/regular/control: client (frames, tensor, payload, header bytes) None, worker (0, 500, 500, 0)" in str(error.value)


def test_a_frame_that_the_worker_counted_twice_fails_the_trial(session: tuple[Link, Session]) -> None:
    client, served = session
    ping(client, 8, 8)
    head = TensorHeader(TensorClass.CONTROL, 0, DType.U8, (8,), 8)
    served.link.ledger.count_frame(Direction.DOWN, Operation.PING, Kind.SETUP, [head], 50)
    with pytest.raises(LedgerError, match="down/ping/setup/header"):
        reconcile(client)


def test_bytes_that_neither_ledger_saw_are_seen_by_the_kernels(session: tuple[Link, Session]) -> None:
    client, served = session
    ping(client, 8, 8)
    served.link.sock.sendall(b"12345")
    assert client.sock.recv(5) == b"12345"
    with pytest.raises(LedgerError, match=r"the worker's ledger and its kernel differ: sent: ledger \d+, kernel \d+") as error:
        reconcile(client)
    ledger, kernel = (int(part.rsplit(" ", 1)[1]) for part in str(error.value).split(": sent: ")[1].split(", "))
    assert kernel - ledger == 5


def test_the_kernel_check_names_each_direction_that_is_wrong() -> None:
    rows = _frame(Direction.UP, 60, ledger=_frame(Direction.DOWN, 30)).copy_rows()
    compare_with_kernel("client", rows, Direction.UP, {"bytes_sent": 107, "bytes_retrans": 7, "bytes_received": 70})
    compare_with_kernel("worker", rows, Direction.DOWN, {"bytes_sent": 70, "bytes_retrans": 0, "bytes_received": 100})
    with pytest.raises(LedgerError, match=r"client's ledger.*sent: ledger 100, kernel 101; received: ledger 70, kernel 69"):
        compare_with_kernel("client", rows, Direction.UP, {"bytes_sent": 101, "bytes_retrans": 0, "bytes_received": 69})


def test_a_frame_is_counted_by_class_before_and_after_its_codec() -> None:
    ledger = Ledger()
    heads = [TensorHeader(TensorClass.LOGITS, 1, DType.F32, (10,), 20), TensorHeader(TensorClass.KV, 0, DType.F32, (3,), 12)]
    ledger.count_frame(Direction.DOWN, Operation.FORWARD, Kind.REGULAR, heads, 50)
    ledger.count_codec(Direction.DOWN, Operation.FORWARD, Kind.REGULAR, TensorClass.LOGITS, decode_ns=7)
    ledger.count_round_trip(Direction.UP, Operation.FORWARD, Kind.REGULAR)
    rows = {row.tensor_class: row for row in ledger.copy_rows() if row.direction == "down"}
    assert rows["logits"].counted == (0, 40, 20, 0) and rows["logits"].decode_ns == 7
    assert rows["kv"].counted == (0, 12, 12, 0)
    assert rows[HEADER_CLASS].counted == (1, 0, 0, 50)
    assert (ledger.down.tensor, ledger.down.payload, ledger.down.frame, ledger.down.frames) == (52, 32, 82, 1)
    assert ledger.up.frame == 0 and ledger.round_trips == 1


def test_copies_over_pcie_are_apart_from_the_network() -> None:
    ledger = _frame(Direction.UP, 60)
    ledger.count_copy(Direction.UP, Operation.FORWARD, Kind.REGULAR, TensorClass.KV, 999)
    assert frame_bytes(ledger.copy_rows(), Direction.UP) == 100
    assert [row.payload_bytes for row in ledger.copy_rows() if row.link is LinkKind.PCIE] == [999]
    compare_ledgers(ledger.copy_rows(), _frame(Direction.UP, 60).copy_rows())


def test_rows_that_were_copied_do_not_change_later() -> None:
    ledger = _frame(Direction.UP, 60)
    before = ledger.copy_rows()
    _frame(Direction.UP, 60, ledger=ledger)
    assert frame_bytes(before, Direction.UP) == 100 and frame_bytes(ledger.copy_rows(), Direction.UP) == 200


def test_a_kind_told_differently_by_the_two_sides_is_a_difference() -> None:
    with pytest.raises(LedgerError, match=r"up/forward/delta/logits.*worker None"):
        compare_ledgers(_frame(Direction.UP, 8, Kind.DELTA).copy_rows(), _frame(Direction.UP, 8, Kind.REGULAR).copy_rows())


def test_what_crosses_in_a_codec_is_counted_as_the_codec_left_it() -> None:
    import numpy as np

    from semgap.tensors import Tensor

    encoded = codecs.encode(Tensor.from_numpy(np.zeros(1000, np.float32), TensorClass.LOGITS), "fp16_zlib")
    (head,) = frames.tensor_headers([encoded])
    assert head.tensor_bytes == 4000 and head.nbytes == sum(buffer.nbytes for buffer in encoded.buffers) < 100
