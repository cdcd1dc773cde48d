"""Channels between sessions and their engine: whole messages in order, and no waiting for who does not read."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import numpy as np
import pytest

from semgap.engine.weights import Weights
from semgap.kv.pool import KVBudgetError, KVShape
from semgap.policy import Batching
from semgap.tensors import DType
from semgap.wire.messages import Call, Gained, WeightSpec
from semgap.worker.engine_channel import AskBatches, Calls, Channel, FromEngine, FromSession, Gone, Stepped, Welcome
from semgap.worker.engine_founding import EngineSpec, digests_of, kv_blocks, read_founding, write_founding
from semgap.worker.engine_members import Members

WELCOME = Welcome(1, 0.5, 64)
STEP = Stepped((Gained(7, 1000, True),), tuple(range(60_000, 61_000)))


def _pair() -> tuple[Channel[FromSession], Channel[FromEngine]]:
    """The engine's end and the session's."""
    ours, theirs = socket.socketpair()
    return Channel(ours, FromSession), Channel(theirs, FromEngine)


@pytest.fixture
def intake() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The engine's end of the socket by which sessions come, and the listening process's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def test_a_message_longer_than_the_socket_holds_arrives_whole() -> None:
    engine, session = _pair()
    ids = np.arange(1 << 20, dtype=np.uint32).tobytes()
    sent, came = Calls((Call(1, 0, 1 << 20, most=1 << 20),), ids), []
    session.send(sent)
    assert session.unsent
    while not came:
        came = engine.receive()
        session.flush()
    assert came == [sent]


def test_messages_that_arrive_together_are_given_in_order() -> None:
    engine, session = _pair()
    sent = [AskBatches(), Calls((Call(1, 0),), b""), AskBatches()]
    for message in sent:
        session.send(message)
    assert engine.receive() == sent and engine.receive() == []


def test_a_closed_end_shows_after_what_it_said() -> None:
    engine, session = _pair()
    session.send(AskBatches())
    session.close()
    assert engine.receive() == [AskBatches()]
    with pytest.raises(Gone):
        engine.receive()
    with pytest.raises(Gone):
        engine.send(WELCOME)


def test_a_session_that_reads_nothing_holds_up_neither_the_engine_nor_another_and_loses_nothing(
    intake: tuple[socket.socket, socket.socket],
) -> None:
    (slow, slow_session), (quick, quick_session) = _pair(), _pair()
    members = Members(slow, intake[0], WELCOME)
    socket.send_fds(intake[1], [b"."], [quick.sock.fileno()])
    list(members.events(members.wait(1.0)))
    for _ in range(500):
        members.send(1, STEP)
        members.send(2, STEP)
        assert STEP in quick_session.next()
    assert slow.unsent
    came = slow_session.receive()
    while len(came) < 501:
        list(members.events(members.wait(1.0)))
        came += slow_session.receive()
    assert came == [WELCOME, *[STEP] * 500]


def test_a_session_that_leaves_is_told_once_and_the_last_one_closes_the_intake(intake: tuple[socket.socket, socket.socket]) -> None:
    engine, session = _pair()
    members = Members(engine, intake[0], WELCOME)
    session.send(AskBatches())
    session.close()
    seen = []
    while members.count:
        seen += members.events(members.wait(1.0))
    assert seen == [(1, AskBatches()), (1, None)]
    members.send_all(WELCOME)  # to nobody
    with pytest.raises(OSError):
        socket.send_fds(intake[1], [b"."], [0])


@pytest.mark.parametrize("seen", [1, 2])
def test_who_comes_while_the_last_one_leaves_is_served(intake: tuple[socket.socket, socket.socket], seen: int) -> None:
    (first, first_session), (second, second_session) = _pair(), _pair()
    members = Members(first, intake[0], WELCOME)
    first_session.close()
    sockets = members.wait(1.0) if seen == 1 else []  # sees the end alone, or who comes too
    socket.send_fds(intake[1], [b"."], [second.sock.fileno()])
    sockets = sockets or members.wait(1.0)
    assert len(sockets) == seen
    assert list(members.events(sockets)) == [(1, None)]
    assert members.count == 1 and second_session.next() == [WELCOME]
    second_session.send(AskBatches())
    assert list(members.events(members.wait(1.0))) == [(2, AskBatches())]


def _spec(**more: object) -> EngineSpec:
    weights = (WeightSpec("a", DType.F32, (3, 5)), WeightSpec("b", DType.F32, (7,)))
    defaults: dict = {"model": {"x": 1, "y": 2}, "weights": weights, "dtype": "float32", "device": "cpu", "executor": "fused"}
    return EngineSpec(**(defaults | {"threads": 1, "max_length": 64, "batching": Batching(), "kv_blocks": 4} | more))


def test_a_founding_file_gives_the_spec_and_the_weights() -> None:
    spec, weights = _spec(), Weights(_spec().weights, "cpu")
    for number, array in enumerate(weights.arrays().values()):
        array[:] = number + np.arange(array.size).reshape(array.shape)
    read, copied = read_founding(write_founding(spec, weights))
    assert read == spec
    assert digests_of(copied) == digests_of(weights)


def test_the_key_of_an_engine_depends_on_weights_and_options_and_not_on_the_order_of_a_config() -> None:
    digests = [b"d" * 16, b"e" * 16]
    key = _spec().key(digests)
    assert key == _spec(model={"y": 2, "x": 1}).key(digests)
    others = [
        _spec(model={"x": 1, "y": 3}),
        _spec(kv_blocks=5),
        _spec(threads=2),
        _spec(max_length=32),
        _spec(batching=Batching(merges="all")),
    ]
    assert len({key, _spec().key(digests[::-1]), *(other.key(digests) for other in others)}) == 7


def test_kv_blocks_hold_whole_requests_or_are_refused() -> None:
    shape = KVShape(layers=2, heads=2, max_length=100, head_dim=8)
    assert [kv_blocks(shape, 1, 1.0), kv_blocks(shape, 8, 1.0), kv_blocks(shape, 8, 0.5)] == [2, 16, 8]
    with pytest.raises(KVBudgetError, match="1 blocks of 64 positions is less than one request of 100 positions needs, 2"):
        kv_blocks(shape, 1, 0.5)
