"""One trial of a cell: a fresh worker, its network, a client and samplers; tables and a manifest are what remains."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from semgap.client.control import no_control
from semgap.client.report import LOGITS_FILE, session_logits_file
from semgap.client.spec import ClientSpec
from semgap.engine.model_files import load_digest
from semgap.experiment import exactness
from semgap.experiment.cell import Cell
from semgap.experiment.exactness import Logits
from semgap.experiment.trial_client import run_sampled_client, waiting_client
from semgap.experiment.trial_faults import faults, steal_share
from semgap.experiment.trial_link import TrialLink, link_up, spaces_of, weights_are_held
from semgap.experiment.trial_load import capacity_of, compare_load, with_rates
from semgap.experiment.trial_manifest import trial_manifest
from semgap.experiment.trial_relay import CLIENTS, KV_HOSTS
from semgap.experiment.trial_schemas import TrialResult
from semgap.experiment.trial_setup import Paths, TrialError, check_model, client_spec, require_runnable
from semgap.experiment.trial_tables import Outcome, merge_telemetry, trial_tables
from semgap.network.spec import NetworkError
from semgap.processes.job_log import log_to
from semgap.processes.lifetime import end_with_parent, end_with_workflow
from semgap.processes.machine import measuring
from semgap.processes.pristine import Forked
from semgap.processes.scratch import scratch_directory
from semgap.seal import require_sealed

_AGAIN = 2  # times that a trial is measured again


@dataclass(frozen=True)
class Reference:
    """The reference of a phase; `logits` None for a load, whose file holds other arrays."""

    file: Path
    logits: Logits | None


def measure_trial(raw: Mapping[str, Any], paths: Paths, reference_file: Path, capacity_per_s: float | None = None) -> TrialResult:
    """Measures one cell, a dict that Config made. Everything that it starts ends with it, whatever kills it.

    `capacity_per_s`: of the mode of which the phase's arrivals are shares (measure_capacity.py).

    If the surroundings were at fault (trial_faults.py), it measures again, twice at most; the last result is then kept apart from the
    tables. Raises TrialError, BrokenPromise, ModelFileError, AllocationError; TrialError also if the ledgers do not reconcile, SealError
    for a reference that was altered.
    """
    end_with_workflow()
    cell = Cell.of(raw)
    require_runnable(cell)
    cell = msgspec.structs.replace(cell, phase=with_rates(cell.phase, capacity_per_s))
    require_sealed(reference_file)
    reference = Reference(reference_file, None if cell.phase.is_load else Logits.read(reference_file))
    earlier: list[str] = []
    with measuring():
        while True:
            result = _measure_once(raw, cell, paths, reference)
            apart = result.manifest["apart"]
            if apart is None or len(earlier) == _AGAIN:
                return TrialResult(result.tables, {**result.manifest, "earlier_faults": earlier})
            print(f"semgap: measuring again: {apart}", file=sys.stderr, flush=True)
            earlier.append(apart)


def _measure_once(raw: Mapping[str, Any], cell: Cell, paths: Paths, reference: Reference) -> TrialResult:
    with scratch_directory("trial") as scratch:
        spec = _trial_spec(cell, paths, scratch, reference)
        outcome = _run(cell, spec, paths, scratch)
        compared = _compare(cell, spec, scratch, reference)
        samples, notes = merge_telemetry(outcome, scratch)
    kept = require_promise_of_each_session(compared, cell)
    steal = steal_share(samples["host"], outcome.report.measured, os.cpu_count() or 1)
    surroundings = {"steal_share": steal, "apart": "; ".join(faults(cell, outcome, steal)) or None}
    manifest = {**trial_manifest(raw, paths, outcome, kept, notes), **surroundings}
    return TrialResult(trial_tables(outcome, compared[-1]) | samples, manifest)


def _trial_spec(cell: Cell, paths: Paths, scratch: Path, reference: Reference) -> ClientSpec:
    """The client's spec, with a control. A lossy mode's steps are fed the reference's tokens, so that every mode does the same work."""
    spec = msgspec.structs.replace(client_spec(cell, paths, scratch), control=no_control(cell.policy, cell.phase) is None)
    weights_bytes = sum(tensor.nbytes for tensor in load_digest(paths.model_directory).tensors)
    if weights_are_held(cell, weights_bytes):
        spec = msgspec.structs.replace(spec, weights_held=True, policy=msgspec.structs.replace(cell.policy, weights="by_hash"))
    if cell.policy.keeps != "lossy":
        return spec
    assert reference.logits is not None
    return msgspec.structs.replace(spec, forced_tokens=reference.logits.tokens[:, : spec.phase.steps + 1].tolist())


