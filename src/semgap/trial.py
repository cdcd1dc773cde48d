"""One grid cell, start to end: a fresh worker, the client, the samplers, and what they leave as Parquet and a manifest."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from semgap import exactness, provenance, slurm
from semgap.attachment import Order, attach, detach
from semgap.client import ClientError, ClientSpec, Phase, Probe, Telemetry, WorkerSide, require_same_threads
from semgap.emulation import RELAY, RelayProcess, lateness, relaying, require_in_time, require_same_bytes
from semgap.exactness import Logits
from semgap.footprint import DoesNotFit, footprint, free_bytes
from semgap.hosts import explain, resolved_address, ssh_command
from semgap.lifetime import end_with_workflow
from semgap.link import congestion_control, read_secret, write_secret
from semgap.machine import boot_id, identity, measuring, split_cores
from semgap.netns import Namespaces, namespaces
from semgap.network import Network, NetworkError, asked_of, measured_of, require_as_asked
from semgap.policy import Policy, policy_from, unrunnable
from semgap.runtime import Drawing, ModelFiles
from semgap.sampling import SamplingRule
from semgap.sources import ModelDigest, load_digest, verify_model
from semgap.telemetry import sampling
from semgap.tensors import DType

MANIFEST_SCHEMA = 1
_LOG_LINES = 20
_REASON = re.compile(r"(semgap|[\w.]+(Error|Exception|Interrupt|Exit))( \w+)?: ")
_ATTACHED_ENDS_S = 10.0  # from its input's end
_SRUN_ENDS_S = 60.0  # it waits for Slurm's KillWait, 30 s if not set
_SINGLE_THREADED = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

STEPS = pa.schema(
    [
        ("request", pa.int64()),
        ("step", pa.int64()),
        ("warmup", pa.bool_()),
        ("measured", pa.bool_()),
        ("kind", pa.string()),
        ("position", pa.int64()),
        ("tokens_in", pa.int64()),
        ("begin_s", pa.float64()),
        ("latency_s", pa.float64()),
        ("client_cpu_s", pa.float64()),
        ("worker_compute_s", pa.float64()),
        ("worker_cpu_s", pa.float64()),
        ("gpu_s", pa.float64()),
        ("up_tensor_bytes", pa.int64()),
        ("up_payload_bytes", pa.int64()),
        ("up_frame_bytes", pa.int64()),
        ("down_tensor_bytes", pa.int64()),
        ("down_payload_bytes", pa.int64()),
        ("down_frame_bytes", pa.int64()),
        ("round_trips", pa.int64()),
        ("up_segments", pa.int64()),
        ("down_segments", pa.int64()),
        ("token", pa.int64()),
        ("reference_token", pa.int64()),
        ("token_match", pa.bool_()),
        ("edge_draw", pa.bool_()),
        ("logits_bitwise", pa.bool_()),
        ("logits_max_abs_diff", pa.float64()),
        ("kl_nats", pa.float64()),
        ("evict_fraction", pa.float64()),
        ("evicted_layers", pa.int64()),
        ("saved_tensor_bytes", pa.int64()),
        ("saved_payload_bytes", pa.int64()),
        ("restore_alone_s", pa.float64()),
        ("recovery", pa.string()),
        ("recovery_planned", pa.string()),
        ("missing_bytes", pa.int64()),
        ("stall_s", pa.float64()),
        ("predicted_s", pa.float64()),
        ("fetched_network_bytes", pa.int64()),
        ("saved_network_bytes", pa.int64()),
        ("copied_bytes", pa.int64()),
        ("fallback", pa.string()),
    ]
)
REQUESTS = pa.schema(
    [
        ("request", pa.int64()),
        ("warmup", pa.bool_()),
        ("prompt_tokens", pa.int64()),
        ("new_tokens", pa.int64()),
        ("ttft_s", pa.float64()),
        ("e2e_s", pa.float64()),
        ("tpot_s", pa.float64()),
    ]
)
LEDGER = pa.schema(
    [(name, pa.string()) for name in ("side", "link", "direction", "operation", "kind", "tensor_class")]
    + [(name, pa.int64()) for name in ("frames", "round_trips", "tensor_bytes", "payload_bytes", "header_bytes", "encode_ns", "decode_ns")]
)
TCP = pa.schema(
    [("side", pa.string()), ("moment", pa.string())]
    + [(name, pa.int64()) for name in ("bytes_sent", "bytes_retrans", "bytes_received", "segs_out", "segs_in", "total_retrans", "rtt_us")]
    + [("congestion", pa.string()), ("segment_header_bytes", pa.int64())]
)


class TrialError(Exception):
    """A trial that failed; the message says which process, why, and the last lines of its log."""


@dataclass(frozen=True)
class TrialResult:
    """What a trial leaves: tables by file name without .parquet, and the manifest."""

    tables: Mapping[str, pa.Table]
    manifest: Mapping[str, Any]

    def write(self, directory: Path) -> None:
        """Writes every table and, last, the manifest: a directory with a manifest is whole."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, table in self.tables.items():
            pq.write_table(table, directory / f"{name}.parquet")
        (directory / "manifest.json").write_text(json.dumps(self.manifest, indent=1, sort_keys=True) + "\n")


