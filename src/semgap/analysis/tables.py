"""The tables: summary, exactness, hypotheses, each as csv, parquet, Markdown and LaTeX.

The frames are made from `load.trial_rows` (results.csv) and hold unrounded numbers with units in the column
names. A `View` says how a reader sees some of the columns.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

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

BASELINE, LOCAL, CAST = "remote_cache", "local", "remote_cache_fp16"
HYPOTHESIS_MODES = ("sys_simulated", "sys")
H1_FEWER_BYTES, H2_LOWER_LATENCY = 0.30, 0.15
PAYLOAD = "payload_bytes_per_token"
PLACE = ["model", "network", "phase"]
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
    "gpu_util_percent",
    "gpu_power_w",
)


@dataclass(frozen=True)
class Table:
    """A table: the function that builds it from `load.trial_rows`, and how it is shown."""

    build: Callable[[pd.DataFrame], pd.DataFrame]
    views: tuple[View, ...]


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per model, network, phase and mode; latencies in ms, CPU in s, bytes per token at three levels.

    A trial's latency is the median over its measured steps; mean, geometric mean and median are over
    trials, each with its own 95% interval (see `stats`). Ratios are of paired trials, geometric means.
    """
    return _frame([_summary_row(place, mode, cell, modes) for place, modes in _places(rows) for mode, cell in modes.items()])


