"""Values as models write them become JSON as schemas want it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from srt.formats.values import ArgumentWriter, json_value, parameter_types

HUGE = "9" * 400


def written(schema: Any, text: str, *, root: dict[str, Any] | None = None) -> tuple[str, str]:
    """A value of the parameter `x`, written letter by letter, and what is wrong with it."""
    parameters = {"type": "object", "properties": {"x": schema}, **(root or {})}
    writer = ArgumentWriter(parameters)
    pieces = [writer.begin("x"), *map(writer.add, text)]
    rest, problem = writer.end()
    arguments = "".join((*pieces, rest, writer.close()))
    found = arguments.removeprefix('{"x": ').removesuffix("}")
    known, _ = parameter_types(parameters)
    assert json.loads(found) == json.loads(json_value(text, known.get("x", parameter_types({})[1]))[0])
    return found, problem


@pytest.mark.parametrize(
    ("schema", "text", "wanted"),
    [
        ({"type": "string"}, "5", '"5"'),
        ({"type": "string"}, "", '""'),
        ({"type": "string"}, "NULL", "null"),
        ({"type": "string"}, "nullable", '"nullable"'),
        ({"type": "string"}, "nu", '"nu"'),
        ({"type": "string"}, 'say "ä"\t\\', '"say \\"ä\\"\\t\\\\"'),
        ({"enum": ["new", "old"]}, "new", '"new"'),
        ({"enum": [1, 2, "3"]}, "2", "2"),
        ({"enum": [1, 2, "3"]}, "3", '"3"'),
        ({"const": 7}, "7", "7"),
        ({"type": "integer"}, "007", "7"),
        ({"type": "integer"}, " -12 ", "-12"),
        ({"type": "integer"}, "5.0", "5"),
        ({"type": "integer", "enum": [1, 2]}, "3", "3"),
        ({"type": "integer"}, HUGE, HUGE),
        ({"type": "number"}, "5", "5"),
        ({"type": "number"}, "2.50", "2.50"),
        ({"type": "number"}, "1e5", "1e5"),
        ({"type": "number"}, "+.5", "0.5"),
        ({"type": "number"}, "null", "null"),
        ({"type": "boolean"}, "TRUE", "true"),
        ({"type": "boolean"}, "False", "false"),
        ({"type": "object"}, '{"a": [1, 2.50]}', '{"a": [1, 2.50]}'),
        ({"type": "object"}, "{'a': (1, None)}", '{"a": [1, null]}'),
        ({"type": "array"}, " [1,\n2] ", "[1,\n2]"),
        ({"type": ["integer", "string"]}, "7", "7"),
        ({"type": ["integer", "string"]}, "x7", '"x7"'),
        ({"anyOf": [{"type": "boolean"}, {"type": "null"}]}, "true", "true"),
        ({"oneOf": [{"type": "array"}, {"type": "string"}]}, "[1", '"[1"'),
        ({"description": "anything"}, "5", '"5"'),
        ({}, "5", '"5"'),
        (True, "5", '"5"'),
        ({"$ref": "#/$defs/count"}, "5", "5"),
        ({"$ref": "#/$defs/me"}, "5", '"5"'),
        ({"$ref": "#/nowhere"}, "5", '"5"'),
        ({"$ref": "https://example.com/schema"}, "5", '"5"'),
    ],
)  # fmt: skip
def test_a_value_is_what_its_schema_says(schema: Any, text: str, wanted: str) -> None:
    definitions = {"$defs": {"count": {"type": "integer"}, "me": {"$ref": "#/$defs/me"}}}
    assert written(schema, text, root=definitions) == (wanted, "")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("integer", "4.5"), ("integer", "four"), ("integer", "1e999"), ("integer", "9" * 2000), ("number", "NaN"),
        ("number", "1e999"), ("number", "1_000"), ("number", "٣"), ("boolean", "yes"), ("object", "[1]"),
        ("object", "{1: 2"), ("array", '{"a": 1}'), ("array", "[" * 5000), ("array", "[float('nan')]"),
        ("object", '{"a": "line\nbreak"}'),
    ],
)  # fmt: skip
def test_a_value_that_is_not_what_its_schema_says_stays_text_and_is_told(kind: str, text: str) -> None:
    found, problem = written({"type": kind}, text)
    assert json.loads(found) == text
    assert problem == f"the value is not of type {kind} and stays text"


def test_a_parameter_outside_the_schema_has_the_type_of_all_others() -> None:
    writer = ArgumentWriter({"type": "object", "properties": {}, "additionalProperties": {"type": "integer"}})
    assert writer.begin("y") + writer.add("5") + writer.end()[0] == '{"y": 5'
    assert json.loads('{"y": 5' + writer.begin('"odd"') + writer.add("6") + writer.end()[0] + writer.close()) == {
        "y": 5, '"odd"': 6
    }  # fmt: skip


def test_a_call_without_parameters_has_an_empty_object() -> None:
    assert ArgumentWriter({}).close() == "{}"
