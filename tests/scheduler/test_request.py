"""The transition table, and the arithmetic of one request."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest

from srt.messages import Admit, SamplingSpec, StopSpec
from srt.scheduler.request import NEXT, Phase, Request

DOCS = Path(__file__).parents[2] / "docs" / "scheduler.md"


def request(prompt_tokens: int, max_new_tokens: int, context: int = 100) -> Request:
    """A request that has just arrived."""
    return Request(Admit("a", bytes(4 * prompt_tokens), SamplingSpec(), StopSpec(max_new_tokens)), 0, context, 0)


def test_the_documented_transitions_are_those_of_the_table() -> None:
    documented: dict[Phase, set[Phase]] = {phase: set() for phase in Phase}
    for source, target in re.findall(r"^\| (\w+) \| (\w+) \|", DOCS.read_text(), flags=re.MULTILINE):
        if source in Phase.__members__:
            documented[Phase[source]].add(Phase[target])
    assert documented == {phase: set(following) for phase, following in NEXT.items()}


@pytest.mark.parametrize(("source", "target"), list(product(Phase, Phase)))
def test_a_request_moves_only_as_the_table_says(source: Phase, target: Phase) -> None:
    moving = request(1, 1)
    moving.phase = source
    if target in NEXT[source]:
        moving.move(target)
        assert moving.phase is target
    else:
        with pytest.raises(AssertionError, match=f"a cannot go from {source.value} to {target.value}"):
            moving.move(target)


@pytest.mark.parametrize(
    ("prompt", "new", "limit", "target"), [(10, 5, 15, 14), (10, 1, 11, 10), (10, 0, 10, 10), (98, 50, 100, 99)]
)
def test_the_last_token_of_an_answer_is_never_computed(prompt: int, new: int, limit: int, target: int) -> None:
    asked = request(prompt, new)
    assert (asked.limit_tokens, asked.target) == (limit, target)
