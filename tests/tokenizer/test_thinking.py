"""Whether a prompt leaves the model thinking, and for how long it does."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import pytest

from srt.formats.description import STEP
from srt.messages import Constraint, SamplingSpec, ThinkingBudget
from srt.tokenizer.thinking import Thinking
from srt.tokenizer.vocabulary import Vocabulary

TURN_END = "<|im_end|>"


@pytest.fixture(scope="module")
def thinking(vocabulary: Vocabulary) -> Thinking:
    """Of a checkpoint in Step's format."""
    return Thinking(vocabulary, STEP, STEP, [named(vocabulary, TURN_END)])


def named(vocabulary: Vocabulary, token: str) -> int:
    """Id of a token that there is."""
    index = vocabulary.id_of(token)
    assert index is not None
    return index


def packed(vocabulary: Vocabulary, text: str) -> bytes:
    """A prompt."""
    return array("i", vocabulary.encode(text, add_special_tokens=False)).tobytes()


@pytest.mark.parametrize(
    ("prompt", "thinks"),
    [
        ("", False),
        ("hello", False),
        ("<think>", True),
        ("hello <think>\nfirst", True),
        ("<think>first</think>\nso", False),
        ("<think>first</think> <think>", True),
        (f"what is <think>?{TURN_END}", False),
        (f"what is <think>?{TURN_END}answer:", False),
        (f"what is </think>?{TURN_END}answer: <think>", True),
        (f"answer: <think>{TURN_END}", False),
    ],
)
def test_the_last_mark_of_the_turn_says_whether_the_model_thinks(
    thinking: Thinking, vocabulary: Vocabulary, prompt: str, thinks: bool
) -> None:
    ids = packed(vocabulary, prompt)
    assert thinking.is_open(ids) is thinks
    behind = Constraint("json_object", after_thinking=True)
    assert thinking.start_of(behind, ids) == (thinking.close_id if thinks else None)
    assert thinking.start_of(Constraint("json_object", after_token=7), ids) == 7


def test_a_mark_is_found_at_whole_tokens_only(vocabulary: Vocabulary) -> None:
    opened = named(vocabulary, STEP.think_open)
    thinking = Thinking(vocabulary, STEP, None, [])
    shifted = array("i", [opened << 8 & 0x7FFFFFFF, opened >> 24]).tobytes()
    assert opened.to_bytes(4, "little") in shifted
    assert not thinking.is_open(shifted)
    assert thinking.is_open(shifted + opened.to_bytes(4, "little"))


def test_without_a_format_nothing_is_reasoning(vocabulary: Vocabulary) -> None:
    thinking = Thinking(vocabulary, None, None, [])
    assert not thinking.is_open(packed(vocabulary, "<think>"))
    assert thinking.count(is_open=False, with_tools=True) is None
    assert thinking.ended("<think>") == "<think>"


@pytest.mark.parametrize(
    ("is_open", "with_tools", "pieces", "tokens"),
    [
        (True, False, ["so so", "</think>", "4"], 3),
        (True, False, ["so<tool_call>x"], 3),
        (True, True, ["so<tool_call>x", "</think>"], 2),
        (False, True, ["so</think>"], 0),
        (True, True, [], 0),
    ],
)
def test_reasoning_is_counted_to_the_token_that_ends_it(
    thinking: Thinking, vocabulary: Vocabulary, is_open: bool, with_tools: bool, pieces: list[str], tokens: int
) -> None:
    count = thinking.count(is_open=is_open, with_tools=with_tools)
    assert count is not None
    words = {"so": 5, " so": 6}
    for piece in pieces:
        count.add(ids_of(vocabulary, piece, words))
    assert count.tokens == tokens


def ids_of(vocabulary: Vocabulary, text: str, words: dict[str, int]) -> Iterable[int]:
    """Ids of marks, and one for each word."""
    for mark in (STEP.think_close, STEP.call_open):
        text = text.replace(mark, f" {mark} ")
    for word in text.split():
        index = vocabulary.id_of(word)
        yield words.get(word, 9) if index is None or word not in (STEP.think_close, STEP.call_open) else index


def test_a_budget_is_for_prompts_that_leave_the_model_thinking(thinking: Thinking, vocabulary: Vocabulary) -> None:
    close, call = named(vocabulary, STEP.think_close), named(vocabulary, STEP.call_open)
    plain = SamplingSpec()
    assert thinking.limited(plain, None, is_open=True, with_tools=True) == plain
    assert thinking.limited(plain, 3, is_open=False, with_tools=True) == plain
    limited = thinking.limited(plain, 3, is_open=True, with_tools=False)
    assert limited.thinking == ThinkingBudget(3, close, (close,))
    assert thinking.limited(plain, 3, is_open=True, with_tools=True).thinking == ThinkingBudget(3, close, (close, call))


def test_a_prompt_that_opens_reasoning_can_end_it_at_once(thinking: Thinking) -> None:
    assert thinking.ended("assistant\n<think>\n") == "assistant\n<think>\n\n</think>\n"
    assert thinking.ended("assistant\n") == "assistant\n"
