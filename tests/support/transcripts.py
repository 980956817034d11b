"""Random answers in Step's format: whole ones, of which it is known what they say, and damaged ones.

The text is put together here, mark by mark as the chat template writes it, and not from the format description: so
it says what the reader has to understand, not what it does.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator
from typing import Any, Final

from srt.formats.answer import Parsed, ParsedCall, collected
from srt.formats.description import STEP, Function
from srt.formats.events import ArgumentsDelta, ContentDelta, Event, ReasoningDelta
from srt.formats.reader import Reader, ReadOptions

TOOLS: Final = (
    Function("add", {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "number"}}}),
    Function(
        "write_file",
        {
            "type": "object",
            "properties": {
                "path": {"type": "string"},
                "text": {"type": "string"},
                "mode": {"enum": ["new", "append"]},
                "force": {"type": ["boolean", "null"]},
            },
        },
    ),
    Function(
        "plan",
        {
            "$defs": {"step": {"type": "object"}},
            "properties": {
                "steps": {"type": "array", "items": {"$ref": "#/$defs/step"}},
                "first": {"$ref": "#/$defs/step"},
                "due": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
            },
        },
    ),
    Function("now"),
)

MARKS: Final = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter=", "</parameter>",
    "<function=add>", "<parameter=a>", ">", "\n",
)  # fmt: skip
_ODD: Final = (
    "<", "</", "<t", "</thin", "<tool_cal", "<func", "</para", "\n", "\n\n", " ", "\t", "\r\n", '"', "\\", "ä",
    "日本", "🙂", "{", "}", "null",
)  # fmt: skip


class Transcripts:
    """A stream of random answers. Words are numbered, so that each can be found again."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._words = 0

    def word(self) -> str:
        """A word that was never used."""
        self._words += 1
        return f"w{self._words}"

    def prose(self, longest: int) -> str:
        """Text that holds no whole mark, although it may look like the beginning of one."""
        rng = self._rng
        pieces = [rng.choice(_ODD) if rng.random() < 0.4 else self.word() + " " for _ in range(rng.randint(0, longest))]
        text = "".join(pieces)
        for mark in MARKS[:8]:
            text = text.replace(mark, "")
        return text

    def solid(self, longest: int) -> str:
        """Text without white space around it, never empty."""
        return self.word() + self.prose(longest) + self.word()

    def whole(self) -> tuple[str, Parsed]:
        """A well-formed answer and what it says."""
        rng = self._rng
        reasoning = self.prose(8)
        if reasoning.startswith("<think>") or rng.random() < 0.3:
            reasoning = self.solid(6)
        opening = rng.choice(("", "", "", "<think>", "<think>\n"))
        calls = [self._call() for _ in range(rng.choice((0, 0, 1, 1, 2, 3)))]
        content = self.solid(8) if rng.random() < 0.7 else ""
        tail = "".join(rng.choice(("", "\n", "\n\n ")) + text for text, _ in calls)
        if calls:
            tail += rng.choice(("", "\n", " \n"))
        if opening != "<think>" and rng.random() < 0.1 and calls and not content:
            # A call before the reasoning has ended, and then the end of it, as if nothing had happened.
            late = rng.choice(("", "\n</think>", "</think>\n"))
            text = reasoning + "\n" + tail.lstrip() + late
        else:
            text = reasoning + "\n</think>\n" + content + tail
        if opening == "<think>" and reasoning.startswith("\n"):
            reasoning = reasoning[1:]
        return opening + text, Parsed(reasoning, content, tuple(call for _, call in calls), ())

    def _call(self) -> tuple[str, ParsedCall]:
        rng = self._rng
        tool = rng.choice(TOOLS)
        arguments = self._arguments(tool.name)
        text = "".join(f"<parameter={key}>\n{written}\n</parameter>\n" for key, (written, _) in arguments.items())
        meant = {key: value for key, (_, value) in arguments.items()}
        return (
            f"<tool_call>\n<function={tool.name}>\n{text}</function>\n</tool_call>",
            ParsedCall(tool.name, json.dumps(meant), whole=True),
        )

    def _arguments(self, name: str) -> dict[str, tuple[str, Any]]:
        """Arguments as they are written, and what they mean."""
        rng = self._rng
        number, text, nested = rng.randint(-99, 99), self.prose(12), {self.word(): [1, 2.5, None, self.solid(3)]}
        text = "" if text.lower() == "null" else text
        spread = json.dumps(nested, indent=rng.choice((None, 1)), ensure_ascii=rng.random() < 0.5)
        match name:
            case "add":
                arguments: dict[str, tuple[str, Any]] = {"a": (str(number), number), "b": ("-1.50", -1.5)}
            case "write_file":
                path, forced = self.solid(2), rng.choice(("True", "false", "null"))
                arguments = {
                    "path": (path, path), "text": (text, text), "mode": ("append", "append"),
                    "force": (forced, {"True": True, "false": False, "null": None}[forced]),
                }  # fmt: skip
            case "plan":
                due, meant = rng.choice((("7", 7), ("soon", "soon")))
                arguments = {"steps": (f"[{spread}]", [nested]), "first": (spread, nested), "due": (due, meant)}
            case _:
                arguments = {self.word(): (text, text)} if rng.random() < 0.3 else {}
        kept = rng.sample(list(arguments), rng.randint(0, len(arguments)))
        return {key: arguments[key] for key in kept}

    def damaged(self) -> str:
        """An answer in which marks are missing, doubled, in the wrong place or broken off."""
        rng = self._rng
        pieces = [piece for piece in re.split(r"(</?[a-z_]+[=>])", self.whole()[0]) if piece]
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(pieces))
            match rng.randrange(4):
                case 0:
                    pieces[at] = ""
                case 1:
                    pieces.insert(at, rng.choice(MARKS))
                case 2:
                    pieces[at] = pieces[at][: rng.randint(0, len(pieces[at]))]
                case _:
                    pieces.insert(at, self.prose(2))
        text = "".join(pieces)
        return text[: rng.randint(0, len(text))] if rng.random() < 0.2 else text

    def cuts(self, text: str) -> list[str]:
        """The text in pieces of random sizes: like tokens, like several tokens a step, or any."""
        size = self._rng.choice((1, 3, 8, 40, len(text) + 1))
        pieces, at = [], 0
        while at < len(text):
            end = at + self._rng.randint(1, size)
            pieces.append(text[at:end])
            at = end
        return pieces


