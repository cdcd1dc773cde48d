"""A trial's processes: worker, KV host, relay and client are started, awaited and ended here."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec

from semgap.client.spec import ClientSpec, Probe, Telemetry, WorkerSide
from semgap.experiment.trial_setup import TrialError, cores
from semgap.network.namespaces import Namespaces, namespaces
from semgap.network.relay_process import RelayProcess, lateness, relaying, require_in_time, require_same_bytes
from semgap.network.spec import Network
from semgap.processes import slurm
from semgap.processes.machine import boot_id
from semgap.processes.remote_lifetime import Order, attach, detach
from semgap.processes.ssh import explain, resolved_address, ssh_command
from semgap.telemetry import samplers
from semgap.wire.handshake import read_secret, write_secret

_LOG_LINES = 20


_REASON = re.compile(r"(semgap|[\w.]+(Error|Exception|Interrupt|Exit))( \w+)?: ")


_ATTACHED_ENDS_S = 10.0  # from its input's end


_SRUN_ENDS_S = 60.0  # it waits for Slurm's KillWait, 30 s if not set


_SINGLE_THREADED = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class TrialLink:
    """How a trial's client comes to its worker: a relay between them, or a command that runs the client on its side of a network."""

    worker: WorkerSide
    worker_start_s: float | None
    client_within: tuple[str, ...] = ()
    relay: RelayProcess | None = None


def link_up(cell: Mapping[str, Any], root: Path, scratch: Path, stack: contextlib.ExitStack) -> TrialLink:
    """The worker, and the cell's network before it."""
    network = msgspec.convert(cell["network_spec"], Network)
    spaces = stack.enter_context(namespaces(network)) if network.kind == "netns" else None
    worker, started_s = start_worker(cell, root, scratch, stack, spaces)
    worker = msgspec.structs.replace(worker, network=network)
    if network.kind != "relay":
        return TrialLink(worker, started_s, spaces.client if spaces else ())
    relay = stack.enter_context(relaying(network, worker.address, cores(cell)[1], scratch, cell["timeouts"]["worker_start_s"]))
    return TrialLink(msgspec.structs.replace(worker, address=relay.address), started_s, relay=relay)


def checked_relay(relayed: dict[str, Any], network: Network, report: Mapping[str, Any]) -> dict[str, Any]:
    """What a relay did, once its bytes are those of the books and its sends were in time; with its lateness in the measured requests."""
    require_same_bytes(relayed, report["link_bytes"])
    late = lateness(relayed, report["measured"]["start_s"], report["measured"]["end_s"])
    require_in_time(network, late)
    return relayed | {"measured_lateness": late}


def start_worker(
    cell: Mapping[str, Any], root: Path, scratch: Path, stack: contextlib.ExitStack, spaces: Namespaces | None = None
) -> tuple[WorkerSide, float | None]:
    """The external worker of the config, or a fresh one: here, on the far side of `spaces`, on the allocation's other node, or through ssh.

    And the seconds until it took clients.
    """
    settings = cell["worker"]
    side = WorkerSide(
        address=settings["address"] or "",
        telemetry=msgspec.convert(cell["telemetry"], Telemetry),
        probe=msgspec.convert(cell["probe"], Probe),
        secret_file=settings["secret_file"],
        timeout_s=cell["timeouts"]["reply_s"],
    )
    if settings["launch"] == "external":
        return side, None
    secret = scratch / "secret"
    write_secret(secret)
    begin = time.monotonic()
    if settings["launch"] == "local":
        address = _start_here(cell, root, scratch, stack, spaces)
    else:
        start = {"srun": _start_on_other_node, "ssh": _start_through_ssh}[settings["launch"]]
        address = start(cell, root, scratch, stack)
    started_s = time.monotonic() - begin
    return msgspec.structs.replace(side, address=address, secret_file=str(secret), stop=True), started_s


def _start_here(cell: Mapping[str, Any], root: Path, scratch: Path, stack: contextlib.ExitStack, spaces: Namespaces | None) -> str:
    """Starts a fresh worker on this machine, on the cores of who computes; gives its address.

    Its KV host is beside it, on the far side too: a network is the one between client and worker.
    """
    computing, thin = (",".join(map(str, cores)) for cores in cores(cell))
    within = spaces.worker if spaces else ()
    listen = cell["worker"]["address"] or (f"{spaces.worker_host}:0" if spaces else "127.0.0.1:0")
    arguments = ["--listen", listen, "--secret-file", str(scratch / "secret"), *_worker_arguments(cell, root)]
    arguments += ["--cpus", computing, "--io-cpus", thin]
    if cell["policy"]["shadow"] == "kvhost":
        arguments += ["--kv-host", _start_kv_host(cell, scratch, stack, within=within)]
    return _start(cell, "serve", arguments, scratch, stack, within)


