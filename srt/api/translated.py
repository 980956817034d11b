"""Requests of other APIs as chat completions: what those honour is honoured, what they refuse is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs

import msgspec

from srt.api.bodies import ChatBody, Notice, Parser
from srt.api.fields import Body
from srt.api.http import Exchange
from srt.api.schema import Request
from srt.api.service import Service
from srt.errors import ServingError


def query(exchange: Exchange, name: str) -> str | None:
    """A parameter of the query string; its last value."""
    values: list[str] = parse_qs(exchange.scope["query_string"].decode("latin-1")).get(name, [])
    return values[-1] if values else None


class ChatRequests:
    """Makes requests from fields of chat completions. `names`: what fields of those are called in the other API."""

    def __init__(self, service: Service, names: Mapping[str, str]) -> None:
        self._service = service
        self._names = names
        self._parser = Parser(Body.CHAT, ChatBody)

    def request(self, document: dict[str, Any], notices: tuple[Notice, ...]) -> Request:
        """The request of a chat completion with these fields; `notices` are those of the body it was made from.

        Raises: ServingError as a chat completion.
        """
        try:
            body, more = self._parser.parse(msgspec.json.encode(document))
            request = self._service.schema.chat(body, notices + more)
        except ServingError as error:
            raise self._renamed(error) from error
        for notice in more:
            self._service.metrics.warnings[notice.kind] += 1
        return request

    def _renamed(self, error: ServingError) -> ServingError:
        """An error about a field as the client knows it."""
        path = error.param or ""
        field = re.split(r"[.\[]", path, maxsplit=1)[0]
        if field not in self._names:
            return error
        name = self._names[field]
        text = error.text.replace(f"'{field}", f"'{name}")
        return ServingError(error.code, text, name + path.removeprefix(field))
