"""Table price: how far prices are from the latencies measured on networks that were held out."""

from typing import Any

import pandas as pd

from semgap.analysis.columns import frame_of
from semgap.analysis.held_out import held_out
from semgap.analysis.results import Results
from semgap.analysis.tables.render import Column, View

COLUMNS = [
    *("model", "phase", "mode", "metric", "networks", "cells", "median_error", "worst_error", "worst_network", "worst_mode"),
    *("median_link_error", "worst_link_error", "reason"),
]
ALL_REMOTE = "all but local"


def table(results: Results) -> pd.DataFrame:
    """Median and worst |error| of `held_out`: one row per model, phase, mode and metric, and one over all modes but local."""
    local = results.rows.loc[results.rows["placement"] == "local", "mode"].unique()
    rows = []
    for keys, cells in held_out(results.calls).groupby(["model", "phase", "metric"], sort=False):
        named = dict(zip(["model", "phase", "metric"], keys, strict=True))
        rows += [named | {"mode": mode} | _worst(own) for mode, own in cells.groupby("mode", sort=False)]
        remote = cells[~cells["mode"].isin(local)]
        if len(remote):
            rows.append(named | {"mode": ALL_REMOTE} | _worst(remote))
    return frame_of(rows, COLUMNS)


def _worst(cells: pd.DataFrame) -> dict[str, Any]:
    errors = cells["error"].abs().dropna()
    counts: dict[str, Any] = {"networks": cells["network"].nunique(), "cells": len(errors)}
    if errors.empty:
        return counts | {"reason": cells["reason"].iloc[0]}
    worst, links = cells.loc[[errors.idxmax()]].iloc[0], cells["link_error"].abs().dropna()
    counts |= {"median_error": errors.median(), "worst_error": errors.max(), "worst_network": worst["network"], "worst_mode": worst["mode"]}
    return counts | {"median_link_error": links.median(), "worst_link_error": links.max()}


VIEWS = (
    View(
        "Prices against measured latencies",
        (
            Column("mode", "mode"),
            Column("metric", "metric"),
            Column("networks", "networks", "count"),
            Column("cells", "cells", "count"),
            Column("median_error", "median error (%)", "percent", reason="reason"),
            Column("worst_error", "worst error (%)", "percent"),
            Column("worst_network", "worst on", null="-"),
            Column("worst_mode", "worst mode", null="-"),
            Column("median_link_error", "not compute: median (%)", "percent", null="-"),
            Column("worst_link_error", "worst (%)", "percent", null="-"),
        ),
        "Each network is held out once, and its cells are priced from the same mode's trials over the other networks. Error: |priced / "
        "measured - 1|; in local, which has no link, it is noise between trials. Not compute: the error that remains if the cell's own "
        "compute, measured by the worker, replaces that of the other networks.",
        by=("model", "phase"),
    ),
)
