"""A wrong KV page shows: the built-in model forgets what stood there, and nothing else."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from srt.builtin.tasks import Example, read_completion
from srt.builtin.tasks.recall import facts_text, question_for
from srt.builtin.tasks.words import code, distinct_words
from srt.configs.models import checkpoint_directory
from tests.support.steps import Steps, plan_for
from tools.builtin import text

PAGE = 16
FULL = 0
"""Index of the KV group of the full-attention layers: the only ones that see further back than 64 tokens."""
UNREAD = 40
"""Tokens of the prompt that are computed after the page was lost."""
ANSWER_TOKENS = 60


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The tokenizer as the package ships it."""
    return Tokenizer.from_file(str(checkpoint_directory("builtin:tiny") / "tokenizer.json"))


class Chat:
    """A worker on the built-in model that answers a question about the fifth of 24 codes."""

    def __init__(self, tokenizer: Tokenizer, rundir: Path, seed: int) -> None:
        torch.set_num_threads(1)
        self._tokenizer, self._end = tokenizer, tokenizer.token_to_id(text.TURN_END)
        rng = random.Random(seed)
        facts = [(word, code(rng)) for word in distinct_words(rng, 24)]
        problem = question_for(*facts[4])
        messages = [{"role": "user", "content": f"{facts_text(facts)} {problem.question}"}]
        self.example = Example("recall", "", messages, "", answer=problem.answer)
        self._prompt = text.render_prompt(self.example)
        self._fact = facts_text([facts[4]])
        self._steps = Steps(plan_for(checkpoint_directory("builtin:tiny"), page_size=PAGE, pages=96), rundir)
        self._steps.add(0, self._ids(self._prompt))
        # What is left, the question, lies further than a sliding window behind the fact.
        self._steps.run({0: len(self._steps.tokens[0]) - UNREAD})

    def _ids(self, part: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(part, add_special_tokens=False).ids
        return ids

    def lose(self, *, pages_behind_the_fact: int) -> None:
        """Put another prompt page in place of each that holds the fact, or of those so many pages behind it."""
        first = len(self._ids(self._prompt[: self._prompt.index(self._fact)]))
        last = first + len(self._ids(self._fact)) - 1
        pages = self._steps.pages[0][FULL]
        for index in range(first // PAGE, last // PAGE + 1):
            self._steps.misplace(0, FULL, index + pages_behind_the_fact, pages[18])

    def answers_rightly(self) -> bool:
        """Compute the rest of the prompt, generate, and check."""
        steps = self._steps
        start = len(steps.tokens[0])
        steps.prefill(0)
        while steps.tokens[0][-1] != self._end and len(steps.tokens[0]) < start + ANSWER_TOKENS:
            steps.run({0: 1})
        written = self._tokenizer.decode(steps.tokens[0][start:-1], skip_special_tokens=False)
        return self.example.check(read_completion(written).message())


@pytest.mark.parametrize("seed", range(6))
def test_a_wrong_page_makes_recall_fail_only_if_it_held_the_fact(
    tokenizer: Tokenizer, tmp_path: Path, seed: int
) -> None:
    intact, elsewhere, wrong = (Chat(tokenizer, tmp_path, seed) for _ in range(3))
    elsewhere.lose(pages_behind_the_fact=6)
    wrong.lose(pages_behind_the_fact=0)
    assert intact.answers_rightly()
    assert elsewhere.answers_rightly()
    assert not wrong.answers_rightly()
