"""The engine: one process that runs the requests of all sessions of a model. A step reads in three lines: schedule, run, reply.

It waits for no session: bytes that a channel does not take at once wait in memory, bounded by the tokens that were asked for. A session
whose channel closes leaves with all its requests, and the others go on. The engine ends when the last session has left.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from functools import cached_property

import msgspec
import numpy as np

from semgap.engine.executor import Executor, RowDraw
from semgap.engine.executor_choice import make_executor
from semgap.engine.gpu_failure import gpu_failure
from semgap.engine.scheduler import Outcome, Scheduled, Scheduler
from semgap.kv.block_pool import BlockPool
from semgap.kv.block_tables import BlockTables
from semgap.processes.machine import peak_rss_bytes
from semgap.wire.batches import Batch, EngineState
from semgap.wire.messages import Gained
from semgap.wire.step_cost import Floor
from semgap.worker.engine_channel import (
    AskBatches,
    Batches,
    CallRefused,
    Calls,
    Channel,
    Fault,
    FromSession,
    Gone,
    Member,
    Stepped,
    Welcome,
)
from semgap.worker.engine_founding import EngineSpec, read_founding
from semgap.worker.engine_members import Members

_KEPT_STEPS = 1 << 18


class Runner:
    """Runs steps of one model over one pool of KV blocks, and draws."""

    def __init__(self, executor: Executor, pool: BlockPool) -> None:
        self.executor, self.pool = executor, pool

    def run(self, scheduled: Sequence[Scheduled], rules: Mapping[int, Member]) -> list[int | ValueError | None]:
        """The draw of each run by its session's rule: a token, None if it wants none, or the error of logits that give none."""
        hidden = self.executor.forward_batch([each.run for each in scheduled], self.pool)
        draws = [_draw_of(each, rules[each.key[0]]) for each in scheduled if each.run.draws]
        tokens = iter(self.executor.draw_rows(hidden, draws) if draws else ())
        return [next(tokens) if each.run.draws else None for each in scheduled]


def _draw_of(scheduled: Scheduled, rule: Member) -> RowDraw:
    return RowDraw(rule.sampling, rule.seed, scheduled.key[1], scheduled.run.end)


