"""An emulated network in user space: a process between client and worker that holds bytes back as a link would.

Each direction is a line with a serialisation rate and a delay. Bytes enter it when they reached this machine's kernel, one after the
other at the rate, and are due at the far end a delay later. The line is fluid: what is sent is what is due, whatever the reads were.
It holds what a link holds, bandwidth times delay and a little more; when it is full nothing is read, and the sender waits.

The relay ends TCP on both sides: slow start, loss and the round trip of connecting are not in what it emulates (docs/networks.md).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import platform
import select
import socket
import struct
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from semgap.ledger import Direction
from semgap.link import congestion_control, parse_address, tcp_info
from semgap.listen import Signals, address_of, listen, pin
from semgap.network import NetworkError, bits_per_s

QUANTUM_NS = 100_000  # bytes that are due one after the other go together in steps of this much time
INTERVAL_NS = 10_000_000  # of the recorded lateness
_SLACK_NS = 2_000_000  # what a line holds beyond bandwidth x delay
_SLACK_BYTES = 1 << 16
_MOST_HELD_BYTES = 1 << 29  # by a line: 10 Gbit/s for 0.4 s. Each connection has two, and fills them with zeros first
_MAX_READ_BYTES = 1 << 18
_LEAST_QUANTUM_BYTES = 1448  # a packet's payload
_NOMINAL_BITS_PER_S = 1e10  # of a line without a rate, for its size alone
_LEAST_SPIN_NS = 50_000  # a timer wakes at least about this much late
_MOST_SPIN_NS = 500_000
_IDLE_NS = 1_000_000_000
_BUCKETS_PER_OCTAVE = 4
_CONNECT_S = 10.0
_PR_SET_TIMERSLACK = 29
_SLICE_NS = 100_000  # the shortest that Linux grants
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}  # its number among the system calls; sched_getattr's is the next one
_SCHED_ATTR = struct.Struct("IIQiIQQQ")  # size, policy, flags, nice, priority, runtime, deadline, period (linux/sched/types.h)
_SO_TIMESTAMPNS = 35  # asm-generic/socket.h; its control message, too
_STAMP = struct.Struct("qq")
_TCP_INFO_BYTES = 160
_BYTES_RECEIVED, _DATA_SEGMENTS_IN = struct.Struct("Q"), struct.Struct("I")  # at 128 and 152 of struct tcp_info, linux/tcp.h


@dataclass(frozen=True)
class RelayOptions:
    """Where a relay listens, whom it connects to, and what it emulates in each direction. `report`: a file for what it did."""

    to: str
    listen: str = "127.0.0.1:0"
    delay_ms: float = 0.0
    rate: str | None = None
    cpus: tuple[int, ...] = ()
    report: Path | None = None


@dataclass
class Wire:
    """One direction of the emulated link, which all connections share: bytes enter one after the other."""

    delay_ns: int
    bytes_per_ns: float | None
    free_ns: int = 0

    def enter(self, nbytes: int, arrival_ns: int) -> tuple[int, int]:
        """When the first and the last of `nbytes` that arrived are due at the far end."""
        if self.bytes_per_ns is None:
            return arrival_ns + self.delay_ns, arrival_ns + self.delay_ns
        start = max(self.free_ns, arrival_ns)
        self.free_ns = start + math.ceil(nbytes / self.bytes_per_ns)
        return start + self.delay_ns, self.free_ns + self.delay_ns

    @property
    def capacity_bytes(self) -> int:
        """What a line of it may hold: bandwidth x delay, and a little."""
        per_ns = self.bytes_per_ns or _NOMINAL_BITS_PER_S / 8e9
        return int(per_ns * (self.delay_ns + _SLACK_NS)) + _SLACK_BYTES

    @property
    def byte_ns(self) -> int:
        """What a byte takes."""
        return math.ceil(1 / self.bytes_per_ns) if self.bytes_per_ns else 0

    @property
    def quantum_bytes(self) -> int:
        return max(_LEAST_QUANTUM_BYTES, int((self.bytes_per_ns or 0) * QUANTUM_NS))


@dataclass
class Lateness:
    """How much later than due bytes were sent: sends and bytes by interval, direction and bucket, a fourth of an octave wide."""

    counts: dict[tuple[int, Direction, int], list[int]] = field(default_factory=dict)
    max_ns: int = 0

    def add(self, now_ns: int, direction: Direction, late_ns: int, nbytes: int) -> None:
        bucket = math.ceil(_BUCKETS_PER_OCTAVE * math.log2(max(late_ns, 1000) / 1000))
        count = self.counts.setdefault((now_ns // INTERVAL_NS, direction, bucket), [0, 0])
        count[0] += 1
        count[1] += nbytes
        self.max_ns = max(self.max_ns, late_ns)

    def rows(self) -> list[dict[str, Any]]:
        """One row for each bucket in each interval that has sends; a send is at most `late_s` late, at least 1 us."""
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
    """Bytes of one read that are in the line, and when the first and the last of them are due.

    `unsure_ns`: how much earlier the first might have been due. A read's time of arrival is that of its last segment.
    """

    nbytes: int
    first_ns: int
    last_ns: int
    unsure_ns: int


class Line:
    """One direction of one connection: a ring of bytes from `source` that are on their way to `sink`."""

    def __init__(self, source: socket.socket, sink: socket.socket, direction: Direction, wire: Wire, lateness: Lateness) -> None:
        self.source, self.sink, self.direction, self.wire, self.lateness = source, sink, direction, wire, lateness
        self.bytes_in = self.bytes_out = self.held_bytes = self.blocked_ns = 0
        self.stamped = True  # every read had the kernel's time of arrival
        self.ended = self.done = False
        self._ring = memoryview(bytearray(wire.capacity_bytes))
        self._quantum_bytes = wire.quantum_bytes
        self._head = self._used = self._segments_read = 0
        self._pieces: deque[_Piece] = deque()
        self._blocked_ns: int | None = None  # since when the receiver takes no more
        self._floor_ns = 0  # what was read after this arrived no earlier

    @property
    def wants_input(self) -> bool:
        """There is room for a step's worth of bytes."""
        return not self.ended and len(self._ring) - self._used >= self._quantum_bytes

    @property
    def is_blocked(self) -> bool:
        return self._blocked_ns is not None

    def due_ns(self) -> int | None:
        """When something is to be sent next; None while nothing is in the line, or the receiver takes no more."""
        if self.is_blocked or not self._pieces:
            return None
        first = self._pieces[0]
        return min(first.last_ns, first.first_ns + max(QUANTUM_NS, self.wire.byte_ns))

    @property
    def is_near_its_end(self) -> bool:
        """What is in the line is no more than a step's worth: someone may be waiting for just that."""
        return self._used <= self._quantum_bytes

    def take(self, held_up_ns: int = 0) -> None:
        """Reads what there is room for, and sees what is due when. OSError where the connection is gone.

        `held_up_ns`: for how long before now the relay may not have seen that there was something to read.
        """
        got, control, _, _ = self.source.recvmsg_into(self._room(), socket.CMSG_SPACE(_STAMP.size), socket.MSG_DONTWAIT)
        self.ended = got == 0
        arrival = self._arrival_ns(control)
        self.bytes_in += got
        self._used += got
        idle_ns = max(0, arrival - self.wire.free_ns)  # bytes that wait for those before them are none the later
        unsure_ns = min(held_up_ns, idle_ns) if self._reads_of_segments() > 1 else 0
        self._pieces.append(_Piece(got, *self.wire.enter(got, arrival), unsure_ns))

    def _reads_of_segments(self) -> int:
        """Of how many segments this read may be: those that came since the last read, and what may have been left of it."""
        raw = self.source.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        came, bytes_came = _DATA_SEGMENTS_IN.unpack_from(raw, 152)[0], _BYTES_RECEIVED.unpack_from(raw, 128)[0]
        segments, self._segments_read = came - self._segments_read, came - (bytes_came > self.bytes_in)
        return segments

    def _arrival_ns(self, control: list[tuple[int, int, bytes]]) -> int:
        """When the kernel had what was read last (monotonic): a reader that is late delays nothing."""
        now = time.monotonic_ns()
        stamp = next((data for level, kind, data in control if (level, kind) == (socket.SOL_SOCKET, _SO_TIMESTAMPNS)), None)
        if stamp is None:
            self.stamped &= self.ended
            return max(now, self._floor_ns)
        seconds, nanoseconds = _STAMP.unpack(stamp)
        ago = max(0, time.time_ns() - (seconds * 10**9 + nanoseconds))
        self._floor_ns = max(self._floor_ns, now - ago)  # also for the next read: the wall clock may be set
        return self._floor_ns

    def _room(self) -> list[memoryview]:
        size, end = len(self._ring), (self._head + self._used) % len(self._ring)
        free = min(size - self._used, _MAX_READ_BYTES)
        return [self._ring[end : end + free], self._ring[: max(0, end + free - size)]]

    def release(self) -> None:
        """Sends what is due. OSError where the connection is gone."""
        now, due = time.monotonic_ns(), self.due_ns()
        if self._blocked_ns is not None:
            self.blocked_ns += now - self._blocked_ns
            self._floor_ns = max(self._floor_ns, now)  # what waited behind a receiver that took nothing had not entered the link
        elif due is None or due > now:
            return
        waited, self._blocked_ns = self._blocked_ns is not None, None
        wanted = self._due_bytes(now)
        unsure_ns = self._pieces[0].unsure_ns if self._pieces else 0
        used_ns, begin_ns = time.thread_time_ns(), time.monotonic_ns()
        sent = self._send(wanted)
        # A receiver on this core wakes and runs before the send returns: what it computes then is not what the bytes were late.
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

    def describe(self) -> dict[str, Any]:
        """Bytes that came in and went out; of these, those that had waited for the receiver, and for how long; whether the sender ended."""
        since_ns = 0 if self._blocked_ns is None else time.monotonic_ns() - self._blocked_ns
        counts = {"bytes_in": self.bytes_in, "bytes_out": self.bytes_out, "held_bytes": self.held_bytes}
        return counts | {"ended": self.ended, "blocked_s": (self.blocked_ns + since_ns) / 1e9, "kernel_timestamps": self.stamped}


