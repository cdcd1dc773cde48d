"""An emulated network in user space: a process between client and worker that delays bytes as a link would.

Each direction is a line with a serialisation rate and a delay. Bytes enter it when they reach this machine's kernel, one after the
other at the rate, and are due at the far end a delay later. The line is fluid: the relay sends the due bytes, whatever it read at once.
A line holds bandwidth times delay and a little more, as a link does; when it is full, the relay reads nothing and the sender waits.

The relay ends TCP on both sides: it emulates neither slow start nor loss nor the round trip of connecting (docs/networks.md).
"""

import contextlib
import ctypes
import json
import os
import platform
import socket
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semgap.network.delay_line import MOST_HELD_BYTES, SO_TIMESTAMPNS, DelayLine, Lateness, SharedLine
from semgap.network.spec import NetworkError, bits_per_s
from semgap.wire.handshake import turn_away
from semgap.wire.ledger import Direction
from semgap.wire.listen import PAUSE_S, Signals, accepted, address_of, listen, pin
from semgap.wire.tcp import congestion_control, parse_address, tcp_info
from semgap.wire.waiting import ready

_NAME = "semgap relay"
_LEAST_SPIN_NS = 50_000  # a timer wakes at least about this late
_MOST_SPIN_NS = 500_000
_IDLE_NS = 1_000_000_000
_CONNECT_S = 10.0
_PR_SET_TIMERSLACK = 29
_SLICE_NS = 100_000  # the shortest that Linux grants
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}  # system call numbers; sched_getattr is the next one
_SCHED_ATTR = struct.Struct("IIQiIQQQ")  # size, policy, flags, nice, priority, runtime, deadline, period (linux/sched/types.h)


@dataclass(frozen=True)
class RelayOptions:
    """The worker's address (`to`), the relay's own, and the link to emulate in each direction. `report`: file for `Relay.report`."""

    to: str
    listen: str = "127.0.0.1:0"
    delay_ms: float = 0.0
    rate: str | None = None
    cpus: tuple[int, ...] = ()
    report: Path | None = None
    max_connections: int = 64


class Connection:
    """A client's connection to the relay, and the relay's own to the worker."""

    def __init__(self, client: socket.socket, worker: socket.socket, shared: dict[Direction, SharedLine], lateness: Lateness) -> None:
        self.client, self.worker = client, worker
        for sock in (client, worker):
            sock.settimeout(None)  # with a timeout Python waits even in MSG_DONTWAIT calls
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)  # the client's inherited it from the listener
            congestion_control(sock, "reno")  # a pacing algorithm on the relay's own hops would add delay
        up = DelayLine(client, worker, Direction.UP, shared[Direction.UP], lateness)
        down = DelayLine(worker, client, Direction.DOWN, shared[Direction.DOWN], lateness)
        self.lines = (up, down)

    @property
    def is_done(self) -> bool:
        return all(line.done for line in self.lines)

    def close(self, reset: bool) -> dict[str, Any]:
        """Closes both connections; gives their counts and the kernel's."""
        found: dict[str, Any] = {str(line.direction): line.counts() for line in self.lines}
        for side, sock, line in (("client", self.client, self.lines[0]), ("worker", self.worker, self.lines[1])):
            found[f"{side}_tcp"] = tcp_info(sock)
            found[str(line.direction)]["ended"] |= _is_at_its_end(sock)  # after the kernel's count, which may hold the end
            if reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        return found


def _is_at_its_end(sock: socket.socket) -> bool:
    """True if the peer has ended and nothing is left to read; the relay may not have come to read it."""
    try:
        return not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError:
        return False


