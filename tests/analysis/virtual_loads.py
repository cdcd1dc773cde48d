"""Closed loops in virtual time: the worker's own scheduler, steps of a known length, and a link that only delays."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from semgap.engine.scheduler import Scheduler
from semgap.kv.block_tables import BlockTables
from semgap.kv.pool import BLOCK
from semgap.policy import Batching
from semgap.wire.messages import Call

PROMPT, TOKENS = 8, 8
BASE_S, DECODE_S, PREFILL_S = 0.0123, 0.0022, 0.0014  # of a step, of a decode in it, of a token of a prompt: SmolLM2 on a core


def measured(batching: Batching, window: int, live: int, rtt_s: float, for_s: float = 60.0) -> tuple[float, float]:
    """Tokens per second and the mean gap between tokens (s) at the client of a loop of `live` requests, without its first quarter."""
    came = token_times(batching, window, live, rtt_s, for_s)
    begin_s = for_s / 4
    tokens = sum(begin_s < at_s <= for_s for times in came for at_s in times)
    gaps = [gap for times in came if times[0] > begin_s for gap in np.diff(times)]
    return tokens / (for_s - begin_s), float(np.mean(gaps))


def token_times(
    batching: Batching, window: int, live: int, rtt_s: float, for_s: float, kinds: Sequence[tuple[int, int]] = ((PROMPT, TOKENS),)
) -> list[list[float]]:
    """When each request's tokens came to the client (s). Requests take turns in their `kinds`: tokens of the prompt, and drawn ones."""
    longest = max(map(sum, kinds))
    scheduler = Scheduler(batching, BlockTables(live * (3 + longest // BLOCK)), max(64, longest))
    arriving = [(0.003 * place, place, 0) for place in range(live)]  # at the engine: when, whose request, tokens that it has
    heapq.heapify(arriving)
    had: dict[int, int] = {}
    came: dict[int, list[float]] = {}
    now_s, fresh = 0.0, live
    while now_s < for_s:
        while arriving and arriving[0][0] <= now_s:
            _, request, have = heapq.heappop(arriving)
            prompt, tokens = kinds[request % len(kinds)]
            fed = prompt if not have else int(window == 1)
            draws, position = min(window, tokens - have), prompt + have - 1 if have else 0
            call = Call(request, position, fed, draws, have + draws == tokens, 0 if have else prompt + tokens)
            scheduler.add((0, request), call, np.full(fed, request % 7), now_s)
            had[request] = have
        step = scheduler.schedule(now_s)
        if not step:
            now_s = max(now_s + 1e-4, arriving[0][0] if arriving else 0.0)
            continue
        decodes = sum(each.run.position > 0 and len(each.run.tokens) == 1 for each in step)
        took_s = BASE_S + DECODE_S * decodes + PREFILL_S * (sum(len(each.run.tokens) for each in step) - decodes)
        now_s += took_s
        for outcome in scheduler.took(step, [1 if each.run.draws else None for each in step], {}, took_s, now_s):
            request = outcome.key[1]
            had[request] += 1
            came.setdefault(request, []).append(now_s + rtt_s / 2)
            if outcome.last and had[request] < kinds[request % len(kinds)][1]:
                heapq.heappush(arriving, (now_s + rtt_s, request, had[request]))
            elif outcome.last:
                heapq.heappush(arriving, (now_s + rtt_s, fresh, 0))
                fresh += 1
    return list(came.values())
