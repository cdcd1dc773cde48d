"""The plan of a load: its requests in order, level by level, and when they arrive. Modes share it; arrivals differ by trial."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from tokenizers import Tokenizer

from semgap.client.load_trace import TraceLine, read_trace
from semgap.client.prompts import SEPARATOR, PromptError, load_passages
from semgap.client.spec import Arrivals, ClientSpec, Deadlines, Phase, RequestClass

_GOLDEN = (math.sqrt(5) - 1) / 2
_WARMUP_LENGTH = 32


@dataclass(frozen=True)
class Planned:
    """One request: its prompt (n,), int64, and how many `tokens` it wants. `at_s`: its arrival after the level's start; None: closed loop.

    `cls` numbers its class, 0 in a trace.
    """

    prompt: np.ndarray
    tokens: int
    cls: int = 0
    deadlines: Deadlines | None = None
    at_s: float | None = None

    @property
    def positions(self) -> int:
        """The most that its KV cache holds: the last token is not fed."""
        return len(self.prompt) + self.tokens - 1


@dataclass(frozen=True)
class Level:
    """One load of a phase. Closed: `concurrency` requests are alive; the first `ramp` begin before the window, and `measured` end in it.

    Open: the first `ramp` arrivals come before the window and `measured` in it; the rest keep the load up until those have ended.
    """

    number: int
    requests: tuple[Planned, ...]
    ramp: int
    measured: int
    concurrency: int | None = None
    rate_per_s: float | None = None
    share: float | None = None


def warmups(spec: ClientSpec) -> Level:
    """The phase's warm-up requests, one after the other, with text of their own."""
    asked = spec.phase
    length = min([*(each.prompt_length for each in classes_of(asked)), _WARMUP_LENGTH])
    texts = _Texts(msgspec.structs.replace(spec, phase=msgspec.structs.replace(asked, shared_prefix=0)))
    prompts = [texts.cut(0.5 * _GOLDEN**number, length) for number in range(asked.warmup_requests)]
    return Level(-1, tuple(Planned(prompt, asked.warmup_steps + 1) for prompt in prompts), 0, len(prompts), concurrency=1)


def plan_load(spec: ClientSpec) -> list[Level]:
    """The levels of a load phase. PromptError if the text is too short, TraceError for a trace that does not fit."""
    texts, phase = _Texts(spec), spec.phase
    if phase.trace:
        lines = read_trace(Path(spec.root) / phase.trace.file, phase.trace.block, spec.max_length)
        requests = [Planned(texts.of_trace(line, phase.trace.block), line.output_length, deadlines=phase.deadlines) for line in lines]
        times = [line.timestamp / 1e3 for line in lines]
        if not phase.concurrency:
            return [_replayed(number, requests, times, *rate) for number, rate in enumerate(_rates(phase.arrivals) or [(None, None)])]
        return [_closed(number, live, phase, iter(requests)) for number, live in enumerate(phase.concurrency)]
    coming = texts.requests(classes_of(phase))
    if phase.concurrency:
        return [_closed(number, live, phase, coming) for number, live in enumerate(phase.concurrency)]
    named = f"{spec.drawing.seed}/{spec.trial}"
    return [_open(number, *rate, phase, coming, f"{named}/{number}") for number, rate in enumerate(_rates(phase.arrivals))]


def classes_of(phase: Phase) -> list[RequestClass]:
    """The phase's classes, one a prompt length if it has none, each as often as it comes in a turn, with steps and deadlines filled in."""
    classes = phase.classes or tuple(RequestClass(length) for length in phase.prompt_lengths)
    filled = [
        RequestClass(each.prompt_length, phase.steps if each.steps is None else each.steps, each.weight, each.deadlines or phase.deadlines)
        for each in classes
    ]
    return [each for each in filled for _ in range(each.weight)]


