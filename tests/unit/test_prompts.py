"""Prompts have the requested length, differ by request, and come from the shipped text."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from semgap.client.prompts import PromptError, load_passages, make_prompt, text_digest
from semgap.experiment.fetch_model import END_OF_TEXT, TRAINING_TEXT, train_tokenizer

PASSAGES = load_passages(TRAINING_TEXT)
TOKENIZER = train_tokenizer(TRAINING_TEXT.read_text(encoding="utf-8"), 2048)


def test_the_shipped_text_holds_long_passages_without_their_source_lines() -> None:
    assert len(PASSAGES) >= 8
    assert min(len(passage.split()) for passage in PASSAGES) >= 250
    assert not any("#" in passage or "\n" in passage for passage in PASSAGES)


def test_comment_lines_and_blank_lines_both_end_a_passage(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("# head\n\nfirst\nstill first\n# name\nsecond\n\n\n\nthird\n")
    assert load_passages(path) == ["first still first", "second", "third"]


def test_a_text_without_passages_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text("# only a comment\n\n")
    with pytest.raises(PromptError, match=r"empty\.txt holds no passage"):
        load_passages(path)


@pytest.mark.parametrize("index", [0, 3, len(PASSAGES) - 1])
def test_a_request_starts_with_its_own_passage(index: int) -> None:
    prompt = make_prompt(TOKENIZER, PASSAGES, index, 40)
    assert prompt.dtype == np.int64 and prompt.shape == (40,)
    assert PASSAGES[index].startswith(TOKENIZER.decode(prompt.tolist()))


def test_a_long_prompt_goes_on_with_the_next_passages_and_wraps_around() -> None:
    last = len(PASSAGES) - 1
    text = TOKENIZER.decode(make_prompt(TOKENIZER, PASSAGES, last, 1500).tolist())
    assert text.startswith(f"{PASSAGES[last]}\n\n{PASSAGES[0]}\n\n{PASSAGES[1][:40]}")


@settings(max_examples=25, deadline=None)
@given(index=st.integers(0, 40), short=st.integers(1, 1200), more=st.integers(0, 1200))
def test_a_shorter_prompt_is_the_beginning_of_a_longer_one(index: int, short: int, more: int) -> None:
    long_prompt = make_prompt(TOKENIZER, PASSAGES, index, short + more)
    assert np.array_equal(make_prompt(TOKENIZER, PASSAGES, index, short), long_prompt[:short])


def test_special_tokens_that_the_tokenizer_would_add_are_left_out() -> None:
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.post_processor = TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))]
    )
    assert tokenizer.encode("Call me").ids[0] == 0
    assert 0 not in make_prompt(tokenizer, PASSAGES, 0, 64)


def test_too_little_text_is_an_error_that_gives_both_numbers() -> None:
    held = len(TOKENIZER.encode("\n\n".join(PASSAGES), add_special_tokens=False).ids)
    assert make_prompt(TOKENIZER, PASSAGES, 0, held).shape == (held,)
    with pytest.raises(PromptError, match=f"asks for {held + 1:,} tokens, but the .* passages hold {held:,} "):
        make_prompt(TOKENIZER, PASSAGES, 0, held + 1)


@pytest.mark.parametrize(("index", "length"), [(0, 0), (-1, 8)])
def test_an_impossible_request_is_refused(index: int, length: int) -> None:
    with pytest.raises(PromptError, match=f"request {index} of {length} tokens"):
        make_prompt(TOKENIZER, PASSAGES, index, length)


def test_the_text_digest_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abc")
    assert text_digest(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    path.write_text("abd")
    assert text_digest(path) != "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
