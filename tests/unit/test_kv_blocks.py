"""KV slabs: bitwise transformers' own cache, and NaN wherever nothing is held."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DynamicCache

from semgap.engine.eager import slab_cache
from semgap.kv.blocks import KVCache, KVOverflow
from semgap.kv.pool import BLOCK, HostPool, KVBudgetError, KVPool, KVShape
from semgap.tensors import DType

SHAPE = KVShape(layers=2, heads=3, max_length=10, head_dim=4)


def _pool(shape: KVShape = SHAPE, caches: float = 1) -> KVPool:
    return HostPool(shape, DType.F32, int(caches * shape.nbytes(4)))


def _cache() -> KVCache:
    return KVCache(_pool())


def _slabs(cache: KVCache) -> torch.Tensor:
    return torch.stack([torch.as_tensor(layer.slab) for layer in cache.layers if layer.slab is not None])


def _exported(cache: KVCache) -> torch.Tensor:
    return torch.as_tensor(cache.export())


def _append(cache: KVCache, positions: int, seed: int = 0) -> torch.Tensor:
    """Appends random keys and values to every layer; gives them packed as `export` does."""
    made = torch.randn(SHAPE.layers, 2, 1, SHAPE.heads, positions, SHAPE.head_dim, generator=torch.Generator().manual_seed(seed))
    for layer, (keys, values) in zip(slab_cache(cache).layers, made, strict=True):
        layer.update(keys, values)
    return made[:, :, 0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
def test_slabs_give_bitwise_the_logits_of_dynamic_cache(model_of: Callable[[str], Path], family: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_of(family), dtype=torch.float32).eval()
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    shape = KVShape(config.num_hidden_layers, heads, 40, config.hidden_size // config.num_attention_heads)
    slabs, dynamic = KVCache(_pool(shape)), DynamicCache()
    steps = [torch.arange(20)[None] * 7 % config.vocab_size, *(torch.tensor([[token]]) for token in (3, 400, 3, 17, 0, 511))]
    with torch.inference_mode():
        for tokens in steps:
            ours = model(input_ids=tokens, past_key_values=slab_cache(slabs), use_cache=True).logits
            theirs = model(input_ids=tokens, past_key_values=dynamic, use_cache=True).logits
            assert torch.equal(ours, theirs)
    assert slabs.filled == dynamic.get_seq_length() == slab_cache(slabs).get_seq_length() == 26


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4), max_size=4))
def test_what_was_appended_is_exported_and_the_rest_is_nan(pieces: list[int]) -> None:
    cache, held = _cache(), []
    for number, count in enumerate(pieces):
        if cache.filled + count > SHAPE.max_length:
            with pytest.raises(KVOverflow, match=f"do not fit a KV cache of max_length {SHAPE.max_length}"):
                _append(cache, count)
            break
        held.append(_append(cache, count, number))
    expected = torch.cat(held, dim=3) if held else torch.empty(SHAPE.filled(0))
    assert torch.equal(_exported(cache), expected)
    assert cache.export().shape == SHAPE.filled(cache.filled)
    assert _slabs(cache)[..., cache.filled :, :].isnan().all() and not _exported(cache).isnan().any()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10), st.integers(0, 10))
def test_a_loaded_cache_holds_what_was_exported_and_nothing_of_before(before: int, after: int) -> None:
    source, target = _cache(), _cache()
    if before:
        _append(target, before, 1)
    packed = _append(source, after, 2) if after else _exported(source)
    target.load(source.export())
    assert target.filled == after and torch.equal(_exported(target), packed)
    assert _slabs(target)[..., after:, :].isnan().all()
    layer = slab_cache(target).layers[1]
    keys, values = (layer.keys, layer.values) if after else (None, None)
    if keys is not None and values is not None:
        assert torch.equal(keys[0], packed[1, 0]) and torch.equal(values[0], packed[1, 1])


def test_attention_reads_the_slab_in_place() -> None:
    cache = _cache()
    _append(cache, 3)
    slab, keys = cache.layers[0].slab, slab_cache(cache).layers[0].keys
    assert isinstance(slab, np.ndarray) and keys is not None and keys.data_ptr() == slab.ctypes.data


def test_a_cleared_cache_is_nan_all_over() -> None:
    cache = _cache()
    _append(cache, 7)
    cache.clear()
    assert cache.filled == 0 and _slabs(cache).isnan().all()


def test_offloading_moves_nothing_where_the_device_is_the_host() -> None:
    cache = _cache()
    packed = _append(cache, 5)
    assert cache.offload() == 0 == cache.restore()
    assert torch.equal(_exported(cache), packed)


@pytest.mark.parametrize("shape", [(2, 2, 3, 11, 4), (1, 2, 3, 5, 4), (2, 1, 3, 5, 4), (2, 2, 6, 5, 2)])
def test_a_cache_of_another_shape_is_refused_and_changes_nothing(shape: tuple[int, ...]) -> None:
    cache = _cache()
    packed = _append(cache, 5)
    with pytest.raises(ValueError, match="a KV cache of shape"):
        cache.load(torch.zeros(shape))
    assert torch.equal(_exported(cache), packed)


def test_the_size_is_that_of_every_position() -> None:
    cache = _cache()
    assert SHAPE.nbytes(4) == _slabs(cache).nbytes == cache.pool.budget_bytes


@pytest.mark.parametrize("caches", [0, 0.5, 0.99])
def test_a_budget_below_one_cache_is_refused_with_what_it_would_need(caches: float) -> None:
    with pytest.raises(KVBudgetError, match=r"a KV budget of [\d,]+ bytes is less than one step needs, 1,920; raise kv_budget"):
        _pool(caches=caches)


def test_a_view_of_a_layer_keeps_its_positions_while_the_cache_grows() -> None:
    cache = _cache()
    _append(cache, 7)
    view = cache.as_of(0)
    _append(cache, 3)
    assert (view.filled, cache.filled) == (7, 10) and view.block_shape(0)[3] == 7
    view.saved[0, 0] = 7
    assert cache.dirty[0, 0]  # the books are shared


def test_a_cache_is_whole_while_no_block_is_missing_and_every_layer_has_a_slab() -> None:
    cache = _cache()
    _append(cache, 10)
    everywhere = np.ones_like(cache.missing)
    assert cache.is_whole
    cache.drop(1)
    assert not cache.is_whole
    cache.admit()
    assert not cache.is_whole  # its block is still away
    cache.missing[1] = False
    assert cache.is_whole
    cache.miss(everywhere)
    assert not cache.is_whole
    cache.missing[:] = False
    assert cache.is_whole
    cache.stand_for(10, np.full_like(cache.saved, 10), ~everywhere)
    assert not cache.is_whole
    cache.load(np.zeros((2, 2, 3, 10, 4), np.float32))
    assert cache.is_whole
    cache.release()
    assert not cache.is_whole


def test_slabs_come_from_the_pool_and_go_back_as_nan() -> None:
    pool = _pool(caches=2.6)
    one, other = KVCache(pool), KVCache(pool)
    assert pool.free_slabs == 1
    with pytest.raises(KVBudgetError, match="a cache takes 2 slabs and 1 are free; release a handle"):
        KVCache(pool)
    _append(one, 10)
    slab = one.layers[1].slab
    assert slab is not None
    one.drop(1)
    assert np.isnan(slab).all() and one.without_slab() == [1] and one.resident.tolist() == [[True], [False]]
    one.release()
    other.release()
    assert pool.free_slabs * pool.slab_nbytes == pool.budget_bytes


def test_a_block_is_dirty_until_all_that_it_holds_was_saved() -> None:
    shape = KVShape(2, 1, 3 * BLOCK, 2)
    cache = KVCache(_pool(shape))
    for count in (BLOCK + 6, 1):
        for layer in slab_cache(cache).layers:
            layer.update(torch.ones(1, 1, count, 2), torch.ones(1, 1, count, 2))
        assert cache.dirty.tolist() == [[True, True, False]] * 2 if count > 1 else [[False, True, False]] * 2
        cache.saved[:] = cache.counts
        assert not cache.dirty.any()
    cache.truncate(BLOCK - 1)
    assert not cache.dirty.any() and cache.saved.tolist() == [[BLOCK - 1, 0, 0]] * 2


@pytest.mark.parametrize("shape", [KVShape(2, 3, 70, 4), KVShape(1, 8, 70, 2), KVShape(2, 1, 70, 4)])
def test_the_pieces_of_a_block_are_its_bytes_in_the_order_in_which_they_cross(shape: KVShape) -> None:
    cache = KVCache(_pool(shape))
    for index, layer in enumerate(slab_cache(cache).layers):
        made = torch.randn(2, 1, shape.heads, 67, shape.head_dim, generator=torch.Generator().manual_seed(index))
        layer.update(made[0], made[1])
    for block in range(2):
        pieces = cache.pieces(shape.layers - 1, block)
        assert b"".join(pieces) == np.ascontiguousarray(cache.block(shape.layers - 1, block)).tobytes()


def test_a_cache_that_stands_for_more_than_its_slab_holds_misses_those_blocks() -> None:
    shape = KVShape(1, 1, 2 * BLOCK, 2)
    cache = KVCache(_pool(shape))
    for layer in slab_cache(cache).layers:
        layer.update(torch.ones(1, 1, BLOCK + 3, 2), torch.ones(1, 1, BLOCK + 3, 2))
    there = np.ones((1, 2), dtype=bool)
    cache.stand_for(BLOCK + 5, np.array([[BLOCK, 5]]), there)
    assert cache.missing.tolist() == [[False, True]]
    cache.stand_for(BLOCK, np.array([[BLOCK, 5]]), there)
    assert cache.missing.tolist() == [[False, False]]
