"""Looking for marks in a text of which more may come: what is there, what is not, and what cannot be told yet."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import Enum, auto
from typing import Final, NamedTuple

MAX_NAME_CHARACTERS: Final = 256
"""Longest name of a function or a parameter."""

MAX_BLANKS: Final = 64
"""Most white space between two marks of a call."""

NEVER: Final = r"(?!)"
"""A regular expression that matches nothing."""


class Found(Enum):
    """Whether a mark is there."""

    YES = auto()
    NO = auto()
    OPEN = auto()
    """The text ends before it can be told."""


def _any_of(texts: Iterable[str]) -> str:
    """A regular expression for any of some texts."""
    return "|".join(map(re.escape, texts)) or NEVER


class Name(NamedTuple):
    """A name behind an opening mark, and the position behind it."""

    found: Found
    name: str = ""
    end: int = 0


class Marks:
    """A set of marks that may stand anywhere in a text."""

    def __init__(self, *marks: str) -> None:
        beginnings = {mark[:size] for mark in marks for size in range(1, len(mark))}
        self._search = re.compile(_any_of(marks)).search
        self._search_beginning = re.compile(rf"(?:{_any_of(sorted(beginnings))})\Z").search
        self._longest = max(map(len, marks), default=1)

    def search(self, text: str) -> tuple[str, int]:
        """The first mark and where it begins; without one, an empty text and where a mark may begin that is not
        whole yet, which is at most a mark's length before the end."""
        match = self._search(text)
        if match is not None:
            return match[0], match.start()
        match = self._search_beginning(text, max(0, len(text) - self._longest + 1))
        return "", len(text) if match is None else match.start()


def at(text: str, start: int, mark: str, *, final: bool) -> Found:
    """Whether a mark stands at a position."""
    if text.startswith(mark, start):
        return Found.YES
    return Found.OPEN if not final and mark.startswith(text[start:]) else Found.NO


def behind_blanks(text: str, start: int, *, final: bool) -> tuple[Found, int]:
    """Where the white space ends that begins at a position; NO if there is too much of it."""
    end = start
    while end < len(text) and text[end].isspace():
        end += 1
        if end - start > MAX_BLANKS:
            return Found.NO, end
    return (Found.OPEN if end == len(text) and not final else Found.YES), end


def name_at(text: str, start: int, opening: str, closing: str, *, final: bool) -> Name:
    """The name in `opening NAME closing` at a position; a name has no line break, no `<` and no `closing` in it."""
    found = at(text, start, opening, final=final)
    if found is not Found.YES:
        return Name(found)
    begin = start + len(opening)
    limit = begin + MAX_NAME_CHARACTERS
    end = text.find(closing, begin, limit + len(closing))
    name = text[begin : limit + 1] if end < 0 else text[begin:end]
    if len(name) > MAX_NAME_CHARACTERS or "\n" in name or "<" in name:
        return Name(Found.NO)
    if end < 0:
        return Name(Found.NO if final else Found.OPEN)
    return Name(Found.YES, name.strip(), end + len(closing)) if name.strip() else Name(Found.NO)
