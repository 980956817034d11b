"""`POST /v1/completions` and `POST /v1/chat/completions`, as OpenAI's clients expect them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

import msgspec
import orjson

from srt.api.bodies import ChatBody, CompletionBody, Notice, Parser
from srt.api.fields import Body
from srt.api.http import Exchange
from srt.api.logprobs import CompletionLogprobs, chat_logprobs
from srt.api.native import WEIGHT_VERSION
from srt.api.schema import Prompt, Request
from srt.api.service import Service
from srt.api.tickets import Stream, Ticket
from srt.messages import ChatPrompt, Logprobs, TextPrompt, TokenPrompt

COMPLETION_PREFIX: Final = "cmpl-"
CHAT_PREFIX: Final = "chatcmpl-"
CONTENT_OPEN: Final = b'{"content":'
CONTENT_CLOSE: Final = b',"reasoning_content":null}'
NO_FINISH: Final = b'"finish_reason":null,"matched_stop":null,"stop_reason":null'


def usage(streams: list[Stream]) -> dict[str, Any]:
    """Tokens of a call. A prompt counts once, however many answers it gets."""
    prompts = list({stream.prompt_index: stream.prompt for stream in reversed(streams)}.values())
    prompt = sum(counts.tokens for counts in prompts)
    completion = sum(stream.completion_tokens for stream in streams)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "reasoning_tokens": 0,
        "prompt_tokens_details": {
            "cached_tokens": sum(counts.cached_tokens for counts in prompts),
            "image_tokens": sum(counts.image_tokens for counts in prompts),
        },
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def finish_fields(stream: Stream) -> dict[str, Any]:
    """How a choice ended, under the names of both big servers."""
    assert stream.finish is not None
    matched = stream.finish.matched
    return {"finish_reason": stream.finish.kind, "matched_stop": matched, "stop_reason": matched}


class ChoiceLogprobs:
    """`logprobs` of one choice, piece by piece in the order of its text; null unless the client wants them."""

    def __init__(self, request: Request, stream: Stream) -> None:
        wanted = request.sampling[stream.prompt_index].logprobs is not None
        self._wanted_by_chat = wanted and request.kind == "chat"
        self._completion = CompletionLogprobs() if wanted and request.kind == "completion" else None

    def render(self, parts: list[Logprobs]) -> dict[str, Any] | None:
        """What has come since the last time; of the prompt first."""
        if self._completion is not None:
            return self._completion.render(parts)
        return chat_logprobs(parts) if self._wanted_by_chat else None

    def rest(self, stream: Stream) -> dict[str, Any] | None:
        """All that a stream has and that is not yet taken."""
        pending = stream.take_logprobs()
        return self.render([*pending.prompt, *pending.output])


def prompt_ids(request: Request, index: int) -> list[int]:
    """The ids of a prompt that is known as ids."""
    match request.prompts[index]:
        case TokenPrompt(token_ids=packed):
            return memoryview(packed).cast("i").tolist()
        case _:
            return []


class Answer(msgspec.Struct, frozen=True):
    """What is constant in the answer to a call."""

    id: str
    model: str
    created: int
    echoes: tuple[str, ...] = ()
    """Texts that the choices begin with."""

    def top(self, kind: str) -> dict[str, Any]:
        """The first fields of every object."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def whole_completion(answer: Answer, ticket: Ticket) -> dict[str, Any]:
    """Body of a completion that is not streamed."""
    choices: list[dict[str, Any]] = []
    for stream in ticket.streams:
        text, ids = stream.take()
        echo = answer.echoes[stream.prompt_index] if answer.echoes else ""
        choice: dict[str, Any] = {
            "text": echo + text,
            "index": stream.index,
            "logprobs": ChoiceLogprobs(ticket.request, stream).rest(stream),
            **finish_fields(stream),
        }
        if ticket.request.return_ids:
            choice |= {"token_ids": ids, "prompt_token_ids": prompt_ids(ticket.request, stream.prompt_index)}
        choices.append(choice)
    return _whole(answer.top("text_completion"), choices, ticket)