def _run(cell: Cell, spec: ClientSpec, paths: Paths, scratch: Path) -> Outcome:
    """Links up, runs the client, and ends everything. The client, the worker and the check of the model start at the same time.

    TrialError names the network if that is at fault.
    """
    try:
        with contextlib.ExitStack() as stack:
            spaces = spaces_of(cell, stack)
            client = stack.enter_context(waiting_client(spec, scratch, spaces.client if spaces else ()))
            checked = stack.enter_context(ThreadPoolExecutor(1)).submit(check_model, paths.model_directory, cell)
            held = spec if spec.weights_held else None
            link = None if cell.policy.is_local else link_up(cell, paths.root, scratch, stack, spaces, held)
            checked.result()
            with _naming_a_dead_relay(cell, link):
                report, samples = run_sampled_client(client, cell, scratch, link)
            relays = link.finish(cell, report) if link else {}
    except NetworkError as error:
        raise TrialError(f"network {cell.network_name!r}: {error}") from error
    started = "fork" if isinstance(client.process, Forked) else "exec"
    return Outcome(report, samples, relays, link.worker_start_s if link else None, started)


@contextlib.contextmanager
def _naming_a_dead_relay(cell: Cell, link: TrialLink | None) -> Iterator[None]:
    """A client that fails because its relay ended: TrialError says so."""
    try:
        yield
    except TrialError as error:
        names = {CLIENTS: f"network {cell.network_name!r}", KV_HOSTS: f"the link to the KV host (network {cell.network.kv!r})"}
        for side, relay in link.relays.items() if link else ():
            if relay.exit_status is not None:
                ended = f"the relay of {names[side]} ended by itself (exit {relay.exit_status})"
                raise TrialError(f"{ended}, and with it the client: {error}") from error
        raise


def _compare(cell: Cell, spec: ClientSpec, scratch: Path, reference: Reference) -> list[list[dict[str, Any]]]:
    """exactness.compare's rows of each session. The last session is the trial."""
    if reference.logits is None:
        return [compare_load(reference.file, scratch / LOGITS_FILE, exactness.MARGINS[cell.dtype])]
    earlier = [] if cell.policy.is_local else [session_logits_file(number) for number in range(1, spec.phase.sessions)]
    whole, margin = cell.policy.reply.kind == "logits_all", exactness.margin_of(cell.policy, cell.dtype)
    return [exactness.compare(reference.logits, Logits.read(scratch / file), whole, margin) for file in (*earlier, LOGITS_FILE)]


def require_promise_of_each_session(compared: list[list[dict[str, Any]]], cell: Cell) -> dict[str, Any]:
    """The last session's summary. BrokenPromise names the first session that broke the mode's promise."""
    for number, rows in enumerate(compared, 1):
        summary = exactness.summarise(rows, cell.policy.keeps)
        exactness.require_promise(summary, cell.mode, f" in session {number} of {len(compared)}" if len(compared) > 1 else "")
    return summary


def main(order: Mapping[str, Any]) -> None:
    """One job: measures `cell` and writes its directory `output`. Paths are absolute or of the workflow's working directory."""
    end_with_parent(order["parent"])
    with log_to(order["log"]):
        paths = Paths(Path(order["model_directory"]), Path(order["root"]))
        per_s = capacity_of(Path(order["capacity"])) if order["capacity"] else None
        measure_trial(order["cell"], paths, Path(order["reference"]), per_s).write(Path(order["output"]))


if __name__ == "__main__":
    main(json.load(sys.stdin))
