"""What is said about images and grammars while they are being made.

`srt/messages.py` says who sends what to whom; its names are the ones to import.
"""

from __future__ import annotations

from srt.errors import ErrorCode
from srt.payloads import Message


class ImageMade(Message, frozen=True):
    """An image is decoded and cut; its pixels wait in the file that `key` names."""

    job: int
    key: bytes
    columns: int
    rows: int


class ImageRefused(Message, frozen=True):
    """An image cannot be served, and why."""

    job: int
    code: ErrorCode
    text: str


class GrammarStored(Message, frozen=True):
    """A constraint is compiled; what came out waits in the file that `key` names."""

    key: bytes
    data_bytes: int
    seconds: float


class GrammarRefused(Message, frozen=True):
    """A constraint cannot be obeyed, and why."""

    key: bytes
    text: str


class PrepareGrammar(Message, frozen=True):
    """Load the compiled grammar of this key beside your steps, and say so."""

    key: bytes


class GrammarLoaded(Message, frozen=True):
    """A worker has loaded a grammar, or says why it cannot."""

    key: bytes
    rank: int
    fault: str = ""
