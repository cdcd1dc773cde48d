"""Each fault between workers and their KV host, twenty times, at a moment of its own each time: right tokens, or an error that names it.

After each try the processes, the KV host and the temporary files are as before it.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kv_worlds import World, policy, put_under_names, recovered, row_of, rows_alone

from semgap.client.remote_runtime import RemoteRuntime
from semgap.kv.block_store import BLOCK_BYTES, HANDLE_BYTES
from semgap.kv.prefix_store import LAYER_BYTES, PREFIX_BLOCK_BYTES
from semgap.wire.frames import WireError
from semgap.wire.link import RemoteError
from semgap.wire.messages import Kind
from semgap.wire.reconcile import reconcile

TRIES = 20
PROMPT = np.random.default_rng(5).integers(0, 512, 300)
LAYERS, BLOCKS, STEPS = 3, 4, 2  # whole blocks of the prompt
KEPT_BYTES = 2 * 2 * 64 * 32 * 4  # a layer's block
PREFIX_BYTES = PREFIX_BLOCK_BYTES + LAYERS * (LAYER_BYTES + KEPT_BYTES)  # a block of all layers, with its books
WHOLE_BYTES = LAYERS * KEPT_BYTES * 300 // 64  # the prompt's cache
PATIENCE_S = 2.0
"""The least wait for blocks, which is more than ten passes of this model."""

UNTIMED_PATIENCE_S = 10.0
"""The wait of a mode that does not time its passes."""

SLACK_S = 5.0  # twenty tries beside each other, on a busy machine


@dataclass
class Case:
    """One fault's tries. `used_bytes`: what the KV host is to keep after the try; `rows`: the logits that are right."""

    world: World
    rows: list[np.ndarray]
    other_theta: Path
    used_bytes: int = 0
    number: int = 0

    def salt(self) -> str:
        self.number += 1
        return f"tenant {self.number} of {id(self)}"

    def reader(self, salt: str, way: str = "fetch_blocks", **more: Any) -> RemoteRuntime:
        return self.world.open(self.world.first, policy(way, **more), salt=salt)

    def publisher(self, salt: str, tokens: np.ndarray = PROMPT, publishes: bool = True, **more: Any) -> RemoteRuntime:
        """A session that has computed `tokens`, and published them if not said otherwise."""
        one = self.world.open(self.world.second, policy("fetch_blocks", **more.pop("policy", {})), salt=salt, **more)
        one.prefill(tokens, 0, Kind.SETUP)
        if publishes:
            assert one.publish().kept == len(tokens) // 64
            self.used_bytes += len(tokens) // 64 * PREFIX_BYTES
        return one

    def read(self, runtime: RemoteRuntime) -> dict[str, Any]:
        """Runs the prompt, which must give the right logits, and a step after it; the record of the prefill."""
        seen = row_of(runtime.prefill(PROMPT, self.number, Kind.REGULAR))
        record = recovered(runtime)
        assert np.array_equal(seen, self.rows[0]) and self.goes_on(runtime, 1)
        return record

    def goes_on(self, runtime: RemoteRuntime, steps: int = STEPS) -> bool:
        """True if the next steps have the right logits, bit for bit."""
        seen = [row_of(next(iter(runtime.decode(int(self.rows[step].argmax()), 1, Kind.REGULAR)))) for step in range(steps)]
        return all(np.array_equal(ours, theirs) for ours, theirs in zip(seen, self.rows[1:], strict=False))

    def found(self, salt: str) -> int:
        """The blocks that a new session fetches, whole, and goes on with."""
        record = self.read(self.reader(salt))
        assert record["fallback"] is None
        return int(record["missing_bytes"] // (LAYERS * KEPT_BYTES))

    def pair(self, **more: Any) -> tuple[RemoteRuntime, RemoteRuntime]:
        """Sessions between which a request moves."""
        return self.world.open(self.world.first, policy(**more)), self.world.open(self.world.second, policy(**more))

    def promised(self, one: RemoteRuntime, other: RemoteRuntime, expects: bool) -> bytes:
        """The name of a request that one worker will compute, which another one `expects` or merely takes over."""
        kv_id = one.hand_over()
        if expects:
            other.expect(kv_id, len(PROMPT))
        return kv_id

    def begun(self, one: RemoteRuntime, other: RemoteRuntime, expects: bool = False) -> bytes:
        """The same after its prefill."""
        kv_id = self.promised(one, other, expects)
        assert np.array_equal(row_of(one.prefill(PROMPT, 0, Kind.REGULAR)), self.rows[0])
        return kv_id


def reason_of(fallback: str | None) -> str:
    """Its code, `none`, or `lost` for blocks that had to go for others."""
    if fallback is None:
        return "none"
    return "lost" if "were never saved" in fallback else fallback.partition(":")[0]


def at_byte(offset: int, strike: Callable[[], None], down: bool, cuts: bool = False) -> Callable[[int, bool, int], float]:
    """Strikes once, when the piece with a byte of one direction is about to go on; it does not if the whole machine dies (`cuts`)."""
    struck: list[bool] = []

    def meanwhile(_: int, is_down: bool, passed: int) -> float:
        if is_down is down and passed > offset and not struck:
            struck.append(True)
            strike()
            return -1.0 if cuts else 0.0
        return 0.0

    return meanwhile


def prefix_link_too_slow(case: Case, dice: random.Random) -> Iterator[str]:
    """The link slows down at a byte of each fetch, and stays so: 4 KiB in half a second."""
    salt, world = case.salt(), case.world
    case.publisher(salt)
    readers = [case.reader(salt, dice.choice(("fetch_blocks", "fetch_whole", "auto"))) for _ in range(TRIES)]
    for reader in readers:
        reader.prefill(PROMPT[::-1].copy(), 99, Kind.SETUP)  # the session knows how fast it computes
        reader.end_request()
    slow_from = {number: dice.randrange(BLOCKS * LAYERS * KEPT_BYTES) for number in range(10_000)}
    world.near.piece_bytes = 4096
    world.near.meanwhile = lambda number, down, passed: 0.5 * (down and passed > slow_from[number])
    with ThreadPoolExecutor(TRIES) as pool:
        records = list(pool.map(case.read, readers))
    for record in records:
        assert record["stall_ns"] < 1e9 * (PATIENCE_S + SLACK_S)
        assert record["how"] == ("recompute" if record["fallback"] else record["planned"])
        assert reason_of(record["fallback"]) != "late" or re.match(r"late: \d of 3 layers came within", record["fallback"])
        yield reason_of(record["fallback"])


def publisher_killed(case: Case, dice: random.Random) -> str:
    salt, world = case.salt(), case.world
    one = case.publisher(salt, publishes=False)
    world.far.meanwhile = at_byte(dice.randrange(BLOCKS * LAYERS * KEPT_BYTES), lambda: world.kill(one), False, dice.random() < 0.5)
    with pytest.raises(WireError):
        one.publish()
    blocks = case.found(salt)
    case.used_bytes += blocks * PREFIX_BYTES
    return "some blocks" if blocks else "no block"


def reader_killed(case: Case, dice: random.Random) -> str:
    salt, world = case.salt(), case.world
    case.publisher(salt)
    other = case.reader(salt, dice.choice(("fetch_blocks", "fetch_whole")))
    world.near.meanwhile = at_byte(dice.randrange(BLOCKS * LAYERS * KEPT_BYTES), lambda: world.kill(other), down=True)
    with pytest.raises(WireError):
        other.prefill(PROMPT, 0, Kind.REGULAR)
    world.near.meanwhile = None
    return f"{case.found(salt)} blocks"


def host_full(case: Case, dice: random.Random) -> str:
    """Three blocks fit, and no more beside those that somebody holds."""
    salt, blocks, world = case.salt(), dice.randrange(1, BLOCKS + 1), case.world
    with world.small_host(3 * PREFIX_BYTES + HANDLE_BYTES + dice.randrange(BLOCK_BYTES)):
        one = case.publisher(salt, PROMPT[: 64 * blocks], publishes=False)
        if blocks == BLOCKS:
            with pytest.raises(RemoteError, match=r"could not be published: the KV host: .* do not fit") as error:
                one.publish()
            assert error.value.code == "recovery"
        else:
            assert one.publish().kept == blocks
        assert case.found(salt) == min(3, blocks)
        assert world.used_bytes() == min(3, blocks) * PREFIX_BYTES
        world.require_nothing_left(min(3, blocks) * PREFIX_BYTES)
    return "refused" if blocks == BLOCKS else "kept"


def host_restarted(case: Case, dice: random.Random) -> str:
    """It dies at a byte of the fetch, or before it, and comes back or stays away for a request."""
    salt, world = case.salt(), case.world
    case.publisher(salt)
    other, at = case.reader(salt, dice.choice(("fetch_blocks", "fetch_whole"))), dice.randrange(BLOCKS * LAYERS * KEPT_BYTES)
    if dice.random() < 0.25:
        world.kill_host()
    else:
        world.near.meanwhile = at_byte(at, world.kill_host, down=True)
    before = case.read(other)
    world.near.meanwhile = None
    world.revive_host()
    case.used_bytes = 0
    after = case.read(other)
    assert after["fallback"] is None or before["fallback"] is None  # a link is made anew once
    return reason_of(before["fallback"])


def other_models_blocks(case: Case, dice: random.Random) -> str:
    salt = case.salt()
    which = dice.choice(("name", "config", "executor", "lossy codec"))
    more: dict[str, dict[str, Any]] = {
        "name": {"model_id": f"another model {dice.random()}"},
        "config": {"model": case.other_theta},
        "executor": {"executor": "eager"},
        "lossy codec": {"policy": {"kv": "int8", "keeps": "lossy"}},
    }
    before = case.world.used_bytes()
    case.publisher(salt, PROMPT[: 64 * dice.randrange(1, BLOCKS + 1)], **more[which])
    assert case.found(salt) == 0
    case.used_bytes = case.world.used_bytes()
    assert case.used_bytes > before
    return which


def names_collide(case: Case, dice: random.Random) -> str:
    """From a block on, another text's blocks lie under the very names of the prompt's."""
    salt, world, first = case.salt(), case.world, dice.randrange(BLOCKS)
    if first:
        case.publisher(salt, PROMPT[: 64 * first])
    link = world.link()
    case.used_bytes += PREFIX_BYTES * put_under_names(link, world.model, salt, PROMPT, first, other=(PROMPT + dice.randrange(1, 512)) % 512)
    link.close()
    assert case.found(salt) == first
    late = case.publisher(salt, publishes=False)
    assert (late.publish().kept, case.found(salt)) == (first, first)  # the first text of a name stays
    return f"from block {first}"


def no_salt(case: Case, dice: random.Random) -> str:
    salt = case.salt()
    case.publisher(salt, PROMPT[: 64 * dice.randrange(1, BLOCKS + 1)])
    other = dice.choice(("", salt[:-1], salt + " ", salt.upper(), case.salt()))
    record = case.read(case.reader(other))
    assert record["missing_bytes"] == 0 and record["fetched_network_bytes"] < 2000 and record["fallback"] is None
    return "nothing found"


def handover_link_too_slow(case: Case, dice: random.Random) -> Iterator[str]:
    """The first worker's link slows down at a byte of its blocks, and stays so."""
    world = case.world
    ways = [dice.choice(("delta", "delta", "reload")) for _ in range(TRIES)]
    pairs = [case.pair(recovery=way) for way in ways]
    slow_from = {number: dice.randrange(WHOLE_BYTES) for number in range(10_000)}

    def move(pair: tuple[RemoteRuntime, RemoteRuntime]) -> str:
        one, other = pair
        flushed = one.flush(Kind.REGULAR)
        other.attach(kv_ids[one] if flushed.kept else None, 0, PROMPT, Kind.REGULAR)
        assert case.goes_on(other) and flushed.after_ns < 1e9 * (PATIENCE_S + SLACK_S)
        assert flushed.kept or re.search("late: .* were at the KV host after a wait of 2.0 s", flushed.fallback or "")
        assert recovered(other) is None or recovered(other)["fallback"] is None
        return reason_of(flushed.fallback)

    world.near.piece_bytes = 4096
    world.near.meanwhile = lambda number, down, passed: 0.5 * (not down and passed > slow_from[number])
    expects = [way == "delta" and dice.random() < 0.5 for way in ways]
    kv_ids = {pair[0]: case.begun(*pair, each) for pair, each in zip(pairs, expects, strict=True)}
    with ThreadPoolExecutor(TRIES) as pool:
        yield from pool.map(move, pairs)


def restore_link_too_slow(case: Case, dice: random.Random) -> Iterator[str]:
    """The worker's link slows down at a byte of what a step misses, and stays so."""
    world = case.world
    ones = []
    for _ in range(TRIES):
        world.near.delay_s = dice.choice((0.0, 0.005))  # over the second, a session has blocks fetched while it computes
        ones.append(world.open(world.first, policy(recovery=dice.choice(("delta", "reload")))))
    world.near.delay_s = 0.0
    for one in ones:
        one.prefill(PROMPT, 0, Kind.SETUP)
        one.evict(range(LAYERS))
    slow_from = {number: dice.randrange(WHOLE_BYTES) for number in range(10_000)}
    world.near.piece_bytes = 4096
    world.near.meanwhile = lambda number, down, passed: 0.5 * (down and passed > slow_from[number])

    def step(one: RemoteRuntime) -> str:
        assert case.goes_on(one, 1)
        record = recovered(one)
        assert record["stall_ns"] < 1e9 * (UNTIMED_PATIENCE_S + SLACK_S)
        return reason_of(record["fallback"])

    with ThreadPoolExecutor(TRIES) as pool:
        yield from pool.map(step, ones)


def first_worker_killed(case: Case, dice: random.Random) -> str:
    """While its layers stream."""
    world = case.world
    one, other = case.pair()
    kv_id = case.promised(one, other, dice.random() < 0.5)
    world.near.meanwhile = at_byte(dice.randrange(WHOLE_BYTES), lambda: world.kill(one), False, dice.random() < 0.5)
    with pytest.raises(WireError):
        one.prefill(PROMPT, 0, Kind.REGULAR)
        one.flush(Kind.REGULAR)
    other.attach(kv_id, 0, PROMPT, Kind.REGULAR)
    assert case.goes_on(other)
    return reason_of(_fallback(other))


def second_worker_killed(case: Case, dice: random.Random) -> str:
    """While it follows the first one's blocks; or after it took over: at once, while its blocks come, or after steps."""
    world = case.world
    one, other = case.pair()
    steps = dice.randrange(-2, STEPS + 1)
    if steps < -1:
        world.far.meanwhile = at_byte(dice.randrange(WHOLE_BYTES), lambda: world.kill(other), down=True)
        kv_id = case.begun(one, other, expects=True)
        assert one.flush(Kind.REGULAR).kept
        with pytest.raises(WireError):
            other.attach(kv_id, 0, PROMPT, Kind.REGULAR)
        assert case.goes_on(one)
        return "while it followed"
    kv_id = case.begun(one, other, expects=steps >= 0 and dice.random() < 0.5)
    assert one.flush(Kind.REGULAR).kept
    other.attach(kv_id, 0, PROMPT, Kind.REGULAR)
    if steps < 0:
        world.far.meanwhile = at_byte(dice.randrange(WHOLE_BYTES), lambda: world.kill(other), down=True)
    else:
        assert case.goes_on(other, steps)
        world.kill(other)
    with pytest.raises(WireError):
        case.goes_on(other, 1)
    assert case.goes_on(one)  # it still has what it computed
    return "while blocks came" if steps < 0 else f"after {steps} steps"


def host_full_for_handles(case: Case, dice: random.Random) -> str:
    """At a random part of the cache."""
    world, fallback = case.world, dice.random() < 0.5
    with world.small_host(HANDLE_BYTES + dice.randrange(BLOCK_BYTES, WHOLE_BYTES)):
        one, other = case.pair(fallback=fallback)
        kv_id = case.begun(one, other, dice.random() < 0.5)
        try:
            flushed = one.flush(Kind.REGULAR)
        except RemoteError as error:
            assert error.code == "recovery" and not fallback
            assert re.search("could not be saved: the KV host: .* bytes of blocks", str(error))
            assert case.goes_on(one)
            said = "refused"
        else:
            said = reason_of(flushed.fallback)
            try:
                other.attach(kv_id if flushed.kept else None, 0, PROMPT, Kind.REGULAR)
                assert case.goes_on(other)
                said = said if said != "none" else reason_of(_fallback(other))
            except RemoteError as error:  # the first layers had to go for the last ones
                assert error.code == "recovery" and not fallback and "were never saved, and the mode says fallback: false" in str(error)
                said = "refused"
        world.require_nothing_left(0)
    return said


def host_restarted_in_a_handover(case: Case, dice: random.Random) -> str:
    """It dies at a byte of the first worker's blocks, or between the workers, and comes back or not before the second takes over."""
    world, back_at_once = case.world, dice.random() < 0.5
    one, other = case.pair()
    kv_id = case.promised(one, other, dice.random() < 0.5)
    between = dice.random() < 0.25
    if not between:
        world.near.meanwhile = at_byte(dice.randrange(WHOLE_BYTES), world.kill_host, down=False)
    assert np.array_equal(row_of(one.prefill(PROMPT, 0, Kind.REGULAR)), case.rows[0])
    flushed = one.flush(Kind.REGULAR)
    world.near.meanwhile = None
    if between:
        assert flushed.kept
        world.kill_host()
    if back_at_once:
        world.revive_host()
    other.attach(kv_id if flushed.kept else None, 0, PROMPT, Kind.REGULAR)
    assert case.goes_on(other)
    if not back_at_once:
        world.revive_host()
    case.used_bytes = 0
    return reason_of(flushed.fallback or _fallback(other))


def other_models_handle(case: Case, dice: random.Random) -> str:
    world = case.world
    one, other = case.pair()
    kv_id = case.begun(one, other, dice.random() < 0.5)
    assert one.flush(Kind.REGULAR).kept
    which = dice.choice(("name", "config", "text"))
    if which == "text":
        changed = PROMPT.copy()
        place = dice.randrange(len(PROMPT))
        changed[place] = (changed[place] + 1) % 512
        other.attach(kv_id, 0, changed, Kind.REGULAR)
        expected = rows_alone(world.model, changed, 1)
        seen = row_of(next(iter(other.decode(int(expected[0].argmax()), 1, Kind.REGULAR))))
        assert np.array_equal(seen, expected[1])
        return which
    more: dict[str, Any] = {"model_id": "another"} if which == "name" else {"model": case.other_theta}
    stranger = world.open(world.second, policy(), **more)
    with pytest.raises(RemoteError, match="use the same model") as error:
        stranger.attach(kv_id, 0, PROMPT, Kind.REGULAR)
    assert error.value.code == "layout"
    other.attach(kv_id, 0, PROMPT, Kind.REGULAR)  # it is as it was
    assert case.goes_on(other) and _fallback(other) is None
    return which


def no_name(case: Case, dice: random.Random) -> str:
    """Who does not know a handle's name has none of it."""
    one, other = case.pair(fallback=dice.random() < 0.5)
    kv_id = case.begun(one, other, dice.random() < 0.5)
    assert one.flush(Kind.REGULAR).kept
    guess = bytearray(kv_id)
    guess[dice.randrange(16)] ^= 1 << dice.randrange(8)
    try:
        other.attach(bytes(guess), 0, PROMPT, Kind.REGULAR)
    except RemoteError as error:
        assert "is not kept here" in str(error) and error.code in ("unknown", "recovery")
        return "refused"
    assert case.goes_on(other)
    return reason_of(_fallback(other))


def _fallback(runtime: RemoteRuntime) -> str | None:
    """The first reason why this session computed again."""
    said: list[str] = reconcile(runtime.link)["peer"]["fallbacks"]
    return said[0] if said else None


FAULTS: dict[str, tuple[Callable[[Case, random.Random], Any], set[str], set[str]]] = {
    "prefix: the link is slower than computing": (prefix_link_too_slow, {"late", "deadline"}, {"none"}),
    "prefix: who publishes is killed": (publisher_killed, {"some blocks", "no block"}, set()),
    "prefix: who fetches is killed": (reader_killed, {"4 blocks"}, set()),
    "prefix: the KV host is full": (host_full, {"refused", "kept"}, set()),
    "prefix: the KV host is restarted": (host_restarted, {"closed", "none"}, {"truncated"}),
    "prefix: the KV host has another model's blocks": (other_models_blocks, {"name", "config", "executor", "lossy codec"}, set()),
    "prefix: names collide": (names_collide, {f"from block {number}" for number in range(BLOCKS)}, set()),
    "prefix: a tenant has no salt": (no_salt, {"nothing found"}, set()),
    "recovery: the link is slower than computing": (restore_link_too_slow, {"late", "deadline"}, {"none"}),
    "handover: the link is slower than computing": (handover_link_too_slow, {"late"}, {"none"}),
    "handover: the first worker is killed": (first_worker_killed, set(), {"unknown", "lost", "none"}),
    "handover: the second worker is killed": (
        second_worker_killed,
        {"while it followed", "while blocks came", "after 0 steps"},
        {"after 1 steps", "after 2 steps"},
    ),
    "handover: the KV host is full": (host_full_for_handles, {"refused", "budget", "lost"}, set()),
    "handover: the KV host is restarted": (host_restarted_in_a_handover, {"closed"}, {"truncated", "unknown"}),
    "handover: the KV host has another model's blocks": (other_models_handle, {"name", "config", "text"}, set()),
    "handover: a tenant has no name": (no_name, {"unknown", "refused"}, set()),
}
"""Each fault, the outcomes of which all must be seen, and those that may be."""


@pytest.fixture(scope="module")
def started(long_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World.started(long_llama, tmp_path_factory.mktemp("world")) as world:
        yield world


@pytest.fixture(scope="module")
def rows(long_llama: Path) -> list[np.ndarray]:
    return rows_alone(long_llama, PROMPT, STEPS)


@pytest.mark.parametrize("name", FAULTS)
def test_twenty_tries_end_in_right_tokens_or_a_clear_error_and_leave_nothing(
    started: World,
    rows: list[np.ndarray],
    other_theta: Path,
    open_runtime: Callable[..., RemoteRuntime],
    wait_until: Callable[..., None],
    name: str,
) -> None:
    started.open_runtime, started.wait_until = open_runtime, wait_until
    fault, seen, allowed = FAULTS[name]
    dice, outcomes = random.Random(name), Counter[str]()
    case = Case(started, rows, other_theta, started.used_bytes())
    try:
        while outcomes.total() < TRIES:
            said = fault(case, dice)
            outcomes.update([said] if isinstance(said, str) else said)
            started.require_nothing_left(case.used_bytes)
    finally:
        started.close()
    assert seen <= set(outcomes) <= seen | allowed, outcomes