class Relay:
    """The loop over all connections: one thread that sleeps until a byte arrives or is due."""

    def __init__(self, options: RelayOptions) -> None:
        per_ns = bits_per_s(options.rate) / 8e9 if options.rate else None
        self.options = options
        self.shared = {direction: SharedLine(int(1e6 * options.delay_ms), per_ns) for direction in Direction}
        held = self.shared[Direction.UP].capacity_bytes
        if held > MOST_HELD_BYTES:
            raise NetworkError(
                f"a relay of rate {options.rate or 'as it comes'} with a one-way delay of {options.delay_ms:g} ms would hold {held:,} "
                f"bytes each way, it holds at most {MOST_HELD_BYTES:,}; ask for a lower rate or a shorter delay"
            )
        self.lateness = Lateness()
        self.slice_ns: int | None = None
        self._queue = RunQueue()
        self._looked_ns = time.monotonic_ns()
        self._accepts_from_ns = 0
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
        accepting = [listener] if now >= self._accepts_from_ns else []
        if not accepting:
            until = min(until, self._accepts_from_ns)
        readable, writable = ready([*accepting, signals.wakeup, *readers], writers, max(0, until - now) / 1e9)
        # Bytes may have come that much earlier: while the relay was busy with earlier ones, or while others ran on its core.
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

    def _wake_ns(self, lines: list[DelayLine]) -> int:
        """The next due time, less the spin time if the due bytes empty their line: the relay waits for those awake."""
        dues = [due - self._spin_ns * line.is_near_its_end for line in lines if (due := line.due_ns()) is not None]
        return min(dues, default=time.monotonic_ns() + _IDLE_NS)

    def _learn(self, late_ns: int) -> None:
        """Ends the next sleeps earlier, by the lateness of the last ones: it depends on how deeply this machine sleeps."""
        self._spin_ns = min(_MOST_SPIN_NS, max(_LEAST_SPIN_NS, late_ns, self._spin_ns - self._spin_ns // 8))

    def _move(self, connection: Connection, readable: list[DelayLine], writable: list[socket.socket], held_up_ns: int) -> None:
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
        arrived = accepted(listener, _NAME, pause_s=0)
        if arrived is None:
            self._accepts_from_ns = time.monotonic_ns() + int(1e9 * PAUSE_S)  # meanwhile the others' bytes go on
            return
        client, peer = arrived
        if len(self.open) >= self.options.max_connections:
            turn_away(client, f"{self.options.max_connections} connections are open, the most that this relay passes on", _NAME)
            return
        try:
            worker = socket.create_connection(parse_address(self.options.to), timeout=_CONNECT_S)
        except OSError as error:
            print(f"semgap relay: {peer} is turned away, {self.options.to} does not answer: {error}", file=sys.stderr, flush=True)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
            return
        self.open.append(Connection(client, worker, self.shared, self.lateness))

    def report(self, begin_s: float) -> dict[str, Any]:
        """Connections in the order of their ends, lateness, scheduler slice, CPU time and wall time."""
        return {
            "delay_ms": self.options.delay_ms,
            "rate": self.options.rate,
            "capacity_bytes": self.shared[Direction.UP].capacity_bytes,
            "connections": self.ended,
            "max_lateness_s": self.lateness.max_ns / 1e9,
            "slice_s": self.slice_ns and self.slice_ns / 1e9,
            "run_queue_s": self._queue.total_s,
            "lateness": self.lateness.rows(),
            "cpu_s": time.process_time(),
            "wall_s": time.monotonic() - begin_s,
        }


class RunQueue:
    """How long this thread waited for a core, by the scheduler's count (/proc/thread-self/schedstat)."""

    def __init__(self) -> None:
        try:
            self._file: int | None = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        except FileNotFoundError:
            self._file = None
        self._begin_ns = self._last_ns = self._read_ns()

    def waited_ns(self) -> int:
        """Since the last call; 0 if the kernel keeps no count."""
        before_ns, self._last_ns = self._last_ns, self._read_ns()
        return self._last_ns - before_ns

    @property
    def total_s(self) -> float | None:
        """Since the start, or None if the kernel keeps no count."""
        return None if self._file is None else (self._read_ns() - self._begin_ns) / 1e9

    def _read_ns(self) -> int:
        return 0 if self._file is None else int(os.pread(self._file, 100, 0).split()[1])


def take_short_slices() -> int | None:
    """Makes the scheduler run this process as soon as it wakes, whoever computes on its core; gives the slice in force (ns), or None.

    A computing process keeps the core to the end of its slice, some milliseconds, unless the waking one has a shorter slice (EEVDF
    since Linux 6.12). None if the kernel knows no slices, or under another scheduling policy, which stays. Needs no rights.
    """
    call = _SCHED_SETATTR.get(platform.machine())
    if call is None or os.sched_getscheduler(0) != os.SCHED_OTHER:  # somebody chose another policy (chrt)
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
    """Relays until SIGTERM, then writes its report. Prints a line of JSON, {"address": ...}, once clients can connect."""
    parse_address(options.to)
    if options.report and not options.report.parent.is_dir():
        raise NetworkError(f"--report {options.report}: there is no directory {options.report.parent}; make it first")
    running = Relay(options)
    begin_s = time.monotonic()
    listener = listen(options.listen, has_secret=False, way_out="a relay takes none: listen on 127.0.0.1")
    if options.cpus:
        pin(options.cpus)
    running.slice_ns = take_short_slices()
    # Exact timers: the default slack of 50 us is as much as a short delay.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    listener.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    running.run(listener)
    if options.report:
        options.report.write_text(json.dumps(running.report(begin_s)))
