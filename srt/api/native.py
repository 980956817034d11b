"""`POST /generate`: the native API, in SGLang's shape. Events repeat all so far unless the server is told not to."""

from __future__ import annotations

import time
from typing import Any, Final

import orjson

from srt.api.bodies import GenerateBody, Parser
from srt.api.fields import Body
from srt.api.http import Exchange
from srt.api.logprobs import native_lists
from srt.api.schema import Request
from srt.api.service import Service
from srt.api.tickets import Stream, Ticket
from srt.messages import Finish, LogprobParams, TokenPrompt

WEIGHT_VERSION: Final = "default"


def finish_reason(finish: Finish, completion_tokens: int, abort_text: str | None) -> dict[str, Any]:
    """`meta_info.finish_reason` of an ended request."""
    match finish.kind:
        case "stop":
            return {"type": "stop", "matched": finish.matched}
        case "length":
            return {"type": "length", "length": completion_tokens}
        case "abort":
            return {"type": "abort", "message": abort_text or finish.text, "status_code": None, "err_type": None}


class LogprobLists:
    """The log probabilities of one answer, as members of `meta_info`; kept as JSON while it grows."""

    def __init__(self, wanted: LogprobParams) -> None:
        self._wanted = wanted
        self._length = 0
        self._lists: dict[str, bytearray] = {
            f"{side}_{name}": bytearray()
            for name in ("token_logprobs", "top_logprobs", "token_ids_logprobs")
            for side in ("input", "output")
        }

    def write(self, stream: Stream, *, incremental: bool) -> bytes:
        """All so far with what came since the last time, or that alone."""
        pending = stream.take_logprobs()
        for side, parts in (("input", pending.prompt), ("output", pending.output)):
            for name, entries in native_lists(parts, self._wanted.ids, texts=self._wanted.texts).items():
                so_far = self._lists[f"{side}_{name}"]
                if incremental:
                    so_far.clear()
                so_far += (b"," if so_far and entries else b"") + orjson.dumps(entries)[1:-1]
        self._length += sum(map(len, pending.output))
        members = [b'"%b":[%b]' % (name.encode(), bytes(entries)) for name, entries in self._lists.items()]
        return b"," + b",".join([*members, b'"output_token_logprobs_length":%d' % self._length])


class Item:
    """One answer, written again and again while it grows, each time whole or, `incremental`, only what is new.

    Text and ids are kept as JSON, so that a new token costs its own bytes and one copy.
    """

    __slots__ = ("_head", "_ids", "_incremental", "_logprobs", "_tail", "_text")

    def __init__(self, ticket: Ticket, stream: Stream, *, incremental: bool = False) -> None:
        self._incremental = incremental
        self._text = bytearray()
        self._ids = bytearray()
        self._head = b'"meta_info":{"id":%s,"finish_reason":' % orjson.dumps(stream.name)
        self._tail = self._extras(ticket, stream)
        wanted = ticket.request.sampling[stream.prompt_index].logprobs
        self._logprobs = None if wanted is None else LogprobLists(wanted)

    @staticmethod
    def _extras(ticket: Ticket, stream: Stream) -> bytes:
        request = ticket.request
        extras: dict[str, Any] = {}
        prompt = request.prompts[stream.prompt_index]
        match prompt:
            case TokenPrompt() if request.return_ids:
                extras["prompt_token_ids"] = memoryview(prompt.token_ids).cast("i").tolist()
            case _:
                pass
        if request.batch and request.stream:
            extras["index"] = stream.index
        if request.notices:
            extras["warnings"] = [notice.text for notice in request.notices]
        return b"," + orjson.dumps(extras)[1:] if extras else b"}"

    def write(self, stream: Stream) -> bytes:
        """The answer so far, or what of it has not been written."""
        text, ids = stream.take()
        if self._incremental:
            self._text.clear()
            self._ids.clear()
        self._text += orjson.dumps(text)[1:-1]
        if ids:
            self._ids += (b"," if self._ids else b"") + orjson.dumps(ids)[1:-1]
        meta_info = self._meta_info(stream)
        if self._logprobs is not None:
            meta_info = meta_info[:-1] + self._logprobs.write(stream, incremental=self._incremental) + b"}"
        return b"".join(
            (b'{"text":"', self._text, b'","output_ids":[', self._ids, b"],", self._head, meta_info, self._tail)
        )

    @staticmethod
    def _meta_info(stream: Stream) -> bytes:
        finish = b"null"
        if stream.finish is not None:
            finish = orjson.dumps(finish_reason(stream.finish, stream.completion_tokens, stream.ticket.abort_text))
        return (
            b'%b,"prompt_tokens":%d,"completion_tokens":%d,"cached_tokens":%d,"reasoning_tokens":%d,'
            b'"cached_tokens_details":{"device":%d,"host":0},"num_retractions":%d,"weight_version":"%b"%b%b%b}'
        ) % (
            finish,
            stream.prompt.tokens,
            stream.completion_tokens,
            stream.prompt.cached_tokens,
            stream.reasoning_tokens,
            stream.prompt.cached_tokens,
            stream.retractions,
            WEIGHT_VERSION.encode(),
            b',"image_tokens":%d' % stream.prompt.image_tokens if stream.prompt.image_tokens else b"",
            _speculation(stream),
            _times(stream),
        )


