"""Readable tables: Markdown and LaTeX, rounded, with units, and with a reason for each null."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from tabulate import tabulate


@dataclass(frozen=True)
class Column:
    """The readable form of one column: its heading, its form (a key of `FORMS`), and the factor to the heading's unit.

    Columns `{source}_low` and `{source}_high`, if there are any, follow in brackets. The column `reason` says why a value or its interval
    is null. `null` is the text for null; "-" if the column does not apply to such a row.
    """

    source: str
    label: str
    form: str = "text"
    scale: float = 1.0
    reason: str = ""
    null: str = "null"

    @property
    def numeric(self) -> bool:
        return self.form in FORMS


@dataclass(frozen=True)
class View:
    """Some columns of a table under a title, in one block for each combination of the columns `by`.

    A page holds some eight columns: a table with more has several views, which share the columns that name its rows.
    `note` stands below the last block. `notes`: columns of texts that stand below their own block. `only`: a column and its values in the
    rows to show. With `collapses`, a block without any number becomes one line with its reasons.
    """

    title: str
    columns: tuple[Column, ...]
    note: str = ""
    by: tuple[str, ...] = ("model", "network", "phase")
    collapses: bool = False
    notes: tuple[str, ...] = ()
    only: tuple[str, tuple[Any, ...]] | None = None


def _decimals(value: float) -> int:
    """Decimals for about three digits: more would show noise."""
    size = abs(value)
    return 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3


def _digits(value: float, like: float) -> str:
    return "0" if value == 0 else f"{value:,.{_decimals(like)}f}"


def _signed_percent(value: float) -> str:
    percent = 100 * value
    return "0" if value == 0 else f"{percent:+,.0f}" if abs(percent) >= 99.5 else f"{percent:+.2g}"


FORMS: Mapping[str, Callable[[float, float], str]] = {
    "digits": _digits,
    "count": lambda value, like: f"{value:,.0f}",
    "ratio": lambda value, like: f"{value:,.{1 if abs(like) >= 10 else 3}f}",
    "percent": lambda value, like: f"{100 * value:.1f}",
    "signed_percent": lambda value, like: _signed_percent(value),
    "small": lambda value, like: "0" if value == 0 else f"{value:.2g}",
}


def to_markdown(frame: pd.DataFrame, views: Sequence[View]) -> str:
    """`frame` as Markdown tables. Numbered notes give the reasons for nulls."""
    return "\n".join(map(_markdown_block, blocks(frame, views))) or "No rows.\n"


def to_latex(frame: pd.DataFrame, views: Sequence[View]) -> str:
    """`frame` as LaTeX tables for `booktabs`, no wider than the line, with the text and notes of the Markdown."""
    return "% needs \\usepackage{booktabs,graphicx}\n" + ("\n".join(map(_latex_block, blocks(frame, views))) or "% no rows\n")


@dataclass(frozen=True)
class Block:
    """One readable table of rounded texts: of a view, its rows with one value of each column `by`. No cells: nothing was measured."""

    view: str
    of: Mapping[str, str]
    columns: tuple[Column, ...]
    cells: tuple[tuple[str, ...], ...]
    reasons: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def title(self) -> str:
        shared = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.of.items())
        return f"{self.view}: {shared}" if shared else self.view

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(column.label for column in self.columns)

    @property
    def not_measured(self) -> str:
        return f"Not measured: {'; '.join(self.reasons)}."

    def tabulated(self, form: str, escaped: Callable[[str], str] = str) -> str:
        """Its cells in a format of tabulate, numbers to the right."""
        labels, *cells = (list(map(escaped, line)) for line in (self.labels, *self.cells))
        sides = ["right" if column.numeric else "left" for column in self.columns]
        return str(tabulate(cells, labels, form, colalign=sides, disable_numparse=True))


def blocks(frame: pd.DataFrame, views: Sequence[View]) -> Iterator[Block]:
    """The readable tables of `frame`, view by view."""
    for view in views if len(frame) else ():
        shown = frame[frame[view.only[0]].isin(view.only[1])] if view.only else frame
        groups: list[tuple[Any, pd.DataFrame]] = list(shown.groupby(list(view.by), sort=False, dropna=False)) if view.by else [((), shown)]
        for index, (keys, rows) in enumerate(groups):
            of = {name: str(key) for name, key in zip(view.by, keys, strict=True) if not pd.isna(key)}
            note = (view.note,) if view.note and index == len(groups) - 1 else ()
            yield _block(rows, view, of, note)


def _block(rows: pd.DataFrame, view: View, of: Mapping[str, str], note: tuple[str, ...]) -> Block:
    reasons: dict[str, int] = {}
    records = [{str(name): value for name, value in row.items()} for row in rows.to_dict(orient="records")]
    cells = tuple(tuple(_cell(row, column, reasons) for column in view.columns) for row in records)
    if view.collapses and rows[[column.source for column in view.columns if column.numeric]].isna().all(axis=None):
        cells = ()
    own = tuple(str(text) for name in view.notes for text in rows[name].dropna().unique())
    return Block(view.title, of, view.columns, cells, tuple(reasons), (*own, *note))


def _cell(row: Mapping[str, Any], column: Column, reasons: dict[str, int]) -> str:
    text = cell_text(row, column)
    # A value with a null interval also needs its reason.
    reason = row.get(column.reason) if column.reason else None
    if reason is None or pd.isna(reason):
        return text
    return f"{text} ({reasons.setdefault(str(reason), len(reasons) + 1)})"


def cell_text(row: Mapping[str, Any], column: Column) -> str:
    """A value as tables show it, with its interval, but without the number of its reason."""
    value = row[column.source]
    return column.null if pd.isna(value) else _shown(value, column) + _bracket(row, column, value)


def _shown(value: Any, column: Column, like: float | None = None) -> str:
    if column.form == "yes_no":
        return "yes" if value else "no"
    if column.form == "text":
        return str(value)
    scaled = float(value) * column.scale
    return FORMS[column.form](scaled, scaled if like is None else like)


def _bracket(row: Mapping[str, Any], column: Column, value: Any) -> str:
    """The interval with the decimals of the value; empty if it is null or has no width (a counted value)."""
    low, high = row.get(f"{column.source}_low"), row.get(f"{column.source}_high")
    if low is None or high is None or pd.isna(low) or pd.isna(high) or low == high:
        return ""
    like = float(value) * column.scale
    return f" [{_shown(low, column, like)} to {_shown(high, column, like)}]"


def _markdown_block(block: Block) -> str:
    lines = [f"### {block.title}\n"] if block.title else []
    if not block.cells:
        return "\n".join([*lines, block.not_measured, ""])
    lines += [block.tabulated("pipe", lambda text: text.replace("|", r"\|")), "", *(f"{note}\n" for note in block.notes)]
    # Two spaces at the end break the line in Markdown.
    lines += [f"({number}) {reason}  " for number, reason in enumerate(block.reasons, 1)]
    return "\n".join([*lines, ""] if block.reasons else lines)


NAMED = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "|": "bar", "<": "less", ">": "greater"}
LATEX = str.maketrans({sign: rf"\{sign}" for sign in "&%$#_{}"} | {sign: rf"\text{name}{{}}" for sign, name in NAMED.items()})
NO_WIDER_THAN_LINE = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"


def _latex_block(block: Block) -> str:
    if not block.cells:
        return f"% {block.title}: {block.not_measured}\n"
    cells = pd.DataFrame([list(map(_escaped, line)) for line in block.cells], columns=list(map(_escaped, block.labels)))
    aligned = "".join("r" if column.numeric else "l" for column in block.columns)
    tabular = cells.to_latex(index=False, escape=False, column_format=aligned).rstrip()
    lines = [r"\begin{table}", r"\centering", r"\small"]
    lines += [rf"\caption{{{_escaped(block.title)}}}"] if block.title else []
    lines += [NO_WIDER_THAN_LINE, f"{tabular}}}"]
    notes = [*block.notes, *(f"({number}) {reason}" for number, reason in enumerate(block.reasons, 1))]
    lines += ["", *(rf"\par\footnotesize {_escaped(note)}" for note in notes)] if notes else []
    return "\n".join([*lines, r"\end{table}", ""])


def _escaped(text: str) -> str:
    """The text for LaTeX, with the sign of a negative number as a minus."""
    return re.sub(r"(?<![^\s\[(])-(?=\d)", "$-$", text.translate(LATEX))
