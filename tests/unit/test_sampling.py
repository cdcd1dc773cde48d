"""The sampling rule: right distribution, right sets, and the same token on either side."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import semgap
from semgap.engine.sampling import EDGE, Draw, draw, greedy, uniform
from semgap.policy import SamplingRule

SAMPLE = SamplingRule("sample")
SOURCE = Path(semgap.__file__).parents[1]


def logits_of(probabilities: list[float]) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.array(probabilities)).astype(np.float32)


def counts(logits: np.ndarray, rule: SamplingRule, draws: int = 3000) -> np.ndarray:
    tokens = [draw(logits, rule, seed=11, request=3, position=position).token for position in range(draws)]
    return np.bincount(tokens, minlength=logits.size)


def plain_set(logits: np.ndarray, rule: SamplingRule) -> list[int]:
    """The ids that top_k, then top_p keep, in the simplest way: largest first, among equals the lowest ids first."""
    order = sorted(range(logits.size), key=lambda i: (-logits[i], i))
    if rule.top_k:
        order = order[: rule.top_k]
    weights = [math.exp((float(logits[i]) - float(logits[order[0]])) / rule.temperature) for i in order]
    if rule.top_p < 1:
        target, total, count = rule.top_p * sum(weights), 0.0, 0
        while total < target:
            total += weights[count]
            count += 1
        order = order[:count]
    return sorted(order)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (SAMPLE, [0.1, 0.4, 0.05, 0.25, 0.2]),
        (SamplingRule("sample", temperature=0.5), [0.01, 0.16, 0.0025, 0.0625, 0.04]),
        (SamplingRule("sample", temperature=2.0), [0.1**0.5, 0.4**0.5, 0.05**0.5, 0.5, 0.2**0.5]),
        (SamplingRule("sample", top_k=3), [0, 0.4, 0, 0.25, 0.2]),
        (SamplingRule("sample", top_p=0.6), [0, 0.4, 0, 0.25, 0]),
        (SamplingRule("sample", temperature=2.0, top_k=4, top_p=0.5), [0, 0.4**0.5, 0, 0.5, 0]),
    ],
)
def test_tokens_come_in_their_proportions(rule: SamplingRule, expected: list[float]) -> None:
    seen = counts(logits_of([0.1, 0.4, 0.05, 0.25, 0.2]), rule)
    wanted = np.array(expected) / sum(expected) * seen.sum()
    possible = wanted > 0
    assert seen[~possible].sum() == 0
    chi_square = ((seen - wanted)[possible] ** 2 / wanted[possible]).sum()
    assert chi_square < 18.5  # 99.9% with 4 degrees of freedom


def test_uniforms_are_spread_evenly_over_positions_requests_and_seeds() -> None:
    for numbers in (
        [uniform(1, 2, i) for i in range(4000)],
        [uniform(1, i, 2) for i in range(4000)],
        [uniform(i, 1, 2) for i in range(4000)],
    ):
        seen = np.bincount((np.array(numbers) * 16).astype(int), minlength=16)
        assert ((seen - 250) ** 2 / 250).sum() < 37.7  # 99.9% with 15 degrees of freedom
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.05


def test_the_generator_is_philox_4x64_10() -> None:
    """The known answer of Random123's test vectors for key 0 and counter 0, which numpy reaches from a counter of all ones."""
    assert int(np.random.Philox(key=0, counter=[2**64 - 1] * 4).random_raw()) == 0x16554D9ECA36314C
    assert uniform(7, 9, 41) == (int(np.random.Philox(key=[7, 9], counter=[41, 0, 0, 0]).random_raw()) >> 11) / 2**53


def test_a_draw_depends_on_each_of_seed_request_and_position() -> None:
    assert len({uniform(*key) for key in [(1, 2, 3), (2, 1, 3), (1, 3, 2), (3, 2, 1), (0, 2, 3), (1, 0, 3), (1, 2, 0)]}) == 7


@pytest.mark.parametrize("name", ["seed", "request", "position"])
@pytest.mark.parametrize("value", [-1, 2**64])
def test_numbers_that_the_generator_does_not_take_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        uniform(**({"seed": 0, "request": 0, "position": 0} | {name: value}))


def test_the_order_of_calls_changes_nothing() -> None:
    logits = np.random.default_rng(1).normal(size=1000).astype(np.float32)
    forward = [draw(logits, SAMPLE, 5, 0, position) for position in range(50)]
    backward = [draw(logits, SAMPLE, 5, 0, position) for position in reversed(range(50))]
    assert forward == backward[::-1]


