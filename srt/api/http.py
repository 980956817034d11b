"""HTTP as this server speaks it: bodies with a limit, JSON answers, event streams, errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, NamedTuple, Protocol

import orjson

from srt.api.tickets import ClientGone, Stream, Ticket
from srt.errors import ErrorCode, ServingError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

JSON: Final = (b"content-type", b"application/json")
EVENTS: Final = (b"content-type", b"text/event-stream; charset=utf-8")
NO_CACHE: Final = (b"cache-control", b"no-cache")
DONE: Final = b"data: [DONE]\n\n"
KEEP_ALIVE: Final = b": keep-alive\n\n"

REQUEST_ID: Final = "srt.request_id"
"""Key of a scope under which the value of the response's `X-Request-Id` is."""

RETRY_AFTER_S: Final = 1
LINGER_S: Final = 2.0
"""How long the rest of a refused body is read and thrown away, so that the client gets to the answer."""

TYPES: Final = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout", 413: "request_too_large", 415: "invalid_request_error",
    429: "rate_limit_error", 431: "request_too_large", 499: "client_closed_request", 500: "api_error",
    503: "overloaded_error",
}  # fmt: skip
"""The `type` of an error body, by status."""

RETRYABLE: Final = frozenset({408, 429, 503})
RETRY_LATER: Final = frozenset({ErrorCode.OVERLOADED, ErrorCode.NOT_READY, ErrorCode.TOO_MANY_CONNECTIONS})


def error_fields(error: ServingError) -> dict[str, Any]:
    """An error as the OpenAI API and the native one both show it."""
    return {"message": error.text, "type": TYPES[error.status], "param": error.param, "code": error.code.value}


def error_body(error: ServingError) -> bytes:
    """Body of a response with an error."""
    return orjson.dumps({"error": error_fields(error)})


def error_event(error: ServingError) -> bytes:
    """The end of a stream that has begun, with an error."""
    shown = error_fields(error) | {"retryable": error.status in RETRYABLE}
    return b"data: " + orjson.dumps({"error": shown}) + b"\n\n" + DONE


class Dialect(NamedTuple):
    """How an API tells of an error, as a response and as the end of a stream that has begun, and of a request's id."""

    body: Callable[[ServingError], bytes]
    event: Callable[[ServingError], bytes]
    id_header: bytes = b"x-request-id"


OPENAI: Final = Dialect(error_body, error_event)


class Writer(Protocol):
    """Turns what a call produces into server-sent events."""

    def news(self, stream: Stream) -> bytes:
        """Events for what came since the last time; empty if nothing of it is for the client."""
        ...

    def end(self) -> bytes:
        """Events after the last stream has finished, before `[DONE]`."""
        ...


