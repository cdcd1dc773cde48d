"""The order of evictions in a trial, and which phases have a control beside them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from semgap.client.control import Control, no_control
from semgap.client.pressure import evictions, layers_to_evict
from semgap.client.spec import Phase
from semgap.policy import Policy, Reply

FRACTIONS = (0.0, 0.125, 0.5, 1.0)
EVICTING = Phase("recovery", (128,), steps=16, evict_fractions=FRACTIONS)


def _order(seed: str, steps: int = 16) -> list[float]:
    return [each.fraction for each in evictions(FRACTIONS, steps, seed)]


def test_each_block_of_steps_has_each_fraction_once() -> None:
    order = _order("0/1/1")
    assert all(sorted(order[begin : begin + 4]) == sorted(FRACTIONS) for begin in range(0, 16, 4))


def test_the_order_is_the_same_in_a_rerun_and_another_one_in_other_trials_and_requests() -> None:
    assert _order("0/1/1") == _order("0/1/1")
    assert len({tuple(_order(f"0/{trial}/{request}")) for trial in range(1, 6) for request in range(1, 6)}) == 25


def test_fewer_steps_have_the_first_of_the_same_fractions() -> None:
    for steps in range(1, 17):
        assert _order("0/1/1", steps) == _order("0/1/1")[:steps]


def test_each_fraction_follows_each_other_one() -> None:
    pairs = {pair for trial in range(20) for pair in itertools.pairwise(_order(f"0/{trial}/1"))}
    assert pairs >= set(itertools.permutations(FRACTIONS, 2))


def test_one_of_two_steps_with_a_fraction_has_a_lone_restore_now_the_first_now_the_second() -> None:
    firsts = []
    for trial, fraction in itertools.product(range(50), FRACTIONS):
        alone = [each.alone for each in evictions(FRACTIONS, 16, f"0/{trial}/1") if each.fraction == fraction]
        assert sum(alone[:2]) == sum(alone[2:]) == 1
        firsts.append(alone[0])
    assert 60 < sum(firsts) < 140  # of 200


@pytest.mark.parametrize("steps", [1, 4, 5, 7, 9, 12, 14])
def test_a_lone_restore_has_a_step_without_one_to_compare_with(steps: int) -> None:
    for trial, fraction in itertools.product(range(20), FRACTIONS):
        alone = [each.alone for each in evictions(FRACTIONS, steps, f"0/{trial}/1") if each.fraction == fraction]
        assert sum(alone) == len(alone) // 2


def test_without_fractions_nothing_is_evicted() -> None:
    assert evictions((), 16, "0/1/1") == []


@pytest.mark.parametrize(("layers", "fraction", "count"), [(30, 0.125, 4), (30, 0.5, 15), (30, 1.0, 30), (3, 0.01, 1), (30, 0.0, 0)])
def test_evicted_layers_are_as_many_as_the_fraction_rounds_to_evenly_spread_and_others_with_each_step(
    layers: int, fraction: float, count: int
) -> None:
    chosen = [layers_to_evict(layers, fraction, step) for step in range(layers)]
    assert all(len(set(each)) == count and set(each) <= set(range(layers)) for each in chosen)
    assert all(sum(layer in each for each in chosen) == count for layer in range(layers))  # over all steps each equally often
    for each in chosen if count > 1 else []:
        gaps = np.diff([*each, each[0] + layers])
        assert gaps.max() - gaps.min() <= 1


def test_phases_with_decode_steps_have_a_control_unless_their_requests_share_memory() -> None:
    assert no_control(Policy(), Phase("decode", (8,), steps=2)) is None
    assert no_control(Policy(), EVICTING) is None
    sharing = Phase("recovery", (8,), requests=4, steps=2, live_requests=4, kv_budget=0.5)
    assert "share KV memory" in (no_control(Policy(), sharing) or "")
    assert "prefill" in (no_control(Policy(), Phase("prefill", (8,))) or "")
    assert "stateless" in (no_control(Policy(kv_cache="every_step"), EVICTING) or "")


def test_a_block_of_the_control_is_a_few_steps_between_evictions_and_whole_windows_without() -> None:
    ahead = Policy(reply=Reply("token"), window=8, ahead=True, keeps="tokens")
    assert Control(None, ahead, EVICTING).block(16) == 4  # type: ignore[arg-type]
    assert Control(None, ahead, Phase("decode", (8,), steps=16)).block(16) == 16  # type: ignore[arg-type]
