"""A link between client and worker, and the model of what an ask takes over it: t = compute + round trips x RTT + payload/goodput.

docs/method.md ("What another link would do") has what it assumes. An ask is what a client asked for and waited for: a prefill, a
step, or a window of them (`load.asks`). Of the model's parts only compute is not known.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

CELL_OF_TRIAL = ("model", "network", "mode", "phase", "trial")


LINK = ("rtt_s", "up_s_per_byte", "down_s_per_byte")


LEAST_COMPUTE = 0.1


_RTT = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s)")


_RATE = re.compile(r"(\d+(?:\.\d+)?)(bit|kbit|Mbit|Gbit)(?:/s)?")


_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


_BITS = {"bit": 1.0, "kbit": 1e3, "Mbit": 1e6, "Gbit": 1e9}


@dataclass(frozen=True)
class LinkModel:
    """A link between client and worker: seconds of a round trip, and of a byte each way once bytes flow."""

    rtt_s: float
    up_s_per_byte: float
    down_s_per_byte: float

    @classmethod
    def parsed(cls, rtt: str, rate: str) -> "LinkModel":
        """Of texts like 25ms (us, ms, s) and 400Mbit (bit, kbit, Mbit, Gbit a second, each way). ValueError says what is wrong."""
        found = _RTT.fullmatch(rtt.strip())
        if not found or not float(found[1]) < math.inf:
            raise ValueError(f"round trip {rtt!r} is no number with a unit; use us, ms or s, e.g. 25ms")
        per_byte = 8 / bits_per_s(rate)
        return cls(float(found[1]) * _SECONDS[found[2]], per_byte, per_byte)


def bits_per_s(rate: str) -> float:
    """400e6 of 400Mbit. ValueError for anything but a number above 0 with its unit."""
    found = _RATE.fullmatch(rate.strip())
    if not found or not 0 < float(found[1]) < math.inf:
        raise ValueError(f"rate {rate!r} is no number above 0 with a unit; use bit, kbit, Mbit or Gbit (a second), e.g. 400Mbit")
    return float(found[1]) * _BITS[found[2]]


def probed_link(probe: Mapping[str, Any]) -> dict[str, float]:
    """`LINK` of a trial's probe: a transfer's time less the round trip that is in it. NaN where the probe could not tell."""
    per_byte = {}
    for way in ("up", "down"):
        goodput = probe[f"goodput_{way}_bytes_per_s"]
        seconds = float("nan") if goodput is None else max(1 / goodput - probe["rtt_s"] / probe["payload_bytes"], 0.0)
        per_byte[f"{way}_s_per_byte"] = seconds
    return {"rtt_s": probe["rtt_s"]} | per_byte


def with_compute(asks: pd.DataFrame) -> pd.DataFrame:
    """Asks with `compute_s`: what of their latency was not the link that they were recorded over, and `link_s`, the rest.

    A frame of tokens leaves as soon as it is computed, and the worker computes on while it travels. NaN where frames of a window waited
    for the link instead: what computing took is then not seen.
    """
    over = tuple(asks[name] for name in LINK)
    begin_s, frame_s, frames = _begin_s(asks, *over), _frame_s(asks, *over), _frames(asks)
    each_s = (asks["latency_s"] - begin_s - frame_s) / frames
    each_s = each_s.where((frames == 1) | (each_s >= frame_s))
    for request in _chains(asks):
        parts = zip(*(column.loc[request.index] for column in (asks["latency_s"], begin_s, frame_s, frames)), strict=True)
        stream = _Stream()
        each_s.loc[request.index] = [stream.computing(*window) for window in parts]
    compute_s = each_s * frames
    return asks.assign(compute_s=compute_s, link_s=asks["latency_s"] - compute_s)


def priced_s(asks: pd.DataFrame, link: LinkModel) -> pd.Series:
    """Seconds that each ask (`with_compute`) would take over `link`; what never crossed one (local) takes what it took."""
    over = (link.rtt_s, link.up_s_per_byte, link.down_s_per_byte)
    begin_s, frame_s, frames = _begin_s(asks, *over), _frame_s(asks, *over), _frames(asks)
    each_s = asks["compute_s"] / frames
    seconds = begin_s + np.maximum(each_s + frames * frame_s, frames * each_s + frame_s)
    for request in _chains(asks):
        parts = zip(*(column.loc[request.index] for column in (each_s, begin_s, frame_s, frames)), strict=True)
        stream = _Stream()
        seconds.loc[request.index] = [stream.latency(*window) for window in parts]
    return seconds


def told(asks: pd.DataFrame) -> pd.DataFrame:
    """The asks (`with_compute`) of the cells and metrics whose compute can be told from their link.

    It cannot where it is less than `LEAST_COMPUTE` of the link: a probe may be off by as much as tolerance.goodput, 5% by default.
    """
    cells = asks.groupby(["model", "mode", "phase", "metric", "network"], sort=False)
    compute_s, link_s = (cells[name].transform(lambda values: values.median(skipna=False)) for name in ("compute_s", "link_s"))
    return asks[compute_s >= LEAST_COMPUTE * link_s]


def _chains(asks: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """The windows of each request that asked for them ahead, in order."""
    windows = asks[asks["ahead"].astype(bool) & (asks["metric"] == "ITL")]
    for _, request in windows.groupby([*CELL_OF_TRIAL, "request"], sort=False):
        yield request.sort_values("asked")


@dataclass
class _Stream:
    """Where a request's windows stand, in seconds since its first went up; on the worker's side less half a round trip.

    A window's request goes up when the first frame of the one before has come, and the worker begins with it when it has computed that one.
    Frames go one after the other, each once it is computed.
    """

    asked_s: float = 0.0
    computed_s: float = 0.0
    came_s: float = 0.0  # the last frame

    def computing(self, latency_s: float, begin_s: float, frame_s: float, frames: int) -> float:
        """What computing a frame of the next window took. NaN, for it and those after, where its frames waited for the link."""
        each_s = (self.came_s + latency_s - self._start_s(begin_s) - frame_s) / frames
        each_s = each_s if frames == 1 or each_s >= frame_s else math.nan
        self.latency(each_s, begin_s, frame_s, frames)
        return each_s

    def latency(self, each_s: float, begin_s: float, frame_s: float, frames: int) -> float:
        """How long after the last frame of the window before that of the next one comes, whose frames are computed in `each_s`."""
        start_s, before_s = self._start_s(begin_s), self.came_s
        self.asked_s = max(start_s + each_s, before_s) + frame_s
        self.computed_s = start_s + frames * each_s
        self.came_s = max(start_s + each_s + frames * frame_s, self.computed_s + frame_s, before_s + frames * frame_s)
        return self.came_s - before_s

    def _start_s(self, begin_s: float) -> float:
        return max(self.computed_s, self.asked_s + begin_s)


def _begin_s(asks: pd.DataFrame, rtt_s: Any, up_s_per_byte: Any, _: Any) -> pd.Series:
    return asks["round_trips"] * rtt_s + asks["up_bytes"] * up_s_per_byte


def _frame_s(asks: pd.DataFrame, _: Any, __: Any, down_s_per_byte: Any) -> pd.Series:
    return asks["down_bytes"] / _frames(asks) * down_s_per_byte


def _frames(asks: pd.DataFrame) -> pd.Series:
    return asks["frames"].clip(lower=1)