@given(
    seed=st.integers(0, 2**32),
    vocab=st.integers(1, 12),
    rounded=st.booleans(),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([0.05, 0.5, 0.77, 0.999, 1.0]),
    temperature=st.sampled_from([0.3, 1.0, 5.0]),
)
@settings(max_examples=150, deadline=None)
def test_the_kept_set_is_the_smallest_and_ties_go_to_the_lowest_ids(
    seed: int, vocab: int, rounded: bool, top_k: int, top_p: float, temperature: float
) -> None:
    logits = np.random.default_rng(seed).normal(size=vocab).astype(np.float32)
    if rounded:
        logits = np.round(logits)
    rule = SamplingRule("sample", temperature, top_k, top_p)
    kept = plain_set(logits, rule)
    weights = np.exp((logits[kept].astype(float) - logits.max()) / temperature)
    edges = np.cumsum(weights) / weights.sum()
    for position in range(10):
        got = draw(logits, rule, seed, 0, position)
        drawn = uniform(seed, 0, position)
        if np.abs(edges - drawn).min() > 1e-9 and np.abs(edges - top_p).min() > 1e-9:  # else rounding may decide
            expected = kept[min(int(np.searchsorted(edges, drawn, side="right")), len(kept) - 1)]
            assert got.token == expected


def test_top_p_over_a_large_vocabulary_keeps_what_a_full_sort_keeps() -> None:
    logits = np.random.default_rng(3).normal(scale=4, size=20_000).astype(np.float32)
    for top_p in (0.1, 0.9, 0.9999):
        rule = SamplingRule("sample", top_p=top_p)
        kept = np.array(plain_set(logits, rule))
        edges = np.cumsum(np.exp(logits[kept].astype(float) - logits.max()))
        for position in range(20):
            expected = kept[np.searchsorted(edges, uniform(1, 1, position) * edges[-1], side="right")]
            assert draw(logits, rule, 1, 1, position).token == expected


def test_rules_that_keep_everything_are_plain_temperature() -> None:
    logits = np.random.default_rng(4).normal(size=300).astype(np.float32)
    for rule in (SamplingRule("sample", top_k=300), SamplingRule("sample", top_k=5000)):
        assert [draw(logits, rule, 1, 0, i) for i in range(50)] == [draw(logits, SAMPLE, 1, 0, i) for i in range(50)]


@given(
    seed=st.integers(0, 2**32),
    top_k=st.sampled_from([0, 1, 2, 5]),
    top_p=st.sampled_from([0.5, 0.9, 1.0]),
    gap=st.sampled_from([0.0, 1e-6, 1e-3]),
)
@settings(max_examples=100, deadline=None)
def test_errors_in_the_last_bits_lead_only_to_the_others_of_a_draw(seed: int, top_k: int, top_p: float, gap: float) -> None:
    """Also if logits tie or nearly tie at the border of the kept set, and so change the set."""
    rng = np.random.default_rng(seed)
    logits = rng.choice(np.array([0.0, 0.5, 1.0, 3.0], dtype=np.float32), 9) + (rng.random(9) * gap).astype(np.float32)
    disturbed = logits + rng.choice(np.array([-1e-6, 1e-6], dtype=np.float32), 9)
    rule = SamplingRule("sample", top_k=top_k, top_p=top_p)
    for position in range(20):
        here, there = draw(logits, rule, seed, 0, position), draw(disturbed, rule, seed, 0, position)
        assert there.token in (here.token, *here.others)


@pytest.mark.parametrize(("away", "token", "others"), [(-EDGE / 2, 1, (0,)), (EDGE / 2, 0, (1,)), (-2 * EDGE, 1, ()), (2 * EDGE, 0, ())])
def test_the_others_are_the_tokens_beyond_an_edge_that_is_near(away: float, token: int, others: tuple[int, ...]) -> None:
    edge = uniform(9, 9, 4) + away
    assert draw(logits_of([edge, 0.9 - edge, 0.1]), SAMPLE, 9, 9, 4) == Draw(token, others)


def test_every_token_within_reach_of_an_edge_is_among_the_others() -> None:
    edge = uniform(9, 9, 4) + EDGE / 4
    tiny = [EDGE / 2] * 3  # the edge of the second of them, and so the third, is within EDGE; the fourth token is not
    assert draw(logits_of([edge, *tiny, 0.9 - edge - sum(tiny), 0.1]), SAMPLE, 9, 9, 4) == Draw(0, (1, 2))


