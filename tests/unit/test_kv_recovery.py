"""KV blocks under pressure, over a forward pass whose keys and values are known numbers: whatever happens, they are read right."""

from __future__ import annotations

import math
import threading
from concurrent.futures.thread import BrokenThreadPool

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from semgap.engine.eager import slab_cache
from semgap.kv.blocks import KVCache
from semgap.kv.codec_choice import CodecSpeed
from semgap.kv.gpu_pool import GpuPool
from semgap.kv.handles import Live, RecoveryError, UnknownHandle
from semgap.kv.pool import BLOCK, HostPool, KVBudgetError, KVShape
from semgap.kv.recovery import LiveCaches
from semgap.kv.restore_costs import Costs
from semgap.kv.shadow import ShadowError, transfer_of
from semgap.kv.worker_shadow import WorkerShadow
from semgap.policy import CodecChoice, Policy
from semgap.tensors import DType
from semgap.wire.ledger import Ledger

CPU = "cpu"
SHAPE = KVShape(layers=3, heads=2, max_length=2 * BLOCK + 20, head_dim=2)


def keys_of(tokens: np.ndarray, layer: int) -> torch.Tensor:
    """What a layer's keys are for tokens from position 0 on, (heads, n, head_dim); values are the negatives."""
    numbers = 1000 * layer + torch.as_tensor(tokens, dtype=torch.float32) + 0.001 * torch.arange(len(tokens))
    return numbers[None, :, None].expand(SHAPE.heads, -1, SHAPE.head_dim)


def run(tokens: np.ndarray, cache: KVCache) -> torch.Tensor:
    """A forward pass that appends known numbers and hands back all that attention would have read."""
    read = []
    for index, layer in enumerate(slab_cache(cache).layers):
        begin = layer.get_seq_length()
        held = keys_of(np.concatenate([np.zeros(begin), tokens]), index)[:, begin:]
        read += layer.update(held[None], -held[None])
    return torch.stack([part[0] for part in read])


def expected(tokens: np.ndarray) -> torch.Tensor:
    return torch.stack([sign * keys_of(tokens, layer) for layer in range(SHAPE.layers) for sign in (1, -1)])


def caches_of(policy: Policy, slabs: int, run_with: object = run, overlap_from_s: float = 0.0, staged: bool = False) -> LiveCaches:
    """`staged`: blocks leave and come back as they do with a GPU, by way of memory of their own, and of the device's codecs."""
    ledger = Ledger()
    budget = slabs * SHAPE.nbytes(4) // SHAPE.layers
    pool = GpuPool(SHAPE, DType.F32, CPU, budget) if staged else HostPool(SHAPE, DType.F32, budget)
    shadow = None if policy.recovery == "recompute" else WorkerShadow(ledger, transfer_of(pool))
    return LiveCaches(pool, policy, shadow, run_with, ledger, (), overlap_from_s)  # type: ignore[arg-type]


