"""The calls of a trial: a call is a prefill, a decode step or a window of steps that the client requests and waits for."""

from collections.abc import Mapping
from typing import Any

import msgspec
import pandas as pd

from semgap.analysis.links import LINK, probed_link
from semgap.analysis.load import KEYS, Trials, keys_of
from semgap.network.spec import Network, asked_of
from semgap.phases import MOVE_KV

SPENT = ("worker_compute", "client_compute", "client_codec", "worker_codec")
"""Measured parts of a call's latency: columns of steps.parquet with the ending _s."""
SUMMED = {"round_trips": "round_trips", "up_frame_bytes": "up_bytes", "down_frame_bytes": "down_bytes", "latency_s": "latency_s"}
ASKED = ("asked_rtt_s", "asked_s_per_byte")


def calls(trials: Trials) -> pd.DataFrame:
    """The calls of prefill and decode phases, one a row: a prefill (`metric` TTFT), a decode step or a window of steps (ITL).

    `tokens`, `frames` (with tokens in them), `round_trips`, `up_bytes` and `down_bytes` (frames), `latency_s` and the times of `SPENT` are
    the call's; such a time is NaN if a step has none. `rtt_s`, `up_s_per_byte` and `down_s_per_byte` are the trial's link by its probe, 0
    in local; `asked_rtt_s` and `asked_s_per_byte` the config's, NaN if not set. TTFT includes the prefills before measured decode steps.
    `ahead`: the client sends for a window before the last one is complete.
    """
    steps = trials.steps
    spent = {f"{name}_s": name for name in SPENT}
    columns = [*KEYS, "kind", "request", "step", *SUMMED, *spent]
    chosen = with_call_numbers(steps.loc[~steps["warmup"] & (steps["measured"] | (steps["kind"] == "prefill")), columns])
    chosen = chosen.astype(dict.fromkeys(spent, "float64")).rename(columns=SUMMED | spent)
    chosen = chosen.assign(metric=chosen["kind"].map({"prefill": "TTFT"}).fillna("ITL"), frames=chosen["down_bytes"] > 0)
    groups = chosen.groupby([*KEYS, "metric", "request", "call"], sort=False)
    sums = groups[["frames", *SUMMED.values(), *SPENT]].sum(skipna=False)
    rows = sums.assign(tokens=groups.size(), first=groups["step"].min()).reset_index()
    alike = [manifest for manifest in trials.manifests if manifest["cell"]["phase_spec"]["kind"] not in MOVE_KV]
    links = pd.DataFrame([keys_of(manifest) | _link_of(manifest) for manifest in alike], columns=[*KEYS, "ahead", *LINK, *ASKED])
    return links.astype({"trial": rows["trial"].dtype} | dict.fromkeys(ASKED, "float64")).merge(
        rows, on=KEYS
    )  # in the order of the manifests


def with_call_numbers(steps: pd.DataFrame) -> pd.DataFrame:
    """Steps in order, with the number of their `call` in the request. A step with a round trip begins a call; in local each step is one."""
    in_order = steps.sort_values([*KEYS, "request", "step"], kind="stable")
    remote = in_order.groupby([*KEYS, "request"], sort=False)["round_trips"].transform("sum") > 0
    starts = in_order["round_trips"].where(remote, 1)
    return in_order.assign(call=starts.groupby([in_order[key] for key in [*KEYS, "request"]], sort=False).cumsum())


def recorded_windows(calls: pd.DataFrame) -> pd.Series:
    """The most tokens of a call in each call's phase and mode: above 1 in modes with windows."""
    return calls.groupby(["model", "phase", "mode"], sort=False)["tokens"].transform("max")


def with_window(calls: pd.DataFrame, window: int) -> pd.DataFrame:
    """Calls (`links.with_compute`) of modes with windows as if each asked for `window` tokens; those of other modes, or of more, stay.

    Round trips and request are a call's, the times and the bytes down a token's. So a call's software counts for each token as in the
    recorded window: a longer window is priced too high by that, a shorter one would be too low.
    """
    recorded = recorded_windows(calls)
    changed = (calls["metric"] == "ITL") & (recorded > 1) & (recorded <= window)
    tokens = calls["tokens"].where(~changed, window)
    frames = -(-calls["frames"] * tokens // calls["tokens"])  # rounded up
    times = {name: calls[name] / calls["tokens"] * tokens for name in ("compute_s", *SPENT)}
    return calls.assign(tokens=tokens, frames=frames, down_bytes=calls["down_bytes"] / calls["frames"].clip(lower=1) * frames, **times)


def _link_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    asked = asked_of(msgspec.convert(manifest["cell"]["network_spec"], Network))
    per_byte = None if asked.goodput_bytes_per_s is None else 1 / asked.goodput_bytes_per_s
    nominal = dict(zip(ASKED, (asked.rtt_s, per_byte), strict=True))
    return (
        {"ahead": manifest["cell"]["policy"].get("ahead", False)}
        | nominal
        | (dict.fromkeys(LINK, 0.0) if manifest["probe"] is None else probed_link(manifest["probe"]))
    )
