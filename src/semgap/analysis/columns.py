"""Columns of tables: intervals as four columns, and rows as a frame."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from semgap.analysis.stats import Interval, mean_interval

ENDINGS = ("", "_low", "_high", "_reason")
"""The endings of the columns that `interval_columns` makes."""


def with_endings(*names: str) -> list[str]:
    """The columns that `interval_columns` makes for each name."""
    return [f"{name}{ending}" for name in names for ending in ENDINGS]


def interval_columns(name: str, interval: Interval) -> dict[str, Any]:
    """An interval as four columns: `name`, and with the endings _low, _high and _reason."""
    values = (interval.value, interval.low, interval.high, interval.reason)
    return {f"{name}{ending}": value for ending, value in zip(ENDINGS, values, strict=True)}


def mean_columns(name: str, values: pd.Series) -> dict[str, Any]:
    """`interval_columns` of a mean over trials."""
    return interval_columns(name, mean_interval(values.tolist()))


def ratio_columns(name: str, ratio: Interval) -> dict[str, Any]:
    """`interval_columns`, and the number of pairs of trials."""
    return interval_columns(name, ratio) | {f"{name}_pairs": ratio.n}


def frame_of(rows: Sequence[Mapping[Any, Any]], columns: list[str]) -> pd.DataFrame:
    """Rows as a frame. A column of nulls is text if its name ends in `reason`, else float."""
    frame = pd.DataFrame(list(rows), columns=columns)
    for name in frame.columns[frame.isna().all()]:
        frame[name] = frame[name].astype("str" if name.endswith("reason") else "float64")
    return frame