class Pressure(RuleBasedStateMachine):
    """Any sequence of appends, evictions, restores, rewinds and releases over several handles, against plain lists of tokens."""

    @initialize(
        recovery=st.sampled_from(["reload", "recompute", "delta", "auto"]),
        codec=st.sampled_from(["raw", "planes_zstd", "auto"]),
        slabs=st.integers(3, 8),
        keeps=st.sampled_from(["bitwise", "tokens"]),
        overlap_from_s=st.sampled_from([0.0, math.inf]),
        staged=st.booleans(),
    )
    def begin(self, recovery: str, codec: str, slabs: int, keeps: str, overlap_from_s: float, staged: bool) -> None:
        policy = Policy(recovery=recovery, codec=CodecChoice(kv=codec), keeps=keeps)  # type: ignore[arg-type]
        self.caches = caches_of(policy, slabs, overlap_from_s=overlap_from_s, staged=staged)
        self.tokens: dict[int, np.ndarray] = {}
        self.count = 0

    def _pick(self, index: int) -> Live:
        return self.caches.get(sorted(self.tokens)[index % len(self.tokens)])

    def _fed(self, count: int) -> np.ndarray:
        self.count += 1
        return np.arange(count, dtype=np.int64) + 7 * self.count

    def _run(self, live: Live, tokens: np.ndarray) -> None:
        read, recovered = self.caches.forward(live, tokens)
        after = np.concatenate([self.tokens[live.number], tokens])
        assert torch.equal(read, expected(after))
        assert recovered is None or recovered.fallback is None
        self.tokens[live.number] = after

    @precondition(lambda self: len(self.tokens) < 4)
    @rule(count=st.integers(1, SHAPE.max_length))
    def open(self, count: int) -> None:
        live = self.caches.open(request=0)
        self.tokens[live.number] = np.zeros(0, dtype=np.int64)
        self._run(live, self._fed(count))

    @precondition(lambda self: self.tokens)
    @rule(index=st.integers(0, 3), count=st.integers(1, BLOCK + 3))
    def append(self, index: int, count: int) -> None:
        live = self._pick(index)
        count = min(count, SHAPE.max_length - live.cache.filled)
        if count:
            self._run(live, self._fed(count))

    @precondition(lambda self: self.tokens)
    @rule(index=st.integers(0, 3), layers=st.sets(st.integers(0, SHAPE.layers - 1)))
    def evict(self, index: int, layers: set[int]) -> None:
        live = self._pick(index)
        dirty = live.cache.dirty.copy()
        slabs, moved = self.caches.evict(live, sorted(layers))
        if not dirty.any():
            assert moved.blocks == moved.payload_bytes == 0
        assert slabs <= len(layers) and not live.cache.resident[sorted(layers)].any()

    @precondition(lambda self: self.tokens)
    @rule(index=st.integers(0, 3))
    def restore(self, index: int) -> None:
        live = self._pick(index)
        self.caches.restore(live)
        assert not live.cache.missing.any()

    @precondition(lambda self: self.tokens)
    @rule(index=st.integers(0, 3), part=st.floats(0, 1))
    def rewind(self, index: int, part: float) -> None:
        live = self._pick(index)
        position = max(1, int(part * live.cache.filled))
        self.caches.rewind(live, position)
        self.tokens[live.number] = self.tokens[live.number][:position]

    @precondition(lambda self: self.tokens)
    @rule(index=st.integers(0, 3))
    def release(self, index: int) -> None:
        live = self._pick(index)
        self.caches.release(live.number)
        del self.tokens[live.number]

    @invariant()
    def what_is_there_is_right_and_the_rest_is_free(self) -> None:
        if not hasattr(self, "caches"):
            return
        held = 0
        for number, tokens in self.tokens.items():
            cache = self.caches.get(number).cache
            assert cache.filled == len(tokens) and (self.caches.get(number).tokens() == tokens).all()
            filled = np.arange(SHAPE.blocks) < -(-len(tokens) // BLOCK)
            for index, layer in enumerate(cache.layers):
                assert (cache.resident[index] == (filled if layer.slab is not None else False)).all()
                if layer.slab is not None:
                    held += 1
                    keys = keys_of(tokens, index)
                    assert (
                        torch.equal(torch.as_tensor(layer.slab)[0, 0, :, : len(tokens)], keys)
                        and np.isnan(np.asarray(layer.slab)[:, :, :, len(tokens) :]).all()
                    )
        assert (
            self.caches.pool.free_slabs * self.caches.pool.slab_nbytes
            == self.caches.pool.budget_bytes - held * self.caches.pool.slab_nbytes
        )
        for number in self.caches.pool._free:
            assert np.isnan(np.asarray(self.caches.pool.slab(number))).all()


Pressure.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestPressure = Pressure.TestCase


def _filled(policy: Policy, count: int = 2 * BLOCK + 5, slabs: int = 6) -> tuple[LiveCaches, Live, np.ndarray]:
    caches, tokens = caches_of(policy, slabs), np.arange(count)
    live = caches.open(0)
    caches.forward(live, tokens)
    return caches, live, tokens


def test_delta_moves_what_is_missing_and_reload_all_that_is_filled() -> None:
    one_layer = (2 * BLOCK + 5) * 2 * 2 * 2 * 4
    for recovery, factor in (("delta", 1), ("reload", SHAPE.layers)):
        caches, live, tokens = _filled(Policy(recovery=recovery))  # type: ignore[arg-type]
        _, moved = caches.evict(live, [1])
        assert moved.tensor_bytes == factor * one_layer
        read, recovered = caches.forward(live, np.array([9]))
        assert recovered is not None and recovered.missing_bytes == one_layer and recovered.copied_bytes == factor * one_layer
        assert torch.equal(read, expected(np.append(tokens, 9)))


def test_evicting_what_is_clean_moves_nothing_and_an_append_makes_one_block_a_layer_dirty() -> None:
    caches, live, _ = _filled(Policy(recovery="delta"))
    assert caches.evict(live, [0, 1, 2])[1].blocks == 9
    caches.restore(live)
    assert caches.evict(live, [0, 1, 2])[1].payload_bytes == 0
    caches.forward(live, np.array([9]))
    assert caches.evict(live, [0, 1, 2])[1].blocks == 3


def test_the_least_recently_used_handle_gives_way_its_first_layers_first() -> None:
    caches = caches_of(Policy(recovery="delta"), slabs=7)
    first, second = caches.open(0), caches.open(1)
    for live in (second, first):
        caches.forward(live, np.arange(5))
    caches.open(2)
    assert second.cache.without_slab() == [0, 1] and first.cache.without_slab() == []


def test_a_prefill_that_has_to_make_room_says_what_that_moved() -> None:
    caches = caches_of(Policy(recovery="delta"), slabs=4)
    first = caches.open(0)
    assert caches.forward(first, np.arange(70))[1] is None
    second = caches.open(1)
    _, room = caches.forward(second, np.arange(70))
    assert room is not None and (room.how, room.missing_bytes) == (None, 0) and room.stall_ns > 0
    assert room.copied_bytes == caches.restorer.ledger.copied == 2 * 70 * 2 * 2 * 2 * 4  # two layers
    assert caches.forward(second, np.array([1]))[1] is None


def test_a_handle_that_gave_way_before_its_first_step_still_takes_it() -> None:
    caches = caches_of(Policy(recovery="delta"), slabs=3)
    first, second = caches.open(0), caches.open(1)
    for live in (first, second, first):
        caches.forward(live, np.arange(5))
    assert torch.equal(caches.forward(first, np.array([7]))[0], expected(np.array([*range(5), *range(5), 7])))


def test_a_lost_block_is_recomputed_and_the_ledger_says_so_or_refused_with_fallback_off() -> None:
    for fallback in (True, False):
        caches, live, tokens = _filled(Policy(recovery="delta", fallback=fallback))
        caches.evict(live, [0, 2])
        assert caches.shadow is not None
        caches.shadow.forget(live.kv_id)
        if fallback:
            read, recovered = caches.forward(live, np.array([9]))
            assert recovered is not None and recovered.how == "recompute" and "not in the worker's shadow" in (recovered.fallback or "")
            assert torch.equal(read, expected(np.append(tokens, 9))) and caches.restorer.ledger.fallbacks == [recovered.fallback]
        else:
            for _ in range(2):
                with pytest.raises(RecoveryError, match="handle 1 could not be restored: block 0 of layer 0"):
                    caches.forward(live, np.array([9]))
                assert live.cache.filled == len(tokens) and live.cache.missing[[0, 2]].all()
                assert all(
                    slab is None or np.isnan(np.asarray(slab)[:, :, :, :5]).all() for slab in (live.cache.layers[i].slab for i in (0, 2))
                )


@pytest.mark.parametrize("recovery", ["delta", "reload", "auto"])
@pytest.mark.parametrize("fallback", [True, False])
def test_blocks_that_would_take_much_longer_than_computing_are_not_waited_for_if_the_mode_may_recompute(
    recovery: str, fallback: bool
) -> None:
    caches, live, tokens = _filled(Policy(recovery=recovery, fallback=fallback))  # type: ignore[arg-type]
    caches.evict(live, range(SHAPE.layers))
    missing_bytes = live.cache.bytes_of(live.cache.missing)
    caches.restorer.costs.prefill_tokens_per_s = 100.0  # of which `auto` knows, so that its patience is longer
    caches.restorer.costs.bytes_per_s = missing_bytes / 1000
    read, recovered = caches.forward(live, np.array([7]))
    assert torch.equal(read, expected(np.append(tokens, 7))) and recovered is not None
    if recovery == "auto":  # chose so
        assert (recovered.how, recovered.fallback) == ("recompute", None)
    elif fallback:
        assert recovered.how == "recompute"
        assert recovered.fallback == "slow: the blocks would take 1000.0 s; no longer than 10.0 s are waited for"
        assert caches.restorer.ledger.fallbacks == [recovered.fallback]
    else:
        assert recovered.how == recovery


class _DiesMidway(WorkerShadow):
    """A shadow that is lost after it brought its first layer."""

    def fetch(self, kv_id, cache, blocks, patience_s=None):  # type: ignore[no-untyped-def]
        arriving = super().fetch(kv_id, cache, blocks, patience_s)
        yield next(arriving)
        raise ShadowError("closed", "gone in the middle")


def test_a_fetch_that_fails_between_two_layers_leaves_the_handle_as_it_was() -> None:
    for fallback in (True, False):
        caches, live, tokens = _filled(Policy(recovery="delta", fallback=fallback))
        caches.evict(live, [0, 2])
        assert isinstance(caches.shadow, WorkerShadow)
        caches.shadow.__class__ = _DiesMidway
        if fallback:
            read, recovered = caches.forward(live, np.array([9]))
            assert recovered is not None and recovered.fallback == "closed: gone in the middle"
            assert torch.equal(read, expected(np.append(tokens, 9)))
            continue
        with pytest.raises(RecoveryError, match="gone in the middle"):
            caches.forward(live, np.array([9]))
        assert live.cache.filled == len(tokens) and live.cache.missing[2].all()
        caches.shadow.__class__ = WorkerShadow
        read, _ = caches.forward(live, np.array([9]))
        assert torch.equal(read, expected(np.append(tokens, 9)))


class _Spoils(WorkerShadow):
    """A shadow whose second layer comes damaged, written over a slab that held it, as a frame with a wrong checksum does."""

    def fetch(self, kv_id, cache, blocks, patience_s=None):  # type: ignore[no-untyped-def]
        yield next(super().fetch(kv_id, cache, blocks, patience_s))
        cache.layers[1].slab[:, :, :, :5] = 7
        raise ShadowError("checksum", "damaged on the way")


def test_a_reload_that_damages_a_layer_which_was_there_is_not_read_afterwards() -> None:
    caches, live, tokens = _filled(Policy(recovery="reload", fallback=False))
    caches.evict(live, [0])
    assert caches.shadow is not None
    caches.shadow.__class__ = _Spoils
    with pytest.raises(RecoveryError, match="damaged on the way"):
        caches.forward(live, np.array([9]))
    caches.shadow.__class__ = WorkerShadow
    read, recovered = caches.forward(live, np.array([9]))
    assert torch.equal(read, expected(np.append(tokens, 9))) and recovered is not None and recovered.how == "reload"


def test_a_step_does_not_wait_for_a_thread_that_cannot_start() -> None:
    ledger = Ledger()
    pool = HostPool(SHAPE, DType.F32, SHAPE.nbytes(4))
    caches = LiveCaches(
        pool, Policy(recovery="delta"), WorkerShadow(ledger, transfer_of(pool)), run, ledger, io_cpus=(9999,), overlap_from_s=0
    )
    live = caches.open(0)
    caches.forward(live, np.arange(70))
    caches.evict(live, [1])
    raised: list[BaseException] = []

    def step() -> None:
        try:
            caches.forward(live, np.array([9]))
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=step, daemon=True)
    thread.start()
    thread.join(10)
    assert [type(error) for error in raised] == [BrokenThreadPool]
    assert live.cache.filled == 70 and live.cache.missing[1, :2].all()


