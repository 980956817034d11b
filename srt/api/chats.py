"""`POST /v1/chat/completions`, as OpenAI's clients expect it: reasoning, content and tool calls apart."""

from __future__ import annotations

from typing import Any, Final, assert_never

import orjson

from srt.api.answers import GrowingAnswer
from srt.api.bodies import ChatBody, Parser
from srt.api.fields import Body
from srt.api.http import Exchange
from srt.api.openai import (
    Answer,
    ChoiceLogprobs,
    ChunkWriter,
    Form,
    answer_call,
    finish_fields,
    prompt_ids,
    whole_body,
)
from srt.api.schema import Request
from srt.api.service import Service
from srt.api.tickets import Stream, Ticket
from srt.formats.answer import ChatAnswer
from srt.formats.events import ArgumentsDelta, CallBegin, CallEnd, ContentDelta, Event, Problem, ReasoningDelta

CONTENT: Final = b'{"content":%b,"reasoning_content":null}'
REASONING: Final = b'{"content":null,"reasoning_content":%b}'
NOTHING: Final = CONTENT % b'""'


def whole_chat(answer: Answer, ticket: Ticket) -> dict[str, Any]:
    """Body of a chat completion that is not streamed."""
    choices: list[dict[str, Any]] = []
    problems: list[str] = []
    for stream in ticket.streams:
        growing = GrowingAnswer(stream)
        _, ids = growing.take()
        choice: dict[str, Any] = {
            "index": stream.index,
            "message": message(growing.chat),
            "logprobs": ChoiceLogprobs(ticket.request, stream).rest(stream),
            **finish_fields(stream),
            "finish_reason": growing.finish_reason,
        }
        if ticket.request.return_ids:
            choice["token_ids"] = ids
        choices.append(choice)
        problems += told(growing.chat, stream)
    body = whole_body(answer.top("chat.completion"), choices, ticket)
    if ticket.request.return_ids:
        body["prompt_token_ids"] = prompt_ids(ticket.request, 0)
    if problems:
        body["warnings"] = body.get("warnings", []) + problems
    return body


def message(chat: ChatAnswer) -> dict[str, Any]:
    """The assistant's message of a whole answer."""
    said = chat.parsed
    calls = [
        {"id": call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call_id, call in zip(chat.call_ids, said.calls, strict=True)
    ]
    return {
        "role": "assistant",
        "content": None if calls and not said.content else said.content,
        "reasoning_content": said.reasoning or None,
        "tool_calls": calls or None,
    }


def told(chat: ChatAnswer, stream: Stream) -> list[str]:
    """What is wrong with an answer, for `warnings`."""
    return [f"choice {stream.index}: {problem.told()}" for problem in chat.parsed.problems]


class ChatWriter:
    """A chat as server-sent events."""

    def __init__(self, answer: Answer, ticket: Ticket) -> None:
        self._chunks = ChunkWriter("chat.completion.chunk", "delta", answer, ticket)
        self._answers = [GrowingAnswer(stream) for stream in ticket.streams]
        self._begun: set[int] = set()

    def news(self, stream: Stream) -> bytes:
        """Chunks for a stream: its opening once, what it says, its finish in a chunk of its own."""
        growing = self._answers[stream.index]
        events, ids = growing.take()
        scores = stream.take_logprobs()
        chunks = b"" if stream.index in self._begun else self._opening(stream)
        beside = [*scores.prompt, *scores.output]
        for event in events:
            delta = self._delta(growing.chat, event)
            if delta:
                # What belongs to tokens goes with the first that they say: which of them said what is not known.
                chunks += self._chunks.chunk(stream, delta, ids=ids, told=beside)
                ids, beside = [], []
        if beside or (ids and self._chunks.request.return_ids):
            chunks += self._chunks.chunk(stream, NOTHING, ids=ids, told=beside)
        return chunks if stream.finish is None else chunks + self._finish(growing, stream)

    def _opening(self, stream: Stream) -> bytes:
        self._begun.add(stream.index)
        delta = b'{"role":"assistant","content":"","reasoning_content":null}'
        return self._chunks.chunk(stream, delta, extra=self._chunks.extras(stream))

    def _finish(self, growing: GrowingAnswer, stream: Stream) -> bytes:
        fields = finish_fields(stream) | {"finish_reason": growing.finish_reason}
        problems = told(growing.chat, stream)
        extra = b"," + orjson.dumps({"warnings": problems})[1:-1] if problems else b""
        return self._chunks.chunk(stream, b'{"reasoning_content":null}', orjson.dumps(fields)[1:-1], extra=extra)

    @staticmethod
    def _delta(chat: ChatAnswer, event: Event) -> bytes:
        """What an event says in a chunk, if anything."""
        match event:
            case ContentDelta(text):
                return CONTENT % orjson.dumps(text)
            case ReasoningDelta(text):
                return REASONING % orjson.dumps(text)
            case CallBegin(index, name):
                function = {"name": name, "arguments": ""}
                call = {"index": index, "id": chat.call_ids[index], "type": "function", "function": function}
            case ArgumentsDelta(index, text):
                call = {"index": index, "function": {"arguments": text}}
            case CallEnd() | Problem():
                return b""
            case _:
                assert_never(event)
        return b'{"content":null,"reasoning_content":null,"tool_calls":[%b]}' % orjson.dumps(call)

    def end(self) -> bytes:
        """As of every writer."""
        return self._chunks.end()


CHAT: Final = Form("chatcmpl-", whole_chat, ChatWriter)


class ChatCompletions:
    """`/v1/chat/completions`: answer a conversation, with reasoning, content and tool calls apart."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._parser = Parser(Body.CHAT, ChatBody)

    async def __call__(self, exchange: Exchange) -> None:
        """Answer one call."""
        service = self._service
        request, model = await self._parsed(exchange)
        request = await service.with_ids(request)
        await answer_call(service, exchange, request, CHAT, model)

    async def _parsed(self, exchange: Exchange) -> tuple[Request, str]:
        """The request and the model's name; the body, which may be large, is not kept."""
        body, notices = await self._service.read(exchange, self._parser)
        model = self._service.model_named(body.model)
        return self._service.schema.chat(body, notices), model
