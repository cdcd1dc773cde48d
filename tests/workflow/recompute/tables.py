"""One function a table: results, gap, summary, ladder, exactness, codecs, break_even."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from intervals import Row, interval, is_null, log_interval, mean, median_interval, ratio, smallest_effect, welch_interval
from run import Run, byte_ratio, checks_of, equal_compute_logs, is_prefill, paired, paired_ratio, strongest_blind, to_local
from trials import Trial


def results(run: Run) -> list[Row]:
    return list(run.rows.values())


def gap(run: Run) -> list[Row]:
    """latency = compute + codec + link, gap = latency - compute, per token; ratios to undisturbed steps as geometric means over trials."""
    rows = []
    effects = {key: power(run, modes) for key, modes in run.groups.items()}
    for at, trials, _ in run.cells("prefill", "decode"):
        prefill = is_prefill(trials)
        part = {name: [float(t.steps[name].mean()) for t in trials] for name in ("worker_compute_s", "client_compute_s")}
        part |= {
            name: [None if t.is_local else float(t.steps[name].mean()) for t in trials] for name in ("client_codec_s", "worker_codec_s")
        }
        codec = [None if t.is_local else t.steps["client_codec_s"].mean() + t.steps["worker_codec_s"].mean() for t in trials]
        floors = [None if prefill else t.floor_s for t in trials]
        row = at | {"latency_metric": "TTFT" if prefill else "ITL", "trials": len(trials), "calls_per_trial": len(trials[0].calls())}
        row |= interval("latency_ms", [t.latency_s for t in trials], 1e3) | interval("compute_ms", [t.compute_s for t in trials], 1e3)
        row |= interval("gap_ms", [t.gap_s for t in trials], 1e3) | interval("gap_median_ms", [t.typical_gap_s for t in trials], 1e3)
        row |= {f"{name}ms": mean(values, 1e3) for name, values in ((key[:-1], values) for key, values in part.items())}
        row["link_ms"] = mean([None if c is None else t.gap_s - c for t, c in zip(trials, codec, strict=True)], 1e3)
        row["floor_ms"] = mean(floors, 1e3)
        row |= log_interval("compute_to_floor", [ratio(a, b) for a, b in zip(part["worker_compute_s"], floors, strict=True)])
        row |= log_interval("own_ratio", [t.own() for t in trials])
        row |= log_interval("control_ratio", [t.own("alone_s") for t in trials])
        row |= log_interval("compute_to_control", [t.own("alone_s", "compute_s") for t in trials])
        row["control_windows"] = mean([len(t.windows) for t in trials])
        row |= to_local(run, trials)
        row |= paired_ratio("compute_to_local", trials, [] if trials[0].is_local else run.locals_of(trials[0]), "compute_s")
        low, high = row["compute_to_local_low"], row["compute_to_local_high"]
        if low is not None and high is not None:
            row["compute_verdict"] = "slower" if low > 1 else "faster" if high < 1 else "no difference found"
        rows.append(row | effects[at["model"], at["network"], at["phase"]])
    return rows


def power(run: Run, modes: Mapping[str, list[Trial]]) -> Row:
    """The smallest effects that a two-sided test at 5% finds in 80% of cases, of modes that are a rung, a twin or have claims."""
    marked = [mode for mode in modes if any(run.mark(mode).get(key) for key in ("rung", "twin", "claims"))]
    marked = marked or [mode for mode, trials in modes.items() if not trials[0].is_local]
    gaps, owns = [[t.gap_s * 1e3 for t in modes[mode]] for mode in marked], equal_compute_logs(*(modes[mode] for mode in marked))
    base = modes.get(run.base, [])
    pairs = [[math.log(a.latency_s / b.latency_s) for a, b in paired(modes[mode], base)] for mode in marked if mode != run.base]
    gap_ms, own, pair = smallest_effect(gaps, 2), smallest_effect(owns, 2), smallest_effect(pairs, 1)
    return {"smallest_gap_ms": gap_ms, "smallest_ratio": own and math.expm1(own), "smallest_paired_ratio": pair and math.expm1(pair)}


def summary(run: Run) -> list[Row]:
    """Means over trials of the columns of results.csv."""
    rows = []
    for at, trials, modes in run.cells("prefill", "decode"):
        prefill = is_prefill(trials)

        def of(name: str, trials: Sequence[Trial] = trials) -> list[Any]:
            return run.column(trials, name)

        latency = of("latency_mean_s")
        row = at | {
            "latency_metric": "TTFT" if prefill else "ITL",
            "trials": len(trials),
            "keeps": of("keeps")[0],
            "cut_to_steps": of("cut_to_steps")[0],
        }
        row |= {
            "steal_share": max((share for share in of("steal_share") if share is not None), default=None),
            "promise_kept": all(of("promise_kept")),
        }
        row |= interval("latency_mean_ms", latency, 1e3) | median_interval("latency_median_ms", latency, 1e3)
        row |= {key: value and value * 1e3 for key, value in log_interval("latency_geomean_ms", latency).items()}
        row["base"] = run.base or None
        row |= paired_ratio("ratio_to_base", trials, modes.get(run.base, []), "latency_s")
        row |= to_local(run, trials)
        row |= interval("tokens_per_s", of("tokens_per_s")) | interval("payload_bytes_per_token", of("payload_bytes_per_token"))
        row["ttft_ms"] = mean(latency, 1e3) if prefill else None
        row["itl_ms"], row["tpot_ms"] = (None, None) if prefill else (mean(latency, 1e3), mean(of("tpot_s"), 1e3))
        averaged = [*BYTES, "round_trips_per_token", "client_cpu_s_per_token", "worker_cpu_s_per_token", "worker_compute_s_per_token"]
        averaged += ["gpu_s_per_token", "gpu_time_share", "samplers_core_share", "weights_held_bytes", "head_bytes"]
        row |= {name: mean(of(name)) for name in averaged}
        rows.append(row | uploads(run, trials))
    return rows


BYTES = ("tensor_bytes_per_token", "wire_bytes_per_token", "up_payload_bytes_per_token", "down_payload_bytes_per_token")


def uploads(run: Run, trials: Sequence[Trial]) -> Row:
    """Means over the trials that began with an empty weight cache."""
    empty = [trial for trial in trials if not run.rows[trial]["cached_weights_bytes"]]
    names = ("setup_payload_bytes", "weights_bytes", "weights_put_mb_per_s", "earlier_sessions_weights_bytes")
    return {name: mean(run.column(empty, name)) for name in names}


def ladder(run: Run) -> list[Row]:
    """Each rung against the one below, the strongest blind baseline, and the model's cross entropy of the text."""
    rows = []
    for at, trials, modes in run.cells("prefill", "decode"):
        mark, rungs, prefill = run.mark(at["mode"]), run.ladder(modes), is_prefill(trials)
        if not (mark.get("rung") or mark.get("reference")):
            continue
        is_rung = at["mode"] in rungs
        payload = run.column(trials, "payload_bytes_per_token")
        kept = [*run.column(trials, "promise_kept"), *(row["promise_kept"] for row in checks_of(run, at))]
        row = at | {"role": "rung" if is_rung else "reference", "adds": mark["rung"]["adds"] if is_rung else mark["reference"]}
        row |= {"trials": len(trials), "keeps": trials[0].policy["keeps"], "promise_kept": all(kept)}
        row |= {name: mean(run.column(trials, name)) for name in (*BYTES, "round_trips_per_token", "weights_held_bytes", "head_bytes")}
        row |= interval("payload_bytes_per_token", payload) | interval(
            "ttft_ms", run.column(trials, "latency_mean_s" if prefill else "ttft_s"), 1e3
        )
        row |= interval("itl_ms", [None if prefill else t.latency_s for t in trials], 1e3)
        row |= interval("gap_ms", [t.gap_s for t in trials], 1e3)
        before = rungs[rungs.index(at["mode"]) - 1] if is_rung and at["mode"] != rungs[0] else None
        row |= {"before": before, "latency_to_before_pairs": 0}
        if before:
            below = modes[before]
            row |= byte_ratio("bytes_to_before", run, trials, below)
            row |= welch_interval("gap_to_before_ms", [t.gap_s for t in trials], [t.gap_s for t in below], 1e3)
            row |= paired_ratio("latency_to_before", trials, below, "latency_s")
        blind = strongest_blind(run, modes, lambda ts: mean(run.column(ts, "payload_bytes_per_token")))
        row["blind"] = blind
        row |= byte_ratio("bytes_to_blind", run, trials, modes[blind]) if blind else {}
        row |= entropy(run, at["model"])
        row["payload_to_entropy"] = ratio(row["payload_bytes_per_token"], row["entropy_bytes_per_token"])
        rows.append(row | uploads(run, trials))
    return rows


