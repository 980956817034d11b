"""Incremental text equals whole text; stop strings are found the same however the text is cut."""

from __future__ import annotations

from itertools import pairwise
from typing import TypeVar

import re2
from hypothesis import given, settings
from hypothesis import strategies as st

from srt.messages import Emission, Finish, StopSpec
from srt.tokenizer.answer import Answer
from srt.tokenizer.detokenize import Detokenizer, StopMatcher
from srt.tokenizer.stops import WINDOW_CHARACTERS, StopRegexes
from srt.tokenizer.vocabulary import Vocabulary
from tests.support.tokens import VOCAB_SIZE

T = TypeVar("T")
IDS = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=40)
CUTS = st.sets(st.integers(1, 39))
LETTERS = st.text(alphabet="ab\N{GRINNING FACE}", max_size=24)
STOPS = st.lists(st.text(alphabet="ab\N{GRINNING FACE}", min_size=1, max_size=5), min_size=1, max_size=4)


def pieces(whole: list[T], cuts: set[int]) -> list[list[T]]:
    """`whole` in pieces."""
    edges = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    return [whole[start:end] for start, end in pairwise(edges)]


def first_stop(text: str, stops: list[str]) -> tuple[int, int, str] | None:
    """(end, start, stop) of the stop string that is complete first, found by looking at every prefix."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return end, end - len(longest), longest
    return None


@given(ids=IDS, cuts=CUTS, skip=st.booleans())
@settings(max_examples=400, deadline=None)
def test_pieces_joined_are_the_whole_text_and_each_is_final(
    ids: list[int], cuts: set[int], skip: bool, vocabulary: Vocabulary
) -> None:
    detokenizer = Detokenizer(vocabulary, skip_special_tokens=skip)
    whole = vocabulary.decode(ids, skip_special_tokens=skip)
    text = ""
    for piece in pieces(ids, cuts):
        text += detokenizer.feed(piece)
        assert whole.startswith(text)
    assert text + detokenizer.finish() == whole


def test_half_a_character_waits_for_its_other_half(vocabulary: Vocabulary) -> None:
    ids = vocabulary.encode("\N{LATIN SMALL LETTER KRA}\N{PILE OF POO}", add_special_tokens=False)
    detokenizer = Detokenizer(vocabulary, skip_special_tokens=True)
    texts = [detokenizer.feed([index]) for index in ids]
    assert len(texts) > 2, "the characters have tokens of their own, so the test shows nothing"
    assert [text for text in texts if text] == ["\N{LATIN SMALL LETTER KRA}", "\N{PILE OF POO}"]
    assert detokenizer.finish() == ""
    assert detokenizer.feed(ids[:1]) == ""
    assert detokenizer.finish() == "\ufffd"


@given(text=LETTERS, stops=STOPS, cuts=CUTS, keep=st.booleans())
@settings(max_examples=600, deadline=None)
def test_the_match_does_not_depend_on_how_the_text_was_cut(
    text: str, stops: list[str], cuts: set[int], keep: bool
) -> None:
    matcher = StopMatcher(stops, keep=keep)
    truth = first_stop(text, stops)
    shown = ""
    for piece in pieces(list(text), cuts):
        shown += matcher.feed("".join(piece))
        if matcher.matched is not None:
            break
        assert truth is None or (text[: truth[1]]).startswith(shown)
    else:
        shown += matcher.flush()
    if truth is None:
        assert (matcher.matched, shown) == (None, text)
    else:
        end, start, stop = truth
        assert matcher.matched == stop
        assert shown == text[: end if keep else start]


def run(answer: Answer, ids: list[int], cuts: set[int], finish: Finish) -> tuple[list[str], list[int], Finish]:
    """Feed an answer; returns texts, ids and the ending of its deltas."""
    texts: list[str] = []
    seen: list[int] = []
    emissions = [Emission("r", tuple(piece)) for piece in pieces(ids, cuts)]
    emissions[-1] = Emission("r", emissions[-1].token_ids, finish)
    for emission in emissions:
        delta = answer.advance(emission)
        if delta is not None:
            texts.append(delta.text)
            seen += delta.token_ids
            if delta.finish is not None:
                return texts, seen, delta.finish
    raise AssertionError("no ending")


@given(ids=IDS, cuts=CUTS, stream=st.booleans(), stops=st.lists(st.text(min_size=1, max_size=4), max_size=3))
@settings(max_examples=300, deadline=None)
def test_an_answer_is_the_same_streamed_and_whole_and_for_any_cut(
    ids: list[int], cuts: set[int], stream: bool, stops: list[str], vocabulary: Vocabulary
) -> None:
    spec = StopSpec(100, texts=tuple(stops))
    answer = Answer("r", vocabulary, spec, stream=stream, skip_special_tokens=True, prompt_tokens=3)
    texts, seen, finish = run(answer, ids, cuts, Finish("length"))
    whole = vocabulary.decode(ids, skip_special_tokens=True)
    truth = first_stop(whole, stops) if stops else None
    if truth is None:
        assert ("".join(texts), seen, finish) == (whole, ids, Finish("length"))
        return
    end, start, stop = truth
    assert "".join(texts) == whole[:start]
    assert finish == Finish("stop", stop)
    # The counted tokens end with the one that completed the match: one fewer and it is not there.
    assert seen == ids[: len(seen)]
    detokenizer = Detokenizer(vocabulary, skip_special_tokens=True)
    before = detokenizer.feed(seen[:-1])
    assert len(before) < end <= len(vocabulary.decode(seen, skip_special_tokens=True))


def test_the_stop_id_is_kept_in_the_ids_and_left_out_of_the_text(vocabulary: Vocabulary) -> None:
    [word] = vocabulary.encode("e", add_special_tokens=False)
    for keep, text in ((False, "e"), (True, "ee")):
        spec = StopSpec(100, token_ids=(word,), keep_text=keep)
        for stream in (False, True):
            answer = Answer("r", vocabulary, spec, stream=stream, skip_special_tokens=True, prompt_tokens=1)
            texts, seen, finish = run(answer, [word, word], set(), Finish("stop", word))
            assert ("".join(texts), seen, finish.matched) == (text, [word, word], word)


@given(
    ids=IDS,
    cuts=CUTS,
    stream=st.booleans(),
    stops=st.lists(st.text(min_size=1, max_size=3), max_size=2),
    pattern=st.sampled_from(["[a-e]{2}", "o.*o", r"\d+$", "^[^a]*b", "x|y|z"]),
)
@settings(max_examples=300, deadline=None)
def test_a_stop_expression_ends_an_answer_alike_streamed_and_whole_and_for_any_cut(
    ids: list[int], cuts: set[int], stream: bool, stops: list[str], pattern: str, vocabulary: Vocabulary
) -> None:
    def answer(cuts: set[int], *, stream: bool) -> tuple[str, list[int], Finish]:
        spec = StopSpec(100, texts=tuple(stops), regexes=(pattern,))
        made = Answer("r", vocabulary, spec, stream=stream, skip_special_tokens=True, prompt_tokens=3)
        texts, seen, finish = run(made, ids, cuts, Finish("length"))
        return "".join(texts), seen, finish

    text, seen, finish = answer(cuts, stream=stream)
    assert (text, seen, finish) == answer(set(), stream=False)
    if finish == Finish("stop", pattern):
        assert re2.search(pattern, text)  # whose digits are ASCII's and whose `$` is the end, unlike Python's
        assert text == Detokenizer(vocabulary, skip_special_tokens=True).feed(seen)
    for count in range(len(seen) - (finish.kind == "stop")):
        assert not re2.search(pattern, Detokenizer(vocabulary, skip_special_tokens=True).feed(seen[:count]) or "\n")


def test_an_expression_looks_back_a_window_far_and_sees_the_beginning_only_once() -> None:
    found = StopRegexes(["^b+c", "ca+c"])
    assert found.feed("x" * 5000) is None
    assert found.feed("b" * WINDOW_CHARACTERS + "b") is None
    assert found.feed("c") is None, "the text does not begin with b"
    assert found.feed("a" * 4000) is None
    assert found.feed("c") == "ca+c"
    late = StopRegexes(["xc"])
    assert late.feed("x" * 9000) is None
    assert late.feed("c") == "xc"
