"""`POST /v1/messages` and `POST /v1/messages/count_tokens`, as Anthropic's clients expect them."""

from __future__ import annotations

from typing import Any, Final

import msgspec
import orjson

from srt.api.anthropic.answer import EventWriter, Shape, event, whole_message
from srt.api.anthropic.bodies import MessagesBody, PromptBody
from srt.api.anthropic.prompt import chat_document
from srt.api.blocks import Blocks
from srt.api.bodies import Notice, Parser, invalid
from srt.api.fields import Body
from srt.api.http import TYPES, Dialect, Exchange
from srt.api.schema import Request
from srt.api.service import Service
from srt.api.translated import ChatRequests
from srt.errors import ServingError

PREFIX: Final = "msg_"
CHAT_NAMES: Final = {
    "stop": "stop_sequences",
    "reasoning_effort": "output_config.effort",
    "response_format": "output_config.format",
    "thinking_budget": "thinking.budget_tokens",
}
MAX_TOKENS: Final = (1 << 31) - 1
OTHER_TYPES: Final = {408: "timeout_error", 499: "api_error"}
"""Types of errors that this API calls otherwise than OpenAI's."""


def _fields(error: ServingError) -> dict[str, Any]:
    kind = OTHER_TYPES.get(error.status, TYPES[error.status])
    return {"type": "error", "error": {"type": kind, "message": error.text}}


def error_body(error: ServingError) -> bytes:
    """Body of a response with an error."""
    return orjson.dumps(_fields(error))


def error_event(error: ServingError) -> bytes:
    """The end of a stream that has begun."""
    return event(_fields(error))


ANTHROPIC: Final = Dialect(error_body, error_event, b"request-id")


class Messages:
    """The endpoints."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._chats = ChatRequests(service, CHAT_NAMES)
        self._parser = Parser(Body.MESSAGES, MessagesBody)
        self._count_parser = Parser(Body.COUNT_TOKENS, PromptBody)

    async def create(self, exchange: Exchange) -> None:
        """`/v1/messages`: answer a conversation, as Anthropic's clients ask for it."""
        service = self._service
        request, shape = await self._parsed(exchange)
        with service.serve(exchange, request, PREFIX) as ticket:
            shape = msgspec.structs.replace(shape, id=PREFIX + ticket.name)
            blocks = Blocks(ticket.streams[0], "toolu_")
            if request.stream:
                await exchange.stream(ticket, EventWriter(shape, blocks), done=b"")
                return
            await ticket.whole()
            await exchange.respond_json(whole_message(shape, ticket.streams[0], blocks))

    async def count_tokens(self, exchange: Exchange) -> None:
        """`/v1/messages/count_tokens`: how long the prompt of such a call would be."""
        service = self._service
        body, notices = await service.read(exchange, self._count_parser)
        service.model_named(body.model)
        request = self._chats.request(chat_document(body), notices)
        packed = await service.calls.tokenize(request.prompts[0], request.images[0] if request.images else ())
        answer: dict[str, Any] = {"input_tokens": len(packed) // 4}
        if request.notices:
            answer["warnings"] = [notice.text for notice in request.notices]
        await exchange.respond_json(answer)

    async def _parsed(self, exchange: Exchange) -> tuple[Request, Shape]:
        """The request and the form of its answer; the body, which may be large, is not kept."""
        body, notices = await self._service.read(exchange, self._parser)
        model = self._service.model_named(body.model)
        request = self._request(body, notices)
        thinking = body.thinking
        shape = Shape(
            id="",
            model=model,
            max_tokens=body.max_tokens,
            shows_thinking=thinking is not None and thinking.type != "disabled" and thinking.display != "omitted",
            stop_sequences=tuple(body.stop_sequences or ()),
            warnings=tuple(notice.text for notice in request.notices),
        )
        return request, shape

    def _request(self, body: MessagesBody, notices: tuple[Notice, ...]) -> Request:
        if not 0 <= body.max_tokens <= MAX_TOKENS:
            raise invalid(f"'max_tokens' is {body.max_tokens}, it must be between 0 and {MAX_TOKENS}", "max_tokens")
        document = chat_document(body)
        for name, value in (
            ("stop", body.stop_sequences or None),
            ("stream", body.stream),
            ("temperature", body.temperature),
            ("top_p", body.top_p),
            ("top_k", body.top_k),
        ):
            if value is not None:
                document[name] = value
        budget = None if body.thinking is None else body.thinking.budget_tokens
        if budget is not None and self._service.formats.reasoning is not None:
            document["thinking_budget"] = budget
        elif budget is not None:
            told = "'thinking.budget_tokens' has no effect: the server knows no format of reasoning for this model"
            notices += (Notice("ignored_field", told),)
        request = self._chats.request(document, notices)
        # A limit beyond the context is cut to it, as clients of this API expect: they send the same one to every model.
        params = msgspec.structs.replace(
            request.sampling[0],
            max_new_tokens=None if body.max_tokens else 0,
            usual_new_tokens=body.max_tokens,
        )
        return msgspec.structs.replace(request, sampling=(params,))
