"""One direction of an emulated link: holds bytes until they are due, and records how late they leave."""

import math
import socket
import struct
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from semgap.wire.ledger import Direction

QUANTUM_NS = 100_000  # bytes due within this time leave together
INTERVAL_NS = 10_000_000  # of one row of recorded lateness
_SLACK_NS = 2_000_000  # capacity beyond bandwidth x delay
_SLACK_BYTES = 1 << 16
MOST_HELD_BYTES = 1 << 29  # in a line: 10 Gbit/s for 0.4 s. Each connection fills two with zeros first
_MAX_READ_BYTES = 1 << 18
_LEAST_QUANTUM_BYTES = 1448  # a packet's payload
_NOMINAL_BITS_PER_S = 1e10  # sets the capacity of a line without a rate
_BUCKETS_PER_OCTAVE = 4
SO_TIMESTAMPNS = 35  # asm-generic/socket.h; also of its control message
_STAMP = struct.Struct("qq")
_SAME_TIME_NS, _TRIES = 10_000, 5  # two clocks read within this were read at the same time
_TCP_INFO_BYTES = 160
_BYTES_RECEIVED, _DATA_SEGMENTS_IN = struct.Struct("Q"), struct.Struct("I")  # at 128 and 152 of struct tcp_info, linux/tcp.h


@dataclass
class SharedLine:
    """The schedule of one direction of the link. All connections share it: bytes enter one after the other."""

    delay_ns: int
    bytes_per_ns: float | None
    free_ns: int = 0

    def enter(self, nbytes: int, arrival_ns: int) -> tuple[int, int]:
        """Due times at the far end of the first and the last of `nbytes`."""
        if self.bytes_per_ns is None:
            return arrival_ns + self.delay_ns, arrival_ns + self.delay_ns
        start = max(self.free_ns, arrival_ns)
        self.free_ns = start + math.ceil(nbytes / self.bytes_per_ns)
        return start + self.delay_ns, self.free_ns + self.delay_ns

    @property
    def capacity_bytes(self) -> int:
        """Capacity of each connection's line: bandwidth x delay, and some slack."""
        per_ns = self.bytes_per_ns or _NOMINAL_BITS_PER_S / 8e9
        return int(per_ns * (self.delay_ns + _SLACK_NS)) + _SLACK_BYTES

    @property
    def byte_ns(self) -> int:
        """Time that one byte takes."""
        return math.ceil(1 / self.bytes_per_ns) if self.bytes_per_ns else 0

    @property
    def quantum_bytes(self) -> int:
        return max(_LEAST_QUANTUM_BYTES, int((self.bytes_per_ns or 0) * QUANTUM_NS))


