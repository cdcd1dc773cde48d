"""The k largest of a row, the lowest ids first among equals: the tokens that sampling keeps and that codec topk sends."""

import numpy as np


def largest(rows: np.ndarray, k: int) -> np.ndarray:
    """Ids (n, k), ascending, of the k largest of each row of `rows` (n, vocab), which holds no NaN; the lowest ids among equals."""
    split = rows.shape[1] - k
    return no_less(rows, np.partition(rows, split, axis=1)[:, split], k)


def no_less(rows: np.ndarray, smallest: np.ndarray, k: int) -> np.ndarray:
    """As `largest`, for rows whose k-th largest value is known: `smallest` (n,)."""
    keep = rows >= smallest[:, None]
    surplus = np.count_nonzero(keep, axis=1) - k
    for row in np.flatnonzero(surplus):  # only rows with equals on both sides of the border
        equal = np.flatnonzero(rows[row] == smallest[row])
        keep[row, equal[equal.size - surplus[row] :]] = False
    return np.nonzero(keep)[1].reshape(len(rows), k)
