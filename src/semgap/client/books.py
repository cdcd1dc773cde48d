"""The client's work beside its requests: the worker's samplers and clock, and the reconciled books of a connection."""

from pathlib import Path
from typing import Any

import msgspec

from semgap.client.report import Books, ClockOffset, Granted, Sampled, worker_samples_file
from semgap.client.spec import ClientSpec, WorkerSide
from semgap.processes.machine import boot_id
from semgap.telemetry.clock import offset_s
from semgap.wire import frames, messages
from semgap.wire.ledger import LedgerError
from semgap.wire.link import Link
from semgap.wire.messages import Operation
from semgap.wire.reconcile import reconcile


def reconciled(link: Link) -> Books:
    """The session's reconciled books. LedgerError if two sides of any link differ."""
    books = msgspec.convert(reconcile(link), Books)
    kv_host = books.peer.kv_host
    if kv_host and not kv_host.agreed:
        raise LedgerError(f"the books of the worker and its KV host: {kv_host.reason}")
    return books


def start_samplers(link: Link, spec: ClientSpec, worker: WorkerSide, granted: Granted) -> None:
    """Starts the worker's samplers, on the client's cores if both sides share a machine."""
    cpus = spec.cpus if granted.machine["boot_id"] == boot_id() else ()
    wanted = messages.TelemetryRequest((), "start", worker.telemetry.interval_s, worker.telemetry.sources, cpus)
    link.request(Operation.TELEMETRY, wanted)


def fetch_samples(link: Link, spec: ClientSpec) -> dict[str, Sampled]:
    """Stops the worker's samplers and writes their files."""
    reply = link.request(Operation.TELEMETRY, messages.TelemetryRequest((), "stop"))
    sampled = msgspec.convert(body_of(reply), dict[str, Sampled])
    for source, payload in zip(sampled, reply.payloads, strict=True):
        (Path(spec.directory) / worker_samples_file(source)).write_bytes(payload)
    return sampled


def clock_offset(link: Link) -> ClockOffset:
    """The worker's clock against this one."""
    clock = messages.TelemetryRequest((), "clock")
    return ClockOffset(*offset_s(lambda: body_of(link.request(Operation.TELEMETRY, clock))))


def body_of(reply: frames.Frame) -> dict[str, Any]:
    """The JSON body of a report."""
    body: dict[str, Any] = msgspec.json.decode(reply.header_as(messages.Bodied).body)
    return body