def _start_on_other_node(cell: Mapping[str, Any], root: Path, scratch: Path, stack: contextlib.ExitStack) -> str:
    """Starts a fresh worker on the allocation's other node, through srun; gives its address.

    The secret goes through srun's standard input: it is in no argument, environment or shared file. The worker ends when that closes.
    """
    allocated = slurm.allocation()
    host, _, port = (cell["worker"]["address"] or "").rpartition(":")
    ip = slurm.resolve(host.format(node=allocated.other)) if host else slurm.address_of(allocated.other)
    arguments = ["--listen", f"[{ip}]:{port or 0}" if ":" in ip else f"{ip}:{port or 0}", "--attached", *_worker_arguments(cell, root)]
    if cell["cpus"]["worker"]:
        arguments += ["--cpus", ",".join(map(str, cell["cpus"]["worker"]))]
    if cell["policy"]["shadow"] == "kvhost":
        arguments += ["--kv-host", _start_kv_host(cell, scratch, stack, f"{slurm.address_of(allocated.here)}:0")]
    whole = [*slurm.on_node(allocated, allocated.other), sys.executable, "-m", "semgap", "serve", *arguments]
    return _launch(cell, "serve", whole, scratch, stack, attached=True)


def _start_through_ssh(cell: Mapping[str, Any], root: Path, scratch: Path, stack: contextlib.ExitStack) -> str:
    """Starts a fresh worker on the host of the config, through ssh; gives its address.

    The secret goes through ssh's standard input: it is in no argument, environment or file there. The worker ends when that closes.
    A weight cache is a directory there; `root` is none of its.
    """
    settings = cell["worker"]
    arguments = ["--listen", settings["address"] or resolved_address(settings), "--attached", *_worker_arguments(cell, Path())]
    if cell["cpus"]["worker"]:
        arguments += ["--cpus", ",".join(map(str, cell["cpus"]["worker"]))]
    whole = [settings["python"], "-m", "semgap", "serve", *arguments]
    command = ssh_command(settings, _threads_environment(cell["threads"]), whole)
    try:
        return _launch(cell, "serve", command, scratch, stack, attached=True)
    except TrialError as error:
        hint = explain(settings, (scratch / "serve.log").read_text())
        if hint is None:
            raise
        raise TrialError(f"{error}\n{hint}") from error


def _worker_arguments(cell: Mapping[str, Any], root: Path) -> list[str]:
    cache = cell["worker"]["weight_cache"]
    arguments = ["--threads", str(cell["threads"]), "--device", cell["device"], "--idle-s", str(cell["timeouts"]["trial_s"])]
    return [*arguments, *(("--weight-cache", str(root / cache)) if cache else ())]


def _start_kv_host(
    cell: Mapping[str, Any], scratch: Path, stack: contextlib.ExitStack, listen: str = "127.0.0.1:0", within: Sequence[str] = ()
) -> str:
    """Starts a fresh KV host on this machine, on the thin side's cores, with the trial's secret; gives its address."""
    arguments = [
        *("--listen", listen, "--secret-file", str(scratch / "secret"), "--budget-bytes", str(cell["worker"]["kv_host_bytes"])),
        *("--cpus", ",".join(map(str, cores(cell)[1])), "--idle-s", str(cell["timeouts"]["trial_s"])),
    ]
    return _start(cell, "kvhost", arguments, scratch, stack, within)


def _start(
    cell: Mapping[str, Any], command: str, arguments: list[str], scratch: Path, stack: contextlib.ExitStack, within: Sequence[str] = ()
) -> str:
    """Starts `semgap serve` or `kvhost` on this machine, run by the command `within`, and gives its address. It ends with the trial."""
    whole = [*within, sys.executable, "-m", "semgap", command, *arguments, "--parent-pid", str(os.getpid())]
    return _launch(cell, command, whole, scratch, stack)


