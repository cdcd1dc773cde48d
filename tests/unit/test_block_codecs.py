"""The codecs of blocks that are saved, by what a session has measured: nothing, a fast link, or a slow one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_kv_recovery import SHAPE, caches_of, expected, run

from semgap.codecs import CodecError
from semgap.kv.block_codecs import BlockCodecs
from semgap.kv.codec_choice import CodecSpeed
from semgap.kv.handles import Live
from semgap.kv.recovery import LiveCaches
from semgap.kv.restore_costs import Costs
from semgap.policy import CodecChoice, Policy

AUTO = CodecChoice(kv="auto")
FILLED = 100
LAYER_BYTES = FILLED * 2 * SHAPE.heads * SHAPE.head_dim * 4
STEP_S = 3e-3  # of all three layers
SPEEDS = {
    "raw": CodecSpeed(),
    "planes_zstd": CodecSpeed(1.25, 1e9, 1e9),
    "int8": CodecSpeed(3.0, 1e9, 1e9),
    "int4": CodecSpeed(5.0, 1e9, 1e9),
}


def opened(keeps: str, bytes_per_s: float | None, step_s: float | None = STEP_S, staged: bool = False) -> tuple[LiveCaches, Live]:
    """A handle of a session that has measured this."""
    caches = caches_of(Policy(recovery="delta", codec=AUTO, keeps=keeps), 6, staged=staged)  # type: ignore[arg-type]
    live = caches.open(0)
    caches.forward(live, np.arange(FILLED))
    costs = caches.restorer.costs
    costs.bytes_per_s, costs.step_s, costs.prefill_tokens_per_s = bytes_per_s, step_s, FILLED / STEP_S
    costs.learn_codec = lambda name, speed: costs.codecs.update({name: SPEEDS[name]})  # type: ignore[method-assign]
    costs.learn_pass = lambda tokens, took_s: None  # type: ignore[method-assign]
    return caches, live


def came(caches: LiveCaches, live: Live, token: int = 9) -> str | None:
    _, recovered = caches.forward(live, np.array([token]))
    assert recovered is not None and recovered.fallback is None
    return recovered.kv_codecs


FAST, SLOW, SLOWEST = 2 * LAYER_BYTES / (STEP_S / 3), 0.4 * LAYER_BYTES / (STEP_S / 3), 0.1 * LAYER_BYTES / (STEP_S / 3)


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize(
    ("keeps", "bytes_per_s", "expected_text"),
    [
        ("bitwise", FAST, "raw x 3"),
        ("bitwise", SLOW, "planes_zstd x 3"),
        ("tokens", SLOWEST, "planes_zstd x 3"),
        ("lossy", FAST, "raw x 3"),
        ("lossy", SLOW, "int8 x 3"),
        ("lossy", SLOWEST, "int4 x 3"),
        ("lossy", None, "raw x 3"),
    ],
)
def test_blocks_are_saved_in_the_codec_in_which_they_will_be_in_time(
    keeps: str, bytes_per_s: float | None, expected_text: str, staged: bool
) -> None:
    caches, live = opened(keeps, bytes_per_s, staged=staged)
    caches.evict(live, [0, 1, 2])
    assert came(caches, live) == expected_text


def test_as_long_as_no_step_was_timed_a_lossy_mode_saves_exactly() -> None:
    for bytes_per_s, expected_text in ((1e11, "raw x 3"), (1e6, "planes_zstd x 3")):
        caches, live = opened("lossy", bytes_per_s, step_s=None)
        caches.evict(live, [0, 1, 2])
        assert came(caches, live) == expected_text


def test_layers_choose_for_themselves_and_blocks_that_were_saved_before_stay_as_they_are() -> None:
    caches, live = opened("lossy", 1.5 * SLOW)
    caches.evict(live, [2])  # two layers compute before it
    assert came(caches, live) == "raw x 1"
    caches.evict(live, [0, 1, 2])
    codecs = (came(caches, live, 10) or "").split(", ")
    assert codecs[-1] == "raw+int8 x 1" and codecs[0] in ("int8 x 2", "int4 x 2")
    saved = live.saved_bytes(np.ones_like(live.cache.missing))
    assert set(saved) >= {"raw", "int8"} and sum(saved.values()) == live.cache.bytes_of(np.ones_like(live.cache.missing))


def test_few_new_positions_beside_many_that_cross_as_they_are_do_not_change_for_nothing() -> None:
    caches, live = opened("lossy", None)
    caches.evict(live, [0, 1, 2])
    assert came(caches, live) == "raw x 3"  # nothing of the link was known
    caches.restorer.costs.bytes_per_s = SLOWEST
    caches.forward(live, np.arange(27))  # ends its block
    caches.evict(live, [0, 1, 2])
    assert came(caches, live) == "raw+int4 x 3"  # half of the bytes
    caches.evict(live, [0, 1, 2])
    assert came(caches, live) == "raw+planes_zstd+int4 x 3"  # the last block has one position


def test_exact_choices_give_back_the_bits_and_lossy_ones_do_not() -> None:
    for keeps, same in (("bitwise", True), ("lossy", False)):
        caches, live = opened(keeps, SLOWEST)
        caches.evict(live, [0, 1, 2])
        read, _ = caches.forward(live, np.array([9]))
        assert torch.equal(read, expected(np.append(np.arange(FILLED), 9))) is same


@pytest.mark.parametrize("bytes_per_s", [None, FAST, SLOWEST])
def test_values_that_a_lossy_codec_cannot_hold_are_saved_in_an_exact_one_or_refused_if_it_was_named(bytes_per_s: float | None) -> None:
    """Beyond fp16's range."""
    tokens = np.full(FILLED, 70_000)
    for kv in ("auto", "int8"):
        caches = caches_of(Policy(recovery="delta", codec=CodecChoice(kv=kv), keeps="lossy"), 6)
        live = caches.open(0)
        caches.forward(live, tokens)
        caches.restorer.costs.bytes_per_s, caches.restorer.costs.step_s = bytes_per_s, STEP_S
        if kv == "auto":
            caches.evict(live, [0, 1, 2])
            assert came(caches, live) in ("raw x 3", "planes_zstd x 3")
        else:
            with pytest.raises(CodecError, match="use planes_zstd or raw"):
                caches.evict(live, [0, 1, 2])