@pytest.mark.parametrize("keeps", ["bitwise", "tokens"])
def test_a_recompute_that_fails_leaves_the_handle_at_its_position_to_be_tried_again(keeps: str) -> None:
    fails = [False]

    def failing(tokens: np.ndarray, cache: KVCache) -> torch.Tensor:
        if fails[0] and len(tokens) != 70:
            run(tokens, cache)
            raise ValueError("no memory")
        return run(tokens, cache)

    caches = caches_of(Policy(recovery="recompute", keeps=keeps), 6, failing)  # type: ignore[arg-type]
    live = caches.open(0)
    for tokens in (np.arange(70), np.array([4])):
        caches.forward(live, tokens)
    caches.evict(live, [1])
    fails[0] = True
    with pytest.raises(ValueError, match="no memory"):
        caches.forward(live, np.array([9]))
    assert live.cache.filled == 71 and live.cache.missing[:, :2].all()
    fails[0] = False
    assert torch.equal(caches.forward(live, np.array([9]))[0], expected(np.array([*range(70), 4, 9])))


def test_an_exact_replay_repeats_the_shapes_that_were_fed_and_a_prefill_is_one_pass() -> None:
    for keeps, shapes in (("bitwise", [8, 1, 3]), ("tokens", [11])):
        passes: list[int] = []

        def recording(tokens: np.ndarray, cache: KVCache, passes: list[int] = passes) -> torch.Tensor:
            passes.append(len(tokens))
            return run(tokens, cache)

        caches = caches_of(Policy(recovery="recompute", keeps=keeps), 3, recording)  # type: ignore[arg-type]
        live = caches.open(0)
        for tokens in (np.arange(8), np.array([4]), np.array([1, 2, 3])):
            caches.forward(live, tokens)
        caches.rewind(live, 11)
        caches.evict(live, [1])
        passes.clear()
        read, _ = caches.forward(live, np.array([6]))
        assert passes == [*shapes, 1]
        assert torch.equal(read, expected(np.array([*range(8), 4, 1, 2, 6])))


