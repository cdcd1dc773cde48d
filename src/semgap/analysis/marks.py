"""What the rows of `define.modes` say of a mode's place in the tables: rungs, twins, baselines, claims. No code knows a mode's name."""

from collections.abc import Mapping
from typing import Any

import msgspec


class Rung(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rung of the ladder: the mode below it (None: the lowest), what it adds, and the fact of that name with the facts that it needs."""

    adds: str
    after: str | None = None
    fact: str | None = None
    needs: tuple[str, ...] = ()


class Claims(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The mode's hypotheses against a baseline, as least cuts (fractions), and the mode that only casts, which explains a part."""

    against: str
    fewer_bytes: float | None = None
    lower_latency: float | None = None
    cast: str | None = None


class Mark(msgspec.Struct, frozen=True):
    """A mode's marks. `blind`: a baseline that knows nothing. `reference`: shown beside the ladder, with these words.

    `twin`: the mode that this one repeats under another name. `plant_us`: a busy wait planted in each of the worker's steps. `batching`: it
    runs in load phases alone, whose modes have a ladder of their own.
    """

    rung: Rung | None = None
    twin: str | None = None
    plant_us: int = 0
    blind: bool = False
    reference: str | None = None
    claims: Claims | None = None
    batching: Mapping[str, Any] | None = None


Marks = Mapping[str, Mark]
MARKED = tuple(field.name for field in msgspec.structs.fields(Mark))
NO_MARK = Mark()


def marks_of(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Mark]:
    """The marks in rows of `define.modes`, by mode, in their order. msgspec.ValidationError names a wrong one."""
    given = {mode: {name: row[name] for name in MARKED if row.get(name) is not None} for mode, row in rows.items()}
    return msgspec.convert(given, dict[str, Mark])


def rungs(marks: Marks) -> list[str]:
    """The modes of the ladder, each after the one below it."""
    marked = {mode: mark.rung for mode, mark in marks.items() if mark.rung}

    def upwards(mode: str) -> list[str]:
        return [mode, *(above for next_up, rung in marked.items() if rung.after == mode for above in upwards(next_up))]

    return [mode for lowest, rung in marked.items() if rung.after not in marked for mode in upwards(lowest)]


def base_of(marks: Marks) -> str | None:
    """The lowest rung, with which the tables compare the other modes; None without a ladder."""
    return next(iter(rungs(marks)), None)


def first_rungs(marks: Marks) -> list[str]:
    """The rungs directly above the lowest one."""
    return [mode for mode, mark in marks.items() if mark.rung and mark.rung.after is not None and mark.rung.after == base_of(marks)]


def blind_modes(marks: Marks) -> list[str]:
    """The baselines that know nothing."""
    return [mode for mode, mark in marks.items() if mark.blind]
