"""Waiting for descriptors: above the number that select knows, to the microsecond, and through signals."""

import os
import resource
import signal
import socket
import time
from collections.abc import Iterator

import pytest

from semgap.wire.frames import Limits
from semgap.wire.receive import Receiver
from semgap.wire.waiting import Watch, ready

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def far_pair() -> Iterator[Pair]:
    """Two connected sockets; the first one's descriptor is above 1,023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2048)), hard))
    near, other = socket.socketpair()
    with near, other, socket.socket(fileno=os.dup2(near.fileno(), 1500)) as far:
        yield far, other
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_descriptor_beyond_selects_is_waited_for(far_pair: Pair) -> None:
    far, other = far_pair
    receiver = Receiver(far, Limits())
    assert ready([far], timeout_s=0) == ([], []) == ([], Watch([far]).ready(0))
    assert not receiver.has_input()
    assert ready([far], [far], 5) == ([], [far])
    other.send(b".")
    assert ready([far], [far], 5) == ([far], [far])
    assert ready([other, far]) == ([far], [])
    assert Watch([other, far]).ready() == [far]
    assert receiver.has_input()


def test_an_end_is_something_to_read_and_a_closed_socket_an_error() -> None:
    one, other = socket.socketpair()
    other.close()
    assert ready([one], timeout_s=5) == ([one], [])
    one.close()
    with pytest.raises(ValueError, match="closed socket"):
        ready([one])


def test_a_wait_is_not_cut_short_by_a_signal_or_rounded_to_nothing() -> None:
    heard: list[int] = []
    one, other = socket.socketpair()
    before = signal.signal(signal.SIGALRM, lambda number, _: heard.append(number))
    with one, other:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        begin = time.monotonic()
        assert ready([one], timeout_s=0.0505) == ([], [])
        assert time.monotonic() - begin >= 0.0505
    signal.signal(signal.SIGALRM, before)
    assert heard == [signal.SIGALRM]
