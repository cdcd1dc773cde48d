"""The servers that frames and misuse go to: workers, a KV host and relays that must outlive all of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import test_misuse
from started_workers import KVCluster, StartedWorker, started

from torture.recording import Tee, tee

BUDGET_BYTES = 64 << 20
MOST_CONNECTIONS = {"worker": 64, "KV host": 256, "relay": 48}
"""What each takes at once. A relay takes fewer than the worker behind it: it is the relay that refuses."""
_SAID_TOO_MUCH = ("Traceback", "ended with signal", "Fatal Python error")


@dataclass
class Servers:
    """A worker, whose KV host it reaches through a recording tee, and a relay in front of another worker."""

    model: Path
    worker: StartedWorker
    host: StartedWorker
    behind_relay: StartedWorker
    relay: psutil.Popen
    relay_address: str
    kv_tee: Tee | None
    tls_worker: StartedWorker | None = None
    tokens: list[int] = field(default_factory=list)
    read: dict[Path, int] = field(default_factory=dict)

    @property
    def secret(self) -> bytes:
        return self.worker.secret

    def address(self, target: str) -> str:
        if target == "relay":
            return self.relay_address
        return self._servers(target)[0].address

    def witness(self, target: str) -> str:
        """Where the next client goes."""
        return self.address("worker" if target == "KV host" else target)

    def faults(self, target: str) -> Iterator[str]:
        """What must not be said of the servers behind a target: one has ended, or its log has a traceback since the last look."""
        for server in self._servers(target):
            if server.process.poll() is not None:
                yield f"{server.log.stem} has ended (exit {server.process.poll()}): {server.log.read_text()[-500:]}"
            new = self._new_words(server.log)
            if any(words in new for words in _SAID_TOO_MUCH):
                yield f"the log of {server.log.stem} says: {new[-1500:]}"
        if self.relay.poll() is not None:
            yield f"the relay has ended (exit {self.relay.poll()})"

    def _servers(self, target: str) -> list[StartedWorker]:
        """The servers behind a target, itself first."""
        servers = {"worker": [self.worker], "KV host": [self.host, self.worker], "relay": [self.behind_relay]}
        return (servers | ({"TLS worker": [self.tls_worker]} if self.tls_worker else {}))[target]

    def _new_words(self, log: Path) -> str:
        with log.open(errors="replace") as file:
            file.seek(self.read.get(log, 0))
            new = file.read()
            self.read[log] = file.tell()
        return new

    @classmethod
    @contextlib.contextmanager
    def started(cls, place: Path, model: Path, tls: bool = False) -> Iterator[Servers]:
        """The servers, which end with the context. All have one secret. `tls`: one more worker, over TLS."""
        with contextlib.ExitStack() as stack:
            cluster = KVCluster(place, stack)
            host = cluster.host("--max-connections", str(MOST_CONNECTIONS["KV host"]), budget_bytes=BUDGET_BYTES)
            kv_tee = stack.enter_context(tee(host.address))
            more = ("--max-sessions", str(MOST_CONNECTIONS["worker"]))
            worker = stack.enter_context(started(place, "serve", "--device", "cpu", "--kv-host", kv_tee.address, *more))

            def another(name: str, *options: str) -> StartedWorker:
                other = place / name
                other.mkdir()
                (other / "secret").write_bytes(worker.secret_file.read_bytes())
                (other / "secret").chmod(0o600)
                return stack.enter_context(started(other, "serve", "--device", "cpu", *options, *more))

            behind = another("behind-relay", "--kv-host", host.address)
            most = ("--max-connections", str(MOST_CONNECTIONS["relay"]))
            relay, address = stack.enter_context(test_misuse.started_relay(behind.address, *most))
            yield cls(model, worker, host, behind, relay, address, kv_tee, another("over-tls", "--tls") if tls else None)
