"""Table facts: the worth of each fact, over all orders in which facts can be added."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from intervals import Row, mean
from run import MOVE_KV, Run, is_prefill
from trials import Trial


def facts(run: Run) -> list[Row]:
    """Shapley's value of each fact under precedence constraints, by v(S), the payload of the cheapest exchange that S allows."""
    rungs = run.ladder(run.config["define"]["modes"])
    of = {mark["fact"]: mode for mode in rungs if (mark := run.mark(mode)["rung"]).get("fact")}
    needs = {fact: set(run.mark(mode)["rung"].get("needs", [])) for fact, mode in of.items()}
    orders = [o for o in itertools.permutations(of) if all(needs[f] <= set(o[:i]) for i, f in enumerate(o))]
    rows = []
    for (model, network, phase), modes in run.groups.items():
        if set(of.values()) & set(modes) and next(iter(modes.values()))[0].phase_spec["kind"] not in MOVE_KV:
            at, known = {"model": model, "network": network, "phase": phase, "orders": len(orders)}, set(of.values()) <= set(modes)
            exchanges = list(exchanges_of(run, {mode: modes[mode] for mode in (rungs[0], *of.values())})) if known else []
            rows += [at | {"fact": fact} | (worth(fact, list(of), orders, exchanges) if known else NO_WORTH) for fact in of]
    return rows


WORTH = (
    *("log_ratio", "factor", "share", "bytes_saved", "ladder_factor", "ladder_bytes_saved"),
    *("payload_bytes_nothing_known", "payload_bytes_all_known"),
)


NO_WORTH: Row = dict.fromkeys(WORTH)


Exchanges = Sequence[tuple[frozenset[str], float]]


def worth(fact: str, climb: list[str], orders: Sequence[tuple[str, ...]], exchanges: Exchanges) -> Row:
    """ln v(S) - ln v(S + fact), averaged over the orders; and the same at the fact's place in the ladder, `climb`."""

    def value(known: Iterable[str]) -> float:
        return min(size for needed, size in exchanges if needed <= set(known))

    def added(order: Sequence[str]) -> tuple[float, float]:
        return value(order[: order.index(fact)]), value(order[: order.index(fact) + 1])

    steps, (here, there), (nothing, everything) = [added(order) for order in orders], added(climb), (value(()), value(climb))
    log = float(np.mean([math.log(a / b) for a, b in steps]))
    share, saved = log / math.log(nothing / everything), float(np.mean([a - b for a, b in steps]))
    return dict(zip(WORTH, (log, math.exp(log), share, saved, here / there, here - there, nothing, everything), strict=True))


def exchanges_of(run: Run, rungs: Mapping[str, Sequence[Trial]]) -> Iterator[tuple[frozenset[str], float]]:
    """Each rung's reply and window with any rung's codecs of token ids and reply: the facts that it needs, and its payload per token."""
    parts = {mode: parts_of(trials[0]) for mode, trials in rungs.items()}
    closed = {mode: closure(run, mode, rungs) for mode in rungs}

    def introduced(kind: int, part: Any) -> frozenset[str]:
        return closed[next(mode for mode in rungs if parts[mode][kind] == part)]

    for mode, trials in rungs.items():
        reply, window, *_ = parts[mode]
        own = sizes_of(run, trials)
        framing = own["up_payload"] + own["down_payload"] - own["up_encoded"] - own["down_encoded"]
        for tokens, codec in itertools.product({p[2] for p in parts.values()}, {p[3] for p in parts.values()}):
            up = encoded(run, rungs, mode, "up", tokens)
            down = encoded(run, rungs, mode, "down", codec)
            if up is not None and down is not None:
                needed = introduced(0, reply) | introduced(1, window) | introduced(2, tokens) | introduced(3, codec)
                yield needed, framing + up + down


def parts_of(trial: Trial) -> tuple[str, int, str, str]:
    policy = trial.policy
    return policy["reply"]["kind"], policy["window"], policy["codec"]["tokens"], policy["codec"]["reply"]


def sizes_of(run: Run, trials: Sequence[Trial]) -> dict[str, float]:
    """Bytes per token by direction: TCP payload, tensors after the codec, tensors before it."""
    sizes = {
        f"{way}_{what}": mean(run.column(trials, f"{way}_{what}_bytes_per_token"))
        for way in ("up", "down")
        for what in ("payload", "encoded")
    }
    tensor, down = (mean(run.column(trials, f"{name}_bytes_per_token")) for name in ("tensor", "down_tensor"))
    return sizes | {"up_tensor": tensor - down, "down_tensor": down}


def closure(run: Run, mode: str, rungs: Iterable[str]) -> frozenset[str]:
    """The rung's fact and those that it needs, in turn."""
    of = {run.mark(each)["rung"].get("fact"): run.mark(each)["rung"].get("needs", []) for each in rungs}
    found, open_ = set(), [run.mark(mode)["rung"].get("fact")]
    while open_:
        fact = open_.pop()
        if fact in of and fact is not None and fact not in found:
            found.add(fact)
            open_ += of[fact]
    return frozenset(found)


def encoded(run: Run, rungs: Mapping[str, Sequence[Trial]], mode: str, way: str, codec: str) -> float | None:
    """Bytes of a rung's tensors in another codec: of a rung with that codec and as many tensor bytes, or from the measured codecs."""
    place, size, trial = (2 if way == "up" else 3), sizes_of(run, rungs[mode])[f"{way}_tensor"], rungs[mode][0]
    for trials in [rungs[mode], *rungs.values()]:
        if parts_of(trials[0])[place] == codec and sizes_of(run, trials)[f"{way}_tensor"] == size:
            return sizes_of(run, trials)[f"{way}_encoded"]
    tensor = trial.policy["reply"]["kind"] if way == "down" else "tokens_prompt" if is_prefill(rungs[mode]) else "tokens_step"
    found = run.codecs[(run.codecs["model"] == trial.model) & (run.codecs["tensor"] == tensor) & (run.codecs["codec"] == codec)]
    found = found[found["run_dtype"] & (found["device"] == "cpu") & found["ratio"].notna()]
    return size / float(found["ratio"].iloc[0]) if len(found) else None
