"""What each fact of the ladder is worth in bytes, wherever it comes: averaged over the orders in which facts can be added.

A set function v(S) is the payload of the cheapest exchange that a runtime which knows the set S of facts can make. Adding fact f
to S takes it from v(S) to v(S + f); a fact's worth is its marginal ln v(S) - ln v(S + f), averaged over all orders of the facts in
which each comes after those that it needs. It is the Shapley value for games with precedence constraints (Faigle and Kern 1992,
International Journal of Game Theory 21:249), so the facts' worths add up to ln v(nothing) - ln v(everything).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd

from semgap.analysis.cells import PAYLOAD, PLACE, first_of, frame_of, mean_of, places
from semgap.analysis.results import Results
from semgap.analysis.tables.render import Column, View

NEEDS: Mapping[str, frozenset[str]] = {
    "position": frozenset(),
    "layout": frozenset(),
    "head": frozenset({"position"}),
    "consumer": frozenset({"position"}),
    "loop": frozenset({"position", "consumer"}),
}
"""The facts in the order of the ladder, and what each needs first: there is no reply for it otherwise."""


MODES = ("remote_cache", *(f"know_{fact}" for fact in NEEDS))


MEASURED = "measured: payloads of trials, put together anew"


DERIVED = "derived: codecs on dumped tensors, framing of decode trials"


COLUMNS = [
    *(*PLACE, "basis", "fact", "needs", "orders", "log_ratio", "factor", "share", "bytes_saved"),
    *("ladder_factor", "ladder_bytes_saved", "payload_bytes_nothing_known", "payload_bytes_all_known", "reason"),
]


@dataclass(frozen=True)
class Sizes:
    """Bytes of the parts of one exchange. Replies hold the framing of both frames; `window` is a whole exchange per token.

    `window` is None where there is no loop: a prefill is one exchange.
    """

    tokens: float
    tokens_compact: float
    logits_all: float
    logits_all_planes: float
    logits_last: float
    logits_last_planes: float
    hidden_last: float
    hidden_last_planes: float
    token: float
    window: float | None


@dataclass(frozen=True)
class Worth:
    """A fact's marginals, averaged over the allowed orders, and at its place in the ladder."""

    log_ratio: float
    bytes_saved: float
    ladder_log_ratio: float
    ladder_bytes_saved: float


class MissingPart(Exception):
    """A part of the exchange was not measured; the message says which."""


def facts(results: Results) -> pd.DataFrame:
    """One row per model, network, phase and fact: decode phases from measured trials, the prefill from dumped tensors.

    Decode: v(S) recombines what the rungs' trials measured, so for the sets of the ladder itself it is their payload per token.
    Prefill: only remote_cache runs there by default, so v(S) is derived, per prefill, from the measured payloads of the codecs on the
    dumped prompt's tensors (raw, planes_zstd, compact) and the framing and token reply of the decode trials. Null with the reason
    where a rung was not run; places with no rung above the lowest are left out.
    """
    rows: list[dict[str, Any]] = []
    derived = set()
    for place, modes in places(results.rows[results.rows["phase_kind"] == "decode"]):
        if not set(MODES[1:]) & set(modes):
            continue
        rows += _rows({**place, "basis": MEASURED}, modes, partial(decode_sizes, modes))
        prompt, where = _prompt_tokens(results.codecs, place["model"]), (place["model"], place["network"])
        if prompt and where not in derived:
            derived.add(where)
            prefill = {**place, "phase": f"prefill of {prompt} tokens", "basis": DERIVED}
            rows += _rows(prefill, modes, partial(prefill_sizes, results.codecs, place["model"], modes))
    return frame_of(rows, COLUMNS)


def cheapest(known: frozenset[str], sizes: Sizes) -> float:
    """v(known): payload bytes, framing included, of the cheapest exchange for a runtime that knows these facts.

    Nothing known: the logits of all rows. position: the last row alone. layout: planes_zstd on the reply and small token ids, where
    they are smaller. head: the last hidden state. consumer: the token. loop: the window.
    """
    layout = "layout" in known
    replies = [sizes.logits_all, *[sizes.logits_all_planes] * layout]
    if "position" in known:
        replies += [sizes.logits_last, *[sizes.logits_last_planes] * layout]
    if known >= {"position", "head"}:
        replies += [sizes.hidden_last, *[sizes.hidden_last_planes] * layout]
    if known >= {"position", "consumer"}:
        replies.append(sizes.token)
    total = min(sizes.tokens, sizes.tokens_compact if layout else math.inf) + min(replies)
    if known >= {"position", "consumer", "loop"} and sizes.window is not None:
        return min(total, sizes.window)
    return total


def allowed_orders(needs: Mapping[str, frozenset[str]]) -> list[tuple[str, ...]]:
    """All orders of the facts in which each comes after those that it needs."""
    return [order for order in itertools.permutations(needs) if _is_allowed(order, needs)]


def worths(value: Callable[[frozenset[str]], float], needs: Mapping[str, frozenset[str]]) -> dict[str, Worth]:
    """Each fact's worth under a set function in bytes. The facts' own order is that of the ladder, and must be allowed."""
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


