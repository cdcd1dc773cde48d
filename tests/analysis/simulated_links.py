"""Trials over links simulated packet by packet. The simulation does not use the formula of the prices."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from written_trials import Trial

PACKET = 1448
PING, EMPTY, PROBED = 100, 28, 16 << 20  # frame bytes of a ping with 64 bytes and without, and payload bytes of a probe


@dataclass
class Line:
    """One direction: a queue with a rate, then a delay that varies from packet to packet."""

    delay_s: float
    bytes_per_s: float
    dice: np.random.Generator
    _free_s: float = 0.0
    _last_s: float = 0.0

    def carry(self, at_s: float, nbytes: int) -> float:
        """Arrival of the last byte of a message sent at `at_s`."""
        sent = np.minimum(np.arange(PACKET, nbytes + PACKET, PACKET), nbytes)  # bytes up to the end of each packet
        if len(sent):
            left_s = max(self._free_s, at_s) + sent / self.bytes_per_s
            arrived_s = left_s + self.delay_s + self.dice.uniform(0, 20e-6, len(sent))
            self._free_s, self._last_s = float(left_s[-1]), max(self._last_s, float(arrived_s.max()))
        return self._last_s


@dataclass(frozen=True)
class Network:
    """A name, a one-way delay (s) and a rate (bits/s)."""

    name: str
    delay_s: float
    bits_per_s: float

    @property
    def spec(self) -> dict[str, Any]:
        return {"kind": "relay", "delay_ms": 1e3 * self.delay_s, "rate": f"{self.bits_per_s / 1e6:g}Mbit"}


class Link:
    """A network in use: a line each way."""

    def __init__(self, network: Network, dice: np.random.Generator) -> None:
        self.up, self.down = (Line(network.delay_s, network.bits_per_s / 8, dice) for _ in range(2))

    def probe(self, at_s: float) -> dict[str, Any]:
        """The probe of a client: median of 5 pings, and one transfer each way."""
        trips = sorted(self.down.carry(self.up.carry(at_s + i, PING), EMPTY) - at_s - i for i in range(5))
        up_s = self.down.carry(self.up.carry(at_s + 10, PROBED), EMPTY) - at_s - 10
        down_s = self.down.carry(self.up.carry(at_s + 60, EMPTY), PROBED) - at_s - 60
        speeds = {"goodput_up_bytes_per_s": PROBED / up_s, "goodput_down_bytes_per_s": PROBED / down_s}
        return {"rtt_s": trips[2], "payload_bytes": PROBED, "round_trips": 5} | speeds


@dataclass(frozen=True)
class Traffic:
    """A mode: bytes up of a call and down of each frame, tokens of a window and of a frame, and whether windows are sent for ahead."""

    mode: str
    up: int
    down: int
    window: int = 1
    coalesce: int = 1
    ahead: bool = False


def simulated(traffic: Traffic, network: Network, trial: int, compute_s: float, steps: int = 32) -> Trial:
    """A trial of decode steps after a prefill that computes as long as 10 steps. Compute varies by 1% from step to step."""
    dice = np.random.default_rng(list(f"{traffic.mode}{network.name}{trial}".encode()))
    computed = (compute_s * dice.uniform(0.99, 1.01) for _ in itertools.count())
    link = Link(network, dice)
    probe = link.probe(1.0)
    prefill, at_s = _call(Traffic(traffic.mode, traffic.up + 1000, traffic.down), link, 200.0, 1, iter([10 * compute_s]))
    rows: list[dict[str, Any]] = []
    if traffic.ahead:
        rows = _pipelined(traffic, link, at_s + 0.001, steps, computed)
    while len(rows) < steps:
        called, at_s = _call(traffic, link, at_s + 0.001, min(traffic.window, steps - len(rows)), computed)
        rows += called
    latencies = tuple(row["latency_s"] for row in rows)
    fields = {
        "probe": probe,
        "network": network.name,
        "network_spec": network.spec,
        "prefill": prefill[0],
        "rows": tuple(rows),
        "ahead": traffic.ahead,
    }
    return Trial(traffic.mode, trial=trial, latency_s=latencies, **fields)


def _call(traffic: Traffic, link: Link, at_s: float, tokens: int, computed: Iterator[float]) -> tuple[list[dict[str, Any]], float]:
    """The client's rows of one call, and the time of its end."""
    if traffic.mode == "local":
        spent_s = next(computed)
        return [_row(spent_s, 0, 0, 0)], at_s + spent_s
    begin_s = seen_s = at_s
    worker_s = link.up.carry(at_s, traffic.up)
    rows, waiting = [], 0
    for token in range(1, tokens + 1):
        worker_s += next(computed)
        waiting += 1
        if waiting == traffic.coalesce or token == tokens:
            arrived_s = link.down.carry(worker_s, traffic.down)
            first = seen_s == begin_s
            rows += [_row(arrived_s - seen_s, traffic.up if first else 0, traffic.down, int(first))]
            rows += [_row(0.0, 0, 0, 0)] * (waiting - 1)
            seen_s, waiting = arrived_s, 0
    return rows, seen_s


def _pipelined(traffic: Traffic, link: Link, at_s: float, steps: int, computed: Iterator[float]) -> list[dict[str, Any]]:
    """Rows of windows. The client sends for each when the first frame of the window before arrives."""
    rows: list[dict[str, Any]] = []
    worker_s, seen_s = 0.0, at_s
    sent_s, up = link.up.carry(at_s, traffic.up), traffic.up
    while len(rows) < steps:
        worker_s, first, waiting = max(worker_s, sent_s), True, 0
        tokens = min(traffic.window, steps - len(rows))
        more = len(rows) + tokens < steps
        for token in range(1, tokens + 1):
            worker_s += next(computed)
            waiting += 1
            if waiting < traffic.coalesce and token < tokens:
                continue
            arrived_s = link.down.carry(worker_s, traffic.down)
            if first and more:
                sent_s, up = link.up.carry(arrived_s, traffic.up), up + traffic.up
            rows += [_row(arrived_s - seen_s, up, traffic.down, int(first)), *([_row(0.0, 0, 0, 0)] * (waiting - 1))]
            seen_s, first, waiting, up = arrived_s, False, 0, 0
    return rows


def _row(latency_s: float, up: int, down: int, round_trips: int) -> dict[str, Any]:
    return {"latency_s": latency_s, "up_frame_bytes": up, "down_frame_bytes": down, "round_trips": round_trips}
