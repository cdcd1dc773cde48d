"""A trial's worker and its KV host, maybe with a relay between them: started on this machine, on the other node of a Slurm allocation,
or through ssh.
"""

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from semgap.client.spec import WorkerSide
from semgap.experiment.cell import Cell
from semgap.experiment.trial_processes import running, threads_environment
from semgap.experiment.trial_relay import KV_HOSTS, TrialRelay, start_relay
from semgap.experiment.trial_setup import TrialError, cores
from semgap.network.namespaces import Namespaces
from semgap.phases import KINDS
from semgap.processes import slurm
from semgap.processes.machine import boot_id
from semgap.processes.pristine import Pristine
from semgap.processes.remote_lifetime import Order, attach
from semgap.processes.ssh import explain, resolved_address, ssh_command
from semgap.wire.handshake import read_secret, write_secret


@dataclass(frozen=True)
class StartedWorker:
    """A worker, the seconds until it took clients (None: an external one), and the relay between it and its KV host, if any."""

    side: WorkerSide
    start_s: float | None = None
    kv_relay: TrialRelay | None = None


def start_worker(cell: Cell, root: Path, scratch: Path, stack: contextlib.ExitStack, spaces: Namespaces | None = None) -> StartedWorker:
    """The config's external worker, or a fresh one, which ends with `stack`.

    A local worker and its KV host start in their namespaces of `spaces`, if any. TrialError if one does not start, NetworkError if a
    relay between them does not.
    """
    side = WorkerSide(
        address=cell.worker.address or "",
        telemetry=cell.telemetry,
        probe=cell.probe,
        secret_file=cell.worker.secret_file,
        tls=cell.worker.tls,
        timeout_s=cell.timeouts.reply_s,
    )
    if cell.worker.launch == "external":
        return StartedWorker(side)
    start = _Start(cell, root, scratch, stack)
    write_secret(start.secret)
    begin = time.monotonic()
    address = {"local": lambda: start.here(spaces), "srun": start.on_other_node, "ssh": start.through_ssh}[cell.worker.launch]()
    started_s = time.monotonic() - begin
    side = msgspec.structs.replace(side, address=address, secret_file=str(start.secret), stop=True, second=start.second)
    return StartedWorker(side, started_s, start.kv_relay)