def decode_sizes(modes: Mapping[str, pd.DataFrame]) -> Sizes:
    """Of one decode step, from the trials of the rungs. A step has one row, so all rows are the last one. MissingPart names a rung."""
    up, down, framing = (_means(modes, part) for part in (_up, _down, _framing))
    raw_hidden = _mean_of_column(modes["know_head"], "down_tensor_bytes_per_token", "know_head")
    return Sizes(
        tokens=up["remote_cache"],
        tokens_compact=up["know_layout"],
        logits_all=down["remote_cache"] + framing["remote_cache"],
        logits_all_planes=down["know_layout"] + framing["know_layout"],
        logits_last=down["know_position"] + framing["know_position"],
        logits_last_planes=down["know_layout"] + framing["know_layout"],
        hidden_last=raw_hidden + framing["know_head"],
        hidden_last_planes=down["know_head"] + framing["know_head"],
        token=down["know_consumer"] + framing["know_consumer"],
        window=_mean_of_column(modes["know_loop"], PAYLOAD, "know_loop"),
    )


def prefill_sizes(measured: pd.DataFrame, model: str, modes: Mapping[str, pd.DataFrame]) -> Sizes:
    """Of one prefill, from codecs measured on its dumped tensors, with the framing and the token reply of decode trials."""
    down, framing = _means(modes, _down), _means(modes, _framing)
    own = measured[(measured["model"] == model) & measured["run_dtype"]]
    payload = own.set_index(["tensor", "codec"])["payload_bytes"].astype("float64").to_dict()
    return Sizes(
        tokens=payload["tokens_prompt", "raw"],
        tokens_compact=payload["tokens_prompt", "compact"],
        logits_all=payload["logits_all", "raw"] + framing["remote_cache"],
        logits_all_planes=payload["logits_all", "planes_zstd"] + framing["know_layout"],
        logits_last=payload["logits_last", "raw"] + framing["know_position"],
        logits_last_planes=payload["logits_last", "planes_zstd"] + framing["know_layout"],
        hidden_last=payload["hidden_last", "raw"] + framing["know_head"],
        hidden_last_planes=payload["hidden_last", "planes_zstd"] + framing["know_head"],
        token=down["know_consumer"] + framing["know_consumer"],
        window=None,
    )


def _is_allowed(order: Sequence[str], needs: Mapping[str, frozenset[str]]) -> bool:
    return all(needs[fact] <= set(order[:place]) for place, fact in enumerate(order))


def _marginals(order: Sequence[str], value: Callable[[frozenset[str]], float]) -> Iterator[tuple[str, float, float]]:
    """Each fact of an order with the bytes before and after it."""
    for place, fact in enumerate(order):
        yield fact, value(frozenset(order[:place])), value(frozenset(order[: place + 1]))


def _rows(place: Mapping[str, str], modes: Mapping[str, pd.DataFrame], sizes_of: Callable[[], Sizes]) -> list[dict[str, Any]]:
    orders = len(allowed_orders(NEEDS))
    marked = first_of(pd.concat([cell["ratios_reason"] for cell in modes.values()]))
    named = {
        fact: {"reason": marked, **place, "fact": fact, "needs": ", ".join(f for f in NEEDS if f in NEEDS[fact]), "orders": orders}
        for fact in NEEDS
    }
    try:
        sizes = sizes_of()
    except MissingPart as missing:
        return [row | {"reason": str(missing)} for row in named.values()]
    ends = cheapest(frozenset(), sizes), cheapest(frozenset(NEEDS), sizes)
    shared = {"payload_bytes_nothing_known": ends[0], "payload_bytes_all_known": ends[1]}
    found = worths(lambda known: cheapest(known, sizes), NEEDS)
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


def _means(modes: Mapping[str, pd.DataFrame], part: Callable[[pd.DataFrame], pd.Series]) -> dict[str, float]:
    """A part's mean over trials, of every rung; MissingPart where one was not run or not measured."""
    for mode in MODES:
        if mode not in modes:
            raise MissingPart(f"{mode} was not run")
    means = {mode: mean_of(part(modes[mode])) for mode in MODES}
    missing = [mode for mode, mean in means.items() if mean is None]
    if missing:
        raise MissingPart(f"bytes of {missing[0]} were not measured")
    return {mode: mean for mode, mean in means.items() if mean is not None}


def _mean_of_column(cell: pd.DataFrame, column: str, mode: str) -> float:
    mean = mean_of(cell[column])
    if mean is None:
        raise MissingPart(f"{column} of {mode} was not measured")
    return mean


def _up(cell: pd.DataFrame) -> pd.Series:
    return cell["up_encoded_bytes_per_token"]


def _down(cell: pd.DataFrame) -> pd.Series:
    return cell["down_encoded_bytes_per_token"]


def _framing(cell: pd.DataFrame) -> pd.Series:
    return cell[PAYLOAD] - _up(cell) - _down(cell)


def _prompt_tokens(measured: pd.DataFrame, model: str) -> str | None:
    """Tokens of the dumped prompt, or None where nothing was dumped for the model."""
    if measured.empty:
        return None
    shapes = measured.loc[(measured["model"] == model) & (measured["tensor"] == "tokens_prompt"), "shape"]
    return str(shapes.iloc[0]) if len(shapes) else None


FACT_VIEWS = (
    View(
        "Facts",
        (
            Column("fact", "fact"),
            Column("needs", "needs"),
            Column("factor", "fewer bytes, averaged (x)", "digits", reason="reason"),
            Column("share", "share of all (%)", "percent", reason="reason"),
            Column("bytes_saved", "bytes saved, averaged", "count", reason="reason"),
            Column("ladder_factor", "at its place in the ladder (x)", "digits", reason="reason"),
        ),
        ("model", "network", "phase", "basis"),
        "Averaged over all orders in which each fact comes after those that it needs: the geometric mean of v(S) / v(S + fact), where "
        "v(S) is the payload of the cheapest exchange for a runtime that knows S. The factors multiply to nothing known / all known. "
        "Per token in decode phases, per prefill in a prefill.",
    ),
)
