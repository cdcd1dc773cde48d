"""A trial's manifest: where it ran, what its link was, and what was reconciled and compared."""

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from semgap.client.control import no_control
from semgap.client.report import KVHostBooks, Report, Session
from semgap.engine.model_files import ModelFiles, load_digest
from semgap.experiment import provenance
from semgap.experiment.cell import Cell
from semgap.experiment.staleness import content_digest
from semgap.experiment.trial_load import load_manifest
from semgap.experiment.trial_relay import CLIENTS, KV_HOSTS
from semgap.experiment.trial_schemas import MANIFEST_SCHEMA
from semgap.experiment.trial_setup import Paths, TrialError
from semgap.experiment.trial_tables import Outcome
from semgap.network.spec import Network, asked_of, measured_of
from semgap.processes import slurm
from semgap.processes.machine import identity
from semgap.tensors import DType
from semgap.wire.ledger import Direction, frame_bytes

_IN_LAYER = re.compile(r"\.\d+\.")  # in a weight's name, the number of its layer


def trial_manifest(
    raw: Mapping[str, Any], paths: Paths, outcome: Outcome, exactness: Mapping[str, Any], telemetry: Mapping[str, Any]
) -> dict[str, Any]:
    """The manifest of a trial of the cell `raw`. TrialError if the steps' bytes do not add up to the ledger's."""
    report, cell = outcome.report, Cell.of(raw)
    session = report.session
    peer = session.books.peer if session else None
    run = provenance.describe_run(paths.root)
    digest = load_digest(paths.model_directory)
    return {
        "schema": MANIFEST_SCHEMA,
        "cell": raw,
        "cell_digest": content_digest(raw),
        "model": {
            "sha256": digest.sha256,
            "ratios_meaningful": digest.ratios_meaningful,
            "ratios_reason": digest.ratios_reason,
            **_layers(ModelFiles(paths.model_directory, digest)),
        },
        "session": provenance.session_id(),
        "fingerprint": provenance.fingerprint(run, report.device, _worker_node(cell)),
        "provenance": run,
        "hosts": {"client": identity(), "worker": session.granted.machine if session else None},
        "device": report.device,
        "executor": report.executor,
        "executor_reason": report.executor_reason,
        "executor_compiled_for": report.executor_compiled_for,
        "floor": report.load.engine["floor"] if report.load else msgspec.to_builtins(peer.floor if peer else report.floor),
        "probe": session.probe if session else None,
        "network": _network(cell, session, outcome.relays) if session else None,
        "started": outcome.started,
        "setup": report.setup | {"worker_start_s": outcome.worker_start_s},
        "memory": {
            "client_peak_rss_anon_bytes": report.client_peak_rss_anon_bytes,
            "worker_peak_rss_bytes": peer.peak_rss_bytes if peer else None,
            "worker_weight_store_bytes": peer.weight_store_bytes if peer else None,
        },
        "reconciliation": _reconciliation(report, session) if session else None,
        "cut": _cut(cell),
        "control": {"rows": len(report.control), "reason": no_control(cell.policy, cell.phase)},
        "exactness": exactness,
        "measured": msgspec.to_builtins(report.measured),
        "load": load_manifest(report),
        "telemetry": {**telemetry, "worker_clock": msgspec.to_builtins(session.clock) if session else None},
        "pcie_reason": peer.pcie_reason if peer else "local: the cache never leaves the device",
        "kv": {"budget_bytes": peer.kv_budget_bytes if peer else None, "fallbacks": _fallbacks(report)},
    }


def _fallbacks(report: Report) -> list[str]:
    """The reason of each restore or save of KV blocks that failed, on one worker or the other."""
    sessions = [report.session, report.second]
    return [reason for each in sessions if each for reason in each.books.peer.fallbacks]


