"""A table as a page: its readable tables, each sorted by a click on a heading. One file that needs no network."""

import json
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template

import itables.options
import pandas as pd

from semgap.analysis.tables.render import Block, View, blocks

PAGE = Path(__file__).with_name("page.html")
LIBRARY = Path(itables.options.dt_bundle)
"""DataTables, a module; its style lies beside it."""


def to_html(frame: pd.DataFrame, views: Sequence[View], name: str) -> str:
    """The page of the table `name`, with the text and notes of the Markdown. Without JavaScript it does not sort, and shows the same."""
    shown = list(enumerate(blocks(frame, views), 1))
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        name=escape(name),
        contents="\n".join(_contents(shown)),
        tables="\n".join(_section(number, block) for number, block in shown) or "<p>No rows.</p>",
        style=LIBRARY.with_suffix(".css").read_text(encoding="utf-8"),
        library=json.dumps(LIBRARY.read_text(encoding="utf-8"), ensure_ascii=False).replace("<", "\\u003c"),  # ends no element
    )


def _contents(shown: Sequence[tuple[int, Block]]) -> Iterator[str]:
    """A line for each view, with a link to each of its tables by what tells them apart."""
    values: dict[str, set[str | None]] = {name: {block.of.get(name) for _, block in shown} for _, block in shown for name in block.of}
    for view, tables in groupby(shown, lambda each: each[1].view):
        texts = {number: ", ".join(value for name, value in block.of.items() if len(values[name]) > 1) for number, block in tables}
        links = (f'<a href="#t{number}">{escape(text or view)}</a>' for number, text in texts.items())
        yield f"<li>{escape(view) + ': ' if any(texts.values()) else ''}{'; '.join(links)}</li>"


def _section(number: int, block: Block) -> str:
    lines = [f'<section id="t{number}">', f"<h2>{escape(block.title)}</h2>"]
    if block.cells:
        lines.append(f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(block.title)}">{block.tabulated("html")}</div>')
        lines += [f"<p>({place}) {escape(reason)}</p>" for place, reason in enumerate(block.reasons, 1)]
    else:
        lines.append(f"<p>{escape(block.not_measured)}</p>")
    return "\n".join([*lines, *(f"<p>{escape(note)}</p>" for note in block.notes), "</section>"])