@dataclass(frozen=True)
class Place:
    """Where a trial finds what it needs: the model's directory and the workflow's."""

    model_directory: Path
    root: Path


def run_trial(cell: Mapping[str, Any], place: Place, reference_file: Path) -> TrialResult:
    """Measures one cell. Everything that it starts ends with it, whatever kills it.

    Raises TrialError, BrokenPromise, ModelFileError, AllocationError; a trial whose ledgers do not reconcile is a TrialError.
    """
    end_with_workflow()
    policy = _policy(cell)
    _require_other_node(cell, policy)
    reference = Logits.read(reference_file)
    with measuring(), tempfile.TemporaryDirectory(prefix="semgap-trial-") as scratch:
        check_model(place.model_directory, cell)
        try:
            outcome = _run_roles(cell, policy, place, Path(scratch), reference)
        except NetworkError as error:
            raise TrialError(f"network {cell['network']!r}: {error}") from error
    summary = _require_promise_of_each_session(outcome.compared, policy.keeps, cell["mode"])
    tables = {
        "steps": pa.Table.from_pylist(_step_rows(outcome), STEPS),
        "requests": pa.Table.from_pylist(outcome.report["requests"], REQUESTS),
        "ledger": pa.Table.from_pylist(_ledger_rows(outcome.report), LEDGER),
        "tcp": pa.Table.from_pylist(_tcp_rows(outcome.report), TCP),
        "relay": pa.Table.from_pylist(outcome.report["relay"]["lateness"] if outcome.report.get("relay") else [], RELAY),
        **outcome.telemetry,
    }
    return TrialResult(tables, _manifest(cell, place, outcome, summary))


def _require_other_node(cell: Mapping[str, Any], policy: Policy) -> None:
    """AllocationError, before anything is waited for or started, where srun has no other node to start a worker on."""
    if cell["worker"]["launch"] == "srun" and not policy.is_local:
        slurm.allocation()


def _policy(cell: Mapping[str, Any]) -> Policy:
    """The cell's policy. TrialError, before any work, where it cannot be run on this machine."""
    policy = policy_from(cell["policy"], cell["mode"])
    reason = unrunnable(policy, cell["mode"], cell["worker"]["launch"])
    if reason:
        raise TrialError(reason)
    return policy


def _require_promise_of_each_session(compared: list[list[dict[str, Any]]], keeps: str, mode: str) -> dict[str, Any]:
    """The last session's summary, once every session has kept the promise. BrokenPromise names the one that did not."""
    for number, rows in enumerate(compared, 1):
        summary = exactness.summarise(rows, keeps)
        exactness.require_promise(summary, mode, f" in session {number} of {len(compared)}" if len(compared) > 1 else "")
    return summary


