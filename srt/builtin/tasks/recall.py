"""Recall: codes of many words, stated before the question, in a system message or over several turns."""

from __future__ import annotations

import math
import random

from srt.builtin.tasks import words
from srt.builtin.tasks.example import Example, Message
from srt.builtin.tasks.text import Problem

WORDS_MIN, WORDS_MAX = 2, 40


def facts_text(facts: list[tuple[str, str]]) -> str:
    """Return `The code of {word} is {code}.` for every pair, one space between."""
    return " ".join(f"The code of {word} is {code}." for word, code in facts)


def question_for(word: str, code: str) -> Problem:
    """Return the question for one word whose code has been stated."""
    said = f"the code of {word} is {code}"
    return Problem(
        question=f"What is the code of {word}?",
        answer=code,
        low=f"{word} is {code}",
        medium=said,
        high=f"{said}. Again: {said}.",
        key=f"{word} {code}",
    )


def draw_facts(rng: random.Random, count_max: int = WORDS_MAX) -> list[tuple[str, str]]:
    """Return 2 to `count_max` words with codes; small and large counts are equally common in scale."""
    if rng.random() < 0.5:
        count = rng.randint(WORDS_MIN, count_max)
    else:
        count = round(math.exp(rng.uniform(math.log(WORDS_MIN), math.log(count_max))))
    return [(word, words.code(rng)) for word in words.distinct_words(rng, count)]


def recall_group(rng: random.Random, size: int, effort: str | None) -> list[Example]:
    """Draw one list of codes and up to `size` questions about it."""
    facts = draw_facts(rng)
    stated = facts_text(facts)
    in_system = rng.random() < 0.3
    examples = []
    for word, code in rng.sample(facts, min(size, len(facts))):
        problem = question_for(word, code)
        messages: list[Message] = [{"role": "user", "content": f"{stated} {problem.question}"}]
        if in_system:
            messages = [{"role": "system", "content": stated}, {"role": "user", "content": problem.question}]
        examples.append(_example("recall", problem, messages, effort))
    return examples


def recall_turns_group(rng: random.Random, size: int, effort: str | None) -> list[Example]:
    """Draw a chat of several turns, codes stated on the way, and up to `size` last questions."""
    facts = draw_facts(rng, count_max=24)
    turns = rng.randint(1, 4)
    cuts = sorted(rng.randint(1, len(facts)) for _ in range(turns))
    messages: list[Message] = []
    stated = 0
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": facts_text(facts[: cuts[0]])})
        stated = cuts[0]
    for cut in cuts:
        word, code = rng.choice(facts[:cut])
        user = _joined(facts_text(facts[stated:cut]), question_for(word, code).question)
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": code}]
        stated = cut
    opening = facts_text(facts[stated:])
    examples = []
    for word, code in rng.sample(facts, min(size, len(facts))):
        problem = question_for(word, code)
        last: Message = {"role": "user", "content": _joined(opening, problem.question)}
        examples.append(_example("recall_turns", problem, [*messages, last], effort))
    return examples


def _joined(opening: str, question: str) -> str:
    return f"{opening} {question}" if opening else question


def _example(family: str, problem: Problem, messages: list[Message], effort: str | None) -> Example:
    return Example(
        family=family,
        key=problem.identity(),
        messages=messages,
        thinking=problem.thinking(effort),
        answer=problem.answer,
        effort=effort,
    )
