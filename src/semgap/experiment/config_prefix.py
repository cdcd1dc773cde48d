"""Checks of phases whose requests begin with what another session has computed."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from semgap.client.prompts import load_passages
from semgap.kv.pool import BLOCK


def longest_prefix(values: Mapping[str, Any]) -> int:
    """The longest prefix of whole blocks that the prompts of the exactness check leave room for; 0 if they are too short for one."""
    return BLOCK * int((values["exactness"]["prompt_length"] - 1) // BLOCK)


def prefix_faults(values: Mapping[str, Any], name: str, root: Path) -> Iterator[str]:
    """The faults of prefix phase `name` that another kind cannot have, as texts that follow its name. Its own keys fit the schema."""
    spec = values["define"]["phases"][name]
    lengths = spec["prefix_lengths"]
    if not lengths:
        yield "is of kind prefix without prefix_lengths; give the tokens that another session has computed, e.g. [0, 64, 128]"
        return
    if len(spec["prompt_lengths"]) > 1:
        yield "has several prompt_lengths; requests of one prefix length are compared, give each prompt length a phase of its own"
    shortest = min(spec["prompt_lengths"], default=0)
    if max(lengths) >= shortest:
        yield f"has a prefix of {max(lengths)} tokens and a prompt of {shortest}; leave each prompt tokens of its own"
    lossy = [mode for mode in values["modes"] if _is_lossy(values["define"]["modes"][mode], name)]
    if lossy and not longest_prefix(values):
        length = values["exactness"]["prompt_length"]
        yield (
            f"runs in mode {lossy[0]!r}, which is lossy, and config.exactness.prompt_length {length} leaves no room for a prefix on which "
            f"to measure how much it loses; use more than {BLOCK}"
        )
    file = root / values["prompts"]
    needed = len(lengths) * spec["requests"] + spec["warmup_requests"]
    passages = len(load_passages(file)) if file.is_file() else needed
    if needed > passages:
        yield (
            f"needs {needed} prompts of different text, and {values['prompts']} has {passages} passages; with fewer a request would find "
            "another one's blocks, use fewer requests or prefix_lengths, or more text"
        )


def _is_lossy(row: Mapping[str, Any], phase: str) -> bool:
    """True if a mode's row fetches prefixes in the phase and promises no equal tokens."""
    return row["prefix"] != "recompute" and row["keeps"] == "lossy" and phase in (row["phases"] or ())
