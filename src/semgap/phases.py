"""Kinds of phases as data: the step that a trial of a kind measures, what crosses in it, and the keys of a phase that it alone has.

A new kind is a row here, a name in the config's schema, and the code that its own keys ask for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class PhaseKind:
    """`measures`: the prefill of each request (TTFT), or the decode steps after it (ITL).

    `moves_kv`: KV blocks cross between worker and KV host in its steps. A mode then runs in it only if its row names the phase, with a
    resident cache; the network may have a `kv`; and its latencies, which hold the wait for blocks, have tables of their own.
    `workers`: those that a request runs on, one after the other. `keys`: keys of a phase that only this kind may have, with their plain
    values.
    """

    measures: Literal["prefill", "decode"]
    moves_kv: bool = False
    workers: int = 1
    keys: Mapping[str, Any] = field(default_factory=dict)


KINDS: Mapping[str, PhaseKind] = {
    "prefill": PhaseKind("prefill"),
    "decode": PhaseKind("decode"),
    "recovery": PhaseKind("decode", moves_kv=True, keys={"live_requests": 1, "kv_budget": 1, "evict_fractions": []}),
    "prefix": PhaseKind("prefill", moves_kv=True, keys={"prefix_lengths": []}),
    "handover": PhaseKind("decode", moves_kv=True, workers=2),
    "load": PhaseKind("decode"),
}
MOVE_KV = tuple(name for name, kind in KINDS.items() if kind.moves_kv)


def foreign_keys(kind: str, spec: Mapping[str, Any]) -> dict[str, str]:
    """The keys of a phase of `kind` that have a value and are another kind's own, each with that kind."""
    own = KINDS[kind].keys
    return {
        key: name for name, other in KINDS.items() for key, plain in other.keys.items() if key not in own and spec.get(key, plain) != plain
    }
