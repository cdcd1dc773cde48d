"""Prompts of an exact token length, cut from a text of passages. Needs neither torch nor transformers."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from semgap.client.spec import ClientSpec

SEPARATOR = "\n\n"
Prompts = tuple[list[np.ndarray], list[np.ndarray]]
"""Token ids of the measured requests' prompts, and of the warm-ups'."""


class PromptError(ValueError):
    """The prompt text is empty, or too short for a prompt."""


def load_passages(path: Path) -> list[str]:
    """The passages of a text file: blocks between blank lines, the lines of each joined by single spaces.

    Lines that start with '#' are comments and count as blank. PromptError if no passage is left.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    blocks = "\n".join("" if line.startswith("#") else line.strip() for line in lines).split("\n\n")
    passages = [" ".join(block.split()) for block in blocks if block.strip()]
    if not passages:
        raise PromptError(f"{path} holds no passage; write blocks of text between blank lines into it")
    return passages


def make_prompt(tokenizer: Tokenizer, passages: Sequence[str], index: int, length: int) -> npt.NDArray[np.int64]:
    """Token ids, int64 of shape (length,), of request `index`: the passages from there on, wrapped around.

    Joins passages by blank lines, as few as hold `length` tokens, and tokenizes them without special tokens. Requests `index` and
    `index + len(passages)` have the same prompt. PromptError, with the numbers, if all passages together are too short.
    """
    if length < 1 or index < 0:
        raise PromptError(f"request {index} of {length} tokens: the index starts at 0 and the length at 1")
    if not passages:
        raise PromptError(f"request {index} asks for {length:,} tokens, but there are no passages")
    start = index % len(passages)
    rotated = [*passages[start:], *passages[:start]]
    ids: list[int] = []
    for count in range(_fewest(rotated, length), len(rotated) + 1):
        ids = tokenizer.encode(SEPARATOR.join(rotated[:count]), add_special_tokens=False).ids
        if len(ids) >= length:
            return np.array(ids[:length], dtype=np.int64)
    raise PromptError(
        f"request {index} asks for {length:,} tokens, but the {len(passages)} passages hold {len(ids):,} "
        f"with this tokenizer; ask for {len(ids):,} at most, or add passages to the prompt text"
    )


def text_digest(path: Path) -> str:
    """sha256 of a prompt text file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _fewest(passages: Sequence[str], length: int) -> int:
    # A token is at least a byte, so fewer passages cannot be enough.
    sizes = itertools.accumulate(len((passage + SEPARATOR).encode()) for passage in passages)
    return next((count for count, size in enumerate(sizes, start=1) if size >= length), len(passages))


def make_prompts(spec: ClientSpec) -> Prompts:
    """The prompts of the measured requests, `requests` of each length and prefix length, and those of the warm-ups, from other text."""
    lengths = _prompt_lengths(spec)
    made = _cut_text(spec, [*lengths, *[spec.phase.prompt_lengths[0]] * spec.phase.warmup_requests])
    return made[: len(lengths)], made[len(lengths) :]


def text_after_prompts(spec: ClientSpec) -> list[np.ndarray]:
    """The text that follows each measured request's prompt, steps + 1 tokens: to feed instead of drawn tokens."""
    lengths, follows = _prompt_lengths(spec), spec.phase.steps + 1
    longer = _cut_text(spec, [length + follows for length in lengths])
    return [tokens[-follows:] for tokens in longer]


def _prompt_lengths(spec: ClientSpec) -> list[int]:
    return [length for length in spec.phase.prompt_lengths for _ in range(spec.phase.requests * max(1, len(spec.phase.prefix_lengths)))]


def _cut_text(spec: ClientSpec, lengths: Sequence[int]) -> list[np.ndarray]:
    tokenizer = Tokenizer.from_file(str(Path(spec.model_directory) / "tokenizer.json"))
    passages = load_passages(Path(spec.prompts_file))
    return [make_prompt(tokenizer, passages, index, length) for index, length in zip(_starts(spec), lengths, strict=False)]


def _starts(spec: ClientSpec) -> Iterator[int]:
    """The passages at which prompts begin: the phase's own, then the others from 0 on."""
    chosen = spec.phase.passages
    yield from chosen
    yield from (index for index in itertools.count() if index not in chosen)