def run_reference(cell: Mapping[str, Any], place: Place, output: Path) -> None:
    """Writes what local gives for a phase's prompts: tokens, digests of its replies and last rows of logits, as .npz."""
    end_with_workflow()
    with measuring(), tempfile.TemporaryDirectory(prefix="semgap-reference-") as scratch:
        check_model(place.model_directory, cell)
        spec = _client_spec(cell, Policy(placement="local"), place, Path(scratch))
        _run_client(spec, cell, Path(scratch))
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes((Path(scratch) / "logits.npz").read_bytes())


def run_exactness_reference(cell: Mapping[str, Any], place: Place, drawn: Path, text: Path) -> None:
    """What local gives when it goes on from its own tokens (`drawn`), and when it is fed the text (`text`), each as .npz."""
    end_with_workflow()
    with measuring(), tempfile.TemporaryDirectory(prefix="semgap-reference-") as scratch:
        check_model(place.model_directory, cell)
        spec = msgspec.structs.replace(_client_spec(cell, Policy(placement="local"), place, Path(scratch)), text_pass=True)
        _run_client(spec, cell, Path(scratch))
        for name, output in (("logits.npz", drawn), ("text.npz", text)):
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_bytes((Path(scratch) / name).read_bytes())


def run_exactness(cell: Mapping[str, Any], place: Place, drawn: Path, text: Path) -> dict[str, Any]:
    """How exact a mode is, apart from any timing: its tokens when it goes on from them, and its logits when it is fed the text.

    BrokenPromise when it does not keep what its `keeps` says.
    """
    end_with_workflow()
    policy = _policy(cell)
    _require_other_node(cell, policy)
    with measuring(), tempfile.TemporaryDirectory(prefix="semgap-exactness-") as scratch, contextlib.ExitStack() as stack:
        check_model(place.model_directory, cell)
        worker, _ = _start_worker(cell, place.root, Path(scratch), stack)  # on this machine's loopback: the network changes no token
        sees_logits = policy.reply.kind != "token"
        spec = msgspec.structs.replace(_client_spec(cell, policy, place, Path(scratch)), worker=worker, text_pass=sees_logits)
        _run_client(spec, cell, Path(scratch))
        free = Logits.read(Path(scratch) / "logits.npz")
        fed = Logits.read(Path(scratch) / "text.npz") if sees_logits else None
    whole = policy.reply.kind == "logits_all"
    own = exactness.compare(Logits.read(drawn), free, whole, exactness.margin_of(policy, cell["dtype"]))
    while_alike = exactness.summarise(_until_apart(own), "lossy")
    result = exactness.summarise(own, policy.keeps) | {"first_difference": _first_difference(own)}
    result |= {name: while_alike[name] for name in ("logits_bitwise", "max_abs_diff", "max_kl_nats")}
    result |= _teacher_forced(Logits.read(text), fed, whole, cell["mode"])
    exactness.require_promise(result, cell["mode"])
    return {"model": cell["model"], "mode": cell["mode"], "cell_digest": provenance.content_digest(cell), **result}