class Engine:
    """Serves `members` over the executor and the KV blocks of `runner` until all have left."""

    def __init__(self, spec: EngineSpec, runner: Runner, members: Members, executor_s: float) -> None:
        self._runner, self._members, self._executor_s = runner, members, executor_s
        self._tables = BlockTables(runner.pool.blocks, on_reuse=runner.pool.blank)
        self._scheduler = Scheduler(spec.batching, self._tables, spec.max_length)
        self._rules: dict[int, Member] = {}
        self._stops: dict[int, frozenset[int]] = {}
        self._rows: deque[Batch] = deque(maxlen=_KEPT_STEPS)
        self._steps = 0

    def serve(self) -> None:
        """Takes the sessions' messages, and steps."""
        while self._members.count:
            sockets = self._members.wait(self._scheduler.next_due_s(time.monotonic()))
            begin_s = time.monotonic()
            for session, message in self._members.events(sockets):
                self._take(session, message)
            self._step(begin_s)

    def _step(self, begin_s: float) -> None:
        """One step, if a request is ready."""
        scheduled = self._scheduler.schedule(time.monotonic())
        if not scheduled:
            return
        scheduled_s = time.monotonic()
        drawn = self._runner.run(scheduled, self._rules)
        ran_s = time.monotonic()
        self._reply(scheduled, drawn, ran_s - scheduled_s)
        self._record(scheduled, (begin_s, scheduled_s, ran_s, time.monotonic()))

    def _reply(self, scheduled: Sequence[Scheduled], drawn: Sequence[int | ValueError | None], compute_s: float) -> None:
        """One message to each session that a token was drawn for."""
        for each, token in zip(scheduled, drawn, strict=True):
            if isinstance(token, ValueError):
                self._give_up(each, token)
        tokens = [None if isinstance(token, ValueError) else token for token in drawn]
        by_session: defaultdict[int, list[Outcome]] = defaultdict(list)
        for outcome in self._scheduler.took(scheduled, tokens, self._stops, compute_s, time.monotonic()):
            by_session[outcome.key[0]].append(outcome)
        for session, outcomes in by_session.items():
            self._members.send(session, Stepped(tuple(map(_gained, outcomes)), tuple(outcome.token for outcome in outcomes)))

    def _give_up(self, scheduled: Scheduled, error: ValueError) -> None:
        session, request = scheduled.key
        self._scheduler.cancel(scheduled.key)
        self._members.send(session, CallRefused(request, "request", f"request {request} has ended: {error}"))

    def _record(self, scheduled: Sequence[Scheduled], times: tuple[float, float, float, float]) -> None:
        begin_s, scheduled_s, ran_s, end_s = times
        runs = [each.run for each in scheduled]
        decodes = sum(run.draws and run.position > 0 and len(run.tokens) == 1 for run in runs)
        self._steps += 1
        self._rows.append(
            Batch(
                begin_s=begin_s,
                requests=len(runs),
                decodes=decodes,
                prefill_tokens=sum(len(run.tokens) for run in runs) - decodes,
                drawn=sum(run.draws for run in runs),
                live=self._scheduler.live,
                queued=self._scheduler.queued,
                kv_blocks=self._tables.held,
                kv_shared=self._tables.shared,
                schedule_s=scheduled_s - begin_s,
                compute_s=ran_s - scheduled_s,
                reply_s=end_s - ran_s,
            )
        )

    def _take(self, session: int, message: FromSession | None) -> None:
        match message:
            case Calls():
                self._add(session, message)
            case Member():
                self._rules[session], self._stops[session] = message, frozenset(message.stop_tokens)
            case AskBatches():
                self._members.send(session, Batches(self._state(), msgspec.json.encode(list(self._rows))))
            case None:
                self._scheduler.leave(session)
                self._rules.pop(session, None)
                self._stops.pop(session, None)

    def _add(self, session: int, message: Calls) -> None:
        """Gives the calls to the scheduler. A running call that one of them takes back is over: without a token more."""
        ids, begin, now_s = np.frombuffer(message.ids, np.uint32).astype(np.int64), 0, time.monotonic()
        taken_back = []
        for call in message.calls:
            try:
                if self._scheduler.add((session, call.request), call, ids[begin : begin + call.tokens], now_s):
                    taken_back.append(Gained(call.request, 0, last=True))
            except ValueError as error:
                self._members.send(session, CallRefused(call.request, getattr(error, "code", "request"), str(error)))
            begin += call.tokens
        if taken_back:
            self._members.send(session, Stepped(tuple(taken_back), ()))

    def _state(self) -> EngineState:
        return EngineState(
            pid=os.getpid(),
            executor_s=self._executor_s,
            peak_rss_bytes=peak_rss_bytes(),
            sessions=self._members.count,
            live=self._scheduler.live,
            queued=self._scheduler.queued,
            kv_blocks=self._tables.blocks,
            kv_block_bytes=self._runner.pool.block_nbytes,
            kv_held=self._tables.held,
            steps=self._steps,
            floor=self._floor,
        )

    @cached_property
    def _floor(self) -> Floor:
        """Takes a few passes over the weights, once: the first session that asks has run its requests."""
        return self._runner.executor.floor()


def _gained(outcome: Outcome) -> Gained:
    return Gained(outcome.key[1], 1, outcome.last, int(1e6 * outcome.queued_s), int(1e6 * outcome.compute_s))


def run_engine(intake: socket.socket, founder: Channel[FromSession], founding_fd: int) -> int:
    """Runs an engine from its founding file to the end of its last session; gives the exit status. Sessions hear why it fails."""
    members: Members | None = None
    try:
        begin = time.perf_counter()
        spec, weights = read_founding(founding_fd)
        executor = make_executor(spec.executor, spec.model, weights, spec.dtype, spec.threads, spec.max_length)
        runner = Runner(executor, executor.new_block_pool(spec.kv_blocks))
        executor_s = time.perf_counter() - begin
        members = Members(founder, intake, Welcome(os.getpid(), executor_s, runner.pool.blocks * runner.pool.block_nbytes))
        Engine(spec, runner, members, executor_s).serve()
        return 0
    except Exception as error:
        traceback.print_exc()
        why = gpu_failure(error) or f"{type(error).__name__}: {error}; the worker's log has the traceback"
        fault = Fault(f"engine {os.getpid()} failed: {why}")
        with contextlib.suppress(Gone):
            members.send_all(fault) if members else founder.send(fault)
        return 1
