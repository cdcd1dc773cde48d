"""The tables, each as csv, parquet, Markdown and LaTeX.

The frames are made from `load.Results` and hold unrounded numbers with units in the column names. A `View` says how a
reader sees some of the columns.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from semgap.analysis.cells import (
    BASELINE,
    CAST,
    ENDINGS,
    LOCAL,
    PAYLOAD,
    PLACE,
    all_of,
    byte_ratio,
    first_of,
    frame_of,
    mean_of,
    means_of,
    paired_with,
    places,
    spread,
)
from semgap.analysis.codec_tables import BREAK_EVEN_VIEWS, CODEC_VIEWS, break_even, codecs
from semgap.analysis.facts import FACT_VIEWS, facts
from semgap.analysis.gpu import GPM_MEANS
from semgap.analysis.ladder import LADDER_VIEWS, ladder
from semgap.analysis.load import Results
from semgap.analysis.network import NETWORK_VIEWS, network
from semgap.analysis.price import PRICE_VIEWS, price_errors
from semgap.analysis.recovery import RECOVERY_VIEWS, recovery
from semgap.analysis.render import Column, View, to_latex, to_markdown
from semgap.analysis.stats import (
    LEVEL,
    Interval,
    PairedRatio,
    geometric_mean_interval,
    holm,
    mean_interval,
    median_interval,
    p_mean_below,
    paired_ratio,
)

HYPOTHESIS_MODES = ("sys_simulated", "sys")
H1_FEWER_BYTES, H2_LOWER_LATENCY = 0.30, 0.15
MEANS = (
    "tensor_bytes_per_token",
    "wire_bytes_per_token",
    "up_payload_bytes_per_token",
    "down_payload_bytes_per_token",
    "round_trips_per_token",
    "client_cpu_s_per_token",
    "worker_cpu_s_per_token",
    "worker_compute_s_per_token",
    "gpu_s_per_token",
    "gpu_time_share",
    "gpu_util_percent",
    *GPM_MEANS,
    "gpu_power_w",
    "joules_per_token",
    "gpu_energy_check",
    "samplers_core_share",
    "setup_payload_bytes",
    "weights_bytes",
    "weights_put_mb_per_s",
    "weights_held_bytes",
    "earlier_sessions_weights_bytes",
    "head_bytes",
)
FIRST_REASONS = ("gpu_time_reason", "gpu_reason", "gpm_reason", "joules_basis", "joules_reason", "samplers_reason")
REASONS = ("worker_reason", *FIRST_REASONS)


@dataclass(frozen=True)
class Table:
    """A table: the function that builds it, and how it is shown."""

    build: Callable[[Results], pd.DataFrame]
    views: tuple[View, ...]


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per model, network, phase and mode; latencies in ms, CPU in s, bytes per token at three levels.

    Not of recovery phases, whose steps are not alike: the table `recovery` tells them apart.
    A trial's latency is the median over its measured steps; mean, geometric mean and median are over
    trials, each with its own 95% interval (see `stats`). Ratios are of paired trials, geometric means.
    """
    alike = rows[rows["phase_kind"] != "recovery"]
    cells = [_summary_row(place, mode, cell, modes) for place, modes in places(alike) for mode, cell in modes.items()]
    return frame_of(cells, SUMMARY_COLUMNS)


def exactness(checks: pd.DataFrame) -> pd.DataFrame:
    """`load.load_exactness`, and what the mode's losses change in the text's cross entropy (nats) and perplexity (ratio - 1)."""
    change = checks["text_cross_entropy_nats"] - checks["text_reference_cross_entropy_nats"]
    return checks.assign(cross_entropy_change_nats=change, perplexity_change=np.expm1(change))


def hypotheses(rows: pd.DataFrame) -> pd.DataFrame:
    """H1, H2 and the A/A pairs, per model, network and phase; `cut` is 1 - ratio to the baseline.

    H1: at least 30% fewer TCP payload bytes per token than `remote_cache`. H2: at least 15% lower latency
    (geometric mean over paired trials of the ratio of the trials' medians). The verdict of H2 takes
    one-sided t tests on both sides of the threshold, each at 2.5% and Holm-corrected over all H2 rows.
    `cast_part` is the cut of `remote_cache_fp16`, which only casts; `rest_part` is what the mode adds to
    it, in the same unit.
    """
    everywhere = list(places(rows))
    h1 = [row for place, modes in everywhere for row in _h1_rows(place, modes)]
    h2 = _with_holm([row for place, modes in everywhere for row in _h2_rows(place, modes)])
    aa = [row for place, modes in everywhere for row in _aa_rows(place, modes)]
    return frame_of([*h1, *h2, *aa], columns=HYPOTHESIS_COLUMNS)


