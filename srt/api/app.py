"""The routes as a table, and what stands around every one of them: keys, counts, request ids, errors."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

import msgspec
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi import Response as HttpResponse
from starlette.exceptions import HTTPException
from starlette.routing import Route as StarletteRoute
from starlette.routing import compile_path

from srt import __version__
from srt.api.anthropic.endpoint import ANTHROPIC, Messages
from srt.api.auth import Access, Doorkeeper, Secrets, offered_keys
from srt.api.chats import ChatCompletions
from srt.api.control import Administration, Facts, Health, Tokens
from srt.api.http import OPENAI, REQUEST_ID, Dialect, Exchange, Headers, Receive, Scope, Send, error_body
from srt.api.native import Generate
from srt.api.openai import Completions
from srt.api.openapi import document
from srt.api.operations import Operations
from srt.api.origins import Origins
from srt.api.pages import StaticFile
from srt.api.parsing import Parsing
from srt.api.render import Render
from srt.api.requestlog import RequestLog
from srt.api.responses.endpoint import Responses
from srt.api.schema import MAX_RID_CHARACTERS
from srt.api.score import Score
from srt.api.service import Service
from srt.api.tickets import ClientGone
from srt.errors import ErrorCode, ServingError

log = logging.getLogger(__name__)

Handler = Callable[[Exchange], Awaitable[None]]

CLIENT_CLOSED: Final = 499
CLIENT_GONE: Final = "srt.client_gone"
"""Key of a scope whose client went away before the end."""

OTHER: Final = "other"
"""Route of requests for paths that do not exist, in metrics."""


class Route(msgspec.Struct, frozen=True):
    """One row of the table."""

    path: str
    methods: tuple[str, ...]
    access: Access
    handler: Handler
    dialect: Dialect = OPENAI


def routes(service: Service, doorkeeper: Doorkeeper) -> tuple[Route, ...]:
    """All routes but the OpenAPI document's."""
    health, facts, tokens = Health(service), Facts(service), Tokens(service)
    admin, operations = Administration(service, doorkeeper), Operations(service)
    messages, responses = Messages(service), Responses(service)
    parsing = Parsing(service)
    key, get, post = Access.KEY, ("GET",), ("POST",)
    return (
        Route("/generate", ("POST", "PUT"), key, Generate(service)),
        Route("/v1/completions", post, key, Completions(service)),
        Route("/v1/chat/completions", post, key, ChatCompletions(service)),
        Route("/v1/chat/completions/render", post, key, Render(service)),
        Route("/v1/responses", post, key, responses.create),
        Route("/v1/responses/input_tokens", post, key, responses.input_tokens),
        Route("/v1/responses/{response_id}", get, key, responses.retrieve),
        Route("/v1/responses/{response_id}", ("DELETE",), key, responses.delete),
        Route("/v1/responses/{response_id}/cancel", post, key, responses.cancel),
        Route("/v1/responses/{response_id}/input_items", get, key, responses.list_input),
        Route("/v1/score", post, key, Score(service)),
        Route("/v1/messages", post, key, messages.create, ANTHROPIC),
        Route("/v1/messages/count_tokens", post, key, messages.count_tokens, ANTHROPIC),
        Route("/", get, Access.OPEN, StaticFile("chat.html")),
        Route("/static/chat.css", get, Access.OPEN, StaticFile("chat.css")),
        Route("/static/chat.js", get, Access.OPEN, StaticFile("chat.js")),
        Route("/health", get, Access.OPEN, health.health),
        Route("/ready", get, Access.OPEN, health.ready),
        Route("/health_generate", get, key, health.health_generate),
        Route("/v1/models", get, key, facts.models),
        Route("/v1/models/{model:path}", get, key, facts.model),
        Route("/model_info", get, key, facts.model_info),
        Route("/get_model_info", get, key, facts.model_info),
        Route("/server_info", get, Access.ADMIN, facts.server_info),
        Route("/get_server_info", get, Access.ADMIN, facts.server_info),
        Route("/metrics", get, key, facts.metrics),
        Route("/tokenize", post, key, tokens.tokenize),
        Route("/v1/tokenize", post, key, tokens.tokenize),
        Route("/detokenize", post, key, tokens.detokenize),
        Route("/v1/detokenize", post, key, tokens.detokenize),
        Route("/parse_function_call", post, key, parsing.parse_function_call),
        Route("/separate_reasoning", post, key, parsing.separate_reasoning),
        Route("/abort_request", post, key, admin.abort_request),
        Route("/version", get, key, operations.version),
        Route("/v1/loads", get, key, operations.loads),
        Route("/start_profile", post, Access.ADMIN, operations.start_profile),
        Route("/stop_profile", post, Access.ADMIN, operations.stop_profile),
        Route("/docs", get, Access.OPEN, StaticFile("docs.html")),
        Route("/flush_cache", ("GET", "POST"), Access.ADMIN, admin.flush_cache),
    )