def test_a_layer_that_leaves_late_gets_fewer_bytes_than_one_in_time() -> None:
    caches, live = opened("lossy", SLOW)
    codecs = caches.restorer.codecs
    assert codecs is not None
    blocks = live.cache.dirty
    blocks[1:] = False
    layer_s = STEP_S / 3
    chosen = [codecs.sent(live, live.cache, blocks, 0, elapsed_s)[0] for elapsed_s in (-2 * layer_s, layer_s, 10 * layer_s)]
    assert chosen == ["raw", "int8", "int4"]


def test_an_opaque_object_crosses_raw_and_a_named_codec_is_never_changed_by_the_link() -> None:
    for recovery, kv, expected_codec in (("reload", "auto", "raw"), ("delta", "planes_zstd", "planes_zstd"), ("delta", "raw", "raw")):
        caches = caches_of(Policy(recovery=recovery, codec=CodecChoice(kv=kv)), 6)  # type: ignore[arg-type]
        live = caches.open(0)
        caches.forward(live, np.arange(FILLED))
        caches.evict(live, [0, 1, 2])
        assert came(caches, live) == f"{expected_codec} x 3"


@pytest.mark.parametrize(("bytes_per_s", "codec"), [(100 * FAST, "raw"), (SLOW, "int8")])
def test_a_prefix_is_published_for_a_request_with_a_block_of_tokens_after_it(bytes_per_s: float, codec: str) -> None:
    caches, live = opened("lossy", bytes_per_s)
    assert caches.shadow is not None
    costs = Costs(bytes_per_s=bytes_per_s, prefill_tokens_per_s=64 / STEP_S)
    costs.learn_codec = lambda name, speed: costs.codecs.update({name: SPEEDS[name]})  # type: ignore[method-assign]
    policy = Policy(prefix="fetch_blocks", shadow="kvhost", codec=AUTO, keeps="lossy")
    chosen = BlockCodecs(policy, caches.restorer.way, caches.shadow.transfer, costs).published(live.cache, live.cache.resident)
    assert set(chosen) == {codec} and len(chosen) == SHAPE.layers


@pytest.mark.parametrize("overlap_from_s", [0.0, math.inf])
@pytest.mark.parametrize(("kv", "known"), [("auto", True), ("raw", False)])
def test_a_step_that_missed_blocks_tells_the_time_of_a_step_without_its_wait(kv: str, known: bool, overlap_from_s: float) -> None:
    """In some phases no step is without a miss. Blocks arrive while it computes, or before."""
    caches = caches_of(Policy(recovery="delta", codec=CodecChoice(kv=kv)), 6, overlap_from_s=overlap_from_s)
    live = caches.open(0)
    caches.forward(live, np.arange(FILLED))
    caches.evict(live, [0, 1, 2])
    _, recovered = caches.forward(live, np.array([9]))
    step_s = caches.restorer.costs.step_s
    assert recovered is not None and (step_s is not None) is known
    assert step_s is None or 0 < step_s < 0.5


@pytest.mark.parametrize("overlap_from_s", [0.0, math.inf])
def test_the_few_tokens_after_blocks_that_came_do_not_count_as_a_prefill(overlap_from_s: float) -> None:
    """They are slower each, and a prefill's speed predicts what computing a whole prompt takes."""
    caches = caches_of(Policy(recovery="delta", codec=AUTO), 6, overlap_from_s=overlap_from_s)
    live = caches.open(0)
    caches.forward(live, np.arange(FILLED))
    before = caches.restorer.costs.prefill_tokens_per_s
    caches.evict(live, [0, 1, 2])
    caches.forward(live, np.arange(3))
    assert before is not None and caches.restorer.costs.prefill_tokens_per_s == before


def test_only_sessions_that_choose_time_their_passes() -> None:
    for kv, known in (("auto", True), ("raw", False)):
        caches = caches_of(Policy(recovery="delta", codec=CodecChoice(kv=kv)), 6, run)
        live = caches.open(0)
        for tokens in (np.arange(10), np.array([1])):
            caches.forward(live, tokens)
        assert (caches.restorer.costs.step_s is not None) is known
