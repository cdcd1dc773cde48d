"""The probe of a link: round trips and goodput."""

import statistics
import time
from collections.abc import Callable

from semgap.codecs import Encoded
from semgap.wire import messages
from semgap.wire.link import Link, control
from semgap.wire.messages import Operation

_PING_BYTES = 64


def probe_link(link: Link, round_trips: int, payload_bytes: int) -> dict[str, float]:
    """Round trip (median, s) of 64-byte pings and goodput each way (bytes/s) of one ping that carries `payload_bytes`.

    cold_*: the goodput of the first such pings, before all others: on a new connection it includes TCP's slow start and the growth of
    buffers on both sides.
    """
    filler = control(bytes(payload_bytes))
    cold_up_s, cold_down_s = _transfers_s(link, filler, payload_bytes)
    rtt_s = statistics.median([_timed(lambda: ping(link, _PING_BYTES, 0)) for _ in range(round_trips)])
    up_s, down_s = _transfers_s(link, filler, payload_bytes)
    return {
        "rtt_s": rtt_s,
        "goodput_up_bytes_per_s": payload_bytes / up_s,
        "goodput_down_bytes_per_s": payload_bytes / down_s,
        "cold_up_bytes_per_s": payload_bytes / cold_up_s,
        "cold_down_bytes_per_s": payload_bytes / cold_down_s,
        "payload_bytes": payload_bytes,
        "round_trips": round_trips,
    }


def _transfers_s(link: Link, filler: Encoded, payload_bytes: int) -> tuple[float, float]:
    up_s = _timed(lambda: link.request(Operation.PING, messages.Ping(), [filler]))
    return up_s, _timed(lambda: ping(link, 0, payload_bytes))


def ping(link: Link, up_bytes: int, down_bytes: int) -> None:
    """One round trip with `up_bytes` of filler up and `down_bytes` down."""
    link.request(Operation.PING, messages.Ping((), down_bytes), [control(bytes(up_bytes))] if up_bytes else [])


def _timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
