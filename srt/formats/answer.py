"""An answer taken apart: at once (`parse`), or while it grows (`ChatAnswer`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import assert_never

import msgspec

from srt.formats.description import STEP, Function, TextFormat
from srt.formats.events import ArgumentsDelta, CallBegin, CallEnd, ContentDelta, Event, Problem, ReasoningDelta
from srt.formats.reader import Reader, ReadOptions


class ParsedCall(msgspec.Struct, frozen=True):
    """A call. `arguments` is the text of a JSON object if it is `whole`, else the beginning of one."""

    name: str
    arguments: str
    whole: bool


class Parsed(msgspec.Struct, frozen=True):
    """What an answer says. Every character of it but marks, their padding and white space around calls is in one of
    these: as it was written in reasoning, content and problems, as JSON in calls."""

    reasoning: str
    content: str
    calls: tuple[ParsedCall, ...]
    problems: tuple[Problem, ...]


class Collected:
    """Events put together."""

    def __init__(self) -> None:
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: list[tuple[str, list[str]]] = []
        self._whole: set[int] = set()
        self._problems: list[Problem] = []

    def add(self, event: Event) -> None:
        """The next event."""
        match event:
            case ReasoningDelta(text):
                self._reasoning.append(text)
            case ContentDelta(text):
                self._content.append(text)
            case CallBegin(_, name):
                self._calls.append((name, []))
            case ArgumentsDelta(index, text):
                self._calls[index][1].append(text)
            case CallEnd(index):
                self._whole.add(index)
            case Problem():
                self._problems.append(event)
            case _:
                assert_never(event)

    def parsed(self) -> Parsed:
        """All of it."""
        calls = tuple(
            ParsedCall(name, "".join(arguments), index in self._whole)
            for index, (name, arguments) in enumerate(self._calls)
        )
        return Parsed("".join(self._reasoning), "".join(self._content), calls, tuple(self._problems))


def collected(events: Iterable[Event]) -> Parsed:
    """Events put together."""
    whole = Collected()
    for event in events:
        whole.add(event)
    return whole.parsed()


def parse(
    text: str, form: TextFormat, tools: Iterable[Function], options: ReadOptions, *, complete: bool = True
) -> Parsed:
    """Take a whole answer apart. `complete`: the model ended it itself, it was not cut off."""
    reader = Reader(form, tools, options)
    return collected([*reader.feed(text), *reader.finish(complete=complete)])


class Reading(msgspec.Struct, frozen=True):
    """What is to be done with the answers to one request. A format of None leaves that part in the content."""

    reasoning: TextFormat | None = None
    calls: TextFormat | None = None
    tools: tuple[Function, ...] = ()
    shows_reasoning: bool = True
    """Else what was thought is in no event."""
    streams_reasoning: bool = True
    """Else it comes in one piece."""
    most_calls: int | None = None
    """What is called beyond is a problem."""


class ChatAnswer:
    """One answer of a model while it grows, as events.

    `thinking` is asked once, when something of the answer has come: whether the prompt left the model within its
    reasoning. `new_id` makes the ids of calls.
    """

    def __init__(self, reading: Reading, *, thinking: Callable[[], bool], new_id: Callable[[], str]) -> None:
        self._reading = reading
        self._thinking = thinking
        self._reader: Reader | None = None
        self._new_id = new_id
        self._collected = Collected()
        self._held: list[str] = []
        """Reasoning that is shown once it is whole."""
        self._left_out: list[str] = []
        """A call beyond the limit."""
        self.call_ids: list[str] = []
        """Ids of the calls so far."""
        self._open_calls = 0

    def feed(self, text: str) -> list[Event]:
        """More of the answer; returns what is new to the client."""
        return self._shown(self._opened().feed(text)) if text else []

    def finish(self, *, complete: bool) -> list[Event]:
        """The answer is over; `complete` says that the model ended it itself. Returns the last of it."""
        shown = self._shown(self._opened().finish(complete=complete))
        self._release_reasoning(shown)
        if self._left_out:
            self._leave_out(shown)
        return shown

    def _opened(self) -> Reader:
        if self._reader is None:
            reasoning, calls = self._reading.reasoning, self._reading.calls
            options = ReadOptions(thinking=self._thinking(), reasoning=reasoning is not None, calls=calls is not None)
            self._reader = Reader(reasoning or calls or STEP, self._reading.tools, options)
        return self._reader

    def _shown(self, events: list[Event]) -> list[Event]:
        """What of these events is for the client, in the order in which it is to see it."""
        shown: list[Event] = []
        for event in events:
            match event:
                case ReasoningDelta(text):
                    if not self._reading.shows_reasoning:
                        continue
                    if not self._reading.streams_reasoning:
                        self._held.append(text)
                        continue
                case CallBegin() | ArgumentsDelta() | CallEnd() if self._is_too_many(event.index):
                    self._hold_call(event, shown)
                    continue
                case CallBegin():
                    self.call_ids.append(self._new_id())
                    self._open_calls += 1
                case CallEnd():
                    self._open_calls -= 1
                case _:
                    pass
            self._release_reasoning(shown)
            self._say(event, shown)
        return shown

    def _say(self, event: Event, shown: list[Event]) -> None:
        self._collected.add(event)
        shown.append(event)

    def _release_reasoning(self, shown: list[Event]) -> None:
        """What was held is whole: something else comes."""
        if self._held:
            self._say(ReasoningDelta("".join(self._held)), shown)
            self._held.clear()

    def _is_too_many(self, index: int) -> bool:
        return self._reading.most_calls is not None and index >= self._reading.most_calls

    def _hold_call(self, event: CallBegin | ArgumentsDelta | CallEnd, shown: list[Event]) -> None:
        """A call that is not wanted is told as a problem once it is whole."""
        match event:
            case CallBegin(_, name):
                self._left_out.append(name + " ")
            case ArgumentsDelta(_, text):
                self._left_out.append(text)
            case CallEnd():
                self._leave_out(shown)
            case _:
                assert_never(event)

    def _leave_out(self, shown: list[Event]) -> None:
        self._say(Problem("one call is wanted, a further one is left out", "".join(self._left_out)), shown)
        self._left_out.clear()

    @property
    def parsed(self) -> Parsed:
        """The answer so far."""
        return self._collected.parsed()

    @property
    def ends_in_calls(self) -> bool:
        """Whether the answer has calls and all of them are whole."""
        return bool(self.call_ids) and not self._open_calls
