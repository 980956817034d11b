"""The routes as a table, and what stands around every one of them: keys, counts, request ids, errors."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

import msgspec
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi import Response as HttpResponse
from starlette.exceptions import HTTPException
from starlette.routing import Route as StarletteRoute

from srt import __version__
from srt.api.auth import Access, Doorkeeper, Secrets
from srt.api.control import Administration, Facts, Health, Tokens
from srt.api.http import REQUEST_ID, Exchange, Receive, Scope, Send, error_body
from srt.api.native import Generate
from srt.api.openai import ChatCompletions, Completions
from srt.api.openapi import document
from srt.api.schema import MAX_RID_CHARACTERS
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


def routes(service: Service, doorkeeper: Doorkeeper) -> tuple[Route, ...]:
    """All routes but the documentation's."""
    health, facts, tokens = Health(service), Facts(service), Tokens(service)
    admin = Administration(service, doorkeeper)
    key, get, post = Access.KEY, ("GET",), ("POST",)
    return (
        Route("/generate", ("POST", "PUT"), key, Generate(service)),
        Route("/v1/completions", post, key, Completions(service)),
        Route("/v1/chat/completions", post, key, ChatCompletions(service)),
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
        Route("/abort_request", post, key, admin.abort_request),
        Route("/flush_cache", ("GET", "POST"), Access.ADMIN, admin.flush_cache),
    )


class Endpoint:
    """A handler as an ASGI application: what it raises becomes a response."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        exchange = Exchange(scope, receive, send)
        try:
            await self._handler(exchange)
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

    def __init__(self, table: tuple[Route, ...]) -> None:
        super().__init__(
            title="srt",
            version=__version__,
            routes=[StarletteRoute(row.path, Endpoint(row.handler), methods=list(row.methods)) for row in table],
            exception_handlers={HTTPException: no_route},
            redirect_slashes=False,
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
        self._metrics = service.metrics
        self._doorkeeper = Doorkeeper(secrets)
        table = routes(service, self._doorkeeper)
        self._access = {row.path: row.access for row in table}
        self._app = App(table)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        assert scope["type"] == "http"
        path, metrics = scope["path"], self._metrics
        status = CLIENT_CLOSED

        async def counted_send(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                request_id = scope.get(REQUEST_ID) or uuid.uuid4().hex
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        metrics.http_active += 1
        try:
            offered = _offered_request_id(scope)
            if offered is not None:
                scope[REQUEST_ID] = offered
            authorization = next((value for name, value in scope["headers"] if name == b"authorization"), None)
            self._doorkeeper.check(self._access.get(path, Access.KEY), authorization)
            await self._app(scope, receive, counted_send)
        except ServingError as error:
            await Exchange(scope, receive, counted_send).fail(error)
        finally:
            if CLIENT_GONE in scope:
                status = CLIENT_CLOSED
            metrics.http_active -= 1
            known = path if path in self._access else "/v1/models/{model}" if path.startswith("/v1/models/") else OTHER
            metrics.http[known, scope["method"] if known != OTHER else OTHER, status] += 1


def _offered_request_id(scope: Scope) -> str | None:
    """The client's `X-Request-Id`, if it can be sent back as it is."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and 1 <= len(value) <= MAX_RID_CHARACTERS and value.isascii():
            text: str = value.decode()
            return text if text.isprintable() else None
    return None
