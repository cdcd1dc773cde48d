"""A small engine for tests of the scheduler.

Its model hashes all tokens that it sees through the block tables, so a wrong table draws wrong tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from semgap.engine.scheduler import Outcome, Scheduled, Scheduler
from semgap.kv.block_tables import BlockTables
from semgap.policy import Batching
from semgap.wire.messages import Call

POSITIONS = 4
MAX_LENGTH = 32
STOP = 7
_VOCABULARY = 1000


def _mixed(before: int, token: int) -> int:
    return hash((before, token))


def _drawn(entries: Sequence[int]) -> int:
    """The next token, of all entries: one for each position."""
    total = 0
    for entry in entries:
        total = _mixed(total, entry)
    return total % _VOCABULARY


def run_alone(tokens: Sequence[int]) -> int:
    """The token that follows `tokens`, by a model that no other request shares."""
    entries: list[int] = []
    for token in tokens:
        entries.append(_mixed(entries[-1] if entries else 1, int(token)))
    return _drawn(entries)


class ToyModel:
    """Runs steps over `memory`: an entry for each position of each block, None if blank. Its entry depends on all tokens up to it."""

    def __init__(self, blocks: int) -> None:
        self.memory: list[list[int | None]] = [[None] * POSITIONS for _ in range(blocks)]

    def blank(self, block: int) -> None:
        self.memory[block] = [None] * POSITIONS

    def run(self, scheduled: Sequence[Scheduled], tables: BlockTables) -> list[int | None]:
        """All runs write before any draws, as in a step over all layers. A written block must have one holder."""
        for each in scheduled:
            self._write(each, tables)
        return [_drawn(self._seen(each)) if each.run.draws else None for each in scheduled]

    def _write(self, each: Scheduled, tables: BlockTables) -> None:
        run = each.run
        entry = self._at(run.blocks, run.position - 1) if run.position else 1
        for position, token in enumerate(run.tokens.tolist(), run.position):
            assert entry is not None, f"request {each.key} reads a blank position before {position}"
            block = run.blocks[position // POSITIONS]
            assert tables.holders(block) == 1, f"request {each.key} writes block {block} of {tables.holders(block)} holders"
            entry = self.memory[block][position % POSITIONS] = _mixed(entry, token)

    def _at(self, blocks: Sequence[int], position: int) -> int | None:
        return self.memory[blocks[position // POSITIONS]][position % POSITIONS]

    def _seen(self, each: Scheduled) -> list[int]:
        entries = [self._at(each.run.blocks, position) for position in range(each.run.position + each.run.tokens.size)]
        assert None not in entries, f"request {each.key} reads a blank position"
        return [entry for entry in entries if entry is not None]


@dataclass
class Asked:
    """A request as its client sees it."""

    tokens: list[int]  # fed or drawn
    draws: int = 0
    ends: bool = False
    most: int = MAX_LENGTH
    calls: int = 0
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def filled(self) -> int:
        """Positions that count as filled between two calls: the last drawn token is not fed."""
        return len(self.tokens) - 1


class Engine:
    """Schedules, runs and checks: each drawn token must be that of the request alone, and each step one that its Batching allows."""

    def __init__(self, batching: Batching, blocks: int) -> None:
        self.model = ToyModel(blocks)
        self.tables = BlockTables(blocks, POSITIONS, self.model.blank)
        self.scheduler = Scheduler(batching, self.tables, MAX_LENGTH)
        self.asked: dict[tuple[int, int], Asked] = {}
        self.now_s = 0.0
        self.steps: list[list[Scheduled]] = []

    def begin(
        self, key: tuple[int, int], tokens: Sequence[int], draws: int = 1, ends: bool = True, most: int = 0, deadline_us: int = 0
    ) -> None:
        most = most or len(tokens) + draws - 1
        call = Call(key[1], 0, len(tokens), draws, ends, most, deadline_us)
        self.scheduler.add(key, call, np.array(tokens, np.int64), self.now_s)
        self.asked[key] = Asked(list(tokens), draws, ends, most, 1)

    def go_on(self, key: tuple[int, int], fed: Sequence[int] = (), draws: int = 1, ends: bool = False, deadline_us: int = 0) -> None:
        """A further call of a request; `fed` replaces its last drawn token."""
        asked = self.asked[key]
        call = Call(key[1], asked.filled, len(fed), draws, ends, 0, deadline_us)
        self.scheduler.add(key, call, np.array(fed, np.int64), self.now_s)
        asked.tokens = [*asked.tokens[: asked.filled], *fed] if fed else asked.tokens
        asked.draws, asked.ends = draws, ends
        asked.calls += 1

    def cancel(self, key: tuple[int, int]) -> None:
        self.scheduler.cancel(key)
        self.asked.pop(key, None)

    def leave(self, session: int) -> None:
        self.scheduler.leave(session)
        self.asked = {key: asked for key, asked in self.asked.items() if key[0] != session}

    def schedule(self) -> list[Scheduled]:
        scheduled = self.scheduler.schedule(self.now_s)
        self._check_step(scheduled)
        assert scheduled or self.scheduler.next_due_s(self.now_s) != 0, "nothing was scheduled, and something is ready"
        self.steps.append(scheduled)
        return scheduled

    def finish(self, scheduled: list[Scheduled], compute_s: float = 0.06) -> list[Outcome]:
        drawn = self.model.run(scheduled, self.tables)
        return self.take(scheduled, drawn, compute_s)

    def take(self, scheduled: list[Scheduled], drawn: list[int | None], compute_s: float = 0.06) -> list[Outcome]:
        self.now_s += compute_s
        outcomes = self.scheduler.took(scheduled, drawn, dict.fromkeys(range(8), (STOP,)), compute_s, self.now_s)
        for outcome in outcomes:
            self._check_outcome(outcome)
        return outcomes

    def step(self) -> list[Outcome]:
        """One step; waits for it if nothing is ready yet. [] only if nothing will be without a new call."""
        for _ in range(1 + len(self.asked)):
            scheduled = self.schedule()
            if scheduled:
                return self.finish(scheduled)
            due_s = self.scheduler.next_due_s(self.now_s)
            if due_s is None:
                assert not any(asked.draws for asked in self.asked.values()), "a request starves"
                return []
            self.now_s += due_s + 1e-9
        raise AssertionError("waited for a step as often as there are requests, in vain")

    def run_out(self) -> None:
        """Steps until no request wants a draw."""
        while self.step():
            pass
        while any(asked.draws for asked in self.asked.values()):
            self.step()

    def _check_outcome(self, outcome: Outcome) -> None:
        asked = self.asked[outcome.key]
        assert outcome.token == run_alone(asked.tokens), f"request {outcome.key} drew another token than alone"
        asked.tokens.append(outcome.token)
        asked.outcomes.append(outcome)
        asked.draws = 0 if outcome.token == STOP else asked.draws - 1
        assert outcome.last == (not asked.draws)
        assert outcome.queued_s >= 0 and outcome.compute_s > 0
        if outcome.last and asked.ends:
            del self.asked[outcome.key]

    def _check_step(self, scheduled: list[Scheduled]) -> None:
        batching, runs = self.scheduler.batching, [each.run for each in scheduled]
        tokens = sum(run.tokens.size for run in runs)
        assert self.scheduler.live <= (1 if batching.turns == "whole" else batching.max_requests)
        assert len({each.key for each in scheduled}) == len(runs)
        assert all(each.run.tokens.size and each.request.runs for each in scheduled)
        assert all(len(run.blocks) == self.tables.blocks_of(run.position + run.tokens.size) for run in runs)
        if batching.merges == "all":
            assert tokens <= batching.step_tokens
            return
        assert all(run.draws for run in runs)
        assert len(runs) <= 1 or (batching.merges != "nothing" and tokens <= batching.step_tokens)
        if batching.merges == "alike":
            assert len({(run.position, run.tokens.size) for run in runs}) <= 1
        if batching.merges == "lengths":
            assert len({run.position > 0 and run.tokens.size == 1 for run in runs}) <= 1

    def check_blocks(self) -> None:
        """Each block has as many holders as tables name it, and holds the entries of the tokens of each of them."""
        holders = [0] * self.tables.blocks
        for request in self.scheduler.requests.values():
            entry = 1
            for position, token in enumerate(request.known[: request.computed].tolist()):
                entry = _mixed(entry, token)
                block = request.table[position // POSITIONS]
                assert self.model.memory[block][position % POSITIONS] == entry, f"block {block} has other tokens than {request.key}"
            for block in request.table:
                holders[block] += 1
        assert holders == [self.tables.holders(block) for block in range(self.tables.blocks)]
        assert self.tables.held == sum(count > 0 for count in holders)
        assert self.tables.shared == sum(count > 1 for count in holders)