def _layers(model: ModelFiles) -> dict[str, Any]:
    """The number of layers, and their part of the weights that a decode step reads: theirs and the output head's."""
    shape, itemsize = model.architecture, DType.from_torch_name(model.digest.dtype).itemsize
    own = sum(tensor.nbytes for tensor in model.digest.tensors if _IN_LAYER.search(tensor.name))
    return {"layers": shape.layers, "layers_share": own / (own + shape.vocab * shape.hidden * itemsize)}


def _cut(cell: Cell) -> dict[str, int] | None:
    """The decode steps that the mode's max_steps left, and the phase's, or None if it cut none."""
    most, steps = cell.policy.max_steps, cell.phase.steps
    return None if most is None or most >= steps else {"steps": most, "phase_steps": steps}


def _worker_node(cell: Cell) -> str | None:
    """The node on which the allocation's workers run, or None without srun. In local trials too: their latencies pair with the others'."""
    if cell.worker.launch != "srun":
        return None
    try:
        return slurm.allocation().other
    except slurm.AllocationError:  # a local trial in a job of one node
        return None


def _network(cell: Cell, session: Session, relays: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The client's link and, as `kv`, that of the worker to its KV host, which is None if the network has none or the mode no KV host."""
    kv = None
    if cell.kv_network and session.kv_probe:
        kv = {"network": cell.network.kv, "probe": session.kv_probe} | _link(cell.kv_network, session.kv_probe, relays.get(KV_HOSTS))
    return _link(cell.network, session.probe, relays.get(CLIENTS)) | {"kv": kv}


def _link(network: Network, probe: Mapping[str, Any], relay: Mapping[str, Any] | None) -> dict[str, Any]:
    """A link as the config asks for it and as the probe found it, and its relay's report without its table."""
    return {
        "asked": vars(asked_of(network)),
        "measured": measured_of(probe),
        "relay": relay and {key: value for key, value in relay.items() if key != "lateness"},
    }


def _reconciliation(report: Report, session: Session) -> dict[str, Any]:
    """The counters that agree to the byte. The client refused the session if they did not."""
    if report.load is None:
        _require_steps_to_add_up(report, session)
    books, others = session.books, [*report.connections, *([report.second] if report.second else [])]
    return {
        "agreed": True,
        "connections": 1 + len(others),
        "frame_bytes_by_kind": books.peer.frame_bytes_by_kind,
        "closing_frame_bytes": books.closing_frame_bytes,
        **_kernel_bytes(books.tcp),
        "tls": books.tls,
        "retransmitted_bytes": books.tcp["bytes_retrans"] + books.peer_tcp["bytes_retrans"],
        "kv_host": _kv_host(books.peer.kv_host),
        "others": [
            {"closing_frame_bytes": each.books.closing_frame_bytes, "kv_host": _kv_host(each.books.peer.kv_host)} for each in others
        ],
    }


def _kv_host(host: KVHostBooks | None) -> dict[str, Any] | None:
    if host is None:
        return None
    assert host.peer is not None
    return {
        "agreed": host.agreed,
        "tls": host.tls,
        "frame_bytes_by_kind": host.peer.frame_bytes_by_kind,
        "closing_frame_bytes": host.closing_frame_bytes,
        **_kernel_bytes(host.tcp),
        "peer": _kernel_bytes(host.peer_tcp),
    }


def _kernel_bytes(tcp: Mapping[str, int]) -> dict[str, int]:
    return {"kernel_bytes_sent": tcp["bytes_sent"] - tcp["bytes_retrans"], "kernel_bytes_received": tcp["bytes_received"]}


def _require_steps_to_add_up(report: Report, session: Session) -> None:
    """The measured steps' own byte counts must be all that the ledger holds as regular or delta."""
    for direction in Direction:
        in_steps = sum(step[f"{direction}_frame_bytes"] for step in report.steps if step["measured"])
        rows = [*session.books.rows, *(report.second.books.rows if report.second else ())]
        in_ledger = frame_bytes([row for row in rows if row.kind != "setup"], direction)
        if in_steps != in_ledger:
            raise TrialError(f"measured steps hold {in_steps} bytes {direction}, the ledger's regular and delta frames {in_ledger}")