def whole_chat(answer: Answer, ticket: Ticket) -> dict[str, Any]:
    """Body of a chat completion that is not streamed."""
    choices: list[dict[str, Any]] = []
    for stream in ticket.streams:
        text, ids = stream.take()
        message = {"role": "assistant", "content": text, "reasoning_content": None, "tool_calls": None}
        choice: dict[str, Any] = {
            "index": stream.index,
            "message": message,
            "logprobs": ChoiceLogprobs(ticket.request, stream).rest(stream),
            **finish_fields(stream),
        }
        if ticket.request.return_ids:
            choice["token_ids"] = ids
        choices.append(choice)
    body = _whole(answer.top("chat.completion"), choices, ticket)
    if ticket.request.return_ids:
        body["prompt_token_ids"] = prompt_ids(ticket.request, 0)
    return body


def _whole(top: dict[str, Any], choices: list[dict[str, Any]], ticket: Ticket) -> dict[str, Any]:
    top |= {"choices": choices, "usage": usage(ticket.streams), "metadata": {"weight_version": WEIGHT_VERSION}}
    return top | _warnings(ticket.request.notices)


def _warnings(notices: tuple[Notice, ...]) -> dict[str, Any]:
    return {"warnings": [notice.text for notice in notices]} if notices else {}


class ChunkWriter:
    """Choices as server-sent events; everything but the new text is prepared once."""

    def __init__(self, kind: Literal["completion", "chat"], answer: Answer, ticket: Ticket) -> None:
        self._is_chat = kind == "chat"
        self._answer = answer
        self._ticket = ticket
        self._request = ticket.request
        self._object = "chat.completion.chunk" if self._is_chat else "text_completion"
        head = orjson.dumps(answer.top(self._object))[:-1]
        member = b"delta" if self._is_chat else b"text"
        self._heads = [
            b'data: %b,"choices":[{"index":%d,"%b":' % (head, stream.index, member) for stream in ticket.streams
        ]
        self._begun: set[int] = set()
        self._logprobs = [ChoiceLogprobs(self._request, stream) for stream in ticket.streams]

    def news(self, stream: Stream) -> bytes:
        """Chunks for a stream: its opening once, its new text, its finish."""
        text, ids = stream.take()
        scores = stream.take_logprobs()
        events = b""
        if stream.index not in self._begun:
            self._begun.add(stream.index)
            events = self._opening(stream, scores.prompt)
        told = [*scores.prompt, *scores.output]
        finish = NO_FINISH if stream.finish is None else orjson.dumps(finish_fields(stream))[1:-1]
        # A chat's finish comes in a chunk of its own, behind the last text; a completion's with its last text.
        ends = stream.finish is not None and not self._is_chat
        if text or told or (ids and self._request.return_ids) or ends:
            events += self._chunk(stream, self._content(text), NO_FINISH if self._is_chat else finish, ids, told)
        if stream.finish is not None and self._is_chat:
            events += self._chunk(stream, b'{"reasoning_content":null}', finish, [])
        return events

    def _content(self, text: str) -> bytes:
        quoted = orjson.dumps(text)
        return CONTENT_OPEN + quoted + CONTENT_CLOSE if self._is_chat else quoted

    def _chunk(
        self,
        stream: Stream,
        content: bytes,
        finish: bytes,
        ids: list[int],
        told: Sequence[Logprobs] = (),
        extra: bytes = b"",
    ) -> bytes:
        tail = b"}]"
        if self._request.return_ids:
            tail = b',"token_ids":%b}]' % orjson.dumps(ids)
        if self._request.continuous_usage:
            tail += b',"usage":' + orjson.dumps(usage([stream]))
        logprobs = orjson.dumps(self._logprobs[stream.index].render(list(told))) if told else b"null"
        parts = (self._heads[stream.index], content, logprobs, finish, tail, extra)
        return b'%b%b,"logprobs":%b,%b%b%b}\n\n' % parts

    def _opening(self, stream: Stream, prompt: list[Logprobs]) -> bytes:
        """What comes before the first text: the role of a chat, the echo of a completion, warnings, prompt ids.

        An echo takes along what is known of the prompt's log probabilities.
        """
        extras = _warnings(self._request.notices) if stream.index == 0 else {}
        if self._request.return_ids:
            extras["prompt_token_ids"] = prompt_ids(self._request, stream.prompt_index)
        extra = b"," + orjson.dumps(extras)[1:-1] if extras else b""
        if self._is_chat:
            delta = b'{"role":"assistant","content":"","reasoning_content":null}'
            return self._chunk(stream, delta, NO_FINISH, [], extra=extra)
        echo = self._answer.echoes[stream.prompt_index] if self._answer.echoes else ""
        if not (echo or extra):
            return b""
        told = prompt.copy()
        prompt.clear()
        return self._chunk(stream, orjson.dumps(echo), NO_FINISH, [], told, extra)

    def end(self) -> bytes:
        """The usage of the whole call, if the client wants it."""
        if not self._request.include_usage:
            return b""
        chunk = self._answer.top(self._object) | {"choices": [], "usage": usage(self._ticket.streams)}
        return b"data: " + orjson.dumps(chunk) + b"\n\n"


