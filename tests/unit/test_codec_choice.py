"""The codec of each layer by its deadline: whatever the layers and the link, it keeps to the bound and to the deadlines, and a slower link
gets fewer bytes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semgap.kv.codec_choice import CodecSpeed, Coming, arrivals_s, by_run, choose, deadlines_s
from semgap.kv.restore_costs import Costs
from semgap.policy import KV_CODECS, CodecChoice, Policy

LAYERS, LAYER_BYTES, LAYER_S, TRIP_S = 12, 100_000, 1e-3, 1e-3
SPEEDS = {
    "raw": CodecSpeed(),
    "planes_zstd": CodecSpeed(1.2, 3e8, 5e8),
    "int8": CodecSpeed(3.5, 5e8, 1e9),
    "int4": CodecSpeed(6.0, 4e8, 8e8),
}


def per_byte(bytes_per_s: float, names: Sequence[str] = KV_CODECS, speeds: dict[str, CodecSpeed] = SPEEDS) -> dict[str, float]:
    costs = Costs(bytes_per_s=bytes_per_s, codecs=speeds)
    return {name: costs.fetched_s_per_byte(name) or 0.0 for name in names}


def all_layers() -> list[Coming]:
    return [Coming(LAYER_BYTES, LAYER_S * layer) for layer in range(LAYERS)]


@pytest.mark.parametrize(
    ("bytes_per_s", "expected"), [(1e12, "raw"), (1.01 * LAYER_BYTES / LAYER_S, "raw"), (0.5e8, "int8"), (0.3e8, "int4"), (1e3, "int4")]
)
def test_a_slower_link_gets_a_codec_of_fewer_bytes_for_layers_that_all_miss(bytes_per_s: float, expected: str) -> None:
    assert choose(all_layers(), per_byte(bytes_per_s), TRIP_S, LAYER_S) == [expected] * LAYERS


def test_a_mode_with_exact_codecs_takes_the_quicker_of_them_where_neither_is_in_time() -> None:
    for bytes_per_s, expected in ((0.9e8, "planes_zstd"), (1e7, "planes_zstd"), (1e12, "raw")):
        speeds = SPEEDS | {"planes_zstd": CodecSpeed(1.3, 3e8, 1e9)}
        assert set(choose(all_layers(), per_byte(bytes_per_s, KV_CODECS[:2], speeds), TRIP_S, 0.9 * LAYER_S)) == {expected}


def test_layers_with_time_before_them_stay_exact_and_the_first_ones_do_not() -> None:
    """Every fourth layer misses: between two of them four layers compute."""
    layers = [Coming(LAYER_BYTES, LAYER_S * layer) for layer in range(0, LAYERS, 4)]
    assert choose(layers, per_byte(0.5e8), TRIP_S, LAYER_S) == ["int8", "raw", "raw"]


def test_blocks_that_cross_in_a_codec_of_before_take_the_time_of_those_after_them() -> None:
    layers = [Coming(LAYER_BYTES // 8, 4 * LAYER_S * layer, fixed_s=4 * LAYER_S) for layer in range(3)]
    assert (
        set(choose(layers, per_byte(0.5e8), TRIP_S, LAYER_S))
        != {"raw"}
        == set(choose([Coming(each.tensor_bytes, each.due_s) for each in layers], per_byte(0.5e8), TRIP_S, LAYER_S))
    )


def test_a_layer_that_nothing_brings_in_time_puts_off_those_after_it_and_they_are_not_late_for_it() -> None:
    layers = [Coming(LAYER_BYTES // 2, LAYER_S * layer, fixed_s=50 * LAYER_S * (layer == 0)) for layer in range(4)]
    assert choose(layers, per_byte(1e8), TRIP_S, LAYER_S) == ["int4", "raw", "raw", "raw"]


WORK = st.lists(st.builds(Coming, st.integers(0, 1_000_000), st.just(0.0), st.floats(0, 0.02)), min_size=1, max_size=10)
GAPS = st.lists(st.floats(0, 0.02), min_size=10, max_size=10)
RATIOS = st.lists(st.floats(1.0, 3.0), min_size=3, max_size=3)
DECODED = st.lists(st.floats(1e6, 1e11), min_size=3, max_size=3)
LINK = st.floats(1e3, 1e11)


def work_of(work: list[Coming], gaps: list[float]) -> list[Coming]:
    """The layers of `work`, each due a gap after the one before."""
    return [Coming(one.tensor_bytes, due, one.fixed_s) for one, due in zip(work, itertools.accumulate(gaps), strict=False)]


def speeds_of(ratios: list[float], decoded: list[float]) -> dict[str, CodecSpeed]:
    """Codecs each of which makes no more bytes than the one before."""
    found, ratio = {"raw": CodecSpeed()}, 1.0
    for name, more, speed in zip(KV_CODECS[1:], ratios, decoded, strict=True):
        ratio *= more
        found[name] = CodecSpeed(ratio, speed, speed)
    return found


def seconds(layers: list[Coming], chosen: list[str], costs: dict[str, float]) -> list[float]:
    return arrivals_s(layers, [costs[name] for name in chosen], TRIP_S)


@given(WORK, GAPS, RATIOS, DECODED, LINK, st.floats(0, 0.02), st.sampled_from(["bitwise", "tokens", "lossy"]))
def test_no_choice_is_outside_of_what_keeps_allows_nor_later_than_one_codec_for_all(
    work: list[Coming], gaps: list[float], ratios: list[float], decoded: list[float], link: float, layer_s: float, keeps: str
) -> None:
    policy = Policy(recovery="delta", keeps=keeps, codec=CodecChoice(kv="auto"))  # type: ignore[arg-type]
    layers, costs = work_of(work, gaps), per_byte(link, policy.kv_codecs, speeds_of(ratios, decoded))
    chosen = choose(layers, costs, TRIP_S, layer_s)
    assert set(chosen) <= ({*KV_CODECS} if keeps == "lossy" else {"raw", "planes_zstd"}) and len(chosen) == len(layers)
    here = seconds(layers, chosen, costs)
    for name in costs:
        uniform = seconds(layers, [name] * len(layers), costs)
        literal = deadlines_s(layers, [-math.inf] * len(layers), TRIP_S, layer_s)
        if all(own <= due for own, due in zip(uniform, literal, strict=True)):  # a codec brings all in time: so does the choice
            assert all(own <= due + 1e-9 for own, due in zip(here, literal, strict=True))
    quickest = [min(each) for each in zip(*(seconds(layers, [name] * len(layers), costs) for name in costs), strict=True)]
    waits = max(own - due for own, due in zip(here, deadlines_s(layers, quickest, TRIP_S, layer_s), strict=True))
    assert waits <= 1e-9 + 1e-6 * max(here)  # no layer waits longer than it would with the quickest codec for all


@given(WORK, GAPS, RATIOS, DECODED, LINK, st.floats(1, 100), st.floats(0, 0.02))
def test_over_a_slower_link_no_layer_gets_a_codec_with_more_bytes(
    work: list[Coming], gaps: list[float], ratios: list[float], decoded: list[float], link: float, slower: float, layer_s: float
) -> None:
    layers, speeds = work_of(work, gaps), speeds_of(ratios, decoded)
    fast, slow = (choose(layers, per_byte(rate, KV_CODECS, speeds), TRIP_S, layer_s) for rate in (link, link / slower))
    for one, other, layer in zip(fast, slow, layers, strict=True):
        if layer.tensor_bytes:
            assert speeds[other].ratio >= speeds[one].ratio * (1 - 1e-9), (fast, slow)


def test_nothing_is_chosen_for_no_layers_and_a_text_says_what_was_chosen_in_the_order_of_the_layers() -> None:
    assert choose([], per_byte(1e8), TRIP_S, LAYER_S) == [] and by_run([]) == ""
    assert by_run(["raw", "raw", "int8", "raw+int8", "raw"]) == "raw x 2, int8 x 1, raw+int8 x 1, raw x 1"


def test_costs_keep_means_of_each_codec_apart_and_the_quickest_is_measured() -> None:
    costs = Costs(bytes_per_s=1e8)
    assert costs.quickest(KV_CODECS) == "raw"  # nothing was measured
    costs.learn_codec("int8", CodecSpeed(4.0, 1e9, 1e9))
    costs.learn_codec("int8", CodecSpeed(2.0, 1e9, 1e9))
    assert np.isclose(costs.codecs["int8"].ratio, 3.4) and costs.quickest(KV_CODECS) == "int8"
    assert costs.fetch_s({"raw": 10**8, "int8": 10**8}) == pytest.approx(1 + 1 / 3.4 + 0.1)
    assert Costs().fetch_s({"raw": 1}) is None and Costs().quickest(KV_CODECS) == "raw"
