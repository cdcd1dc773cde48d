"""The books against the wire: what an independent capture of each trial's connections saw is what both ledgers and both kernels say."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from captured import Capture, Flow, Way, own_network

from semgap.engine.model_files import load_digest
from semgap.experiment.compute_reference import compute_reference
from semgap.experiment.config import Config, Coordinates, check_config
from semgap.experiment.measure_trial import measure_trial
from semgap.experiment.trial_schemas import TrialResult
from semgap.experiment.trial_setup import Paths

pytestmark = [pytest.mark.alone, pytest.mark.usefixtures("own_run", "network")]

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = yaml.safe_load((ROOT / "config/config.yaml").read_text())
EMPTY_FRAME_BYTES, RECORD_BYTES = 28, 22  # as docs/wire.md has them: of a shutdown and its answer, and of a TLS record
KV = yaml.safe_load((ROOT / "config/kv.yaml").read_text())["define"]["modes"]
PHASES = {
    "prefill": {"kind": "prefill", "prompt_lengths": [20], "requests": 2, "networks": ["loopback"]},
    "decode": {"kind": "decode", "prompt_lengths": [12], "requests": 2, "steps": 4},
    "recovery-evict": {"kind": "recovery", "prompt_lengths": [70], "steps": 4, "evict_fractions": [0, 0.5, 1]},
    "prefix": {"kind": "prefix", "prompt_lengths": [70], "prefix_lengths": [0, 64], "requests": 2, "networks": ["loopback"]},
    "handover": {"kind": "handover", "prompt_lengths": [70], "requests": 2, "steps": 2, "networks": ["loopback"]},
    "load": {"kind": "load", "prompt_lengths": [8], "steps": 3, "requests": 3, "concurrency": [1, 4], "networks": ["loopback"]},
}


def _config(source: dict[str, Any], tls: bool = False) -> Config:
    """Every mode that the default config and config/kv.yaml define, short phases and a tiny model."""
    modes = {name: row | {"networks": None} for name, row in KV.items()} | DEFAULT["define"]["modes"]
    raw = DEFAULT | {"modes": list(modes), "phases": list(PHASES), "networks": ["loopback"], "models": ["tiny"]}
    raw["define"] = DEFAULT["define"] | {"models": {"tiny": source}, "phases": DEFAULT["define"]["phases"] | PHASES, "modes": modes}
    raw |= {"worker": {"tls": tls}, "max_length": 96, "device": "cpu", "trials": 1, "probe": {"round_trips": 3, "payload_bytes": 1 << 20}}
    raw["exactness"] = {"prompts": 1, "prompt_length": 80, "tokens": 4}
    raw["telemetry"] = {"interval_s": 0.05, "sources": ["host"]}
    return check_config(raw, ROOT)


TRIALS = [(at.mode, at.phase) for at in _config({"source": "random"}).grid() if at.mode != "local"]
UNDER_TLS = [("naive", "decode"), ("remote_cache", "decode"), ("sys", "decode"), ("sys_delta", "recovery-evict"), ("loop", "load")]
UNDER_TLS += [("prefix_blocks", "prefix"), ("handover_layers", "handover")]


def test_every_remote_mode_of_the_default_config_and_of_kv_yaml_is_captured() -> None:
    remote = {name for name, row in (DEFAULT["define"]["modes"] | KV).items() if row.get("placement") != "local"}
    assert {mode for mode, _ in TRIALS} == remote


@pytest.fixture(scope="module")
def network() -> Iterator[None]:
    try:
        with own_network():
            yield
    except PermissionError as error:
        pytest.skip(f"a capture needs root: {error}")


@pytest.fixture(scope="module")
def run(llama: Path, tmp_path_factory: pytest.TempPathFactory, network: None) -> Callable[..., tuple[TrialResult, list[Flow]]]:
    """A trial's result, and its connections as they were captured; each is run once."""
    configs = {tls: _config(load_digest(llama).source, tls) for tls in (False, True)}
    place, references = Paths(llama, ROOT), dict[str, Path]()
    done: dict[tuple[str, str, bool], tuple[TrialResult, list[Flow]]] = {}

    def run(mode: str, phase: str, tls: bool = False) -> tuple[TrialResult, list[Flow]]:
        if phase not in references:
            references[phase] = tmp_path_factory.mktemp("reference") / "reference.npz"
            compute_reference(configs[False].reference_cell("tiny", phase), place, references[phase])
        if (mode, phase, tls) not in done:
            cell = configs[tls].cell(Coordinates("tiny", "loopback", mode, phase, 1))
            with Capture() as capture:
                result = measure_trial(cell, place, references[phase])
            done[mode, phase, tls] = result, capture.flows
        return done[mode, phase, tls]

    return run


