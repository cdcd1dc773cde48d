"""Closed loops of many requests over other links: the engine is a server whose throughput depends on the requests that are there.

Of N live requests, throughput x calls per token x RTT are on their way (Little's law); the others are at the engine. The recorded levels of
a mode give its throughput f over the requests at the engine; batching, prefills and software are in it. Over another link a level has the
throughput X = f(N - X x calls per token x RTT): a flow-equivalent server (Chandy, Herzog, Woo 1975). If a token without windows spends s at
the engine, N x s / (RTT + s) requests are there. A mode with `turns: whole` runs each request to its end and waits for the one that runs: a
request takes a round trip more for each of its calls but the last. The model ignores bytes: ids of tokens are small.
"""

import math
from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from semgap.analysis.columns import frame_of
from semgap.analysis.held_out import ONE_NETWORK
from semgap.analysis.link_grid import LinkGrid
from semgap.analysis.load import CELL

AT = [*CELL, "level"]
MEASURED = {"tokens/s of a load": "tokens_per_s", "mean ITL of a load": "itl_mean_ms"}
"""Metrics of closed loops that have a price, and the columns that hold their measured values."""
COLUMNS = [
    *AT,
    *(f"{prefix}{name}" for name in MEASURED.values() for prefix in ("priced_", "error_")),
    "occupancy",
    "from_networks",
    "reason",
]
OVER_COLUMNS = ["rtt", "model", "phase", "mode", "concurrency", "tokens_per_s", "itl_mean_ms", "occupancy", "from_networks"]
_HALVINGS = 60
LEAST_THERE = 0.1
"""A level tells the engine's rate if this share of its requests was there; below it is the error of the probe."""
AWAY = "the requests of the other networks' levels were on their way nearly all the time"


def load_held_out(levels: pd.DataFrame) -> pd.DataFrame:
    """Each level of a closed loop (`load_levels`) priced from the same mode's levels over the other networks, and priced / measured - 1."""
    means, rows = _means(levels), []
    for _, mode in means.groupby(["model", "mode", "phase"], sort=False):
        for _, level in mode.iterrows():
            found = _priced(mode[mode["network"] != level["network"]], level["level"], float(level["rtt_s"]))
            row = {key: level[key] for key in AT} | {"occupancy": found.get("occupancy"), "from_networks": found.get("from_networks")}
            for name in MEASURED.values():
                value = found.get(name)
                row |= {f"priced_{name}": value, f"error_{name}": None if value is None else value / level[name] - 1}
            others = level["network"] != mode["network"]
            rows.append(row | {"reason": None if found else AWAY if (others & (mode["level"] == level["level"])).any() else ONE_NETWORK})
    return frame_of(rows, COLUMNS)


def loads_over(levels: pd.DataFrame, grid: LinkGrid) -> pd.DataFrame:
    """Each level of a closed loop over each round trip: means over the recorded networks. The links' rates count for nothing."""
    means = _means(levels)
    rows = []
    for rtt, rtt_s in {named["rtt"]: link.rtt_s for named, link in grid.links()}.items():
        for keys, mode in means.groupby(["model", "phase", "mode"], sort=False):
            for number, level in mode.groupby("level", sort=False)["concurrency"].first().items():
                at = dict(zip(("model", "phase", "mode"), keys, strict=True)) | {"concurrency": int(level)}
                rows.append({"rtt": rtt, **at, **_priced(mode, number, rtt_s)})
    return frame_of(rows, OVER_COLUMNS)


def _means(levels: pd.DataFrame) -> pd.DataFrame:
    """The levels of closed loops, means over trials."""
    closed = levels[levels["concurrency"].notna()]
    numbers = ["concurrency", *MEASURED.values(), "calls_per_token", "inner_calls_per_token", "calls_per_gap", "rtt_s"]
    groups = closed.astype(dict.fromkeys(numbers, "float64")).groupby(AT, sort=False)
    return groups[numbers].mean().join(groups["turns"].first()).reset_index()


def _priced(mode: pd.DataFrame, level: Hashable, rtt_s: float) -> dict[str, Any]:
    """Metrics of a mode's level over a round trip, and its `occupancy`: means over the networks that have the level; {} of none."""
    each = [found for _, network in mode.groupby("network", sort=False) for found in _from(network, level, rtt_s)]
    if not each:
        return {}
    names = ", ".join(mode.loc[mode["level"] == level, "network"])
    return {name: float(np.mean([found[name] for found in each])) for name in each[0]} | {"from_networks": names}


def _from(levels: pd.DataFrame, level: Hashable, rtt_s: float) -> Iterator[dict[str, float]]:
    """The prices from one network's levels of a mode; none if the engine's rate cannot be told from the link."""
    levels = levels[
        [_there(each, each["tokens_per_s"], each["rtt_s"]) >= LEAST_THERE * each["concurrency"] for _, each in levels.iterrows()]
    ]
    for _, own in levels[levels["level"] == level].iterrows():
        live, rate, calls = own["concurrency"], own["tokens_per_s"], own["calls_per_token"]
        here_s, there_s = own["rtt_s"] * own["calls_per_gap"], rtt_s * own["calls_per_gap"]
        if own["turns"] == "whole":
            held = calls if live == 1 else own["inner_calls_per_token"]  # after a request's last call the next one begins at once
            token_s = 1 / rate - own["rtt_s"] * held
            if token_s < LEAST_THERE / rate:
                continue
            priced = 1 / (token_s + rtt_s * held)
            yield {
                "tokens_per_s": priced,
                "itl_mean_ms": own["itl_mean_ms"] + 1e3 * (there_s - here_s),
                "occupancy": live - priced * rtt_s * calls,
            }
            continue
        curve = sorted((_there(each, each["tokens_per_s"], each["rtt_s"]), each["tokens_per_s"]) for _, each in levels.iterrows())
        priced = _throughput(curve, live, rtt_s * calls)
        there = live - priced * rtt_s * calls
        grown = (there / priced) / (_there(own, rate, own["rtt_s"]) / rate)  # of a token's time at the engine
        itl_s = (own["itl_mean_ms"] / 1e3 - here_s) * grown + there_s
        yield {"tokens_per_s": priced, "itl_mean_ms": 1e3 * itl_s, "occupancy": there}


def _there(level: "pd.Series[Any]", rate: float, rtt_s: float) -> float:
    """The requests that are at the engine, mean over time."""
    return float(level["concurrency"] - rate * rtt_s * level["calls_per_token"])


def _throughput(curve: list[tuple[float, float]], live: float, away_s: float) -> float:
    """The loop's rate X (tokens/s), which solves X = rate(live - X * away_s). `away_s`: a token's time on its way, in s."""
    low, high = 0.0, live / away_s if away_s else math.inf
    if not away_s:
        return _rate(curve, live)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _rate(curve, live - middle * away_s) > middle else (low, middle)
    return (low + high) / 2


def _rate(curve: list[tuple[float, float]], there: float) -> float:
    """The engine's rate (tokens/s) at so many requests. A token's time is linear between the recorded points, and beyond the last two."""
    xs, ys = np.array([x for x, _ in curve]), np.array([x / y for x, y in curve])
    slope = max(0.0, (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])) if len(curve) > 1 else 0.0
    time_s = float(np.interp(there, xs, ys)) + slope * max(0.0, there - xs[-1])
    return there / time_s
