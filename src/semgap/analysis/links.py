"""A link between client and worker, and the model of a call over it: t = compute + round trips x RTT + payload / goodput.

A call is a prefill, a decode step or a window of steps that the client requests and waits for (`calls.calls`). Round trips and bytes are
counted, RTT and goodput are probed; only compute is inferred. docs/method.md ("What another link would do") has the assumptions.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from semgap.analysis.load import KEYS
from semgap.network.spec import bits_per_s, transfer_s_per_byte

LINK = ("rtt_s", "up_s_per_byte", "down_s_per_byte")
LEAST_COMPUTE = 0.1
_RTT = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s)")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class LinkModel:
    """A link between client and worker: seconds of a round trip, and of a byte each way once bytes flow."""

    rtt_s: float
    up_s_per_byte: float
    down_s_per_byte: float

    @classmethod
    def parsed(cls, rtt: str, rate: str) -> "LinkModel":
        """From texts like 25ms (`rtt_s`) and 400Mbit (`network.spec.bits_per_s`, each way). ValueError names the wrong one."""
        trip_s, per_byte = rtt_s(rtt), 8 / bits_per_s(rate)
        return cls(trip_s, per_byte, per_byte)


def rtt_s(text: str) -> float:
    """Seconds of a round trip like 25ms (us, ms, s). ValueError unless it is a number with a unit."""
    found = _RTT.fullmatch(text)
    if not found or not float(found[1]) < math.inf:
        raise ValueError(f"round trip {text!r} is no number with a unit; use us, ms or s, e.g. 25ms")
    return float(found[1]) * _SECONDS[found[2]]


def probed_link(probe: Mapping[str, Any]) -> dict[str, float]:
    """The columns `LINK` of a trial's probe. A byte takes 0 s if a transfer took no longer than its round trip."""
    return {"rtt_s": probe["rtt_s"]} | {f"{way}_s_per_byte": transfer_s_per_byte(probe, f"goodput_{way}") for way in ("up", "down")}


def with_compute(calls: pd.DataFrame) -> pd.DataFrame:
    """Calls with `link_s`, the part of their latency that the recorded link explains, and `compute_s`, the rest.

    A frame of tokens leaves as soon as it is computed, and the worker computes the next one meanwhile. NaN if the frames of a window waited
    for the link: their latency then does not show compute.
    """
    begin_s, frame_s, frames = _parts(calls, *(calls[name].to_numpy("float64") for name in LINK))
    latency_s = calls["latency_s"].to_numpy("float64")
    each_s = (latency_s - begin_s - frame_s) / frames
    each_s = np.where((frames == 1) | (each_s >= frame_s), each_s, math.nan)
    for request, windows in _pipelined_requests(calls, latency_s, begin_s, frame_s, frames):
        pipeline = _Pipeline()
        each_s[request] = [pipeline.compute_s(*window) for window in windows]
    compute_s = each_s * frames
    return calls.assign(compute_s=compute_s, link_s=latency_s - compute_s)


def priced_s(calls: pd.DataFrame, link: LinkModel) -> pd.Series:
    """Seconds that each call (`with_compute`) would take over `link`. Calls without a link (local) keep their latency."""
    begin_s, frame_s, frames = _parts(calls, link.rtt_s, link.up_s_per_byte, link.down_s_per_byte)
    each_s = calls["compute_s"].to_numpy("float64") / frames
    seconds = begin_s + np.maximum(each_s + frames * frame_s, frames * each_s + frame_s)
    for request, windows in _pipelined_requests(calls, each_s, begin_s, frame_s, frames):
        pipeline = _Pipeline()
        seconds[request] = [pipeline.latency_s(*window) for window in windows]
    return pd.Series(seconds, calls.index)


def separable(calls: pd.DataFrame) -> pd.DataFrame:
    """The calls (`with_compute`) of the cells and metrics whose compute is at least `LEAST_COMPUTE` of their link.

    Less than that is within the probe's error: tolerance.goodput, 5% by default.
    """
    cells = calls.groupby(["model", "mode", "phase", "metric", "network"], sort=False)
    compute_s, link_s = (cells[name].transform("median", skipna=False) for name in ("compute_s", "link_s"))
    return calls[compute_s >= LEAST_COMPUTE * link_s]


def _pipelined_requests(calls: pd.DataFrame, *columns: np.ndarray) -> Iterator[tuple[np.ndarray, Iterator[tuple[Any, ...]]]]:
    """The places and the values in `columns` of the windows of each request that sends for one before the last is complete (`ahead`)."""
    if not calls["ahead"].any():
        return
    placed = calls.assign(place=np.arange(len(calls)))
    windows = placed[calls["ahead"].astype(bool) & (calls["metric"] == "ITL")]
    for _, request in windows.groupby([*KEYS, "request"], sort=False):
        places = request.sort_values("call")["place"].to_numpy()
        yield places, zip(*(column[places].tolist() for column in columns), strict=True)


@dataclass
class _Pipeline:
    """The progress of a request's windows, in seconds since the client sent for the first one.

    The client sends for a window when the first frame of the window before arrives; the worker begins it when it has computed that one.
    Frames travel one after the other, each once it is computed. `computed_s` counts half a round trip more: the arrival of an empty frame.
    """

    sent_s: float = 0.0
    computed_s: float = 0.0
    arrived_s: float = 0.0  # the last frame

    def compute_s(self, latency_s: float, begin_s: float, frame_s: float, frames: int) -> float:
        """Compute of one frame of the next window. NaN, for it and all later ones, if its frames waited for the link."""
        each_s = (self.arrived_s + latency_s - self._start_s(begin_s) - frame_s) / frames
        each_s = each_s if frames == 1 or each_s >= frame_s else math.nan
        self.latency_s(each_s, begin_s, frame_s, frames)
        return each_s

    def latency_s(self, each_s: float, begin_s: float, frame_s: float, frames: int) -> float:
        """From the last frame of the window before to the last frame of the next one, whose frames take `each_s` to compute."""
        start_s, before_s = self._start_s(begin_s), self.arrived_s
        self.sent_s = max(start_s + each_s, before_s) + frame_s
        self.computed_s = start_s + frames * each_s
        self.arrived_s = max(start_s + each_s + frames * frame_s, self.computed_s + frame_s, before_s + frames * frame_s)
        return self.arrived_s - before_s

    def _start_s(self, begin_s: float) -> float:
        return max(self.computed_s, self.sent_s + begin_s)


def _parts(calls: pd.DataFrame, rtt_s: Any, up_s_per_byte: Any, down_s_per_byte: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each call over a link: seconds of round trips and upload, seconds that one frame takes down, and the number of frames."""
    counted = calls[["frames", "round_trips", "up_bytes", "down_bytes"]].to_numpy("float64")
    frames = np.maximum(counted[:, 0], 1).astype("int64")
    begin_s = counted[:, 1] * rtt_s + counted[:, 2] * up_s_per_byte
    return begin_s, counted[:, 3] / frames * down_s_per_byte, frames
