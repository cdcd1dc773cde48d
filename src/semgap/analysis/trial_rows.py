"""The rows of results.csv: one a trial, with its bytes, latencies, memory and telemetry. And the steps of recovery phases."""

from collections.abc import Mapping
from typing import Any

import msgspec
import pandas as pd

from semgap.analysis.calls import with_call_numbers
from semgap.analysis.gpu import gpu_columns, gpu_time_columns, sampler_columns
from semgap.analysis.links import LINK, probed_link
from semgap.analysis.load import KEYS, Trials, keys_of
from semgap.network.spec import Network, asked_of

MIN_STEPS_FOR_P95 = 20
EXACT_SIZES = ("raw", "fp16", "compact", "int8", "int4", "topk")
"""Codecs whose payload size does not depend on the tensor's values, except on the range of token ids."""
PRESSURE = (
    *("local", "evicts", "kv_budget", "live_requests", "policy", "shadow", "kv_codec", "bytes_per_position", "ratios_reason"),
    *(
        "control_reason",
        "session",
        "fingerprint",
        "device",
        "layers",
        "layers_share",
        *LINK,
        "kv_network",
        *(f"kv_{name}" for name in LINK),
    ),
)
RECOVERY_STEP = (
    *(
        "request",
        "step",
        "position",
        "latency_s",
        "worker_compute_s",
        "evict_fraction",
        "evicted_layers",
        "round_trips",
        "up_frame_bytes",
        "down_frame_bytes",
        "saved_payload_bytes",
        "restore_alone_s",
        "recovery",
        "missing_bytes",
        "stall_s",
    ),
    *("predicted_s", "fetched_network_bytes", "saved_network_bytes", "copied_bytes", "kv_codecs", "fallback"),
)
NUMBERS = ("bytes_per_position", *LINK, *(f"kv_{name}" for name in LINK))
SETUP = (
    *("worker_start_s", "connect_s", "weights_upload_s", "weights_put_s", "client_start_s", "head_load_s", "head_bytes"),
    *("weights_bytes", "weights_held_bytes"),
)
HELD = "held by the worker's cache"
HELD_BEFORE = "not measured again: the trial itself made the worker hold the weights first"
UPLOAD = ("weights_upload_s", "weights_put_s", "weights_bytes", "weights_held_bytes", "worker_weight_store_bytes")
"""Columns that say nothing of a mode whose weights the trial itself made the worker hold."""
MEMORY = ("client_peak_rss_anon_bytes", "worker_peak_rss_bytes", "worker_weight_store_bytes")
PROBE = ("rtt_s", "goodput_up_bytes_per_s", "goodput_down_bytes_per_s")
EXACTNESS = ("tokens_compared", "tokens_equal", "edge_draws", "logits_bitwise", "max_abs_diff", "max_kl_nats", "promise_kept")
SUMS = (
    *("tensor_bytes", "down_tensor_bytes", "up_payload_bytes", "down_payload_bytes", "payload_bytes", "wire_bytes"),
    *("up_frame_bytes", "down_frame_bytes", "round_trips", "client_cpu_s", "worker_cpu_s", "worker_compute_s", "gpu_s"),
)
"""Sums over the measured steps, as columns `_per_token`. In rows of trials, payload is that of TCP."""
RENAMED = {
    "up_payload_bytes": "up_encoded_bytes",
    "down_payload_bytes": "down_encoded_bytes",
    "up_frame_bytes": "up_payload_bytes",
    "down_frame_bytes": "down_payload_bytes",
}


def trial_rows(trials: Trials) -> pd.DataFrame:
    """One row per trial. Names hold the units; a value that was not measured is null.

    Latency is TTFT in a prefill phase, ITL in others, over the measured steps; the mean is what tables compare, since a window has one
    median. `latency_p95_s` needs 20 steps. Bytes per token are sums over the measured steps / their number: as tensors, as TCP payload
    (frames), and on the wire (payload + TCP segments x header). `setup_payload_bytes` and `delta_payload_bytes` are frames of the whole
    trial.
    """
    rows = pd.DataFrame([_identity(manifest) for manifest in trials.manifests])
    rows = rows.merge(_step_rows(trials.steps, trials.tcp), on=KEYS, how="left")
    rows = rows.merge(_request_rows(trials.requests), on=KEYS, how="left")
    rows = rows.merge(_ledger_rows(rows[KEYS], trials.ledger), on=KEYS, how="left")
    rows = rows.merge(pd.DataFrame([_from_manifest(manifest) for manifest in trials.manifests]), on=KEYS, how="left")
    return rows.merge(_gpu_rows(trials, rows), on=KEYS, how="left")


