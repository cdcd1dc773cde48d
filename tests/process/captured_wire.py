"""An independent capture of loopback's TCP payload, by sequence numbers (AF_PACKET): it shares nothing with ledgers and kernel counters."""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

_ETH_P_IP, _PACKET_OUTGOING = 0x0800, 4
_SO_ATTACH_FILTER, _SO_RCVBUFFORCE, _SOL_PACKET, _PACKET_STATISTICS = 26, 33, 263, 6
_HEADERS_BYTES = 128  # of an IP packet: its own and TCP's, at most 60 each
_SYN, _FIN, _RST = 2, 1, 4
Way = tuple[int, int]
"""The source port and the destination port."""


@dataclass
class Stream:
    """One direction of a connection: what was seen of its sequence numbers, relative to the first byte of payload."""

    first: int
    seen: list[tuple[int, int]] = field(default_factory=list)
    ended: bool = False

    def take(self, sequence: int, nbytes: int) -> None:
        begin = (sequence - self.first) & 0xFFFFFFFF
        if nbytes:
            self.seen.append((begin, begin + nbytes))

    @property
    def payload_bytes(self) -> int:
        """Bytes of payload, each once however often it was sent. AssertionError for a gap: then the capture has missed some."""
        end = 0
        for begin, upto in sorted(self.seen):
            assert begin <= end, f"the capture lacks bytes {end} to {begin}"
            end = max(end, upto)
        return end


@dataclass
class Capture:
    """The connections to the watched ports that began since, by direction. `lost`: packets that the kernel could not keep for it."""

    sock: socket.socket
    streams: dict[Way, Stream] = field(default_factory=dict)
    lost: int = 0
    _stopped: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Takes packets until `stop`, and then those that are still queued."""
        data = bytearray(_HEADERS_BYTES)
        while True:
            try:
                count, _, _, address = self.sock.recvmsg_into([data])
            except TimeoutError:
                if self._stopped.is_set():
                    return
                continue
            if address[2] != _PACKET_OUTGOING:  # loopback shows each packet twice
                self._take(memoryview(data)[:count])

    def _take(self, packet: memoryview) -> None:
        header = 4 * (packet[0] & 15)
        whole = int.from_bytes(packet[2:4], "big")
        source, destination, sequence = struct.unpack_from(">HHI", packet, header)
        flags, offset = packet[header + 13], 4 * (packet[header + 12] >> 4)
        if flags & _SYN:
            self.streams[source, destination] = Stream((sequence + 1) & 0xFFFFFFFF)
        elif (source, destination) in self.streams:
            stream = self.streams[source, destination]
            stream.take(sequence, whole - header - offset)
            stream.ended |= bool(flags & (_FIN | _RST))

    def of(self, client_port: int, server_port: int) -> tuple[int, int]:
        """The payload of a connection, up and down."""
        return self.streams[client_port, server_port].payload_bytes, self.streams[server_port, client_port].payload_bytes

    def clients_of(self, server_port: int) -> list[int]:
        """The ports of the connections to a server, in the order of their beginnings."""
        return [source for source, destination in self.streams if destination == server_port]


@contextlib.contextmanager
def captured(*server_ports: int) -> Iterator[Capture]:
    """A capture of the TCP connections over loopback to these ports. PermissionError without the right to it."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_IP)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 256 << 20)
        _attach(sock, server_ports)
        sock.bind(("lo", _ETH_P_IP))
        sock.settimeout(0.3)
        running = Capture(sock)
        thread = threading.Thread(target=running.run)
        thread.start()
        try:
            yield running
        finally:
            running._stopped.set()
            thread.join()
            running.lost = struct.unpack("II", sock.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))[1]


def _attach(sock: socket.socket, ports: tuple[int, ...]) -> None:
    """Lets the kernel pass on the headers of TCP packets to or from these ports alone (a classic BPF program)."""
    load_byte, load_x, load_half, equal, end = 0x30, 0xB1, 0x48, 0x15, 0x06
    tests = [(load_half, 0), *((equal, port) for port in ports), (load_half, 2), *((equal, port) for port in ports)]
    program: list[tuple[int, int, int, int]] = [(load_byte, 0, 0, 9), (equal, 0, len(tests) + 1, 6), (load_x, 0, 0, 0)]
    for at, (code, value) in enumerate(tests):
        left = len(tests) - at - 1  # to the refusal, behind which the acceptance stands
        program.append((code, left + 1 if code == equal else 0, 0, value))
    program += [(end, 0, 0, 0), (end, 0, 0, _HEADERS_BYTES)]
    packed = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", len(program), ctypes.addressof(packed)))
