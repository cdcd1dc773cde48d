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

from semgap.analysis.aggregate import PAYLOAD, SETTING, by_setting, first_of, mean_of
from semgap.analysis.columns import frame_of
from semgap.analysis.results import Results
from semgap.analysis.tables.render import Column, View

NEEDS: Mapping[str, frozenset[str]] = {
    "position": frozenset(),
    "layout": frozenset(),
    "head": frozenset({"position"}),
    "consumer": frozenset({"position"}),
    "loop": frozenset({"position", "consumer"}),
}
"""The facts in the order of the ladder, each with the facts that its reply requires."""
MODES = ("remote_cache", *(f"know_{fact}" for fact in NEEDS))
FRAMED_AS: Mapping[str, str] = {
    "logits_all": "remote_cache",
    "logits_last": "know_position",
    "hidden_last": "know_head",
    "token": "know_consumer",
    "logits_all_planes": "know_layout",
    "logits_last_planes": "know_layout",
    "hidden_last_planes": "know_head",
}
"""The replies to choose from, each with the rung that has its framing."""
MEASURED = "measured: payloads of trials, put together anew"
DERIVED = "derived: codecs on dumped tensors, framing of decode trials"
COLUMNS = [
    *(*SETTING, "basis", "fact", "needs", "orders", "log_ratio", "factor", "share", "bytes_saved"),
    *("ladder_factor", "ladder_bytes_saved", "payload_bytes_nothing_known", "payload_bytes_all_known", "reason"),
]


@dataclass(frozen=True)
class Sizes:
    """Bytes of the parts of one exchange. `replies`, by the keys of `FRAMED_AS`, include the framing of both frames.

    `window` is a whole exchange, per token; infinite for a prefill, which is one exchange without a loop.
    """

    tokens: float
    tokens_compact: float
    replies: Mapping[str, float]
    window: float = math.inf


@dataclass(frozen=True)
class Worth:
    """A fact's marginals, averaged over the allowed orders, and at its position in the ladder."""

    log_ratio: float
    bytes_saved: float
    ladder_log_ratio: float
    ladder_bytes_saved: float


class MissingPart(Exception):
    """A part of the exchange was not measured. The message names it."""


def table(results: Results) -> pd.DataFrame:
    """One row per model, network, phase and fact: decode phases from measured trials, the prefill from dumped tensors.

    Decode: v(S) recombines the parts that the rungs' trials measured; on the sets of the ladder it is their payload per token.
    Prefill: by default only remote_cache runs there, so v(S) is derived, per prefill, from the payloads of codecs on the dumped prompt's
    tensors (raw, planes_zstd, compact) and the framing and token reply of the decode trials. Null with a reason if a rung was not run.
    Settings without a rung above the lowest have no rows.
    """
    rows: list[dict[str, Any]] = []
    derived = set()
    for setting, modes in by_setting(results.rows[results.rows["phase_kind"] == "decode"]):
        if not set(MODES[1:]) & set(modes):
            continue
        rows += _rows({**setting, "basis": MEASURED}, modes, partial(decode_sizes, modes))
        prompt, over = _prompt_tokens(results.codecs, setting["model"]), (setting["model"], setting["network"])
        if prompt and over not in derived:
            derived.add(over)
            prefill = {**setting, "phase": f"prefill of {prompt} tokens", "basis": DERIVED}
            rows += _rows(prefill, modes, partial(prefill_sizes, results.codecs, setting["model"], modes))
    return frame_of(rows, COLUMNS)


def cheapest(known: frozenset[str], sizes: Sizes) -> float:
    """v(known): payload bytes, framing included, of the cheapest exchange for a runtime that knows these facts.

    Each fact adds replies to choose from. None known: the logits of all rows. position: the last row. layout: planes_zstd on the reply, and
    small token ids. head: the last hidden state. consumer: the token. loop: the window.
    """
    names = ["logits_all"]
    if "position" in known:
        names.append("logits_last")
    if known >= {"position", "head"}:
        names.append("hidden_last")
    if "layout" in known:
        names += [f"{name}_planes" for name in names]
    if known >= {"position", "consumer"}:
        names.append("token")
    tokens = min(sizes.tokens, sizes.tokens_compact) if "layout" in known else sizes.tokens
    total = tokens + min(sizes.replies[name] for name in names)
    return min(total, sizes.window) if known >= {"position", "consumer", "loop"} else total


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


