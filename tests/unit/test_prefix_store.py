"""The KV host's blocks by content: who finds what, what a collision of names does, and what its budget drops."""

from __future__ import annotations

import tracemalloc

import msgspec
import numpy as np
import pytest

from semgap.kv.prefix_names import MOST_BLOCKS, chain_of, model_name, space_of
from semgap.kv.prefix_store import LAYER_BYTES, PREFIX_BLOCK_BYTES, PrefixStore
from semgap.kv.room import Room
from semgap.policy import CodecChoice, Policy
from semgap.tensors import DType, TensorClass
from semgap.wire import messages
from semgap.wire.link import Refused

LAYOUT = messages.KVLayout("model", DType.F32, 3, 2, 8, 64, 64)
HEAD = messages.TensorHeader(TensorClass.KV, 0, DType.F32, (1, 2, 2, 64, 8), 16)
IDS = messages.TensorHeader(TensorClass.CONTROL, 0, DType.U32, (64,), 256)
BLOCK_BYTES = PREFIX_BLOCK_BYTES + 3 * (LAYER_BYTES + 16)
TEXT = np.arange(4 * 64, dtype=np.uint32)


def _store(blocks: int = 100) -> PrefixStore:
    return PrefixStore(Room(blocks * BLOCK_BYTES))


def _put(store: PrefixStore, tokens: np.ndarray, before: int = 0, salt: str = "", name: bytes | None = None) -> int:
    """Puts the last block of `tokens` after the block number `before`."""
    space = space_of(LAYOUT, salt)
    put = messages.PutPrefixBlock((IDS, HEAD, HEAD, HEAD), space, LAYOUT, name or chain_of(space, tokens, 64)[-1], before)
    return store.put(put, tokens[-64:], [memoryview(bytearray(16)) for _ in range(3)])


def _put_all(store: PrefixStore, tokens: np.ndarray, salt: str = "") -> list[int]:
    """Puts all blocks of `tokens`; gives their numbers."""
    numbers = [0]
    for end in range(64, len(tokens) + 1, 64):
        numbers.append(_put(store, tokens[:end], numbers[-1], salt))
        assert numbers[-1]
    return numbers[1:]


def _found(store: PrefixStore, tokens: np.ndarray, salt: str = "", layout: messages.KVLayout = LAYOUT) -> int:
    space = space_of(layout, salt)
    held = store.find(messages.FindPrefix((IDS,), space, layout, chain_of(space, tokens, 64)), tokens)
    store.give_back(held)
    assert [block.tokens for block in held.blocks] == [tokens[64 * i : 64 * i + 64].tobytes() for i in range(len(held.blocks))]
    return len(held.blocks)


def test_a_text_finds_the_blocks_that_it_begins_with_and_no_others() -> None:
    store = _store()
    _put_all(store, TEXT[:192])
    assert _found(store, TEXT) == 3 and _found(store, TEXT[:128]) == 2
    other = TEXT.copy()
    other[64] += 1
    assert _found(store, other) == 1  # its second block has the later tokens of the first text, after another one
    other[0] += 1
    assert _found(store, other) == 0
    assert _found(store, np.append(TEXT[64:128], TEXT[64:128])) == 0  # a block is found in its place alone


def test_two_tenants_with_different_salts_share_nothing() -> None:
    store = _store()
    _put_all(store, TEXT, "one")
    assert (_found(store, TEXT, "one"), _found(store, TEXT, "two"), _found(store, TEXT)) == (4, 0, 0)
    _put_all(store, TEXT[:64], "two")
    assert _found(store, TEXT, "two") == 1 and store.room.used_bytes == 5 * BLOCK_BYTES


@pytest.mark.parametrize("change", [{"model": "another"}, {"dtype": DType.BF16}, {"head_dim": 16}])
def test_blocks_of_another_model_or_dtype_are_not_found(change: dict[str, object]) -> None:
    store = _store()
    _put_all(store, TEXT)
    assert _found(store, TEXT, layout=msgspec.structs.replace(LAYOUT, **change)) == 0
    assert _found(store, TEXT, layout=msgspec.structs.replace(LAYOUT, max_length=4096)) == 4  # sessions of any length share


def test_a_collision_of_names_is_no_hit_since_tokens_are_compared() -> None:
    store, other, space = _store(), TEXT + 1000, space_of(LAYOUT, "")
    names = chain_of(space, TEXT, 64)
    first, *_ = _put_all(store, TEXT)
    held = store.find(messages.FindPrefix((IDS,), space, LAYOUT, names), other)  # another text with the very names of this one
    assert held.blocks == () and store.room.held_bytes == 0
    mixed = np.append(TEXT[:64], other[64:])
    assert len(store.find(messages.FindPrefix((IDS,), space, LAYOUT, names), mixed).blocks) == 1
    assert _put(store, mixed[:128], first, name=names[1]) == 0  # the first text of a name stays
    assert _found(store, TEXT) == 4


