"""A draw on the device is the draw of sampling.py, for every rule, with ties and without."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from semgap.engine.device_sampling import NOT_A_DISTRIBUTION, draw_on_device
from semgap.engine.sampling import draw, uniform
from semgap.policy import SamplingRule

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RULES = [
    SamplingRule(),
    SamplingRule(kind="sample"),
    SamplingRule(kind="sample", temperature=0.3),
    SamplingRule(kind="sample", top_k=1),
    SamplingRule(kind="sample", temperature=1.5, top_k=50),
    SamplingRule(kind="sample", top_p=0.9),
    SamplingRule(kind="sample", top_p=1e-9),
    SamplingRule(kind="sample", temperature=0.8, top_k=40, top_p=0.7),
    SamplingRule(kind="sample", top_k=10_000, top_p=0.99),
]


def _drawn(logits: np.ndarray, rule: SamplingRule, u: float) -> int:
    place = torch.tensor([u], dtype=torch.float64, device=DEVICE)
    return int(draw_on_device(torch.from_numpy(logits).to(DEVICE), rule, place))


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("steps", [None, 8], ids=["distinct", "tied"])
def test_the_same_token_as_on_the_host(rule: SamplingRule, steps: int | None) -> None:
    random = np.random.default_rng(4)
    seen = set()
    for position in range(60):
        logits = random.normal(0, 3, 1000).astype(np.float32)
        if steps:
            logits = np.round(logits * steps) / np.float32(steps)
        expected = draw(logits, rule, 7, 1, position)
        token = _drawn(logits, rule, uniform(7, 1, position))
        assert token == expected.token or token in expected.others
        seen.add(token)
    assert len(seen) > 10


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_distribution_is_told(bad: float) -> None:
    logits = np.full(50, -np.inf, np.float32)
    logits[7] = bad
    assert _drawn(logits, SamplingRule(kind="sample"), 0.5) == NOT_A_DISTRIBUTION
