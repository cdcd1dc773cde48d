"""Block tables: every block has the holders that it should have, and a prefix is found only by its own tokens."""

from __future__ import annotations

import numpy as np
import pytest

from semgap.kv.block_tables import BlockTables

SIZE = 4
SAME_HASH = 2**61 - 1  # CPython hashes an int by its remainder


def _tokens(first: int) -> np.ndarray:
    return np.arange(first, first + SIZE, dtype=np.int64)


def _taken(tables: BlockTables) -> int:
    block = tables.take()
    assert block is not None
    return block


def _sealed(tables: BlockTables, before: list[int], first: int) -> int:
    return tables.seal(_taken(tables), tables.key(before, _tokens(first)))


def test_a_full_pool_gives_no_block_until_one_comes_back() -> None:
    tables = BlockTables(2, SIZE)
    table = [_taken(tables), _taken(tables)]
    assert tables.take() is None and tables.held == 2
    tables.give_back(table[:1])
    assert tables.take() == table[0]


def test_an_equal_prefix_adopts_the_same_block() -> None:
    tables = BlockTables(4, SIZE)
    block = _sealed(tables, [], 10)
    assert tables.adopt(tables.key([], _tokens(10))) == block
    assert (tables.holders(block), tables.shared, tables.held) == (2, 1, 1)
    tables.give_back([block])
    assert (tables.holders(block), tables.shared, tables.held) == (1, 0, 1)


def test_equal_tokens_after_another_prefix_are_not_found() -> None:
    tables = BlockTables(4, SIZE)
    first, other = _sealed(tables, [], 10), _sealed(tables, [], 20)
    _sealed(tables, [first], 30)
    assert tables.adopt(tables.key([other], _tokens(30))) is None
    assert tables.adopt(tables.key([], _tokens(30))) is None


def test_two_prefixes_with_one_hash_stay_apart() -> None:
    tables = BlockTables(4, SIZE)
    tokens, other = _tokens(5), _tokens(5) + np.array([SAME_HASH, 0, 0, 0])
    key, colliding = tables.key([], tokens), tables.key([], other)
    assert hash(key) == hash(colliding)
    block = tables.seal(_taken(tables), key)
    assert tables.adopt(colliding) is None
    twin = tables.seal(_taken(tables), colliding)
    assert twin != block
    assert (tables.adopt(key), tables.adopt(colliding)) == (block, twin)


def test_a_block_computed_twice_is_kept_once() -> None:
    tables = BlockTables(4, SIZE)
    block = _sealed(tables, [], 10)
    assert _sealed(tables, [], 10) == block
    assert (tables.holders(block), tables.held) == (2, 1)


def test_a_freed_block_is_found_until_its_memory_is_needed() -> None:
    reused: list[int] = []
    tables = BlockTables(1, SIZE, reused.append)
    block, key = _sealed(tables, [], 10), tables.key([], _tokens(10))
    tables.give_back([block])
    assert tables.adopt(key) == block and not reused
    tables.give_back([block])
    assert tables.take() == block and reused == [block]
    assert tables.adopt(key) is None


def test_the_end_of_a_prefix_is_forgotten_before_its_beginning_and_unsealed_blocks_before_both() -> None:
    tables = BlockTables(3, SIZE)
    first = _sealed(tables, [], 10)
    second = _sealed(tables, [first], 20)
    tail = _taken(tables)
    tables.give_back([first, second])
    tables.give_back([tail])
    assert [tables.take() for _ in range(3)] == [tail, second, first]


def test_the_least_recently_freed_prefix_is_forgotten_first() -> None:
    tables = BlockTables(2, SIZE)
    old, young = _sealed(tables, [], 10), _sealed(tables, [], 20)
    tables.give_back([old])
    tables.give_back([young])
    assert tables.adopt(tables.key([], _tokens(10))) == old
    tables.give_back([old])
    assert tables.take() == young


def test_a_block_that_took_a_forgotten_ones_number_has_none_of_its_successors() -> None:
    tables = BlockTables(3, SIZE)
    first = _sealed(tables, [], 10)
    second = _sealed(tables, [first], 20)
    tables.give_back([first])  # an owner would give back `second` before
    spare = _taken(tables)
    again = _sealed(tables, [], 90)
    assert again == first != spare
    assert tables.adopt(tables.key([again], _tokens(20))) is None
    assert tables.holders(second) == 1


def test_a_block_without_holders_cannot_be_given_back() -> None:
    tables = BlockTables(1, SIZE)
    block = _taken(tables)
    tables.give_back([block])
    with pytest.raises(AssertionError, match="block 0 has no holder"):
        tables.give_back([block])
