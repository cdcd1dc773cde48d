"""The probe of a link: round trips and goodput. Of the client's own to the worker, and through it of the worker's to its KV host."""

import statistics
import time
from collections.abc import Callable

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

    def took_s(up_bytes: int, down_bytes: int) -> float:
        if up_bytes == payload_bytes:
            return _timed(lambda: link.request(Operation.PING, messages.Ping(), [filler]))
        return _timed(lambda: ping(link, up_bytes, down_bytes))

    return _probed(took_s, round_trips, payload_bytes)


def probe_kv_link(link: Link, round_trips: int, payload_bytes: int) -> dict[str, float]:
    """The same of the worker's link to its KV host, by the worker's clock. RemoteError (kv_host) if it has none."""

    def took_s(up_bytes: int, down_bytes: int) -> float:
        reply = link.request(Operation.PING_KV_HOST, messages.PingKVHost((), up_bytes, down_bytes))
        return reply.header_as(messages.KVHostPinged).took_ns / 1e9

    return _probed(took_s, round_trips, payload_bytes)


def _probed(took_s: Callable[[int, int], float], round_trips: int, payload_bytes: int) -> dict[str, float]:
    """`took_s`: the time of a ping with so many bytes up and down."""
    cold_up_s, cold_down_s = took_s(payload_bytes, 0), took_s(0, payload_bytes)
    rtt_s = statistics.median([took_s(_PING_BYTES, 0) for _ in range(round_trips)])
    up_s, down_s = took_s(payload_bytes, 0), took_s(0, payload_bytes)
    return {
        "rtt_s": rtt_s,
        "goodput_up_bytes_per_s": payload_bytes / up_s,
        "goodput_down_bytes_per_s": payload_bytes / down_s,
        "cold_up_bytes_per_s": payload_bytes / cold_up_s,
        "cold_down_bytes_per_s": payload_bytes / cold_down_s,
        "payload_bytes": payload_bytes,
        "round_trips": round_trips,
    }


def ping(link: Link, up_bytes: int, down_bytes: int) -> None:
    """One round trip with `up_bytes` of filler up and `down_bytes` down."""
    link.request(Operation.PING, messages.Ping((), down_bytes), [control(bytes(up_bytes))] if up_bytes else [])


def _timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
