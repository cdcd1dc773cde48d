"""One step of the engine over several requests: the tokens that each feeds, and where its KV blocks lie."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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
