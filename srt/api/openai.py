"""`POST /v1/completions`, and what answers of all of OpenAI's older calls have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import msgspec
import orjson

from srt.api.bodies import CompletionBody, Notice, Parser
from srt.api.fields import Body
from srt.api.http import Exchange
from srt.api.logprobs import CompletionLogprobs, chat_logprobs
from srt.api.native import WEIGHT_VERSION
from srt.api.schema import Prompt, Request
from srt.api.service import Service
from srt.api.tickets import Stream, Ticket
from srt.messages import ChatPrompt, Logprobs, TextPrompt, TokenPrompt

NO_FINISH: Final = b'"finish_reason":null,"matched_stop":null,"stop_reason":null'


def usage(streams: list[Stream]) -> dict[str, Any]:
    """Tokens of a call. A prompt counts once, however many answers it gets."""
    prompts = list({stream.prompt_index: stream.prompt for stream in reversed(streams)}.values())
    prompt = sum(counts.tokens for counts in prompts)
    completion = sum(stream.completion_tokens for stream in streams)
    reasoning = sum(stream.reasoning_tokens for stream in streams)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "reasoning_tokens": reasoning,
        "prompt_tokens_details": {
            "cached_tokens": sum(counts.cached_tokens for counts in prompts),
            "image_tokens": sum(counts.image_tokens for counts in prompts),
        },
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    } | _steps(streams)


def _steps(streams: list[Stream]) -> dict[str, int]:
    """Steps with and without guesses to check, and the guesses that were right, of a call that had any."""
    counts = [stream.speculation for stream in streams if stream.speculation is not None]
    if not counts:
        return {}
    return {
        "spec_verify_ct": sum(count.steps for count in counts),
        "spec_plain_ct": sum(count.plain for count in counts),
        "spec_accept_token_num": sum(count.accepted for count in counts),
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
    return whole_body(answer.top("text_completion"), choices, ticket)


def whole_body(top: dict[str, Any], choices: list[dict[str, Any]], ticket: Ticket) -> dict[str, Any]:
    top |= {"choices": choices, "usage": usage(ticket.streams), "metadata": {"weight_version": WEIGHT_VERSION}}
    return top | warnings_of(ticket.request.notices)


def warnings_of(notices: tuple[Notice, ...]) -> dict[str, Any]:
    return {"warnings": [notice.text for notice in notices]} if notices else {}


class ChunkWriter:
    """Choices as server-sent events; everything but what is new is prepared once."""

    def __init__(self, kind: str, member: str, answer: Answer, ticket: Ticket) -> None:
        self._answer = answer
        self._ticket = ticket
        self._object = kind
        self.request = ticket.request
        head = orjson.dumps(answer.top(kind))[:-1]
        self._heads = [
            b'data: %b,"choices":[{"index":%d,"%b":' % (head, stream.index, member.encode())
            for stream in ticket.streams
        ]
        self._logprobs = [ChoiceLogprobs(self.request, stream) for stream in ticket.streams]

    def chunk(
        self,
        stream: Stream,
        content: bytes,
        finish: bytes = NO_FINISH,
        ids: Sequence[int] = (),
        told: Sequence[Logprobs] = (),
        extra: bytes = b"",
    ) -> bytes:
        """One event of one choice."""
        tail = b"}]"
        if self.request.return_ids:
            tail = b',"token_ids":%b}]' % orjson.dumps(list(ids))
        if self.request.continuous_usage:
            tail += b',"usage":' + orjson.dumps(usage([stream]))
        logprobs = orjson.dumps(self._logprobs[stream.index].render(list(told))) if told else b"null"
        parts = (self._heads[stream.index], content, logprobs, finish, tail, extra)
        return b'%b%b,"logprobs":%b,%b%b%b}\n\n' % parts

    def extras(self, stream: Stream) -> bytes:
        """What the first event of a choice has beside it: warnings, prompt ids."""
        extras = warnings_of(self.request.notices) if stream.index == 0 else {}
        if self.request.return_ids:
            extras["prompt_token_ids"] = prompt_ids(self.request, stream.prompt_index)
        return b"," + orjson.dumps(extras)[1:-1] if extras else b""

    def end(self) -> bytes:
        """The usage of the whole call, if the client wants it."""
        if not self.request.include_usage:
            return b""
        chunk = self._answer.top(self._object) | {"choices": [], "usage": usage(self._ticket.streams)}
        return b"data: " + orjson.dumps(chunk) + b"\n\n"


class CompletionWriter:
    """A completion as server-sent events."""

    def __init__(self, answer: Answer, ticket: Ticket) -> None:
        self._chunks = ChunkWriter("text_completion", "text", answer, ticket)
        self._echoes = answer.echoes
        self._begun: set[int] = set()

    def news(self, stream: Stream) -> bytes:
        """Chunks for a stream: its opening once, its new text, with the last of it its finish."""
        text, ids = stream.take()
        scores = stream.take_logprobs()
        events = b""
        if stream.index not in self._begun:
            self._begun.add(stream.index)
            events = self._opening(stream, scores.prompt)
        told = [*scores.prompt, *scores.output]
        finish = NO_FINISH if stream.finish is None else orjson.dumps(finish_fields(stream))[1:-1]
        if text or told or (ids and self._chunks.request.return_ids) or stream.finish is not None:
            events += self._chunks.chunk(stream, orjson.dumps(text), finish, ids, told)
        return events

    def _opening(self, stream: Stream, prompt: list[Logprobs]) -> bytes:
        """The prompt, if it is wanted, with what is known of its log probabilities."""
        extra = self._chunks.extras(stream)
        echo = self._echoes[stream.prompt_index] if self._echoes else ""
        if not (echo or extra):
            return b""
        told = prompt.copy()
        prompt.clear()
        return self._chunks.chunk(stream, orjson.dumps(echo), told=told, extra=extra)

    def end(self) -> bytes:
        """As of every writer."""
        return self._chunks.end()


class Completions:
    """`/v1/completions`: go on with a text or token ids, as OpenAI's older clients ask for it."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._parser = Parser(Body.COMPLETION, CompletionBody)

    async def __call__(self, exchange: Exchange) -> None:
        """Answer one call."""
        service = self._service
        request, model = await self._parsed(exchange)
        echoes = tuple([await self._echo(prompt) for prompt in request.prompts]) if request.echo else ()
        request = await service.with_ids(request)
        await answer_call(service, exchange, request, COMPLETION, model, echoes)

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


class Writer(Protocol):
    """Turns what streams bring into server-sent events."""

    def news(self, stream: Stream) -> bytes:
        """Events for what is new of a stream."""

    def end(self) -> bytes:
        """Events behind the last stream's end."""


class Form(msgspec.Struct, frozen=True):
    """How the answers of one kind of call look."""

    prefix: str
    """Of ids."""
    whole: Callable[[Answer, Ticket], dict[str, Any]]
    writer: Callable[[Answer, Ticket], Writer]


COMPLETION: Final = Form("cmpl-", whole_completion, CompletionWriter)


async def answer_call(
    service: Service,
    exchange: Exchange,
    request: Request,
    form: Form,
    model: str,
    echoes: tuple[str, ...] = (),
) -> None:
    """Run a call and send its answer, streamed or whole."""
    with service.serve(exchange, request, form.prefix) as ticket:
        answer = Answer(form.prefix + ticket.name, model, int(time.time()), echoes)
        if request.stream:
            await exchange.stream(ticket, form.writer(answer, ticket))
            return
        await ticket.whole()
        await exchange.respond_json(form.whole(answer, ticket))
