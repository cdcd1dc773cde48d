"""A link between client and worker, and the model of what an ask takes over it: t = compute + round trips x RTT + payload/goodput.

docs/method.md ("What another link would do") has what it assumes. An ask is what a client asked for and waited for: a prefill, a
step, or a window of them (`load.asks`). Of the model's parts only compute is not known.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

CELL_OF_TRIAL = ("model", "network", "mode", "phase", "trial")
LINK = ("rtt_s", "up_s_per_byte", "down_s_per_byte")
_RTT = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s)")
_RATE = re.compile(r"(\d+(?:\.\d+)?)(bit|kbit|Mbit|Gbit)(?:/s)?")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_BITS = {"bit": 1.0, "kbit": 1e3, "Mbit": 1e6, "Gbit": 1e9}


@dataclass(frozen=True)
class Link:
    """A link between client and worker: seconds of a round trip, and of a byte each way once bytes flow."""

    rtt_s: float
    up_s_per_byte: float
    down_s_per_byte: float

    @classmethod
    def parsed(cls, rtt: str, rate: str) -> "Link":
        """Of texts like 25ms (us, ms, s) and 400Mbit (bit, kbit, Mbit, Gbit a second, each way). ValueError says what is wrong."""
        found = _RTT.fullmatch(rtt.strip())
        if not found:
            raise ValueError(f"round trip {rtt!r} is no number with a unit; use us, ms or s, e.g. 25ms")
        per_byte = 8 / bits_per_s(rate)
        return cls(float(found[1]) * _SECONDS[found[2]], per_byte, per_byte)


def bits_per_s(rate: str) -> float:
    """400e6 of 400Mbit. ValueError for anything but a number above 0 with its unit."""
    found = _RATE.fullmatch(rate.strip())
    if not found or not float(found[1]):
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
    """Asks with `compute_s`: what of their latency was not the link that they were recorded over.

    A frame of tokens leaves as soon as it is computed, and the worker computes on while it travels. So either frames wait for compute,
    or, where sending one takes longer than computing it, for the link; the shorter of the two is hidden but for once.
    """
    frame_s, begin_s = _frame_s(asks, *(asks[name] for name in LINK)), _begin_s(asks, *(asks[name] for name in LINK))
    streaming_s = (asks["latency_s"] - begin_s - frame_s) / _frames(asks)
    waiting_s = asks["latency_s"] - begin_s - _frames(asks) * frame_s
    compute_s = streaming_s.where(streaming_s >= frame_s, waiting_s) * _frames(asks)
    for request in _chains(asks):
        compute_s.loc[request.index] = _less_waits(request, begin_s + frame_s)
    return asks.assign(compute_s=compute_s)


def priced_s(asks: pd.DataFrame, link: Link) -> pd.Series:
    """Seconds that each ask (`with_compute`) would take over `link`; what never crossed one (local) takes what it took."""
    over = (link.rtt_s, link.up_s_per_byte, link.down_s_per_byte)
    frame_s, per_frame = _frame_s(asks, *over), asks["compute_s"] / _frames(asks)
    begin_s = _begin_s(asks, *over)
    seconds = begin_s + per_frame + (_frames(asks) - 1) * np.maximum(per_frame, frame_s) + frame_s
    for request in _chains(asks):
        seconds.loc[request.index] = _with_waits(request, begin_s + frame_s)
    return seconds


def _chains(asks: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """The windows of each request that asked for them ahead, in order."""
    windows = asks[asks["ahead"].astype(bool) & (asks["metric"] == "ITL")]
    for _, request in windows.groupby([*CELL_OF_TRIAL, "request"], sort=False):
        yield request.sort_values("asked")


def _less_waits(request: pd.DataFrame, wait_s: pd.Series) -> list[float]:
    """Compute of each window: its latency less what of its link was not hidden under the window before it."""
    computed: list[float] = []
    hidden_s = 0.0
    for latency_s, wait, frames in zip(request["latency_s"], wait_s.loc[request.index], _frames(request), strict=True):
        computed.append(latency_s - max(0.0, wait - hidden_s))
        hidden_s = computed[-1] * (1 - 1 / frames)  # a window is asked for at the first frame of the one before
    return computed


def _with_waits(request: pd.DataFrame, wait_s: pd.Series) -> list[float]:
    """Latency of each window: its compute, and what of the link is not hidden under the window before it."""
    seconds: list[float] = []
    hidden_s = 0.0
    for compute_s, wait, frames in zip(request["compute_s"], wait_s.loc[request.index], _frames(request), strict=True):
        seconds.append(compute_s + max(0.0, wait - hidden_s))
        hidden_s = compute_s * (1 - 1 / frames)
    return seconds


def _begin_s(asks: pd.DataFrame, rtt_s: Any, up_s_per_byte: Any, _: Any) -> pd.Series:
    return asks["round_trips"] * rtt_s + asks["up_bytes"] * up_s_per_byte


def _frame_s(asks: pd.DataFrame, _: Any, __: Any, down_s_per_byte: Any) -> pd.Series:
    return asks["down_bytes"] / _frames(asks) * down_s_per_byte


def _frames(asks: pd.DataFrame) -> pd.Series:
    return asks["frames"].clip(lower=1)
