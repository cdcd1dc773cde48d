"""One grid cell, start to end: a fresh worker, the client, the samplers, and what they leave as Parquet and a manifest."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from semgap.experiment import exactness
from semgap.experiment.exactness import Logits
from semgap.experiment.trial_files import (
    LEDGER,
    REQUESTS,
    STEPS,
    TCP,
    Outcome,
    TrialResult,
    ledger_rows,
    manifest_of,
    merge_telemetry,
    step_rows,
    tcp_rows,
)
from semgap.experiment.trial_processes import checked_relay, link_up, run_sampled_client
from semgap.experiment.trial_setup import Paths, TrialError, check_model, client_spec, require_other_node, runnable_policy
from semgap.network.relay_process import RELAY
from semgap.network.spec import NetworkError
from semgap.policy import Policy
from semgap.processes.lifetime import end_with_workflow
from semgap.processes.machine import measuring


def measure_trial(cell: Mapping[str, Any], place: Paths, reference_file: Path) -> TrialResult:
    """Measures one cell. Everything that it starts ends with it, whatever kills it.

    Raises TrialError, BrokenPromise, ModelFileError, AllocationError; a trial whose ledgers do not reconcile is a TrialError.
    """
    end_with_workflow()
    policy = runnable_policy(cell)
    require_other_node(cell, policy)
    reference = Logits.read(reference_file)
    with measuring(), tempfile.TemporaryDirectory(prefix="semgap-trial-") as scratch:
        check_model(place.model_directory, cell)
        try:
            outcome = _run_roles(cell, policy, place, Path(scratch), reference)
        except NetworkError as error:
            raise TrialError(f"network {cell['network']!r}: {error}") from error
    summary = _require_promise_of_each_session(outcome.compared, policy.keeps, cell["mode"])
    tables = {
        "steps": pa.Table.from_pylist(step_rows(outcome), STEPS),
        "requests": pa.Table.from_pylist(outcome.report["requests"], REQUESTS),
        "ledger": pa.Table.from_pylist(ledger_rows(outcome.report), LEDGER),
        "tcp": pa.Table.from_pylist(tcp_rows(outcome.report), TCP),
        "relay": pa.Table.from_pylist(outcome.report["relay"]["lateness"] if outcome.report.get("relay") else [], RELAY),
        **outcome.telemetry,
    }
    return TrialResult(tables, manifest_of(cell, place, outcome, summary))


def _require_promise_of_each_session(compared: list[list[dict[str, Any]]], keeps: str, mode: str) -> dict[str, Any]:
    """The last session's summary, once every session has kept the promise. BrokenPromise names the one that did not."""
    for number, rows in enumerate(compared, 1):
        summary = exactness.summarise(rows, keeps)
        exactness.require_promise(summary, mode, f" in session {number} of {len(compared)}" if len(compared) > 1 else "")
    return summary


def _run_roles(cell: Mapping[str, Any], policy: Policy, place: Paths, scratch: Path, reference: Logits) -> Outcome:
    spec = client_spec(cell, policy, place, scratch)
    if policy.keeps == "lossy":
        forced = reference.tokens[:, : spec.phase.steps + 1].tolist()
        spec = msgspec.structs.replace(spec, forced_tokens=forced)
    with contextlib.ExitStack() as stack:
        link = None if policy.is_local else link_up(cell, place.root, scratch, stack)
        spec = msgspec.structs.replace(spec, worker=link and link.worker)
        try:
            report, samples = run_sampled_client(cell, spec, scratch, link)
        except TrialError as error:
            status = link and link.relay and link.relay.process.poll()
            if status is None:
                raise
            raise TrialError(
                f"the relay of network {cell['network']!r} ended by itself (exit {status}), and with it the client: {error}"
            ) from error
        if link and link.relay:
            report["relay"] = checked_relay(link.relay.finish(), link.worker.network, report)
    whole = policy.reply.kind == "logits_all"
    earlier = [] if policy.is_local else [f"logits-{number}.npz" for number in range(1, spec.phase.sessions)]
    margin = exactness.margin_of(policy, cell["dtype"])
    compared = [exactness.compare(reference, Logits.read(scratch / name), whole, margin) for name in (*earlier, "logits.npz")]
    offset_s = report.get("worker_clock", {}).get("offset_s", 0.0)
    telemetry, notes = merge_telemetry(scratch, samples, report.get("worker_telemetry", {}), offset_s)
    return Outcome(report, compared, telemetry, notes, link.worker_start_s if link else None)
