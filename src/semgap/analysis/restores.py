"""Steps that miss KV blocks, over another link between worker and KV host: a step's wait for them, taken apart and put together.

The missing layers arrive in order. Over a link of round trip r, each takes t = bytes / layers x seconds per byte to cross and s to be
received, decoded and placed, by a thread that overlaps with the link: layer j of them (from 0) is here after r + t + s + j max(t, s).
`reload` waits for the last one. With `delta` a layer waits for its own blocks alone: if each layer computes for c, missing layer j, the
m-th of the model, waits as far as it is here later than m c. r and t are probed and counted, c is the step's own compute by the worker's
clock, s comes from restores that ran alone. docs/method.md ("What another link would do") has the assumptions.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from semgap.analysis.columns import frame_of, interval_columns, with_endings
from semgap.analysis.held_out import ONE_NETWORK
from semgap.analysis.link_grid import LINK_COLUMNS, LinkGrid
from semgap.analysis.links import LINK, LinkModel
from semgap.analysis.load import CELL, KEYS
from semgap.analysis.stats import mean_interval

METRIC = "wait for KV blocks"
FETCHED = ("reload", "delta")
"""The ways whose time over another link is known. `auto` would choose anew there; `recompute` crosses no link."""
CHOOSES = "auto"
"""The KV codec of modes that choose it for each layer, by the link (policy.AUTO)."""
OVERLAP_FROM_S = {"cpu": 1.5e-3, "cuda": 0.5e-3}
"""A shorter fetch runs before its step, by device (kv/restoring.py)."""
SLACK = 0.05
"""Two links' seconds per byte are told apart beyond this part: tolerance.goodput."""
SHORT_S = 1e-3
"""Errors as a part of the measured wait are those of longer ones: `delta` may hide a wait to nothing."""
HIDDEN = "every recorded link to a KV host that could tell is slower, and hides receiving and decoding that this one would show"
CHOSEN = "codec.kv auto: over another link the mode would have chosen other codecs for its layers, and sent other bytes"
UNTIMED = "no restore ran alone: the time of receiving and decoding is not known"
HELD_COLUMNS = [*CELL, "metric", "evict_fraction", "measured_s", "priced_s", "gap_error_s", "gap_error", "from_networks", "reason"]
KV_LINK_COLUMNS = [f"kv_{name}" for name in LINK_COLUMNS]
COLUMNS = [
    *("model", "phase", "mode", "evict_fraction", "trials"),
    *with_endings("wait_ms", "itl_ms"),
    *("missing_bytes_per_step", "fetched_network_bytes_per_step", "wait_model_error_ms", "from_networks"),
]
_GROUP = ["model", "phase", "mode", "evict_fraction"]


@dataclass(frozen=True)
class KVLink:
    """A link between worker and KV host: seconds of a round trip, and of a byte from the KV host once bytes flow."""

    rtt_s: float
    s_per_byte: float

    @classmethod
    def of(cls, link: LinkModel) -> "KVLink":
        return cls(link.rtt_s, link.down_s_per_byte)

    @classmethod
    def probed(cls, cell: pd.DataFrame) -> "KVLink":
        """The means over a cell's trials of their probes."""
        probes = cell.drop_duplicates(KEYS)
        return cls(float(probes["kv_rtt_s"].mean()), float(probes["kv_down_s_per_byte"].mean()))


def restores(steps: pd.DataFrame) -> pd.DataFrame:
    """The timed steps (`recovery_steps`) of modes that fetch from a KV host over a probed link, in phases with evict fractions.

    `missing` counts a step's missing layers, `came` those that were fetched. `layer_s` is the compute of a layer, 0 if none hides the
    fetch; `each_s` the software of a fetched layer; `rest_s` what the step waited beyond the model; both are NaN if no restore ran alone.
    `rest_s` is NaN too where codecs were chosen by the link.
    """
    probed = (steps["shadow"] == "kvhost") & steps["kv_rtt_s"].notna()
    own = steps[probed & steps["evicts"].astype(bool) & steps["policy"].isin(FETCHED) & steps["fallback"].isna()].copy()
    own["missing"] = own["evicted_layers"].where(own["missing_bytes"].fillna(0) > 0, 0).astype("int64")
    own["came"] = own["missing"].where((own["policy"] != "reload") | (own["missing"] == 0), own["layers"]).astype("int64")
    own["each_s"] = _software_s(own)
    timed = own[own["restore_alone_s"].isna()].copy()
    computed_s = (timed["worker_compute_s"] - timed["stall_s"]) * timed["layers_share"] / timed["layers"]
    timed["layer_s"] = computed_s.where(timed["policy"] != "reload", 0.0).astype("float64")
    rest_s = timed["stall_s"] - waits_s(timed, own_links(timed))
    timed["rest_s"] = rest_s.where((timed["kv_codec"] != CHOOSES) | (timed["missing"] == 0))
    return timed.reset_index(drop=True)


