"""The form of an answer as clients of three servers ask for it, to one `Constraint`.

| Field | In | Is |
|---|---|---|
| `response_format` | chat, completions | OpenAI's: text, json_object, json_schema; structural_tag |
| `structured_outputs` | chat, completions | vLLM's: json, json_object, regex, choice, grammar or structural_tag |
| `json_schema`, `regex`, `ebnf`, `structural_tag` | all, /generate in `sampling_params` | SGLang's |
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import msgspec

from srt.api.bodies import OpenAIBody, SharedSampling, invalid, shown
from srt.grammar.errors import GrammarError
from srt.grammar.texts import check
from srt.messages import Constraint, ConstraintKind

ANY_JSON: Final = "$$ANY$$"
"""How SGLang's clients may write "any JSON object" as a schema."""

STRUCTURED: Final[dict[str, ConstraintKind]] = {
    "json": "json_schema", "json_object": "json_object", "regex": "regex", "choice": "choice", "grammar": "ebnf",
    "structural_tag": "structural_tag",
}  # fmt: skip
"""Members of `structured_outputs`."""


class Asked(NamedTuple):
    """A constraint and the field that asked for it."""

    field: str
    constraint: Constraint


def native_constraint(body: SharedSampling) -> Asked | None:
    """The constraint of `sampling_params`. Raises: ServingError if there are several, or it cannot be one."""
    return _one([*_shared(body)])


def openai_constraint(body: OpenAIBody) -> Asked | None:
    """The constraint of a chat or a completion. Raises: ServingError if there are several, or it cannot be one."""
    return _one([*_response_format(body.response_format), *_structured(body.structured_outputs), *_shared(body)])


def _one(asked: list[Asked]) -> Asked | None:
    if len(asked) > 1:
        names = " and ".join(f"'{one.field}'" for one in asked)
        raise invalid(f"{names} are given: an answer has one form, send one of them", asked[1].field)
    for one in asked:
        try:
            check(one.constraint)
        except GrammarError as error:
            raise invalid(f"'{one.field}' cannot be obeyed: {error}", one.field) from error
    return asked[0] if asked else None


def _shared(body: SharedSampling) -> Iterator[Asked]:
    if body.json_schema == ANY_JSON:
        yield Asked("json_schema", Constraint("json_object"))
    elif body.json_schema:
        yield Asked("json_schema", Constraint("json_schema", _json(body.json_schema)))
    if body.regex:
        yield Asked("regex", Constraint("regex", body.regex))
    if body.ebnf:
        yield Asked("ebnf", Constraint("ebnf", body.ebnf))
    if body.structural_tag:
        yield Asked("structural_tag", Constraint("structural_tag", _json(body.structural_tag)))


def _response_format(given: dict[str, Any] | None) -> Iterator[Asked]:
    field = "response_format"
    match given:
        case None | {"type": "text"}:
            return
        case {"type": "json_object"}:
            yield Asked(field, Constraint("json_object"))
        case {"type": "json_schema", "json_schema": {"schema": dict() as schema, **more}}:
            strict = more.get("strict")
            if strict not in (None, True, False):
                raise invalid(f"'{field}.json_schema.strict' must be true or false, got {shown(strict)}", field)
            yield Asked(field, Constraint("json_schema", _json(schema), strict=strict is not False))
        case {"type": "json_schema"}:
            name = f"{field}.json_schema.schema"
            raise invalid(f"'{name}' is required, a JSON schema as an object", name)
        case {"type": "structural_tag"}:
            yield Asked(field, Constraint("structural_tag", _json(given)))
        case _:
            raise invalid(
                f"'{field}.type' is {shown(given.get('type'))}, it must be one of text, json_object, json_schema, "
                "structural_tag",
                f"{field}.type",
            )


def _structured(given: dict[str, Any] | None) -> Iterator[Asked]:
    for name, value in (given or {}).items():
        field = f"structured_outputs.{name}"
        kind = STRUCTURED.get(name)
        if value is None or value is False:
            continue
        if kind is None:
            raise invalid(f"'{field}' is not supported: it must be one of {', '.join(STRUCTURED)}", field)
        match kind, value:
            case "json_object", True:
                yield Asked(field, Constraint("json_object"))
            case ("json_schema" | "structural_tag"), dict() | str():
                yield Asked(field, Constraint(kind, _json(value)))
            case ("regex" | "ebnf"), str():
                yield Asked(field, Constraint(kind, value))
            case "choice", list():
                yield Asked(field, Constraint(kind, _json(value)))
            case _:
                raise invalid(f"'{field}' cannot be {shown(value)}", field)


def _json(value: Any) -> str:
    """JSON as text; a text is taken as such."""
    match value:
        case str():
            return value
        case _:
            return msgspec.json.encode(value).decode()
