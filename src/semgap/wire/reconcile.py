"""Reconciling a link: both ends' ledgers and both kernels must agree to the byte."""

from typing import Any

import msgspec

from semgap.wire.ledger import Direction, Row, compare_ledgers, compare_with_kernel, frame_bytes
from semgap.wire.link import Link
from semgap.wire.messages import Kind, Operation
from semgap.wire.tcp import congestion_control, tcp_info


def reconcile(link: Link, peer: str = "worker") -> dict[str, Any]:
    """Fetches the peer's counters; compares the ledgers with each other and each with its kernel, to the byte.

    LedgerError names the difference, and the other side by `peer`. Counting ends with the peer's answer, which only this side's
    kernel can check. Gives both sides' rows and TCP counters; "peer" is the whole answer.
    """
    link.post(Operation.GET_NETWORK_COUNTERS)
    rows = link.ledger.copy_rows()
    reply = link.await_reply(Operation.GET_NETWORK_COUNTERS)
    theirs = msgspec.json.decode(reply.payloads[0])
    peer_rows = msgspec.convert(theirs["rows"], list[Row])
    compare_ledgers(rows, peer_rows)
    compare_with_kernel(peer, peer_rows, Direction.DOWN, theirs["tcp"])
    link.drain()
    tcp = tcp_info(link.sock)
    final = link.ledger.copy_rows()
    compare_with_kernel("client", final, Direction.UP, tcp)
    return {
        "rows": msgspec.to_builtins(rows),
        "peer_rows": theirs["rows"],
        "tcp": tcp,
        "peer_tcp": theirs["tcp"],
        "peer": theirs,
        "closing_frame_bytes": frame_bytes(final, Direction.DOWN) - frame_bytes(rows, Direction.DOWN),
        "congestion": congestion_control(link.sock),
        "tls": link.tls,
    }


def counters(link: Link) -> dict[str, Any]:
    """A side's answer to `reconcile`: its rows, its kernel's counters of the drained connection, and frame bytes by kind."""
    link.drain()
    rows = link.ledger.copy_rows()
    by_kind = {kind.name.lower(): 0 for kind in Kind}
    for row in rows:
        by_kind[row.kind] += row.payload_bytes + row.header_bytes if row.link == "network" else 0
    return {"rows": msgspec.to_builtins(rows), "frame_bytes_by_kind": by_kind, "tcp": tcp_info(link.sock)}
