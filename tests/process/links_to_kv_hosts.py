"""A link between a worker and its KV host that a test can slow down, spoil, cut, or watch to do something meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass
class LinkToKVHost:
    """What happens to bytes that a KV host sends: each 64 KiB take `delay_s`, and once it is armed, `spoil(offset, data)` changes them.

    The offset counts from the arming. Where `spoil` gives less, the connection is cut there. `meanwhile(connection, is_down, bytes)` is
    told of each piece of at most `piece_bytes` before it goes on. The piece takes so many seconds more, or (below 0) is lost, and the
    connection cut. The bytes are those of the connection's direction with this piece, since it was set. `to`: the KV host of later
    connections, if another one than at the beginning.
    """

    delay_s: float = 0.0
    spoil: Callable[[int, bytes], bytes] = lambda _, data: data
    armed: bool = False
    piece_bytes: int = 65536
    meanwhile: Callable[[int, bool, int], float] | None = None
    to: str = ""


@contextlib.contextmanager
def relay_over(address: str, path: LinkToKVHost) -> Iterator[str]:
    """A relay in front of a KV host; gives its address."""
    listener, numbers = socket.create_server(("127.0.0.1", 0)), itertools.count()

    def pump(source: socket.socket, target: socket.socket, number: int, down: bool) -> None:
        offset, watched, told = 0, path.meanwhile, 0
        with contextlib.suppress(OSError):
            while data := source.recv(path.piece_bytes):
                changed = data
                if down:
                    time.sleep(path.delay_s)
                    changed = path.spoil(offset, data) if path.armed else data
                    offset += len(data) if path.armed else 0
                if path.meanwhile is not watched:
                    watched, told = path.meanwhile, 0
                if watched is not None:
                    told += len(data)
                    more_s = watched(number, down, told)
                    if more_s < 0:
                        break
                    time.sleep(more_s)
                target.sendall(changed)
                if len(changed) < len(data):
                    break
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                host, port = (path.to or address).rsplit(":", 1)
                try:
                    server = socket.create_connection((host, int(port)))
                except ConnectionRefusedError:  # as the KV host itself would
                    client.close()
                    continue
                for sock in (client, server):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as the ends of a link have it
                number = next(numbers)
                for arguments in ((client, server, number, False), (server, client, number, True)):
                    threading.Thread(target=pump, args=arguments, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield "{}:{}".format(*listener.getsockname())
    finally:
        listener.close()
