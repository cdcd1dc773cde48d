"""The socket of a link: its options, its deadlines, and the kernel's counters."""

import fcntl
import socket
import struct
import termios
from dataclasses import dataclass

WAKE_S = 0.2  # a blocked call checks its deadline this often
_TCP_INFO_BYTES = 280
_TCP_INFO_FIELDS = {  # offset, format: struct tcp_info of linux/tcp.h, fixed since Linux 4.19
    "total_retrans": (100, "I"),
    "rtt_us": (68, "I"),
    "segs_out": (136, "I"),
    "segs_in": (140, "I"),
    "bytes_received": (128, "Q"),
    "bytes_sent": (200, "Q"),
    "bytes_retrans": (208, "Q"),
}
_TCPI_OPT_TIMESTAMPS = 1


@dataclass(frozen=True)
class Timeouts:
    """Seconds. `idle_s`: until a frame begins; `frame_s`: until it is whole (plus its length at 1 MiB/s)."""

    idle_s: float = 120.0
    frame_s: float = 30.0


def parse_address(address: str) -> tuple[str, int]:
    """('host', port) of 'host:port' or '[v6]:port'; ValueError for anything else."""
    host, colon, port = address.rpartition(":")
    bare = not (host.startswith("[") and host.endswith("]"))
    if not colon or not host or (bare and ":" in host) or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise ValueError(f"address {address!r} is not HOST:PORT, e.g. 127.0.0.1:5005")
    return host.strip("[]"), int(port)


def tcp_info(sock: socket.socket) -> dict[str, int]:
    """The kernel's counters of a connection: bytes, segments, round trip (us), and IP and TCP header bytes of a segment."""
    raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    if len(raw) < 216:
        raise OSError(f"this kernel's TCP_INFO has {len(raw)} bytes and no bytes_sent; Linux 4.19 or newer is needed")
    info = {name: struct.unpack_from(form, raw, offset)[0] for name, (offset, form) in _TCP_INFO_FIELDS.items()}
    ip = 40 if sock.family == socket.AF_INET6 else 20
    return info | {"segment_header_bytes": ip + 20 + (12 if raw[5] & _TCPI_OPT_TIMESTAMPS else 0)}


def segments(sock: socket.socket) -> tuple[int, int]:
    """(sent, received) TCP segments of a connection, acknowledgements included."""
    raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    return struct.unpack_from("II", raw, _TCP_INFO_FIELDS["segs_out"][0])


def congestion_control(sock: socket.socket, wanted: str | None = None) -> str:
    """Sets the `wanted` congestion control algorithm, if any; gives the one in force."""
    if wanted:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, wanted.encode())
        except OSError as error:
            raise ValueError(f"congestion control {wanted!r} is not available: {error.strerror}; see `semgap doctor`") from error
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()


def prepare(sock: socket.socket, timeouts: Timeouts) -> None:
    """Sets no delay, keepalive, and timeouts after which blocked calls wake."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 5)):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * timeouts.frame_s))
    wake = struct.pack("ll", int(WAKE_S), int(1e6 * (WAKE_S % 1)))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wake)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wake)


def unacknowledged_bytes(sock: socket.socket) -> int:
    return struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, b"\0\0\0\0"))[0]
