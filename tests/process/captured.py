"""An independent capture of this machine's own TCP, by AF_PACKET in a network namespace of its own. Needs root.

It knows headers of IP and TCP and no code of semgap: the payload of a connection is what its sequence numbers cover.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

_CLONE_NEWNET = 0x40000000
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1
_ETH_P_IP = 0x0800  # of one protocol, the loopback device shows each packet once: as it arrives
_SO_RCVBUFFORCE, _BUFFER_BYTES = 33, 256 << 20
_SOL_PACKET, _PACKET_STATISTICS = 263, 6
_ETHERNET_BYTES, _HEADERS_BYTES = 14, 128
_FIN, _SYN, _ACK = 1, 2, 16
_SEQUENCES = 1 << 32


@contextlib.contextmanager
def own_network() -> Iterator[None]:
    """This thread, and the processes that it starts, have a loopback device of their own. PermissionError without the right to it."""
    libc, own = ctypes.CDLL(None, use_errno=True), os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.unshare(_CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        try:
            with socket.socket() as sock:
                fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP))
            yield
        finally:
            assert libc.setns(own, _CLONE_NEWNET) == 0
    finally:
        os.close(own)


@dataclass
class Way:
    """One direction of a connection: its first sequence number, the payload's stretches from 0 on, and the place of its FIN, if any."""

    first: int | None = None
    stretches: list[tuple[int, int]] = field(default_factory=list)
    end: int | None = None

    def see(self, sequence: int, flags: int, length: int) -> None:
        if flags & _SYN:
            self.first = sequence
            return
        assert self.first is not None, "a connection from before the capture"
        near = max((end for _, end in self.stretches), default=0)
        begin = (sequence - self.first - 1 - near + _SEQUENCES // 2) % _SEQUENCES - _SEQUENCES // 2 + near
        if length and begin >= 0:  # a keepalive lies before the payload, or on its last byte
            self.stretches.append((begin, begin + length))
        if flags & _FIN:
            self.end = begin + length

    @property
    def payload_bytes(self) -> int:
        """Bytes from the first one to the last, each once. AssertionError for a hole, or a FIN elsewhere than at the end."""
        have = 0
        for begin, end in sorted(self.stretches):
            assert begin <= have, f"bytes {have} to {begin} of a connection were not seen"
            have = max(have, end)
        assert self.end in (None, have), f"a connection ended at byte {self.end}, of {have} seen"
        return have


@dataclass
class Flow:
    """A connection: the port of who listened, and what crossed to it (`up`) and from it (`down`)."""

    port: int
    up: Way = field(default_factory=Way)
    down: Way = field(default_factory=Way)

    @property
    def payload_bytes(self) -> tuple[int, int]:
        return self.up.payload_bytes, self.down.payload_bytes


class Capture:
    """Counts all TCP of this thread's network from `with` to its end. `flows`: the connections, in the order of their SYN."""

    def __init__(self) -> None:
        self.flows: list[Flow] = []
        self._open: dict[tuple[bytes, bytes], tuple[Flow, Way]] = {}
        self._over = threading.Event()

    def __enter__(self) -> Capture:
        self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_IP))
        self._sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        self._sock.bind(("lo", _ETH_P_IP))
        self._sock.settimeout(0.1)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        statistics = self._sock.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)
        self._sock.close()
        seen, dropped = struct.unpack("II", statistics)
        assert dropped == 0, f"the capture lost {dropped} of {seen} packets"

    def _read(self) -> None:
        packet = bytearray(_HEADERS_BYTES)
        while True:
            try:
                length, _, _, _ = self._sock.recvmsg_into([packet], 0, socket.MSG_TRUNC)
            except TimeoutError:
                if self._over.is_set():
                    return
                continue
            self._take(packet[_ETHERNET_BYTES:], length - _ETHERNET_BYTES)

    def _take(self, ip: bytearray, ip_bytes: int) -> None:
        """`ip_bytes`: of the whole packet; a large one's own length field may say 0."""
        if ip[9] != socket.IPPROTO_TCP:
            return
        tcp = ip[4 * (ip[0] & 15) :]
        sequence, (offset, flags) = struct.unpack_from(">I", tcp, 4)[0], struct.unpack_from("BB", tcp, 12)
        source, target = (bytes(ip[12 + 4 * end : 16 + 4 * end] + tcp[2 * end : 2 * end + 2]) for end in (0, 1))
        if flags & _SYN and not flags & _ACK and (source, target) not in self._open:
            flow = Flow(int.from_bytes(target[4:], "big"))
            self.flows.append(flow)
            self._open[source, target], self._open[target, source] = (flow, flow.up), (flow, flow.down)
        if (source, target) in self._open:
            self._open[source, target][1].see(sequence, flags, ip_bytes - 4 * (ip[0] & 15) - 4 * (offset >> 4))