def _identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The trial, its mode, its network by the config, and the network of its KV host; null for a property that the network leaves open."""
    cell = manifest["cell"]
    network = msgspec.convert(cell["network_spec"], Network)
    kv = msgspec.convert(cell["kv_network_spec"], Network) if "kv_network_spec" in cell else None
    return keys_of(manifest) | {
        "phase_kind": cell["phase_spec"]["kind"],
        **{name: manifest[name] for name in ("session", "fingerprint", "device")},
        "placement": cell["policy"]["placement"],
        "reply_kind": cell["policy"]["reply"]["kind"],
        "cut_to_steps": _cut_to(cell),
        "keeps": manifest["exactness"]["keeps"],
        "cell_digest": manifest["cell_digest"],
        "network_kind": network.kind,
        "asked_rtt_s": asked_of(network).rtt_s,
        "asked_rate_bits_per_s": network.bits_per_s,
        "kv_network": network.kv,
        "kv_network_kind": kv and kv.kind,
        "kv_asked_rtt_s": kv and asked_of(kv).rtt_s,
        "kv_asked_rate_bits_per_s": kv and kv.bits_per_s,
    }


def _cut_to(cell: Mapping[str, Any]) -> int | None:
    """The mode's max_steps if it cuts the phase's decode steps, else None."""
    most, phase = cell["policy"].get("max_steps"), cell["phase_spec"]
    return most if most is not None and phase["kind"] != "prefill" and most < phase["steps"] else None


def _step_rows(steps: pd.DataFrame, tcp: pd.DataFrame) -> pd.DataFrame:
    client = tcp[(tcp["side"] == "client") & (tcp["moment"] == "end")]
    headers = client[[*KEYS, "segment_header_bytes"]].drop_duplicates(KEYS)
    measured = steps[steps["measured"]].merge(headers, on=KEYS, how="left")
    segments = measured["up_segments"] + measured["down_segments"]
    payload = measured["up_frame_bytes"] + measured["down_frame_bytes"]
    measured = measured.assign(
        tensor_bytes=measured["up_tensor_bytes"] + measured["down_tensor_bytes"],
        payload_bytes=payload,
        # A trial without a socket has neither segments nor a header size.
        wire_bytes=payload + (segments * measured["segment_header_bytes"]).where(segments > 0, 0),
    )
    groups = measured.groupby(KEYS, sort=False)
    latency = groups["latency_s"]
    per_call = _call_latencies(measured).groupby(level=KEYS, sort=False)
    rows = pd.DataFrame(
        {
            "measured_steps": latency.size(),
            "latency_median_s": per_call.median(),
            "latency_mean_s": latency.mean(),
            "latency_p95_s": per_call.quantile(0.95).where(per_call.size() >= MIN_STEPS_FOR_P95),
            "tokens_per_s": latency.size() / latency.sum(),
        }
    )
    # One null makes the whole sum null: a sum over only some of the steps is no measurement.
    sums = measured[[*KEYS, *SUMS]].astype(dict.fromkeys(SUMS, "float64")).groupby(KEYS, sort=False).sum(skipna=False)
    per_token = sums.div(rows["measured_steps"], axis=0).rename(columns=RENAMED).add_suffix("_per_token")
    return rows.join(per_token).reset_index()


def _call_latencies(measured: pd.DataFrame) -> pd.Series:
    """Seconds per token of each call: a step, or a window with all its tokens.

    The tokens of a window arrive without a round trip between them, several in a frame. The median over single tokens would leave out the
    round trip, and be 0 for coalesced ones.
    """
    steps = measured[[*KEYS, "request", "step", "round_trips", "latency_s"]]
    return with_call_numbers(steps).groupby([*KEYS, "request", "call"], sort=False)["latency_s"].mean()


def _request_rows(requests: pd.DataFrame) -> pd.DataFrame:
    measured = requests[~requests["warmup"]]
    columns = measured[[*KEYS, "ttft_s", "tpot_s"]].astype({"ttft_s": "float64", "tpot_s": "float64"})
    return columns.groupby(KEYS, sort=False).median().reset_index()


def _ledger_rows(keys: pd.DataFrame, ledger: pd.DataFrame) -> pd.DataFrame:
    """Frame bytes of setup and of delta per trial; 0 if its ledger has none, and in `local`.

    Setup is the client's traffic; delta includes that between the worker and its KV host.
    """
    ours = (ledger["side"] == "client") | ((ledger["side"] == "worker_to_kv_host") & (ledger["kind"] == "delta"))
    crossed = ledger[ours & (ledger["link"] == "network")]
    frame_bytes = crossed.assign(frame_bytes=crossed["payload_bytes"] + crossed["header_bytes"])
    kinds = frame_bytes.groupby([*KEYS, "kind"])["frame_bytes"].sum().unstack("kind")
    kinds = kinds.reindex(columns=["setup", "delta"]).add_suffix("_payload_bytes").reset_index()
    return keys.merge(kinds, on=KEYS, how="left").fillna({"setup_payload_bytes": 0, "delta_payload_bytes": 0})


def _from_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    probe, kv_probe, setup = manifest["probe"] or {}, kv_probe_of(manifest) or {}, manifest["setup"] or {}
    before = (setup.get("weights_bytes_by_session") or [])[:-1]
    return (
        keys_of(manifest)
        | {name: setup.get(name) for name in SETUP}
        | {"earlier_sessions_weights_bytes": sum(before) if before else None}
        | _upload_columns(setup)
        | {"ratios_reason": ratios_reason(manifest), "steal_share": manifest.get("steal_share")}
        | {name: manifest["memory"].get(name) for name in MEMORY}
        | (dict.fromkeys(UPLOAD) if setup.get("weights_held_before") else {})
        | {f"probe_{name}": probe.get(name) for name in PROBE}
        | {f"kv_probe_{name}": kv_probe.get(name) for name in PROBE}
        | {name: manifest["exactness"].get(name) for name in EXACTNESS}
    )


def kv_probe_of(manifest: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The probe of a trial's link between worker and KV host, or None if that is no network of the config, or was not there."""
    kv = (manifest.get("network") or {}).get("kv")
    return kv and kv["probe"]


