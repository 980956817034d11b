"""`/v1/responses`: create, ask again, delete; a stored response is where the next one goes on."""

from __future__ import annotations

import time
from typing import Any, Final

import msgspec

from srt.api.blocks import Blocks
from srt.api.bodies import Notice, Parser, invalid, shown
from srt.api.fields import Body
from srt.api.http import Exchange
from srt.api.responses.answer import EventWriter, Frame, whole_response
from srt.api.responses.bodies import InputTokensBody, ResponsesBody
from srt.api.responses.prompt import chat_document, input_items
from srt.api.responses.store import ResponseStore, Stored
from srt.api.schema import Request
from srt.api.service import Service
from srt.api.translated import ChatRequests, query
from srt.errors import ErrorCode, ServingError

PREFIX: Final = "resp_"
CHAT_NAMES: Final = {
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
}
SEALED_REASONING: Final = "reasoning.encrypted_content"
MAX_PAGE: Final = 100


class Turn(msgspec.Struct, frozen=True):
    """A call, understood."""

    request: Request
    frame: Frame
    items: tuple[bytes, ...]
    """The conversation up to the answer, as JSON."""
    stored: bool


class Responses:
    """The endpoints."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._chats = ChatRequests(service, CHAT_NAMES)
        self._store = ResponseStore(service.plan.server.response_store_bytes)
        self._parser = Parser(Body.RESPONSES, ResponsesBody)
        self._count_parser = Parser(Body.INPUT_TOKENS, InputTokensBody)

    async def create(self, exchange: Exchange) -> None:
        """`/v1/responses`: answer a conversation, with which a later call may go on."""
        turn = await self._parsed(exchange)
        with self._service.serve(exchange, turn.request, PREFIX) as ticket:
            frame = msgspec.structs.replace(turn.frame, fields={"id": PREFIX + ticket.name} | turn.frame.fields)
            blocks = Blocks(ticket.streams[0], "call_")
            if turn.request.stream:
                writer = EventWriter(frame, blocks, lambda response: self._keep(turn, response))
                exchange.dialect = exchange.dialect._replace(event=writer.failure)
                await exchange.stream(ticket, writer, done=b"")
                return
            await ticket.whole()
            response = whole_response(frame, ticket.streams[0], blocks)
            self._keep(turn, response)
            await exchange.respond(msgspec.json.encode(response))

    def _keep(self, turn: Turn, response: dict[str, Any]) -> None:
        if turn.stored:
            output = tuple(map(msgspec.json.encode, response["output"]))
            self._store.keep(response["id"], Stored(msgspec.json.encode(response), turn.items, output))

    async def input_tokens(self, exchange: Exchange) -> None:
        """`/v1/responses/input_tokens`: how long the prompt of such a call would be."""
        service = self._service
        body, notices = await service.read(exchange, self._count_parser)
        service.model_named(body.model)
        request = self._chats.request(chat_document(body, self._conversation(body)), notices)
        packed = await service.calls.tokenize(request.prompts[0], request.images[0] if request.images else ())
        answer: dict[str, Any] = {"object": "response.input_tokens", "input_tokens": len(packed) // 4}
        if request.notices:
            answer["warnings"] = [notice.text for notice in request.notices]
        await exchange.respond_json(answer)

    async def retrieve(self, exchange: Exchange) -> None:
        """`/v1/responses/{response_id}`: a response that is kept."""
        stored = self._stored(exchange)
        if query(exchange, "stream") == "true":
            raise ServingError(ErrorCode.UNSUPPORTED_FIELD, "'stream': events of a response are not kept", "stream")
        await exchange.respond(stored.body)

    async def delete(self, exchange: Exchange) -> None:
        """`/v1/responses/{response_id}`: forget a response."""
        self._stored(exchange)
        name = exchange.scope["path_params"]["response_id"]
        self._store.drop(name)
        await exchange.respond_json({"id": name, "object": "response", "deleted": True})

    async def cancel(self, exchange: Exchange) -> None:
        """`/v1/responses/{response_id}/cancel`: only background responses can be, and there are none."""
        self._stored(exchange)
        raise ServingError(
            ErrorCode.UNSUPPORTED_FIELD, "only background responses can be cancelled; see /abort_request"
        )

    async def list_input(self, exchange: Exchange) -> None:
        """`/v1/responses/{response_id}/input_items`: the conversation that led to a response."""
        items = [msgspec.json.decode(item) for item in self._stored(exchange).input]
        if query(exchange, "order") != "asc":
            items.reverse()
        after = query(exchange, "after")
        if after is not None:
            items = items[[item["id"] for item in items].index(after) + 1 :] if _has(items, after) else []
        limit = query(exchange, "limit") or "20"
        if limit not in map(str, range(1, MAX_PAGE + 1)):
            raise invalid(f"'limit' is {shown(limit)}, it must be between 1 and {MAX_PAGE}", "limit")
        page = items[: int(limit)]
        ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
        told = {"object": "list", "data": page, "has_more": len(page) < len(items)} | ends
        await exchange.respond(msgspec.json.encode(told))

    def _stored(self, exchange: Exchange) -> Stored:
        name = exchange.scope["path_params"]["response_id"]
        stored = self._store.get(name)
        if stored is None:
            raise ServingError(
                ErrorCode.NOT_FOUND, f"there is no response {shown(name)}, or it is no longer kept", "id"
            )
        return stored

    def _conversation(self, body: InputTokensBody) -> list[dict[str, Any]]:
        """All items of the conversation."""
        before: list[dict[str, Any]] = []
        if body.previous_response_id is not None:
            stored = self._store.get(body.previous_response_id)
            if stored is None:
                raise ServingError(
                    ErrorCode.PREVIOUS_NOT_FOUND,
                    f"previous response with id {shown(body.previous_response_id)} not found, or no longer kept",
                    "previous_response_id",
                )
            before = [msgspec.json.decode(item) for item in stored.input + stored.output]
        return before + input_items(body.input)

    async def _parsed(self, exchange: Exchange) -> Turn:
        """The call; its body, which may be large, is not kept."""
        body, notices = await self._service.read(exchange, self._parser)
        model = self._service.model_named(body.model)
        items = self._conversation(body)
        document = chat_document(body, items)
        for name, value in (
            ("stream", body.stream),
            ("temperature", body.temperature),
            ("top_p", body.top_p),
            ("max_completion_tokens", body.max_output_tokens),
        ):
            if value is not None:
                document[name] = value
        include = body.include or []
        notices += tuple(
            Notice("ignored_field", f"'include': {shown(name)} is not there to be included")
            for name in include
            if name != SEALED_REASONING
        )
        if body.reasoning is not None and body.reasoning.summary is not None:
            notices += (Notice("ignored_field", "'reasoning.summary': reasoning is shown as it is"),)
        request = self._chats.request(document, notices)
        request = msgspec.structs.replace(request, limit_field=CHAT_NAMES["max_completion_tokens"])
        stored = body.store is not False and self._service.plan.server.response_store_bytes > 0
        fields = _fields(body, model) | {"store": stored}
        if request.notices:
            fields["warnings"] = [notice.text for notice in request.notices]
        frame = Frame(fields, seals_reasoning=SEALED_REASONING in include)
        return Turn(request, frame, tuple(map(msgspec.json.encode, items)) if stored else (), stored)


def _has(items: list[dict[str, Any]], name: str) -> bool:
    return any(item["id"] == name for item in items)


def _fields(body: ResponsesBody, model: str) -> dict[str, Any]:
    """Fields of the response object that repeat what was asked for."""
    config = body.text and body.text.format
    form = {"type": "text"} if config is None else msgspec.to_builtins(config)
    reasoning = body.reasoning
    return {
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "model": model,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "previous_response_id": body.previous_response_id,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_logprobs": 0,
        "tools": [msgspec.to_builtins(tool) for tool in body.tools or []],
        "tool_choice": body.tool_choice or "auto",
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "reasoning": {"effort": reasoning and reasoning.effort, "summary": None},
        "text": {"format": {name: value for name, value in form.items() if value is not None}},
        "truncation": "disabled",
        "background": False,
        "service_tier": "default",
        "metadata": body.metadata or {},
        "user": None,
        "usage": None,
    }
