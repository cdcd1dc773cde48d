"""A link between a worker and its KV host that a test can slow down, spoil or cut."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass
class LinkToKVHost:
    """What happens to bytes that a KV host sends: each 64 KiB take `delay_s`, and once it is armed, `spoil(offset, data)` changes them.

    The offset counts from the arming. Where `spoil` gives less, the connection is cut there.
    """

    delay_s: float = 0.0
    spoil: Callable[[int, bytes], bytes] = lambda _, data: data
    armed: bool = False


@contextlib.contextmanager
def relay_over(address: str, path: LinkToKVHost) -> Iterator[str]:
    """A relay in front of a KV host; gives its address."""
    host, port = address.rsplit(":", 1)
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, target: socket.socket, down: bool) -> None:
        offset = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                changed = data
                if down:
                    time.sleep(path.delay_s)
                    changed = path.spoil(offset, data) if path.armed else data
                    offset += len(data) if path.armed else 0
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
                server = socket.create_connection((host, int(port)))
                for arguments in ((client, server, False), (server, client, True)):
                    threading.Thread(target=pump, args=arguments, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield "{}:{}".format(*listener.getsockname())
    finally:
        listener.close()
