"""The GPU side: listens, authenticates, and gives each session a freshly forked executor.

The listening process imports torch once and never computes, so a session starts in milliseconds, holds nothing of the one
before, and takes nothing down but itself when a client misbehaves.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import ipaddress
import json
import os
import select
import signal
import socket
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import psutil

from semgap import wire
from semgap.executor import limit_threads
from semgap.ledger import Direction
from semgap.lifetime import end_with_parent
from semgap.link import Link, Timeouts, parse_address, read_secret, shake_hands_as_worker
from semgap.session import Refused, Session
from semgap.weightstore import WeightStore
from semgap.wire import WireError

_STOP_THE_WORKER = 86  # exit status of a session whose client asked for shutdown


@dataclass(frozen=True)
class ServeOptions:
    """How a worker listens and computes. `cpus` pins it; `device` is 'cpu', 'cuda' or 'auto'."""

    listen: str = "127.0.0.1:0"
    secret_file: Path | None = None
    threads: int = 1
    device: str = "auto"
    cpus: tuple[int, ...] = ()
    max_sessions: int = 8
    idle_s: float = 120.0
    frame_s: float = 30.0
    max_payload_bytes: int = 0  # 0: half of this machine's memory
    weight_store_bytes: int = 0  # kept for later sessions that offer by hash; 0: a quarter of this machine's memory


class ServeError(ValueError):
    """The worker cannot listen as it was told to."""


def serve(options: ServeOptions) -> None:
    """Listens until SIGTERM or a client's shutdown. Prints one line of JSON, {"address": ...}, once clients can connect."""
    secret = read_secret(options.secret_file)
    listener = _listen(options.listen, has_secret=bool(secret))
    if options.cpus:
        _pin(options.cpus)
    limit_threads(options.threads)
    host, port = listener.getsockname()[:2]
    sessions: set[int] = set()
    store = WeightStore(options.weight_store_bytes or psutil.virtual_memory().total // 4)
    gc.freeze()  # what is here now is shared by all sessions: their collections need not walk, and so copy, it
    with _Signals() as signals:
        print(json.dumps({"address": f"[{host}]:{port}" if ":" in host else f"{host}:{port}", "pid": os.getpid()}), flush=True)
        while not signals.stop:
            readable, _, _ = select.select([listener, signals.wakeup, store.incoming], [], [], 1.0)
            signals.drain()
            if store.incoming in readable:
                store.take_in()
            if _reap(sessions):
                break
            if listener in readable:
                _fork_session(listener, options, secret, sessions, store)
    for pid in sessions:
        os.kill(pid, signal.SIGTERM)


class _Signals:
    """SIGTERM and SIGINT set `stop`; these and SIGCHLD wake the accept loop through a socket pair."""

    def __init__(self) -> None:
        self.stop = False
        self.wakeup, self._written = socket.socketpair()
        self.wakeup.setblocking(False)
        self._written.setblocking(False)

    def __enter__(self) -> _Signals:
        signal.set_wakeup_fd(self._written.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)

    def drain(self) -> None:
        with contextlib.suppress(BlockingIOError):  # woken by a connection, not by a signal
            self.wakeup.recv(4096)

    def _on_stop(self, *_: object) -> None:
        self.stop = True


def _pin(cpus: tuple[int, ...]) -> None:
    try:
        os.sched_setaffinity(0, cpus)
    except (OSError, ValueError, OverflowError) as error:
        raise ServeError(f"cannot run on cores {cpus}: {error}; this process may use {sorted(os.sched_getaffinity(0))}") from error


def _listen(address: str, has_secret: bool) -> socket.socket:
    host, port = parse_address(address)
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ServeError(f"address {address} cannot be listened at: {error.strerror}; use an address of this machine") from error
    family, _, _, _, bound = infos[0]
    if not has_secret and not ipaddress.ip_address(bound[0]).is_loopback:
        raise ServeError(f"{address} is beyond loopback and there is no secret; give --secret-file, made by `semgap secret FILE`")
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


def _fork_session(listener: socket.socket, options: ServeOptions, secret: bytes, sessions: set[int], store: WeightStore) -> None:
    sock, peer = listener.accept()
    if len(sessions) >= options.max_sessions:
        _turn_away(sock, options)
        return
    parent = os.getpid()
    pid = os.fork()
    if pid:
        sock.close()
        sessions.add(pid)
        return
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what the session started is stopped
        end_with_parent(parent)
        listener.close()
        status = _run_session(sock, options, secret, peer, store)
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _turn_away(sock: socket.socket, options: ServeOptions) -> None:
    try:
        link = Link(sock, Direction.DOWN, Timeouts(1.0, 1.0))
        link.reply_error(None, "busy", f"{options.max_sessions} sessions are open, as many as this worker takes")
    except (WireError, OSError) as error:
        print(f"semgap worker: could not turn a client away: {error}", file=sys.stderr, flush=True)
    finally:
        sock.close()


def _reap(sessions: set[int]) -> bool:
    """Forgets sessions that ended; True when one of them was told to stop the worker."""
    stop = False
    for pid in list(sessions):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            sessions.discard(pid)
            stop |= os.waitstatus_to_exitcode(status) == _STOP_THE_WORKER
    return stop


def _run_session(sock: socket.socket, options: ServeOptions, secret: bytes, peer: object, store: WeightStore) -> int:
    """One client, from handshake to goodbye; gives the exit status. Whatever the client does ends here."""
    link = Link(sock, Direction.DOWN, Timeouts(options.idle_s, options.frame_s))
    session = Session(link, options.device, store, options.max_payload_bytes)
    try:
        shake_hands_as_worker(link, secret, session.grant)
        return _STOP_THE_WORKER if session.run() else 0
    except wire.ClosedError:
        return 0
    except (WireError, Refused) as error:
        print(f"semgap worker: session of {peer} ended: {error}", file=sys.stderr, flush=True)
        _say_why(link, error.code, str(error))
        return 1
    except Exception as error:
        traceback.print_exc()
        _say_why(link, "internal", f"{type(error).__name__}: {error}; the worker's log has the traceback")
        return 1
    finally:
        session.end()
        link.close()


def _say_why(link: Link, code: str, message: str) -> None:
    try:
        link.reply_error(None, code, message)
        link.drain(1.0)
    except (WireError, OSError) as error:
        print(f"semgap worker: the client did not take the error: {error}", file=sys.stderr, flush=True)
