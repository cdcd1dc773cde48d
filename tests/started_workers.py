"""Workers and KV hosts that tests start, each a `semgap serve` or `kvhost` of its own."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil

from semgap.policy import SessionSpec
from semgap.wire.frames import Limits
from semgap.wire.handshake import read_secret, shake_hands_as_client, write_secret
from semgap.wire.link import Link, connect
from semgap.wire.tcp import Timeouts


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclass(frozen=True)
class StartedWorker:
    """A `semgap serve` process that takes clients."""

    address: str
    process: subprocess.Popen[bytes]
    secret_file: Path
    log: Path

    @property
    def secret(self) -> bytes:
        return read_secret(self.secret_file)

    def sessions(self) -> list[psutil.Process]:
        """Its session processes that are alive."""
        return [child for child in psutil.Process(self.process.pid).children() if _is_alive(child)]

    def raw(self) -> socket.socket:
        """A connection that speaks no protocol yet; reads give up after 10 s."""
        host, port = self.address.rsplit(":", 1)
        return socket.create_connection((host, int(port)), timeout=10)

    def link(self, timeout_s: float = 20.0) -> Link:
        return connect(self.address, Timeouts(timeout_s, timeout_s))

    def session(self, spec: SessionSpec | None = None) -> Link:
        """An authenticated link."""
        link = self.link()
        shake_hands_as_client(link, self.secret, msgspec.to_builtins(spec or SessionSpec()))
        link.limits = Limits()
        return link


@contextlib.contextmanager
def started(directory: Path, command: str, *options: str) -> Iterator[StartedWorker]:
    """A `semgap serve` or `kvhost` on loopback. Its secret is in `directory`, new where there is none."""
    secret = directory / "secret"
    if not secret.exists():
        write_secret(secret)
    log = directory / f"{command}.log"
    arguments = [sys.executable, "-m", "semgap", command, "--listen", "127.0.0.1:0", "--secret-file", str(secret), *options]
    with log.open("ab") as stderr:
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=stderr)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, log.read_text()
        yield StartedWorker(json.loads(line)["address"], process, secret, log)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextlib.contextmanager
def started_worker(directory: Path, *options: str) -> Iterator[StartedWorker]:
    """A worker on loopback with a secret, both of them in `directory`."""
    with started(directory, "serve", "--device", "cpu", *options) as worker:
        yield worker


@dataclass(frozen=True)
class KVCluster:
    """A KV host, and workers that keep blocks in it, all with one secret."""

    directory: Path
    stack: contextlib.ExitStack

    def host(self, *options: str, budget_bytes: int = 1 << 28) -> StartedWorker:
        """A KV host."""
        return self.stack.enter_context(started(self.directory, "kvhost", "--budget-bytes", str(budget_bytes), *options))

    def worker(self, address: str, *options: str) -> StartedWorker:
        """A worker whose KV host is at `address`."""
        return self.stack.enter_context(started(self.directory, "serve", "--device", "cpu", "--kv-host", address, *options))
