"""The evictions of a recovery phase: the fraction of the layers that leaves the device before each step, and which restores run alone."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from semgap.client.runtime import Runtime
from semgap.policy import Policy


@dataclass(frozen=True)
class Eviction:
    """The eviction before one step. `alone`: the same restore may first run alone, timed."""

    fraction: float
    alone: bool


def evictions(fractions: Sequence[float], steps: int, seed: str) -> list[Eviction]:
    """The eviction before each of `steps` decode steps: blocks of all fractions, each in a random order of `seed`; none without fractions.

    So no fraction always follows another one. With one seed, fewer steps have the first of the same fractions.

    The restore runs alone before one of two steps with the same fraction, drawn at random; tables compare it with the other step. Both
    directly follow an eviction, so neither finds what the other one left warm. It does not run after its own step instead: the step
    appends a position, and one more eviction would save it in place of the next one, or, in a lossy codec, change it.
    """
    drawn, count = random.Random(seed), len(fractions)
    turns: list[Eviction] = []
    while fractions and len(turns) < steps:
        begin, orders = len(turns), [drawn.sample(range(count), count) for _ in range(2)]
        chosen = [drawn.randrange(2) for _ in fractions]
        for block, order in enumerate(orders):
            for index in order:
                both_run = begin + count + orders[1].index(index) < steps
                turns.append(Eviction(fractions[index], both_run and block == chosen[index]))
    return turns[:steps]


def layers_to_evict(layers: int, fraction: float, step: int) -> list[int]:
    """Layers to evict before `step`: round(fraction * layers), at least 1 if fraction > 0, evenly spaced, shifted by one each step."""
    count = max(1, round(fraction * layers)) if fraction > 0 else 0
    return sorted((step + index * layers // count) % layers for index in range(count))


def evict(runtime: Runtime, policy: Policy, layers: Sequence[int], eviction: Eviction) -> dict[str, Any]:
    """Takes layers off the device; gives columns for the row of the step that follows.

    A restore that runs alone shows how long the step would wait if compute hid nothing: only for policies that fetch while they compute.
    The layers are evicted again after it.
    """
    row: dict[str, Any] = {"evict_fraction": eviction.fraction, "evicted_layers": len(layers)}
    evicted = runtime.evict(layers) if layers else None
    if evicted is None:
        return row
    row |= {"saved_tensor_bytes": evicted.saved_tensor_bytes, "saved_payload_bytes": evicted.saved_payload_bytes}
    if eviction.alone and policy.recovery in ("delta", "auto"):
        row["restore_alone_s"] = runtime.restore()
        again = runtime.evict(layers)
        assert again is not None
        row["saved_tensor_bytes"] += again.saved_tensor_bytes  # all dirty again if `auto` recomputed
        row["saved_payload_bytes"] += again.saved_payload_bytes
    return row
