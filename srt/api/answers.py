"""Answers to chats, taken apart while they come: what every API that shows chats begins with."""

from __future__ import annotations

import uuid
from typing import Final

from srt.api.tickets import Stream
from srt.formats.answer import ChatAnswer
from srt.formats.events import Event
from srt.messages import Finish

CALL_ID_CHARACTERS: Final = 24


def ended_itself(finish: Finish) -> bool:
    """Whether the model ended its answer; a stop text of the client's, a limit or an abort cuts it off."""
    match finish:
        case Finish(kind="stop", matched=str()):
            return False
        case _:
            return finish.kind == "stop"


def open_answer(stream: Stream, call_prefix: str) -> ChatAnswer:
    """What takes the answer on a stream apart; ids of calls begin with `call_prefix`."""

    def new_id() -> str:
        return call_prefix + uuid.uuid4().hex[:CALL_ID_CHARACTERS]

    return ChatAnswer(stream.ticket.request.reading, thinking=lambda: stream.thinking, new_id=new_id)


class GrowingAnswer:
    """The answer on one stream, with what belongs to its tokens."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.chat = open_answer(stream, "call_")
        """The answer so far."""

    def take(self) -> tuple[list[Event], list[int]]:
        """Events and token ids since the last time; with the finish of the stream come the last of them."""
        text, ids = self._stream.take()
        events = self.chat.feed(text)
        if self._stream.finish is not None:
            events += self.chat.finish(complete=ended_itself(self._stream.finish))
        return events, ids

    @property
    def finish_reason(self) -> str:
        """Why the answer ended: as its stream did, or to call tools."""
        finish = self._stream.finish
        assert finish is not None
        return "tool_calls" if finish.kind == "stop" and self.chat.ends_in_calls else finish.kind