def test_equal_tokens_after_other_ones_are_another_block_even_under_one_name() -> None:
    store, space = _store(), space_of(LAYOUT, "")
    other = np.append(TEXT[:64] + 1, TEXT[64:128])
    second = b"s" * 16  # the name of both second blocks
    one, two = (_put(store, text[:64]) for text in (TEXT, other))
    assert _put(store, TEXT[:128], one, name=second)
    names = (chain_of(space, other, 64)[0], second)
    assert _put(store, other, two, name=second) == 0
    assert len(store.find(messages.FindPrefix((IDS,), space, LAYOUT, names), other).blocks) == 1


def test_a_collision_leaves_the_order_of_drops_alone_so_that_the_last_block_of_a_prefix_goes_first() -> None:
    store, space = _store(3), space_of(LAYOUT, "")
    first, second = _put_all(store, TEXT[:128])
    _put_all(store, TEXT[:64] + 500)
    assert _put(store, TEXT[:64] + 700, name=chain_of(space, TEXT, 64)[1]) == 0  # another text under the name of the second block
    _put_all(store, TEXT[:64] + 900)
    assert (_found(store, TEXT), _found(store, TEXT[:64] + 500), _found(store, TEXT[:64] + 900)) == (1, 1, 1)
    with pytest.raises(Refused, match=f"block {second}, before the one that came, is not kept"):
        _put(store, TEXT[:192], second)
    assert _put(store, TEXT[:128], first)


def test_an_equal_block_is_kept_once_under_its_first_number() -> None:
    store = _store()
    assert _put_all(store, TEXT) == _put_all(store, TEXT) == [1, 2, 3, 4]
    assert store.room.used_bytes == 4 * BLOCK_BYTES


@pytest.mark.parametrize("before", [1, 7])
def test_a_block_after_one_that_is_not_kept_or_is_of_another_space_is_refused(before: int) -> None:
    store = _store()
    _put(store, TEXT[:64], salt="another")  # number 1
    with pytest.raises(Refused, match=f"block {before}, before the one that came, is not kept") as error:
        _put(store, TEXT[:128], before)
    assert error.value.code == "gone"


def test_the_least_recently_used_goes_first_and_a_prefix_outlives_its_ends() -> None:
    store = _store(4)
    _put_all(store, TEXT[:192])
    _put_all(store, TEXT[:128] + 500)
    assert (_found(store, TEXT), _found(store, TEXT + 500)) == (2, 2)  # the end of the first one made room
    _found(store, TEXT)  # used now
    _put_all(store, TEXT[:64] + 900)
    assert (_found(store, TEXT), _found(store, TEXT + 500), _found(store, TEXT + 900)) == (2, 1, 1)
    assert store.room.used_bytes == 4 * BLOCK_BYTES


def test_blocks_that_are_held_stay_and_a_put_without_room_beside_them_is_refused_whole() -> None:
    store, space = _store(3), space_of(LAYOUT, "")
    _put_all(store, TEXT[:192])
    find = messages.FindPrefix((IDS,), space, LAYOUT, chain_of(space, TEXT, 64))
    first, second = store.find(find, TEXT), store.find(find, TEXT)
    with pytest.raises(Refused, match=r"do not fit: .* are in use now") as error:
        _put(store, TEXT[:64] + 500)
    assert error.value.code == "budget" and _found(store, TEXT + 500) == 0
    store.give_back(first)
    assert store.room.held_bytes == 3 * BLOCK_BYTES  # the second holder's
    store.give_back(second)
    _put_all(store, TEXT[:192] + 700)
    assert store.room.held_bytes == 0 and _found(store, TEXT + 700) == 3 and _found(store, TEXT) == 0


def test_a_prefix_longer_than_the_budget_keeps_its_beginning() -> None:
    store = _store(3)
    *_, last = _put_all(store, TEXT[:192])
    with pytest.raises(Refused, match="do not fit") as error:
        _put(store, TEXT, last)
    assert error.value.code == "budget" and _found(store, TEXT) == 3


