"""Tries and what came of them: the bookkeeping of every attack, and the table that a campaign ends with."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MOST_DRAWS = 3
"""How often a try that came late is made again, at another moment."""
MOST_WRONG_KEPT = 50
"""Wrong tries of a target that are written out; all are counted."""


@dataclass(frozen=True)
class Only:
    """What to run of an attack: one target, one of its tries, or all."""

    target: str | None = None
    number: int | None = None

    @classmethod
    def of(cls, text: str) -> tuple[str, Only]:
        """`ATTACK`, `ATTACK:TARGET` or `ATTACK:TARGET:NUMBER`."""
        attack, *rest = text.split(":")
        return attack, cls(rest[0] if rest else None, int(rest[1]) if len(rest) > 1 else None)


@dataclass(frozen=True)
class Try:
    """One try: its place in the campaign, which together with the seed decides all that is random in it."""

    attack: str
    target: str
    number: int
    rng: random.Random

    @property
    def name(self) -> str:
        return f"{self.attack}:{self.target}:{self.number}"


@dataclass
class Row:
    """The tries of one target."""

    attack: str
    target: str
    planned: int
    refused: int = 0
    survived: int = 0
    wrong: int = 0
    missed: int = 0
    wrongs: list[dict[str, str]] = field(default_factory=list)
    note: str = ""

    @property
    def tries(self) -> int:
        return self.refused + self.survived + self.wrong


@dataclass
class Book:
    """What came of an attack's tries.

    A try is `refused` if the program said why it would not, or failed and said so; `survived` if what was attacked went on or was done all
    the same; `wrong` if anything afterwards was not right. `missed`, and no try, if it had ended before it could be attacked.
    """

    attack: str
    seed: int
    ends_s: float
    only: Only = Only()
    rows: dict[str, Row] = field(default_factory=dict)
    targets: tuple[str, ...] = ()

    def turns(self, planned: Mapping[str, int]) -> Iterator[Try]:
        """Tries of the targets in turn, up to the planned number of each; one of each if the time is over."""
        self.targets = tuple(planned)
        for target, count in planned.items():
            if self.only.target in (None, target):
                self.rows.setdefault(target, Row(self.attack, target, count))
        for number in range(1, max(planned.values(), default=0) + 1):
            for target, count in planned.items():
                if number > count or self.only.target not in (None, target) or self.only.number not in (None, number):
                    continue
                if number > 1 and time.monotonic() > self.ends_s:
                    return
                yield Try(self.attack, target, number, random.Random(f"{self.seed}/{self.attack}/{target}/{number}"))

    def require_what_was_asked_for(self) -> None:
        """ValueError if `only` names a target or a number that this attack has not."""
        if self.only != Only() and not any(row.tries + row.missed for row in self.rows.values()):
            asked = ":".join(str(each) for each in (self.only.target, self.only.number) if each is not None)
            raise ValueError(f"{self.attack} has no {asked!r} here; its targets are {', '.join(self.targets)}, numbers start with 1")

    def plan(self, target: str, planned: int) -> None:
        """Says how many tries there should be where one turn holds several."""
        self.rows[target].planned = planned

    def note(self, target: str, note: str) -> None:
        self.rows.setdefault(target, Row(self.attack, target, 0)).note = note

    def refused(self, one: Try, count: int = 1) -> None:
        self.rows[one.target].refused += count

    def survived(self, one: Try, count: int = 1) -> None:
        self.rows[one.target].survived += count

    def wrong(self, one: Try, why: str) -> None:
        row = self.rows[one.target]
        row.wrong += 1
        print(f"wrong: {one.name}: {why}", flush=True)
        if len(row.wrongs) < MOST_WRONG_KEPT:
            row.wrongs.append({"try": one.name, "why": why})

    def missed(self, one: Try) -> None:
        self.rows[one.target].missed += 1

    def judged(self, one: Try, outcome: str, faults: Sequence[str]) -> None:
        """Counts a try as its outcome, `refused`, `survived` or `missed`, or as wrong if there are faults."""
        if faults:
            self.wrong(one, "; ".join(faults))
        else:
            {"refused": self.refused, "survived": self.survived, "missed": self.missed}[outcome](one)


HEAD = ("attack", "target", "tries", "of", "refused", "survived", "wrong", "missed")


def total(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Sums of the counts over rows."""
    return {name: sum(row[name] for row in rows) for name in ("tries", "planned", "refused", "survived", "wrong", "missed")}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The campaign's table. `of`: the tries that were planned; `missed`: those that came too late to attack anything."""
    lines = [f"| {' | '.join(HEAD)} |", "| --- | --- " + "| ---: " * 6 + "|"]
    whole = {"attack": "all", "target": ""} | total(rows)
    for row in (*rows, whole):
        counts = (row["tries"], row["planned"], row["refused"], row["survived"], row["wrong"], row["missed"])
        lines.append(f"| {row['attack']} | {row['target']} | " + " | ".join(f"{count:,}" for count in counts) + " |")
    return "\n".join(lines) + "\n"
