"""Table price: how far prices are from the latencies measured on networks that were held out."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from semgap.analysis.columns import frame_of
from semgap.analysis.held_out import METRICS
from semgap.analysis.load import CELL
from semgap.analysis.load_price import MEASURED
from semgap.analysis.restores import METRIC
from semgap.analysis.results import Results
from semgap.analysis.tables.render import Column, View

ERRORS = ("error", "gap_error", "gap_error_s", "nominal_error", "nominal_error_s")
COLUMNS = [
    *("model", "phase", "mode", "metric", "networks", "cells", "worst_network", "worst_mode"),
    *(f"{which}_{name}" for name in ERRORS for which in ("median", "worst")),
    "reason",
]
ALL_REMOTE = "all remote modes"


def table(results: Results) -> pd.DataFrame:
    """Median and worst |error| of `held_out`: one row per model, phase, mode and metric, and one over all remote modes.

    `worst_network` and `worst_mode` are of the worst `gap_error_s` (in local, of `error`): of equal ones the first. Two networks price each
    other, with equal errors in seconds but for the last bits.
    """
    local = results.rows.loc[results.rows["placement"] == "local", "mode"].unique()
    rows = []
    restored = results.restores_held_out.reindex(columns=[*CELL, "metric", *ERRORS, "reason"])
    every = [results.held_out, restored, *_of_loads(results.load_held_out)]
    for keys, cells in (group for each in every for group in each.groupby(["model", "phase", "metric"], sort=False)):
        named = dict(zip(["model", "phase", "metric"], keys, strict=True))
        rows += [named | {"mode": mode} | _worst(own) for mode, own in cells.groupby("mode", sort=False)]
        remote = cells[~cells["mode"].isin(local)]
        if len(remote):
            rows.append(named | {"mode": ALL_REMOTE} | _worst(remote))
    return frame_of(rows, COLUMNS)


def _of_loads(held_out: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """The priced levels of loads as cells of each metric, whose errors are those of `error` alone."""
    for metric, name in MEASURED.items():
        priced = held_out[held_out[f"priced_{name}"].notna()]
        if len(priced):
            yield priced.assign(metric=metric, error=priced[f"error_{name}"]).reindex(columns=[*CELL, "metric", *ERRORS, "reason"])


def _worst(cells: pd.DataFrame) -> dict[str, Any]:
    errors = cells[list(ERRORS)].astype("float64").abs()
    by = errors["gap_error_s"] if errors["gap_error_s"].notna().any() else errors["error"]
    counts: dict[str, Any] = {"networks": cells["network"].nunique(), "cells": int(by.notna().sum()) or None}
    if not counts["cells"]:
        return counts | {"reason": cells["reason"].iloc[0]}
    worst = cells.loc[[by.round(12).idxmax()]].iloc[0]
    counts |= {"worst_network": worst["network"], "worst_mode": worst["mode"]}
    return counts | {f"{which}_{name}": errors[name].agg(how) for name in ERRORS for which, how in (("median", "median"), ("worst", "max"))}


VIEWS = (
    View(
        "Prices against measured gaps",
        (
            Column("mode", "mode"),
            Column("metric", "metric"),
            Column("cells", "cells", "count", null="0"),
            Column("median_gap_error_s", "median (ms)", "digits", 1e3, reason="reason", null="-"),
            Column("median_gap_error", "median (%)", "percent", null="-"),
            Column("worst_gap_error_s", "worst (ms)", "digits", 1e3, null="-"),
            Column("worst_gap_error", "worst (%)", "percent", null="-"),
        ),
        "Each network is held out once, and its cells are priced from the same mode's trials over the other networks. Gap: latency less "
        "compute by the clocks of worker and client. Errors: |priced - measured|, and as a part of the measured gap, which is small over "
        "a fast network.",
        by=("model", "phase"),
        collapses=True,
        only=("metric", METRICS),
    ),
    View(
        "Prices of restores over other links to the KV host",
        (
            Column("mode", "mode"),
            Column("metric", "metric"),
            Column("cells", "cells", "count", null="0", reason="reason"),
            Column("median_gap_error_s", "median (ms)", "digits", 1e3, null="-"),
            Column("median_gap_error", "median (%)", "percent", null="-"),
            Column("worst_gap_error_s", "worst (ms)", "digits", 1e3, null="-"),
            Column("worst_network", "worst on", null="-"),
        ),
        "What a step waits for missing KV blocks, each network held out once, a cell for each evict fraction: |priced - measured|, and "
        "as a part of the measured wait where that is over a millisecond. A network is priced from those whose link to the KV host is no "
        "slower.",
        by=("model", "phase"),
        only=("metric", (METRIC,)),
    ),
    View(
        "Prices of loads",
        (
            Column("mode", "mode"),
            Column("metric", "metric"),
            Column("cells", "cells", "count"),
            Column("median_error", "median (%)", "percent"),
            Column("worst_error", "worst (%)", "percent"),
            Column("worst_network", "worst on"),
        ),
        "Levels of closed loops, each network held out once: |priced / measured - 1|.",
        by=("model", "phase"),
        only=("metric", tuple(MEASURED)),
    ),
    View(
        "Prices, worst cells and other bases",
        (
            Column("mode", "mode"),
            Column("metric", "metric"),
            Column("worst_network", "worst on", null="-"),
            Column("worst_mode", "worst mode", null="-"),
            Column("median_nominal_error_s", "set link, median (ms)", "digits", 1e3, reason="reason", null="-"),
            Column("worst_nominal_error_s", "set link, worst (ms)", "digits", 1e3, null="-"),
            Column("median_error", "latency, median (%)", "percent", null="-"),
        ),
        "Worst: the largest error of the gap. Set link: the gap priced from round trip and rate of the network's row instead of the cell's "
        "own probe. Latency: |priced / measured - 1|, with the compute that differs between trials; in local it is noise.",
        by=("model", "phase"),
        collapses=True,
        only=("metric", METRICS),
    ),
)
