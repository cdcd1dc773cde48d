"""A trial's link: its worker, and the network before it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from semgap.client.report import Report
from semgap.client.spec import WorkerSide
from semgap.experiment.cell import Cell
from semgap.experiment.trial_setup import cores
from semgap.experiment.trial_worker import start_worker
from semgap.network.namespaces import namespaces
from semgap.network.relay_process import RelayProcess, lateness, relaying, require_in_time, require_same_bytes


@dataclass(frozen=True)
class TrialLink:
    """A worker as the client reaches it: through a relay, or by a command that runs the client in its own namespace."""

    worker: WorkerSide
    worker_start_s: float | None
    client_within: tuple[str, ...] = ()
    relay: RelayProcess | None = None

    def finish(self, report: Report) -> dict[str, Any] | None:
        """Ends the relay, if any, and gives its report with the lateness of the measured requests.

        NetworkError if its bytes are not those of the books, or too many sends were late.
        """
        if self.relay is None:
            return None
        assert report.session is not None
        relayed, network = self.relay.finish(), self.worker.network
        require_same_bytes(relayed, report.session.link_bytes)
        late = lateness(relayed, report.measured.start_s, report.measured.end_s)
        require_in_time(network, late)
        return relayed | {"measured_lateness": late}


def link_up(cell: Cell, root: Path, scratch: Path, stack: contextlib.ExitStack) -> TrialLink:
    """Starts the worker and the cell's network. They end with `stack`. NetworkError if this machine cannot make the network."""
    spaces = stack.enter_context(namespaces(cell.network)) if cell.network.kind == "netns" else None
    worker, started_s = start_worker(cell, root, scratch, stack, spaces)
    worker = msgspec.structs.replace(worker, network=cell.network)
    if cell.network.kind != "relay":
        return TrialLink(worker, started_s, spaces.client if spaces else ())
    relay = stack.enter_context(relaying(cell.network, worker.address, cores(cell)[1], scratch, cell.timeouts.worker_start_s))
    return TrialLink(msgspec.structs.replace(worker, address=relay.address), started_s, relay=relay)
