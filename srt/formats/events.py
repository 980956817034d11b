"""What a reader finds in an answer, in the order in which it was written."""

from __future__ import annotations

import msgspec


class ReasoningDelta(msgspec.Struct, frozen=True):
    """More of the reasoning."""

    text: str


class ContentDelta(msgspec.Struct, frozen=True):
    """More of what the answer says."""

    text: str


class CallBegin(msgspec.Struct, frozen=True):
    """A call of the function `name`; calls are counted from 0. Until its end all deltas are its arguments."""

    index: int
    name: str


class ArgumentsDelta(msgspec.Struct, frozen=True):
    """More of a call's arguments, which are JSON text."""

    index: int
    text: str


class CallEnd(msgspec.Struct, frozen=True):
    """The call is whole, its arguments are a JSON object. A call that is cut off has no end."""

    index: int


class Problem(msgspec.Struct, frozen=True):
    """Something is not as the format wants it. `text` was written and is in no delta; it may be empty.

    It never stands within a call, but may follow one that is cut off.
    """

    sentence: str
    text: str = ""

    def told(self) -> str:
        """As it is shown to a client."""
        return f"{self.sentence}: {self.text!r}" if self.text else self.sentence


Event = ReasoningDelta | ContentDelta | CallBegin | ArgumentsDelta | CallEnd | Problem
