"""The one parser of answers: text in pieces of any size to events.

A `Reader` is defined by what it says of a whole text (`parse`). What it has said after a piece is what every
continuation of the text so far begins with, so the events do not depend on how a text is cut; only as much is held
back as may still turn out to be a mark, at most a few hundred characters, and values that are not text (`values`).

    START ──▶ REASONING ──▶ CONTENT ◀──▶ CALL ◀──▶ VALUE
                    │            ▲          │
                    └──a call────┼──────────┤
                                 └─ CLOSING ◀

Lenient where models err, and never silent about it: a call within the reasoning ends the reasoning; a missing closing
mark is taken as said where the next mark makes it clear; what looks like a call and is none stays text.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, auto
from typing import Final

import msgspec

from srt.formats.description import FORMATS, Function, TextFormat
from srt.formats.events import ArgumentsDelta, CallBegin, CallEnd, ContentDelta, Event, Problem, ReasoningDelta
from srt.formats.marks import Found, Marks, Name, at, behind_blanks, name_at
from srt.formats.values import ArgumentWriter


class ReadOptions(msgspec.Struct, frozen=True):
    """How to read an answer. `thinking`: it begins within the reasoning. `reasoning` and `calls` say what is told
    apart from content; what is not stays content as it was written."""

    thinking: bool = True
    reasoning: bool = True
    calls: bool = True


PIECE_CHARACTERS: Final = 2048


class Mode(Enum):
    """What the next characters are."""

    START = auto()
    REASONING = auto()
    CONTENT = auto()
    CALL = auto()
    VALUE = auto()
    CLOSING = auto()


class _Vocabulary:
    """The marks that mean something, by what surrounds them."""

    def __init__(self, form: TextFormat, *, reasoning: bool, calls: bool) -> None:
        think = (form.think_close,) if reasoning else ()
        block = (form.call_open,) if calls else ()
        bare = (form.function_open,) if calls else ()
        self.in_reasoning = Marks(form.think_close, *block)
        self.in_content = Marks(*think, *block, *bare)
        self.in_call = Marks(form.parameter_open, form.function_close, form.call_close, form.call_open)
        self.in_value = Marks(
            form.parameter_close, form.parameter_open, form.function_close, form.call_close, form.call_open
        )


_VOCABULARIES: Final = {
    (name, reasoning, calls): _Vocabulary(form, reasoning=reasoning, calls=calls)
    for name, form in FORMATS.items()
    for reasoning in (False, True)
    for calls in (False, True)
}


class _Prose:
    """Content around calls. White space waits for the text behind it: at the edges of a content with calls it is
    markup, not content."""

    def __init__(self, *, trims: bool) -> None:
        self._trims = trims
        self._blank: list[str] = []
        self._interrupted = False
        self.has_text = False

    def say(self, text: str) -> list[Event]:
        """More content."""
        solid = len(text.rstrip())
        if not self._trims:
            self.has_text = self.has_text or solid > 0
            return [ContentDelta(text)]
        if not solid:
            self._blank.append(text)
            return []
        shown = "".join((*self._blank, text[:solid]))
        if self._interrupted and not self.has_text:
            shown = shown.lstrip()
        self._blank = [text[solid:]]
        self.has_text = True
        return [ContentDelta(shown)]

    def interrupt(self) -> None:
        """A call begins."""
        self._interrupted = True

    def finish(self) -> list[Event]:
        """What waits when nothing more comes."""
        blank = "".join(self._blank)
        return [ContentDelta(blank)] if blank and not self._interrupted else []


class _Call:
    """The call that is being read."""

    def __init__(self, index: int, name: str, *, in_block: bool, writer: ArgumentWriter) -> None:
        self.index = index
        self.name = name
        self.in_block = in_block
        """Call marks stand around the function."""
        self.writer = writer
        self.key = ""
        self.repeats = False
        """The parameter has come before; JSON has no place for it."""
        self.stray: list[str] = []
        """Text where only parameters should be."""
        self.problems: list[Problem] = []
        """Told behind the call, so that nothing stands between its arguments."""
        self._repeated: list[str] = []

    def begin_value(self, key: str) -> str:
        """A parameter's value begins; its JSON so far."""
        self.key = key
        self.repeats = self.writer.knows(key)
        return "" if self.repeats else self.writer.begin(key)

    def add(self, text: str) -> str:
        """More of the value; its JSON."""
        if not self.repeats:
            return self.writer.add(text)
        self._repeated.append(text)
        return ""

    def end_value(self) -> tuple[str, str]:
        """The value is whole: the rest of its JSON, and what is wrong with it."""
        return ("", "") if self.repeats else self.writer.end()

    def rest(self) -> str:
        """Text of the value that is in no JSON."""
        text, self._repeated = "".join(self._repeated), []
        return text or self.writer.rest()