def differences(result: TrialResult, flows: list[Flow]) -> list[str]:
    """Where a capture, the kernels and the ledgers say different numbers of bytes. None: all say the same, of each connection."""
    said, of_hosts = result.manifest["reconciliation"], dict(_books_of_kv_hosts(result))
    ports = Counter(flow.port for flow in flows)
    del ports[flows[0].port]  # the client connects to its worker before any worker does to the KV host
    kv_port = next((port for port, count in ports.items() if count == len(of_hosts)), None)
    clients, hosts = ([flow for flow in flows if (flow.port == kv_port) is at] for at in (False, True))
    if len(clients) != said["connections"] or len(hosts) != len(of_hosts):
        return [f"{len(clients)} connections to workers and {len(hosts)} to their KV host"]
    found = [*_unseen("workers", _said_of_clients(result), clients), *_kernels_and_ledgers(result)]
    kernels = [(each["kernel_bytes_sent"], each["kernel_bytes_received"]) for each in of_hosts.values()]
    found += _unseen("the KV host", kernels, hosts)
    for number, books in of_hosts.items():
        ledgers = {side: _ledger(result, side, number) for side in ("worker_to_kv_host", "kv_host")}
        (up, down), closing = ledgers["kv_host"], books["closing_frame_bytes"]  # the answer with the KV host's counters ends the books
        worker, host = ((each["kernel_bytes_sent"], each["kernel_bytes_received"]) for each in (books, books["peer"]))
        if worker != (up, down + closing) or (up, down) != host[::-1] or ledgers["worker_to_kv_host"] != (up, down):
            found.append(f"KV host, connection {number}: kernels {worker} and {host}, ledgers {ledgers}")
    return found


def _books_of_kv_hosts(result: TrialResult) -> Iterator[tuple[int, dict[str, Any]]]:
    """The books of the worker's link to its KV host, by the number of the connection whose session has it."""
    said = result.manifest["reconciliation"]
    for number, books in enumerate([said["kv_host"], *(each["kv_host"] for each in said["others"])]):
        if books is not None:
            yield number, books


def _unseen(of: str, said: Iterable[tuple[int, int]], flows: list[Flow]) -> list[str]:
    """The bytes (up, down) of connections that the books say and the capture does not, or the other way round. They come in any order."""
    seen = Counter(said)
    seen.subtract(flow.payload_bytes for flow in flows)
    return [f"books and capture of {of} differ: {bytes_} (up, down) by {count}" for bytes_, count in seen.items() if count]


def _said_of_clients(result: TrialResult) -> Iterator[tuple[int, int]]:
    """The bytes up and down of each connection to a worker: the client's kernel's, and where it ends a worker also the closing exchange.

    That is the request to end the worker, and its answer: two empty frames, which come after all counters.
    """
    last = EMPTY_FRAME_BYTES + RECORD_BYTES * (result.manifest["reconciliation"]["tls"] is not None)
    ends = (0, 1) if result.manifest["cell"]["phase_spec"]["kind"] == "handover" else (0,)  # the worker's, and the second one's
    for row in result.tables["tcp"].to_pylist():
        if (row["side"], row["moment"]) == ("client", "end"):
            closing = last if row["connection"] in ends else 0
            yield _sent(row) + closing, row["bytes_received"] + closing


def _sent(row: dict[str, Any]) -> int:
    """A kernel's count of bytes that it sent, each once."""
    return int(row["bytes_sent"] - row["bytes_retrans"])


def _kernels_and_ledgers(result: TrialResult) -> Iterator[str]:
    """Where the ledgers of a connection to the worker differ from each other or from a kernel."""
    tcp = {(row["connection"], row["side"]): row for row in result.tables["tcp"].to_pylist() if row["moment"] == "end"}
    said = result.manifest["reconciliation"]
    for number, books in enumerate([said, *said["others"]]):
        client, worker = (_ledger(result, side, number) for side in ("client", "worker"))
        sent, received = _sent(tcp[number, "worker"]), tcp[number, "worker"]["bytes_received"]
        closing = tcp[number, "client"]["bytes_received"] - sent  # the answer with the worker's counters, behind both ledgers
        if client != worker or (received, sent) != worker or _sent(tcp[number, "client"]) != client[0]:
            yield f"connection {number}: ledgers {client} and {worker}, the worker's kernel {(received, sent)}"
        if closing != books["closing_frame_bytes"]:
            yield f"connection {number}: {closing} bytes came after the worker had counted"