class Endpoint:
    """A handler as an ASGI application: what it raises becomes a response."""

    def __init__(self, row: Route, keepalive_s: float) -> None:
        self._row = row
        self._keepalive_s = keepalive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        exchange = Exchange(scope, receive, send, self._row.dialect, self._keepalive_s)
        try:
            await self._row.handler(exchange)
        except ServingError as error:
            await exchange.fail(error)
        except ClientGone:
            scope[CLIENT_GONE] = True
        except Exception as error:
            await exchange.fail(incident(scope, error))


def incident(scope: Scope, error: Exception) -> ServingError:
    """Log a bug under an id, and the error that tells the client that id and nothing else."""
    name = uuid.uuid4().hex[:12]
    log.error("incident %s in %s %s", name, scope["method"], scope["path"], exc_info=error)
    return ServingError(ErrorCode.INTERNAL, f"internal error; the log has it as incident {name}")


async def no_route(request: HttpRequest, error: Exception) -> HttpResponse:
    """404 and 405 in the form of all other errors."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        told = ServingError(
            ErrorCode.METHOD_NOT_ALLOWED, f"{request.method} is not allowed for {request.url.path}, it has {allowed}"
        )
    else:
        told = ServingError(ErrorCode.NOT_FOUND, f"there is no route {request.url.path[:256]}")
    return HttpResponse(error_body(told), told.status, dict(error.headers or {}), "application/json")


class App(FastAPI):
    """FastAPI with our routes, all of which are plain ASGI, and our OpenAPI document."""

    def __init__(self, table: tuple[Route, ...], keepalive_s: float) -> None:
        super().__init__(
            title="srt",
            version=__version__,
            routes=[StarletteRoute(row.path, Endpoint(row, keepalive_s), methods=list(row.methods)) for row in table],
            exception_handlers={HTTPException: no_route},
            redirect_slashes=False,
            docs_url=None,  # FastAPI's own pages load their scripts from elsewhere
            redoc_url=None,
        )
        self._table = table

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, made from the route table and the body types."""
        if self.openapi_schema is None:
            described = [(row.path, row.methods, row.handler) for row in self._table]
            self.openapi_schema = document(described, self.title, self.version)
        return self.openapi_schema


class Gate:
    """The outermost application: who may pass, what is counted, which id the response carries."""

    def __init__(self, service: Service, secrets: Secrets) -> None:
        server = service.plan.server
        self._metrics = service.metrics
        self._logs = RequestLog(server)
        self._doorkeeper = Doorkeeper(secrets)
        self._origins = Origins(server.origins)
        table = routes(service, self._doorkeeper)
        self._rows = {row.path: row for row in table if "{" not in row.path}
        self._patterns = [(compile_path(row.path), row) for row in table if "{" in row.path]
        self._app = App(table, server.sse_keepalive_seconds)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        assert scope["type"] == "http"
        known, row = self._row(scope["path"])
        dialect = OPENAI if row is None else row.dialect
        status, started, metrics = CLIENT_CLOSED, time.perf_counter(), self._metrics
        shared: Headers = []

        async def counted_send(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if REQUEST_ID not in scope:
                    scope[REQUEST_ID] = uuid.uuid4().hex
                request_id = scope[REQUEST_ID].encode()
                names = dict.fromkeys((b"x-request-id", dialect.id_header))
                named = [(name, request_id) for name in names]
                message["headers"] = [*message.get("headers", ()), *named, *shared]
            await send(message)

        metrics.http_active += 1
        try:
            offered = _offered_request_id(scope)
            if offered is not None:
                scope[REQUEST_ID] = offered
            shared += self._origins.headers_for(dict(scope["headers"]))
            if not await self._answered_preflight(scope, receive, counted_send):
                self._doorkeeper.check(Access.KEY if row is None else row.access, offered_keys(scope["headers"]))
                await self._app(scope, receive, counted_send)
        except ServingError as error:
            await Exchange(scope, receive, counted_send, dialect).fail(error)
        finally:
            if CLIENT_GONE in scope:
                status = CLIENT_CLOSED
            metrics.http_active -= 1
            metrics.http[known, scope["method"] if known != OTHER else OTHER, status] += 1
            if status >= 400 and (row is None or row.access is not Access.OPEN):
                self._logs.refused(scope, status, time.perf_counter() - started)

    def _row(self, path: str) -> tuple[str, Route | None]:
        """The route of a path and its name in metrics."""
        row = self._rows.get(path)
        if row is not None:
            return path, row
        for (regex, shape, _), row in self._patterns:
            if regex.match(path):
                return shape, row
        return OTHER, None

    async def _answered_preflight(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Answer a browser that asks whether a page may ask; such a question never carries a key."""
        if scope["method"] != "OPTIONS":
            return False
        headers = self._origins.preflight(dict(scope["headers"]))
        if headers is None:
            return False
        await Exchange(scope, receive, send).respond(b"", 200, headers)
        return True


def _offered_request_id(scope: Scope) -> str | None:
    """The client's `X-Request-Id`, if it can be sent back as it is."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and 1 <= len(value) <= MAX_RID_CHARACTERS and value.isascii():
            text: str = value.decode()
            return text if text.isprintable() else None
    return None