class Connection:
    """A client's connection and the one to the worker that belongs to it."""

    def __init__(self, client: socket.socket, worker: socket.socket, wires: dict[Direction, Wire], lateness: Lateness) -> None:
        self.client, self.worker = client, worker
        for sock in (client, worker):
            sock.settimeout(None)  # or Python itself would wait in calls that are not to
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)  # the client's had it from the listener
            congestion_control(sock, "reno")  # its own hops are no part of what it emulates; a pacing one would be
        up = Line(client, worker, Direction.UP, wires[Direction.UP], lateness)
        down = Line(worker, client, Direction.DOWN, wires[Direction.DOWN], lateness)
        self.lines = (up, down)

    @property
    def is_done(self) -> bool:
        return all(line.done for line in self.lines)

    def close(self, reset: bool) -> dict[str, Any]:
        """Closes both connections, and gives their counts and the kernel's."""
        found: dict[str, Any] = {str(line.direction): line.describe() for line in self.lines}
        for side, sock in (("client", self.client), ("worker", self.worker)):
            found[f"{side}_tcp"] = tcp_info(sock)
            if reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        return found


class Relay:
    """The loop over all connections: one thread, which sleeps until a byte comes or is due."""

    def __init__(self, options: RelayOptions) -> None:
        per_ns = bits_per_s(options.rate) / 8e9 if options.rate else None
        self.options = options
        self.wires = {direction: Wire(int(1e6 * options.delay_ms), per_ns) for direction in Direction}
        held = self.wires[Direction.UP].capacity_bytes
        if held > _MOST_HELD_BYTES:
            raise NetworkError(
                f"a relay of rate {options.rate or 'as it comes'} with a one-way delay of {options.delay_ms:g} ms would hold {held:,} "
                f"bytes each way, it holds at most {_MOST_HELD_BYTES:,}; ask for a lower rate or a shorter delay"
            )
        self.lateness = Lateness()
        self.slice_ns: int | None = None
        self._queue = RunQueue()
        self._looked_ns = time.monotonic_ns()
        self._spin_ns = _LEAST_SPIN_NS
        self.open: list[Connection] = []
        self.ended: list[dict[str, Any]] = []

    def run(self, listener: socket.socket) -> None:
        """Serves until SIGTERM or SIGINT."""
        with Signals() as signals:
            print(json.dumps({"address": address_of(listener), "pid": os.getpid()}), flush=True)
            while not signals.stop:
                self._turn(listener, signals)
        for connection in self.open:
            self.ended.append(connection.close(reset=True))

    def _turn(self, listener: socket.socket, signals: Signals) -> None:
        lines = [line for connection in self.open for line in connection.lines]
        readers = {line.source: line for line in lines if line.wants_input}
        writers = [line.sink for line in lines if line.is_blocked]
        until = self._wake_ns(lines)
        now = time.monotonic_ns()
        readable, writable, _ = select.select([listener, signals.wakeup, *readers], writers, [], max(0, until - now) / 1e9)
        # What came while it was busy with what it had seen before, or wanted to run and others did, may have come that much earlier.
        held_up_ns = now - self._looked_ns + self._queue.waited_ns()
        self._looked_ns = time.monotonic_ns()
        if until > now and not readable and not writable:
            self._learn(time.monotonic_ns() - until)
        if signals.wakeup in readable:
            signals.drain()
        if listener in readable:
            self._accept(listener)
        for connection in list(self.open):
            self._move(connection, [readers[sock] for sock in readable if sock in readers], writable, held_up_ns)

    def _wake_ns(self, lines: list[Line]) -> int:
        """When something is due; where that ends what is in the line, its last part is waited for awake."""
        dues = [due - self._spin_ns * line.is_near_its_end for line in lines if (due := line.due_ns()) is not None]
        return min(dues, default=time.monotonic_ns() + _IDLE_NS)

    def _learn(self, late_ns: int) -> None:
        """Has the next sleeps end earlier by what the last ones were late, which depends on how deeply this machine sleeps."""
        self._spin_ns = min(_MOST_SPIN_NS, max(_LEAST_SPIN_NS, late_ns, self._spin_ns - self._spin_ns // 8))

    def _move(self, connection: Connection, readable: list[Line], writable: list[socket.socket], held_up_ns: int) -> None:
        try:
            for line in connection.lines:
                if line in readable:
                    with contextlib.suppress(BlockingIOError):
                        line.take(held_up_ns)
                if not line.is_blocked or line.sink in writable:
                    line.release()
        except OSError as error:
            print(f"semgap relay: a connection broke: {error}", file=sys.stderr, flush=True)
            self._end(connection, reset=True)
            return
        if connection.is_done:
            self._end(connection, reset=False)

    def _end(self, connection: Connection, reset: bool) -> None:
        self.open.remove(connection)
        self.ended.append(connection.close(reset))

    def _accept(self, listener: socket.socket) -> None:
        client, peer = listener.accept()
        try:
            worker = socket.create_connection(parse_address(self.options.to), timeout=_CONNECT_S)
        except OSError as error:
            print(f"semgap relay: {peer} is turned away, {self.options.to} does not answer: {error}", file=sys.stderr, flush=True)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
            return
        self.open.append(Connection(client, worker, self.wires, self.lateness))

    def report(self, begin_s: float) -> dict[str, Any]:
        """What it did: connections in the order of their ends, lateness, its slice of its core, CPU time and the time that it ran for."""
        return {
            "delay_ms": self.options.delay_ms,
            "rate": self.options.rate,
            "capacity_bytes": self.wires[Direction.UP].capacity_bytes,
            "connections": self.ended,
            "max_lateness_s": self.lateness.max_ns / 1e9,
            "slice_s": self.slice_ns and self.slice_ns / 1e9,
            "run_queue_s": self._queue.total_s,
            "lateness": self.lateness.rows(),
            "cpu_s": time.process_time(),
            "wall_s": time.monotonic() - begin_s,
        }


class RunQueue:
    """For how long this thread wanted to run and others did, by the scheduler's count (/proc/self/schedstat)."""

    def __init__(self) -> None:
        try:
            self._file: int | None = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        except FileNotFoundError:
            self._file = None
        self._begin_ns = self._last_ns = self._read_ns()

    def waited_ns(self) -> int:
        """Since it was asked last; 0 where the kernel keeps no count."""
        before_ns, self._last_ns = self._last_ns, self._read_ns()
        return self._last_ns - before_ns

    @property
    def total_s(self) -> float | None:
        """Since it was made; None where the kernel keeps no count."""
        return None if self._file is None else (self._read_ns() - self._begin_ns) / 1e9

    def _read_ns(self) -> int:
        return 0 if self._file is None else int(os.pread(self._file, 100, 0).split()[1])


def take_short_slices() -> int | None:
    """Has the scheduler let this process in as soon as it wakes, whoever computes on its core; gives the slice in force (ns).

    A process that computes is let run to the end of its slice, some milliseconds, unless the one that wakes has a shorter slice (EEVDF
    since Linux 6.12). None where the kernel knows no slices, and under another scheduling policy, which stays. Needs no rights.
    """
    call = _SCHED_SETATTR.get(platform.machine())
    if call is None or os.sched_getscheduler(0) != os.SCHED_OTHER:  # another policy (chrt) was somebody's choice
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    wanted = _SCHED_ATTR.pack(_SCHED_ATTR.size, os.SCHED_OTHER, 0, nice, 0, _SLICE_NS, 0, 0)
    if libc.syscall(call, 0, wanted, 0):
        return None
    found = ctypes.create_string_buffer(_SCHED_ATTR.size)
    if libc.syscall(call + 1, 0, found, _SCHED_ATTR.size, 0):
        return None
    return _SCHED_ATTR.unpack(found.raw)[5] or None


def relay(options: RelayOptions) -> None:
    """Relays until SIGTERM. Prints one line of JSON, {"address": ...}, once clients can connect, and at its end writes its report."""
    parse_address(options.to)
    if options.report and not options.report.parent.is_dir():
        raise NetworkError(f"--report {options.report}: there is no directory {options.report.parent}; make it first")
    running = Relay(options)
    begin_s = time.monotonic()
    listener = listen(options.listen, has_secret=False, way_out="a relay asks for none: have it listen on 127.0.0.1")
    if options.cpus:
        pin(options.cpus)
    running.slice_ns = take_short_slices()
    # Exact timers: the default slack of 50 us is as much as a short delay.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    listener.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    running.run(listener)
    if options.report:
        options.report.write_text(json.dumps(running.report(begin_s)))
