"""The explorer's data, as JSON: a view for each model and phase, its words on what the run cannot show, and what was measured."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from semgap.analysis.explorer.charts import map_chart
from semgap.analysis.explorer.prices import (
    LINKS,
    LONGER,
    PARTS,
    PRICED,
    RATE_EDGES,
    RATES,
    RTT_EDGES,
    RTTS_MS,
    WITHIN,
    Series,
    cheapest,
    priced_series,
)
from semgap.analysis.marks import rungs
from semgap.analysis.results import Results
from semgap.analysis.tables import network
from semgap.analysis.tables.render import Column, cell_text

FIRST_SHOWN = ("20ms", "200Mbit")
MEASURED = (
    Column("network", "network"),
    Column("mode", "mode"),
    Column("rtt_ms", "round trip (ms)", "digits", reason="link_reason", null="-"),
    Column("goodput_down_mbit_per_s", "goodput down (Mbit/s)", "digits", null="-"),
    Column("latency_ms", "measured (ms) [95% CI]", "digits", reason="latency_ms_reason"),
    Column("gap_ms", "measured gap (ms)", "digits", null="-"),
    Column("gap_priced_ms", "gap priced from the other networks (ms)", "digits", reason="price_reason", null="-"),
    Column("gap_error", "error of the gap (%)", "signed_percent", null="-"),
    Column("price_error", "error of the latency (%)", "signed_percent", null="-"),
)
NO_PHASE = "This run has no prefill or decode phase, and phases of recovery have no price: there is nothing to explore."
NO_DECODE = "No decode phase was run: there is no ITL (inter-token latency), and rates are those of first tokens."
NO_PREFILL = "No prefill phase was run: TTFT (time to first token) is that of the prefills before the decode steps."
NO_LOCAL = "No local mode was run: there are no ratios to local. The map of a decode phase takes the modes' own compute in its place."
ONE_NETWORK = (
    "One network was run ({network}): the error of these prices is not known, and their intervals are over trials alone. A second network "
    "in the config gives it."
)
ONE_TRIAL = "One trial of each mode was run: nothing has an interval."
WINDOWS = (
    "A recorded call of {recorded}. Windows of {least} to {most} times as many are priced from the same calls, and too high by the "
    "software of a call, which was recorded for one window alone. Shorter windows would be priced too low by it and are not offered."
)
NO_LADDER = "No mode with a price is a rung of the ladder: there is no map."
NO_MAP = "Of the rungs of the ladder none can be compared with local: there is no map."


def explored(results: Results) -> dict[str, Any]:
    """All that the page shows. Every figure in it is a text, rounded as `semgap price` prints it; those of the axes are numbers."""
    series, measured = priced_series(results), network.table(results)
    phases = dict.fromkeys((each.cell.row["model"], each.cell.row["phase"]) for each in series)
    return {
        "rtts": [f"{rtt_ms:g}ms" for rtt_ms in RTTS_MS],
        "rates": list(RATES),
        "first": list(FIRST_SHOWN),
        "columns": {"priced": _described(PRICED), "parts": [_mode_column(), *_described(PARTS)], "measured": _described(MEASURED)},
        "cells": _map_cells(),
        "within": f"{WITHIN:.0%}",
        "words": _words(series),
        "about": _about(results),
        "views": [_view(results, measured, model, phase, _of(series, model, phase)) for model, phase in phases],
    }


def _of(series: Sequence[Series], model: str, phase: str) -> list[Series]:
    return [each for each in series if (each.cell.row["model"], each.cell.row["phase"]) == (model, phase)]


def _described(columns: Sequence[Column]) -> list[dict[str, Any]]:
    return [{"source": column.source, "label": column.label, "numeric": column.numeric, "csv": _csv_name(column)} for column in columns]


def _csv_name(column: Column) -> str:
    """The page's CSV has the figures as shown: percentages where `semgap price --csv` has fractions."""
    return f"{column.source}_percent" if column.form.endswith("percent") else column.source


def _mode_column() -> dict[str, Any]:
    return {"source": "mode", "label": "mode", "numeric": False, "csv": "mode"}


def _words(series: Sequence[Series]) -> list[str]:
    """The metrics that this run lacks, with the reason of each."""
    if not series:
        return [NO_PHASE]
    metrics = {each.cell.metric for each in series}
    return [word for metric, word in (("ITL", NO_DECODE), ("TTFT", NO_PREFILL)) if metric not in metrics]


