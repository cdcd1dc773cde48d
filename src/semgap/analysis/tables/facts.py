"""Table facts: the worth of each fact of the ladder in bytes, averaged over the orders in which facts can be added.

v(S) is the payload of the cheapest exchange for a runtime that knows the set S of facts. A fact's worth is its marginal
ln v(S) - ln v(S + f), averaged over all orders in which each fact comes after those that it needs: the Shapley value for games with
precedence constraints (Faigle and Kern 1992, International Journal of Game Theory 21:249). The worths add up to
ln v(nothing) - ln v(everything).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd

from semgap.analysis.aggregate import SETTING, alike, by_setting, first_of
from semgap.analysis.columns import frame_of
from semgap.analysis.exchanges import Exchange, MissingPart, Policies, exchanges
from semgap.analysis.marks import Rung, rungs
from semgap.analysis.results import Results
from semgap.analysis.tables.render import Column, View

COLUMNS = [
    *(*SETTING, "fact", "needs", "orders", "log_ratio", "factor", "share", "bytes_saved"),
    *("ladder_factor", "ladder_bytes_saved", "payload_bytes_nothing_known", "payload_bytes_all_known", "reason"),
]
Needs = Mapping[str, frozenset[str]]
"""The facts in the order of the ladder, each with the facts that it needs."""


@dataclass(frozen=True)
class Worth:
    """A fact's marginals, averaged over the allowed orders, and at its position in the ladder."""

    log_ratio: float
    bytes_saved: float
    ladder_log_ratio: float
    ladder_bytes_saved: float


def table(results: Results) -> pd.DataFrame:
    """One row per model, network, prefill or decode phase, and fact: the rungs whose rows name one.

    v(S) is the cheapest of the exchanges that the rungs' trials measured, their parts put together anew (`exchanges`); on the sets of the
    ladder it is their payload per token. Null with a reason if a rung with a fact was not run. Settings without one have no rows.
    """
    marked = {mode: rung for mode in rungs(results.marks) if (rung := results.marks[mode].rung)}
    policies = {m["cell"]["mode"]: m["cell"]["policy"] for m in results.trials.manifests}
    rows: list[dict[str, Any]] = []
    for setting, modes in by_setting(alike(results.rows)):
        if any(rung.fact and mode in modes for mode, rung in marked.items()):
            rows += _rows(setting, modes, marked, partial(_exchanges, results, setting, modes, marked, policies))
    return frame_of(rows, COLUMNS)


def needs_of(marked: Mapping[str, Rung]) -> Needs:
    """The facts in the order of the ladder, each with those that it needs."""
    return {rung.fact: frozenset(rung.needs) for rung in marked.values() if rung.fact}


def cheapest(known: frozenset[str], offered: Sequence[Exchange]) -> float:
    """v(known): payload bytes per token, framing included, of the cheapest exchange for a runtime that knows these facts."""
    return min(exchange.payload_bytes for exchange in offered if exchange.needs <= known)


def allowed_orders(needs: Mapping[str, frozenset[str]]) -> list[tuple[str, ...]]:
    """All orders of the facts in which each comes after those that it needs."""
    orders = itertools.permutations(needs)
    return [order for order in orders if all(needs[fact] <= set(order[:index]) for index, fact in enumerate(order))]


def worths(value: Callable[[frozenset[str]], float], needs: Mapping[str, frozenset[str]]) -> dict[str, Worth]:
    """Each fact's worth under a set function in bytes. `needs` lists the facts in the order of the ladder, which must be allowed."""
    orders = allowed_orders(needs)
    marginals = [step for order in orders for step in _marginals(order, value)]
    return {
        fact: Worth(
            log_ratio=math.fsum(math.log(before / after) for name, before, after in marginals if name == fact) / len(orders),
            bytes_saved=math.fsum(before - after for name, before, after in marginals if name == fact) / len(orders),
            ladder_log_ratio=math.log(before_here / after_here),
            ladder_bytes_saved=before_here - after_here,
        )
        for fact, before_here, after_here in _marginals(tuple(needs), value)
    }


def _marginals(order: Sequence[str], value: Callable[[frozenset[str]], float]) -> Iterator[tuple[str, float, float]]:
    """Each fact of an order with the bytes before and after it."""
    for index, fact in enumerate(order):
        yield fact, value(frozenset(order[:index])), value(frozenset(order[: index + 1]))


def _exchanges(
    results: Results, setting: Mapping[str, str], modes: Mapping[str, pd.DataFrame], marked: Mapping[str, Rung], policies: Policies
) -> list[Exchange]:
    """The exchanges of the rungs up to the last one with a fact."""
    facts = [mode for mode, rung in marked.items() if rung.fact]
    chain = {mode: rung for mode, rung in marked.items() if rung.fact or rung.after not in marked}
    for mode in facts:
        if mode not in modes:
            raise MissingPart(f"{mode} was not run")
    codecs = results.codecs
    own = codecs[(codecs["model"] == setting["model"]) & codecs["run_dtype"]] if len(codecs) else codecs
    return exchanges(chain, modes, policies, own)


def _rows(
    setting: Mapping[str, str], modes: Mapping[str, pd.DataFrame], marked: Mapping[str, Rung], offer: Callable[[], list[Exchange]]
) -> list[dict[str, Any]]:
    needs = needs_of(marked)
    orders = len(allowed_orders(needs))
    reason = first_of(pd.concat([cell["ratios_reason"] for cell in modes.values()]))
    named = {
        fact: {"reason": reason, **setting, "fact": fact, "needs": ", ".join(f for f in needs if f in needs[fact]), "orders": orders}
        for fact in needs
    }
    try:
        offered = offer()
    except MissingPart as missing:
        return [row | {"reason": str(missing)} for row in named.values()]
    ends = cheapest(frozenset(), offered), cheapest(frozenset(needs), offered)
    shared = {"payload_bytes_nothing_known": ends[0], "payload_bytes_all_known": ends[1]}
    found = worths(lambda known: cheapest(known, offered), needs)
    return [row | shared | _worth_columns(found[fact], math.log(ends[0] / ends[1])) for fact, row in named.items()]


def _worth_columns(worth: Worth, whole: float) -> dict[str, float]:
    return {
        "log_ratio": worth.log_ratio,
        "factor": math.exp(worth.log_ratio),
        "share": worth.log_ratio / whole,
        "bytes_saved": worth.bytes_saved,
        "ladder_factor": math.exp(worth.ladder_log_ratio),
        "ladder_bytes_saved": worth.ladder_bytes_saved,
    }


VIEWS = (
    View(
        "Facts",
        (
            Column("fact", "fact"),
            Column("needs", "needs"),
            Column("factor", "fewer bytes (x)", "digits", reason="reason"),
            Column("share", "share (%)", "percent", reason="reason"),
            Column("bytes_saved", "bytes saved (B)", "count", reason="reason"),
            Column("ladder_factor", "in the ladder (x)", "digits", reason="reason"),
        ),
        "Fewer bytes: geometric mean of v(S) / v(S + fact) over all orders in which each fact comes after those that it needs. v(S): "
        "payload of the cheapest exchange for a runtime that knows S, of those that the rungs measured, their parts put together anew. "
        "The factors multiply to v(nothing) / v(everything). Per token in decode phases, per prefill in a prefill.",
    ),
)
