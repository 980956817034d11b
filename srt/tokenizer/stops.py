"""What ends an answer by its text: stop strings, and regular expressions that cannot run away.

Expressions are RE2's: matching takes time in proportion to the text, whatever a client writes, because there is no
backtracking; what needs it (look-around, back-references) is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import re2

from srt.errors import ErrorCode, ServingError
from srt.messages import StopSpec
from srt.tokenizer.detokenize import StopMatcher

WINDOW_CHARACTERS: Final = 4096
"""How far back a match of a regular expression may begin: each token costs a search of at most so much text."""

REGEX_MEMORY_BYTES: Final = 1 << 20
"""Most memory that one compiled expression may take."""


class StopRegexes:
    """Looks for expressions in a text that arrives token by token."""

    __slots__ = ("_before", "_patterns", "_tail")

    def __init__(self, patterns: Sequence[str]) -> None:
        """Raises: ServingError if one is no regular expression, too large, or matches the empty text."""
        self._patterns = [(pattern, _compiled(pattern)) for pattern in patterns]
        self._tail = ""
        self._before = 0

    def feed(self, text: str) -> str | None:
        """The first of the expressions that matches now, if any does.

        Of what lies before the window one character is kept, so that `^` matches at the beginning of the text alone.
        """
        self._tail += text
        beyond = len(self._tail) - WINDOW_CHARACTERS - 1
        if beyond > 0:
            self._tail, self._before = self._tail[beyond:], 1
        for pattern, compiled in self._patterns:
            if compiled.search(self._tail, self._before) is not None:
                return pattern
        return None


def _compiled(pattern: str) -> re2._Regexp:
    options = re2.Options()
    options.max_mem, options.log_errors = REGEX_MEMORY_BYTES, False
    try:
        compiled = re2.compile(pattern, options)
    except re2.error as error:
        [reason] = error.args
        text = reason.decode("utf-8", "replace")
        raise _refused(f"'stop_regex' {pattern!r} is not supported: {text} (RE2 syntax)") from error
    if compiled.search("") is not None:
        raise _refused(f"'stop_regex' {pattern!r} matches the empty text")
    return compiled


def _refused(text: str) -> ServingError:
    return ServingError(ErrorCode.INVALID_REQUEST, text, "stop_regex")


class Stops:
    """Stop strings and expressions of one request. What an expression matches stays in the text."""

    __slots__ = ("_regexes", "_texts", "matched")

    def __init__(self, stop: StopSpec) -> None:
        """Raises: as `StopRegexes`."""
        self._texts = StopMatcher(stop.texts, keep=stop.keep_text) if stop.texts else None
        self._regexes = StopRegexes(stop.regexes) if stop.regexes else None
        self.matched: str | None = None
        """The stop string or the expression that was found; nothing may be fed after it."""

    def feed(self, text: str) -> str:
        """Text of the next token; returns what may be shown now."""
        shown = text
        if self._texts is not None:
            shown, self.matched = self._texts.feed(text), self._texts.matched
        if self.matched is None and self._regexes is not None:
            self.matched = self._regexes.feed(text)
            if self.matched is not None:
                shown += self.flush()
        return shown

    def flush(self) -> str:
        """What was held back, once nothing more can come."""
        return "" if self._texts is None else self._texts.flush()


def stops_of(stop: StopSpec) -> Stops | None:
    """None if no text ends the request. Raises: as `StopRegexes`."""
    return Stops(stop) if stop.texts or stop.regexes else None