def test_a_prefix_is_no_longer_than_the_chains_that_can_find_it() -> None:
    store, space = _store(MOST_BLOCKS + 1), space_of(LAYOUT, "")
    payloads = [memoryview(bytearray(16))] * 3
    put, number = messages.PutPrefixBlock((IDS, HEAD, HEAD, HEAD), space, LAYOUT, b"", 0), 0
    for depth in range(MOST_BLOCKS):
        number = store.put(msgspec.structs.replace(put, name=depth.to_bytes(16, "big"), before=number), TEXT[:64], payloads)
    with pytest.raises(Refused, match="2048 blocks at most, this one is number 2049") as error:
        store.put(msgspec.structs.replace(put, name=b"n" * 16, before=number), TEXT[:64], payloads)
    assert error.value.code == "place" and store.room.used_bytes == MOST_BLOCKS * BLOCK_BYTES


def test_what_is_kept_takes_no_more_memory_than_it_counts() -> None:
    store = _store(300)
    tracemalloc.start()
    try:
        for number in range(1000):
            _put(store, TEXT[:64] + 1000 * np.uint32(number))
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert store.room.used_bytes == 300 * BLOCK_BYTES and taken < store.room.budget_bytes


@pytest.mark.parametrize(
    ("request_of", "tokens", "why"),
    [
        ({"layout": None}, TEXT[:64], "with the layout of its blocks"),
        ({}, TEXT[:63], "send the ids of whole blocks"),
        ({}, TEXT[:64].astype(np.int32), "send the ids of whole blocks"),
        ({"tensors": (IDS, HEAD)}, TEXT[:64], "1 layers came of a block of 3"),
        ({"tensors": (IDS, HEAD, HEAD, IDS)}, TEXT[:64], "the block's are F32"),
    ],
)
def test_a_malformed_put_is_refused_by_name_and_keeps_nothing(request_of: dict[str, object], tokens: np.ndarray, why: str) -> None:
    store, space = _store(), space_of(LAYOUT, "")
    put = messages.PutPrefixBlock((IDS, HEAD, HEAD, HEAD), space, LAYOUT, b"n" * 16)
    with pytest.raises(Refused, match=why):
        store.put(msgspec.structs.replace(put, **request_of), tokens, [memoryview(bytearray(16))] * 3)
    assert store.room.used_bytes == 0


@pytest.mark.parametrize(
    ("kv", "keeps", "apart"),
    [
        ("raw", "lossy", False),
        ("planes_zstd", "bitwise", False),
        ("auto", "bitwise", False),
        ("auto", "tokens", False),
        ("auto", "lossy", True),
        ("int8", "lossy", True),
        ("int4", "lossy", True),
    ],
)
def test_a_session_shares_blocks_with_exact_ones_if_and_only_if_its_own_never_change(kv: str, keeps: str, apart: bool) -> None:
    def name(policy: Policy) -> str:
        return model_name("weights", {}, "raw", policy.lossy_kv)

    own, others = Policy(codec=CodecChoice(kv=kv), keeps=keeps, recovery="delta"), [Policy(), *LOSSY]  # type: ignore[arg-type]
    assert (name(own) != name(Policy())) is apart
    assert len({name(each) for each in others}) == len(others)  # nor do sessions with different lossy codecs share any


LOSSY = [Policy(codec=CodecChoice(kv=kv), keeps="lossy", recovery="delta") for kv in ("int8", "int4", "auto")]


def test_spaces_differ_by_executor_and_layout() -> None:
    assert space_of(LAYOUT, "", "fused") != space_of(LAYOUT, "", "eager")
    assert space_of(LAYOUT, "") != space_of(msgspec.structs.replace(LAYOUT, model="another"), "")


def test_a_model_s_name_covers_its_config_and_a_lossy_codec_of_its_weights() -> None:
    def name(theta: float, codec: str) -> str:
        return model_name("weights", {"rope": {"theta": theta}, "layers": 2}, codec)

    assert name(1e4, "raw") == name(1e4, "zstd") == model_name("weights", {"layers": 2, "rope": {"theta": 1e4}}, "raw")
    assert len({name(1e4, "raw"), name(1e6, "raw"), name(1e4, "fp16"), model_name("others", {"rope": {"theta": 1e4}}, "raw")}) == 4


def test_names_depend_on_all_tokens_before_them_and_are_bounded_in_number() -> None:
    space = space_of(LAYOUT, "")
    one, other = chain_of(space, TEXT, 64), chain_of(space, np.append(TEXT[:1] + 1, TEXT[1:]), 64)
    assert len(one) == 4 and not set(one) & set(other)
    assert chain_of(space, TEXT[:100], 64) == one[:1]
    assert len(chain_of(space, np.zeros(64 * (MOST_BLOCKS + 2), np.uint32), 64)) == MOST_BLOCKS