def test_handles_layers_and_budgets_that_cannot_be_are_named() -> None:
    caches, live, _ = _filled(Policy())
    with pytest.raises(UnknownHandle, match="handle 7 is not open in this session"):
        caches.get(7)
    for layers in ([3], [-1], [0, 0]):
        with pytest.raises(ValueError, match=r"name layers 0\.\.2, each once"):
            caches.evict(live, layers)
    with pytest.raises(KVBudgetError, match="less than one step needs"):
        caches_of(Policy(), slabs=2)
    with pytest.raises(ValueError, match="this session has no KV host"):
        caches.hand_over()
    with pytest.raises(ValueError, match="handle 1 was not to be handed over"):
        caches.flush(live)


def test_auto_takes_the_cheaper_way_by_what_it_measured() -> None:
    for bandwidth, prefill, way in ((1e9, 1e3, "delta"), (1e3, 1e6, "recompute")):
        caches, live, _ = _filled(Policy(recovery="auto", keeps="tokens"))
        caches.evict(live, [0])
        caches.restorer.costs = Costs(bytes_per_s=bandwidth, prefill_tokens_per_s=prefill)
        recovered = caches.restore(live)
        assert recovered is not None and recovered.how == way and recovered.predicted_ns is not None
        missing = recovered.missing_bytes
        assert recovered.predicted_ns == pytest.approx(1e9 * (missing / bandwidth if way == "delta" else 133 / prefill), rel=1e-6)


