"""What makes a model call one of some functions: a structural tag, from the same description as the parser.

Arguments come in the order of the schema. Texts are free but for the marks that would end them; anything else is JSON
that the parameter's own schema describes, so what is called passes the schema.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from srt.formats.description import Function, TextFormat
from srt.formats.values import parameter_types, resolved

Format = dict[str, Any]


def _const(text: str) -> Format:
    return {"type": "const_string", "value": text}


def _sequence(elements: Sequence[Format]) -> Format:
    return elements[0] if len(elements) == 1 else {"type": "sequence", "elements": list(elements)}


def _one_of(elements: Sequence[Format]) -> Format:
    return elements[0] if len(elements) == 1 else {"type": "or", "elements": list(elements)}


def _optional(content: Format) -> Format:
    return {"type": "optional", "content": content}


def call_grammar(form: TextFormat, functions: Sequence[Function], *, single: bool) -> str:
    """A structural tag, as JSON, of an answer that is nothing but calls: one, or one and more.

    It begins behind the reasoning's end, where the model writes a padding first.
    """
    call = _one_of([_call(form, function) for function in functions])
    elements = [_optional(_const(form.padding)), call]
    if not single:
        elements.append({"type": "star", "content": _sequence([_const(form.padding), call])})
    tag = {"type": "structural_tag", "format": _sequence(elements)}
    return msgspec.json.encode(tag).decode()


def _call(form: TextFormat, function: Function) -> Format:
    pad = form.padding
    begin = f"{form.call_open}{pad}{form.function_open}{function.name}{form.name_close}{pad}"
    end = f"{form.function_close}{pad}{form.call_close}"
    return _sequence([_const(begin), *_parameters(form, function.parameters), _const(end)])


def _parameters(form: TextFormat, schema: Mapping[str, Any]) -> list[Format]:
    root = resolved(schema, schema)
    types, other = parameter_types(schema)
    match root.get("properties"):
        case dict() as properties:
            pass
        case _:
            properties = {}
    match root.get("required"):
        case list() as names:
            required = [name for name in names if isinstance(name, str)]
        case _:
            required = []
    parameters: list[Format] = []
    for name in dict.fromkeys((*properties, *required)):
        if any(character in name for character in (form.name_close, "<", "\n")) or not name.strip():
            continue  # the format has no way to say it
        kind = types.get(name, other)
        value = _value(form, properties.get(name, {}), schema, is_text=kind.may_be_text, choices=kind.choices)
        begin = f"{form.parameter_open}{name}{form.name_close}{form.padding}"
        parameter = {
            "type": "tag", "begin": begin, "content": value,
            "end": f"{form.padding}{form.parameter_close}{form.padding}",
        }  # fmt: skip
        parameters.append(parameter if name in required else _optional(parameter))
    return parameters


def _value(
    form: TextFormat, schema: Any, root: Mapping[str, Any], *, is_text: bool, choices: tuple[Any, ...]
) -> Format:
    if choices and is_text:
        return _one_of([_const(choice if isinstance(choice, str) else _json(choice)) for choice in choices])
    if is_text:
        ends = (form.parameter_close, form.parameter_open, form.function_close, form.call_close, form.call_open)
        return {"type": "any_text", "excludes": list(ends)}
    definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
    return {"type": "json_schema", "json_schema": {**definitions, **schema}}


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