def _ramp(measured: int) -> int:
    """The arrivals of an open loop before its window."""
    return -(-measured // 4)


def _rates(arrivals: Arrivals | None) -> list[tuple[float | None, float | None]]:
    """The rate (requests/s) of each level, and the share of a mode's capacity that it is, if it was given so."""
    if arrivals is None:
        return []
    return list(itertools.zip_longest(arrivals.per_s, arrivals.share))


def _closed(number: int, live: int, phase: Phase, coming: Iterator[Planned]) -> Level:
    """A loop of one request has no ramp. Half as many requests as are alive are measured, if that is more than the phase's.

    The plan has a request for each place, one for each end in the ramp and the window, and a quarter more: while the first request draws,
    a place ends as many short ones as fit into the longest.
    """
    measured, ramp = max(phase.requests, live // 2), live if live > 1 else 0
    tokens = [each.steps or 0 for each in classes_of(phase)] or [0]
    fit = -(-(max(tokens) + 1) * len(tokens) // (sum(tokens) + len(tokens)))
    planned = live + ramp * fit + measured
    return Level(number, tuple(itertools.islice(coming, planned + -(-planned // 4))), ramp, measured, concurrency=live)


def _open(number: int, rate: float | None, share: float | None, phase: Phase, coming: Iterator[Planned], seed: str) -> Level:
    """Without a rate, as for the reference of a share of a capacity, no request has a time."""
    rng, at_s = random.Random(seed), 0.0
    requests = []
    for each in itertools.islice(coming, _ramp(phase.requests) + 2 * phase.requests):
        at_s += rng.expovariate(rate) if rate else 0.0
        requests.append(Planned(each.prompt, each.tokens, each.cls, each.deadlines, at_s if rate else None))
    return Level(number, tuple(requests), _ramp(phase.requests), phase.requests, rate_per_s=rate, share=share)


def _replayed(number: int, requests: Sequence[Planned], times: Sequence[float], rate: float | None, share: float | None) -> Level:
    """The whole trace; with a rate its times are stretched to that, on average."""
    own = len(times) / times[-1] if times[-1] else math.inf
    stretch = 1.0 if rate is None else own / rate
    arriving = [
        Planned(each.prompt, each.tokens, each.cls, each.deadlines, at_s * stretch) for each, at_s in zip(requests, times, strict=True)
    ]
    ramp = min(_ramp(len(arriving)), len(arriving) - 1)
    return Level(number, tuple(arriving), ramp, len(arriving) - ramp, rate_per_s=rate or own, share=share)


class _Texts:
    """Prompts cut from the prompt text: each request's begins elsewhere in it, so that no two requests share a beginning by chance."""

    def __init__(self, spec: ClientSpec) -> None:
        tokenizer = Tokenizer.from_file(str(Path(spec.model_directory) / "tokenizer.json"))
        whole = SEPARATOR.join(load_passages(Path(spec.prompts_file)))
        self._tokens = np.array(tokenizer.encode(whole, add_special_tokens=False).ids, dtype=np.int64)
        self._vocabulary = tokenizer.get_vocab_size()
        self._shared = self.cut(0, spec.phase.shared_prefix) if spec.phase.shared_prefix else self._tokens[:0]

    def requests(self, classes: Sequence[RequestClass]) -> Iterator[Planned]:
        """Requests without end, the classes in turn. The n-th own text begins at the fraction n x golden ratio of the text."""
        numbers = {(each.prompt_length, each.steps, each.deadlines): None for each in classes}
        kinds = list(numbers)
        for number in itertools.count():
            each = classes[number % len(classes)]
            own = self.cut((number + 1) * _GOLDEN % 1, each.prompt_length - len(self._shared))
            kind = kinds.index((each.prompt_length, each.steps, each.deadlines))
            yield Planned(np.concatenate([self._shared, own]), 1 + (each.steps or 0), kind, each.deadlines)

    def of_trace(self, line: TraceLine, block: int) -> np.ndarray:
        """The text of each hash, which begins with a token of its own, so that blocks of two hashes differ."""
        blocks = []
        for each in line.hash_ids:
            text = self.cut((each + 1) * _GOLDEN % 1, block).copy()
            text[0] = each % self._vocabulary
            blocks.append(text)
        return np.concatenate(blocks)[: line.input_length]

    def cut(self, share: float, length: int) -> np.ndarray:
        """The `length` tokens that begin at a fraction of the text, or so far before its end that they fit."""
        room = len(self._tokens) - length
        if room < 0:
            raise PromptError(f"a request asks for {length:,} tokens of its own, but the prompt text holds {len(self._tokens):,}")
        begin = int(share * (room + 1))
        return self._tokens[begin : begin + length]
