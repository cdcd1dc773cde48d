"""Weights that a worker keeps: in a directory they outlive it, and what is damaged, too large or left half done is never used."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import xxhash

from semgap.client.remote_runtime import RemoteRuntime
from semgap.engine.model_files import load_digest
from semgap.engine.weights import Weights, fill
from semgap.policy import policy_from
from semgap.tensors import DType
from semgap.wire import frames, messages
from semgap.wire.link import RemoteError
from semgap.wire.messages import Kind
from semgap.worker.weight_store import FalseHash, StoreFull, WeightStore

if TYPE_CHECKING:
    from started_workers import StartedWorker

BY_HASH = policy_from({"weights": "by_hash"}, "by_hash")
PROMPT = np.arange(3, 15, dtype=np.int64)
Runtime = Callable[..., RemoteRuntime]


def _weight(letter: bytes, nbytes: int = 600) -> tuple[bytes, bytes]:
    """Hash and bytes."""
    return xxhash.xxh3_128_digest(letter * nbytes), letter * nbytes


def _sink(nbytes: int) -> tuple[Weights, frames.Sink]:
    weights = Weights([messages.WeightSpec("w", DType.U8, (nbytes,))], "cpu")
    return weights, weights.sink(0)


def _put(store: WeightStore, *weights: tuple[bytes, bytes]) -> None:
    draft = store.begin({i: digest for i, (digest, _) in enumerate(weights)}, {i: len(data) for i, (_, data) in enumerate(weights)})
    for index, (_, data) in enumerate(weights):
        fill(draft.through(index, _sink(len(data))[1]), memoryview(data))
    draft.finish()


def _read(store: WeightStore, digest: bytes, nbytes: int = 600) -> bytes | None:
    weights, sink = _sink(nbytes)
    return bytes(weights.tensors()["w"].numpy()) if store.read_into(digest, sink) else None


def _files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.weights"))


def test_a_later_worker_finds_what_an_earlier_one_kept_and_computes_the_same(
    start_worker: Callable[..., StartedWorker], open_runtime: Runtime, llama: Path, tmp_path: Path
) -> None:
    whole = sum(tensor.nbytes for tensor in load_digest(llama).tensors)
    replies, sent, held = [], [], []
    for _ in range(2):
        worker = start_worker("--weight-cache", str(tmp_path / "cache"))
        runtime = open_runtime(worker, llama, BY_HASH, upload=False)
        sent.append(runtime.upload_weights())
        held.append(runtime.held_bytes)
        logits = runtime.prefill(PROMPT, 0, Kind.SETUP).logits
        assert logits is not None
        replies.append(bytes(logits.data))
        runtime.link.close()
        worker.process.kill()
    assert (sent, held) == ([whole, 0], [0, whole])
    assert replies[0] == replies[1]
    assert len(_files(tmp_path / "cache")) == 1


def test_a_damaged_file_is_found_by_a_hash_removed_and_sent_anew(
    start_worker: Callable[..., StartedWorker], open_runtime: Runtime, llama: Path, tmp_path: Path
) -> None:
    worker = start_worker("--weight-cache", str(tmp_path))
    open_runtime(worker, llama, BY_HASH).link.close()
    (file,) = _files(tmp_path)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    runtime = open_runtime(worker, llama, BY_HASH, upload=False)
    assert runtime.upload_weights() == sum(tensor.nbytes for tensor in load_digest(llama).tensors)  # whole, so that all is kept again
    assert "is damaged" in worker.log.read_text()
    (again,) = _files(tmp_path)
    assert open_runtime(worker, llama, BY_HASH, upload=False).upload_weights() == 0
    assert again.stat().st_size == len(content)


@pytest.mark.parametrize("damage", [b"", b"short", b"x" * 600 + b"\xff" * 8, b"x" * 600 + b"not json" + (8).to_bytes(8, "little")])
def test_a_file_without_a_sound_index_is_dropped(tmp_path: Path, damage: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    store, (digest, _) = WeightStore(1 << 20, tmp_path), _weight(b"x")
    (tmp_path / "cut.weights").write_bytes(damage)
    store.refresh()
    assert not store.has(digest, 600) and not _files(tmp_path)
    assert "its index cannot be read" in capsys.readouterr().err


def test_the_upload_used_longest_ago_makes_room_in_a_directory(tmp_path: Path) -> None:
    first, second, third = _weight(b"a"), _weight(b"b"), _weight(b"c")
    store = WeightStore(1500, tmp_path)
    _put(store, first)
    _put(store, second)
    store.refresh()
    assert _read(store, first[0]) == first[1]  # which makes the second one the oldest
    _put(store, third)
    later = WeightStore(1500, tmp_path)
    later.refresh()
    assert [later.has(digest, 600) for digest, _ in (first, second, third)] == [True, False, True]
    assert later.held_bytes <= 1500
    assert _read(store, second[0]) is None or _read(store, first[0]) == first[1]  # who had it open reads on


def test_the_upload_used_longest_ago_makes_room_in_memory() -> None:
    first, second, third = _weight(b"a"), _weight(b"b"), _weight(b"c")
    store = WeightStore(1500)
    for weight in (first, second):
        _put(store, weight)
        store.take_in()
        time.sleep(0.02)  # the kernel stamps by its tick
    assert _read(store, first[0]) == first[1]  # as a session does, a fork
    time.sleep(0.02)
    _put(store, third)
    store.take_in()
    assert [store.has(digest, 600) for digest, _ in (first, second, third)] == [True, False, True]
    assert store.held_bytes <= 1500


@pytest.mark.parametrize("in_directory", [True, False])
def test_small_uploads_are_bounded_in_number(tmp_path: Path, in_directory: bool) -> None:
    store = WeightStore(1 << 30, tmp_path if in_directory else None)
    weights = [_weight(number.to_bytes(2, "little"), 8) for number in range(70)]
    for weight in weights:
        _put(store, weight)
        if not in_directory:
            store.take_in()
    store.refresh()
    assert sum(store.has(digest, 16) for digest, _ in weights) == 64
    assert store.has(weights[-1][0], 16)


def test_two_workers_that_keep_the_same_model_at_once_leave_it_once_and_whole(tmp_path: Path) -> None:
    one, other, weight = WeightStore(1 << 20, tmp_path), WeightStore(1 << 20, tmp_path), _weight(b"a")
    drafts = [store.begin({0: weight[0]}, {0: 600}) for store in (one, other)]
    for draft in drafts:
        fill(draft.through(0, _sink(600)[1]), memoryview(weight[1]))
    for draft in drafts:
        draft.finish()
    later = WeightStore(1 << 20, tmp_path)
    later.refresh()
    assert len(_files(tmp_path)) == 1 and _read(later, weight[0]) == weight[1]


def test_what_a_killed_worker_left_half_written_goes_and_what_another_one_writes_stays(tmp_path: Path) -> None:
    orphan, alive = tmp_path / "orphan.partial", tmp_path / "alive.partial"
    orphan.write_bytes(b"half")
    alive.write_bytes(b"half")
    with alive.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        _put(WeightStore(1 << 20, tmp_path), _weight(b"a"))
    assert not orphan.exists() and alive.exists() and len(_files(tmp_path)) == 1


def test_false_hashes_keep_nothing(tmp_path: Path) -> None:
    store, (digest, _) = WeightStore(1 << 20, tmp_path), _weight(b"a")
    with pytest.raises(FalseHash, match=f"600 bytes does not have the hash {digest.hex()}"):
        _put(store, (digest, b"b" * 600))
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("directory", [False, True])
def test_more_than_memory_or_the_disk_has_free_is_refused_before_it_comes(tmp_path: Path, directory: bool) -> None:
    store = WeightStore(1 << 60, tmp_path if directory else None)
    where = str(tmp_path) if directory else "memory"
    with pytest.raises(StoreFull, match=rf"cannot keep weights of 1,125,899,906,842,624 bytes: {where} has [\d,]+ bytes free"):
        store.begin({0: bytes(16)}, {0: 1 << 50})


def test_a_model_over_the_budget_is_refused_before_any_of_it_is_sent(
    start_worker: Callable[..., StartedWorker], open_runtime: Runtime, llama: Path
) -> None:
    runtime = open_runtime(start_worker("--weight-store-bytes", "1000"), llama, BY_HASH, upload=False)
    with pytest.raises(RemoteError, match=r"are more than the worker keeps, 1,000; use weights: once") as error:
        runtime.upload_weights()
    assert error.value.code == "store"
    assert not runtime.put_s  # the offer was refused


@pytest.mark.parametrize("slot_bytes", [0, 5000])
def test_what_is_kept_is_what_came_however_slowly_it_is_written(slot_bytes: int) -> None:
    """Out of staging slots, which are filled anew: 40 weights of which none fits a slot's end."""
    sizes = {index: 3001 + 7 * index for index in range(40)}
    data = {index: np.random.default_rng(index).bytes(nbytes) for index, nbytes in sizes.items()}
    store = WeightStore(1 << 20)
    draft = store.begin({index: xxhash.xxh3_128_digest(part) for index, part in data.items()}, sizes, slot_bytes or None)
    specs: Sequence[messages.WeightSpec] = [messages.WeightSpec(f"w{index}", DType.U8, (nbytes,)) for index, nbytes in sizes.items()]
    weights = Weights(specs, "cpu", slot_bytes)
    for index, part in data.items():
        fill(draft.through(index, weights.sink(index)), memoryview(part))
    draft.finish()
    store.take_in()
    for index, part in data.items():
        assert bytes(weights.tensors()[f"w{index}"].numpy()) == part
        assert _read(store, xxhash.xxh3_128_digest(part), len(part)) == part


def test_an_upload_that_is_given_up_leaves_no_file(tmp_path: Path) -> None:
    draft = WeightStore(1 << 20, tmp_path).begin({0: bytes(16)}, {0: 600})
    assert list(tmp_path.glob("*.partial"))
    draft.discard()
    with contextlib.suppress(OSError):
        draft.discard()
    assert not list(tmp_path.glob("*.partial"))
