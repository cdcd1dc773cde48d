"""A limit of address space (`ulimit -v`) counts as memory that this machine lacks: what is needed is named before, and after it ran out."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator

import psutil
import pytest

from semgap.engine.architecture import ModelError, architecture_of
from semgap.engine.footprint import footprint, free_bytes
from semgap.engine.memory_check import require_free
from semgap.kv.block_pool import BlockPool
from semgap.kv.pool import KVShape
from semgap.policy import Batching, Policy
from semgap.processes.machine import memory_left_bytes, out_of_memory
from semgap.tensors import DType
from semgap.worker.engine_founding import kv_blocks
from semgap.worker.weight_store import StoreFull, WeightStore

ROOM_BYTES = 64 << 20
NEEDED = 4 * 10**9


@pytest.fixture
def limited() -> Iterator[int]:
    """This process may map ROOM_BYTES more; gives its limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = psutil.Process().memory_info().vms + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    yield limit
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_without_a_limit_all_free_memory_is_left() -> None:
    assert memory_left_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_memory_that_a_limit_denies_is_not_free(limited: int) -> None:
    for left in (memory_left_bytes(), free_bytes("cpu")):
        assert left is not None and left <= ROOM_BYTES
    with pytest.raises(ModelError, match=r"the model's weights need 4,000,000,000 bytes and cpu has [\d,]{1,10} free; use a smaller model"):
        require_free("the model's weights need", NEEDED, "cpu")
    with pytest.raises(StoreFull, match=r"cannot keep weights of 4,000,000,000 bytes: memory has [\d,]{1,10} bytes free"):
        WeightStore(NEEDED).begin({0: bytes(16)}, {0: NEEDED})


def test_a_memory_error_is_told_with_what_the_process_holds_and_may_hold(limited: int) -> None:
    with pytest.raises(MemoryError) as error:
        bytearray(NEEDED)
    said = out_of_memory(error.value)
    assert re.match(r"memory ran out: the error names no size; it holds [\d,]+ bytes of address space and may hold ", said)
    assert f"may hold {limited:,} bytes (ulimit -v). Raise the limit or use a smaller model" in said


@pytest.mark.parametrize("max_length", [64, 65, 100])
def test_the_footprint_has_room_for_all_blocks_of_an_engine(max_length: int) -> None:
    model = architecture_of({"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 128, "vocab_size": 16})
    shape = model.kv_shape(max_length)
    block = BlockPool(KVShape(shape.layers, shape.heads, 64, shape.head_dim), DType.F32, 1 << 20).block_nbytes
    needed = footprint(model, 0, 4, max_length, Policy(batching=Batching()), 3, 1.0)
    assert needed.kv == kv_blocks(shape, 3, 1.0) * block
    assert footprint(model, 0, 4, max_length, Policy(), 3, 1.0).kv == 3 * shape.nbytes(4)
