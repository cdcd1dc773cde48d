"""A trial's link: its worker, and the network before it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil

from semgap.client.hold_weights import hold_weights
from semgap.client.report import Report
from semgap.client.spec import ClientSpec, WorkerSide
from semgap.engine.model_files import ModelFiles, load_digest
from semgap.experiment.cell import Cell
from semgap.experiment.trial_processes import RoleProcess, running
from semgap.experiment.trial_setup import TrialError, cores
from semgap.experiment.trial_worker import start_worker
from semgap.network.namespaces import Namespaces, namespaces
from semgap.network.relay_report import lateness, require_same_bytes
from semgap.network.spec import Network, NetworkError
from semgap.worker.weight_store import upload_budget

_RELAY_REPORT = "relay.json"
_RELAY_ENDS_S = 10.0
_OTHER_CONNECTIONS = 16  # of a trial, beside those of its load: probes, and earlier sessions that are ending


@dataclass(frozen=True)
class TrialLink:
    """A worker as the client reaches it: maybe through a relay."""

    worker: WorkerSide
    worker_start_s: float | None
    relay: RoleProcess | None = None

    def finish(self, report: Report) -> dict[str, Any] | None:
        """Ends the relay, if any, and gives its report with the lateness of the measured requests.

        NetworkError if its bytes are not those of the books.
        """
        if self.relay is None:
            return None
        assert report.session is not None
        relayed = _end_relay(self.relay)
        require_same_bytes(relayed, [report.session.link_bytes, *(each.link_bytes for each in report.connections)])
        late = lateness(relayed, report.measured.start_s, report.measured.end_s)
        return relayed | {"measured_lateness": late}


def weights_are_held(cell: Cell, weights_bytes: int) -> bool:
    """True if the worker is made to hold the weights before the client comes: past the first trial of a mode behind a relay.

    The upload is measured in the first trial. Its seconds over a slow link are most of a trial's. The worker must be a trial's own,
    without a cache of weights for other trials, and able to hold the weights twice.
    """
    later = cell.trial > 1 and cell.network.kind == "relay" and cell.phase.sessions == 1 and cell.policy.weights != "every_step"
    own = cell.worker.launch == "local" and cell.worker.weight_cache is None
    return later and own and weights_bytes <= min(upload_budget(None), psutil.virtual_memory().available // 3)


def spaces_of(cell: Cell, stack: contextlib.ExitStack) -> Namespaces | None:
    """The namespaces of a network of kind netns, until `stack` ends; None for another kind, and for a local mode.

    NetworkError if this machine cannot make them.
    """
    needed = cell.network.kind == "netns" and not cell.policy.is_local
    return stack.enter_context(namespaces(cell.network)) if needed else None


def link_up(
    cell: Cell, root: Path, scratch: Path, stack: contextlib.ExitStack, spaces: Namespaces | None, held: ClientSpec | None = None
) -> TrialLink:
    """Starts the worker, in its namespace of `spaces_of`, and a relay. They end with `stack`. NetworkError if the relay does not start.

    With `held`, behind a relay, the worker first gets that spec's weights, past the relay.
    """
    worker, started_s = start_worker(cell, root, scratch, stack, spaces)
    worker = msgspec.structs.replace(worker, network=cell.network)
    if cell.network.kind != "relay":
        return TrialLink(worker, started_s)
    if held:
        model = Path(held.model_directory)
        hold_weights(held, worker, ModelFiles(model, load_digest(model)))
    command = relay_command(cell.network, worker.address, cores(cell)[1], scratch / _RELAY_REPORT, cell.phase.links + _OTHER_CONNECTIONS)
    relay = stack.enter_context(running("relay", command, scratch / "relay.log", cell.threads, serves=True))
    try:
        address = relay.await_address(cell.timeouts.worker_start_s)
    except TrialError as error:
        raise NetworkError(str(error)) from error
    return TrialLink(msgspec.structs.replace(worker, address=address), started_s, relay=relay)


def relay_command(network: Network, to: str, cpus: tuple[int, ...], report: Path, connections: int = _OTHER_CONNECTIONS) -> list[str]:
    """The command of a relay in front of the worker at `to`, on cores `cpus`, for at most so many connections at a time."""
    command = [sys.executable, "-m", "semgap", "relay", "--to", to, "--delay-ms", str(network.one_way_ms or 0)]
    command += ["--rate", network.rate] if network.rate else []
    command += ["--max-connections", str(connections)]
    return [*command, "--cpus", ",".join(map(str, cpus)), "--report", str(report), "--parent-pid", str(os.getpid())]


def _end_relay(relay: RoleProcess) -> dict[str, Any]:
    """The relay's report. NetworkError if it ended by itself, or does not end."""
    try:
        relay.process.send_signal(signal.SIGTERM)
        relay.process.wait(_RELAY_ENDS_S)
        return json.loads(relay.log_file.with_name(_RELAY_REPORT).read_bytes())
    except (subprocess.TimeoutExpired, FileNotFoundError, json.JSONDecodeError) as error:
        raise NetworkError(f"the relay left no report (exit {relay.process.poll()}); its log is above") from error
