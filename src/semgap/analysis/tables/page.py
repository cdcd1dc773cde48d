"""A table as a page: its readable tables, each sorted by a click on a heading. One file that needs no network."""

import json
from collections.abc import Sequence
from html import escape
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
    links = (f'<li><a href="#t{number}">{escape(block.title)}</a></li>' for number, block in shown)
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        name=escape(name),
        contents="\n".join(links) if len(shown) > 1 else "",
        tables="\n".join(_section(number, block) for number, block in shown) or "<p>No rows.</p>",
        style=LIBRARY.with_suffix(".css").read_text(encoding="utf-8"),
        library=json.dumps(LIBRARY.read_text(encoding="utf-8"), ensure_ascii=False).replace("<", "\\u003c"),  # ends no element
    )


def _section(number: int, block: Block) -> str:
    lines = [f'<section id="t{number}">', f"<h2>{escape(block.title)}</h2>"]
    if block.cells:
        lines.append(f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(block.title)}">{block.tabulated("html")}</div>')
        lines += [f"<p>({place}) {escape(reason)}</p>" for place, reason in enumerate(block.reasons, 1)]
    else:
        lines.append(f"<p>{escape(block.not_measured)}</p>")
    return "\n".join([*lines, *(f"<p>{escape(note)}</p>" for note in block.notes), "</section>"])
