"""The form of an answer as clients of three servers ask for it, to one `Constraint`.

| Field | In | Is |
|---|---|---|
| `response_format` | chat, completions | OpenAI's: text, json_object, json_schema; structural_tag |
| `structured_outputs` | chat, completions | vLLM's: json, json_object, regex, choice, grammar or structural_tag |
| `json_schema`, `regex`, `ebnf`, `structural_tag` | all, /generate in `sampling_params` | SGLang's |
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

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


def native_constraint(body: SharedSampling, *, after_thinking: bool) -> Constraint | None:
    """The constraint of `sampling_params`. Raises: ServingError if there are several, or it cannot be one."""
    return _one([*_shared(body)], after_thinking=after_thinking)


def openai_constraint(body: OpenAIBody, *, after_thinking: bool) -> Constraint | None:
    """The constraint of a chat or a completion. Raises: ServingError if there are several, or it cannot be one."""
    asked = [*_response_format(body.response_format), *_structured(body.structured_outputs), *_shared(body)]
    return _one(asked, after_thinking=after_thinking)


def _one(asked: list[Constraint], *, after_thinking: bool) -> Constraint | None:
    if len(asked) > 1:
        names = " and ".join(f"'{constraint.field}'" for constraint in asked)
        raise invalid(f"{names} are given: an answer has one form, send one of them", asked[1].field)
    for constraint in asked:
        try:
            check(constraint)
        except GrammarError as error:
            raise invalid(f"'{constraint.field}' cannot be obeyed: {error}", constraint.field) from error
        return msgspec.structs.replace(constraint, after_thinking=after_thinking)
    return None


def _shared(body: SharedSampling) -> Iterator[Constraint]:
    if body.json_schema == ANY_JSON:
        yield Constraint("json_object", field="json_schema")
    elif body.json_schema is not None:
        yield Constraint("json_schema", _json(body.json_schema), field="json_schema")
    if body.regex is not None:
        yield Constraint("regex", body.regex, field="regex")
    if body.ebnf is not None:
        yield Constraint("ebnf", body.ebnf, field="ebnf")
    if body.structural_tag is not None:
        yield Constraint("structural_tag", _json(body.structural_tag), field="structural_tag")


def _response_format(given: dict[str, Any] | None) -> Iterator[Constraint]:
    field = "response_format"
    match given:
        case None | {"type": "text"}:
            return
        case {"type": "json_object"}:
            yield Constraint("json_object", field=field)
        case {"type": "json_schema", "json_schema": {"schema": dict() as schema, **more}}:
            strict = more.get("strict")
            if strict not in (None, True, False):
                raise invalid(f"'{field}.json_schema.strict' must be true or false, got {shown(strict)}", field)
            yield Constraint("json_schema", _json(schema), strict=strict is not False, field=field)
        case {"type": "json_schema"}:
            name = f"{field}.json_schema.schema"
            raise invalid(f"'{name}' is required, a JSON schema as an object", name)
        case {"type": "structural_tag"}:
            yield Constraint("structural_tag", _json(given), field=field)
        case _:
            raise invalid(
                f"'{field}.type' is {shown(given.get('type'))}, it must be one of text, json_object, json_schema, "
                "structural_tag",
                f"{field}.type",
            )


def _structured(given: dict[str, Any] | None) -> Iterator[Constraint]:
    for name, value in (given or {}).items():
        field = f"structured_outputs.{name}"
        kind = STRUCTURED.get(name)
        if value is None or value is False:
            continue
        if kind is None:
            raise invalid(f"'{field}' is not supported: it must be one of {', '.join(STRUCTURED)}", field)
        match kind, value:
            case "json_object", True:
                yield Constraint("json_object", field=field)
            case (("json_schema" | "structural_tag"), dict() | str()):
                yield Constraint(kind, _json(value), field=field)
            case (("regex" | "ebnf"), str()):
                yield Constraint(kind, value, field=field)
            case "choice", list():
                yield Constraint(kind, _json(value), field=field)
            case _:
                raise invalid(f"'{field}' cannot be {shown(value)}", field)


def _json(value: Any) -> str:
    """JSON as text; a text is taken as such."""
    match value:
        case str():
            return value
        case _:
            return msgspec.json.encode(value).decode()
