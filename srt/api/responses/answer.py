"""An answer as a response object, and as the stream of events that builds one."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any, Literal, assert_never

import msgspec

from srt.api.blocks import Block, Blocks, Closed, Grown, Kind, Move, Opened
from srt.api.http import error_fields
from srt.api.responses.prompt import new_id, sealed
from srt.api.tickets import Stream
from srt.errors import ErrorCode, ServingError

Status = Literal["in_progress", "completed", "incomplete"]


class Frame(msgspec.Struct, frozen=True):
    """What is constant in the answer to a call."""

    fields: dict[str, Any]
    """Fields of the response object that are known before the answer."""
    seals_reasoning: bool = False
    """The client wants reasoning as `encrypted_content` too."""

    def told(self, problems: list[str]) -> Frame:
        """The same with what is wrong with the answer among the warnings."""
        warnings = self.fields.get("warnings", []) + problems
        return msgspec.structs.replace(self, fields=self.fields | {"warnings": warnings})

    def response(self, status: str, output: list[dict[str, Any]], **others: Any) -> dict[str, Any]:
        """The response object."""
        return self.fields | {"status": status, "output": output} | others


def usage(stream: Stream) -> dict[str, Any]:
    """Tokens of a call."""
    prompt, completion = stream.prompt.tokens, stream.completion_tokens
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": stream.prompt.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": stream.reasoning_tokens},
        "total_tokens": prompt + completion,
    }


class Items:
    """Blocks as output items; each keeps the id that it was given first."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self._ids: dict[int, str] = {}

    def id(self, block: Block) -> str:
        """The item's id."""
        prefixes = {Kind.REASONING: "rs_", Kind.TEXT: "msg_", Kind.CALL: "fc_"}
        if block.index not in self._ids:
            self._ids[block.index] = new_id(prefixes[block.kind])
        return self._ids[block.index]

    def item(self, block: Block, *, begun: bool = False) -> dict[str, Any]:
        """The item; `begun`: as it is when nothing of it is there."""
        status: Status = "in_progress" if begun else "completed" if block.whole else "incomplete"
        content = [] if begun else [part(block)]
        match block.kind:
            case Kind.REASONING:
                item = {"id": self.id(block), "type": "reasoning", "summary": [], "content": content, "status": status}
                if self._frame.seals_reasoning and not begun:
                    item["encrypted_content"] = sealed(block.text)
                return item
            case Kind.TEXT:
                top = {"id": self.id(block), "type": "message", "role": "assistant"}
                return top | {"status": status, "content": content}
            case Kind.CALL:
                arguments = "" if begun else block.text
                top = {"id": self.id(block), "type": "function_call", "call_id": block.call_id, "name": block.name}
                return top | {"arguments": arguments, "status": status}


def part(block: Block, *, begun: bool = False) -> dict[str, Any]:
    """The one part of an item that is no call."""
    text = "" if begun else block.text
    if block.kind is Kind.REASONING:
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def ended_response(frame: Frame, stream: Stream, blocks: Blocks, items: Items) -> dict[str, Any]:
    """The response object of an ended answer. Raises: ServingError ABORTED, which is no way to end a response."""
    finish = stream.finish
    assert finish is not None
    output = [items.item(block) for block in blocks.all]
    counts = usage(stream)
    if blocks.problems:
        frame = frame.told(blocks.problems)
    match finish.kind:
        case "abort":
            raise ServingError(ErrorCode.ABORTED, stream.ticket.abort_text or finish.text or "the request was aborted")
        case "length":
            reason = {"reason": "max_output_tokens"}
            return frame.response("incomplete", output, usage=counts, incomplete_details=reason)
        case "stop":
            return frame.response("completed", output, usage=counts, completed_at=int(time.time()))


def whole_response(frame: Frame, stream: Stream, blocks: Blocks) -> dict[str, Any]:
    """The response object of an answer that is not streamed."""
    blocks.take()
    return ended_response(frame, stream, blocks, Items(frame))


class EventWriter:
    """An answer as events, numbered from 0. `keep` is called with the response once it has ended."""

    def __init__(self, frame: Frame, blocks: Blocks, keep: Callable[[dict[str, Any]], None]) -> None:
        self._frame = frame
        self._blocks = blocks
        self._items = Items(frame)
        self._keep = keep
        self._numbers = itertools.count()
        self._begun = False
        self._end = b""

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": f"response.{kind}", "sequence_number": next(self._numbers)} | fields
        return b"event: response.%b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode(data))

    def news(self, stream: Stream) -> bytes:
        """Events for what came since the last time."""
        events = b"" if self._begun else self._opening()
        self._begun = True
        events += b"".join(map(self._move, self._blocks.take()))
        if stream.finish is not None:
            response = ended_response(self._frame, stream, self._blocks, self._items)
            self._end = self._event(response["status"], response=response)
            self._keep(response)
        return events

    def _opening(self) -> bytes:
        response = self._frame.response("in_progress", [])
        return self._event("created", response=response) + self._event("in_progress", response=response)

    def _move(self, move: Move) -> bytes:
        block = move.block
        place: dict[str, Any] = {"item_id": self._items.id(block), "output_index": block.index}
        if block.kind is not Kind.CALL:
            place["content_index"] = 0
        match move:
            case Opened():
                item = self._items.item(block, begun=True)
                added = self._event("output_item.added", output_index=block.index, item=item)
                if block.kind is Kind.CALL:
                    return added
                return added + self._event("content_part.added", **place, part=part(block, begun=True))
            case Grown(_, text):
                return self._grown(block, text, place)
            case Closed():
                item = self._items.item(block)
                return self._done(block, place) + self._event("output_item.done", output_index=block.index, item=item)
            case _:
                assert_never(move)

    def _grown(self, block: Block, text: str, place: dict[str, Any]) -> bytes:
        match block.kind:
            case Kind.REASONING:
                return self._event("reasoning_text.delta", **place, delta=text)
            case Kind.TEXT:
                return self._event("output_text.delta", **place, delta=text, logprobs=[])
            case Kind.CALL:
                return self._event("function_call_arguments.delta", **place, delta=text)

    def _done(self, block: Block, place: dict[str, Any]) -> bytes:
        match block.kind:
            case Kind.REASONING:
                done = self._event("reasoning_text.done", **place, text=block.text)
            case Kind.TEXT:
                done = self._event("output_text.done", **place, text=block.text, logprobs=[])
            case Kind.CALL:
                fields = {"name": block.name, "arguments": block.text}
                return self._event("function_call_arguments.done", **place, **fields)
        return done + self._event("content_part.done", **place, part=part(block))

    def end(self) -> bytes:
        """The whole response."""
        return self._end

    def failure(self, error: ServingError) -> bytes:
        """The end of a stream that has begun, with an error."""
        told = error_fields(error)
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        shown = {"code": code, "message": told["message"]}
        output = [self._items.item(block) for block in self._blocks.all]
        return self._event("failed", response=self._frame.response("failed", output, error=shown))
