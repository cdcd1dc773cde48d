"""A trial's client: run as a process of its own, with samplers beside it."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from semgap.client.report import TEXT_FILE, Report
from semgap.client.spec import ClientSpec
from semgap.experiment.cell import LOCAL, Cell
from semgap.experiment.trial_link import TrialLink
from semgap.experiment.trial_processes import RoleProcess, running
from semgap.experiment.trial_setup import Paths, check_model, client_spec, cores
from semgap.policy import Reply
from semgap.processes.lifetime import end_with_workflow
from semgap.processes.machine import measuring
from semgap.processes.pristine import Pristine
from semgap.processes.scratch import scratch_directory
from semgap.seal import write_sealed_npz
from semgap.telemetry import samplers

_PRISTINE = Pristine(("semgap.client.measure",))


def run_client(spec: ClientSpec, cell: Cell, scratch: Path) -> None:
    """Runs the client to its end. TrialError if it fails or takes longer than timeouts.trial_s."""
    with running("client", _command(spec, scratch), scratch / "client.log", spec.threads, pristine=_PRISTINE) as client:
        client.await_end(cell.timeouts.trial_s)


@contextlib.contextmanager
def waiting_client(spec: ClientSpec, scratch: Path, within: Sequence[str] = ()) -> Iterator[RoleProcess]:
    """A client that loads its code while its worker does, and waits for `run_sampled_client`. The command `within` runs it."""
    command = _command(msgspec.structs.replace(spec, waits=True), scratch, within)
    with running("client", command, scratch / "client.log", spec.threads, waits=True, pristine=_PRISTINE) as client:
        yield client


def run_sampled_client(
    client: RoleProcess, cell: Cell, scratch: Path, link: TrialLink | None
) -> tuple[Report, Mapping[str, samplers.SourceResult]]:
    """The report of a `waiting_client`, and samples of this host; of its GPU too in local modes, where no worker takes them.

    TrialError as in `run_client`.
    """
    client.tell(msgspec.json.encode(link and link.worker))
    relays = {side: relay.role.process.pid for side, relay in link.relays.items()} if link else {}
    sources = [source for source in cell.telemetry.sources if cell.policy.is_local or source == "host"]
    pids, thin = {"client": client.process.pid} | relays, cores(cell)[1]
    samples = samplers.start(scratch, pids=pids, interval_s=cell.telemetry.interval_s, sources=sources, cpus=thin)
    try:
        client.await_end(cell.timeouts.trial_s)
    finally:
        results = samples.stop()
    return Report.read(scratch), results


def run_locally(raw: Mapping[str, Any], paths: Paths, outputs: Mapping[str, Path]) -> None:
    """Runs a cell's phase with the local policy. Seals the client's files `outputs`, by name; text.npz takes a text pass."""
    end_with_workflow()
    cell = Cell.of(raw)
    local = LOCAL if not cell.phase.is_load else msgspec.structs.replace(LOCAL, reply=Reply("logits_last"))
    cell = msgspec.structs.replace(cell, policy=local)
    with measuring(), scratch_directory("reference") as scratch:
        check_model(paths.model_directory, cell)
        run_client(client_spec(cell, paths, scratch, text_pass=TEXT_FILE in outputs), cell, scratch)
        for name, output in outputs.items():
            write_sealed_npz(output, scratch / name)


def _command(spec: ClientSpec, scratch: Path, within: Sequence[str] = ()) -> list[str]:
    """Writes spec.json and gives the command of its client, which the command `within` runs."""
    spec = msgspec.structs.replace(spec, spawned_s=time.monotonic(), parent_pid=os.getpid())
    (scratch / "spec.json").write_bytes(msgspec.json.encode(spec))
    return [*within, sys.executable, "-m", "semgap.client.measure", str(scratch / "spec.json")]