def decode_sizes(modes: Mapping[str, pd.DataFrame]) -> Sizes:
    """One decode step, from the trials of the rungs. A step has one row: all rows are the last row. MissingPart names a rung."""
    up, down, framing = _parts(modes)
    raw_hidden = _known_mean(modes["know_head"]["down_tensor_bytes_per_token"], "down_tensor_bytes_per_token of know_head was")
    replies = {reply: down[rung] for reply, rung in FRAMED_AS.items()} | {"hidden_last": raw_hidden}
    window = _known_mean(modes["know_loop"][PAYLOAD], f"{PAYLOAD} of know_loop was")
    return Sizes(up["remote_cache"], up["know_layout"], _framed(replies, framing), window)


def prefill_sizes(measured: pd.DataFrame, model: str, modes: Mapping[str, pd.DataFrame]) -> Sizes:
    """One prefill, from codecs measured on its dumped tensors, and the framing and the token reply of decode trials."""
    _, down, framing = _parts(modes)
    own = measured[(measured["model"] == model) & measured["run_dtype"]]
    payload = own.set_index(["tensor", "codec"])["payload_bytes"].astype("float64").to_dict()
    replies = {"token": down["know_consumer"]}
    for tensor in ("logits_all", "logits_last", "hidden_last"):
        replies |= {tensor: payload[tensor, "raw"], f"{tensor}_planes": payload[tensor, "planes_zstd"]}
    return Sizes(payload["tokens_prompt", "raw"], payload["tokens_prompt", "compact"], _framed(replies, framing))


def _framed(replies: Mapping[str, float], framing: Mapping[str, float]) -> dict[str, float]:
    return {reply: size + framing[FRAMED_AS[reply]] for reply, size in replies.items()}


def _marginals(order: Sequence[str], value: Callable[[frozenset[str]], float]) -> Iterator[tuple[str, float, float]]:
    """Each fact of an order with the bytes before and after it."""
    for index, fact in enumerate(order):
        yield fact, value(frozenset(order[:index])), value(frozenset(order[: index + 1]))


def _rows(setting: Mapping[str, str], modes: Mapping[str, pd.DataFrame], sizes_of: Callable[[], Sizes]) -> list[dict[str, Any]]:
    orders = len(allowed_orders(NEEDS))
    marked = first_of(pd.concat([cell["ratios_reason"] for cell in modes.values()]))
    named = {
        fact: {"reason": marked, **setting, "fact": fact, "needs": ", ".join(f for f in NEEDS if f in NEEDS[fact]), "orders": orders}
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


def _parts(modes: Mapping[str, pd.DataFrame]) -> list[dict[str, float]]:
    """Each rung's mean bytes up, down and of framing. MissingPart names a rung that was not run or not measured."""
    for mode in MODES:
        if mode not in modes:
            raise MissingPart(f"{mode} was not run")
    parts: list[dict[str, float]] = [{}, {}, {}]
    for mode in MODES:
        up, down = (modes[mode][f"{way}_encoded_bytes_per_token"] for way in ("up", "down"))
        for part, values in zip(parts, (up, down, modes[mode][PAYLOAD] - up - down), strict=True):
            part[mode] = _known_mean(values, f"bytes of {mode} were")
    return parts


def _known_mean(values: pd.Series, what: str) -> float:
    mean = mean_of(values)
    if mean is None:
        raise MissingPart(f"{what} not measured")
    return mean


def _prompt_tokens(measured: pd.DataFrame, model: str) -> str | None:
    """Tokens of the model's dumped prompt, or None if there is no dump."""
    if measured.empty:
        return None
    shapes = measured.loc[(measured["model"] == model) & (measured["tensor"] == "tokens_prompt"), "shape"]
    return str(shapes.iloc[0]) if len(shapes) else None


VIEWS = (
    View(
        "Facts",
        (
            Column("fact", "fact"),
            Column("needs", "needs"),
            Column("factor", "fewer bytes, averaged (x)", "digits", reason="reason"),
            Column("share", "share of all (%)", "percent", reason="reason"),
            Column("bytes_saved", "bytes saved, averaged", "count", reason="reason"),
            Column("ladder_factor", "at its position in the ladder (x)", "digits", reason="reason"),
        ),
        "Geometric mean of v(S) / v(S + fact) over all orders in which each fact comes after those that it needs. v(S): payload of the "
        "cheapest exchange for a runtime that knows S. The factors multiply to v(nothing) / v(everything). Per token in decode phases, per "
        "prefill in a prefill.",
        by=("model", "network", "phase", "basis"),
    ),
)
