"""The tables, each as csv, parquet, html, Markdown and LaTeX."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import pandas as pd

from semgap.analysis.results import Results
from semgap.analysis.tables import (
    break_even,
    codecs,
    exactness,
    facts,
    gap,
    handover,
    hypotheses,
    ladder,
    load,
    load_facts,
    network,
    prefix,
    price,
    recovery,
    recovery_pairs,
    summary,
)
from semgap.analysis.tables.answer import answer
from semgap.analysis.tables.page import to_html
from semgap.analysis.tables.render import View, to_latex, to_markdown


class TableModule(Protocol):
    """A module of this package. `table`: unrounded numbers with units in the column names. `VIEWS`: the readable forms."""

    __name__: str

    @property
    def VIEWS(self) -> tuple[View, ...]: ...

    def table(self, results: Results) -> pd.DataFrame: ...


TABLES: tuple[TableModule, ...] = (
    *(gap, summary, ladder, facts, recovery, recovery_pairs, prefix, handover),
    *(network, price, load, load_facts, exactness, codecs, break_even, hypotheses),
)


def make_tables(results: Results, directory: Path, tables: Sequence[TableModule] = TABLES) -> list[Path]:
    """Writes each table under `directory` in five formats, named after its module, and answer.txt. Returns the tables' paths."""
    paths = [path for each in tables for path in write_table(each.table(results), directory / name_of(each), each.VIEWS)]
    (directory / "answer.txt").write_text(answer(results), encoding="utf-8")
    return paths


def name_of(table: TableModule) -> str:
    return table.__name__.rpartition(".")[2]


def write_table(frame: pd.DataFrame, stem: Path, views: Sequence[View]) -> list[Path]:
    """Writes `frame` unrounded as {stem}.csv and {stem}.parquet, its views as .html, .md and .tex. Returns the five paths.

    Equal frames give equal bytes.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    csv, parquet, html, md, tex = (stem.with_name(f"{stem.name}.{suffix}") for suffix in ("csv", "parquet", "html", "md", "tex"))
    frame.to_csv(csv, index=False, lineterminator="\n")
    frame.to_parquet(parquet, index=False, write_page_checksum=True)
    html.write_text(to_html(frame, views, stem.name), encoding="utf-8")
    md.write_text(to_markdown(frame, views), encoding="utf-8")
    tex.write_text(to_latex(frame, views), encoding="utf-8")
    return [csv, parquet, html, md, tex]
