"""Answers to chats, taken apart while they come: what every API that shows chats begins with."""

from __future__ import annotations

import uuid

from srt.api.tickets import Stream
from srt.formats.answer import ChatAnswer
from srt.formats.events import Event
from srt.messages import Finish

CALL_ID_CHARACTERS = 24


def ended_itself(finish: Finish) -> bool:
    """Whether the model ended its answer; a stop text of the client's, a limit or an abort cuts it off."""
    match finish:
        case Finish(kind="stop", matched=str()):
            return False
        case _:
            return finish.kind == "stop"


class GrowingAnswer:
    """The answer on one stream. `call_prefix` begins the ids of its calls."""

    def __init__(self, stream: Stream, call_prefix: str = "call_") -> None:
        self._stream = stream
        self._call_prefix = call_prefix
        self._answer: ChatAnswer | None = None

    def take(self) -> tuple[list[Event], list[int]]:
        """Events and token ids since the last time; with the finish of the stream come the last of them."""
        text, ids = self._stream.take()
        events = self.chat.feed(text) if text else []
        if self._stream.finish is not None:
            events += self.chat.finish(complete=ended_itself(self._stream.finish))
        return events, ids

    @property
    def chat(self) -> ChatAnswer:
        """The answer so far. It can be read once something of it has come."""
        if self._answer is None:
            reading = self._stream.ticket.request.reading
            self._answer = ChatAnswer(reading, thinking=self._stream.thinking, new_id=self._new_id)
        return self._answer

    def _new_id(self) -> str:
        return self._call_prefix + uuid.uuid4().hex[:CALL_ID_CHARACTERS]

    @property
    def finish_reason(self) -> str:
        """Why the answer ended: as its stream did, or to call tools."""
        finish = self._stream.finish
        assert finish is not None
        return "tool_calls" if finish.kind == "stop" and self.chat.ends_in_calls else finish.kind