def _upload_columns(setup: Mapping[str, Any]) -> dict[str, Any]:
    """The upload speed, or why there was no upload, and the bytes that the first session found in the worker's cache."""
    sent, took_s = setup.get("weights_bytes"), setup.get("weights_put_s")
    held = setup.get("weights_held_bytes_by_session") or [None]
    columns: dict[str, Any] = {"cached_weights_bytes": held[0], "weights_put_mb_per_s": None, "weights_put_reason": None}
    if sent and took_s:
        return columns | {"weights_put_mb_per_s": sent / took_s / 1e6}
    kept = HELD if setup.get("weights_held_bytes") else "no weights are sent before the first step"
    return columns | {"weights_put_reason": HELD_BEFORE if setup.get("weights_held_before") else kept}


def ratios_reason(manifest: Mapping[str, Any]) -> str | None:
    """Why a trial's bytes say nothing about a trained model, or None: its weights are random and its codecs' sizes depend on values."""
    cell = manifest["cell"]
    if cell["model_spec"]["source"] != "random" or set(cell["policy"]["codec"].values()) <= set(EXACT_SIZES):
        return None
    return f"not meaningful: {manifest['model']['ratios_reason']}"


def _gpu_rows(trials: Trials, rows: pd.DataFrame) -> pd.DataFrame:
    """The columns of `analysis.gpu` for each trial; `rows` holds GPU time and latency."""
    samples = dict(tuple(trials.gpu.groupby(KEYS))) if len(trials.gpu) else {}
    steps = dict(tuple(trials.steps.groupby(KEYS)))
    timed = rows.set_index(KEYS)[["gpu_s_per_token", "latency_mean_s"]]
    found = []
    for manifest in trials.manifests:
        keys, telemetry = keys_of(manifest), manifest["telemetry"]
        key = tuple(keys.values())
        gpu_s, latency_s = timed.loc[key].tolist()
        if key not in steps:  # a load: its table has the energy of each level
            found.append(keys | _no_gpu_rows(telemetry))
            continue
        own = gpu_columns(samples.get(key, trials.gpu.iloc[:0]), steps[key], telemetry["gpu"]["reason"])
        found.append(keys | own | gpu_time_columns(gpu_s, latency_s, manifest["device"]) | sampler_columns(telemetry))
    return pd.DataFrame(found)