@dataclass
class _Start:
    """Starts a worker and its KV host, each of which gives its address. Their logs go to `scratch`."""

    cell: Cell
    root: Path
    scratch: Path
    stack: contextlib.ExitStack
    kv_relay: TrialRelay | None = field(default=None, init=False)
    kv_host: str = field(default="", init=False)
    second: str | None = field(default=None, init=False)  # the worker to which requests move, beside the KV host

    @property
    def secret(self) -> Path:
        return self.scratch / "secret"

    @property
    def _tls(self) -> list[str]:
        return ["--tls"] if self.cell.worker.tls else []

    def here(self, spaces: Namespaces | None) -> str:
        """On this machine, on the cores of the computing side. The KV host starts beside it, or at the other end of the network's `kv`."""
        computing, thin = map(_listed, cores(self.cell))
        within = spaces.worker if spaces else ()
        listen = self.cell.worker.address or (f"{spaces.worker_address}:0" if spaces else "127.0.0.1:0")
        arguments = ["--secret-file", str(self.secret), *self._worker_arguments(self.root), "--cpus", computing, "--io-cpus", thin]
        over_link, beside = [], list[str]()
        if self.cell.policy.shadow == "kvhost":
            over_link = ["--kv-host", self._kv_host_beyond_its_link(spaces)]
            beside = ["--kv-host", self.kv_host]
        if KINDS[self.cell.phase.kind].workers > 1:
            self.second = self._local("serve", ["--listen", "127.0.0.1:0", *arguments, *beside], (), "second worker")
        return self._local("serve", ["--listen", listen, *arguments, *over_link], within)

    def _kv_host_beyond_its_link(self, spaces: Namespaces | None) -> str:
        """The address at which the worker reaches a KV host on this machine: the KV host's own, or that of a relay before it."""
        host = self.kv_host = self._kv_host(f"{spaces.kv_host_address}:0", spaces.kv_host) if spaces else self._kv_host("127.0.0.1:0")
        link = self.cell.kv_network
        if link is None or link.kind != "relay":
            return host
        self.kv_relay = start_relay(KV_HOSTS, self.cell, link, host, self.scratch, self.stack, spaces.worker if spaces else ())
        return self.kv_relay.address

    def on_other_node(self) -> str:
        """On the allocation's other node, through srun. The KV host starts on this one."""
        allocated = slurm.allocation()
        host, _, port = (self.cell.worker.address or "").rpartition(":")
        ip = slurm.resolve(host.format(node=allocated.other)) if host else slurm.address_of(allocated.other)
        listen = f"[{ip}]:{port or 0}" if ":" in ip else f"{ip}:{port or 0}"
        arguments = self._attached_arguments(listen, self.root)
        if self.cell.policy.shadow == "kvhost":
            arguments += ["--kv-host", self._kv_host(f"{slurm.address_of(allocated.here)}:0")]
        on_node = slurm.on_node(allocated, allocated.other)
        return self._attached([*on_node, sys.executable, "-m", "semgap", "serve", *arguments])

    def through_ssh(self) -> str:
        """On config.worker.host, through ssh. A relative weight cache starts from the login directory there."""
        worker = self.cell.worker
        assert worker.host is not None
        listen = worker.address or resolved_address(worker.host, worker.ssh_config)
        command = [worker.python, "-m", "semgap", "serve", *self._attached_arguments(listen, Path())]
        try:
            return self._attached(ssh_command(worker.host, worker.ssh_config, threads_environment(self.cell.threads), command))
        except TrialError as error:
            hint = explain(worker.host, (self.scratch / "serve.log").read_text())
            if hint is None:
                raise
            raise TrialError(f"{error}\n{hint}") from error

    def _worker_arguments(self, root: Path) -> list[str]:
        cell, cache = self.cell, self.cell.worker.weight_cache
        arguments = ["--threads", str(cell.threads), "--device", cell.device, "--executor", cell.executor]
        arguments += ["--idle-s", str(cell.timeouts.trial_s), *self._tls]
        if cell.phase.is_load:
            arguments += ["--max-sessions", str(cell.phase.links + 1)]  # and one that makes it hold the weights
        return [*arguments, *(("--weight-cache", str(root / cache)) if cache else ())]

    def _attached_arguments(self, listen: str, root: Path) -> list[str]:
        arguments = ["--listen", listen, "--attached", *self._worker_arguments(root)]
        return [*arguments, *(("--cpus", _listed(self.cell.cpus.worker)) if self.cell.cpus.worker else ())]

    def _kv_host(self, listen: str, within: Sequence[str] = ()) -> str:
        """A KV host on this machine, on the cores of the thin side."""
        arguments = ["--listen", listen, "--secret-file", str(self.secret), "--budget-bytes", str(self.cell.worker.kv_host_bytes)]
        arguments += ["--cpus", _listed(cores(self.cell)[1]), "--idle-s", str(self.cell.timeouts.trial_s), *self._tls]
        return self._local("kvhost", arguments, within)

    def _local(self, command: str, arguments: Sequence[str], within: Sequence[str], role: str | None = None) -> str:
        """Starts `semgap serve` or `semgap kvhost` on this machine, in a role of its own if named; the command `within` runs it."""
        whole = [*within, sys.executable, "-m", "semgap", command, *arguments, "--parent-pid", str(os.getpid())]
        log_name, role = (role or command).replace(" ", "-"), role or {"serve": "worker", "kvhost": "KV host"}[command]
        log, pristine = self.scratch / f"{log_name}.log", self._pristine() if command == "serve" else None
        started = self.stack.enter_context(running(role, whole, log, self.cell.threads, serves=True, pristine=pristine))
        return started.await_address(self.cell.timeouts.worker_start_s)

    def _pristine(self) -> Pristine:
        """The code that a worker loads before it listens."""
        return Pristine(
            ("semgap.cli", "semgap.worker.serve"), (("semgap.engine.executor_choice", "preload", (self.cell.device, self.cell.executor)),)
        )

    def _attached(self, command: Sequence[str]) -> str:
        """Starts a worker elsewhere by a whole command. Its standard input, here and there, ties it to this process.

        The secret goes that way too: it is in no argument, environment or file there.
        """
        log = self.scratch / "serve.log"
        started = self.stack.enter_context(running("worker", command, log, self.cell.threads, serves=True, attached=True))
        attach(started.process, Order(read_secret(self.secret).decode(), boot_id()))
        return started.await_address(self.cell.timeouts.worker_start_s)


def _listed(cores: Sequence[int]) -> str:
    return ",".join(map(str, cores))
