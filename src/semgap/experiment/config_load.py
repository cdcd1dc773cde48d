"""Checks of load phases, and of the modes that run in them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from semgap.client.load_trace import TraceError, read_trace

LOAD_KEYS = ("concurrency", "arrivals", "trace", "classes", "shared_prefix", "deadlines", "connections")
"""Keys of a phase that only a load may have."""
_OTHERS = {"sessions": 1, "live_requests": 1, "evict_fractions": [], "prefix_lengths": [], "passages": []}
"""Keys that a load may not have, with their plain values."""


def load_faults(values: Mapping[str, Any], name: str, root: Path) -> Iterator[str]:
    """The faults of load phase `name`, as texts that follow its name."""
    spec = values["define"]["phases"][name]
    others = [key for key, plain in _OTHERS.items() if spec[key] != plain]
    if others:
        yield f"is of kind load with {', '.join(others)}; leave that out, requests are alive by concurrency or arrivals"
    if values["sampling"]["rule"]["kind"] != "greedy":
        yield "is a load with sampling.rule.kind 'sample'; its requests are compared with runs alone under other numbers, use greedy"
    yield from _source_faults(spec, values["max_length"], root)
    yield from _arrival_faults(values, spec)
    for mode in values["modes"]:
        yield from _mode_faults(values, name, mode)


def _source_faults(spec: Mapping[str, Any], max_length: int, root: Path) -> Iterator[str]:
    """Faults of the prompts' sources, and prompts that do not fit `max_length`."""
    sources = [key for key in ("prompt_lengths", "classes", "trace") if spec[key]]
    if len(sources) != 1:
        yield f"has {' and '.join(sources) or 'no requests'}; give one of prompt_lengths, classes and trace"
    if spec["trace"]:
        if spec["shared_prefix"] or spec["steps"]:
            yield "has a trace with shared_prefix or steps, which the trace has itself; leave them out"
        try:
            lines = read_trace(root / spec["trace"]["file"], spec["trace"]["block"], max_length)
        except TraceError as error:
            yield f"cannot be run: {error}"
            return
        last, first = len(lines) - 1, min(-(-len(lines) // 4), len(lines) - 1)  # of the window; a quarter is the ramp
        if not spec["concurrency"] and lines[first].timestamp == lines[last].timestamp:
            yield (
                f"has a trace of {len(lines)} requests whose measured window has no length; use one with several times, or a concurrency"
            )
        return
    for each in spec["classes"] or [{"prompt_length": length, "steps": None} for length in spec["prompt_lengths"]]:
        steps, length = spec["steps"] if each["steps"] is None else each["steps"], each["prompt_length"]
        if length + steps > max_length:
            needed = f"{length + steps} positions (prompt {length} + steps {steps})"
            yield f"needs {needed}, more than max_length {max_length}; shorten it or raise max_length"
        if length <= spec["shared_prefix"]:
            yield f"has prompts of {length} tokens with shared_prefix {spec['shared_prefix']}; leave each prompt tokens of its own"


def _arrival_faults(values: Mapping[str, Any], spec: Mapping[str, Any]) -> Iterator[str]:
    arrivals, closed = spec["arrivals"] or {}, spec["concurrency"]
    if arrivals and closed:
        yield "has concurrency and arrivals; a loop is closed or open, give one of them"
    if not (arrivals or closed or spec["trace"]):
        yield "is a load without concurrency, arrivals or trace; give one of them"
    if arrivals and bool(arrivals["per_s"]) == bool(arrivals["share"]):
        yield "has arrivals with per_s and share, or neither; give the rates in one of the two ways"
    if arrivals and bool(arrivals["share"]) != bool(arrivals["of"]):
        yield "has arrivals with share without of, or of without share; a share is of a mode's capacity"
    mode, rows = arrivals.get("of"), values["define"]["modes"]
    if mode is not None and not (mode in rows and rows[mode]["batching"]):
        yield f"has arrivals that are a share of mode {mode!r}, which has no row with batching in config.define.modes"
    if arrivals and not spec["trace"] and spec["requests"] < 2:
        yield f"has arrivals with requests {spec['requests']}; the window lasts from the first measured arrival to the last, use 2 or more"
    slowest, limit_s = min(arrivals.get("per_s") or [0]), values["timeouts"]["trial_s"]
    if slowest and 2 * spec["requests"] / slowest > limit_s:
        yield f"has {spec['requests']} requests at {slowest:g}/s, which last longer than timeouts.trial_s {limit_s:g}; raise the rate"


def _mode_faults(values: Mapping[str, Any], name: str, mode: str) -> Iterator[str]:
    """The faults of a chosen mode with batching that runs in the phase."""
    row, spec = values["define"]["modes"][mode], values["define"]["phases"][name]
    batching = row["batching"]
    if batching is None or (row["phases"] is not None and name not in row["phases"]):
        return
    most, room = max(spec["concurrency"], default=0), batching["max_requests"] + batching["max_queue"]
    if most > room:
        yield f"has concurrency {most}, and mode {mode!r} serves {room} (batching.max_requests + max_queue); use fewer, or raise them"
    if row["max_steps"] is not None:
        yield f"is a load, and mode {mode!r} has max_steps, which would change its requests; leave it out"