class Completions:
    """The endpoint of /v1/completions."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._parser = Parser(Body.COMPLETION, CompletionBody)

    async def __call__(self, exchange: Exchange) -> None:
        """Answer one call."""
        service = self._service
        request, model = await self._parsed(exchange)
        echoes = tuple([await self._echo(prompt) for prompt in request.prompts]) if request.echo else ()
        request = await service.with_ids(request)
        await answer_call(service, exchange, request, COMPLETION_PREFIX, model, echoes, whole_completion)

    async def _parsed(self, exchange: Exchange) -> tuple[Request, str]:
        """The request and the model's name; the body, which may be large, is not kept."""
        body, notices = await self._service.read(exchange, self._parser)
        model = self._service.model_named(body.model)
        return self._service.schema.completion(body, notices), model

    async def _echo(self, prompt: Prompt) -> str:
        match prompt:
            case TextPrompt(text=text):
                return text
            case TokenPrompt(token_ids=packed):
                return await self._service.calls.detokenize(packed, skip_special_tokens=False)
            case ChatPrompt():
                raise AssertionError("a completion has no chat prompt")


class ChatCompletions:
    """The endpoint of /v1/chat/completions."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._parser = Parser(Body.CHAT, ChatBody)

    async def __call__(self, exchange: Exchange) -> None:
        """Answer one call."""
        service = self._service
        request, model = await self._parsed(exchange)
        request = await service.with_ids(request)
        await answer_call(service, exchange, request, CHAT_PREFIX, model, (), whole_chat)

    async def _parsed(self, exchange: Exchange) -> tuple[Request, str]:
        """The request and the model's name; the body, which may be large, is not kept."""
        body, notices = await self._service.read(exchange, self._parser)
        model = self._service.model_named(body.model)
        return self._service.schema.chat(body, notices), model


async def answer_call(
    service: Service,
    exchange: Exchange,
    request: Request,
    prefix: str,
    model: str,
    echoes: tuple[str, ...],
    whole: Callable[[Answer, Ticket], dict[str, Any]],
) -> None:
    """Run a call and send its answer, streamed or whole."""
    with service.serve(exchange, request, prefix) as ticket:
        answer = Answer(prefix + ticket.name, model, int(time.time()), echoes)
        if request.stream:
            kind: Literal["completion", "chat"] = "chat" if request.kind == "chat" else "completion"
            await exchange.stream(ticket, ChunkWriter(kind, answer, ticket))
            return
        await ticket.whole()
        await exchange.respond_json(whole(answer, ticket))
