"""Traces of requests: when each arrives, how long it is, and which beginnings it shares. In the open format of Mooncake's traces.

A line is a JSON object: `timestamp` (ms from the start), `input_length` and `output_length` (tokens), and `hash_ids`, one number for each
block of the prompt: two prompts begin alike as far as their numbers agree (Mooncake cuts blocks of 512 tokens).

`python -m semgap.client.load_trace FILE` writes a synthetic one: conversations that come back to their own beginnings.
"""

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec

_COLUMNS = ("timestamp", "input_length", "output_length", "hash_ids")
Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]


class TraceError(ValueError):
    """A trace that cannot be replayed. The message names the file, the line and the way out."""


class TraceLine(msgspec.Struct, frozen=True):
    """One request of a trace; other keys of its line are ignored."""

    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: Count
    output_length: Count
    hash_ids: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]


def read_trace(path: Path, block: int, max_length: int) -> list[TraceLine]:
    """The lines of a trace in order of arrival. TraceError for a line that is no such object, or does not fit `max_length` positions."""
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise TraceError(f"trace {path} cannot be read: {error.strerror}; correct the phase's trace.file") from error
    lines = [_line(f"trace {path}, line {number}", text, block) for number, text in enumerate(texts, 1) if text.strip()]
    if not lines:
        raise TraceError(f"trace {path} holds no request; each line is a JSON object with {', '.join(_COLUMNS)}")
    for number, line in enumerate(lines, 1):
        needed = line.input_length + line.output_length - 1
        if needed > max_length:
            raise TraceError(f"trace {path}, request {number} needs {needed} positions, more than max_length {max_length}; raise it")
    return sorted(lines, key=lambda line: line.timestamp)


def _line(where: str, text: str, block: int) -> TraceLine:
    try:
        raw = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise TraceError(f"{where} is not JSON ({error}); a trace has one JSON object a line") from error
    missing = [name for name in _COLUMNS if not isinstance(raw, dict) or name not in raw]
    if missing:
        raise TraceError(f"{where} lacks {', '.join(missing)}; a trace has {', '.join(_COLUMNS)}")
    try:
        line = msgspec.convert(raw, TraceLine)
    except msgspec.ValidationError as error:
        raise TraceError(f"{where}: {error}; times start at 0 and lengths at 1") from error
    blocks = -(-line.input_length // block)
    if len(line.hash_ids) != blocks:
        found = f"{len(line.hash_ids)} hash_ids for {line.input_length} tokens, which are {blocks} blocks of {block}"
        raise TraceError(f"{where}: {found}; set the phase's trace.block to the trace's")
    return line


def synthetic(requests: int, seed: int, per_s: float, block: int = 64) -> Iterator[TraceLine]:
    """Conversations in turn: one of 3 system prompts of 2 blocks, then turns that each carry the ones before them.

    Poisson arrivals; a turn adds a block or two, and a conversation of 4 or more blocks ends.
    """
    rng, fresh, at_s = random.Random(seed), 3 * 2, 0.0
    alive: list[list[int]] = []
    for _ in range(requests):
        at_s += rng.expovariate(per_s)
        if not alive or rng.random() < 0.4:
            system = rng.randrange(3)
            alive.append([2 * system, 2 * system + 1])
        said = alive[rng.randrange(len(alive))]
        added = rng.choice((1, 1, 2))
        said += range(fresh, fresh + added)
        fresh += added
        length = block * len(said) - rng.randrange(block // 2)
        yield TraceLine(round(1e3 * at_s), length, rng.choice((4, 8, 16)), tuple(said))
        alive = [each for each in alive if len(each) < 5]


if __name__ == "__main__":
    encoded = (msgspec.json.encode(line).decode() for line in synthetic(requests=48, seed=1, per_s=2.0))
    Path(sys.argv[1]).write_text("".join(f"{line}\n" for line in encoded))
