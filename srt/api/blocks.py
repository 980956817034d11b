"""An answer as the row of blocks that the Responses and the Messages API see in it: reasoning, text, calls."""

from __future__ import annotations

from enum import Enum, auto
from typing import NamedTuple, assert_never

from srt.api.answers import ended_itself, open_answer
from srt.api.tickets import Stream
from srt.formats.events import (
    ArgumentsDelta,
    CallBegin,
    CallEnd,
    ContentDelta,
    Event,
    Problem,
    ReasoningDelta,
)


class Kind(Enum):
    """What a block holds."""

    REASONING = auto()
    TEXT = auto()
    CALL = auto()


class Block:
    """One block. `whole`: nothing of it is missing; a call that was cut off is not."""

    __slots__ = ("_parts", "call_id", "index", "kind", "name", "whole")

    def __init__(self, kind: Kind, index: int, name: str = "", call_id: str = "") -> None:
        self.kind = kind
        self.index = index
        self.name = name
        self.call_id = call_id
        self.whole = False
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """What it says so far; of a call, its arguments as JSON."""
        return "".join(self._parts)

    def grow(self, text: str) -> None:
        """More of it."""
        self._parts.append(text)


class Opened(NamedTuple):
    """A block begins; the one before it has been closed."""

    block: Block


class Grown(NamedTuple):
    """A block says more."""

    block: Block
    text: str


class Closed(NamedTuple):
    """A block is over."""

    block: Block


Move = Opened | Grown | Closed


class Blocks:
    """The blocks of the answer on one stream while it grows; `call_prefix` begins the ids of its calls."""

    def __init__(self, stream: Stream, call_prefix: str) -> None:
        self._stream = stream
        self._answer = open_answer(stream, call_prefix)
        self._open: Block | None = None
        self.all: list[Block] = []

    def take(self) -> list[Move]:
        """What came since the last time does to the blocks; with the finish of the stream the last one is closed."""
        text, _ = self._stream.take()
        finish = self._stream.finish
        events = self._answer.feed(text)
        if finish is not None:
            events += self._answer.finish(complete=ended_itself(finish))
        moves: list[Move] = []
        for event in events:
            self._take(event, moves)
        if finish is not None and self._open is not None:
            self._close(moves, whole=self._open.kind is not Kind.CALL and finish.kind == "stop")
        return moves

    @property
    def problems(self) -> list[str]:
        """What is wrong with the answer, for `warnings`."""
        return [problem.told() for problem in self._answer.parsed.problems]

    @property
    def ends_in_calls(self) -> bool:
        """Whether the answer has calls and all of them are whole."""
        return self._answer.ends_in_calls

    def _take(self, event: Event, moves: list[Move]) -> None:
        match event:
            case ReasoningDelta(text):
                self._say(Kind.REASONING, text, moves)
            case ContentDelta(text):
                self._say(Kind.TEXT, text, moves)
            case Problem(_, text):
                if text:  # it was written, and is in nothing else
                    self._say(Kind.TEXT, text, moves)
            case CallBegin(index, name):
                self._open_block(Block(Kind.CALL, len(self.all), name, self._answer.call_ids[index]), moves)
            case ArgumentsDelta(_, text):
                assert self._open is not None
                self._open.grow(text)
                moves.append(Grown(self._open, text))
            case CallEnd():
                self._close(moves, whole=True)
            case _:
                assert_never(event)

    def _say(self, kind: Kind, text: str, moves: list[Move]) -> None:
        block = self._open
        if block is None or block.kind is not kind:
            block = self._open_block(Block(kind, len(self.all)), moves)
        block.grow(text)
        moves.append(Grown(block, text))

    def _open_block(self, block: Block, moves: list[Move]) -> Block:
        if self._open is not None:
            self._close(moves, whole=True)
        self._open = block
        self.all.append(block)
        moves.append(Opened(block))
        return block

    def _close(self, moves: list[Move], *, whole: bool) -> None:
        assert self._open is not None
        self._open.whole = whole
        moves.append(Closed(self._open))
        self._open = None
