"""One step of the engine over several requests: the tokens that each feeds, and where its KV blocks lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from semgap.kv.pool import BLOCK


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens of one request: `tokens` (n,), int64, stand at `position` and on.

    `blocks`: numbers in the pool of the blocks of positions 0, 64, ...; they cover position + n. Blocks below `position` are filled. Two
    runs may share filled blocks, never one that either of them writes. `draws`: the logits of the last token are wanted.
    """

    tokens: np.ndarray
    position: int
    blocks: Sequence[int]
    draws: bool

    @property
    def end(self) -> int:
        """Positions that are filled after the step."""
        return self.position + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of m runs, one run after the other, and the blocks that each run sees, in int64.

    `tokens`, `positions` (n,). `edges` [m + 1, 2]: each run's first row and the first of its `blocks` (k,); last n and k. `places` (n,):
    the index in `blocks` of the block that a row writes.
    """

    tokens: np.ndarray
    positions: np.ndarray
    edges: np.ndarray
    places: np.ndarray
    blocks: np.ndarray

    @classmethod
    def of_slab(cls, tokens: np.ndarray, position: int) -> Rows:
        """The rows of a request whose positions all lie in one block, number 0."""
        positions = np.arange(position, position + len(tokens))
        return cls(tokens, positions, np.array([[0, 0], [len(tokens), 1]]), np.zeros_like(positions), np.zeros(1, np.int64))

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Rows:
        """The rows of runs over blocks of 64 positions."""
        seen = [-(-run.end // BLOCK) for run in runs]
        edges = np.cumsum([[0, 0], *([len(run.tokens), blocks] for run, blocks in zip(runs, seen, strict=True))], axis=0)
        positions = np.concatenate([np.arange(run.position, run.end) for run in runs])
        places = np.repeat(edges[:-1, 1], np.diff(edges[:, 0])) + positions // BLOCK
        blocks = np.concatenate([np.asarray(run.blocks[:count], np.int64) for run, count in zip(runs, seen, strict=True)])
        return cls(np.concatenate([run.tokens for run in runs]), positions, edges, places, blocks)


def drawn_rows(runs: Sequence[Run]) -> np.ndarray:
    """The rows, among all rows of the runs, whose logits are wanted: the last one of each run that draws."""
    last = np.cumsum([len(run.tokens) for run in runs]) - 1
    return last[np.array([run.draws for run in runs], bool)]


def checked_rows(runs: Sequence[Run], vocab: int, max_length: int, blocks: int) -> Rows:
    """The rows of runs over a pool of so many blocks.

    ValueError for no runs, a token outside the vocabulary, a run beyond `max_length`, blocks that are too few or not of the pool, or a
    block that one run writes and another holds.
    """
    if not runs:
        raise ValueError("a step needs 1 or more runs")
    for number, run in enumerate(runs):
        if run.position < 0 or run.end > max_length:
            raise ValueError(f"run {number}: {run.position} + {len(run.tokens)} positions do not fit max_length {max_length}")
        if len(run.blocks) * BLOCK < run.end:
            raise ValueError(f"run {number}: {len(run.blocks)} blocks of {BLOCK} positions do not hold {run.end}")
        if not len(run.tokens):
            raise ValueError(f"run {number} has no tokens; a run feeds 1 or more")
    rows = Rows.of(runs)
    if rows.tokens.min() < 0 or rows.tokens.max() >= vocab:
        raise ValueError(f"tokens must be ids in 0..{vocab - 1}, not {rows.tokens.min()}..{rows.tokens.max()}")
    if rows.blocks.min() < 0 or rows.blocks.max() >= blocks:
        raise ValueError(f"block numbers must be in 0..{blocks - 1}, not {rows.blocks.min()}..{rows.blocks.max()}")
    written = rows.blocks[rows.places]
    holders = np.bincount(rows.blocks)[written]
    if holders.max() > 1:
        block = written[holders.argmax()]
        raise ValueError(f"block {block} is written by a run and stands in another; runs share filled blocks alone")
    return rows