def _launch(
    cell: Mapping[str, Any], command: str, whole: Sequence[str], scratch: Path, stack: contextlib.ExitStack, attached: bool = False
) -> str:
    """Runs a whole command that starts `semgap serve` or `kvhost`, and gives its address.

    `attached`: it is somewhere else, and tied to this process by its standard input, through which its order goes.
    """
    log = stack.enter_context((scratch / f"{command}.log").open("w+"))
    stdin = subprocess.PIPE if attached else None
    process = subprocess.Popen(whole, stdin=stdin, stdout=subprocess.PIPE, stderr=log, env=_environment(cell["threads"]))
    role = {"serve": "worker", "kvhost": "KV host"}[command]
    stack.callback(_end, process, role, log)
    if attached:
        attach(process, Order(read_secret(scratch / "secret").decode(), boot_id()))
    return _await_address(process, role, log, cell["timeouts"]["worker_start_s"])


def _await_address(process: subprocess.Popen, role: str, log: IO[str], timeout_s: float) -> str:
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], timeout_s)
    line = process.stdout.readline() if readable else b""
    if not line:
        why = f"died while it started (exit {process.wait(10)})" if readable else f"was not ready within {timeout_s} s"
        raise TrialError(f"the {role} {why}: {_last_words(Path(log.name))}")
    return json.loads(line)["address"]


@contextlib.contextmanager
def _client(spec: ClientSpec, scratch: Path, within: Sequence[str] = ()) -> Iterator[tuple[subprocess.Popen, IO[str]]]:
    spec = msgspec.structs.replace(spec, spawned_s=time.monotonic(), parent_pid=os.getpid())
    (scratch / "spec.json").write_bytes(msgspec.json.encode(spec))
    command = [*within, sys.executable, "-m", "semgap.client.measure", str(scratch / "spec.json")]
    with (scratch / "client.log").open("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=_environment(spec.threads))
        try:
            yield process, log
        finally:
            _end(process, "client", log)


def run_client(spec: ClientSpec, cell: Mapping[str, Any], scratch: Path) -> None:
    with _client(spec, scratch) as (process, log):
        _await_client(process, log, cell["timeouts"]["trial_s"])


def run_sampled_client(
    cell: Mapping[str, Any], spec: ClientSpec, scratch: Path, link: TrialLink | None
) -> tuple[dict[str, Any], dict[str, samplers.SourceResult]]:
    """The client's report, and samples of this host. In local modes they include the GPU's, else the worker takes those."""
    relay = {"relay": link.relay.process.pid} if link and link.relay else {}
    sources = [source for source in cell["telemetry"]["sources"] if spec.policy.is_local or source == "host"]
    with _client(spec, scratch, link.client_within if link else ()) as (process, log):
        pids, thin = {"client": process.pid} | relay, cores(cell)[1]
        samples = samplers.start(scratch, pids=pids, interval_s=cell["telemetry"]["interval_s"], sources=sources, cpus=thin)
        try:
            _await_client(process, log, cell["timeouts"]["trial_s"])
        finally:
            results = samples.stop()
    return json.loads((scratch / "report.json").read_bytes()), results


def _await_client(process: subprocess.Popen, log: IO[str], timeout_s: float) -> None:
    try:
        status = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        raise TrialError(f"the client was not done within timeouts.trial_s {timeout_s} s: {_last_words(Path(log.name))}") from None
    if status:
        raise TrialError(f"the client failed (exit {status}): {_last_words(Path(log.name))}")


def _end(process: subprocess.Popen, role: str, log: IO[str]) -> None:
    """Waits briefly for a process that should be ending, ends it otherwise, and puts its log into the trial's."""
    stops: list[tuple[Callable[[], None], float]] = [(lambda: None, 2 if role == "worker" else 0)]
    if process.stdin:  # started through srun or ssh: closing tells the process itself; a signal reaches srun or ssh
        stops = [(lambda: detach(process), _ATTACHED_ENDS_S), (process.terminate, _SRUN_ENDS_S)]
    for stop, patience_s in (*stops, (process.kill, None)):
        stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
            break
    log.seek(0)
    for line in log:
        print(f"[{role}] {line.rstrip()}", file=sys.stderr, flush=True)


def _last_words(log: Path) -> str:
    """What a process died of: its log from the last exception on, or the log's last lines. All of it is in the trial's own log."""
    lines = log.read_text().rstrip().splitlines()[-_LOG_LINES:]
    begins = [number for number, line in enumerate(lines) if _REASON.match(line)]
    return "\n".join(lines[begins[-1] :] if begins else lines) or "its log is empty"


def _environment(threads: int) -> dict[str, str]:
    return os.environ | _threads_environment(threads)


def _threads_environment(threads: int) -> dict[str, str]:
    return _SINGLE_THREADED | {"OMP_NUM_THREADS": str(threads)}
