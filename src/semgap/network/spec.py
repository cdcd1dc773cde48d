"""A network as data: the links that the config asks for, and whether a probe found them."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

_UNITS = {"bit": 1.0, "kbit": 1e3, "Mbit": 1e6, "Gbit": 1e9}
_RATE = re.compile(rf"(\d+(?:\.\d+)?)({'|'.join(_UNITS)})(?:/s)?")


# TCP payload in a byte of link: 1,448 of the 1,500 bytes of a full frame. tc counts its Ethernet header of 14 bytes too, a real
# Ethernet also checksum, preamble and gap. The relay counts payload alone.
_PAYLOAD_SHARE = {"relay": 1.0, "netns": 1448 / 1514, "hosts": 1448 / 1538, "loopback": 1.0}


class NetworkError(ValueError):
    """The network is not as the config asks for it, or not available here. Names the fault and the way out."""


class Tolerance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Allowed errors of a trial's link: round trip (ms), goodput (a fraction), lateness of a relay's sends (ms).

    None: `Network.slack_ms`.
    """

    rtt_ms: float | None = None
    goodput: float = 0.05
    lateness_ms: float | None = None


class Network(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A row of define.networks. `delay_ms` is one-way; delay, `rate` and `loss_percent` hold in each direction. None: any.

    `rtt_ms` says the delay as a round trip instead. ValueError for both. `kv`: the row that lies between worker and KV host; None:
    that link is not probed; a local worker has its KV host beside it.
    """

    kind: str = "loopback"
    delay_ms: float | None = None
    rtt_ms: float | None = None
    rate: str | None = None
    loss_percent: float = 0.0
    congestion: str | None = None
    kv: str | None = None
    tolerance: Tolerance = Tolerance()

    def __post_init__(self) -> None:
        if self.delay_ms is not None and self.rtt_ms is not None:
            raise ValueError(
                f"delay_ms {self.delay_ms:g} and rtt_ms {self.rtt_ms:g} are both given; a round trip is two delays, leave one out"
            )

    @property
    def one_way_ms(self) -> float | None:
        return self.rtt_ms / 2 if self.rtt_ms is not None else self.delay_ms

    @property
    def slack_ms(self) -> float:
        """The default tolerance of times: 1 ms and 5% of the round trip."""
        return 1 + 0.1 * (self.one_way_ms or 0)

    @property
    def bits_per_s(self) -> float | None:
        return None if self.rate is None else bits_per_s(self.rate)


@dataclass(frozen=True)
class Asked:
    """The link that a probe should find: round trip, and TCP payload per second each way. None: any."""

    rtt_s: float | None
    goodput_bytes_per_s: float | None


def bits_per_s(rate: str) -> float:
    """1e9 for '1Gbit' or '1Gbit/s'. Units are powers of 1,000, as in tc. ValueError unless it is a number above 0 with a unit."""
    found = _RATE.fullmatch(rate)
    if not found or not 0 < float(found[1]) < math.inf:
        raise ValueError(f"rate {rate!r} is not a number above 0 with one of {', '.join(_UNITS)}, e.g. 100Mbit or 1Gbit")
    return float(found[1]) * _UNITS[found[2]]


def rate_text(goodput_bytes_per_s: float) -> str:
    """'938 Mbit/s' of 117.2e6."""
    bits = 8 * goodput_bytes_per_s
    unit = next((unit for unit in ("Gbit", "Mbit") if bits >= _UNITS[unit]), "kbit")
    return f"{bits / _UNITS[unit]:.3g} {unit}/s"


def asked_of(network: Network) -> Asked:
    """The link that a probe of the network should find."""
    rate = network.bits_per_s
    return Asked(
        rtt_s=None if network.one_way_ms is None else 2e-3 * network.one_way_ms,
        goodput_bytes_per_s=None if rate is None else rate / 8 * _PAYLOAD_SHARE[network.kind],
    )


def measured_of(probe: Mapping[str, Any]) -> dict[str, float | None]:
    """The round trip (s) of a probe, and its goodput each way, cold and warm (bytes/s), without the round trip of each transfer.

    A goodput is None if its transfer took no longer than the round trip.
    """
    found: dict[str, float | None] = {"rtt_s": probe["rtt_s"]}
    for name in ("goodput_up", "goodput_down", "cold_up", "cold_down"):
        seconds = transfer_s_per_byte(probe, name)
        found[f"{name}_bytes_per_s"] = 1 / seconds if seconds else None
    return found


def transfer_s_per_byte(probe: Mapping[str, Any], name: str) -> float:
    """Seconds per byte of a probe's transfer (goodput_up, cold_down, ...) without its round trip; 0 if it took no longer than that."""
    return float(max(1 / probe[f"{name}_bytes_per_s"] - probe["rtt_s"] / probe["payload_bytes"], 0.0))


def require_as_asked(network: Network, probe: Mapping[str, Any]) -> None:
    """NetworkError, with the numbers, unless the probe's round trip and goodput are as asked, within tolerance."""
    asked, allowed, found = asked_of(network), network.tolerance, measured_of(probe)
    slack_ms = allowed.rtt_ms or network.slack_ms
    if asked.rtt_s is not None and abs(probe["rtt_s"] - asked.rtt_s) > 1e-3 * slack_ms:
        raise NetworkError(
            f"the link's round trip is {1e3 * probe['rtt_s']:.3f} ms, the config asks for {1e3 * asked.rtt_s:g} ms "
            f"within {slack_ms:g} (tolerance.rtt_ms); {_way_out(network, 'delay_ms')}"
        )
    if asked.goodput_bytes_per_s is None:
        return
    for way in ("up", "down"):
        goodput = found[f"goodput_{way}_bytes_per_s"]
        if goodput is None:
            why = f"{probe['payload_bytes']:,} bytes take no longer than a round trip"
            raise NetworkError(f"the link's goodput {way} is unknown: {why}; raise probe.payload_bytes")
        if abs(goodput / asked.goodput_bytes_per_s - 1) > allowed.goodput:
            raise NetworkError(
                f"the link's goodput {way} is {rate_text(goodput)}, the config asks for {rate_text(asked.goodput_bytes_per_s)} "
                f"({network.rate}, {network.kind}) within {100 * allowed.goodput:g}% (tolerance.goodput); {_way_out(network, 'rate')}"
            )


def _way_out(network: Network, key: str) -> str:
    if network.kind == "hosts":
        return f"the network of the two hosts differs from the config: correct {key}, or leave it out to take the link as it is"
    return f"this machine cannot emulate it, or does other work: raise the network's tolerance, or set another {key}"