def entropy(run: Run, model: str) -> Row:
    """Local's cross entropy of the text in nats / ln 2 / 8, of the check that read the most text; t interval over its prompts."""
    checks = [row for row in run.exactness if row["model"] == model and row.get("text_tokens")]
    if not checks:
        return dict.fromkeys(("entropy_bytes_per_token", "entropy_bytes_per_token_low", "entropy_bytes_per_token_high"))
    longest = max(checks, key=lambda row: row["text_tokens"])
    return interval("entropy_bytes_per_token", longest["text_reference_nats_by_prompt"], 1 / math.log(2) / 8)


EXACTNESS = (
    *("keeps", "promise_kept", "tokens_compared", "tokens_equal", "first_difference", "edge_draws", "logits_bitwise", "max_abs_diff"),
    *("max_kl_nats", "text_logits_bitwise", "text_max_abs_diff", "text_mean_kl_nats", "text_max_kl_nats", "text_cross_entropy_nats"),
    *("text_reference_cross_entropy_nats", "text_reference_nats_by_prompt", "text_tokens", "model", "mode"),
)


def exactness(run: Run) -> list[Row]:
    """The check's file, the difference d of the cross entropies, and exp(d) - 1."""
    rows = []
    for check in run.exactness:
        ours, locals_ = check["text_cross_entropy_nats"], check["text_reference_cross_entropy_nats"]
        change = None if ours is None or locals_ is None else ours - locals_
        row = {key: value for key, value in check.items() if key in EXACTNESS}
        rows.append(row | {"cross_entropy_change_nats": change, "perplexity_change": None if change is None else math.exp(change) - 1})
    return rows