@pytest.mark.parametrize("recovery", ["delta", "reload", "recompute", "auto"])
def test_only_a_way_that_compares_times_the_passes(recovery: str) -> None:
    caches, live, _ = _filled(Policy(recovery=recovery))
    caches.forward(live, np.array([9]))
    assert (caches.restorer.costs.step_s is not None) == (recovery == "auto")


def test_auto_knows_that_an_exact_replay_takes_every_step_again() -> None:
    for step_s, way in ((1e-3, "delta"), (1e-6, "recompute"), (None, "delta")):
        caches, live, _ = _filled(Policy(recovery="auto", keeps="bitwise"), count=70)
        for token in range(10):
            caches.forward(live, np.array([token]))
        assert caches.restorer.costs.step_s is not None
        caches.evict(live, [0])
        missing_bytes = live.cache.bytes_of(live.cache.missing)
        caches.restorer.costs = Costs(bytes_per_s=missing_bytes / 5e-3, prefill_tokens_per_s=70 / 1e-3, step_s=step_s)
        recovered = caches.restore(live)
        assert recovered is not None and recovered.how == way


def test_a_codec_pays_below_the_break_even_bandwidth_and_not_above_it() -> None:
    break_even = 1e9 * (1 - 1 / 1.4)  # C = B (1 - 1/r), where only decoding is on the path
    for bandwidth, pays in ((0.9 * break_even, True), (1.1 * break_even, False)):
        costs = Costs(bytes_per_s=bandwidth, codecs={"zstd": CodecSpeed(1.4, 1e9, 1e9)})
        assert (costs.quickest(["zstd"]) == "zstd") is pays