@dataclass
class Lateness:
    """Lateness of sends: sends and bytes by interval, direction and bucket (a fourth of an octave wide)."""

    counts: dict[tuple[int, Direction, int], list[int]] = field(default_factory=dict)
    max_ns: int = 0

    def add(self, now_ns: int, direction: Direction, late_ns: int, nbytes: int) -> None:
        bucket = math.ceil(_BUCKETS_PER_OCTAVE * math.log2(max(late_ns, 1000) / 1000))
        count = self.counts.setdefault((now_ns // INTERVAL_NS, direction, bucket), [0, 0])
        count[0] += 1
        count[1] += nbytes
        self.max_ns = max(self.max_ns, late_ns)

    def rows(self) -> list[dict[str, Any]]:
        """One row for each bucket with sends in each interval; a send is at most `late_s` late, at least 1 us."""
        return [
            {
                "t_s": interval * INTERVAL_NS / 1e9,
                "direction": str(direction),
                "late_s": 1e-6 * 2 ** (bucket / _BUCKETS_PER_OCTAVE),
                "sends": sends,
                "bytes": nbytes,
            }
            for (interval, direction, bucket), (sends, nbytes) in sorted(self.counts.items())
        ]


@dataclass(slots=True)
class _Piece:
    """Bytes of one read in the line, and the due times of the first and the last.

    `unsure_ns`: the first may have been due this much earlier. A read's arrival is that of its last segment.
    """

    nbytes: int
    first_ns: int
    last_ns: int
    unsure_ns: int


class DelayLine:
    """One direction of one connection: a ring buffer of bytes on their way from `source` to `sink`."""

    def __init__(self, source: socket.socket, sink: socket.socket, direction: Direction, shared: SharedLine, lateness: Lateness) -> None:
        self.source, self.sink, self.direction, self.shared, self.lateness = source, sink, direction, shared, lateness
        self.bytes_in = self.bytes_out = self.held_bytes = self.blocked_ns = 0
        self.stamped = True  # the kernel gave every read's arrival
        self.ended = self.done = False
        self._ring = memoryview(bytearray(shared.capacity_bytes))
        self._quantum_bytes = shared.quantum_bytes
        self._head = self._used = self._segments_read = 0
        self._pieces: deque[_Piece] = deque()
        self._blocked_ns: int | None = None  # since when the receiver takes nothing
        self._floor_ns = 0  # later reads arrived no earlier

    @property
    def wants_input(self) -> bool:
        """True if there is room for a quantum of bytes."""
        return not self.ended and len(self._ring) - self._used >= self._quantum_bytes

    @property
    def is_blocked(self) -> bool:
        return self._blocked_ns is not None

    def due_ns(self) -> int | None:
        """Time of the next send, or None if the line is empty or the receiver takes nothing."""
        if self.is_blocked or not self._pieces:
            return None
        first = self._pieces[0]
        return min(first.last_ns, first.first_ns + max(QUANTUM_NS, self.shared.byte_ns))

    @property
    def is_near_its_end(self) -> bool:
        """True if the line holds at most a quantum: somebody may be waiting for just these bytes."""
        return self._used <= self._quantum_bytes

    def take(self, held_up_ns: int = 0) -> None:
        """Reads into the free room and computes due times. OSError if the connection is gone.

        `held_up_ns`: the bytes may have waited this long before the relay looked.
        """
        got, control, _, _ = self.source.recvmsg_into(self._room(), socket.CMSG_SPACE(_STAMP.size), socket.MSG_DONTWAIT)
        self.ended = got == 0
        arrival = self._arrival_ns(control)
        self.bytes_in += got
        self._used += got
        idle_ns = max(0, arrival - self.shared.free_ns)  # a busy link had delayed the bytes anyway
        unsure_ns = min(held_up_ns, idle_ns) if self._segments_in_read() > 1 else 0
        self._pieces.append(_Piece(got, *self.shared.enter(got, arrival), unsure_ns))

    def _segments_in_read(self) -> int:
        """Segments that this read may span: those since the last read, and one that the last read may have left in part."""
        raw = self.source.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        came, bytes_came = _DATA_SEGMENTS_IN.unpack_from(raw, 152)[0], _BYTES_RECEIVED.unpack_from(raw, 128)[0]
        segments, self._segments_read = came - self._segments_read, came - (bytes_came > self.bytes_in)
        return segments

    def _arrival_ns(self, control: list[tuple[int, int, bytes]]) -> int:
        """Arrival of the last read at the kernel (monotonic): a late reader delays nothing."""
        now, wall_ns = _both_clocks_ns()
        stamp = next((data for level, kind, data in control if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPNS)), None)
        if stamp is None:
            self.stamped &= self.ended
            return max(now, self._floor_ns)
        seconds, nanoseconds = _STAMP.unpack(stamp)
        ago = max(0, wall_ns - (seconds * 10**9 + nanoseconds))
        self._floor_ns = max(self._floor_ns, now - ago)  # the wall clock may be set back
        return self._floor_ns

    def _room(self) -> list[memoryview]:
        size, end = len(self._ring), (self._head + self._used) % len(self._ring)
        free = min(size - self._used, _MAX_READ_BYTES)
        return [self._ring[end : end + free], self._ring[: max(0, end + free - size)]]

    def release(self) -> None:
        """Sends the due bytes. OSError if the connection is gone."""
        now, due = time.monotonic_ns(), self.due_ns()
        if self._blocked_ns is not None:
            self.blocked_ns += now - self._blocked_ns
            self._floor_ns = max(self._floor_ns, now)  # bytes that waited for the receiver had not entered the link
        elif due is None or due > now:
            return
        waited, self._blocked_ns = self._blocked_ns is not None, None
        wanted = self._due_bytes(now)
        unsure_ns = self._pieces[0].unsure_ns if self._pieces else 0
        used_ns, begin_ns = time.thread_time_ns(), time.monotonic_ns()
        sent = self._send(wanted)
        # A receiver on this core may run before the send returns: the time that it computes is no lateness.
        sent_ns = begin_ns + time.thread_time_ns() - used_ns
        self._drop(sent)
        if sent < wanted:
            self._blocked_ns = now
        if waited:
            self.held_bytes += sent
        elif sent:
            assert due is not None
            self.lateness.add(sent_ns, self.direction, max(0, sent_ns - due) + unsure_ns, sent)
        self._pass_on_the_end(now)

    def _due_bytes(self, now: int) -> int:
        wanted = 0
        for piece in self._pieces:
            if piece.last_ns > now:
                if piece.first_ns < now:
                    wanted += piece.nbytes * (now - piece.first_ns) // (piece.last_ns - piece.first_ns)
                break
            wanted += piece.nbytes
        return wanted

    def _send(self, count: int) -> int:
        if not count:
            return 0
        over = max(0, self._head + count - len(self._ring))
        try:
            return self.sink.sendmsg([self._ring[self._head : self._head + count - over], self._ring[:over]], [], socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0

    def _drop(self, count: int) -> None:
        self.bytes_out += count
        self._used -= count
        self._head = (self._head + count) % len(self._ring)
        while count and self._pieces:
            piece = self._pieces[0]
            if piece.nbytes > count:
                piece.first_ns += (piece.last_ns - piece.first_ns) * count // piece.nbytes
                piece.nbytes -= count
                return
            count -= piece.nbytes
            self._pieces.popleft()

    def _pass_on_the_end(self, now: int) -> None:
        while self._pieces and self._pieces[0].nbytes == 0 and self._pieces[0].last_ns <= now:
            self._pieces.popleft()
        if self.ended and not self._pieces and not self.done:
            self.done = True
            self.sink.shutdown(socket.SHUT_WR)

    def counts(self) -> dict[str, Any]:
        """Bytes in and out; bytes held back by the receiver, and for how long; whether the sender ended."""
        since_ns = 0 if self._blocked_ns is None else time.monotonic_ns() - self._blocked_ns
        counts = {"bytes_in": self.bytes_in, "bytes_out": self.bytes_out, "held_bytes": self.held_bytes}
        return counts | {"ended": self.ended, "blocked_s": (self.blocked_ns + since_ns) / 1e9, "kernel_timestamps": self.stamped}


def _both_clocks_ns() -> tuple[int, int]:
    """Monotonic and wall clock at the same time: of a few tries the closest. A thread held up in between would mistake a stamp's age."""
    closest = (1 << 62, 0, 0)
    for _ in range(_TRIES):
        before, wall_ns, now = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        closest = min(closest, (now - before, now, wall_ns))
        if closest[0] < _SAME_TIME_NS:
            break
    return closest[1:]
