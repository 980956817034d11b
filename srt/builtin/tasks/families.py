"""The registry of task families, and the wrapping that any of them may get."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from srt.builtin.tasks import image_tasks, recall, tool_tasks, words
from srt.builtin.tasks.example import EFFORTS, Example, Message, Split, belongs
from srt.builtin.tasks.text import PROBLEMS

Grouper = Callable[[random.Random, int, str | None], list[Example]]


@dataclass(frozen=True)
class Family:
    """A kind of task. `group(rng, size, effort)` draws problems that share one context.

    `closed` marks families whose problems are too few to keep some from training.
    """

    name: str
    group: Grouper
    kind: str = "text"
    closed: bool = False
    evaluated: bool = True


def _text_group(name: str) -> Grouper:
    def group(rng: random.Random, size: int, effort: str | None) -> list[Example]:
        del size
        problem = PROBLEMS[name](rng)
        return [
            Example(
                family=name,
                key=problem.identity(),
                messages=[{"role": "user", "content": problem.question}],
                thinking=problem.thinking(effort),
                answer=problem.answer,
                effort=effort,
                always_trained=problem.always_trained,
            )
        ]

    return group


def _effort_group(rng: random.Random, size: int, effort: str | None) -> list[Example]:
    del effort
    name = rng.choice(("sum", "difference", "sort", "reverse", "json", "recall"))
    drawn = FAMILIES[name].group(rng, size, rng.choice(EFFORTS))
    return [replace(example, family="effort") for example in drawn]


def _tool_group(rng: random.Random, size: int, effort: str | None) -> list[Example]:
    return tool_tasks.call_group(rng, size, effort, joined=False)


def _joined_group(rng: random.Random, size: int, effort: str | None) -> list[Example]:
    return tool_tasks.call_group(rng, size, effort, joined=True)


_ALL: Final = (
    Family("sum", _text_group("sum")),
    Family("difference", _text_group("difference")),
    Family("product", _text_group("product"), closed=True),
    Family("sort", _text_group("sort")),
    Family("reverse", _text_group("reverse")),
    Family("count", _text_group("count")),
    Family("json", _text_group("json")),
    Family("recall", recall.recall_group),
    Family("recall_turns", recall.recall_turns_group),
    Family("greeting", _text_group("greeting"), closed=True),
    Family("effort", _effort_group),
    Family("tool_call", _tool_group, kind="tools"),
    Family("tool_joined", _joined_group, kind="tools"),
    Family("tool_answer", tool_tasks.reply_group, kind="tools"),
    Family("image_object", image_tasks.object_group, kind="images"),
    Family("image_digit", image_tasks.digit_group, kind="images"),
    Family("image_many", image_tasks.many_group, kind="images"),
    Family("unknown", _text_group("unknown"), closed=True, evaluated=False),
    Family("tool_missing", tool_tasks.missing_tool_group, kind="tools", evaluated=False),
)
FAMILIES: Final[dict[str, Family]] = {family.name: family for family in _ALL}
_ARITHMETIC: Final = ("sum", "difference", "product")
_PLAIN: Final = ("sum", "difference", "product", "sort", "reverse", "json", "greeting")


def draw_group(family: str, rng: random.Random, *, split: Split, size: int = 1, plain: bool = False) -> list[Example]:
    """Draw up to `size` problems of one family over one context, all of one split.

    With `plain` the prompt is the bare task; otherwise it may come with an effort, a system
    message, earlier turns, or tools that are not needed.
    """
    chosen = FAMILIES[family]
    while True:
        effort = rng.choice(EFFORTS) if not plain and rng.random() < 0.3 else None
        drawn = chosen.group(rng, size, effort)
        if not chosen.closed:
            drawn = [example for example in drawn if belongs(example, split)]
        if drawn:
            return drawn if plain else _wrapped(drawn, rng, split)


def draw(family: str, rng: random.Random, *, split: Split = "eval", plain: bool = True) -> Example:
    """Draw one problem."""
    return draw_group(family, rng, split=split, plain=plain)[0]


def evaluation_set(family: str, count: int, seed: int = 0, start: int = 0) -> list[Example]:
    """Return `count` problems that training never saw, from number `start`; one seed always gives the same."""
    return [draw(family, random.Random(f"{family} {seed} {index}")) for index in range(start, start + count)]


def _wrapped(drawn: list[Example], rng: random.Random, split: Split) -> list[Example]:
    family = FAMILIES[drawn[0].family]
    prefix: list[Message] = []
    first = drawn[0].messages[0]
    if first["role"] != "system" and rng.random() < 0.12:
        usual = rng.random() < 0.4
        text = "You are a helpful assistant." if usual else words.sentence(rng, 20)
        prefix.append({"role": "system", "content": text})
    if first["role"] != "system" and rng.random() < 0.15:
        for _ in range(rng.randint(1, 3)):
            past = draw(rng.choice(_PLAIN), rng, split=split)
            prefix += [*past.messages, {"role": "assistant", "content": past.answer}]
    tools = drawn[0].tools
    if family.kind == "tools" and tools and rng.random() < 0.15:
        prefix += tool_tasks.finished_round(rng, tools)
    if family.name in _ARITHMETIC and rng.random() < 0.1:
        drawn = [replace(example, messages=[_terse(rng, example.messages[0])]) for example in drawn]
    if tools is None and family.kind == "text" and rng.random() < 0.06:
        tools = tool_tasks.tool_list(rng, {"add"})
    return [replace(example, messages=[*prefix, *example.messages], tools=tools) for example in drawn]


def _terse(rng: random.Random, message: Message) -> Message:
    """Write an arithmetic question as a person in a hurry does."""
    text = message["content"]
    if rng.random() < 0.6:
        for sign in "+-*":
            text = text.replace(f" {sign} ", sign)
    if rng.random() < 0.4:
        text = text.removeprefix("What is ")
    if rng.random() < 0.5:
        text = text.removesuffix("?")
    return {**message, "content": text}