SUMMARY_COLUMNS = [
    *(*PLACE, "mode", "latency_metric", "trials", "keeps", "promise_kept"),
    *(f"latency_{kind}_ms{ending}" for kind in ("mean", "geomean", "median") for ending in ENDINGS),
    *(f"ratio_to_{baseline}{ending}" for baseline in (BASELINE, LOCAL) for ending in (*ENDINGS, "_pairs")),
    *(f"tokens_per_s{ending}" for ending in ENDINGS),
    *("ttft_ms", "itl_ms", "tpot_ms"),
    *(f"{PAYLOAD}{ending}" for ending in ENDINGS),
    *(*MEANS, "weights_reason", *REASONS, "ratios_reason"),
]
HYPOTHESIS_COLUMNS = [
    *("hypothesis", *PLACE, "mode", "baseline", "claim", "cut", "cut_low", "cut_high", "threshold"),
    *("p", "p_holm", "p_holm_no", "verdict", "cast_part", "rest_part", "smallest_visible_cut"),
    *("trials", "reason", "cast_reason"),
]


def _summary_row(place: Mapping[str, str], mode: str, cell: pd.DataFrame, modes: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    prefill = cell["phase_kind"].iloc[0] == "prefill"
    latency_ms = (cell["latency_median_s"] * 1e3).tolist()
    return {
        **place,
        "mode": mode,
        "latency_metric": "TTFT" if prefill else "ITL",
        "trials": len(cell),
        **_kept(cell),
        **spread("latency_mean_ms", mean_interval(latency_ms)),
        **spread("latency_geomean_ms", geometric_mean_interval(latency_ms)),
        **spread("latency_median_ms", median_interval(latency_ms)),
        **_ratio_columns(f"ratio_to_{BASELINE}", cell, modes.get(BASELINE), BASELINE),
        **_ratio_columns(f"ratio_to_{LOCAL}", cell, modes.get(LOCAL), LOCAL),
        **spread("tokens_per_s", mean_interval(cell["tokens_per_s"].tolist())),
        "ttft_ms": mean_of(cell["ttft_s"] * 1e3) if prefill else None,
        "itl_ms": None if prefill else float(np.mean(latency_ms)),
        "tpot_ms": None if prefill else mean_of(cell["tpot_s"] * 1e3),
        **spread(PAYLOAD, mean_interval(cell[PAYLOAD].tolist())),
        **means_of(cell, MEANS),
        "worker_reason": _worker_reason(cell),
        **{name: first_of(cell[name]) for name in FIRST_REASONS},
        "ratios_reason": first_of(cell["ratios_reason"]),
    }


def _kept(cell: pd.DataFrame) -> dict[str, Any]:
    return {"keeps": first_of(cell["keeps"]), "promise_kept": all_of(cell["promise_kept"])}


def _ratio_columns(name: str, cell: pd.DataFrame, baseline: pd.DataFrame | None, baseline_name: str) -> dict[str, Any]:
    ratio = paired_with(cell, baseline, baseline_name).ratio
    return {**spread(name, ratio), f"{name}_pairs": ratio.n}


def _h1_rows(place: Mapping[str, str], modes: Mapping[str, pd.DataFrame]) -> list[dict[str, Any]]:
    rows = []
    for mode in (name for name in HYPOTHESIS_MODES if name in modes):
        cut, cast = _byte_cut(modes, mode), _byte_cut(modes, CAST)
        rows.append(
            _hypothesis_row("H1", place, mode, cut, H1_FEWER_BYTES)
            | {
                "claim": f"at least {H1_FEWER_BYTES:.0%} fewer payload bytes per token",
                "verdict": _verdict(cut, H1_FEWER_BYTES),
            }
            | _cast_columns(cut, cast)
            | _without_meaning(modes[mode])
        )
    return rows


def _h2_rows(place: Mapping[str, str], modes: Mapping[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """H2 without its verdict, and with the one-sided p value before correction."""
    rows = []
    bound = math.log(1 - H2_LOWER_LATENCY)
    for mode in (name for name in HYPOTHESIS_MODES if name in modes):
        paired, cast = _latency_cut(modes, mode), _latency_cut(modes, CAST)
        logs = paired.log_ratios
        rows.append(
            _hypothesis_row("H2", place, mode, _cut_of(paired.ratio), H2_LOWER_LATENCY)
            | {
                "claim": f"at least {H2_LOWER_LATENCY:.0%} lower latency",
                "p": p_mean_below(logs, bound) if logs else None,
            }
            | _cast_columns(_cut_of(paired.ratio), _cut_of(cast.ratio))
        )
    return rows


def _aa_rows(place: Mapping[str, str], modes: Mapping[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """Latencies of modes that are the same under two names: what differs there is noise."""
    rows = []
    for first, second in itertools.combinations(modes, 2):
        if modes[first]["policy_digest"].iloc[0] != modes[second]["policy_digest"].iloc[0]:
            continue
        cut = _cut_of(paired_ratio(modes[second], modes[first]).ratio)
        rows.append(
            _hypothesis_row("A/A", place, second, cut, None)
            | {"baseline": first, "claim": "the same latency: one mode under two names"}
            | _agreement(cut)
        )
    return rows


def _hypothesis_row(hypothesis: str, place: Mapping[str, str], mode: str, cut: Interval, threshold: float | None) -> dict[str, Any]:
    named = {"hypothesis": hypothesis, **place, "mode": mode, "baseline": BASELINE, "threshold": threshold}
    return named | spread("cut", cut) | {"trials": cut.n, "reason": cut.reason}


def _latency_cut(modes: Mapping[str, pd.DataFrame], mode: str) -> PairedRatio:
    if mode not in modes:
        return PairedRatio(Interval(None, None, None, 0, f"{mode} was not run"), ())
    return paired_with(modes[mode], modes.get(BASELINE), BASELINE)


def _cut_of(ratio: Interval) -> Interval:
    if ratio.value is None:
        return ratio
    low, high = (None if end is None else 1 - end for end in (ratio.high, ratio.low))
    return Interval(1 - ratio.value, low, high, ratio.n, ratio.reason)


def _byte_cut(modes: Mapping[str, pd.DataFrame], mode: str) -> Interval:
    """1 - payload bytes per token / those of the baseline."""
    if mode not in modes:
        return Interval(None, None, None, 0, f"{mode} was not run")
    return _cut_of(byte_ratio(modes[mode], modes.get(BASELINE), mode, BASELINE))


def _without_meaning(cell: pd.DataFrame) -> dict[str, Any]:
    """No verdict, and the reason, where the mode's bytes say nothing of a trained model."""
    reason = first_of(cell["ratios_reason"])
    return {} if reason is None else {"verdict": None, "reason": reason}


def _cast_columns(cut: Interval, cast: Interval) -> dict[str, Any]:
    rest = None if cut.value is None or cast.value is None else cut.value - cast.value
    return {
        "cast_part": cast.value,
        "rest_part": rest,
        "cast_reason": cast.reason if cast.value is None else None,
    }


def _verdict(cut: Interval, threshold: float) -> str | None:
    if cut.value is None or cut.low is None or cut.high is None:
        return None
    return "yes" if cut.low >= threshold else "no" if cut.high < threshold else "inconclusive"


def _agreement(cut: Interval) -> dict[str, Any]:
    if cut.low is None or cut.high is None:
        return {}
    return {
        "verdict": "same" if cut.low <= 0 <= cut.high else "different",
        "smallest_visible_cut": max(abs(cut.low), abs(cut.high)),
    }


def _with_holm(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The H2 rows with corrected p values of both sides and the verdict; rows without a p value stay null."""
    tested = [row for row in rows if row["p"] is not None]
    yes, no = holm([row["p"] for row in tested]), holm([1 - row["p"] for row in tested])
    corrected = {id(row): (y, n) for row, y, n in zip(tested, yes, no, strict=True)}
    return [row | _h2_verdict(*corrected[id(row)]) if id(row) in corrected else row for row in rows]


def _h2_verdict(p_yes: float, p_no: float) -> dict[str, Any]:
    alpha = (1 - LEVEL) / 2
    verdict = "yes" if p_yes < alpha else "no" if p_no < alpha else "inconclusive"
    return {"p_holm": p_yes, "p_holm_no": p_no, "verdict": verdict}


def _worker_reason(cell: pd.DataFrame) -> str | None:
    if cell["worker_cpu_s_per_token"].notna().all():
        return None
    if cell["placement"].iloc[0] == "local":
        return "no worker: the model runs in the client's process"
    return "the worker reported no CPU time in some step"


def write_table(frame: pd.DataFrame, stem: Path, views: Sequence[View] = ()) -> list[Path]:
    """Write `frame` unrounded as {stem}.csv and {stem}.parquet, and as a reader sees it as {stem}.md and {stem}.tex.

    Without `views` the readable forms show every column under its own name. Returns the four paths. The
    bytes depend on the frame alone.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    csv, parquet, md, tex = (stem.with_name(f"{stem.name}.{suffix}") for suffix in ("csv", "parquet", "md", "tex"))
    frame.to_csv(csv, index=False, lineterminator="\n")
    frame.to_parquet(parquet, index=False)
    md.write_text(to_markdown(frame, views), encoding="utf-8")
    tex.write_text(to_latex(frame, views), encoding="utf-8")
    return [csv, parquet, md, tex]


LATENCY_NOTE = (
    "A trial's latency is the median over its measured steps; values are means over trials with a 95% t interval, the "
    "median over trials beside them. Columns x ...: ratio of paired trials (same block, session and environment), geometric "
    "mean with a 95% t interval on the log scale."
)
TRAFFIC_NOTE = (
    "Bytes per generated token over measured steps, both directions. Tensor: before the codec. Payload: what TCP carried, "
    "framing included. Wire: payload + headers of the TCP segments, pure ACKs included. Setup: frames outside the measured steps, one "
    "session's total; of it weights: tensors uploaded before the first step, in the trials that uploaded: not in those whose weights an "
    "earlier trial had left in the worker's cache."
)
SUMMARY_BY = ("model", "network", "phase", "latency_metric")
SUMMARY_VIEWS = (
    View(
        "Latency",
        (
            Column("mode", "mode"),
            Column("trials", "trials", "count"),
            Column("keeps", "keeps"),
            Column("promise_kept", "kept", "yes_no"),
            Column("latency_mean_ms", "mean (ms) [95% CI]", "digits", reason="latency_mean_ms_reason"),
            Column("latency_median_ms", "median (ms)", "digits"),
            Column(
                "ratio_to_remote_cache",
                "x remote_cache [95% CI]",
                "ratio",
                reason="ratio_to_remote_cache_reason",
            ),
            Column("ratio_to_local", "x local [95% CI]", "ratio", reason="ratio_to_local_reason"),
            Column("tokens_per_s", "tokens/s", "digits"),
        ),
        SUMMARY_BY,
        LATENCY_NOTE,
    ),
    View(
        "Traffic",
        (
            Column("mode", "mode"),
            Column("tensor_bytes_per_token", "tensor (B/token)", "count"),
            Column(PAYLOAD, "payload (B/token)", "count", reason="ratios_reason"),
            Column("up_payload_bytes_per_token", "up (B/token)", "count"),
            Column("down_payload_bytes_per_token", "down (B/token)", "count"),
            Column("wire_bytes_per_token", "wire (B/token)", "count"),
            Column("round_trips_per_token", "round trips/token", "small"),
            Column("setup_payload_bytes", "setup (MB)", "digits", 1e-6),
            Column("weights_bytes", "of it weights (MB)", "digits", 1e-6, reason="weights_reason", null="-"),
            Column("weights_put_mb_per_s", "sent at (MB/s)", "digits", null="-"),
            Column("weights_held_bytes", "held by the worker (MB)", "digits", 1e-6, null="-"),
            Column("earlier_sessions_weights_bytes", "weights in earlier sessions (MB)", "digits", 1e-6, null="-"),
        ),
        ("model", "network", "phase"),
        TRAFFIC_NOTE,
    ),
    View(
        "Cost",
        (
            Column("mode", "mode"),
            Column("client_cpu_s_per_token", "client CPU (ms/token)", "digits", 1e3),
            Column("worker_cpu_s_per_token", "worker CPU (ms/token)", "digits", 1e3, reason="worker_reason"),
            Column("tpot_ms", "TPOT (ms)", "digits", null="-"),
            Column("samplers_core_share", "samplers (% of a core)", "percent"),
        ),
        ("model", "network", "phase"),
        "Means over trials. In mode local the client's CPU time holds the model's own. TPOT exists only in decode phases. Samplers: "
        "their CPU time over wall time, of both sides; they are not in the client's and the worker's.",
    ),
    View(
        "GPU",
        (
            Column("mode", "mode"),
            Column("gpu_s_per_token", "GPU time (ms/token)", "digits", 1e3, reason="gpu_time_reason"),
            Column("gpu_time_share", "of the latency (%)", "percent", reason="gpu_time_reason"),
            Column("gpu_util_percent", "NVML util (%)", "digits", reason="gpu_reason"),
            Column("gpu_sm_activity_percent", "SM activity (%)", "digits", reason="gpm_reason"),
            Column("gpu_sm_occupancy_percent", "SM occupancy (%)", "digits", reason="gpm_reason"),
            Column("gpu_tensor_activity_percent", "tensor (%)", "digits", reason="gpm_reason"),
            Column("gpu_dram_bandwidth_percent", "DRAM bandwidth (%)", "digits", reason="gpm_reason"),
            Column("gpu_pcie_rx_mib_per_s", "PCIe to GPU (MiB/s)", "digits", reason="gpm_reason"),
            Column("gpu_pcie_tx_mib_per_s", "PCIe from GPU (MiB/s)", "digits", reason="gpm_reason"),
            Column("gpu_power_w", "power (W)", "digits", reason="gpu_reason"),
            Column("joules_per_token", "energy (J/token)", "digits", reason="joules_reason"),
            Column("joules_basis", "energy by", null="-"),
        ),
        ("model", "network", "phase"),
        "Means over trials, over measured steps alone, of the GPU that computed, for whichever process. GPU time: CUDA events around the "
        "forward pass and what it answers, gaps in which the stream waits for its host included. NVML util: part of the time in which any "
        "kernel ran. SM activity and the next five: GPM, how much of the chip was in use.",
        collapses=True,
    ),
)
EXACTNESS_VIEWS = (
    View(
        "Exactness",
        (
            Column("mode", "mode"),
            Column("keeps", "keeps"),
            Column("promise_kept", "kept", "yes_no"),
            Column("tokens_compared", "tokens compared", "count"),
            Column("tokens_equal", "equal", "count"),
            Column("first_difference", "first difference (step)", "count", null="-"),
            Column("edge_draws", "edge draws", "count"),
            Column("logits_bitwise", "logits bitwise equal", "yes_no", reason="text_reason"),
            Column("max_abs_diff", "max abs. difference", "small", reason="text_reason"),
            Column("text_mean_kl_nats", "mean KL over text (nats)", "small", reason="text_reason"),
            Column("text_max_kl_nats", "max KL over text (nats)", "small", reason="text_reason"),
            Column("perplexity_change", "perplexity change (%)", "signed_percent", reason="text_reason"),
        ),
        ("model",),
        "Against local, apart from any timing. Tokens: the mode goes on from its own tokens, and after the first that differs it is on "
        "another path, so the count of equal ones says little then. Text: both are fed the same text. Edge draws: sampled within 1e-5 "
        "of where the draw goes the other way; what follows one in its request is not compared.",
    ),
)
HYPOTHESIS_VIEWS = (
    View(
        "Hypotheses",
        (
            Column("hypothesis", ""),
            Column("phase", "phase"),
            Column("mode", "mode"),
            Column("baseline", "against"),
            Column("claim", "claim"),
            Column("cut", "cut (%) [95% CI]", "percent", reason="reason"),
            Column("cast_part", "an fp16 cast alone (points)", "percent", reason="cast_reason", null="-"),
            Column("rest_part", "what the mode adds (points)", "percent", null="-"),
            Column("p_holm", "p for (Holm)", "small", null="-"),
            Column("p_holm_no", "p against (Holm)", "small", null="-"),
            Column("verdict", "verdict"),
        ),
        ("model", "network"),
        "Cut = 1 - ratio to the baseline. H2's verdict: one-sided t tests on paired log-ratios against the threshold, "
        "2.5% a side, Holm-corrected over all H2 rows. A/A: one mode under two names; no effect smaller than the ends of "
        "its interval can be seen in this run.",
    ),
)
TABLES: Mapping[str, Table] = {
    "summary": Table(lambda results: summary(results.rows), SUMMARY_VIEWS),
    "ladder": Table(ladder, LADDER_VIEWS),
    "facts": Table(facts, FACT_VIEWS),
    "recovery": Table(recovery, RECOVERY_VIEWS),
    "network": Table(network, NETWORK_VIEWS),
    "price": Table(price_errors, PRICE_VIEWS),
    "exactness": Table(lambda results: exactness(results.exactness), EXACTNESS_VIEWS),
    "codecs": Table(lambda results: codecs(results.codecs), CODEC_VIEWS),
    "break_even": Table(lambda results: break_even(results.codecs), BREAK_EVEN_VIEWS),
    "hypotheses": Table(lambda results: hypotheses(results.rows), HYPOTHESIS_VIEWS),
}


def write_tables(results: Results, directory: Path, names: Sequence[str] = tuple(TABLES)) -> list[Path]:
    """Build the named tables and write each under `directory` in its four formats."""
    return [path for name in names for path in write_table(TABLES[name].build(results), directory / name, TABLES[name].views)]