def _view(results: Results, measured: pd.DataFrame, model: str, phase: str, series: Sequence[Series]) -> dict[str, Any]:
    local = set(results.rows.loc[results.rows["placement"] == "local", "mode"])
    maps = list(cheapest(results, series))
    modes = maps[0]["modes"]
    adds = [mark.rung.adds for mode in modes if (mark := results.marks[mode]).rung]
    own = measured[(measured["model"] == model) & (measured["phase"] == phase) & measured["of_phase"]]
    named = [each.cell.row["mode"] for each in series if each.window is None]
    return {
        "model": model,
        "phase": phase,
        "metric": series[0].cell.metric,
        "series": [each.described(each.cell.row["mode"] in local) for each in series],
        "windows": [each for each in dict.fromkeys(each.window for each in series) if each is not None],
        "ends": _ends([mode for mode in modes if mode not in local], [mode for mode in named if mode not in local]),
        "ladder": [{"mode": mode, "adds": text} for mode, text in zip(modes, adds, strict=True)],
        "maps": [{name: each[name] for name in ("window", "lowest", "nearest")} for each in maps] if modes else [],
        "map_chart": map_chart(modes) if modes else None,
        "words": list(_words_of(results, model, phase, series, bool(modes))),
        "measured": [_measured(row) for row in own.to_dict("records")],
        "points": list(_points(own)),
    }


def _ends(ladder: Sequence[str], remote: Sequence[str]) -> Sequence[str]:
    """The modes of the answer: the lowest and the highest rung; without a ladder the first two modes."""
    return [ladder[0], ladder[-1]] if len(ladder) > 1 else remote[:2]


def _measured(row: Mapping[Any, Any]) -> dict[str, Any]:
    reasons = {column.source: row[column.reason] for column in MEASURED if column.reason and not pd.isna(row[column.reason])}
    return {"texts": {column.source: cell_text(row, column) for column in MEASURED}, "reasons": reasons}


def _words_of(results: Results, model: str, phase: str, series: Sequence[Series], mapped: bool) -> Iterator[str]:
    """The things that this view cannot show, with the reason of each."""
    rows = results.rows[(results.rows["model"] == model) & (results.rows["phase"] == phase)]
    remote = rows[rows["placement"] != "local"]
    if remote["network"].nunique() == 1:
        yield ONE_NETWORK.format(network=remote["network"].iloc[0])
    if rows["trial"].nunique() == 1:
        yield ONE_TRIAL
    if len(remote) == len(rows):
        yield NO_LOCAL
    if not mapped:
        yield NO_MAP if set(rungs(results.marks)) & set(rows["mode"]) else NO_LADDER
    for reason, modes in rows.dropna(subset="ratios_reason").groupby("ratios_reason", sort=False)["mode"]:
        yield f"Bytes of {', '.join(modes.unique())}: {reason}."
    windowed = {each.cell.row["mode"]: each.cell.window for each in series if each.window is None and each.cell.window > 1}
    if windowed:
        recorded = ", of ".join(f"{mode} has {tokens} tokens" for mode, tokens in windowed.items())
        yield WINDOWS.format(recorded=recorded, least=LONGER[0], most=LONGER[-1])


def _points(measured: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """The networks that were run: round trip and rate by the probe, or why the map lacks them, and the errors of prices without them."""
    for name, rows in measured[~measured["local"].astype(bool)].groupby("network", sort=False):
        rtt_ms, mbit = rows["rtt_ms"].mean(), rows["goodput_down_mbit_per_s"].mean(skipna=False)
        known = not (pd.isna(rtt_ms) or pd.isna(mbit))
        reason = next(iter(rows["link_reason"].dropna()), None)
        point = {"network": name, "rtt": float(rtt_ms) if known else None, "rate": float(mbit) if known else None, "reason": reason}
        off, why = _off(rows)
        yield point | {"off": off, "text": f"measured, {rtt_ms:.3g} ms and {mbit:,.0f} Mbit/s; {why}"}


def _off(rows: pd.DataFrame) -> tuple[str, str]:
    """The largest error of the latencies that were priced without a network: for the map, and in words."""
    errors = rows["price_error"].dropna().abs()
    if len(errors):
        worst = f"{100 * errors.max():.2g}%"
        return f"latency off by {worst}", f"priced without it: latency off by up to {worst}"
    return "error not known", f"error of prices not known: {next(iter(rows['price_reason'].dropna()), 'no price')}"


def _map_cells() -> list[dict[str, Any]]:
    """The rectangle of each of `LINKS` on the map."""
    places = [(at, to) for at in range(len(RTTS_MS)) for to in range(len(RATES))]
    ends = [(*RTT_EDGES[at : at + 2], *RATE_EDGES[to : to + 2]) for at, to in places]
    names = ("left", "right", "bottom", "top")
    return [{"rtt": rtt, "rate": rate, **dict(zip(names, end, strict=True))} for (rtt, rate), end in zip(LINKS, ends, strict=True)]


def _about(results: Results) -> dict[str, str]:
    """The run behind the page."""
    manifests = results.trials.manifests
    made = [manifest["provenance"] for manifest in manifests]
    found: dict[str, list[str]] = {
        "trials": [f"{len(manifests):,}"],
        "measured": sorted(each["utc"][:10] for each in made),
        "CPU": [f"{each['machine']['cpus']} x {each['machine']['cpu']}" for each in made if each["machine"]["cpu"]],
        "device": [manifest["device"] for manifest in manifests],
        "commit": [each["git"]["commit"][:9] for each in made if each["git"]["commit"]],
    }
    return {name: ", ".join(dict.fromkeys(texts)) for name, texts in found.items() if texts}
