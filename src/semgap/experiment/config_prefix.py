"""Checks of phases whose requests begin with what another session has computed."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from semgap.client.prompts import load_passages


def prefix_faults(values: Mapping[str, Any], name: str, root: Path) -> Iterator[str]:
    """The faults of prefix phase `name` that another kind cannot have, as texts that follow its name. Its own keys fit the schema."""
    spec = values["define"]["phases"][name]
    lengths = spec["prefix_lengths"]
    if not lengths:
        yield "is of kind prefix without prefix_lengths; give the tokens that another session has computed, e.g. [0, 64, 128]"
        return
    shortest = min(spec["prompt_lengths"], default=0)
    if max(lengths) >= shortest:
        yield f"has a prefix of {max(lengths)} tokens and a prompt of {shortest}; leave each prompt tokens of its own"
    file = root / values["prompts"]
    needed = len(spec["prompt_lengths"]) * len(lengths) * spec["requests"] + spec["warmup_requests"]
    passages = len(load_passages(file)) if file.is_file() else needed
    if needed > passages:
        yield (
            f"needs {needed} prompts of different text, and {values['prompts']} has {passages} passages; with fewer a request would find "
            "another one's blocks, use fewer requests or prefix_lengths, or more text"
        )
