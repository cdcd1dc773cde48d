"""The exchanges that a runtime can choose from, from the trials of the ladder's rungs: their parts measured, put together anew."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from semgap.analysis.aggregate import PAYLOAD, mean_of
from semgap.analysis.marks import Rung

Policies = Mapping[str, Mapping[str, Any]]
"""The policy of each mode, as in its trials' manifests."""
RAW = "raw"
Choice = tuple[str, Any]
"""A field of a policy that shapes an exchange, and its value."""


class MissingPart(Exception):
    """A part of an exchange was not measured. The message names it."""


@dataclass(frozen=True)
class Exchange:
    """A way to exchange a token: the facts that it needs, and its payload per token, framing included."""

    needs: frozenset[str]
    payload_bytes: float


@dataclass(frozen=True)
class _Measured:
    """A rung's bytes per token: as tensors and encoded, up and down, and the framing."""

    up_tensor: float
    up: float
    down_tensor: float
    down: float
    framing: float
    choices: Mapping[str, Any]


def exchanges(chain: Mapping[str, Rung], modes: Mapping[str, pd.DataFrame], policies: Policies, codecs: pd.DataFrame) -> list[Exchange]:
    """Every rung's exchange with every codec of token ids and of its reply that a rung of `chain` introduced, where the size is known.

    A choice (reply, codec, window) needs the fact of the rung that introduced it, and the facts which that one needs. A tensor's size in
    another codec is known from a rung that sends as many tensor bytes, or from `codecs`, measured on tensors of the model. MissingPart
    if the lowest rung was not run.
    """
    needs = _needs_of_choices(chain, policies)
    measured = {mode: _measured(mode, modes, policies) for mode in chain}
    found = []
    for own in measured.values():
        shape = needs["reply", own.choices["reply"]] | needs["window", own.choices["window"]]
        for up_codec, up in _sizes("tokens", own, measured, codecs):
            for down_codec, down in _sizes("codec", own, measured, codecs):
                known = shape | needs.get(("tokens", up_codec), frozenset()) | needs.get(("codec", down_codec), frozenset())
                found.append(Exchange(known, up + down + own.framing))
    return found


def _needs_of_choices(chain: Mapping[str, Rung], policies: Policies) -> dict[Choice, frozenset[str]]:
    """The facts behind each choice; none behind those of the lowest rung."""
    facts = {rung.fact: rung for rung in chain.values() if rung.fact}
    needs: dict[Choice, frozenset[str]] = {}
    for mode, rung in chain.items():
        known = frozenset(_closure(rung.fact, facts)) if rung.fact else frozenset()
        for choice in _choices(mode, policies).items():
            needs.setdefault(choice, known)
    return needs


def _closure(fact: str, facts: Mapping[str, Rung]) -> Iterator[str]:
    yield fact
    for needed in facts[fact].needs:
        yield from _closure(needed, facts)


def _choices(mode: str, policies: Policies) -> dict[str, Any]:
    if mode not in policies:
        raise MissingPart(f"{mode} was not run")
    policy = policies[mode]
    return {
        "reply": policy["reply"]["kind"],
        "window": policy.get("window", 1),
        "tokens": policy["codec"]["tokens"],
        "codec": policy["codec"]["reply"],
    }


def _measured(mode: str, modes: Mapping[str, pd.DataFrame], policies: Policies) -> _Measured:
    if mode not in modes:
        raise MissingPart(f"{mode} was not run")
    names = ("tensor_bytes", "up_encoded_bytes", "down_tensor_bytes", "down_encoded_bytes")
    tensors, up, down_tensor, down = (_known(modes[mode], f"{name}_per_token", mode) for name in names)
    framing = _known(modes[mode], PAYLOAD, mode) - up - down
    return _Measured(tensors - down_tensor, up, down_tensor, down, framing, _choices(mode, policies))


def _known(cell: pd.DataFrame, column: str, mode: str) -> float:
    mean = mean_of(cell[column])
    if mean is None:
        raise MissingPart(f"{column} of {mode} was not measured")
    return mean


def _sizes(field: str, own: _Measured, measured: Mapping[str, _Measured], codecs: pd.DataFrame) -> Iterator[tuple[str, float]]:
    """The codecs in which a rung's token ids (`tokens`) or reply (`codec`) have a known size, with the size."""
    up = field == "tokens"
    tensor, encoded = (own.up_tensor, own.up) if up else (own.down_tensor, own.down)
    yield own.choices[field], encoded
    if own.choices[field] != RAW:
        yield RAW, tensor
    seen = {own.choices[field], RAW}
    for other in measured.values():
        codec = other.choices[field]
        if codec not in seen and tensor and (other.up_tensor if up else other.down_tensor) == tensor:
            seen.add(codec)
            yield codec, other.up if up else other.down
    for codec in dict.fromkeys(other.choices[field] for other in measured.values() if other.choices[field] not in seen):
        known = codecs[(codecs["codec"] == codec) & (codecs["raw_bytes"] == tensor)] if len(codecs) else codecs
        if len(known) and tensor:
            yield codec, float(known["payload_bytes"].iloc[0])