class Exchange:
    """One HTTP request and the response to it."""

    __slots__ = ("_keepalive_s", "_send", "dialect", "headers", "receive", "scope", "started")

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        dialect: Dialect = OPENAI,
        keepalive_s: float = 0.0,
    ) -> None:
        self.scope = scope
        self.receive = receive
        self._send = send
        self.dialect = dialect
        self._keepalive_s = keepalive_s
        """A stream that is silent for so long gets a comment; 0: never."""
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.started = False

    async def body(self, limit_bytes: int) -> bytes:
        """The JSON body.

        Raises: ServingError UNSUPPORTED_MEDIA_TYPE, or BODY_TOO_LARGE as soon as that is clear; ClientGone if the
            connection ends before the body does.
        """
        self._check_media_type()
        announced = self.headers.get(b"content-length")
        if announced is not None and announced.isdigit() and int(announced) > limit_bytes:
            raise _too_large(f"{int(announced)} bytes", limit_bytes)
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = message.get("more_body", False)
            if size > limit_bytes:
                raise _too_large(f"more than {limit_bytes} bytes", limit_bytes)
        return b"".join(parts)

    def _check_media_type(self) -> None:
        media = self.headers.get(b"content-type")
        if media is not None:
            essence = media.split(b";", 1)[0].strip().lower()
            if essence != b"application/json" and not essence.endswith(b"+json"):
                shown = media.decode("latin-1")[:80]
                raise ServingError(
                    ErrorCode.UNSUPPORTED_MEDIA_TYPE, f"the content type is {shown!r}, it must be application/json"
                )
        coding = self.headers.get(b"content-encoding", b"identity").strip().lower()
        if coding != b"identity":
            shown = coding.decode("latin-1")[:80]
            raise ServingError(ErrorCode.UNSUPPORTED_MEDIA_TYPE, f"the content encoding {shown!r} is not supported")

    def name(self, request_id: str) -> None:
        """Set the response's `X-Request-Id`, unless the client brought one."""
        self.scope.setdefault(REQUEST_ID, request_id)

    @property
    def request_id(self) -> str:
        """The value of the response's `X-Request-Id`, once it is known; else empty."""
        known: str = self.scope.get(REQUEST_ID, "")
        return known

    async def respond(self, body: bytes, status: int = 200, headers: Headers | None = None) -> None:
        """Send a whole response, JSON unless `headers` say otherwise."""
        length = (b"content-length", b"%d" % len(body))
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": [*(headers or [JSON]), length]})
        await self._send({"type": "http.response.body", "body": body})

    async def respond_json(self, value: Any, status: int = 200) -> None:
        """Send a value as JSON."""
        await self.respond(orjson.dumps(value), status)

    async def fail(self, error: ServingError) -> None:
        """Send an error: as a response, or as the last event of a stream that has begun."""
        if self.started:
            await self._send({"type": "http.response.body", "body": self.dialect.event(error)})
            return
        headers = [JSON]
        if error.code in RETRY_LATER:
            headers.append((b"retry-after", b"%d" % RETRY_AFTER_S))
        if error.code is ErrorCode.BODY_TOO_LARGE:
            await self._fail_and_linger(error, headers)
            return
        await self.respond(self.dialect.body(error), error.status, headers)

    async def _fail_and_linger(self, error: ServingError, headers: Headers) -> None:
        """Answer while the client still sends; closing at once would reset the connection under the answer."""
        body = self.dialect.body(error)
        length = (b"content-length", b"%d" % len(body))
        start = {"type": "http.response.start", "status": error.status}
        await self._send(start | {"headers": [*headers, length, (b"connection", b"close")]})
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
        try:
            async with asyncio.timeout(LINGER_S):
                while (message := await self.receive())["type"] == "http.request" and message.get("more_body"):
                    pass
        except TimeoutError:
            pass
        await self._send({"type": "http.response.body", "body": b""})

    async def stream(self, ticket: Ticket, writer: Writer, done: bytes = DONE) -> None:
        """Send a call's answer as events while it grows; what comes while the client is slow goes in one piece.

        `done` is the last event. Raises: ServingError and ClientGone as `Ticket.news`.
        """
        news = await self._news(ticket)
        await self._start_stream()
        untold = len(ticket.streams)
        while True:
            events = b""
            for stream in news:
                if not stream.told:
                    events += writer.news(stream)
                    stream.told = stream.finish is not None
                    untold -= stream.told
            if not untold:
                await self._send({"type": "http.response.body", "body": events + writer.end() + done})
                return
            if events:
                await self._send_events(ticket, events)
            news = await self._news(ticket)

    async def _start_stream(self) -> None:
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": [EVENTS, NO_CACHE]})

    async def _send_events(self, ticket: Ticket, events: bytes) -> None:
        ticket.sending_since = time.perf_counter()
        await self._send({"type": "http.response.body", "body": events, "more_body": True})
        ticket.sending_since = None

    async def _news(self, ticket: Ticket) -> list[Stream]:
        """What came, with comments to the client for as long as nothing comes."""
        if not self._keepalive_s:
            return await ticket.news()
        while True:
            try:
                async with asyncio.timeout(self._keepalive_s):
                    return await ticket.news()
            except TimeoutError:
                await self._start_stream()
                await self._send_events(ticket, KEEP_ALIVE)


def _too_large(size: str, limit_bytes: int) -> ServingError:
    return ServingError(ErrorCode.BODY_TOO_LARGE, f"the body has {size}, the limit is {limit_bytes} bytes")
