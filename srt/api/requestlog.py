"""Lines about requests, with no more in them than the operator's level allows (see `srt.log.request_line`)."""

from __future__ import annotations

import logging
import time
from typing import Any

import msgspec

from srt.api.http import REQUEST_ID, Scope
from srt.api.schema import Prompt
from srt.api.tickets import Ticket
from srt.configs.server import ServerConfig
from srt.log import REQUESTS, request_line
from srt.messages import ChatPrompt, TextPrompt, TokenPrompt

log = logging.getLogger(REQUESTS)


class RequestLog:
    """One line when a call comes, one when each of its prompts has ended, one for every response with an error."""

    def __init__(self, server: ServerConfig) -> None:
        self._server = server

    def received(self, ticket: Ticket, request_id: str) -> None:
        """A call is being served."""
        if not self._server.log_requests:
            return
        request = ticket.request
        facts = {
            "rid": ticket.name,
            "request_id": request_id,
            "kind": request.kind,
            "prompts": len(request.prompts),
            "stream": request.stream,
        }
        sampling = {f"sampling_{index}": params for index, params in enumerate(map(_told, request.sampling))}
        if len(set(request.sampling)) == 1:
            sampling = _told(request.sampling[0])
        texts = {f"prompt_{index}": _text_of(prompt) for index, prompt in enumerate(request.prompts)}
        self._write("received", facts, sampling, texts)

    def ended(self, ticket: Ticket, request_id: str) -> None:
        """A call is over."""
        if not self._server.log_requests:
            return
        for stream in ticket.streams:
            facts = {
                "rid": stream.name,
                "request_id": request_id,
                "finish": None if stream.finish is None else stream.finish.kind,
                "client_gone": ticket.client_gone,
                "prompt_tokens": stream.prompt.tokens,
                "cached_tokens": stream.prompt.cached_tokens,
                "completion_tokens": stream.completion_tokens,
                "seconds": round(time.perf_counter() - ticket.started_at, 6),
            }
            self._write("ended", facts, {}, {})

    def refused(self, scope: Scope, status: int, seconds: float) -> None:
        """A response has an error status, whatever came of the call."""
        if not self._server.log_requests:
            return
        facts = {
            "request_id": scope.get(REQUEST_ID, ""),
            "method": scope["method"],
            "path": scope["path"][:256],
            "status": status,
            "seconds": round(seconds, 6),
        }
        self._write("refused", facts, {}, {})

    def _write(self, event: str, facts: dict[str, Any], sampling: dict[str, Any], texts: dict[str, str]) -> None:
        server = self._server
        line = request_line(event, server.log_requests_level, server.log_requests_format, facts, sampling, texts)
        log.info("%s", line)


def _told(params: msgspec.Struct) -> dict[str, Any]:
    """What a client said about sampling, without what it did not."""
    told: dict[str, Any] = msgspec.to_builtins(params)
    told.pop("type", None)
    return told


def _text_of(prompt: Prompt) -> str:
    """A prompt for the log."""
    match prompt:
        case TextPrompt(text=text):
            return text
        case ChatPrompt(messages=messages):
            return messages.decode()
        case TokenPrompt(token_ids=packed):
            return str(memoryview(packed).cast("i").tolist())