def exactness(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per model, network, phase and mode: what the mode promises, and what the run saw, over all its trials."""
    return _frame(
        [
            {**place, "mode": mode, "trials": len(cell), **_kept(cell), **_worst(cell)}
            for place, modes in _places(rows)
            for mode, cell in modes.items()
        ]
    )


def hypotheses(rows: pd.DataFrame) -> pd.DataFrame:
    """H1, H2 and the A/A pairs, per model, network and phase; `cut` is 1 - ratio to the baseline.

    H1: at least 30% fewer TCP payload bytes per token than `remote_cache`. H2: at least 15% lower latency
    (geometric mean over paired trials of the ratio of the trials' medians). The verdict of H2 takes
    one-sided t tests on both sides of the threshold, each at 2.5% and Holm-corrected over all H2 rows.
    `cast_part` is the cut of `remote_cache_fp16`, which only casts; `rest_part` is what the mode adds to
    it, in the same unit.
    """
    places = list(_places(rows))
    h1 = [row for place, modes in places for row in _h1_rows(place, modes)]
    h2 = _with_holm([row for place, modes in places for row in _h2_rows(place, modes)])
    aa = [row for place, modes in places for row in _aa_rows(place, modes)]
    return _frame([*h1, *h2, *aa], columns=HYPOTHESIS_COLUMNS)


HYPOTHESIS_COLUMNS = [
    *("hypothesis", *PLACE, "mode", "baseline", "claim", "cut", "cut_low", "cut_high", "threshold"),
    *("p", "p_holm", "p_holm_no", "verdict", "cast_part", "rest_part", "smallest_visible_cut"),
    *("trials", "reason", "cast_reason"),
]


def _places(rows: pd.DataFrame) -> Iterator[tuple[dict[str, str], dict[str, pd.DataFrame]]]:
    """Each (model, network, phase) with the trials of its modes, all in the order in which they first appear."""
    for keys, block in rows.groupby(PLACE, sort=False):
        modes = {str(mode): cell for mode, cell in block.groupby("mode", sort=False)}
        yield dict(zip(PLACE, map(str, keys), strict=True)), modes


def _summary_row(place: Mapping[str, str], mode: str, cell: pd.DataFrame, modes: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    prefill = cell["phase_kind"].iloc[0] == "prefill"
    latency_ms = (cell["latency_median_s"] * 1e3).tolist()
    return {
        **place,
        "mode": mode,
        "latency_metric": "TTFT" if prefill else "ITL",
        "trials": len(cell),
        **_kept(cell),
        **_spread("latency_mean_ms", mean_interval(latency_ms)),
        **_spread("latency_geomean_ms", geometric_mean_interval(latency_ms)),
        **_spread("latency_median_ms", median_interval(latency_ms)),
        **_ratio_columns(f"ratio_to_{BASELINE}", cell, modes.get(BASELINE), BASELINE),
        **_ratio_columns(f"ratio_to_{LOCAL}", cell, modes.get(LOCAL), LOCAL),
        **_spread("tokens_per_s", mean_interval(cell["tokens_per_s"].tolist())),
        "ttft_ms": _mean(cell["ttft_s"] * 1e3) if prefill else None,
        "itl_ms": None if prefill else float(np.mean(latency_ms)),
        "tpot_ms": None if prefill else _mean(cell["tpot_s"] * 1e3),
        **_spread(PAYLOAD, mean_interval(cell[PAYLOAD].tolist())),
        **{name: _mean(cell[name]) for name in MEANS},
        "worker_reason": _worker_reason(cell),
        "gpu_reason": _first(cell["gpu_reason"]),
    }


def _kept(cell: pd.DataFrame) -> dict[str, Any]:
    return {"keeps": _first(cell["keeps"]), "promise_kept": _all(cell["promise_kept"])}


def _worst(cell: pd.DataFrame) -> dict[str, Any]:
    return {
        "tokens_compared": _total(cell["tokens_compared"]),
        "tokens_equal": _total(cell["tokens_equal"]),
        "logits_bitwise": _all(cell["logits_bitwise"]),
        "max_abs_diff": _largest(cell["max_abs_diff"]),
        "max_kl_nats": _largest(cell["max_kl_nats"]),
    }


def _spread(name: str, interval: Interval) -> dict[str, Any]:
    return {
        name: interval.value,
        f"{name}_low": interval.low,
        f"{name}_high": interval.high,
        f"{name}_reason": interval.reason,
    }


def _ratio_columns(name: str, cell: pd.DataFrame, baseline: pd.DataFrame | None, baseline_name: str) -> dict[str, Any]:
    ratio = _paired(cell, baseline, baseline_name).ratio
    return {**_spread(name, ratio), f"{name}_pairs": ratio.n}


def _paired(cell: pd.DataFrame, baseline: pd.DataFrame | None, baseline_name: str) -> PairedRatio:
    if baseline is None:
        return PairedRatio(Interval(None, None, None, 0, f"{baseline_name} was not run"), ())
    return paired_ratio(cell, baseline)


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
    return named | _spread("cut", cut) | {"trials": cut.n, "reason": cut.reason}


def _latency_cut(modes: Mapping[str, pd.DataFrame], mode: str) -> PairedRatio:
    if mode not in modes:
        return PairedRatio(Interval(None, None, None, 0, f"{mode} was not run"), ())
    return _paired(modes[mode], modes.get(BASELINE), BASELINE)


def _cut_of(ratio: Interval) -> Interval:
    if ratio.value is None or ratio.low is None or ratio.high is None:
        return ratio
    return Interval(1 - ratio.value, 1 - ratio.high, 1 - ratio.low, ratio.n, ratio.reason)


def _byte_cut(modes: Mapping[str, pd.DataFrame], mode: str) -> Interval:
    """1 - payload bytes per token / those of the baseline. Bytes are counted, so trials of any session compare.

    Exact, [v, v], where all trials of both modes agree; else a t interval on the ratios of trials of the
    same number.
    """
    for needed in (mode, BASELINE):
        if needed not in modes:
            return Interval(None, None, None, 0, f"{needed} was not run")
    ours, base = modes[mode].set_index("trial")[PAYLOAD], modes[BASELINE].set_index("trial")[PAYLOAD]
    if not (base > 0).all() or ours.isna().any():
        return Interval(None, None, None, 0, f"payload bytes of {mode} or {BASELINE} were not measured")
    if ours.nunique() == 1 and base.nunique() == 1:
        cut = float(1 - ours.iloc[0] / base.iloc[0])
        return Interval(cut, cut, cut, len(ours), "one trial: counted, not repeated" if len(ours) == 1 else None)
    return mean_interval((1 - ours / base).dropna().tolist())


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


def _frame(rows: Sequence[Mapping[str, Any]], columns: list[str] | None = None) -> pd.DataFrame:
    """Rows as a frame whose columns keep their type when all their values are null."""
    frame = pd.DataFrame(list(rows), columns=columns)
    for name in frame.columns[frame.isna().all()]:
        frame[name] = frame[name].astype("str" if name.endswith("reason") else "float64")
    return frame


def _mean(values: pd.Series) -> float | None:
    return None if values.isna().any() else float(values.astype("float64").mean())


def _total(values: pd.Series) -> int | None:
    return None if values.isna().any() else int(values.sum())


def _largest(values: pd.Series) -> float | None:
    return None if values.isna().any() else float(values.astype("float64").max())


def _all(values: pd.Series) -> bool | None:
    """False where any trial says so, null where any other trial does not know."""
    known = values.dropna()
    if not known.astype(bool).all():
        return False
    return True if len(known) == len(values) else None


def _first(values: pd.Series) -> Any:
    known = values.dropna()
    return known.iloc[0] if len(known) else None


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
    "framing included. Wire: payload + headers of the TCP segments, pure ACKs included."
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
            Column(PAYLOAD, "payload (B/token)", "count"),
            Column("up_payload_bytes_per_token", "up (B/token)", "count"),
            Column("down_payload_bytes_per_token", "down (B/token)", "count"),
            Column("wire_bytes_per_token", "wire (B/token)", "count"),
            Column("round_trips_per_token", "round trips/token", "small"),
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
            Column("gpu_util_percent", "GPU util (%)", "digits", reason="gpu_reason"),
            Column("gpu_power_w", "GPU power (W)", "digits", reason="gpu_reason"),
        ),
        ("model", "network", "phase"),
        "Means over trials. In mode local the client's CPU time holds the model's own. TPOT exists only in decode phases.",
    ),
)
EXACTNESS_VIEWS = (
    View(
        "Exactness",
        (
            Column("mode", "mode"),
            Column("trials", "trials", "count"),
            Column("keeps", "keeps"),
            Column("tokens_compared", "tokens compared", "count"),
            Column("tokens_equal", "equal", "count"),
            Column("logits_bitwise", "logits bitwise equal", "yes_no"),
            Column("max_abs_diff", "max abs. difference", "small"),
            Column("max_kl_nats", "max KL (nats)", "small"),
            Column("promise_kept", "promise kept", "yes_no"),
        ),
        ("model", "network", "phase"),
        "Against the reference run of local, over all trials. Steps of a lossy mode are fed the reference's tokens.",
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
            Column("cast_part", "of it fp16 cast (points)", "percent", reason="cast_reason", null="-"),
            Column("rest_part", "rest (points)", "percent", null="-"),
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
    "summary": Table(summary, SUMMARY_VIEWS),
    "exactness": Table(exactness, EXACTNESS_VIEWS),
    "hypotheses": Table(hypotheses, HYPOTHESIS_VIEWS),
}


def write_tables(rows: pd.DataFrame, directory: Path, names: Sequence[str] = tuple(TABLES)) -> list[Path]:
    """Build the named tables from `load.trial_rows` and write each under `directory` in its four formats."""
    return [path for name in names for path in write_table(TABLES[name].build(rows), directory / name, TABLES[name].views)]
