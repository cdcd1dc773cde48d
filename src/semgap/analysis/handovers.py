"""Requests of handover phases, one a row: the times to their first two tokens, and what crossed if they moved."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from semgap.analysis.load import KEYS, Trials, keys_of
from semgap.analysis.trial_rows import kv_probe_of, ratios_reason

SENT = ("saved_tensor_bytes", "saved_payload_bytes", "sent_network_bytes", "sent_s", "sent_after_s")
"""Of the blocks that the first worker sent; null if it sent none."""
GONE_ON = (
    *("latency_s", "worker_compute_s", "missing_bytes", "fetched_network_bytes", "stall_s", "recovery", "kv_codecs", "fallback", "handed"),
    *SENT,
)
"""Columns of a request's first decode step."""
OF_TRIAL = ("policy", "kv_codec", "kv_network", "kv_rtt_s", "ratios_reason", "local")


def handovers(trials: Trials) -> pd.DataFrame:
    """`KEYS`, `OF_TRIAL`, `moves`, `pair` (two neighbours, one of which moves), `ttft_s`, `GONE_ON` and `second_s`, the time to the second
    token, of each measured request of handover phases. `latency_s` is the wait between the two tokens, `waited_s` that less the compute of
    the step: by the worker's clock, without its stall.
    """
    own = [_of_trial(manifest) for manifest in trials.manifests if manifest["cell"]["phase_spec"]["kind"] == "handover"]
    steps = trials.steps.reindex(columns=[*KEYS, "request", "warmup", "step", "moves", *GONE_ON])
    frame = pd.DataFrame(own, columns=[*KEYS, *OF_TRIAL]).astype({"trial": steps["trial"].dtype})
    steps = frame.merge(steps[~steps["warmup"].astype(bool)], on=KEYS)
    at = [*KEYS, "request"]
    first, second = (steps[steps["step"] == step] for step in (0, 1))
    rows = second.drop(columns=["warmup", "step"]).merge(first[[*at, "latency_s"]].rename(columns={"latency_s": "ttft_s"}), on=at)
    number = rows.groupby(KEYS, sort=False)["request"].rank(method="first").sub(1)
    computed_s = rows["worker_compute_s"].astype("float64").fillna(0) - rows["stall_s"].astype("float64").fillna(0)
    seconds = {"second_s": rows["ttft_s"] + rows["latency_s"], "waited_s": rows["latency_s"] - computed_s}
    return rows.assign(pair=number // 2, moves=rows["moves"].astype(bool), **seconds)


def _of_trial(manifest: Mapping[str, Any]) -> dict[str, Any]:
    cell, probe = manifest["cell"], kv_probe_of(manifest) or {}
    recovery = cell["policy"]["recovery"]
    return keys_of(manifest) | {
        "policy": recovery,
        "kv_codec": {"reload": "raw", "recompute": None}.get(recovery, cell["policy"]["codec"]["kv"]),
        "kv_network": cell["network_spec"].get("kv"),
        "kv_rtt_s": probe.get("rtt_s"),
        "ratios_reason": ratios_reason(manifest),
        "local": cell["policy"]["placement"] == "local",
    }
