"""An answer as a message of the Messages API, and as its stream of events."""

from __future__ import annotations

from typing import Any, Final, assert_never

import msgspec
import orjson

from srt.api.blocks import Block, Blocks, Closed, Grown, Kind, Move, Opened
from srt.api.tickets import Stream
from srt.errors import ErrorCode, ServingError

SIGNATURE: Final = "unsigned"
"""Thinking is not encrypted here; clients want something that is not empty, and send it back."""

PARTIAL: Final = "partial_json"
"""Key under which the input of a call stands that was cut off, as text: it is not JSON yet."""


class Shape(msgspec.Struct, frozen=True):
    """What is constant in the answer to a call."""

    id: str
    model: str
    max_tokens: int
    shows_thinking: bool
    stop_sequences: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def message(self, content: list[dict[str, Any]], ending: dict[str, Any], usage: dict[str, Any]) -> dict[str, Any]:
        """The message object."""
        top = {"id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": content}
        message = top | ending | {"usage": usage}
        return message | {"warnings": list(self.warnings)} if self.warnings else message

    def told(self, problems: list[str]) -> Shape:
        """The same with what is wrong with the answer among the warnings."""
        return msgspec.structs.replace(self, warnings=self.warnings + tuple(problems)) if problems else self

    def shows(self, block: Block) -> bool:
        """Whether the client wants to see a block."""
        return self.shows_thinking or block.kind is not Kind.REASONING


def usage(stream: Stream) -> dict[str, Any]:
    """Tokens of a call; what was found in the cache is not counted as input once more."""
    return {
        "input_tokens": stream.prompt.tokens - stream.prompt.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": stream.prompt.cached_tokens,
        "output_tokens": stream.completion_tokens,
        "output_tokens_details": {"thinking_tokens": stream.reasoning_tokens},
    }


def ending(shape: Shape, stream: Stream, blocks: Blocks) -> dict[str, Any]:
    """`stop_reason` and `stop_sequence` of an ended answer. Raises: ServingError ABORTED, which has no stop reason."""
    finish = stream.finish
    assert finish is not None
    sequence = None
    match finish.kind:
        case "abort":
            raise ServingError(ErrorCode.ABORTED, stream.ticket.abort_text or finish.text or "the request was aborted")
        case "length":
            cut = stream.completion_tokens < shape.max_tokens
            reason = "model_context_window_exceeded" if cut else "max_tokens"
        case "stop" if finish.matched in shape.stop_sequences:
            reason, sequence = "stop_sequence", finish.matched
        case "stop":
            reason = "tool_use" if blocks.ends_in_calls else "end_turn"
    return {"stop_reason": reason, "stop_sequence": sequence}


def whole_message(shape: Shape, stream: Stream, blocks: Blocks) -> dict[str, Any]:
    """Body of an answer that is not streamed."""
    blocks.take()
    shape = shape.told(blocks.problems)
    content = [_content(block) for block in blocks.all if shape.shows(block)]
    return shape.message(content, ending(shape, stream, blocks), usage(stream))


def _content(block: Block) -> dict[str, Any]:
    match block.kind:
        case Kind.REASONING:
            return {"type": "thinking", "thinking": block.text, "signature": SIGNATURE}
        case Kind.TEXT:
            return {"type": "text", "text": block.text, "citations": None}
        case Kind.CALL:
            given = orjson.Fragment(block.text) if block.whole else {PARTIAL: block.text}
            return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": given}


def event(data: dict[str, Any]) -> bytes:
    """One event; its name is the type of its data."""
    return b"event: %b\ndata: %b\n\n" % (data["type"].encode(), orjson.dumps(data))


class EventWriter:
    """An answer as events."""

    def __init__(self, shape: Shape, blocks: Blocks) -> None:
        self._shape = shape
        self._blocks = blocks
        self._indices: dict[int, int] = {}
        """Index towards the client of each block that it sees."""
        self._begun = False
        self._end = b""

    def news(self, stream: Stream) -> bytes:
        """Events for what came since the last time."""
        events = b"" if self._begun else self._opening(stream)
        self._begun = True
        events += b"".join(self._event(move) for move in self._blocks.take() if self._shape.shows(move.block))
        if stream.finish is not None:
            delta = ending(self._shape, stream, self._blocks)
            told = {"warnings": self._blocks.problems} if self._blocks.problems else {}
            self._end = event({"type": "message_delta", "delta": delta, "usage": usage(stream)} | told)
        return events

    def _opening(self, stream: Stream) -> bytes:
        counts = usage(stream) | {"output_tokens": 0, "output_tokens_details": {"thinking_tokens": 0}}
        message = self._shape.message([], {"stop_reason": None, "stop_sequence": None}, counts)
        return event({"type": "message_start", "message": message}) + event({"type": "ping"})

    def _event(self, move: Move) -> bytes:
        index = self._indices.setdefault(move.block.index, len(self._indices))
        match move:
            case Opened(block):
                return event({"type": "content_block_start", "index": index, "content_block": _empty(block)})
            case Grown(block, text):
                return event({"type": "content_block_delta", "index": index, "delta": _delta(block, text)})
            case Closed(block):
                stop = event({"type": "content_block_stop", "index": index})
                if block.kind is not Kind.REASONING:
                    return stop
                signature = {"type": "signature_delta", "signature": SIGNATURE}
                return event({"type": "content_block_delta", "index": index, "delta": signature}) + stop
            case _:
                assert_never(move)

    def end(self) -> bytes:
        """Why it stopped, and that it has."""
        return self._end + event({"type": "message_stop"})


def _empty(block: Block) -> dict[str, Any]:
    match block.kind:
        case Kind.REASONING:
            return {"type": "thinking", "thinking": "", "signature": ""}
        case Kind.TEXT:
            return {"type": "text", "text": "", "citations": None}
        case Kind.CALL:
            return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": {}}


def _delta(block: Block, text: str) -> dict[str, Any]:
    match block.kind:
        case Kind.REASONING:
            return {"type": "thinking_delta", "thinking": text}
        case Kind.TEXT:
            return {"type": "text_delta", "text": text}
        case Kind.CALL:
            return {"type": "input_json_delta", "partial_json": text}
