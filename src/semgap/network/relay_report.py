"""Checks of a relay's report: its bytes, and the lateness of its sends."""

from collections.abc import Mapping, Sequence
from typing import Any

from semgap.network.delay_line import INTERVAL_NS
from semgap.network.spec import Network, NetworkError
from semgap.wire.ledger import Direction

LATE_SHARE = 0.05  # of the sends during the measured requests, that may be later than tolerated


def require_same_bytes(relayed: Mapping[str, Any], ledgers: Sequence[Mapping[str, int]]) -> None:
    """NetworkError unless, for as many last connections as ledgers, ledger, relay and its kernel counted the same bytes each way.

    Connections that end together end in any order: they are matched by their bytes.
    """
    last = sorted(relayed["connections"][-len(ledgers) :], key=lambda each: (each["up"]["bytes_in"], each["down"]["bytes_in"]))
    for connection, ledger_bytes in zip(last, sorted(ledgers, key=lambda each: (each["up"], each["down"])), strict=True):
        _require_same_bytes(connection, ledger_bytes)


def _require_same_bytes(connection: Mapping[str, Any], ledger_bytes: Mapping[str, int]) -> None:
    for way, sender, receiver in (("up", "client", "worker"), ("down", "worker", "client")):
        incoming, outgoing = connection[f"{sender}_tcp"], connection[f"{receiver}_tcp"]
        in_kernel = incoming["bytes_received"]
        counts = {
            "ledger": ledger_bytes[way],
            "read": connection[way]["bytes_in"],
            "kernel, received": in_kernel - (connection[way]["ended"] and in_kernel > ledger_bytes[way]),  # a FIN may count as a byte
            "written": connection[way]["bytes_out"],
            "kernel, sent": outgoing["bytes_sent"] - outgoing["bytes_retrans"],
        }
        if len(set(counts.values())) > 1:
            raise NetworkError(f"bytes {way} differ at the relay: " + ", ".join(f"{name} {count}" for name, count in counts.items()))


def lateness(relayed: Mapping[str, Any], begin_s: float, end_s: float) -> dict[str, dict[str, float | int | None]]:
    """Lateness of a relay's sends each way between two moments (monotonic, s): number of sends, median, 95th percentile, maximum.

    Seconds, each the upper end of a bucket a fourth of an octave wide, or None if nothing was sent. By direction: punctual requests
    do not make up for late replies.
    """
    rows = [row for row in relayed["lateness"] if begin_s - INTERVAL_NS / 1e9 < row["t_s"] <= end_s]
    found = {}
    for direction in Direction:
        ordered = sorted((row["late_s"], row["sends"]) for row in rows if row["direction"] == direction)
        quantiles = {"p50_s": _quantile(ordered, 0.5), "p95_s": _quantile(ordered, 1 - LATE_SHARE)}
        counts = {"sends": sum(count for _, count in ordered)}
        found[str(direction)] = counts | quantiles | {"max_s": ordered[-1][0] if ordered else None}
    return found


def _quantile(ordered: list[tuple[float, int]], share: float) -> float | None:
    """The smallest value with at least `share` of the counts at or below it."""
    left = share * sum(count for _, count in ordered)
    for value, count in ordered:
        left -= count
        if left <= 1e-9:
            return value
    return None


def require_in_time(network: Network, late: Mapping[str, Mapping[str, Any]]) -> None:
    """NetworkError if, in a direction, more than LATE_SHARE of the sends were later than the network's tolerance."""
    allowed_ms = network.tolerance.lateness_ms or network.slack_ms
    for direction, found in late.items():
        if found["p95_s"] is not None and 1e3 * found["p95_s"] > allowed_ms:
            raise NetworkError(
                f"the relay was late: of {found['sends']} sends {direction} during the measured requests more than {100 * LATE_SHARE:g}% "
                f"by over {allowed_ms:g} ms (tolerance.lateness_ms), the 95th percentile is {1e3 * found['p95_s']:.2f} ms; stop other "
                "work on this machine, raise the tolerance, or give the relay a core (config.cpus.client)"
            )
