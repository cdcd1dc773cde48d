"""The tables of a trial, made from what its processes left."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from semgap.client.report import Books, Report, worker_samples_file
from semgap.experiment.trial_load import batch_rows, load_rows
from semgap.experiment.trial_schemas import BATCHES, CONTROL, LEDGER, LOAD, RELAY, REQUESTS, STEPS, TCP
from semgap.experiment.trial_setup import TrialError
from semgap.telemetry import samplers
from semgap.telemetry.samples import read_samples
from semgap.wire.ledger import Row
from semgap.wire.step_cost import Recovered, StepCost


@dataclass(frozen=True)
class Outcome:
    """The results of a trial's processes: the client's report, samples of this host by source, and the relays' reports by side.

    `started`: `fork` of a pristine parent, or `exec`, of client and worker.
    """

    report: Report
    samples: Mapping[str, samplers.SourceResult]
    relays: Mapping[str, Mapping[str, Any]]
    worker_start_s: float | None
    started: str


def trial_tables(outcome: Outcome, compared: list[dict[str, Any]]) -> dict[str, pa.Table]:
    """The tables but those of telemetry. `compared`: rows of exactness.compare."""
    report = outcome.report
    relay_rows = [{"side": side, **row} for side, relay in outcome.relays.items() for row in relay["lateness"]]
    return {
        "steps": pa.Table.from_pylist([] if report.load else step_rows(report, compared), STEPS),
        "load": pa.Table.from_pylist(load_rows(report.load, compared) if report.load else [], LOAD),
        "batches": pa.Table.from_pylist(batch_rows(report), BATCHES),
        "requests": pa.Table.from_pylist(list(report.requests), REQUESTS),
        "control": pa.Table.from_pylist(list(report.control), CONTROL),
        "ledger": pa.Table.from_pylist(ledger_rows(report), LEDGER),
        "tcp": pa.Table.from_pylist(tcp_rows(report), TCP),
        "relay": pa.Table.from_pylist(relay_rows, RELAY),
    }


def step_rows(report: Report, compared: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The client's rows, joined with the worker's costs by order and with the comparison, which has a row for each measured request's step.

    TrialError if client and worker counted different numbers of steps.
    """
    costs = _costs(report)
    comparison, rows = iter(compared), []
    for step in report.steps:
        row = step | {"kind": "prefill" if step["step"] == 0 else "decode"}
        if costs:
            row |= _cost_columns(costs[step["order"]])
            row["fallback"] = step.get("fallback") or row["fallback"]  # the first worker's, which could not save the blocks
        rows.append(row if step["warmup"] else row | next(comparison))
    return rows


def _costs(report: Report) -> dict[int, StepCost]:
    """The worker's costs by the order of the steps; {} without a worker. After its prefill a request that moves is the second worker's."""
    if report.session is None:
        return {}
    ran_on = [(report.session.books.peer.steps, False)] + ([(report.second.books.peer.steps, True)] if report.second else [])
    found: dict[int, StepCost] = {}
    for costs, second in ran_on:
        orders = sorted(step["order"] for step in report.steps if second is bool(report.second and step["moves"] and step["step"]))
        if costs and len(costs) != len(orders):
            raise TrialError(f"the client saw {len(orders)} steps of {'the second' if second else 'a'} worker, which counted {len(costs)}")
        found |= dict(zip(orders, costs, strict=False))
    return found


def _cost_columns(cost: StepCost) -> dict[str, Any]:
    """A step's time on the worker, and what the restoring of KV blocks took: bytes and stall are 0 if no block was missing."""
    recovered = cost.recovered or Recovered()
    return asdict(recovered) | {
        "worker_compute_s": cost.compute_ns / 1e9,
        "worker_cpu_s": cost.cpu_ns / 1e9,
        "worker_codec_s": cost.codec_ns / 1e9,
        "gpu_s": _seconds(cost.gpu_ns),
        "recovery": recovered.how,
        "recovery_planned": recovered.planned,
        "stall_s": recovered.stall_ns / 1e9,
        "predicted_s": _seconds(recovered.predicted_ns),
        "predicted_fetch_s": _seconds(recovered.predicted_fetch_ns),
        "predicted_recompute_s": _seconds(recovered.predicted_recompute_ns),
    }


def _seconds(ns: int | None) -> float | None:
    return None if ns is None else ns / 1e9


def ledger_rows(report: Report) -> list[dict[str, Any]]:
    """Both sides of each of the client's connections, and of the worker's link to its KV host, if it has one."""
    rows = []
    for number, (books, _) in enumerate(_connections(report)):
        host = books.peer.kv_host
        sides: dict[str, Iterable[Row]] = {"client": books.rows, "worker": books.peer_rows}
        sides |= {"worker_to_kv_host": host.rows, "kv_host": host.peer_rows} if host else {}
        rows += [{"connection": number, "side": side, **msgspec.to_builtins(row)} for side, own in sides.items() for row in own]
    return rows


def tcp_rows(report: Report) -> list[dict[str, Any]]:
    """The kernel's counters of each connection: the client's before and after the session, the worker's after it."""
    rows = []
    for number, (books, start_tcp) in enumerate(_connections(report)):
        assert report.session is not None
        client, worker = ({"connection": number, "side": side} for side in ("client", "worker"))
        rows += [
            {"moment": "start", **client, "congestion": books.congestion, **start_tcp},
            {"moment": "end", **client, "congestion": books.congestion, **books.tcp},
            {"moment": "end", **worker, "congestion": report.session.granted.congestion, **books.peer_tcp},
        ]
    return rows


def _connections(report: Report) -> list[tuple[Books, dict[str, int]]]:
    """Each connection's books, and the kernel's counters at its start. The session's is the first."""
    if report.session is None:
        return []
    others = [*report.connections, *([report.second] if report.second else [])]
    return [(report.session.books, report.session.start_tcp), *((each.books, each.start_tcp) for each in others)]


def merge_telemetry(outcome: Outcome, scratch: Path) -> tuple[dict[str, pa.Table], dict[str, Any]]:
    """One table a source, over both hosts, and a note on each: its rows, why values are missing, and the samplers' cost by side.

    The worker's stamps are moved to the client's clock.
    """
    session, tables, notes = outcome.report.session, {}, {}
    for source in samplers.SOURCES:
        parts = {}
        if source in outcome.samples:
            local = outcome.samples[source]
            parts["client"] = (read_samples(local.path), local.reason, local.cost and local.cost.describe())
        if session and source in session.samples:
            samples, remote = read_samples(scratch / worker_samples_file(source)), session.samples[source]
            parts["worker"] = (shifted(samples, -session.clock.offset_s), remote.reason, remote.cost)
        if not parts:
            unwanted = samplers.empty(source, scratch / f"no-{source}.json", "not in config.telemetry.sources")
            parts["client"] = (read_samples(unwanted.path), unwanted.reason, None)
        tables[source] = pa.concat_tables([samples for samples, _, _ in parts.values()])
        notes[source] = {
            "rows": tables[source].num_rows,
            "reason": "; ".join(f"{side}: {reason}" for side, (_, reason, _) in parts.items() if reason) or None,
            "cost": {side: cost for side, (_, _, cost) in parts.items()},
        }
    return tables, notes


def shifted(samples: pa.Table, by_s: float) -> pa.Table:
    """The samples with `by_s` added to their stamps."""
    if not by_s:
        return samples
    index = samples.schema.get_field_index("t_s")
    return samples.set_column(index, samples.schema.field(index), pc.add(samples["t_s"], by_s))
