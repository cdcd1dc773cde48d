"""What counts as local's token: its own, and after a recompute in other shapes one whose logit is as good as the largest."""

from __future__ import annotations

import numpy as np
import pytest

from semgap.experiment.exactness import MARGINS, Logits, compare, margin_of, summarise
from semgap.policy import Policy


def _reference(runner_up: float) -> Logits:
    """Two steps of one request that drew tokens 3 and 2, with token 5 behind by `runner_up` in the first."""
    rows = np.zeros((1, 2, 8), np.float32)
    rows[0, 0, 3], rows[0, 0, 5], rows[0, 1, 2] = 4.0, 4.0 - runner_up, 4.0
    return Logits(np.array([[3, 2]]), last_logits=rows)


@pytest.mark.parametrize(("runner_up", "kept"), [(0.0005, True), (0.002, False)])
def test_another_token_is_excused_within_the_margin_alone_and_what_follows_it_is_not_compared(runner_up: float, kept: bool) -> None:
    rows = compare(_reference(runner_up), Logits(np.array([[5, 7]])), whole=False, margin=MARGINS["float32"])
    assert [row["edge_draw"] for row in rows] == [kept, False]
    assert [row["token_match"] for row in rows] == ([False, None] if kept else [False, False])
    assert summarise(rows, "tokens")["edge_draws"] == kept


def test_without_a_margin_the_nearest_tie_breaks_the_promise() -> None:
    rows = compare(_reference(1e-6), Logits(np.array([[5, 2]])), whole=False)
    assert not rows[0]["edge_draw"] and not summarise(rows, "tokens")["promise_kept"]


@pytest.mark.parametrize(
    ("policy", "margin"),
    [
        (Policy(recovery="recompute", keeps="tokens"), 1e-3),
        (Policy(recovery="auto", keeps="tokens"), 1e-3),
        (Policy(recovery="recompute", keeps="tokens", replay="exact"), 0.0),
        (Policy(recovery="recompute"), 0.0),
        (Policy(recovery="delta", keeps="tokens"), 0.0),
        (Policy(keeps="tokens"), 0.0),
    ],
)
def test_only_modes_that_recompute_in_one_prefill_have_a_margin(policy: Policy, margin: float) -> None:
    assert margin_of(policy, "float32") == margin