def _until_apart(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows up to and with each request's first differing token; what follows it was computed from another text."""
    kept, apart = [], False
    for row in rows:
        apart &= row["step"] > 0
        if not apart:
            kept.append(row)
        apart |= row["token_match"] is not True
    return kept


def _first_difference(rows: list[dict[str, Any]]) -> int | None:
    """The earliest step of any request at which another token was drawn than local's; None where there is none."""
    return min((row["step"] for row in rows if row["token_match"] is False), default=None)


def _teacher_forced(reference: Logits, fed: Logits | None, whole: bool, mode: str) -> dict[str, Any]:
    """Differences of logits over the text, and of its cross entropy. Null for a mode whose client sees no logits."""
    steps = fed.tokens.shape[1] if fed else None  # a mode's max_steps may have cut it short: like is compared with like
    reference_nats = exactness.cross_entropy_nats(reference, steps)
    names = ("text_logits_bitwise", "text_max_abs_diff", "text_max_kl_nats", "text_mean_kl_nats", "text_cross_entropy_nats")
    if fed is None:
        nulls = dict.fromkeys(names)
        return nulls | {"text_reference_cross_entropy_nats": reference_nats, "text_reason": "the client sees tokens, no logits"}
    rows = exactness.compare(reference, fed, whole)
    summary = exactness.summarise(rows, "lossy")
    exactness.require_promise(summary, mode)
    finite = summary["max_kl_nats"] is not None
    mean_kl = sum(row["kl_nats"] for row in rows) / len(rows) if finite else None
    values = (summary["logits_bitwise"], summary["max_abs_diff"], summary["max_kl_nats"], mean_kl, exactness.cross_entropy_nats(fed))
    return dict(zip(names, values, strict=True)) | {"text_reference_cross_entropy_nats": reference_nats, "text_reason": None}


def run_network_check(cell: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Whether a network can be had, asked before any trial: what a probe finds of it, between a worker and where a client would be.

    TrialError names what is missing, who does not answer, or by how much the link is off what was asked for.
    """
    end_with_workflow()
    with measuring(), tempfile.TemporaryDirectory(prefix="semgap-network-") as scratch, contextlib.ExitStack() as stack:
        try:
            _require_congestion(cell["network_spec"].get("congestion"))
            link = _link_up(cell, root, Path(scratch), stack)
            probe = _probed(cell, link)
            require_same_threads(link.worker.address, probe["threads"], cell["threads"])
            require_as_asked(link.worker.network, probe)
        except (NetworkError, ClientError, TrialError) as error:
            raise TrialError(f"network {cell['network']!r}: {error}") from error
    return {"network": cell["network"], "asked": vars(asked_of(link.worker.network)), "measured": measured_of(probe)}


def _require_congestion(wanted: str | None) -> None:
    """NetworkError for a congestion control that this machine does not have."""
    with socket.socket() as sock:
        try:
            congestion_control(sock, wanted)
        except ValueError as error:
            available = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
            raise NetworkError(f"{error}; available: {', '.join(available)}") from error


def _probed(cell: Mapping[str, Any], link: _Link) -> dict[str, Any]:
    """What `semgap ping` finds from the client's place."""
    probe, secret = cell["probe"], ["--secret-file", link.worker.secret_file] if link.worker.secret_file else []
    command = [*link.client_within, sys.executable, "-m", "semgap", "ping", link.worker.address, *secret, "--json"]
    command += ["--round-trips", str(probe["round_trips"]), "--payload-bytes", str(probe["payload_bytes"])]
    command += ["--cpus", ",".join(map(str, _cpus(cell)[1])), "--parent-pid", str(os.getpid())]
    limit_s = cell["timeouts"]["trial_s"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise NetworkError(
            f"its probe took longer than timeouts.trial_s {limit_s} s: what listens at {link.worker.address} does not answer, or the link "
            "is too slow for it; raise timeouts.trial_s, or lower probe.payload_bytes"
        ) from None
    if done.returncode:
        raise NetworkError(done.stderr.strip())
    return json.loads(done.stdout)


def check_model(directory: Path, cell: Mapping[str, Any]) -> ModelDigest:
    """The model's digest, after its file was read once and found whole, which also brings it into the page cache.

    Before that file is read: TrialError where the device has no room for the model, as far as this process can know.
    """
    digest = load_digest(directory)
    if digest.dtype != cell["dtype"]:
        raise TrialError(f"{directory} holds {digest.dtype}, the config says dtype: {cell['dtype']}; rerun rule fetch_model")
    if cell["max_length"] > digest.max_positions:
        raise TrialError(
            f"config.max_length {cell['max_length']} is more than the context of model {digest.name!r}, {digest.max_positions} positions"
        )
    _require_room(ModelFiles(directory, digest), cell)
    return verify_model(directory)


def _require_room(model: ModelFiles, cell: Mapping[str, Any]) -> None:
    policy = policy_from(cell["policy"], cell["mode"]) if "policy" in cell else Policy(placement="local")
    phase = cell.get("phase_spec", {"live_requests": 1, "kv_budget": 1.0})
    elsewhere = not policy.is_local and cell["worker"]["launch"] != "local"
    free = None if elsewhere else free_bytes(cell["device"])
    if free is None:
        return
    weights_bytes = sum(tensor.nbytes for tensor in model.digest.tensors)
    itemsize = DType.from_torch_name(cell["dtype"]).itemsize
    kv_budget = 1.0 if policy.is_local else phase["kv_budget"]
    needed = footprint(model.config, weights_bytes, itemsize, cell["max_length"], policy, phase["live_requests"], kv_budget)
    try:
        needed.require(free, f"device {cell['device']}")
    except DoesNotFit as error:
        raise TrialError(str(error)) from error


@dataclass(frozen=True)
class _Outcome:
    """What the roles left behind, before it is made into tables."""

    report: dict[str, Any]
    compared: list[list[dict[str, Any]]]  # exactness.compare's rows of each session; the last one is the trial
    telemetry: dict[str, pa.Table]
    telemetry_notes: dict[str, Any]
    worker_start_s: float | None


def _run_roles(cell: Mapping[str, Any], policy: Policy, place: Place, scratch: Path, reference: Logits) -> _Outcome:
    spec = _client_spec(cell, policy, place, scratch)
    if policy.keeps == "lossy":
        forced = reference.tokens[:, : spec.phase.steps + 1].tolist()
        spec = msgspec.structs.replace(spec, forced_tokens=forced)
    with contextlib.ExitStack() as stack:
        link = None if policy.is_local else _link_up(cell, place.root, scratch, stack)
        spec = msgspec.structs.replace(spec, worker=link and link.worker)
        try:
            report, samples = _run_sampled_client(cell, spec, scratch, link)
        except TrialError as error:
            status = link and link.relay and link.relay.process.poll()
            if status is None:
                raise
            raise TrialError(
                f"the relay of network {cell['network']!r} ended by itself (exit {status}), and with it the client: {error}"
            ) from error
        if link and link.relay:
            report["relay"] = _checked(link.relay.finish(), link.worker.network, report)
    whole = policy.reply.kind == "logits_all"
    earlier = [] if policy.is_local else [f"logits-{number}.npz" for number in range(1, spec.phase.sessions)]
    margin = exactness.margin_of(policy, cell["dtype"])
    compared = [exactness.compare(reference, Logits.read(scratch / name), whole, margin) for name in (*earlier, "logits.npz")]
    offset_s = report.get("worker_clock", {}).get("offset_s", 0.0)
    telemetry, notes = _merge_telemetry(scratch, samples, report.get("worker_telemetry", {}), offset_s)
    return _Outcome(report, compared, telemetry, notes, link.worker_start_s if link else None)


@dataclass(frozen=True)
class _Link:
    """How a trial's client comes to its worker: a relay between them, or a command that runs the client on its side of a network."""

    worker: WorkerSide
    worker_start_s: float | None
    client_within: tuple[str, ...] = ()
    relay: RelayProcess | None = None


def _link_up(cell: Mapping[str, Any], root: Path, scratch: Path, stack: contextlib.ExitStack) -> _Link:
    """The worker, and the cell's network before it."""
    network = msgspec.convert(cell["network_spec"], Network)
    spaces = stack.enter_context(namespaces(network)) if network.kind == "netns" else None
    worker, started_s = _start_worker(cell, root, scratch, stack, spaces)
    worker = msgspec.structs.replace(worker, network=network)
    if network.kind != "relay":
        return _Link(worker, started_s, spaces.client if spaces else ())
    relay = stack.enter_context(relaying(network, worker.address, _cpus(cell)[1], scratch, cell["timeouts"]["worker_start_s"]))
    return _Link(msgspec.structs.replace(worker, address=relay.address), started_s, relay=relay)


def _checked(relayed: dict[str, Any], network: Network, report: Mapping[str, Any]) -> dict[str, Any]:
    """What a relay did, once its bytes are those of the books and its sends were in time; with its lateness in the measured requests."""
    require_same_bytes(relayed, report["link_bytes"])
    late = lateness(relayed, report["measured"]["start_s"], report["measured"]["end_s"])
    require_in_time(network, late)
    return relayed | {"measured_lateness": late}


def _client_spec(cell: Mapping[str, Any], policy: Policy, place: Place, scratch: Path) -> ClientSpec:
    computing, thin = _cpus(cell)
    phase = msgspec.convert(cell["phase_spec"], Phase)
    files = ModelFiles(place.model_directory, load_digest(place.model_directory))
    return ClientSpec(
        directory=str(scratch),
        model_directory=str(place.model_directory),
        prompts_file=str(place.root / cell["prompts"]),
        policy=policy,
        phase=msgspec.structs.replace(phase, steps=min(phase.steps, policy.max_steps or phase.steps)),
        dtype=cell["dtype"],
        threads=cell["threads"],
        max_length=cell["max_length"],
        device=cell["device"],
        executor=cell["executor"],
        drawing=Drawing(msgspec.convert(cell["sampling"]["rule"], SamplingRule), cell["sampling"]["seed"]),
        cpus=computing if policy.is_local else thin,
        layers=files.layers,
        model_id=files.digest.sha256,
    )


def _start_worker(
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
    computing, thin = (",".join(map(str, cores)) for cores in _cpus(cell))
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
        *("--cpus", ",".join(map(str, _cpus(cell)[1])), "--idle-s", str(cell["timeouts"]["trial_s"])),
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
    command = [*within, sys.executable, "-m", "semgap.client", str(scratch / "spec.json")]
    with (scratch / "client.log").open("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=_environment(spec.threads))
        try:
            yield process, log
        finally:
            _end(process, "client", log)


def _run_client(spec: ClientSpec, cell: Mapping[str, Any], scratch: Path) -> None:
    with _client(spec, scratch) as (process, log):
        _await_client(process, log, cell["timeouts"]["trial_s"])


def _run_sampled_client(
    cell: Mapping[str, Any], spec: ClientSpec, scratch: Path, link: _Link | None
) -> tuple[dict[str, Any], dict[str, sampling.SourceResult]]:
    """The client's report, and samples of this host. In local modes they include the GPU's, else the worker takes those."""
    relay = {"relay": link.relay.process.pid} if link and link.relay else {}
    sources = [source for source in cell["telemetry"]["sources"] if spec.policy.is_local or source == "host"]
    with _client(spec, scratch, link.client_within if link else ()) as (process, log):
        pids, thin = {"client": process.pid} | relay, _cpus(cell)[1]
        samples = sampling.start(scratch, pids=pids, interval_s=cell["telemetry"]["interval_s"], sources=sources, cpus=thin)
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


def computing_cores(cell: Mapping[str, Any]) -> tuple[int, ...]:
    """Cores of the side that computes."""
    return _cpus(cell)[0]


def _cpus(cell: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Cores of the side that computes and of the thin side: the config's, or the last `threads` allowed ones and the rest."""
    try:
        return split_cores(cell["threads"], tuple(cell["cpus"]["worker"] or ()), tuple(cell["cpus"]["client"] or ()))
    except ValueError as error:
        raise TrialError(f"config.cpus: {error}") from error


def _step_rows(outcome: _Outcome) -> list[dict[str, Any]]:
    """The client's rows, with the worker's costs (one a step, as they came) and the comparison (one a measured request's step)."""
    steps = outcome.report["steps"]
    costs = outcome.report.get("worker_steps")
    if costs and len(costs) != len(steps):
        raise TrialError(f"the client saw {len(steps)} steps, the worker {len(costs)}")
    compared = iter(outcome.compared[-1])
    rows = []
    for step in steps:
        row = step | {"kind": "prefill" if step["step"] == 0 else "decode"}
        if costs:
            row |= _cost_columns(costs[step["order"]])
        rows.append(row if step["warmup"] else row | next(compared))
    return rows


def _cost_columns(cost: Mapping[str, Any]) -> dict[str, Any]:
    """What a step took on the worker; what it took to restore KV blocks is 0 where none was missing."""
    columns = {"worker_compute_s": cost["compute_ns"] / 1e9, "worker_cpu_s": cost["cpu_ns"] / 1e9}
    columns["gpu_s"] = None if cost["gpu_ns"] is None else cost["gpu_ns"] / 1e9
    recovered = cost["recovered"]
    if recovered is None:
        nothing = ("missing_bytes", "fetched_network_bytes", "saved_network_bytes", "copied_bytes")
        return columns | dict.fromkeys(nothing, 0) | {"stall_s": 0.0}
    predicted = recovered["predicted_ns"]
    columns |= {name: recovered[name] for name in ("missing_bytes", "fetched_network_bytes", "saved_network_bytes", "copied_bytes")}
    columns |= {"recovery": recovered["how"], "recovery_planned": recovered["planned"], "fallback": recovered["fallback"]}
    return columns | {"stall_s": recovered["stall_ns"] / 1e9, "predicted_s": None if predicted is None else predicted / 1e9}


def _ledger_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Both sides of the client's link to the worker, and of the worker's to its KV host, where it has one."""
    host = report.get("kv_host") or {"rows": [], "peer_rows": []}
    sides = {"client": report.get("client_rows", []), "worker": report.get("worker_rows", [])}
    sides |= {"worker_to_kv_host": host["rows"], "kv_host": host["peer_rows"]}
    return [{"side": side, **row} for side, rows in sides.items() for row in rows]


def _tcp_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    if "client_tcp" not in report:
        return []
    moments = (("client", "start", "start_tcp"), ("client", "end", "client_tcp"), ("worker", "end", "worker_tcp"))
    congestion = {"client": report["congestion"], "worker": report["granted"]["congestion"]}
    return [{"side": side, "moment": moment, "congestion": congestion[side], **report[key]} for side, moment, key in moments]


def _merge_telemetry(
    scratch: Path, local: Mapping[str, sampling.SourceResult], remote: Mapping[str, dict[str, Any]], worker_offset_s: float
) -> tuple[dict[str, pa.Table], dict[str, Any]]:
    """One table a source, over both hosts, and a note on each: rows, reason for what is missing, what the samplers cost.

    The worker's stamps are put on the client's clock, from which `worker_offset_s` tells that of its host.
    """
    tables: dict[str, pa.Table] = {}
    notes: dict[str, Any] = {}
    for source in sampling.SOURCES:
        parts = {}
        if source in local:
            cost = local[source].cost
            parts["client"] = (_read_samples(local[source].path), local[source].reason, cost and cost.describe())
        if source in remote:
            samples = _shifted(_read_samples(scratch / f"worker-{source}.parquet"), -worker_offset_s)
            parts["worker"] = (samples, remote[source]["reason"], remote[source]["cost"])
        if not parts:
            unasked = sampling.empty(source, scratch / f"no-{source}.parquet", "not in config.telemetry.sources")
            parts["client"] = (_read_samples(unasked.path), unasked.reason, None)
        tables[source] = pa.concat_tables([part[0] for part in parts.values()])
        reasons = [f"{side}: {part[1]}" for side, part in parts.items() if part[1]]
        notes[source] = {
            "rows": tables[source].num_rows,
            "reason": "; ".join(reasons) or None,
            "cost": {side: part[2] for side, part in parts.items()},
        }
    return tables, notes


def _shifted(samples: pa.Table, by_s: float) -> pa.Table:
    """The samples with `by_s` added to their stamps."""
    if not by_s:
        return samples
    index = samples.schema.get_field_index("t_s")
    return samples.set_column(index, samples.schema.field(index), pc.add(samples["t_s"], by_s))


def _read_samples(path: Path) -> pa.Table:
    """A Parquet file's table. pq.read_table would import pandas, which a trial does without."""
    with pq.ParquetFile(path) as file:
        return file.read()


def _manifest(cell: Mapping[str, Any], place: Place, outcome: _Outcome, summary: dict[str, Any]) -> dict[str, Any]:
    report = outcome.report
    run = provenance.describe_run(place.root)
    digest = verify_model(place.model_directory)
    return {
        "schema": MANIFEST_SCHEMA,
        "cell": cell,
        "cell_digest": provenance.content_digest(cell),
        "model": {"sha256": digest.sha256, "ratios_meaningful": digest.ratios_meaningful, "ratios_reason": digest.ratios_reason},
        "session": provenance.session_id(),
        "fingerprint": provenance.fingerprint(run, report["device"], _worker_node(cell)),
        "provenance": run,
        "hosts": _hosts(report),
        "device": report["device"],
        "executor": report["executor"],
        "probe": report.get("probe"),
        "network": _network(cell, report),
        "setup": report["setup"] | {"worker_start_s": outcome.worker_start_s},
        "memory": {
            "client_peak_rss_anon_bytes": report["client_peak_rss_anon_bytes"],
            "worker_peak_rss_bytes": report.get("worker_peak_rss_bytes"),
            "worker_weight_store_bytes": report.get("worker_weight_store_bytes"),
        },
        "reconciliation": _reconciliation(report),
        "exactness": summary,
        "measured": report["measured"],
        "telemetry": outcome.telemetry_notes | {"worker_clock": report.get("worker_clock")},
        "pcie_reason": report.get("pcie_reason", "local: the cache never leaves the device"),
        "kv": {"budget_bytes": report.get("kv_budget_bytes"), "fallbacks": report.get("fallbacks", [])},
    }


def _network(cell: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the link was asked to be and what was measured of it, and what a relay did. None in local, which has no link."""
    if "probe" not in report:
        return None
    asked, relayed = asked_of(msgspec.convert(cell["network_spec"], Network)), report.get("relay")
    return {
        "asked": {"rtt_s": asked.rtt_s, "goodput_bytes_per_s": asked.goodput_bytes_per_s},
        "measured": measured_of(report["probe"]),
        "relay": relayed and {key: value for key, value in relayed.items() if key != "lateness"},
    }


def _hosts(report: Mapping[str, Any]) -> dict[str, Any]:
    """Where the two sides ran; the worker is null in local."""
    return {"client": identity(), "worker": report["granted"]["machine"] if "granted" in report else None}


def _worker_node(cell: Mapping[str, Any]) -> str | None:
    """The node on which this allocation's workers run, in local trials too, so that their latencies pair with the others'."""
    if cell["worker"]["launch"] != "srun":
        return None
    try:
        return slurm.allocation().other
    except slurm.AllocationError:  # a local trial in a job of one node
        return None


def _require_steps_to_add_up(report: Mapping[str, Any]) -> None:
    """The measured steps' own byte counts must be all that the ledger holds as regular or delta."""
    for direction in ("up", "down"):
        in_steps = sum(step[f"{direction}_frame_bytes"] for step in report["steps"] if step["measured"])
        rows = [row for row in report["client_rows"] if row["direction"] == direction and row["link"] == "network"]
        in_ledger = sum(row["payload_bytes"] + row["header_bytes"] for row in rows if row["kind"] != "setup")
        if in_steps != in_ledger:
            raise TrialError(f"measured steps hold {in_steps} bytes {direction}, the ledger's regular and delta frames {in_ledger}")


def _reconciliation(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """What agreed to the byte; a trial where it did not never gets here. None in local, which has no socket."""
    if "client_rows" not in report:
        return None
    _require_steps_to_add_up(report)
    return {
        "agreed": True,
        "frame_bytes_by_kind": report["frame_bytes_by_kind"],
        "closing_frame_bytes": report["closing_frame_bytes"],
        "kernel_bytes_sent": report["client_tcp"]["bytes_sent"] - report["client_tcp"]["bytes_retrans"],
        "kernel_bytes_received": report["client_tcp"]["bytes_received"],
        "retransmitted_bytes": report["client_tcp"]["bytes_retrans"] + report["worker_tcp"]["bytes_retrans"],
        "kv_host": report["kv_host"]
        and {
            "agreed": report["kv_host"]["agreed"],
            "frame_bytes_by_kind": report["kv_host"]["peer"]["frame_bytes_by_kind"],
            "kernel_bytes_sent": report["kv_host"]["tcp"]["bytes_sent"] - report["kv_host"]["tcp"]["bytes_retrans"],
            "kernel_bytes_received": report["kv_host"]["tcp"]["bytes_received"],
        },
    }
