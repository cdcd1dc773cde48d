"""The prefills of prefix phases, one a row: how long a request took whose beginning was computed before, and how the beginning came."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from semgap.analysis.links import LINK, probed_link
from semgap.analysis.load import KEYS, Trials, keys_of
from semgap.analysis.trial_rows import kv_probe_of, ratios_reason

STEP = (
    *("request", "prefix_tokens", "tokens_in", "latency_s", "stall_s", "recovery", "recovery_planned", "fallback", "kl_nats"),
    *("predicted_fetch_s", "predicted_recompute_s", "missing_bytes", "fetched_network_bytes", "kv_codecs"),
)
OF_TRIAL = (
    "local",
    "policy",
    "shadow",
    "kv_codec",
    "session",
    "fingerprint",
    "ratios_reason",
    "kv_network",
    *(f"kv_{name}" for name in LINK),
)
NUMBERS = (
    *("latency_s", "stall_s", "kl_nats", "predicted_fetch_s", "predicted_recompute_s", "missing_bytes", "fetched_network_bytes"),
    *(f"kv_{name}" for name in LINK),
)


def prefix_steps(trials: Trials) -> pd.DataFrame:
    """The measured prefills of phases with prefixes: `KEYS`, `OF_TRIAL` and `STEP`.

    `policy` is the mode's `prefix`, `kv_codec` the codec in which blocks cross (null: none does). `kv_network` is the network between
    worker and KV host, with `LINK` by its probe, or null.
    """
    of_phase = [manifest for manifest in trials.manifests if manifest["cell"]["phase_spec"].get("prefix_lengths")]
    frame = pd.DataFrame([_of_trial(manifest) for manifest in of_phase], columns=[*KEYS, *OF_TRIAL])
    measured = trials.steps.loc[trials.steps["measured"]].reindex(columns=[*KEYS, *STEP])
    steps = frame.astype({"trial": measured["trial"].dtype}).merge(measured, on=KEYS)
    return steps.astype(dict.fromkeys(NUMBERS, "float64"))


def _of_trial(manifest: Mapping[str, Any]) -> dict[str, Any]:
    cell, kv_probe = manifest["cell"], kv_probe_of(manifest)
    policy = cell["policy"]
    prefix = policy.get("prefix", "recompute")
    return keys_of(manifest) | {
        "local": policy["placement"] == "local",
        "policy": prefix,
        "shadow": policy["shadow"],
        # An opaque object crosses raw.
        "kv_codec": {"recompute": None, "fetch_whole": "raw"}.get(prefix, policy["codec"]["kv"]),
        "ratios_reason": ratios_reason(manifest),
        **{name: manifest[name] for name in ("session", "fingerprint")},
        "kv_network": cell["network_spec"].get("kv"),
        **{f"kv_{name}": value for name, value in (probed_link(kv_probe) if kv_probe else dict.fromkeys(LINK)).items()},
    }
