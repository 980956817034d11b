"""The OpenAPI document, from what the server really parses: body types and the table of fields."""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

import msgspec

from srt.api.anthropic.bodies import MessagesBody, PromptBody
from srt.api.bodies import (
    AbortBody,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    FunctionCallBody,
    GenerateBody,
    ProfileBody,
    ScoreBody,
    SeparateReasoningBody,
    TokenizeBody,
)
from srt.api.fields import FIELDS_OF, Body
from srt.api.responses.bodies import InputTokensBody, ResponsesBody

BODIES: Final[dict[str, tuple[Body, type[msgspec.Struct]]]] = {
    "/generate": (Body.GENERATE, GenerateBody),
    "/v1/completions": (Body.COMPLETION, CompletionBody),
    "/v1/chat/completions": (Body.CHAT, ChatBody),
    "/tokenize": (Body.TOKENIZE, TokenizeBody),
    "/v1/tokenize": (Body.TOKENIZE, TokenizeBody),
    "/detokenize": (Body.DETOKENIZE, DetokenizeBody),
    "/v1/detokenize": (Body.DETOKENIZE, DetokenizeBody),
    "/parse_function_call": (Body.FUNCTION_CALL, FunctionCallBody),
    "/separate_reasoning": (Body.SEPARATE_REASONING, SeparateReasoningBody),
    "/abort_request": (Body.ABORT, AbortBody),
    "/v1/chat/completions/render": (Body.CHAT, ChatBody),
    "/v1/responses": (Body.RESPONSES, ResponsesBody),
    "/v1/responses/input_tokens": (Body.INPUT_TOKENS, InputTokensBody),
    "/v1/score": (Body.SCORE, ScoreBody),
    "/v1/messages": (Body.MESSAGES, MessagesBody),
    "/v1/messages/count_tokens": (Body.COUNT_TOKENS, PromptBody),
    "/start_profile": (Body.PROFILE, ProfileBody),
}

QUERIES: Final[dict[str, tuple[tuple[str, str, dict[str, Any]], ...]]] = {
    "/flush_cache": (("timeout", "seconds to wait for running requests", {"type": "number", "minimum": 0}),),
    "/v1/responses/{response_id}/input_items": (
        ("order", "asc or desc, the default", {"enum": ["asc", "desc"]}),
        ("limit", "items of a page, default 20", {"type": "integer", "minimum": 1, "maximum": 100}),
        ("after", "id of the last item of the page before", {"type": "string"}),
    ),
}
"""Parameters in query strings: name, meaning, schema."""

SECURITY: Final = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
}

ERROR: Final = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}


def document(
    table: Iterable[tuple[str, tuple[str, ...], Callable[..., Awaitable[None]]]], title: str, version: str
) -> dict[str, Any]:
    """OpenAPI 3.1 of routes given as (path, methods, handler)."""
    structs = list(dict.fromkeys(struct for _, struct in BODIES.values()))
    _, schemas = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    for kind, struct in BODIES.values():
        for name, described in schemas[struct.__name__]["properties"].items():
            described["description"] = FIELDS_OF[kind][name].note
    paths: dict[str, Any] = {}
    for path, methods, handler in table:
        operations = paths.setdefault(path.replace(":path", ""), {})
        for method in methods:
            operations[method.lower()] = _operation(path, method, handler)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version},
        "paths": paths,
        "components": {"schemas": schemas | {"Error": ERROR}, "securitySchemes": SECURITY},
        "security": [{}, *({name: []} for name in SECURITY)],
    }


def _summary(handler: Callable[..., Awaitable[None]]) -> str:
    """What a handler does, in its own words; the route that they begin with is there already."""
    said = re.sub(r"^`[^`]*`: ", "", (inspect.getdoc(handler) or "").partition("\n")[0])
    return said[:1].upper() + said[1:]


def _operation(path: str, method: str, handler: Callable[..., Awaitable[None]]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": f"{method.lower()}{path.replace('/', '_').replace('{', '').replace(':path}', '')}",
        "summary": _summary(handler),
        "responses": {
            "200": {"description": "done"},
            "default": {
                "description": "an error",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
            },
        },
    }
    if path in BODIES and method != "GET":
        schema = {"$ref": f"#/components/schemas/{BODIES[path][1].__name__}"}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"\{(\w+)", path)
    ]
    parameters += [
        {"name": name, "in": "query", "description": text, "schema": schema}
        for name, text, schema in QUERIES.get(path, ())
    ]
    if parameters:
        operation["parameters"] = parameters
    return operation