_IN_CALL: Final = (Mode.CALL, Mode.VALUE, Mode.CLOSING)


class Reader:
    """Reads one answer in one of `FORMATS`. Events are the same however it is cut, but for deltas cut likewise."""

    def __init__(self, form: TextFormat, tools: Iterable[Function], options: ReadOptions) -> None:
        self._form = form
        self._functions = {tool.name: tool for tool in tools}
        self._options = options
        self._vocabulary = _VOCABULARIES[form.name, options.reasoning, options.calls]
        self._mode = Mode.START if options.thinking and options.reasoning else Mode.CONTENT
        self._text = ""
        """What has come and is not understood yet."""
        self._final = self._complete = False
        self._skips_padding = False
        """One padding that follows belongs to the mark before."""
        self._awaits_think_close = False
        self._prose = _Prose(trims=options.calls)
        self._call = _Call(-1, "", in_block=False, writer=ArgumentWriter({}))
        self._events: list[Event] = []

    def feed(self, text: str) -> list[Event]:
        """What this piece makes certain."""
        events: list[Event] = []
        # What is understood is cut off the text again and again: of a short text, so that it costs little.
        for start in range(0, len(text), PIECE_CHARACTERS):
            self._text += text[start : start + PIECE_CHARACTERS]
            events += self._run()
        return events

    def finish(self, *, complete: bool) -> list[Event]:
        """What is left once nothing more comes. `complete`: the model ended its turn; else it was cut off, and a call
        that is not whole keeps its arguments open, so that nobody takes them for all."""
        self._final, self._complete = True, complete
        return self._run()

    def _run(self) -> list[Event]:
        while self._skip_padding() and self._advance():
            pass
        events, self._events = self._events, []
        return events

    def _skip_padding(self) -> bool:
        """Whether there is anything to look at, once a padding that belongs to a mark is gone."""
        if self._skips_padding and self._text:
            self._text = self._text.removeprefix(self._form.padding)
            self._skips_padding = False
        return bool(self._text) or self._final

    def _advance(self) -> bool:
        """Understand some of the text; whether there may be more to understand."""
        match self._mode:
            case Mode.START:
                return self._start()
            case Mode.REASONING:
                return self._reason()
            case Mode.CONTENT:
                return self._converse()
            case Mode.CALL:
                return self._within_call()
            case Mode.VALUE:
                return self._within_value()
            case Mode.CLOSING:
                return self._close_call()

    # --- reasoning --------------------------------------------------------------------------------------

    def _start(self) -> bool:
        """The model may open its reasoning again although the prompt has done so."""
        found = at(self._text, 0, self._form.think_open, final=self._final)
        if found is Found.OPEN:
            return False
        if found is Found.YES:
            self._consume(len(self._form.think_open))
            self._skips_padding = True
        self._mode = Mode.REASONING
        return True

    def _reason(self) -> bool:
        mark, start = self._vocabulary.in_reasoning.search(self._text)
        if mark == self._form.think_close:
            self._say_reasoning(self._unpadded(start))
            self._consume(start + len(mark))
            self._skips_padding = True
            self._mode = Mode.CONTENT
            return True
        if mark:
            return self._call_in_reasoning(start, start + len(mark))
        if self._final:
            self._say_reasoning(len(self._text))
            self._text = ""
            return False
        end = self._unpadded(start)
        self._say_reasoning(end)
        self._consume(end)
        return False

    def _call_in_reasoning(self, start: int, behind: int) -> bool:
        """A call ends the reasoning, but only one that is one: models also write about calls."""
        head = self._head_at(behind)
        if head.found is Found.NO:
            self._say_reasoning(behind)
            self._consume(behind)
            return True
        end = self._unpadded(start)
        self._say_reasoning(end)
        if head.found is Found.OPEN:
            self._consume(end)
            return False
        self._awaits_think_close = True
        self._begin_call(head, in_block=True)
        return True

    def _say_reasoning(self, end: int) -> None:
        if end:
            self._events.append(ReasoningDelta(self._text[:end]))

    def _unpadded(self, end: int) -> int:
        """A position, before the padding that may belong to a mark there."""
        return end - len(self._form.padding) if self._text.endswith(self._form.padding, 0, end) else end

    # --- content ----------------------------------------------------------------------------------------

    def _converse(self) -> bool:
        mark, start = self._vocabulary.in_content.search(self._text)
        self._say_content(start if mark or not self._final else len(self._text))
        if not mark:
            if self._final:
                self._events += self._prose.finish()
            return False
        if mark == self._form.think_close:
            self._think_close_in_content()
            return True
        if mark == self._form.call_open:
            return self._call_in_content()
        return self._bare_function()

    def _think_close_in_content(self) -> None:
        """A second end of the reasoning, or the true one behind a call within it, says nothing."""
        size = len(self._form.think_close)
        if self._awaits_think_close or not self._prose.has_text:
            self._awaits_think_close = False
            self._skips_padding = True
            self._consume(size)
        else:
            self._say_content(size)

    def _call_in_content(self) -> bool:
        size = len(self._form.call_open)
        head = self._head_at(size)
        if head.found is Found.YES:
            self._begin_call(head, in_block=True)
        elif head.found is Found.NO:
            self._report(f"{self._form.call_open} without a function is kept as content")
            self._say_content(size)
        return head.found is not Found.OPEN

    def _bare_function(self) -> bool:
        """A function without a call around it is one if it is offered."""
        form = self._form
        head = name_at(self._text, 0, form.function_open, form.name_close, final=self._final)
        if head.found is Found.YES and head.name in self._functions:
            self._begin_call(head, in_block=False)
        elif head.found is not Found.OPEN:
            self._say_content(len(form.function_open))
        return head.found is not Found.OPEN

    def _say_content(self, end: int) -> None:
        if end:
            self._events += self._prose.say(self._text[:end])
            self._consume(end)

    # --- calls ------------------------------------------------------------------------------------------

    def _head_at(self, start: int) -> Name:
        """The function that a call at a position is of."""
        found, begin = behind_blanks(self._text, start, final=self._final)
        if found is not Found.YES:
            return Name(found)
        return name_at(self._text, begin, self._form.function_open, self._form.name_close, final=self._final)

    def _begin_call(self, head: Name, *, in_block: bool) -> None:
        function = self._functions.get(head.name)
        writer = ArgumentWriter({} if function is None else function.parameters)
        self._call = _Call(self._call.index + 1, head.name, in_block=in_block, writer=writer)
        self._prose.interrupt()
        self._events.append(CallBegin(self._call.index, head.name))
        self._consume(head.end)
        self._mode = Mode.CALL
        if function is None:
            self._report("the function is not among the tools")

    def _within_call(self) -> bool:
        """Between the parameters."""
        form = self._form
        mark, start = self._vocabulary.in_call.search(self._text)
        self._call.stray.append(self._text[: start if mark or not self._final else len(self._text)])
        self._consume(start)
        if mark == form.parameter_open:
            return self._begin_value()
        if mark == form.function_close:
            self._consume(len(mark))
            self._end_call(Mode.CLOSING)
        elif mark:
            self._report(f"{form.function_close} is missing")
            self._consume(len(mark) if mark == form.call_close else 0)
            self._end_call(Mode.CONTENT)
        elif self._final:
            self._text = ""
            self._break_off()
        return bool(mark) or self._final

    def _begin_value(self) -> bool:
        form = self._form
        head = name_at(self._text, 0, form.parameter_open, form.name_close, final=self._final)
        if head.found is Found.YES:
            self._flush_stray()
            self._consume(head.end)
            self._say_arguments(self._call.begin_value(head.name))
            self._skips_padding = True
            self._mode = Mode.VALUE
        elif head.found is Found.NO:
            self._call.stray.append(form.parameter_open)
            self._consume(len(form.parameter_open))
        return head.found is not Found.OPEN

    def _within_value(self) -> bool:
        mark, start = self._vocabulary.in_value.search(self._text)
        if not mark and self._final:
            self._break_off()
            return True
        end = self._unpadded(start)
        self._say_arguments(self._call.add(self._text[:end]))
        if mark:
            self._consume(start)
            self._end_value(mark)
        else:
            self._consume(end)
        return bool(mark)

    def _end_value(self, mark: str) -> None:
        closing = self._form.parameter_close
        if mark == closing:
            self._consume(len(mark))
        else:
            self._report(f"{closing} of {self._call.key!r} is missing")
        text, problem = self._call.end_value()
        self._say_arguments(text)
        if problem:
            self._report(f"{self._call.key!r}: {problem}")
        if self._call.repeats:
            self._report(f"{self._call.key!r} is given again, the first value holds", self._call.rest())
        self._mode = Mode.CALL

    def _end_call(self, mode: Mode) -> None:
        self._flush_stray()
        self._say_arguments(self._call.writer.close())
        self._events += [CallEnd(self._call.index), *self._call.problems]
        self._mode = mode

    def _close_call(self) -> bool:
        """Behind a function: the end of its call, or another function in the same call."""
        form = self._form
        found, start = behind_blanks(self._text, 0, final=self._final)
        if found is Found.YES:
            found = at(self._text, start, form.call_close, final=self._final)
        if found is Found.YES:
            self._consume(start + len(form.call_close))
            self._mode = Mode.CONTENT
            return True
        head = self._head_at(0) if self._call.in_block else Name(Found.NO)
        if head.found is Found.YES:
            self._begin_call(head, in_block=True)
            return True
        if Found.OPEN in (found, head.found):
            return False
        if self._call.in_block:
            self._report(f"{form.call_close} is missing")
        self._mode = Mode.CONTENT
        return True

    def _break_off(self) -> None:
        """The answer ends within a call."""
        if self._mode is Mode.VALUE:
            end = self._unpadded(len(self._text)) if self._complete else len(self._text)
            self._say_arguments(self._call.add(self._text[:end]))
            self._text = ""
            if self._complete:
                self._end_value("")
        if self._complete:
            self._report(f"the answer ends before {self._form.function_close}")
            self._end_call(Mode.CONTENT)
            return
        self._flush_stray()
        self._report("the answer is cut off, the arguments are not whole", self._call.rest())
        self._events += self._call.problems
        self._mode = Mode.CONTENT

    # --- small parts ------------------------------------------------------------------------------------

    def _flush_stray(self) -> None:
        stray, self._call.stray = "".join(self._call.stray), []
        if stray.strip():
            self._report("text between the parameters", stray.strip())

    def _say_arguments(self, text: str) -> None:
        if not text:
            return
        match self._events:
            case [*_, ArgumentsDelta(index, before)]:
                self._events[-1] = ArgumentsDelta(index, before + text)
            case _:
                self._events.append(ArgumentsDelta(self._call.index, text))

    def _report(self, sentence: str, text: str = "") -> None:
        where = f"tool call {self._call.index} ({self._call.name})" if self._mode in _IN_CALL else "tool calls"
        problems = self._call.problems if self._mode in (Mode.CALL, Mode.VALUE) else self._events
        problems.append(Problem(f"{where}: {sentence}", text))

    def _consume(self, count: int) -> None:
        self._text = self._text[count:]
