"""Writes explorer.html: one file that needs no network. Python priced all that it shows; the page only looks it up."""

import json
from pathlib import Path
from string import Template
from typing import Any

import vl_convert

from semgap.analysis.explorer.charts import BREAKDOWN, NONE, ON_DARK, charts
from semgap.analysis.explorer.views import explored
from semgap.analysis.results import Results

PAGE = ("page.html", "page.css", "page.js")
"""The page's files beside this module. `page.html` has a place for each of the others."""
ROW = 20
"""Pixels of a mode in a chart."""
LIBRARY = "window.vegaEmbed = vegaEmbed;"


def make_explorer(results: Results, output: Path) -> None:
    """Writes the page of `results` to `output`."""
    data = explored(results) | {
        "charts": charts(),
        "breakdown": BREAKDOWN,
        "none": NONE,
        "on_dark": ON_DARK,
        "row": ROW,
        "directory": str(output.parent),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page(data), encoding="utf-8")


def page(data: dict[str, Any]) -> str:
    """The page with its data, style, script and library inside. ValueError for a number that is not finite."""
    html, style, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in PAGE)
    text = json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")  # ends no element
    return Template(html).substitute(data=text, style=style, script=script, library=vl_convert.javascript_bundle(LIBRARY))
