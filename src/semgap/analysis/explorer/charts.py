"""The explorer's charts, as Vega-Lite. The page fills the named data `rows`, and `measured` and `here` of the map."""

from collections.abc import Sequence
from typing import Any

import altair as alt
from matplotlib import colormaps
from matplotlib.colors import to_hex

from semgap.analysis.explorer.prices import RATE_EDGES, RTT_EDGES
from semgap.analysis.figures.style import COLOURS, GREY

NONE = "none of them"
NO_RUNG = "#b8b8b8"
ON_DARK = {COLOURS[0]: COLOURS[5], COLOURS[1]: COLOURS[4]}
"""The colours of priced and of measured marks on a dark ground, by those on a light one."""
KINDS = alt.Scale(domain=["priced", "measured"], range=[COLOURS[0], COLOURS[1]])
SHAPES = alt.Scale(domain=["priced", "measured"], range=["circle", "diamond"])
RATE_LABEL = "datum.value >= 1000 ? datum.value / 1000 + ' Gbit' : datum.value + ' Mbit'"
BREAKDOWN = {
    "worker_compute_ms": "worker's compute",
    "client_compute_ms": "client's compute",
    "worker_codec_ms": "worker's codec",
    "client_codec_ms": "client's codec",
    "link_ms": "link and the rest",
}
"""The columns of `prices.PARTS` that add up to the latency, with the words of the chart."""


def charts() -> dict[str, dict[str, Any]]:
    """The charts that are the same for every view."""
    return {
        "itl": _intervals("ITL of each mode", "milliseconds"),
        "ttft": _intervals("TTFT of each mode", "milliseconds"),
        "rate": _intervals("Tokens per second of each mode", "tokens/s"),
        "bytes": _intervals("Bytes per token of each mode", "bytes per token, log axis", alt.Scale(type="log", nice=False, padding=14)),
        "breakdown": _breakdown(),
    }


def shades(rungs: int) -> list[str]:
    """A colour for each rung, the brighter the higher: a scale that colour-blind readers and a grey print keep in order."""
    return [to_hex(colormaps["viridis"](0.95 * rung / max(1, rungs - 1))) for rung in range(rungs)]


def map_chart(modes: Sequence[str]) -> dict[str, Any]:
    """The map over round trip and rate: the colour is the cheapest rung that comes close to local, diamonds are measured networks."""
    rung: dict[str, Any] = {"scale": alt.Scale(domain=[*modes, NONE], range=[*shades(len(modes)), NO_RUNG])}
    legend = alt.Legend(orient="top", title=None, symbolType="square")
    x = alt.Scale(type="log", nice=False, domain=[RTT_EDGES[0], RTT_EDGES[-1]], clamp=True)
    y = alt.Scale(type="log", nice=False, domain=[RATE_EDGES[0], RATE_EDGES[-1]], clamp=True)
    across = alt.X("left:Q", scale=x, title="round trip (ms)", axis=alt.Axis(values=[0.05, 0.2, 1, 5, 20, 100], grid=False, format="~g"))
    upwards = alt.Axis(values=[10, 100, 1000, 10_000, 100_000], grid=False, labelExpr=RATE_LABEL)
    cells = alt.Chart(alt.NamedData("rows")).mark_rect(strokeWidth=0.7, aria=False)
    cells = cells.encode(across, alt.Y("bottom:Q", scale=y, title="rate, each way", axis=upwards), x2="right:Q", y2="top:Q")
    cells = cells.encode(color=alt.Color("rung:N", legend=legend, **rung), stroke=alt.Stroke("rung:N", legend=legend, **rung))
    place: dict[str, Any] = {"x": alt.X("rtt:Q", scale=x), "y": alt.Y("rate:Q", scale=y)}
    run = alt.Chart(alt.NamedData("measured")).encode(**place, tooltip=["network:N", "text:N"])
    mark: dict[str, Any] = {"size": 150, "strokeWidth": 2, "filled": True, "fill": "white", "stroke": "black", "opacity": 1}
    here = alt.Chart(alt.NamedData("here")).mark_point(shape="cross", **mark).encode(**place)
    layers = (
        cells.encode(tooltip=["rtt:N", "rate:N", "cheapest:N"])
        + run.mark_point(shape="diamond", **mark)
        + _texts(run, "network", -15, "white")
        + _texts(run, "network", -15)
        + _texts(run, "off", 17, "white")
        + _texts(run, "off", 17)
        + here
    )
    return _spec(layers.properties(height=380), "The cheapest knowledge over round trip and rate")


def _texts(networks: alt.Chart, field: str, dy: int, halo: str | None = None) -> alt.Chart:
    """A text of each network, inside the map; with a halo first, so that it can be read on any colour."""
    inside: Any = {"expr": "datum.rtt > 8 ? 'right' : 'left'"}
    look: dict[str, Any] = {"stroke": halo, "strokeWidth": 4, "strokeJoin": "round"} if halo else {}
    weight: Any = "bold" if field == "network" else "normal"
    text = networks.mark_text(dy=dy, align=inside, fontWeight=weight, color="black", aria=False, **look)
    return text.encode(text=f"{field}:N")


def _mode() -> alt.Y:
    return alt.Y("mode:N", sort=None, title=None, axis=alt.Axis(labelLimit=170, ticks=False, domain=False))


def _intervals(description: str, unit: str, scale: alt.Scale | None = None) -> dict[str, Any]:
    """A mark for each mode with its interval: a full circle if priced, an open diamond if measured. `scale`: from 0 if not given."""
    x: dict[str, Any] = {"scale": scale or alt.Scale(zero=True, padding=14), "title": unit}
    axis = alt.Axis(format="~s" if scale else ",~r", tickCount=5, labelOverlap=True)
    base = alt.Chart(alt.NamedData("rows")).encode(y=_mode(), color=alt.Color("kind:N", legend=None, scale=KINDS))
    base = base.encode(tooltip=["mode:N", "kind:N", "text:N"])
    rule = base.mark_rule(strokeWidth=2.5, opacity=0.55).encode(alt.X("low:Q", axis=axis, **x), x2="high:Q")
    point = base.mark_point(size=75, strokeWidth=2, opacity=1).encode(
        alt.X("value:Q", axis=axis, **x),
        shape=alt.Shape("kind:N", legend=None, scale=SHAPES),
        fill=alt.condition("datum.kind === 'priced'", alt.value(COLOURS[0]), alt.value("transparent")),
    )
    return _spec(rule + point, description)


def _breakdown() -> dict[str, Any]:
    """A bar for each mode: the parts of its latency as shares."""
    parts = alt.Scale(domain=list(BREAKDOWN.values()), range=[GREY, *COLOURS[1:5]])
    chart = alt.Chart(alt.NamedData("rows")).mark_bar(height={"band": 0.7})
    chart = chart.encode(
        alt.X("ms:Q", stack="normalize", title="share of a token's time", axis=alt.Axis(format="%", tickCount=5)),
        _mode(),
        color=alt.Color("part:N", scale=parts, legend=alt.Legend(orient="top", title=None)),
        order="order:Q",
        tooltip=["mode:N", "part:N", "text:N"],
    )
    return _spec(chart, "Where a token's time goes in each mode")


def _spec(chart: Any, description: str) -> dict[str, Any]:
    """Without its schema's address: the page names no other host. The page sets the height of a chart that has none."""
    sized = chart.properties(width="container", description=description, autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))
    spec: dict[str, Any] = sized.to_dict()
    return {name: value for name, value in spec.items() if name != "$schema"}
