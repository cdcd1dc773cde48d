"""A trial's relays: one between client and worker, one between worker and KV host, each a process of its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semgap.client.report import Measured
from semgap.experiment.cell import Cell
from semgap.experiment.trial_processes import RoleProcess, running
from semgap.experiment.trial_setup import TrialError, cores
from semgap.network.relay_report import lateness, require_same_bytes
from semgap.network.spec import Network, NetworkError

CLIENTS, KV_HOSTS = "relay", "kv_relay"
"""Between client and worker, and between worker and KV host: `side` in relay.parquet and host.parquet."""

_ROLES = {CLIENTS: "relay", KV_HOSTS: "KV relay"}
_ENDS_S = 10.0
_OTHER_CONNECTIONS = 16  # of a trial, beside those of its load: probes, and earlier sessions that are ending


@dataclass(frozen=True)
class TrialRelay:
    """A running relay, and the HOST:PORT at which it takes connections."""

    role: RoleProcess
    address: str
    report: Path

    @property
    def exit_status(self) -> int | None:
        """None while it runs."""
        return self.role.process.poll()

    def finish(self, measured: Measured, ledgers: Sequence[Mapping[str, int]]) -> dict[str, Any]:
        """Ends it and gives its report, with the lateness of the measured requests.

        `ledgers`: bytes up and down of its last connections. NetworkError if it counted others, ended by itself, or does not end.
        """
        relayed = self._end()
        require_same_bytes(relayed, ledgers)
        return relayed | {"measured_lateness": lateness(relayed, measured.start_s, measured.end_s)}

    def _end(self) -> dict[str, Any]:
        try:
            self.role.process.send_signal(signal.SIGTERM)
            self.role.process.wait(_ENDS_S)
            return json.loads(self.report.read_bytes())
        except (subprocess.TimeoutExpired, FileNotFoundError, json.JSONDecodeError) as error:
            raise NetworkError(f"the {self.role.role} left no report (exit {self.role.process.poll()}); its log is above") from error


def start_relay(
    side: str, cell: Cell, network: Network, to: str, scratch: Path, stack: contextlib.ExitStack, within: Sequence[str] = ()
) -> TrialRelay:
    """A relay of `network` in front of HOST:PORT `to`, on the cores of the thin side. The command `within` runs it; it ends with `stack`.

    NetworkError if it does not start.
    """
    report = scratch / f"{side}.json"
    command = [*within, *relay_command(network, to, cores(cell)[1], report, cell.phase.links + _OTHER_CONNECTIONS)]
    role = stack.enter_context(running(_ROLES[side], command, scratch / f"{side}.log", cell.threads, serves=True))
    try:
        return TrialRelay(role, role.await_address(cell.timeouts.worker_start_s), report)
    except TrialError as error:
        raise NetworkError(str(error)) from error


def relay_command(network: Network, to: str, cpus: tuple[int, ...], report: Path, connections: int = _OTHER_CONNECTIONS) -> list[str]:
    """The command of a relay in front of HOST:PORT `to`, on cores `cpus`, for at most so many connections at a time."""
    command = [sys.executable, "-m", "semgap", "relay", "--to", to, "--delay-ms", str(network.one_way_ms or 0)]
    command += ["--rate", network.rate] if network.rate else []
    command += ["--max-connections", str(connections)]
    return [*command, "--cpus", ",".join(map(str, cpus)), "--report", str(report), "--parent-pid", str(os.getpid())]