def test_few_draws_of_a_real_sized_vocabulary_have_others() -> None:
    logits = np.random.default_rng(5).normal(scale=4, size=49_152).astype(np.float32)
    for rule in (SamplingRule("sample", top_k=50), SamplingRule("sample", top_p=0.9), SamplingRule("sample", 0.7, 50, 0.9)):
        near = [draw(logits, rule, 1, 0, position).others for position in range(100)]
        assert sum(bool(others) for others in near) <= 5


def test_a_single_token_is_drawn_without_others() -> None:
    assert draw(logits_of([0.1, 0.9]), SamplingRule("sample", top_k=1), 0, 0, 0) == Draw(1)
    assert draw(np.zeros(1, dtype=np.float32), SAMPLE, 0, 0, 0) == Draw(0)


@pytest.mark.parametrize("height", [0.0, 30.0])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_either_token_of_a_tie_for_the_only_place_may_be_drawn(height: float, temperature: float) -> None:
    logits = np.array([height, height, height - 1], dtype=np.float32)
    assert draw(logits, SamplingRule("sample", temperature, top_k=1), 0, 0, 0) == Draw(0, (1,))


def test_a_near_tie_that_would_put_a_token_before_the_first_is_another_where_it_would_be_drawn() -> None:
    logits = logits_of([0.1, 0.8, 0.1])
    logits[0] -= np.float32(1e-6)  # so that {1, 2} is kept, and the other side may keep {0, 1}
    rule = SamplingRule("sample", top_k=2)
    for position in range(60):
        drawn, got = uniform(4, 0, position), draw(logits, rule, 4, 0, position)
        assert (0 in got.others) == (drawn < 0.2 / 0.9 + EDGE)
        assert (1 in got.others) == (drawn > 0.8 / 0.9)
    assert min(uniform(4, 0, position) for position in range(60)) < 0.1


def test_a_sum_near_top_p_leaves_open_whether_the_next_token_is_kept() -> None:
    logits = logits_of([0.2, 0.5, 0.3])
    rule = SamplingRule("sample", top_p=0.8)  # {1, 2}, or all three where the two weigh a trifle less
    drawn = {position: draw(logits, rule, 4, 0, position) for position in range(40)}
    assert any(0 in (got.token, *got.others) for got in drawn.values())
    assert all(0 not in (got.token, *got.others) for position, got in drawn.items() if uniform(4, 0, position) > 0.5)


def test_tokens_without_weight_are_never_drawn() -> None:
    logits = np.array([-np.inf, 1.0, -np.inf, 1.0, -1e30, -np.inf], dtype=np.float32)
    for rule in (SAMPLE, SamplingRule("sample", top_k=5), SamplingRule("sample", top_p=0.99), SamplingRule("sample", 1e-300)):
        assert set(np.flatnonzero(counts(logits, rule, 100))) == {1, 3}


def test_greedy_takes_the_lowest_id_of_the_largest() -> None:
    logits = np.array([0.0, 2.0, 1.0, 2.0], dtype=np.float32)
    assert greedy(logits) == 1
    assert draw(logits, SamplingRule(), 1, 2, 3) == Draw(1)


@pytest.mark.parametrize("logits", [[0.0, np.nan], [0.0, np.inf], [-np.inf, -np.inf]])
def test_logits_without_a_distribution_are_refused(logits: list[float]) -> None:
    for rule in (SAMPLE, SamplingRule("sample", top_k=1), SamplingRule("sample", top_p=0.5)):
        with pytest.raises(ValueError, match="no distribution"):
            draw(np.array(logits, dtype=np.float32), rule, 0, 0, 0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"kind": "beam"}, "kind 'beam'.*use greedy or sample"),
        ({"kind": "sample", "temperature": 0.0}, "temperature is 0.0.*greedy"),
        ({"kind": "sample", "temperature": math.nan}, "temperature is nan"),
        ({"kind": "sample", "temperature": math.inf}, "temperature is inf"),
        ({"kind": "sample", "top_k": -1}, "top_k is -1.*0 for the whole"),
        ({"kind": "sample", "top_p": 0.0}, "top_p is 0.0"),
        ({"kind": "sample", "top_p": 1.1}, "top_p is 1.1"),
        ({"temperature": 0.7}, "greedy takes no temperature.*kind: sample"),
        ({"kind": "sample", "top_q": 1}, "top_q"),
    ],
)
def test_a_rule_that_cannot_be_is_refused_with_the_way_out(row: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        msgspec.convert(row, SamplingRule)


def test_a_rule_out_of_config_is_the_rule() -> None:
    row = {"kind": "sample", "temperature": 0.7, "top_k": 50, "top_p": 0.9}
    assert msgspec.convert(row, SamplingRule) == SamplingRule("sample", 0.7, 50, 0.9)