def read(pieces: Iterable[str], options: ReadOptions, *, complete: bool = True) -> list[Event]:
    """Events of an answer that comes in pieces; deltas that follow each other are one."""
    reader = Reader(STEP, TOOLS, options)
    events = [event for piece in pieces for event in reader.feed(piece)]
    return list(joined([*events, *reader.finish(complete=complete)]))


def joined(events: Iterable[Event]) -> Iterator[Event]:
    """The same events with as few deltas as can be."""
    last: Event | None = None
    for event in events:
        match last, event:
            case ReasoningDelta(before), ReasoningDelta(after):
                last = ReasoningDelta(before + after)
            case ContentDelta(before), ContentDelta(after):
                last = ContentDelta(before + after)
            case ArgumentsDelta(index, before), ArgumentsDelta(_, after):
                last = ArgumentsDelta(index, before + after)
            case None, _:
                last = event
            case _:
                assert last is not None
                yield last
                last = event
    if last is not None:
        yield last


def check_cuts(text: str, options: ReadOptions, ways: Iterable[list[str]], *, complete: bool) -> None:
    """Assert that an answer says the same however it is cut, that what is whole is JSON, and that no word is lost."""
    wanted = read([text], options, complete=complete)
    for pieces in ways:
        found = read(pieces, options, complete=complete)
        assert found == wanted, (text, pieces)
    said = collected(wanted)
    for call in said.calls:
        if call.whole:
            assert isinstance(json.loads(call.arguments), dict), text
    shown = [said.reasoning, said.content, *(problem.told() for problem in said.problems)]
    shown += [f"{call.name} {call.arguments}" for call in said.calls]
    lost = set(re.findall(r"w\d+", text)) - set(re.findall(r"w\d+", " ".join(shown)))
    assert not lost, (lost, text, said)


def two_splits(text: str) -> Iterator[list[str]]:
    """Every way to cut a text in two."""
    for at in range(1, len(text)):
        yield [text[:at], text[at:]]
