"""A trial's own sums, repeated: its files are those that were measured, and steps, ledgers and kernel counted the same bytes."""

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from semgap.seal import sha256

Row = Mapping[str, Any]
SIDES = {"worker": "client", "kv_host": "worker_to_kv_host"}
"""The sides of the ledger that answer, each with the side that asks it."""
_STEPS = ("measured", "up_frame_bytes", "down_frame_bytes")
_MOST_CLOSING_BYTES = 1 << 20
_COUNTS = ("frames", "tensor_bytes", "payload_bytes", "header_bytes")


def fault_of_trial(directory: Path, manifest: Mapping[str, Any]) -> str | None:
    """The first reason why a trial's files are not what was measured, or None. Its manifest is sealed, and lists them.

    The sums are those of the measurement itself (trial_manifest.py, wire/reconcile.py), computed anew here.
    """
    files = {}
    for name, expected in manifest["files"].items():
        files[name] = (directory / name).read_bytes()
        found = sha256(files[name])
        if found != expected:
            return f"its manifest says sha256 {expected} of {name}, which has {found}"
    if manifest["reconciliation"] is None:
        return None
    steps, ledger, tcp = (
        _rows(files[f"{name}.parquet"], columns) for name, columns in (("steps", _STEPS), ("ledger", None), ("tcp", None))
    )
    try:
        return next(_faults(manifest, steps, ledger, tcp), None)
    except KeyError as error:
        return f"its tables or its manifest lack {error}, which its sums need"


def _rows(parquet: bytes, columns: Sequence[str] | None) -> list[Row]:
    rows: list[Row] = pq.ParquetFile(io.BytesIO(parquet)).read(columns).to_pylist()
    return rows


def _faults(manifest: Mapping[str, Any], steps: list[Row], ledger: list[Row], tcp: list[Row]) -> Iterator[str]:
    crossed = [row for row in ledger if row["link"] == "network"]
    if not manifest["load"]:
        yield from _steps_and_ledger(steps, crossed)
    yield from _both_ledgers(crossed)
    yield from _ledger_and_kernel(crossed, tcp, manifest["reconciliation"])
    yield from _ledger_and_manifest(crossed, tcp, manifest["reconciliation"])


def _steps_and_ledger(steps: list[Row], crossed: list[Row]) -> Iterator[str]:
    """The measured steps' bytes are all that the client's ledger holds outside of setup."""
    for way in ("up", "down"):
        in_steps = sum(step[f"{way}_frame_bytes"] for step in steps if step["measured"])
        in_ledger = _frame_bytes(row for row in crossed if row["side"] == "client" and row["kind"] != "setup" and row["direction"] == way)
        if in_steps != in_ledger:
            yield f"its measured steps hold {in_steps} bytes {way}, its ledger's regular and delta frames {in_ledger}"


def _both_ledgers(crossed: list[Row]) -> Iterator[str]:
    """Both sides of each link counted the same frames and bytes."""
    for answering, asking in SIDES.items():
        ours, theirs = (_counted(crossed, side) for side in (asking, answering))
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                yield f"its ledgers differ in {'/'.join(key)}: {asking} counted {ours.get(key)}, {answering} {theirs.get(key)}"


def _counted(crossed: list[Row], side: str) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Frames and bytes by connection, direction, operation, kind and tensor class. A row that counts none is left out."""
    keys = ("connection", "direction", "operation", "kind", "tensor_class")
    found = {tuple(str(row[key]) for key in keys): tuple(row[name] for name in _COUNTS) for row in crossed if row["side"] == side}
    return {key: counts for key, counts in found.items() if any(counts)}


def _ledger_and_kernel(crossed: list[Row], tcp: list[Row], said: Mapping[str, Any]) -> Iterator[str]:
    """Each side's ledger and its kernel counted the same bytes. The closing answer is behind the client's ledger, not behind its kernel."""
    counted: Counter[tuple[Any, ...]] = Counter()
    for each in crossed:
        counted[*_at(each), each["direction"]] += _frame_bytes([each])
    for row in tcp:
        if row["moment"] != "end":
            continue
        sends, receives = ("up", "down") if row["side"] == "client" else ("down", "up")
        sent, received = (counted[*_at(row), way] for way in (sends, receives))
        received += _closing_bytes(row, received, said)
        if (sent, received) != (_sent(row), row["bytes_received"]):
            where = f"{row['side']}'s ledger of connection {row['connection']}"
            yield f"the {where} has {sent} bytes sent and {received} received, the kernel {_sent(row)} and {row['bytes_received']}"


def _closing_bytes(row: Row, received: int, said: Mapping[str, Any]) -> int:
    """Bytes of the answer that closes a client's books. Of a further connection they are not recorded: all that came more."""
    if row["side"] != "client":
        return 0
    closing: int = (
        said["closing_frame_bytes"] if row["connection"] == 0 else min(max(0, row["bytes_received"] - received), _MOST_CLOSING_BYTES)
    )
    return closing


def _ledger_and_manifest(crossed: list[Row], tcp: list[Row], said: Mapping[str, Any]) -> Iterator[str]:
    """The manifest's totals are those of the first connection and of the KV host."""
    first = [row for row in crossed if row["connection"] == 0]
    end = {row["side"]: row for row in tcp if row["moment"] == "end" and row["connection"] == 0}
    kernel = (_sent(end["client"]), end["client"]["bytes_received"]) if "client" in end else (None, None)
    yield from _unequal("kernel_bytes_sent and kernel_bytes_received", (said["kernel_bytes_sent"], said["kernel_bytes_received"]), kernel)
    resent = sum(row["bytes_retrans"] for row in end.values())
    yield from _unequal("retransmitted_bytes", said["retransmitted_bytes"], resent)
    for side, kinds in (("worker", said["frame_bytes_by_kind"]), ("kv_host", (said["kv_host"] or {}).get("frame_bytes_by_kind", {}))):
        yield from _unequal(f"{side} frame_bytes_by_kind", {kind: count for kind, count in kinds.items() if count}, _by_kind(first, side))
    if said["kv_host"]:
        sent = _frame_bytes(row for row in first if row["side"] == "worker_to_kv_host" and row["direction"] == "up")
        yield from _unequal("kv_host kernel_bytes_sent", said["kv_host"]["kernel_bytes_sent"], sent)


def _unequal(what: str, said: Any, found: Any) -> Iterator[str]:
    if said != found:
        yield f"its manifest says {what} {said}, its tables {found}"


def _by_kind(crossed: list[Row], side: str) -> dict[str, int]:
    found: Counter[str] = Counter()
    for row in crossed:
        if row["side"] == side:
            found[row["kind"]] += _frame_bytes([row])
    return {kind: count for kind, count in found.items() if count}


def _at(row: Row) -> tuple[int, str]:
    return row["connection"], row["side"]


def _sent(row: Row) -> int:
    """The application's bytes that the kernel sent."""
    sent: int = row["bytes_sent"] - row["bytes_retrans"]
    return sent


def _frame_bytes(rows: Any) -> int:
    return sum(row["payload_bytes"] + row["header_bytes"] for row in rows)
