"""A handle's blocks on their way while another worker still computes them: two threads on one link to a real KV host, and its faults."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from semgap import codecs
from semgap.kv.blocks import KVCache
from semgap.kv.host import connect_kv
from semgap.kv.host_shadow import KVHostShadow
from semgap.kv.pool import BLOCK, HostPool, KVShape
from semgap.kv.recovery import LiveCaches
from semgap.kv.transfer import InPlaceTransfer
from semgap.policy import Policy
from semgap.tensors import DType, Tensor, TensorClass
from semgap.wire import messages
from semgap.wire.ledger import Ledger
from semgap.wire.link import Link
from semgap.wire.messages import Operation

if TYPE_CHECKING:
    from started_workers import KVCluster, StartedWorker

SHAPE = KVShape(layers=3, heads=2, max_length=90, head_dim=32)
LAYOUT = messages.KVLayout("model", DType.F32, SHAPE.layers, SHAPE.heads, SHAPE.head_dim, SHAPE.max_length, BLOCK)
KV_ID = b"k" * 16


def _shadow(host: StartedWorker, timeout_s: float = 10.0) -> KVHostShadow:
    return KVHostShadow(lambda: connect_kv(host.address, host.secret, timeout_s), LAYOUT, InPlaceTransfer())


@pytest.fixture
def host(kv_cluster: KVCluster) -> StartedWorker:
    return kv_cluster.host()


@pytest.fixture
def writer(host: StartedWorker) -> Iterator[Link]:
    """A link of the writer of a handle without blocks."""
    link = connect_kv(host.address, host.secret, 10.0)
    link.request(Operation.OPEN_KV, messages.OpenKV((), KV_ID, LAYOUT))
    yield link
    link.close()


def _put(writer: Link, layer: int, *positions: int, codec: str = "raw") -> None:
    """Puts the first blocks of a layer, all of whose values are its number, with so many positions each."""
    places = tuple((layer, block) for block in range(len(positions)))
    blocks = [np.full(SHAPE.block(count), layer, np.float32) for count in positions]
    tensors = [codecs.encode(Tensor.from_numpy(block, TensorClass.KV), codec) for block in blocks]
    writer.request(Operation.PUT_KV_BLOCKS, messages.PutKVBlocks((), KV_ID, 1, places), tensors)


def _expecting(positions: int) -> KVCache:
    cache = KVCache(HostPool(SHAPE, DType.F32, SHAPE.nbytes(4)))
    cache.expect(positions)
    return cache


def test_who_stops_what_is_followed_reads_no_frame_of_the_thread_that_receives(
    host: StartedWorker, writer: Link, wait_until: Callable[..., None]
) -> None:
    links: list[Link] = []
    shadow, cache = _shadow(host), _expecting(70)
    connect = shadow.connect
    shadow.connect = lambda: links.append(connect()) or links[-1]
    arriving = shadow.follow(KV_ID, cache)
    for layer in range(SHAPE.layers):
        _put(writer, layer, 64, 6)
    assert next(arriving) == 0
    (link,) = links
    seen = [-1]

    def is_all_here() -> bool:
        time.sleep(0.3)
        before, seen[0] = seen[0], len(link.sock.recv(1 << 20, socket.MSG_PEEK))
        return seen[0] == before

    wait_until(is_all_here, "the KV host has sent all layers")
    link.sock.shutdown(socket.SHUT_WR)  # as of a KV host that died after it had sent them all
    shadow.stop_following()
    assert shadow.broken_links == 0, "the thread that receives gives it up"
    assert list(arriving) == [1, 2] and not cache.missing.any()
    assert [float(cache.block(layer, 0)[0, 0, 0, 0]) for layer in range(SHAPE.layers)] == [0.0, 1.0, 2.0]
    shadow.close()


def test_what_is_on_its_way_at_the_end_is_decoded_later_and_not_fetched_again(host: StartedWorker, writer: Link) -> None:
    shadow, cache = _shadow(host), _expecting(70)
    arriving = shadow.follow(KV_ID, cache)
    for layer in range(SHAPE.layers):
        _put(writer, layer, 64, 6, codec="planes_zstd")
    assert next(arriving) == 0
    shadow.stop_following()
    came = list(arriving)
    assert came in ([], [1], [1, 2]) and not cache.missing[0].any() and cache.missing[1:].all(), "only the first one is in its slab"
    shadow.take_over(KV_ID, np.arange(70))
    valid, undecoded = shadow.followed(KV_ID)
    assert [one.layer for one in undecoded] == came and valid[[0, *came]].all()
    before = shadow.network_bytes
    assert list(shadow.decoded(cache, undecoded)) == came and shadow.network_bytes == before
    assert [float(cache.block(layer, 0)[0, 0, 0, 0]) for layer in [0, *came]] == [float(layer) for layer in [0, *came]]
    shadow.close()


@pytest.mark.parametrize("stopped", [False, True])
def test_without_fallback_a_host_that_answers_no_more_is_given_up_as_for_any_request(
    host: StartedWorker, writer: Link, wait_until: Callable[..., None], stopped: bool
) -> None:
    shadow, ledger = _shadow(host, 1.0), Ledger()
    policy = Policy(recovery="delta", shadow="kvhost", fallback=False)
    caches = LiveCaches(HostPool(SHAPE, DType.F32, SHAPE.nbytes(4)), policy, shadow, lambda tokens, cache: tokens, ledger)
    caches.expect(KV_ID, 70)
    if stopped:
        os.kill(host.process.pid, signal.SIGSTOP)
        states = list(Path(f"/proc/{host.process.pid}/task").glob("*/stat"))
        wait_until(lambda: all(state.read_text().rsplit(") ", 1)[1][0] == "T" for state in states), "all its threads have stopped")
    ending = threading.Thread(target=caches.quiet, daemon=True)
    ending.start()
    ending.join(20)
    assert not ending.is_alive()
    assert [each.partition(":")[0] for each in ledger.fallbacks] == (["deadline"] if stopped else [])
    if stopped:
        os.kill(host.process.pid, signal.SIGCONT)
    caches.close()


def test_a_layer_with_a_block_of_too_few_positions_is_waited_for(host: StartedWorker, writer: Link) -> None:
    shadow, cache = _shadow(host), _expecting(70)
    for layer in range(SHAPE.layers):
        _put(writer, layer, 60, 10)
    arriving = shadow.follow(KV_ID, cache)
    _put(writer, 0, 64, 6)
    assert next(arriving) == 0
    shadow.stop_following()
    assert list(arriving) == []
    assert cache.missing[1:].all() and shadow.broken_links == 0
    shadow.close()


def test_what_is_expected_counts_among_the_handles_that_may_be_open(host: StartedWorker, writer: Link) -> None:
    pool, ledger = HostPool(SHAPE, DType.F32, 3 * SHAPE.nbytes(4)), Ledger()
    policy = Policy(recovery="delta", shadow="kvhost")
    caches = LiveCaches(pool, policy, _shadow(host), lambda tokens, cache: tokens, ledger, most_handles=2)
    caches.open(0)
    caches.expect(KV_ID, 70)
    caches.open(1)  # takes the place of what is expected
    with pytest.raises(Exception, match="2 handles are open"):
        caches.attach(KV_ID, 2, np.arange(70))
    caches.close()
