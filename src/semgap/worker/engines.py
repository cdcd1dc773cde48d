"""The engines of a worker, by key: who forks them, and how a session joins one.

The listening process forks an engine when a session brings a model that no engine has. A session sends it, through a socket that all
sessions share, a key and one end of a new channel; that end goes on to the engine of that key.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from semgap.worker.engine_channel import Channel, FromSession
from semgap.worker.engine_founding import KEY_BYTES
from semgap.worker.engine_process import run_engine
from semgap.worker.forking import forked


@dataclass(frozen=True)
class _Running:
    pid: int
    intake: socket.socket


class Engines:
    """The engines that this worker runs."""

    def __init__(self) -> None:
        self.incoming, self._outgoing = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._running: dict[bytes, _Running] = {}

    def ask(self, key: bytes, founding_fd: int | None = None) -> socket.socket:
        """Session: a new channel to the engine of `key`. With a founding file a missing engine begins; without one the channel closes."""
        ours, theirs = socket.socketpair()
        with theirs:
            fds = [theirs.fileno()] if founding_fd is None else [theirs.fileno(), founding_fd]
            socket.send_fds(self._outgoing, [key], fds)
        return ours

    def take_in(self, closes: Sequence[socket.socket]) -> None:
        """Listening process: gives the channel that `incoming` announces to its engine, a new one if need be. That has no `closes`."""
        key, fds, _, _ = socket.recv_fds(self.incoming, KEY_BYTES, 2)
        try:
            if fds and not self._passed_on(key, fds[0]) and len(fds) > 1:
                self._running[key] = _found(fds[0], fds[1], closes)
        except OSError as error:  # of the fork; the session sees that its channel closes
            print(f"semgap worker: an engine could not begin: {error}", file=sys.stderr, flush=True)
        finally:
            for fd in fds:
                os.close(fd)

    def reap(self) -> None:
        """Listening process: forgets engines that ended."""
        for key, engine in list(self._running.items()):
            ended, status = os.waitpid(engine.pid, os.WNOHANG)
            if ended:
                engine.intake.close()
                del self._running[key]
                if status:
                    print(f"semgap worker: engine {engine.pid} ended with {_how(status)}", file=sys.stderr, flush=True)

    def _passed_on(self, key: bytes, channel: int) -> bool:
        """False if no engine of that key takes sessions any more."""
        engine = self._running.get(key)
        with contextlib.suppress(OSError):
            if engine:
                socket.send_fds(engine.intake, [b"."], [channel], socket.MSG_DONTWAIT)
                return True
        return False


def _found(channel: int, founding: int, closes: Sequence[socket.socket]) -> _Running:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        pid = forked(lambda: run_engine(theirs, Channel(socket.socket(fileno=os.dup(channel)), FromSession), founding), [ours, *closes])
    return _Running(pid, ours)


def _how(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"signal {-code}" if code < 0 else f"exit status {code}"