def _ledger(result: TrialResult, side: str, connection: int) -> tuple[int, int]:
    """TCP payload up and down by a side's ledger of a connection."""
    rows = [row for row in result.tables["ledger"].to_pylist() if (row["side"], row["connection"]) == (side, connection)]
    ways = ([row for row in rows if (row["link"], row["direction"]) == ("network", way)] for way in ("up", "down"))
    up, down = (sum(row["payload_bytes"] + row["header_bytes"] for row in way) for way in ways)
    return up, down


def test_a_capture_counts_each_byte_of_a_connection_once_and_knows_who_listened() -> None:
    with Capture() as capture, socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        for up, down in ((3_000_000, 7), (0, 1)):
            one = socket.create_connection(("127.0.0.1", port))
            other, _ = listener.accept()
            with one, other:
                sender = threading.Thread(target=one.sendall, args=(bytes(up),))
                sender.start()
                got = 0
                while got < up:
                    got += len(other.recv(1 << 20))
                other.sendall(bytes(down))
                sender.join()
                assert len(one.recv(100)) == down
    assert [(flow.port, flow.payload_bytes) for flow in capture.flows] == [(port, (3_000_000, 7)), (port, (0, 1))]


def test_a_capture_with_a_hole_is_no_count() -> None:
    way = Way()
    for sequence, flags, length in ((2**32 - 2, 2, 0), (2**32 - 1, 16, 10), (14, 16, 5)):  # over the end of the numbers
        way.see(sequence, flags, length)
    with pytest.raises(AssertionError, match="bytes 10 to 15"):
        _ = way.payload_bytes
    way.see(8, 16, 7)  # sent again, with bytes that had arrived
    assert way.payload_bytes == 20


@pytest.mark.parametrize(("mode", "phase"), TRIALS)
def test_payload_by_sequence_numbers_is_what_both_kernels_and_both_ledgers_count(
    run: Callable[..., tuple[TrialResult, list[Flow]]], mode: str, phase: str
) -> None:
    assert differences(*run(mode, phase)) == []


@pytest.mark.parametrize(("mode", "phase"), UNDER_TLS)
def test_so_it_is_under_tls_which_adds_a_class_of_its_own(
    run: Callable[..., tuple[TrialResult, list[Flow]]], mode: str, phase: str
) -> None:
    result, flows = run(mode, phase, tls=True)
    assert differences(result, flows) == []
    assert result.manifest["reconciliation"]["tls"].startswith("TLSv1.3 ")
    sides = {row["side"] for row in result.tables["ledger"].to_pylist() if row["tensor_class"] == "tls"}
    assert sides == {row["side"] for row in result.tables["ledger"].to_pylist()}
    if phase in ("load", "handover"):  # the frames depend on when tokens, or layers, come, and the answer to a flush says how long it took
        return
    without, _ = run(mode, phase)
    assert _classes(result) == _classes(without)


def _classes(result: TrialResult) -> Counter[tuple[str, ...]]:
    """Bytes by side and class but TLS's own, of measured steps; the others' JSON has times in it."""
    found: Counter[tuple[str, ...]] = Counter()
    for row in result.tables["ledger"].to_pylist():
        if row["link"] == "network" and row["kind"] != "setup" and row["tensor_class"] != "tls":
            found[row["side"], row["direction"], row["operation"], row["tensor_class"]] += row["payload_bytes"] + row["header_bytes"]
    return found


@pytest.mark.parametrize(
    ("mode", "phase", "side"),
    [
        ("remote_cache", "decode", "client"),
        ("sys", "decode", "worker"),
        ("sys_delta", "recovery-evict", "kv_host"),
        ("handover_layers", "handover", "kv_host"),
    ],
)
def test_one_byte_more_in_a_ledger_is_seen(run: Callable[..., tuple[TrialResult, list[Flow]]], mode: str, phase: str, side: str) -> None:
    result, flows = run(mode, phase)
    rows = result.tables["ledger"].to_pylist()
    next(row for row in rows if (row["side"], row["link"]) == (side, "network"))["header_bytes"] += 1
    altered = pa.Table.from_pylist(rows, result.tables["ledger"].schema)
    assert differences(TrialResult(dict(result.tables) | {"ledger": altered}, result.manifest), flows)


def test_one_byte_more_on_the_wire_is_seen(run: Callable[..., tuple[TrialResult, list[Flow]]]) -> None:
    result, flows = run("remote_cache", "decode")
    flows[0].up.end = None
    flows[0].up.stretches.append((flows[0].up.payload_bytes, flows[0].up.payload_bytes + 1))
    try:
        assert differences(result, flows)
    finally:
        flows[0].up.stretches.pop()
