"""The plan of a load, and the course of its levels: ramp, window, stability. And the traces it can replay."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semgap.client.load_course import Closed, Open, UnstableQueueError
from semgap.client.load_plan import Level, Planned, classes_of, plan_load, warmups
from semgap.client.load_requests import LiveRequest
from semgap.client.load_trace import TraceError, read_trace, synthetic
from semgap.client.spec import Arrivals, ClientError, ClientSpec, Deadlines, Phase, RequestClass, Trace
from semgap.policy import Batching, Policy, Reply
from semgap.wire.messages import Gained

USER = Deadlines(100, 10)
WINDOWS = Policy(weights="by_hash", reply=Reply("token"), keeps="tokens", window=2, batching=Batching(merges="all"))
BATCHED = Policy(weights="by_hash", reply=Reply("token"), keeps="tokens", batching=Batching(merges="all"))


@pytest.fixture
def spec_of(llama: Path, client_spec: Callable[..., ClientSpec]) -> Callable[..., ClientSpec]:
    return lambda trial=1, **phase: client_spec(llama, BATCHED, phase=Phase("load", **phase), trial=trial, max_length=64)


def plain(count: int, tokens: int = 4, rate: float | None = None) -> tuple[Planned, ...]:
    return tuple(Planned(np.arange(3), tokens, at_s=None if rate is None else (index + 1) / rate) for index in range(count))


def test_a_closed_loop_has_requests_for_its_ramp_its_window_and_what_is_alive_then(spec_of: Callable[..., ClientSpec]) -> None:
    one, four = plan_load(spec_of(prompt_lengths=(8,), steps=7, requests=5, concurrency=(1, 4)))
    assert [request.tokens for request in (*one.requests, *four.requests)] == [8] * (8 + 17)
    assert (four.ramp, four.measured) == (4, 5)
    assert (one.ramp, one.measured) == (0, 5)


def test_a_closed_loop_measures_half_as_many_requests_as_are_alive_or_more(spec_of: Callable[..., ClientSpec]) -> None:
    levels = plan_load(spec_of(prompt_lengths=(8,), steps=7, requests=5, concurrency=(4, 16)))
    assert [(level.measured, len(level.requests)) for level in levels] == [(5, 17), (8, 50)]


def test_the_plan_of_a_closed_loop_grows_with_the_short_requests_that_fit_into_its_longest(spec_of: Callable[..., ClientSpec]) -> None:
    def planned(*steps: int) -> int:
        classes = tuple(RequestClass(8, each) for each in steps)
        return len(plan_load(spec_of(classes=classes, requests=4, concurrency=(8,)))[0].requests)

    assert planned(7) == planned(7, 7) == 25 and planned(7, 1, 1, 1) == 45


def test_no_two_prompts_of_a_load_begin_alike_beyond_the_shared_prefix(spec_of: Callable[..., ClientSpec]) -> None:
    levels = plan_load(spec_of(prompt_lengths=(24,), shared_prefix=16, steps=1, requests=20, concurrency=(1, 16)))
    prompts = [request.prompt for level in levels for request in level.requests]
    assert {len(prompt) for prompt in prompts} == {24}
    assert len({tuple(prompt[:16]) for prompt in prompts}) == 1
    assert len({tuple(prompt[16:]) for prompt in prompts}) == len(prompts)


def test_classes_come_in_turn_as_often_as_their_weights_say(spec_of: Callable[..., ClientSpec]) -> None:
    classes = (RequestClass(8, weight=3), RequestClass(20, 0, deadlines=Deadlines(1, 1)))
    (level,) = plan_load(spec_of(classes=classes, steps=5, requests=7, concurrency=(1,), deadlines=USER))
    assert [(len(each.prompt), each.tokens, each.cls) for each in level.requests[:4]] == [(8, 6, 0)] * 3 + [(20, 1, 1)]
    assert [each.deadlines for each in level.requests[2:4]] == [USER, Deadlines(1, 1)]
    assert len(classes_of(Phase("load", classes=classes, steps=5))) == 4


def test_arrivals_are_poisson_of_their_rate_and_depend_on_the_trial_alone(spec_of: Callable[..., ClientSpec]) -> None:
    def times(trial: int) -> list[float]:
        arrivals = Arrivals(per_s=(5.0,), share=(0.5,), of="serial")
        (level,) = plan_load(spec_of(trial, prompt_lengths=(8,), requests=200, arrivals=arrivals))
        assert (level.rate_per_s, level.share, level.ramp) == (5.0, 0.5, 50)
        return [each.at_s or 0 for each in level.requests]

    first = times(1)
    gaps = np.diff(first)
    assert first == times(1) != times(2)
    assert np.mean(gaps) == pytest.approx(0.2, rel=0.2) and np.std(gaps) == pytest.approx(0.2, rel=0.25)


def test_a_trace_gives_equal_beginnings_where_its_hashes_agree(spec_of: Callable[..., ClientSpec], tmp_path: Path) -> None:
    lines = [(0, 20, [1, 2, 3]), (500, 18, [1, 2, 4]), (900, 20, [5, 2, 3])]
    file = tmp_path / "trace.jsonl"
    rows = [{"timestamp": at, "input_length": n, "output_length": 3, "hash_ids": ids, "else": 1} for at, n, ids in lines]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (level,) = plan_load(spec_of(trace=Trace(str(file), 8)))
    first, second, third = (each.prompt for each in level.requests)
    assert first[:16].tolist() == second[:16].tolist() and first[16] != second[16]
    assert first[0] != third[0] and first[8:16].tolist() == third[8:16].tolist()
    assert [each.at_s for each in level.requests] == [0, 0.5, 0.9]
    (faster,) = plan_load(spec_of(trace=Trace(str(file), 8), arrivals=Arrivals(per_s=(30.0,))))
    assert [each.at_s for each in faster.requests] == pytest.approx([0, 0.5 / 9, 0.1])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ('{"timestamp": 1, "input_length": 4}', "line 2 lacks output_length, hash_ids; a trace has timestamp"),
        ('{"timestamp": -1, "input_length": 4, "output_length": 1, "hash_ids": [1]}', "line 2: Expected `float` >= 0.*times start at 0"),
        ('{"timestamp": 1, "input_length": 9, "output_length": 1, "hash_ids": [1]}', "1 hash_ids for 9 tokens, which are 2 blocks of 8"),
        (
            '{"timestamp": 1, "input_length": 8, "output_length": 60, "hash_ids": [1]}',
            "request 2 needs 67 positions, more than max_length 64",
        ),
    ],
)
def test_a_wrong_trace_is_refused_by_its_line(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"timestamp": 0, "input_length": 4, "output_length": 1, "hash_ids": [1]}\n' + line)
    with pytest.raises(TraceError, match=message):
        read_trace(file, 8, 64)


def test_the_shipped_trace_is_what_its_command_writes() -> None:
    shipped = Path(__file__).resolve().parents[2] / "resources/traces/synthetic.jsonl"
    assert read_trace(shipped, 64, 512) == list(synthetic(requests=48, seed=1, per_s=2.0))


def test_warmups_have_text_of_their_own(spec_of: Callable[..., ClientSpec]) -> None:
    spec = spec_of(prompt_lengths=(8,), steps=7, requests=5, concurrency=(4,), warmup_requests=2, warmup_steps=1)
    warm, (level,) = warmups(spec), plan_load(spec)
    assert [each.tokens for each in warm.requests] == [2, 2]
    assert not {tuple(each.prompt) for each in warm.requests} & {tuple(each.prompt) for each in level.requests}


def ended(course: Closed | Open, index: int, at_s: float) -> bool:
    """Ends a request; True if it is measured."""
    request = LiveRequest(index, 0, 0, course.level.requests[index], 0.0)
    course.ended(request, index, at_s)
    return request.measured


def due(course: Closed, now_s: float) -> list[tuple[int, float]]:
    """The indices of all requests that are due, and since when."""
    return [(each[0], each[2]) for each in iter(lambda: course.due(now_s), None)]


def test_the_places_of_a_closed_loop_begin_one_after_the_other_while_the_first_request_draws() -> None:
    course = Closed(Level(0, plain(12, tokens=8), ramp=4, measured=2, concurrency=4), now_s=10.0)
    assert due(course, 10.0) == [(0, 10.0)]
    seen = []
    for tokens in range(1, 9):
        course.drew(0, tokens, 10.0 + tokens)
        seen += due(course, 20.0)
    assert seen == [(1, 12.0), (2, 14.0), (3, 16.0)]
    ended(course, 0, 18.0)
    assert due(course, 20.0) == [(4, 18.0)]


def test_the_window_of_a_closed_loop_begins_at_an_end_after_all_places_have_begun() -> None:
    """As in a mode that runs one request after the other: all that are measured waited for all others."""
    course = Closed(Level(0, plain(8, tokens=2), ramp=3, measured=2, concurrency=3), now_s=10.0)
    queue, began = due(course, 10.0), []
    for turn in range(5):
        index, at_s = queue.pop(0)
        for tokens in (1, 2):
            course.drew(index, tokens, 11.0 + 2 * turn + tokens)
            queue += due(course, 30.0)
        began.append((index, at_s, ended(course, index, 13.0 + 2 * turn), course.start_s))
        queue += due(course, 30.0)
    assert [(index, measured) for index, _, measured, _ in began] == [(0, False), (1, False), (2, False), (3, True), (4, True)]
    assert [start_s for *_, start_s in began] == [None, None, 17.0, 17.0, 17.0] and course.end_s == 21.0 and course.is_over


def test_requests_that_end_in_the_frame_that_begins_the_window_are_not_measured() -> None:
    course = Closed(Level(0, plain(6, tokens=1), ramp=2, measured=1, concurrency=2), now_s=10.0)
    due(course, 10.0)
    course.drew(0, 1, 11.0)
    due(course, 11.0)
    course.drew(1, 1, 12.0)
    assert [ended(course, index, 12.0) for index in (0, 1)] == [False, False] and course.start_s == 12.0 and not course.is_over
    assert ended(course, 2, 12.5) and course.end_s == 12.5


def test_a_closed_loop_that_has_sent_its_plan_sends_no_request_twice() -> None:
    course = Closed(Level(0, plain(2), ramp=0, measured=3, concurrency=1), now_s=10.0)
    for index in range(2):
        assert due(course, 20.0) == [(index, 10.0 + index)]
        ended(course, index, 11.0 + index)
    with pytest.raises(ClientError, match="a loop of 1 sent all 2 requests of its plan before its window ended"):
        course.due(20.0)


def test_requests_of_an_open_loop_come_at_their_times_whatever_ends() -> None:
    course = Open(Level(0, plain(6, rate=1.0), ramp=1, measured=2, rate_per_s=1.0), now_s=10.0)
    assert course.due(10.9) is None and course.next_s() == 11.0
    assert course.due(12.5) == (0, course.level.requests[0], 11.0) and course.due(12.5) == (1, course.level.requests[1], 12.0)
    assert (course.start_s, course.end_s) == (12.0, 13.0)
    assert not ended(course, 0, 13.0) and ended(course, 1, 14.0) and not ended(course, 3, 14.0) and not course.is_over
    assert ended(course, 2, 15.0) and course.is_over


@pytest.mark.parametrize(("measured", "stayed", "stable"), [(100, 24, True), (100, 25, False), (20, 7, True), (20, 8, False)])
def test_a_queue_that_keeps_a_quarter_of_its_arrivals_is_unstable(measured: int, stayed: int, stable: bool) -> None:
    course = Open(Level(0, plain(measured + 2, rate=3.0), ramp=1, measured=measured, rate_per_s=3.0), now_s=0.0)
    if stable:
        course.require_stable(2, 2 + stayed)
    else:
        with pytest.raises(
            UnstableQueueError, match=f"the queue is unstable: {measured} requests came at 3/s, and {stayed} more were alive"
        ):
            course.require_stable(2, 2 + stayed)


def calls_of(policy: Policy, tokens: int) -> list[tuple[int, int, int, bool, int]]:
    """The calls of a request to its end: position, tokens, draws, ends, most."""
    request, seen = LiveRequest(7, 0, 0, Planned(np.arange(3), tokens), 0.0), []
    for token in itertools.count(100):
        call, fed = request.next_call(policy, 0.0)
        assert len(fed) == call.tokens
        seen.append((call.position, call.tokens, call.draws, call.ends, call.most))
        while not request.take([token], Gained(7, 1, last=len(request.tokens) + 1 - sum(each[2] for each in seen) == 0), 0.0):
            pass
        if request.is_done:
            return seen
    raise AssertionError


def test_a_mode_without_windows_sends_each_token_back_and_one_with_windows_asks_for_more() -> None:
    assert calls_of(BATCHED, 3) == [(0, 3, 1, False, 5), (3, 1, 1, False, 0), (4, 1, 1, True, 0)]
    assert calls_of(WINDOWS, 5) == [(0, 3, 2, False, 7), (4, 0, 2, False, 0), (6, 0, 1, True, 0)]


def test_a_loop_of_one_request_is_measured_from_its_beginning() -> None:
    course = Closed(Level(0, plain(2), ramp=0, measured=2, concurrency=1), now_s=10.0)
    assert course.start_s == 10.0 and ended(course, 0, 11.0) and ended(course, 1, 12.0) and course.end_s == 12.0


def test_a_request_that_is_cut_short_waits_until_its_running_call_is_over() -> None:
    request = LiveRequest(7, 0, 0, Planned(np.arange(3), 5), 0.0)
    request.next_call(WINDOWS, 0.0)
    assert not request.take([9], Gained(7, 1), 0.0)
    with pytest.raises(ValueError, match="got 0 tokens and last True with 1 of its call left"):
        request.take([], Gained(7, 0, last=True), 0.0)
    request.cut = True
    call, _ = request.next_call(WINDOWS, 0.0)
    assert (call.draws, call.ends, request.awaits) == (0, True, True)
    assert request.take([], Gained(7, 0, last=True), 0.0) and not request.awaits


def test_a_request_that_was_taken_back_before_its_first_token_has_no_times() -> None:
    request = LiveRequest(7, 0, 0, Planned(np.arange(3), 5), 0.0)
    request.next_call(BATCHED, 0.0)
    request.cut = True
    assert request.take([], Gained(7, 0, last=True), 0.0)
    row = request.row()
    assert (row["new_tokens"], row["ttft_s"], row["e2e_s"], row["queue_s"]) == (0, None, None, None) and not request.token_rows(0.0, 1.0)


def test_a_request_that_is_cut_short_ends_without_draws() -> None:
    request = LiveRequest(7, 0, 0, Planned(np.arange(3), 5), 0.0)
    request.next_call(BATCHED, 0.0)
    request.take([9], Gained(7, 1, last=True), 0.0)
    request.cut = True
    call, _ = request.next_call(BATCHED, 0.0)
    assert (call.position, call.tokens, call.draws, call.ends) == (3, 0, 0, True)
    assert request.row()["e2e_s"] is None and request.row()["in_time"] is None


def test_only_a_mode_that_knows_deadlines_says_how_much_time_is_left() -> None:
    knows = Policy(weights="by_hash", reply=Reply("token"), keeps="tokens", batching=Batching(merges="all", deadline=True))
    request = LiveRequest(0, 0, 0, Planned(np.arange(3), 3, deadlines=USER), arrived_s=5.0)
    assert request.next_call(BATCHED, 5.02)[0].deadline_us == 0
    assert request.next_call(knows, 5.02)[0].deadline_us == 80_000
    request.take([1], Gained(0, 1, last=True), 5.05)
    assert request.next_call(knows, 5.05)[0].deadline_us == 60_000  # a token early: the next is due 10 ms after the first one's time
    assert request.next_call(knows, 9.0)[0].deadline_us == 1


@pytest.mark.parametrize(("first_s", "gap_s", "kept"), [(0.09, 0.009, True), (0.11, 0.001, False), (0.05, 0.011, False)])
def test_a_request_is_in_time_if_its_first_token_and_its_mean_gap_are(first_s: float, gap_s: float, kept: bool) -> None:
    request = LiveRequest(0, 0, 0, Planned(np.arange(3), 3, deadlines=USER), arrived_s=1.0)
    for step in range(3):
        request.next_call(BATCHED, 0.0)
        request.take([step], Gained(0, 1, last=True, queued_us=2000), 1.0 + first_s + step * gap_s)
    row: dict[str, Any] = request.row()
    assert row["in_time"] is kept
    assert (row["ttft_s"], row["tpot_s"], row["queue_s"]) == (pytest.approx(first_s), pytest.approx(gap_s), 0.002)
    assert [each["measured"] for each in request.token_rows(1.0 + first_s, 9.0)] == [False, True, True]
