"""A trial's links: its worker, the network before it, and that between it and its KV host."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil

from semgap.client.hold_weights import hold_weights
from semgap.client.report import KVHostBooks, Report
from semgap.client.spec import ClientSpec, WorkerSide
from semgap.engine.model_files import ModelFiles, load_digest
from semgap.experiment.cell import Cell
from semgap.experiment.trial_relay import CLIENTS, KV_HOSTS, TrialRelay, start_relay
from semgap.experiment.trial_worker import start_worker
from semgap.network.namespaces import Namespaces, namespaces
from semgap.network.spec import NetworkError
from semgap.wire.ledger import Direction, frame_bytes
from semgap.worker.weight_store import upload_budget


@dataclass(frozen=True)
class TrialLink:
    """A worker as the client reaches it, and its KV host as the worker does: each maybe through a relay, by its side."""

    worker: WorkerSide
    worker_start_s: float | None
    relays: Mapping[str, TrialRelay]

    def finish(self, cell: Cell, report: Report) -> dict[str, dict[str, Any]]:
        """Ends the relays and gives the report of each, by its side. NetworkError if its bytes are not those of the books."""
        assert report.session is not None
        ledgers = {CLIENTS: [report.session.link_bytes, *(each.link_bytes for each in report.connections)]}
        books = [*(each.books for each in report.connections), report.session.books]
        ledgers[KV_HOSTS] = [_link_bytes(each.peer.kv_host) for each in books if each.peer.kv_host is not None]
        found = {}
        for side, relay in self.relays.items():
            with of_kv_link(cell) if side == KV_HOSTS else contextlib.nullcontext():
                found[side] = relay.finish(report.measured, ledgers[side])
        return found


def _link_bytes(host: KVHostBooks) -> dict[str, int]:
    """All bytes of a worker's connection to its KV host, up and down, with the answer that closed its books."""
    down = frame_bytes(host.rows, Direction.DOWN) + host.closing_frame_bytes
    return {"up": frame_bytes(host.rows, Direction.UP), "down": down}


@contextlib.contextmanager
def of_kv_link(cell: Cell) -> Iterator[None]:
    """Names the cell's link between worker and KV host in a NetworkError that is raised within."""
    try:
        yield
    except NetworkError as error:
        raise NetworkError(f"the link to the KV host (network {cell.network.kv!r}): {error}") from error


def weights_are_held(cell: Cell, weights_bytes: int) -> bool:
    """True if the worker is made to hold the weights before the client comes: past the first trial of a mode behind a relay.

    The upload is measured in the first trial. Its seconds over a slow link are most of a trial's. The worker must be a trial's own,
    without a cache of weights for other trials, and able to hold the weights twice.
    """
    later = cell.trial > 1 and cell.network.kind == "relay" and cell.phase.sessions == 1 and cell.policy.weights != "every_step"
    own = cell.worker.launch == "local" and cell.worker.weight_cache is None
    return later and own and weights_bytes <= min(upload_budget(None), psutil.virtual_memory().available // 3)


def spaces_of(cell: Cell, stack: contextlib.ExitStack) -> Namespaces | None:
    """The namespaces of links of kind netns, until `stack` ends; None if no link is of that kind, and for a local mode.

    NetworkError if this machine cannot make them.
    """
    kv = cell.kv_network if cell.policy.shadow == "kvhost" else None
    needed = "netns" in (cell.network.kind, kv and kv.kind) and not cell.policy.is_local
    return stack.enter_context(namespaces(cell.network, kv)) if needed else None


def link_up(
    cell: Cell, root: Path, scratch: Path, stack: contextlib.ExitStack, spaces: Namespaces | None, held: ClientSpec | None = None
) -> TrialLink:
    """Starts the worker with its KV host, in their namespaces of `spaces_of`, and relays. They end with `stack`.

    NetworkError if a relay does not start. With `held`, behind a relay, the worker first gets that spec's weights, past the relay.
    """
    with of_kv_link(cell):
        started = start_worker(cell, root, scratch, stack, spaces)
    worker, relays = msgspec.structs.replace(started.side, network=cell.network), {}
    if started.kv_relay:
        relays[KV_HOSTS] = started.kv_relay
    if cell.network.kind == "relay":
        if held:
            model = Path(held.model_directory)
            hold_weights(held, worker, ModelFiles(model, load_digest(model)))
        within = spaces.client if spaces else ()
        relays[CLIENTS] = start_relay(CLIENTS, cell, cell.network, worker.address, scratch, stack, within)
        worker = msgspec.structs.replace(worker, address=relays[CLIENTS].address)
    return TrialLink(worker, started.start_s, relays)
