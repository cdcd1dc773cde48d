"""The tables, each as csv, parquet, Markdown and LaTeX.

The frames are made from `load.Results` and hold unrounded numbers with units in the column names. A `View` says how a
reader sees some of the columns.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from semgap.analysis.results import Results
from semgap.analysis.tables.break_even import BREAK_EVEN_VIEWS, break_even
from semgap.analysis.tables.codecs import CODEC_VIEWS, codecs
from semgap.analysis.tables.exactness import EXACTNESS_VIEWS, exactness
from semgap.analysis.tables.facts import FACT_VIEWS, facts
from semgap.analysis.tables.hypotheses import HYPOTHESIS_VIEWS, hypotheses
from semgap.analysis.tables.ladder import LADDER_VIEWS, ladder
from semgap.analysis.tables.network import NETWORK_VIEWS, network
from semgap.analysis.tables.price import PRICE_VIEWS, price_errors
from semgap.analysis.tables.recovery import RECOVERY_VIEWS, recovery
from semgap.analysis.tables.render import View, to_latex, to_markdown
from semgap.analysis.tables.summary import SUMMARY_VIEWS, summary


@dataclass(frozen=True)
class Table:
    """A table: the function that builds it, and how it is shown."""

    build: Callable[[Results], pd.DataFrame]
    views: tuple[View, ...]


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


def make_tables(results: Results, directory: Path, names: Sequence[str] = tuple(TABLES)) -> list[Path]:
    """Build the named tables and write each under `directory` in its four formats."""
    return [path for name in names for path in write_table(TABLES[name].build(results), directory / name, TABLES[name].views)]