def _speculation(stream: Stream) -> bytes:
    """What guessing ahead came to. `spec_accept_length` is of the answer and all steps that brought some of it,
    `spec_acceptance_length` of the steps that checked guesses, before an ending cut tokens off."""
    counts = stream.speculation
    if counts is None:
        return b""
    told = {
        "spec_verify_ct": counts.steps,
        "spec_plain_ct": counts.plain,
        "spec_draft_token_num": counts.drafted,
        "spec_accept_token_num": counts.accepted,
        "spec_accept_rate": counts.accepted / counts.drafted,
        "spec_accept_length": stream.completion_tokens / counts.all_steps,
        "spec_acceptance_length": 1 + counts.accepted / counts.steps,
        "spec_accept_histogram": counts.histogram,
    }
    return b"," + orjson.dumps(told)[1:-1]


def _times(stream: Stream) -> bytes:
    """Times of an ended request in seconds, as far as they are known."""
    if stream.finish is None:
        return b""
    latency = time.perf_counter() - stream.ticket.started_at
    times = b',"e2e_latency":%.6f' % latency
    if stream.timing is not None:
        times += b',"queue_time":%.6f' % stream.timing.queue_s
        if stream.completion_tokens:
            times += b',"first_token_latency":%.6f' % stream.timing.first_token_s
        decoding = stream.timing.total_s - stream.timing.first_token_s
        if stream.completion_tokens > 1 and decoding > 0:
            times += b',"decode_throughput":%.3f' % ((stream.completion_tokens - 1) / decoding)
    return times


class EventWriter:
    """Items as server-sent events."""

    def __init__(self, ticket: Ticket, *, incremental: bool) -> None:
        self._items = [Item(ticket, stream, incremental=incremental) for stream in ticket.streams]

    def news(self, stream: Stream) -> bytes:
        """One event with the item."""
        return b"data: " + self._items[stream.index].write(stream) + b"\n\n"

    def end(self) -> bytes:
        """Nothing more."""
        return b""


class Generate:
    """`/generate`: answer a prompt or a batch of them, given as text, token ids, or text with images."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._parser = Parser(Body.GENERATE, GenerateBody)
        self._incremental = service.plan.server.incremental_streaming_output

    async def __call__(self, exchange: Exchange) -> None:
        """Answer one call."""
        service = self._service
        request = await service.with_ids(await self._parsed(exchange))
        with service.serve(exchange, request) as ticket:
            if request.stream:
                await exchange.stream(ticket, EventWriter(ticket, incremental=self._incremental))
                return
            await ticket.whole()
            items = [Item(ticket, stream).write(stream) for stream in ticket.streams]
            await exchange.respond(b"[" + b",".join(items) + b"]" if request.batch else items[0])

    async def _parsed(self, exchange: Exchange) -> Request:
        """The request; the body, which may be large, is not kept."""
        body, notices = await self._service.read(exchange, self._parser)
        return self._service.schema.generate(body, notices)
