"""Single-question text tasks: arithmetic, sorting, reversing, counting, JSON, greetings."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from srt.builtin.tasks import words

GREETING: Final = (
    "Hello! I am the small built-in model of srt. I can add, subtract, multiply, sort, count, "
    "reverse words, remember codes, call tools and look at images."
)
_OTHER_GREETINGS: Final = (
    "Hi!",
    "Hi",
    "Hello",
    "hello",
    "Hello, who are you?",
    "What can you do?",
    "Help",
    "What are you?",
)
UNKNOWN: Final = "I am only the small built-in model of srt, and I did not learn that."


@dataclass(frozen=True)
class Problem:
    """A question with its answer and the reasoning for each effort (low, medium, high)."""

    question: str
    answer: str
    low: str
    medium: str
    high: str
    key: str = ""
    always_trained: bool = False

    def thinking(self, effort: str | None) -> str:
        """Return the reasoning for an effort; without one it is the medium kind."""
        return {"low": self.low, "high": self.high}.get(effort or "medium", self.medium)

    def identity(self) -> str:
        """Return what decides whether the problem belongs to training or to evaluation."""
        return self.key or self.question


def sum_problem(rng: random.Random) -> Problem:
    """`What is {a} + {b}?`, worked digit by digit from the right."""
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    if rng.random() < 0.15:
        a = rng.randint(0, 12)
    units = a % 10 + b % 10
    carry, tens = units // 10, a // 10 + b // 10 + units // 10
    steps, short = f"{a % 10}+{b % 10}={units}", f"{units}"
    if a > 9 or b > 9:
        steps += f" {a // 10}+{b // 10}+{carry}={tens}"
        short += f" {tens}"
    return Problem(
        question=f"What is {a} + {b}?",
        answer=str(a + b),
        low=short,
        medium=steps,
        high=f"{a} + {b}: {steps} so {a + b}. Again: {steps} so {a + b}.",
    )


def difference_problem(rng: random.Random) -> Problem:
    """`What is {a} - {b}?` with a >= b, worked digit by digit with a borrow."""
    a, b = sorted((rng.randint(0, 99), rng.randint(0, 99)), reverse=True)
    if rng.random() < 0.15:
        b = rng.randint(0, min(a, 12))
    borrow = int(a % 10 < b % 10)
    top = a % 10 + 10 * borrow
    tens = a // 10 - b // 10 - borrow
    steps, short = f"{top}-{b % 10}={top - b % 10}", f"{top - b % 10}"
    if a > 9:
        steps += f" {a // 10}-{b // 10}-{borrow}={tens}"
        short += f" {tens}"
    return Problem(
        question=f"What is {a} - {b}?",
        answer=str(a - b),
        low=short,
        medium=steps,
        high=f"{a} - {b}: {steps} so {a - b}. Again: {steps} so {a - b}.",
    )


def product_problem(rng: random.Random) -> Problem:
    """`What is {a} * {b}?` for factors up to 12: a table that is simply known."""
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    return Problem(
        question=f"What is {a} * {b}?",
        answer=str(a * b),
        low=str(a * b),
        medium=f"{a}*{b}={a * b}",
        high=f"{a}*{b}={a * b}. Again: {b}*{a}={a * b}.",
    )


def sort_problem(rng: random.Random) -> Problem:
    """`Sort these numbers: ...`; the reasoning writes every number with two digits."""
    numbers = [rng.randint(0, 99) for _ in range(rng.randint(3, 8))]
    if rng.random() < 0.2:
        numbers[-1] = numbers[0]
        rng.shuffle(numbers)
    given = " ".join(f"{n:02d}" for n in numbers)
    ordered = " ".join(f"{n:02d}" for n in sorted(numbers))
    return Problem(
        question="Sort these numbers: " + " ".join(map(str, numbers)),
        answer=" ".join(map(str, sorted(numbers))),
        low=ordered,
        medium=f"{given} to {ordered}",
        high=f"{given} to {ordered}. Again: {given} to {ordered}.",
    )


def reverse_problem(rng: random.Random) -> Problem:
    """`Reverse the word {word}.`; the reasoning numbers the letters and walks back."""
    word = words.word(rng)
    numbered = [f"{index}{letter}" for index, letter in enumerate(word, start=1)]
    forward, backward = "".join(numbered), "".join(reversed(numbered))
    return Problem(
        question=f"Reverse the word {word}.",
        answer=word[::-1],
        low=backward,
        medium=f"{forward} {backward}",
        high=f"{forward} {backward}. Again: {forward} {backward}.",
        # A known word may be one token, whose spelling nothing but training can tell.
        always_trained=word in words.KNOWN,
    )


def count_problem(rng: random.Random) -> Problem:
    """`Count from {a} to {b}.` with a up to 300 and at most 200 numbers."""
    a = rng.randint(0, 300)
    length = rng.randint(1, 200) if rng.random() < 0.25 else rng.randint(1, 40)
    b = a + length - 1
    return Problem(
        question=f"Count from {a} to {b}.",
        answer=" ".join(map(str, range(a, b + 1))),
        low=f"to {b}",
        medium=f"from {a} to {b}",
        high=f"from {a} to {b}. Again: from {a} to {b}.",
    )


def json_problem(rng: random.Random) -> Problem:
    """`Give me JSON with name {Name} and age {n}.`"""
    name, age = rng.choice(words.NAMES), rng.randint(1, 99)
    return Problem(
        question=f"Give me JSON with name {name} and age {age}.",
        answer=f'{{"name": "{name}", "age": {age}}}',
        low=f"{age}",
        medium=f"name {name} age {age}",
        high=f"name {name} age {age}. Again: name {name} age {age}.",
    )


def greeting_problem(rng: random.Random) -> Problem:
    """`Who are you?` or `Hello!`: one fixed sentence."""
    question = rng.choice(("Who are you?", "Hello!", rng.choice(_OTHER_GREETINGS)))
    return Problem(question=question, answer=GREETING, low="hello", medium="say hello", high="say hello. Again: hello.")


def unknown_problem(rng: random.Random) -> Problem:
    """Some other text: the model says that it did not learn that. Shown in training only."""
    kind = rng.random()
    if kind < 0.5:
        question = " ".join(words.sentence(rng) for _ in range(rng.randint(1, 4)))
    else:
        start = rng.choice(("What is ", "Who is ", "Tell me about ", "Write ", "Why ", "How ", "What is the "))
        question = start + words.sentence(rng).lower()
    return Problem(question=question, answer=UNKNOWN, low="no", medium="not learned", high="not learned. Again: no.")


PROBLEMS: Final[dict[str, Callable[[random.Random], Problem]]] = {
    "sum": sum_problem,
    "difference": difference_problem,
    "product": product_problem,
    "sort": sort_problem,
    "reverse": reverse_problem,
    "count": count_problem,
    "json": json_problem,
    "greeting": greeting_problem,
    "unknown": unknown_problem,
}
