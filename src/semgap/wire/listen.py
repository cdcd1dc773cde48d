"""Listening for clients: the address, the cores, and the signals that end a process."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import os
import signal
import socket
import sys
import time
from typing import IO, Protocol

from semgap.wire.tcp import parse_address
from semgap.wire.waiting import ready

PAUSE_S = 0.1  # before the next try, when the machine had no room for a connection


class ServeError(ValueError):
    """A process cannot listen or run as its options say."""


def listen(address: str, has_secret: bool, way_out: str = "give --secret-file, made by `semgap secret FILE`") -> socket.socket:
    """A listening socket at HOST:PORT. ServeError if the address is unavailable, or beyond loopback without a secret."""
    host, port = parse_address(address)
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ServeError(f"cannot listen at {address}: {error.strerror}; use an address of this machine") from error
    family, _, _, _, bound = infos[0]
    if not has_secret and not ipaddress.ip_address(bound[0]).is_loopback:
        raise ServeError(f"{address} is beyond loopback and there is no secret; {way_out}")
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(bound)
    except OSError as error:
        known = {errno.EADDRINUSE: "is taken by another process", errno.EADDRNOTAVAIL: "is not an address of this machine"}
        why = known.get(error.errno or 0, error.strerror)
        raise ServeError(f"address {address} {why}; use another, or port 0 for any free one") from error
    listener.listen(64)
    return listener


def accepted(listener: socket.socket, who: str, pause_s: float = PAUSE_S) -> tuple[socket.socket, object] | None:
    """The next connection and its peer. None after `pause_s` if it has gone already, or if this process has no descriptor left for it."""
    try:
        return listener.accept()
    except OSError as error:
        print(f"{who}: could not take a connection: {error}", file=sys.stderr, flush=True)
        time.sleep(pause_s)
        return None


def address_of(listener: socket.socket) -> str:
    """HOST:PORT that clients can connect to."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class _Serving(Protocol):
    """A process with its standard output: subprocess.Popen, or a fork."""

    @property
    def stdout(self) -> IO[bytes] | None: ...

    def wait(self, timeout: float | None = None) -> int: ...


def await_address(process: _Serving, timeout_s: float) -> str:
    """HOST:PORT from the line {"address": ...} that a process prints once it takes clients. ServeError if it dies first or is too slow."""
    assert process.stdout is not None
    readable, _ = ready([process.stdout], timeout_s=timeout_s)
    line = process.stdout.readline() if readable else b""
    if not line:
        raise ServeError(f"died while it started (exit {process.wait(10)})" if readable else f"was not ready within {timeout_s:g} s")
    return json.loads(line)["address"]


def pin(cpus: tuple[int, ...]) -> None:
    """Pins this process to cores. ServeError for cores that it may not use."""
    try:
        os.sched_setaffinity(0, cpus)
    except (OSError, ValueError, OverflowError) as error:
        raise ServeError(f"cannot run on cores {cpus}: {error}; this process may use {sorted(os.sched_getaffinity(0))}") from error


class Signals:
    """SIGTERM and SIGINT set `stop`. They and SIGCHLD wake the accept loop through a socket pair."""

    def __init__(self) -> None:
        self.stop = False
        self.wakeup, self._written = socket.socketpair()
        self.wakeup.setblocking(False)
        self._written.setblocking(False)

    def __enter__(self) -> Signals:
        signal.set_wakeup_fd(self._written.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)

    def drain(self) -> None:
        """Empties the wake-up socket."""
        with contextlib.suppress(BlockingIOError):  # woken by a connection, not by a signal
            self.wakeup.recv(4096)

    def end(self) -> None:
        """Ends the loop, from any thread."""
        self.stop = True
        self._written.send(b".")

    def _on_stop(self, *_: object) -> None:
        self.stop = True
