"""The scheduler: each request draws the tokens that it draws alone, whatever shares its steps, and blocks are neither lost nor mixed up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduled_requests import MAX_LENGTH, POSITIONS, STOP, Engine, run_alone

from semgap.engine.live_request import CallError
from semgap.engine.scheduler import IDLE_S, PATIENCE_S
from semgap.policy import Batching
from semgap.wire.messages import Call

BATCHINGS = {
    "serial": Batching(turns="whole"),
    "interleave": Batching(),
    "window_blind": Batching(merges="alike", wait_ms=5),
    "same_weights": Batching(merges="alike"),
    "position": Batching(merges="lengths", step_tokens=16),
    "phase": Batching(merges="all", step_tokens=8),
    "prefix": Batching(merges="all", step_tokens=8, prefix=True),
    "deadline": Batching(merges="all", step_tokens=6, prefix=True, deadline=True),
    "deadline_blind": Batching(deadline=True),
    "narrow": Batching(merges="all", step_tokens=3, prefix=True, max_requests=3, max_queue=4),
}
SMALLEST = MAX_LENGTH // POSITIONS  # blocks of one request
PREFIX = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22]


def _engine(batching: Batching, blocks: int = 64) -> Engine:
    return Engine(batching, blocks)


def _keys(engine: Engine) -> list[tuple[int, int]]:
    return [each.key for each in engine.steps[-1]]


class Requests(RuleBasedStateMachine):
    """Sessions admit, go on with, cancel and leave requests, in any order with steps, in a pool that holds one request to all of them."""

    @initialize(name=st.sampled_from(sorted(BATCHINGS)), blocks=st.integers(SMALLEST, 4 * SMALLEST))
    def start(self, name: str, blocks: int) -> None:
        self.engine = _engine(BATCHINGS[name], blocks)
        self.number = 0

    @rule(
        session=st.integers(0, 3),
        shared=st.integers(0, len(PREFIX)),
        own=st.lists(st.integers(0, 3), min_size=1, max_size=6),
        draws=st.integers(1, 8),
        ends=st.booleans(),
        spare=st.integers(0, 8),
        deadline_us=st.sampled_from([0, 100_000, 900_000]),
    )
    def admit(self, session: int, shared: int, own: list[int], draws: int, ends: bool, spare: int, deadline_us: int) -> None:
        tokens = PREFIX[:shared] + own
        self.number += 1
        key, most = (session, self.number), min(MAX_LENGTH, len(tokens) + draws - 1 + spare)
        batching = self.engine.scheduler.batching
        slots = 1 if batching.turns == "whole" else batching.max_requests
        if len(self.engine.asked) < slots + batching.max_queue:
            self.engine.begin(key, tokens, draws, ends, most, deadline_us)
        else:
            with pytest.raises(CallError, match="requests are alive"):
                self.engine.begin(key, tokens, draws, ends, most, deadline_us)

    @precondition(lambda self: any(not asked.draws for asked in self.engine.asked.values()))
    @rule(data=st.data(), draws=st.integers(1, 6), fed=st.lists(st.integers(0, 3), max_size=5), ends=st.booleans())
    def go_on(self, data: st.DataObject, draws: int, fed: list[int], ends: bool) -> None:
        key = data.draw(st.sampled_from(sorted(key for key, asked in self.engine.asked.items() if not asked.draws)))
        asked = self.engine.asked[key]
        if asked.filled + max(1, len(fed)) + draws - 1 <= asked.most:
            self.engine.go_on(key, fed, draws, ends)
        else:
            with pytest.raises(CallError, match="would pass its"):
                self.engine.go_on(key, fed, draws, ends)

    @rule(wait_s=st.sampled_from([0.0, 0.001, 0.01, 1.0, PATIENCE_S]))
    def wait(self, wait_s: float) -> None:
        self.engine.now_s += wait_s

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step()

    @precondition(lambda self: self.engine.asked)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.engine.cancel(data.draw(st.sampled_from(sorted(self.engine.asked))))

    @rule(session=st.integers(0, 3))
    def die(self, session: int) -> None:
        self.engine.leave(session)

    @rule(session=st.integers(0, 3))
    def die_during_a_step(self, session: int) -> None:
        scheduled = self.engine.schedule()
        drawn = self.engine.model.run(scheduled, self.engine.tables)
        self.engine.leave(session)
        self.engine.take(scheduled, drawn)

    @invariant()
    def no_block_is_lost_or_has_other_tokens(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_blocks()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        while any(asked.draws for asked in self.engine.asked.values()):
            self.engine.step()
            self.engine.check_blocks()
        for key in list(self.engine.asked):
            self.engine.cancel(key)
        assert (self.engine.tables.held, self.engine.tables.shared) == (0, 0)
        assert (self.engine.scheduler.live, self.engine.scheduler.queued) == (0, 0)


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("name", BATCHINGS)
@pytest.mark.parametrize("blocks", [SMALLEST, 2 * SMALLEST, 16 * SMALLEST])
def test_requests_of_all_sessions_reach_their_ends_with_the_tokens_that_they_have_alone(name: str, blocks: int) -> None:
    engine = _engine(BATCHINGS[name], blocks)
    for number in range(7):
        engine.begin((number % 3, number), [*PREFIX[: 3 * (number % 5)], number], 14)
    while engine.asked:
        engine.step()
        engine.check_blocks()
    assert engine.tables.held == 0


def test_whole_turns_run_one_request_to_its_end_also_between_its_calls() -> None:
    engine = _engine(Batching(turns="whole"))
    engine.begin((0, 1), [1, 2], 1, ends=False, most=9)
    engine.begin((1, 1), [3, 4], 1)
    engine.step()
    assert engine.schedule() == [] and engine.scheduler.next_due_s(engine.now_s) == pytest.approx(IDLE_S)
    engine.go_on((0, 1), draws=2, ends=True)
    order = [_keys(engine)[0] for _ in range(3) if engine.step()]
    assert order == [(0, 1), (0, 1), (1, 1)]


def test_steps_in_turns_give_each_request_the_next_step() -> None:
    engine = _engine(Batching())
    for number in range(3):
        engine.begin((0, number), [number + 1], 3)
    order = [_keys(engine)[0][1] for _ in range(9) if engine.step()]
    assert order == [0, 1, 2] * 3


def test_calls_that_look_alike_share_a_step_and_others_do_not() -> None:
    engine = _engine(Batching(merges="alike"))
    for number, length in enumerate([2, 3, 2]):
        engine.begin((0, number), [number] * length, 1)
    engine.step()
    assert _keys(engine) == [(0, 0), (0, 2)]
    engine.step()
    assert _keys(engine) == [(0, 1)]


def test_a_call_waits_for_others_like_it_and_no_longer() -> None:
    engine = _engine(Batching(merges="alike", wait_ms=5))
    engine.begin((0, 0), [1, 2], 3)
    assert engine.schedule() == [] and engine.scheduler.next_due_s(engine.now_s) == pytest.approx(0.005)
    engine.now_s += 0.004
    assert engine.schedule() == [] and engine.scheduler.next_due_s(engine.now_s) == pytest.approx(0.001)
    engine.begin((1, 0), [3, 4], 3)
    engine.now_s += 0.0011
    engine.step()
    assert len(engine.steps[-1]) == 2
    assert len(engine.schedule()) == 2  # later draws of a call wait for nobody


def test_calls_that_fill_all_slots_do_not_wait() -> None:
    engine = _engine(Batching(merges="alike", wait_ms=5, max_requests=2))
    for number in range(2):
        engine.begin((0, number), [number], 1)
    assert len(engine.schedule()) == 2


def test_decodes_of_any_positions_share_a_step_but_none_with_a_prefill() -> None:
    engine = _engine(Batching(merges="lengths"))
    engine.begin((0, 0), [1, 2, 3], 5)
    engine.begin((0, 1), [1], 5)
    engine.step()
    engine.begin((0, 2), [4, 5], 5)
    engine.step()
    positions = sorted((each.run.position, each.run.tokens.size) for each in engine.steps[-1])
    assert positions in ([(0, 2)], [(1, 1), (3, 1)])
    engine.step()
    assert len(engine.steps[-1]) == 3 - len(positions)


def test_a_prompt_is_cut_to_what_the_decodes_of_its_step_leave() -> None:
    engine = _engine(Batching(merges="all", step_tokens=5))
    engine.begin((0, 0), [1], 9)
    engine.step()
    engine.begin((0, 1), list(range(11)), 1)
    sizes = []
    while (0, 1) in engine.asked:
        engine.step()
        sizes.append([each.run.tokens.size for each in engine.steps[-1]])
    assert sizes == [[1, 4], [1, 4], [1, 3]]


@pytest.mark.parametrize("merges", ["nothing", "alike", "lengths"])
def test_a_prompt_that_is_not_cut_may_be_longer_than_a_step(merges: str) -> None:
    engine = _engine(Batching(merges=merges, step_tokens=5))
    engine.begin((0, 0), list(range(11)), 1)
    engine.step()
    assert engine.steps[-1][0].run.tokens.size == 11


def test_a_prefix_that_another_request_computes_is_waited_for_and_computed_once() -> None:
    engine = _engine(Batching(merges="all", step_tokens=6, prefix=True))
    for number in range(4):
        engine.begin((number, 0), [*PREFIX, number], 2)
    shared = []
    while engine.asked:
        engine.step()
        engine.check_blocks()
        shared.append(engine.tables.shared)
    assert sum(each.run.tokens.size for step in engine.steps for each in step) == len(PREFIX) + 4 + 4
    assert max(shared) == len(PREFIX) // POSITIONS


def test_equal_prompts_of_whole_blocks_compute_their_last_block_each_and_at_once() -> None:
    engine = _engine(Batching(merges="all", step_tokens=64, prefix=True))
    for number in range(3):
        engine.begin((number, 0), PREFIX, 3)
    for _ in range(2):
        engine.step()
    assert [[each.run.tokens.size for each in step] for step in engine.steps] == [[12], [1, 4, 4]]
    engine.check_blocks()
    assert engine.tables.shared == 3
    engine.run_out()


def test_a_request_in_the_middle_of_a_block_does_not_wait_for_who_computes_it_too() -> None:
    engine = _engine(Batching(merges="all", step_tokens=3, prefix=True, deadline=True))
    engine.begin((0, 0), PREFIX[:6], 1, ends=False, most=20)
    engine.run_out()
    engine.begin((1, 0), PREFIX, 1)
    engine.step()
    engine.go_on((0, 0), PREFIX[6:], deadline_us=900_000)
    engine.step()
    assert _keys(engine) == [(0, 0)]
    engine.run_out()
    engine.check_blocks()


def test_without_prefix_nothing_is_shared() -> None:
    engine = _engine(Batching(merges="all", step_tokens=64))
    for number in range(2):
        engine.begin((number, 0), PREFIX, 2)
    engine.step()
    assert engine.tables.shared == 0 and engine.tables.held == 2 * len(PREFIX) // POSITIONS


def test_who_waits_for_a_prefix_computes_it_if_its_owner_dies() -> None:
    engine = _engine(Batching(merges="all", step_tokens=3, prefix=True))
    engine.begin((0, 0), PREFIX, 1)
    engine.begin((1, 0), PREFIX, 1)
    engine.step()
    assert _keys(engine) == [(0, 0)]
    engine.leave(0)
    engine.step()
    assert _keys(engine) == [(1, 0)]
    engine.run_out()


def test_an_urgent_request_that_waits_for_a_prefix_lends_its_turn_to_the_owner() -> None:
    engine = _engine(Batching(merges="all", step_tokens=3, prefix=True, deadline=True))
    engine.begin((0, 0), PREFIX, 1)
    engine.step()
    engine.begin((1, 0), [91, 92, 93, 94], 1, deadline_us=500_000)
    engine.begin((2, 0), PREFIX, 1, deadline_us=400_000)
    engine.step()
    assert _keys(engine)[0] == (0, 0)


def test_a_prefix_of_a_finished_request_is_adopted() -> None:
    engine = _engine(Batching(merges="all", step_tokens=64, prefix=True))
    engine.begin((0, 0), PREFIX, 1)
    engine.run_out()
    engine.begin((1, 0), [*PREFIX, 1], 1)
    engine.step()
    assert engine.steps[-1][0].run.position == len(PREFIX)


def test_the_least_slack_comes_first_and_those_too_late_last() -> None:
    engine = _engine(Batching(deadline=True))
    engine.begin((0, 0), [1], 1)
    engine.begin((0, 1), [2], 1, deadline_us=900_000)
    engine.begin((0, 2), [3], 1, deadline_us=300_000)
    engine.begin((0, 3), [4], 1, deadline_us=100_000)
    engine.now_s += 0.2
    order = [_keys(engine)[0][1] for _ in range(4) if engine.step()]
    assert order == [2, 1, 0, 3]


def test_the_least_slack_leaves_the_queue_first() -> None:
    engine = _engine(Batching(merges="all", deadline=True, max_requests=1))
    engine.begin((0, 0), [1], 1, deadline_us=900_000)
    engine.begin((0, 1), [2], 1, deadline_us=500_000)
    engine.step()
    assert _keys(engine) == [(0, 1)]


def test_a_long_prompt_has_less_slack_than_a_short_one_of_the_same_deadline() -> None:
    engine = _engine(Batching(deadline=True))
    engine.begin((0, 0), [1], 1)
    engine.step()  # a token takes 60 ms
    engine.begin((0, 1), [1, 2], 1, deadline_us=900_000)
    engine.begin((0, 2), [1, 2, 3, 4, 5, 6], 1, deadline_us=900_000)
    engine.step()
    assert _keys(engine) == [(0, 2)]


def test_whoever_has_waited_too_long_comes_before_all_deadlines() -> None:
    engine = _engine(Batching(deadline=True))
    engine.begin((0, 0), [1], 1)
    engine.now_s += PATIENCE_S + 1
    engine.begin((0, 1), [2], 1, deadline_us=100_000)
    engine.step()
    assert _keys(engine) == [(0, 0)]


def test_without_deadline_slack_counts_for_nothing() -> None:
    engine = _engine(Batching())
    engine.begin((0, 0), [1], 1)
    engine.begin((0, 1), [2], 1, deadline_us=100_000)
    engine.step()
    assert _keys(engine) == [(0, 0)]


def test_no_more_than_max_requests_run_and_the_queue_refuses_beyond_its_bound() -> None:
    engine = _engine(Batching(merges="all", max_requests=2, max_queue=1))
    for number in range(3):
        engine.begin((0, number), [number], 1)
    with pytest.raises(CallError, match="3 requests are alive and the queue takes 1") as refused:
        engine.begin((0, 3), [3], 1)
    assert refused.value.code == "queue"
    engine.schedule()
    assert (engine.scheduler.live, engine.scheduler.queued) == (2, 1)


def test_a_request_is_admitted_only_while_the_pool_has_room_for_it_beside_the_others() -> None:
    engine = _engine(Batching(merges="all", step_tokens=64), blocks=SMALLEST)
    engine.begin((0, 0), list(range(15)), 10)
    engine.begin((0, 1), list(range(15)), 10)
    engine.step()
    assert (engine.scheduler.live, engine.scheduler.queued) == (1, 1)
    engine.run_out()


def test_a_step_without_a_free_block_preempts_the_youngest_which_then_draws_the_right_tokens() -> None:
    engine = _engine(Batching(merges="all", step_tokens=64), blocks=SMALLEST)
    engine.begin((0, 0), list(range(4)), 28)
    engine.begin((0, 1), list(range(8)), 24)
    engine.step()
    assert engine.scheduler.live == 2
    while engine.scheduler.live == 2:
        engine.step()
    assert engine.scheduler.queued == 1
    assert engine.scheduler.requests[0, 0].runs and not engine.scheduler.requests[0, 1].runs
    engine.run_out()
    assert not engine.asked


def test_a_preempted_request_queues_before_younger_ones() -> None:
    engine = _engine(Batching(merges="all", step_tokens=64, max_requests=2), blocks=SMALLEST)
    engine.begin((0, 0), list(range(4)), 28)
    engine.begin((0, 1), list(range(8)), 24)
    engine.begin((0, 2), [1], 1)
    engine.step()
    while engine.scheduler.live == 2:
        engine.step()
    engine.step()
    assert _keys(engine) == [(0, 0)] and engine.scheduler.queued == 2
    engine.run_out()


def test_a_preempted_request_goes_on_from_its_prefix_if_its_blocks_are_still_there() -> None:
    engine = _engine(Batching(merges="all", step_tokens=64, prefix=True), blocks=SMALLEST)
    engine.begin((0, 0), [90, 91, 92, 93], 9)
    engine.begin((0, 1), PREFIX, 17, most=28)
    while (0, 0) in engine.asked:
        engine.step()
    engine.step()
    assert all(each.run.position >= POSITIONS for step in engine.steps[1:] for each in step if each.key == (0, 1))


def test_a_request_between_two_calls_gives_its_slot_to_the_queue_after_a_while_and_goes_on_later() -> None:
    engine = _engine(Batching(merges="all", max_requests=1))
    engine.begin((0, 0), [1, 2, 3], 1, ends=False, most=9)
    engine.step()
    engine.begin((1, 0), [4, 5], 2)
    assert engine.schedule() == []
    engine.now_s += IDLE_S
    engine.step()
    assert _keys(engine) == [(1, 0)]
    engine.go_on((0, 0), draws=2, ends=True)
    engine.run_out()
    assert not engine.asked


def test_a_later_request_does_not_overtake_a_larger_one_in_the_queue() -> None:
    engine = _engine(Batching(merges="all", step_tokens=64), blocks=SMALLEST)
    engine.begin((0, 0), list(range(12)), 1, ends=False)
    engine.begin((0, 1), list(range(30)), 1)
    engine.begin((0, 2), [1], 1)
    engine.step()
    assert _keys(engine) == [(0, 0)] and engine.scheduler.queued == 2


def test_a_stop_token_ends_its_call() -> None:
    prompt = next([first, second] for first in range(99) for second in range(99) if run_alone([first, second]) == STOP)
    engine = _engine(Batching())
    engine.begin((0, 0), prompt, 5)
    [outcome] = engine.step()
    assert outcome.token == STOP and outcome.last and engine.tables.held == 0


def test_a_client_may_feed_its_own_tokens_in_place_of_the_drawn_one() -> None:
    engine = _engine(Batching())
    engine.begin((0, 0), [1, 2], 1, ends=False, most=20)
    engine.step()
    engine.go_on((0, 0), [5, 6, 7], draws=2)
    engine.step()
    assert engine.steps[-1][0].run.tokens.tolist() == [5, 6, 7] and engine.steps[-1][0].run.position == 2
    engine.run_out()


def test_tokens_that_are_fed_without_draws_wait_for_the_next_draw() -> None:
    engine = _engine(Batching())
    engine.begin((0, 0), [1, 2], 1, ends=False, most=9)
    engine.step()
    engine.scheduler.add((0, 0), Call(0, 2, 2, 0), np.array([5, 6]), engine.now_s)
    assert engine.schedule() == []
    engine.asked[0, 0].tokens[2:] = [5, 6, 0]  # the drawn token is replaced, and none is drawn yet
    engine.go_on((0, 0), [7])
    engine.step()
    assert engine.steps[-1][0].run.tokens.tolist() == [5, 6, 7] and engine.steps[-1][0].run.position == 2


def test_an_outcome_says_how_long_its_token_queued_and_computed() -> None:
    engine = _engine(Batching(merges="all", step_tokens=4))
    engine.begin((0, 0), [1, 2, 3, 4, 5, 6], 2)
    engine.now_s += 0.25
    outcomes = [outcome for _ in range(3) for outcome in engine.step()]
    assert [round(outcome.queued_s, 6) for outcome in outcomes] == [0.25, 0.0]
    assert [round(outcome.compute_s, 6) for outcome in outcomes] == [0.12, 0.06]


def test_a_key_that_is_used_again_during_a_step_is_another_request() -> None:
    engine = _engine(Batching())
    engine.begin((0, 0), [1, 2], 3)
    scheduled = engine.schedule()
    drawn = engine.model.run(scheduled, engine.tables)
    engine.cancel((0, 0))
    engine.begin((0, 0), [5, 6, 7], 3)
    assert engine.take(scheduled, drawn) == []
    engine.run_out()


def test_draws_0_with_ends_releases_a_request_also_while_it_draws() -> None:
    engine = _engine(Batching())
    engine.begin((0, 0), [1, 2, 3, 4, 5], 5)
    engine.step()
    engine.scheduler.add((0, 0), Call(0, 0, 0, 0, True), np.empty(0, np.int64), engine.now_s)
    assert engine.tables.held == 0 and not engine.scheduler.requests


def _call(**fields: int) -> Call:
    return Call(**{"request": 0, "position": 0, "tokens": 2, "draws": 1, "most": 8, **fields})


@pytest.mark.parametrize(
    ("call", "code", "words"),
    [
        (_call(position=3), "position", "request 0 is not known here; it begins at position 0, not 3"),
        (_call(tokens=0), "tokens", "request 0 begins without tokens"),
        (_call(most=0), "position", "request 0 wants 0 positions in all; this engine has 1 to 32"),
        (_call(most=MAX_LENGTH + 1), "position", "request 0 wants 33 positions in all"),
        (_call(most=3, draws=3), "position", "request 0 would pass its 3 positions with 2 tokens and 3 draws"),
        (_call(most=20), "kv_budget", "request 0 wants 20 positions, the KV pool has 16"),
        (_call(tokens=3), "tokens", "request 0 feeds 3 tokens, and 2 came"),
    ],
)
def test_a_call_that_cannot_begin_a_request_is_refused_and_changes_nothing(call: Call, code: str, words: str) -> None:
    engine = _engine(Batching(), blocks=4)
    with pytest.raises(CallError, match=words) as refused:
        engine.scheduler.add((0, 0), call, np.array([1, 2]) if call.tokens else np.empty(0, np.int64), 0.0)
    assert refused.value.code == code and not engine.scheduler.requests and not engine.scheduler.queued


@pytest.mark.parametrize(
    ("call", "code", "words"),
    [
        (Call(0, 0, 2, 1, most=8), "position", "request 0 has 2 filled positions, the call says 0"),
        (Call(0, 2, 0, 0), "tokens", "a call feeds nothing to request 0 and draws nothing"),
        (Call(0, 2, 0, 9), "position", "request 0 would pass its 8 positions"),
    ],
)
def test_a_call_that_does_not_follow_the_last_one_is_refused_and_changes_nothing(call: Call, code: str, words: str) -> None:
    engine = _engine(Batching())
    engine.begin((0, 0), [1, 2], 1, ends=False, most=8)
    engine.step()
    with pytest.raises(CallError, match=words) as refused:
        engine.scheduler.add((0, 0), call, np.zeros(call.tokens, np.int64), engine.now_s)
    assert refused.value.code == code
    engine.go_on((0, 0), draws=6, ends=True)
    engine.run_out()


def test_a_call_of_a_request_that_still_draws_is_refused() -> None:
    engine = _engine(Batching())
    engine.begin((0, 0), [1, 2], 3)
    with pytest.raises(CallError, match="still draws 3 tokens") as refused:
        engine.scheduler.add((0, 0), Call(0, 2, 0, 1), np.empty(0, np.int64), 0.0)
    assert refused.value.code == "drawing"