def own_links(steps: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Round trip and seconds a byte of each step's own link, by its trial's probe."""
    return steps["kv_rtt_s"].to_numpy("float64"), steps["kv_down_s_per_byte"].to_numpy("float64")


def waits_s(steps: pd.DataFrame, link: tuple[Any, Any]) -> np.ndarray:
    """Seconds that each step waits for its blocks, over a link (s of a round trip, s a byte; numbers, or one for each step)."""
    trip_s, per_byte = (np.broadcast_to(np.asarray(part, "float64"), len(steps)) for part in link)
    came, layers = steps["came"].to_numpy("int64"), steps["layers"].to_numpy("int64")
    each_s, layer_s = steps["each_s"].to_numpy("float64"), steps["layer_s"].to_numpy("float64").copy()
    sent_s = steps["fetched_network_bytes"].to_numpy("float64") * per_byte / np.maximum(came, 1)
    shortest_s = steps["device"].map(OVERLAP_FROM_S).to_numpy("float64")
    layer_s[trip_s + came * (sent_s + each_s) < shortest_s] = 0.0  # such a fetch runs before the step
    first_s, gap_s = trip_s + sent_s + each_s, np.maximum(sent_s, each_s)
    waits = np.zeros(len(steps))
    for at in np.flatnonzero(came):
        order = np.arange(came[at])
        places = _places(int(layers[at]), int(came[at]), int(steps["step"].iloc[at]))
        waits[at] = np.maximum(0.0, (first_s[at] + order * gap_s[at] - places * layer_s[at]).max())  # of NaN, NaN
    return waits


def _places(layers: int, missing: int, step: int) -> np.ndarray:
    """The layers that a phase evicts before a step (client/pressure.py): evenly spaced, shifted by one each step."""
    return np.sort((step + np.arange(missing) * layers // missing) % layers)


def _software_s(steps: pd.DataFrame) -> np.ndarray:
    """Software of a layer, by the median of the same trial's restores with the same fraction that nothing hid; NaN without one.

    Such a restore took r + t + s + (k - 1) max(t, s) for k layers: s is the rest of the last one if t is longer, else of all.
    """
    alone_s = steps["restore_alone_s"].where(steps["policy"] != "reload", steps["stall_s"]).astype("float64")
    alone_s = alone_s.where(steps["came"] > 0).groupby([steps[key] for key in (*KEYS, "evict_fraction")]).transform("median")
    trip_s, per_byte = own_links(steps)
    came = steps["came"].to_numpy("float64")
    sent_s = steps["fetched_network_bytes"].to_numpy("float64") * per_byte / np.maximum(came, 1)
    last_s = alone_s.to_numpy() - trip_s - came * sent_s
    all_s = (alone_s.to_numpy() - trip_s - sent_s) / np.maximum(came, 1)
    return np.where(came == 0, 0.0, np.maximum(np.where(last_s <= sent_s, last_s, all_s), 0.0))


def restores_held_out(made: pd.DataFrame) -> pd.DataFrame:
    """Each cell and fraction of `restores` priced from the same mode's steps over the other networks: a step's wait for its blocks.

    `measured_s` is the mean over trials of the trial's median wait. The price takes link, bytes and compute of the cell itself, and the
    software of the others. `gap_error_s` is priced - measured, `gap_error` that over the wait, of those above `SHORT_S`. Without a price
    `reason` says why.
    """
    rows = []
    for keys, mode in made[made["missing"] > 0].groupby(_GROUP, sort=False):
        for network, cell in mode.groupby("network", sort=False):
            measured_s = float(_typical(cell, cell["stall_s"]).mean())
            row: dict[str, Any] = dict(zip(_GROUP, keys, strict=True)) | {"network": network, "metric": METRIC, "measured_s": measured_s}
            rest = mode[mode["network"] != network]
            others = dict(_telling(rest, KVLink.probed(cell)))
            if others:
                price = float(np.mean([_priced_as(cell, other) for other in others.values()]))
                error_s = price - measured_s
                row |= {"priced_s": price, "gap_error_s": error_s, "gap_error": error_s / measured_s if measured_s > SHORT_S else None}
            reason = None if others else ONE_NETWORK if rest.empty else _why_untold(rest)
            rows.append(row | {"from_networks": ", ".join(others) or None, "reason": reason})
    return frame_of(rows, HELD_COLUMNS)


def _telling(steps: pd.DataFrame, link: KVLink) -> Iterator[tuple[str, pd.DataFrame]]:
    """The steps of each network whose software is known, and whose link to the KV host is no slower than `link`: a slow one hides software
    that a faster one shows.
    """
    for network, own in steps[steps["rest_s"].notna()].groupby("network", sort=False):
        if link.s_per_byte >= (1 - SLACK) * own["kv_down_s_per_byte"].median():
            yield str(network), own


def _why_untold(steps: pd.DataFrame) -> str:
    if (steps["kv_codec"] == CHOOSES).any():
        return CHOSEN
    return HIDDEN if steps["rest_s"].notna().any() else UNTIMED


def _priced_as(cell: pd.DataFrame, other: pd.DataFrame) -> float:
    """The wait of a cell's steps over their own link, with the software of another network's steps."""
    with_theirs = cell.assign(each_s=float(_typical(other, other["each_s"]).mean()))
    return float((_typical(cell, waits_s(with_theirs, own_links(cell))) + _typical(other, other["rest_s"]).mean()).mean())


def _typical(steps: pd.DataFrame, values: Any) -> pd.Series:
    """Each trial's median."""
    return pd.Series(np.asarray(values, "float64"), steps.index).groupby(steps["trial"]).median()


def restores_over(made: pd.DataFrame, held_out: pd.DataFrame, client: LinkGrid, kv: LinkGrid) -> pd.DataFrame:
    """The wait of each mode and fraction of `restores` over each link to the KV host, and its ITL, also over each link of the client.

    Means over trials, each the mean over the networks that tell the price. `wait_model_error_ms`: the worst held-out error.
    """
    rows = []
    for (own, of_client), (kv_named, kv_link) in itertools.product(client.links(), kv.links()):
        named = {**own, **{f"kv_{name}": value for name, value in kv_named.items()}}
        for keys, steps in made.groupby(["model", "phase", "mode"], sort=False):
            for fraction in sorted(steps["evict_fraction"].unique()):
                at = dict(zip(_GROUP, (*keys, fraction), strict=True))
                rows.append(
                    named | at | _over(steps, fraction, of_client, KVLink.of(kv_link)) | {"wait_model_error_ms": _worst_ms(held_out, at)}
                )
    return frame_of(rows, [*LINK_COLUMNS, *KV_LINK_COLUMNS, *COLUMNS])


def _over(steps: pd.DataFrame, fraction: float, client: LinkModel, kv: KVLink) -> dict[str, Any]:
    own = steps[steps["evict_fraction"] == fraction]
    told = dict(_telling(own, kv)) if (own["missing"] > 0).any() else {str(name): each for name, each in own.groupby("network", sort=False)}
    row: dict[str, Any] = {f"{name}_per_step": float(own[name].mean()) for name in ("missing_bytes", "fetched_network_bytes")}
    row |= {"trials": own["trial"].nunique(), "from_networks": ", ".join(told) or None}
    if not told:
        return row | dict.fromkeys(("wait_ms_reason", "itl_ms_reason"), _why_untold(own))
    known = pd.concat(list(told.values()))
    row["trials"] = known["trial"].nunique()
    there = waits_s(known, (kv.rtt_s, kv.s_per_byte)) + known["rest_s"].to_numpy()
    others = known["latency_s"] - known["stall_s"] - _client_s(known, known) + _client_s(known, vars(client))
    for name, seconds in (("wait_ms", there), ("itl_ms", others.to_numpy("float64") + there)):
        by_network = pd.Series(1e3 * seconds, known.index).groupby([known["trial"], known["network"]]).median()
        row |= interval_columns(name, mean_interval(by_network.groupby("trial").mean().tolist()))
    return row


def _client_s(steps: pd.DataFrame, link: Any) -> pd.Series:
    """Seconds of each step's call on a link of the client, whose parts are named as in `LINK`."""
    trip_s, up_s, down_s = (link[name] for name in LINK)
    return (steps["round_trips"] * trip_s + steps["up_frame_bytes"] * up_s + steps["down_frame_bytes"] * down_s).astype("float64")


def _worst_ms(held_out: pd.DataFrame, at: Mapping[str, Any]) -> float | None:
    own = held_out
    for name, value in at.items():
        own = own[own[name] == value]
    errors = own["gap_error_s"].dropna().abs()
    return 1e3 * float(errors.max()) if len(errors) else None
