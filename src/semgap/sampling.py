"""The sampling rule: which token follows from a row of logits. The same code on whichever side samples."""

from __future__ import annotations

import numpy as np


def greedy(logits: np.ndarray) -> int:
    """The index of the largest of `logits` (vocab,), the lowest one among equals."""
    return int(np.argmax(logits))