def _no_gpu_rows(telemetry: Mapping[str, Any]) -> dict[str, Any]:
    why = "a load has no steps of one request; see tables/load"
    return dict.fromkeys(("gpu_reason", "gpm_reason", "joules_reason", "gpu_time_reason"), why) | sampler_columns(telemetry)


def recovery_steps(trials: Trials) -> pd.DataFrame:
    """The measured steps of recovery phases, one a row: `KEYS`, `PRESSURE`, `RECOVERY_STEP`, whole_bytes and control_s.

    `policy` is the mode's `recovery`; a step's own `recovery` is the way it took. `shadow` and `kv_codec` are null if the policy does not
    use them. `LINK` is the client's link by its probe, 0 in `local`; `kv_network` is the network between worker and KV host, with `LINK` by
    its probe (`kv_rtt_s`, ...), or null. `layers` are the model's, `layers_share` their part of the weights that a step reads.
    `bytes_per_position` is one position of a cache in all layers. `whole_bytes` is the filled cache of the step's request before any
    codec: the size of an opaque object. These two are null in `local`. `control_s` is the undisturbed compute of a step there: the median
    of the control's window that holds its position, so that one disturbed step of the control does not matter.
    """
    specs = [_pressure(manifest) for manifest in trials.manifests if manifest["cell"]["phase_spec"]["kind"] == "recovery"]
    measured = trials.steps.loc[trials.steps["measured"]].reindex(columns=[*KEYS, *RECOVERY_STEP])
    frame = pd.DataFrame(specs, columns=[*KEYS, *PRESSURE]).astype({"trial": measured["trial"].dtype, **dict.fromkeys(NUMBERS, "float64")})
    steps = frame.merge(measured, on=KEYS)
    control = trials.control.assign(control_s=trials.control.groupby([*KEYS, "window"])["compute_s"].transform("median"))
    steps = steps.merge(control[[*KEYS, "request", "step", "control_s"]], on=[*KEYS, "request", "step"], how="left")
    return steps.assign(whole_bytes=steps["position"] * steps["bytes_per_position"])


def _pressure(manifest: Mapping[str, Any]) -> dict[str, Any]:
    cell, pool, no_control = manifest["cell"], manifest["kv"]["budget_bytes"], manifest["control"]["reason"]
    policy, phase, kv_probe = cell["policy"], cell["phase_spec"], kv_probe_of(manifest)
    recovery = policy["recovery"]
    # The pool holds kv_budget of the caches of max_length positions, the live requests' and the control's, rounded down to whole layers.
    positions = phase["kv_budget"] * (phase["live_requests"] + (no_control is None)) * cell["max_length"]
    return keys_of(manifest) | {
        "local": policy["placement"] == "local",
        "evicts": bool(phase["evict_fractions"]),
        "kv_budget": phase["kv_budget"],
        "live_requests": phase["live_requests"],
        "policy": recovery,
        "shadow": None if recovery == "recompute" else policy["shadow"],
        # reload moves an opaque object, so it moves it raw.
        "kv_codec": {"reload": "raw", "recompute": None}.get(recovery, policy["codec"]["kv"]),
        "bytes_per_position": None if pool is None else pool / positions,
        "ratios_reason": ratios_reason(manifest),
        "control_reason": no_control,
        **{name: manifest[name] for name in ("session", "fingerprint", "device")},
        **(probed_link(manifest["probe"]) if manifest["probe"] else dict.fromkeys(LINK, 0.0)),
        **{name: manifest["model"][name] for name in ("layers", "layers_share")},
        "kv_network": cell["network_spec"].get("kv"),
        **{f"kv_{name}": value for name, value in (probed_link(kv_probe) if kv_probe else dict.fromkeys(LINK)).items()},
    }