def test_a_fetch_is_handed_to_a_thread_from_the_time_on_that_it_is_predicted_to_take() -> None:
    for bandwidth, overlaps in ((1e9, False), (1e3, True)):
        caches = caches_of(Policy(recovery="delta"), 6, overlap_from_s=1e-3)
        caches.restorer.costs = Costs(bytes_per_s=bandwidth)
        live = caches.open(0)
        caches.forward(live, np.arange(40))
        caches.evict(live, [1])
        assert caches.restorer.overlaps(caches.restorer.way, live) is overlaps
        read, recovered = caches.forward(live, np.array([9]))
        assert recovered is not None and recovered.how == "delta" and torch.equal(read, expected(np.array([*range(40), 9])))


@pytest.mark.parametrize("fallback", [True, False])
def test_a_worker_keeps_no_more_blocks_of_a_session_than_its_budget(fallback: bool) -> None:
    ledger, count = Ledger(), 40
    pool = HostPool(SHAPE, DType.F32, 4 * SHAPE.nbytes(4))
    layer_bytes = count * 2 * SHAPE.heads * SHAPE.head_dim * 4
    shadow = WorkerShadow(ledger, transfer_of(pool), budget_bytes=4 * layer_bytes)
    caches = LiveCaches(pool, Policy(recovery="delta", fallback=fallback), shadow, run, ledger)  # type: ignore[arg-type]
    first, second = caches.open(0), caches.open(1)
    for live in (first, second):
        caches.forward(live, np.arange(count))
    assert caches.evict(first, [0, 1, 2])[1].blocks == 3
    if not fallback:
        with pytest.raises(
            RecoveryError, match=f"{5 * layer_bytes:,} bytes of blocks are more than this session keeps in memory, {4 * layer_bytes:,}"
        ):
            caches.evict(second, [0, 1])
        caches.release(first.number)
        assert caches.evict(second, [0, 1])[1].blocks == 2  # a released handle's no longer count
        return
    assert caches.evict(second, [0, 1])[1].blocks == 0
    read, recovered = caches.forward(second, np.array([9]))
    assert recovered is not None and recovered.how == "recompute" and torch.equal(read, expected(np.array([*range(count), 9])))
