"""Readable tables: Markdown and LaTeX, rounded, with units, and with a reason for each null."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd


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
    parts = [_markdown_block(block) for block in _blocks(frame, views)]
    return "\n".join(parts) if parts else "No rows.\n"


def to_latex(frame: pd.DataFrame, views: Sequence[View]) -> str:
    """`frame` as LaTeX tables for `booktabs`, no wider than the line, with the text and notes of the Markdown."""
    parts = [_latex_block(block) for block in _blocks(frame, views)]
    return "% needs \\usepackage{booktabs,graphicx}\n" + ("\n".join(parts) if parts else "% no rows\n")


@dataclass(frozen=True)
class _Block:
    """One readable table of rounded texts. No cells: nothing was measured."""

    title: str
    view: View
    cells: tuple[tuple[str, ...], ...]
    reasons: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(column.label for column in self.view.columns)


def _blocks(frame: pd.DataFrame, views: Sequence[View]) -> Iterator[_Block]:
    for view in views if len(frame) else ():
        shown = frame[frame[view.only[0]].isin(view.only[1])] if view.only else frame
        blocks: list[tuple[Any, pd.DataFrame]] = list(shown.groupby(list(view.by), sort=False, dropna=False)) if view.by else [((), shown)]
        for index, (keys, rows) in enumerate(blocks):
            shared = ", ".join(f"{name.replace('_', ' ')} {key}" for name, key in zip(view.by, keys, strict=True) if not pd.isna(key))
            note = (view.note,) if view.note and index == len(blocks) - 1 else ()
            yield _block(rows, view, f"{view.title}: {shared}" if shared else view.title, note)


def _block(rows: pd.DataFrame, view: View, title: str, note: tuple[str, ...]) -> _Block:
    reasons: dict[str, int] = {}
    records = [{str(name): value for name, value in row.items()} for row in rows.to_dict(orient="records")]
    cells = tuple(tuple(_cell(row, column, reasons) for column in view.columns) for row in records)
    if view.collapses and rows[[column.source for column in view.columns if column.numeric]].isna().all(axis=None):
        cells = ()
    own = tuple(str(text) for name in view.notes for text in rows[name].dropna().unique())
    return _Block(title, view, cells, tuple(reasons), (*own, *note))


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


def _markdown_block(block: _Block) -> str:
    lines = [f"### {block.title}\n"] if block.title else []
    if not block.cells:
        return "\n".join([*lines, f"Not measured: {'; '.join(block.reasons)}.", ""])
    texts = [tuple(text.replace("|", r"\|") for text in line) for line in (block.labels, *block.cells)]
    widths = [max(3, *map(len, column)) for column in zip(*texts, strict=True)]
    shapes = list(zip(widths, (column.numeric for column in block.view.columns), strict=True))
    rule = ["-" * (width - 1) + (":" if numeric else "-") for width, numeric in shapes]
    for line in (texts[0], rule, *texts[1:]):
        padded = (text.rjust(width) if numeric else text.ljust(width) for text, (width, numeric) in zip(line, shapes, strict=True))
        lines.append("| " + " | ".join(padded) + " |")
    lines += ["", *(f"{note}\n" for note in block.notes)]
    # Two spaces at the end break the line in Markdown.
    lines += [f"({number}) {reason}  " for number, reason in enumerate(block.reasons, 1)]
    return "\n".join([*lines, ""] if block.reasons else lines)


NAMED = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "|": "bar", "<": "less", ">": "greater"}
LATEX = str.maketrans({sign: rf"\{sign}" for sign in "&%$#_{}"} | {sign: rf"\text{name}{{}}" for sign, name in NAMED.items()})
NO_WIDER_THAN_LINE = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"


def _latex_block(block: _Block) -> str:
    if not block.cells:
        return f"% {block.title}: not measured: {'; '.join(block.reasons)}\n"
    lines = [r"\begin{table}", r"\centering", r"\small"]
    lines += [rf"\caption{{{block.title.translate(LATEX)}}}"] if block.title else []
    aligned = "".join("r" if column.numeric else "l" for column in block.view.columns)
    lines += [NO_WIDER_THAN_LINE, rf"\begin{{tabular}}{{{aligned}}}", r"\toprule"]
    lines += [_latex_line(block.labels), r"\midrule", *map(_latex_line, block.cells), r"\bottomrule", r"\end{tabular}}"]
    notes = [*block.notes]
    notes += [f"({number}) {reason}" for number, reason in enumerate(block.reasons, 1)]
    lines += ["", *(rf"\par\footnotesize {note.translate(LATEX)}" for note in notes)] if notes else []
    return "\n".join([*lines, r"\end{table}", ""])


def _latex_line(texts: Sequence[str]) -> str:
    return " & ".join(text.translate(LATEX) for text in texts) + r" \\"