SPEEDS = ("cold_encode_mb_per_s", "cold_decode_mb_per_s", "warm_encode_mb_per_s", "warm_decode_mb_per_s")


def codecs(run: Run) -> list[Row]:
    """The measured codecs; each speed as the geometric mean over processes, with its t interval."""
    rows = run.codecs.to_dict("records")
    return [{**row, **{key: value for name in SPEEDS for key, value in log_interval(name, values_of(row, name)).items()}} for row in rows]


def values_of(codec: Row, name: str) -> list[float]:
    """The values of a speed, one a process; none where it was not measured."""
    return [] if codec[name] is None else [float(value) for value in codec[name]]


def break_even(run: Run) -> list[Row]:
    """B = (1 - 1/r) / (1/e + 1/d) of each process, cold, as a geometric mean; null if the codec does not make the tensor smaller."""
    rows = []
    kept = ("model", "tensor", "tensor_class", "dtype", "codec", "device", "exact", "kl_nats", "ratio", *with_ends(SPEEDS[:2]))
    for codec, shown in zip(run.codecs.to_dict("records"), codecs(run), strict=True):
        speeds = zip(values_of(codec, SPEEDS[0]), values_of(codec, SPEEDS[1]), strict=False)
        gain = 0 if is_null(codec["ratio"]) else 1 - 1 / codec["ratio"]
        bounds = [gain / (1 / e + 1 / d) for e, d in speeds] if gain > 0 else []
        row = {key: shown[key] for key in kept}
        row |= log_interval("break_even_mb_per_s", bounds) | log_interval("break_even_gbit_per_s", [8e-3 * bound for bound in bounds])
        rows += [row] if codec["codec"] != "raw" else []
    return rows


def with_ends(names: Sequence[str]) -> list[str]:
    return [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
