"""KV blocks by way of staging memory and the device's codecs, as with a GPU, here on the CPU: what crosses, and what comes back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from semgap.engine.eager import slab_cache
from semgap.kv import gpu_transfer
from semgap.kv.blocks import KVCache
from semgap.kv.gpu_pool import GpuPool
from semgap.kv.gpu_streams import BounceBuffer, GpuStreams, Regions
from semgap.kv.gpu_transfer import StagedTransfer
from semgap.kv.host import connect_kv
from semgap.kv.host_shadow import KVHostShadow
from semgap.kv.pool import BLOCK, KVPool, KVShape
from semgap.kv.recovery import LiveCaches
from semgap.kv.shadow import ShadowError, transfer_of
from semgap.kv.worker_shadow import WorkerShadow
from semgap.policy import CodecChoice, Policy
from semgap.tensors import DType
from semgap.wire import messages
from semgap.wire.handshake import read_secret
from semgap.wire.ledger import Ledger, LinkKind

if TYPE_CHECKING:
    from started_workers import StartedWorker

CPU = "cpu"
SHAPE = KVShape(layers=3, heads=2, max_length=2 * BLOCK + 20, head_dim=32)
FILLED = 2 * BLOCK + 5
EXACT = ("raw", "planes_zstd")
LOSSY = ("int8", "int4")


def run(tokens: np.ndarray, cache: KVCache) -> torch.Tensor:
    """A forward pass that appends numbers which depend on layer, position and token, and hands back all that attention would read."""
    read = []
    for index, layer in enumerate(slab_cache(cache).layers):
        begin = layer.get_seq_length()
        numbers = torch.tensor([math.sin(index + 0.1 * (begin + i) + int(token)) for i, token in enumerate(tokens)])
        made = numbers[:, None, None].expand(-1, SHAPE.heads, SHAPE.head_dim).to(getattr(torch, cache.pool.dtype.torch_name))
        held = made.permute(1, 0, 2)[None]
        read += [part[0].clone() for part in layer.update(held, -held)]
    return torch.stack(read)


def pool_of(dtype: torch.dtype = torch.float32) -> KVPool:
    return GpuPool(SHAPE, DType.from_torch_name(str(dtype)), CPU, 2 * SHAPE.nbytes(dtype.itemsize))


def filled(dtype: torch.dtype = torch.float32) -> KVCache:
    cache = KVCache(pool_of(dtype))
    run(np.arange(FILLED), cache)
    return cache


def kept_by(cache: KVCache) -> torch.Tensor:
    return cache.export().clone()


@pytest.mark.parametrize("codec", [*EXACT, *LOSSY])
def test_gathered_blocks_are_the_slabs_blocks_in_one_payload_each(codec: str) -> None:
    cache = filled()
    places = [(2, 0), (2, 1), (0, 1), (2, 2), (1, 2)]
    gathered = gpu_transfer.gather(cache, places, codec)
    assert [group.places for group in gathered] == [[(2, 0), (2, 1), (0, 1)], [(2, 2), (1, 2)]]
    for group in gpu_transfer.gather(cache, places, "raw"):
        for index, place in enumerate(group.places):
            assert group.payloads.part(index).numpy().tobytes() == cache.block(*place).contiguous().numpy().tobytes()
            assert group.shape == SHAPE.block(BLOCK if place[1] < 2 else 5)


@pytest.mark.parametrize("codec", [*EXACT, *LOSSY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_worker_s_shadow_gives_back_what_it_took(codec: str, dtype: torch.dtype) -> None:
    cache, ledger = filled(dtype), Ledger()
    shadow = WorkerShadow(ledger, transfer_of(cache.pool))
    before, everything = kept_by(cache), np.ones((SHAPE.layers, SHAPE.blocks), dtype=bool)
    moved = shadow.save(b"k" * 16, cache, everything, (codec,) * SHAPE.layers, np.arange(FILLED))
    assert moved.blocks == 9 and moved.tensor_bytes == before.nbytes and not cache.dirty.any()
    for layer in range(SHAPE.layers):
        cache.drop(layer)
    cache.admit()
    assert list(shadow.fetch(b"k" * 16, cache, cache.missing.copy())) == [0, 1, 2]
    after = kept_by(cache)
    assert torch.equal(after, before) if codec in EXACT else (after.float() - before.float()).abs().max() < 0.1
    rows = {row.operation: row for row in ledger.copy_rows() if row.link == LinkKind.MEMORY}
    payload = before.nbytes if codec in EXACT else moved.payload_bytes
    assert rows["put_kv_blocks"].payload_bytes == rows["fetch_missing_kv_layers"].payload_bytes == payload
    assert (moved.payload_bytes < before.nbytes) is (codec in LOSSY)  # a codec of the host lets raw bytes cross to it
    assert all(row.encode_ns + row.decode_ns > 0 for row in rows.values()) is (codec != "raw")


def test_blocks_that_were_saved_longer_come_back_as_far_as_they_are_held() -> None:
    cache = filled()
    shadow, before = WorkerShadow(Ledger(), transfer_of(cache.pool)), kept_by(cache)
    shadow.save(b"k" * 16, cache, np.ones((3, SHAPE.blocks), dtype=bool), ("raw",) * SHAPE.layers, np.arange(FILLED))
    cache.truncate(BLOCK + 7)
    cache.drop(1)
    cache.admit()
    assert list(shadow.fetch(b"k" * 16, cache, cache.missing.copy())) == [1]
    assert torch.equal(kept_by(cache), before[:, :, :, : BLOCK + 7])
    slab = cache.layers[1].slab
    assert slab is not None and slab[:, :, :, BLOCK + 7 :].isnan().all()
    with pytest.raises(ShadowError, match="not in the worker's shadow"):
        list(shadow.fetch(b"x" * 16, cache, np.ones((3, SHAPE.blocks), dtype=bool)))


def test_regions_are_handed_out_again_and_a_forgotten_handle_gives_its_own_back() -> None:
    regions = Regions(GpuStreams(CPU), 100)
    first, second = regions.take(), regions.take()
    assert first.numel() >= 100 and first.data_ptr() != second.data_ptr()
    regions.give_back(first)
    assert regions.take().data_ptr() == first.data_ptr()
    cache = filled()
    transfer = transfer_of(cache.pool)
    assert isinstance(transfer, StagedTransfer)
    shadow = WorkerShadow(Ledger(), transfer)
    for kv_id in (b"a" * 16, b"b" * 16, b"c" * 16):
        shadow.save(kv_id, cache, np.ones((3, SHAPE.blocks), dtype=bool), ("raw",) * SHAPE.layers, np.arange(FILLED))
        held = {region.data_ptr() for region in transfer._regions[kv_id].values()}
        shadow.forget(kv_id)
        assert len(held) == 3
        assert held <= {region.data_ptr() for region in transfer._free._free}


def test_a_piece_of_staging_comes_again_only_when_the_others_have_been_used() -> None:
    staging = BounceBuffer(GpuStreams(CPU), 100, pieces=3)
    taken = [staging.take(1000).data_ptr() for _ in range(6)]
    assert len(set(taken[:3])) == 3 and taken[3:] == taken[:3]
    parts = gpu_transfer.split(staging.take(16 + 16 + 32), [5, 16, 30])
    assert [part.numel() for part in parts] == [5, 16, 30] and all(part.data_ptr() % 16 == 0 for part in parts)


def test_an_offloaded_cache_comes_back_and_its_slabs_were_empty_meanwhile() -> None:
    cache = filled()
    before = kept_by(cache)
    for _ in range(2):
        assert cache.offload() == before.nbytes
        assert all(layer.slab is not None and layer.slab.isnan().all() for layer in cache.layers)
        assert cache.restore() == before.nbytes and torch.equal(kept_by(cache), before)
    assert cache.restore() == 0
    cache.offload()
    cache.clear()
    assert cache.restore() == 0 and cache.filled == 0


@pytest.mark.parametrize("codec", ["int8", "raw", "planes_zstd"])
def test_a_codec_is_measured_where_it_works(codec: str) -> None:
    cache = filled()
    speed = transfer_of(cache.pool).measure(cache, 1, 0, codec)
    assert min(speed.encode_bytes_per_s, speed.decode_bytes_per_s) > 0 and (speed.ratio > 3 if codec == "int8" else speed.ratio >= 1)


@pytest.mark.parametrize("codec", [*EXACT, "int8"])
@pytest.mark.parametrize("overlap_from_s", [0.0, math.inf])
@pytest.mark.parametrize("recovery", ["delta", "reload"])
def test_a_kv_host_gives_back_through_staging_what_never_left(
    kv_pair: tuple[StartedWorker, StartedWorker], codec: str, overlap_from_s: float, recovery: str
) -> None:
    host, ledger = kv_pair[0], Ledger()
    sizes = (SHAPE.layers, SHAPE.heads, SHAPE.head_dim, SHAPE.max_length, BLOCK)
    secret = read_secret(host.secret_file)
    pool, layout = pool_of(), messages.KVLayout("m", DType.F32, *sizes)
    shadow = KVHostShadow(lambda: connect_kv(host.address, secret, 20.0), layout, transfer_of(pool), ledger)
    policy = Policy(recovery=recovery, shadow="kvhost", codec=CodecChoice(kv=codec), keeps="lossy")  # type: ignore[arg-type]
    caches = LiveCaches(pool, policy, shadow, run, ledger, overlap_from_s=overlap_from_s)
    live, never_left = caches.open(0), KVCache(pool_of())
    caches.forward(live, np.arange(FILLED))
    run(np.arange(FILLED), never_left)
    for step in range(3):
        caches.evict(live, [step, (step + 1) % 3])
        read, recovered = caches.forward(live, np.array([step]))
        expected = run(np.array([step]), never_left)
        assert recovered is not None and recovered.how == recovery and recovered.fallback is None
        assert torch.equal(read, expected) if codec in EXACT or recovery == "reload" else (read - expected).abs().max() < 0.1
        assert recovered.stall_ns > 0 and recovered.copied_bytes > 0 and recovered.fetched_network_bytes > 0
    copied = {row.operation: row.payload_bytes for row in ledger.copy_rows() if row.link == LinkKind.MEMORY}
    assert set(copied) == {"put_kv_blocks", "fetch_missing_kv_layers"} and min(copied.values()) > 0
    caches.release(live.number)
    caches.close()


def test_a_damaged_payload_from_a_kv_host_is_not_taken_for_blocks(kv_pair: tuple[StartedWorker, StartedWorker]) -> None:
    host = kv_pair[0]
    secret = read_secret(host.secret_file)
    sizes = (SHAPE.layers, SHAPE.heads, SHAPE.head_dim, SHAPE.max_length, BLOCK)
    layout = messages.KVLayout("m", DType.F32, *sizes)
    cache, everything = filled(), np.ones((SHAPE.layers, SHAPE.blocks), dtype=bool)
    shadow = KVHostShadow(lambda: connect_kv(host.address, secret, 20.0), layout, transfer_of(cache.pool))
    leaving = shadow.leaving

    def damaged(*given):  # type: ignore[no-untyped-def]
        for places, tensors in leaving(*given):
            tensors[0].buffers[0][:2] = b"\0\x7c"  # a group's zero becomes infinite
            yield places, tensors

    shadow.leaving = damaged
    shadow.save(b"d" * 16, cache, everything, ("int8",) * SHAPE.layers, np.arange(FILLED))
    cache.drop(0)
    cache.admit()
    with pytest.raises(ShadowError, match="damaged"):
        list(shadow.fetch(b"d" * 16, cache, cache.missing.copy()))
    assert cache.missing[0].all()
    cache.blank_missing()
    slab = cache.layers[0].slab
    assert slab is not None and slab.isnan().all()
    shadow.close()
