"""JSON schemas that a grammar does not express in full: what xgrammar leaves out without a word.

What it says itself, in warnings, is not looked for here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from srt.grammar.errors import GrammarError

Schema = dict[str, Any]

NEVER: Final = (
    "not", "if", "then", "else", "contains", "minContains", "maxContains", "dependentRequired", "dependentSchemas",
    "dependencies", "$dynamicRef", "$recursiveRef",
)  # fmt: skip
"""Keywords that no grammar here knows."""

DECIDING: Final = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
"""Keywords beside which all other conditions are left out."""

SHAPES: Final = ("properties", "additionalProperties", "patternProperties", "items", "prefixItems")
"""Keywords that say of which type a value is."""

CONDITIONS: Final = frozenset(
    {
        *DECIDING, *SHAPES, "type", "required", "minProperties", "maxProperties", "propertyNames", "minItems",
        "maxItems", "minLength", "maxLength", "pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
        "multipleOf",
    }
)  # fmt: skip

FORMATS_WITH_QUOTES: Final = ("json-pointer", "relative-json-pointer", "uri-template")
"""Formats whose texts may have characters that JSON escapes, which the grammar does not."""

_NEGATED_CLASS: Final = re.compile(r"\[\^(?:\\.|[^\]\\])*\]")
_ESCAPED_IN_JSON: Final = re.compile(r'["\x00-\x1f]|\\[\\nrtfv0c]|\\x(?:[01]|22|5[cC])|\\u00(?:[01]|22|5[cC])')

_TYPES: Final[dict[type, tuple[str, ...]]] = {
    str: ("string",), bool: ("boolean",), int: ("integer", "number"), float: ("number",), type(None): ("null",),
    list: ("array",), dict: ("object",),
}  # fmt: skip


def check_schema(text: str) -> None:
    """Raises: GrammarError that names the first condition that would not be enforced, and where it stands."""
    level: list[tuple[str, Any]] = [("#", msgspec.json.decode(text))]
    while level:
        below: list[tuple[str, Any]] = []
        for path, schema in level:
            match schema:
                case dict():
                    fault = next(_faults(schema), None)
                    if fault is not None:
                        raise GrammarError(f"{fault} (at {path}); with 'strict': false that is left out")
                    below += _parts(path, schema)
                case _:
                    pass
        level = below


def _parts(path: str, schema: Schema) -> Iterator[tuple[str, Any]]:
    """The schemas within a schema."""
    for name in ("properties", "patternProperties", "$defs", "definitions"):
        for key, part in (schema.get(name) or {}).items():
            yield f"{path}/{name}/{key}", part
    for name in ("items", "additionalProperties"):
        yield f"{path}/{name}", schema.get(name)
    if isinstance(schema.get("propertyNames"), dict):
        yield f"{path}/propertyNames", {"type": "string", **schema["propertyNames"]}
    for name in ("prefixItems", "anyOf", "oneOf", "allOf"):
        for index, part in enumerate(schema.get(name) or ()):
            yield f"{path}/{name}/{index}", part


def _faults(schema: Schema) -> Iterator[str]:
    """What of a schema, without those within it, would not be enforced."""
    for name in NEVER:
        if name in schema:
            yield f"'{name}' cannot be enforced"
    if schema.get("uniqueItems"):
        yield "'uniqueItems' cannot be enforced"
    deciding = next((name for name in DECIDING if name in schema), None)
    if deciding is not None:
        yield from _beside(schema, deciding)
    elif "type" not in schema:
        typed = sorted(CONDITIONS & schema.keys())
        if typed and not any(name in schema for name in SHAPES):
            yield f"'{typed[0]}' cannot be enforced without 'type'"
    if "multipleOf" in schema and schema.get("type") != "integer":
        yield "'multipleOf' can be enforced for the type integer only"
    yield from _object_faults(schema)
    yield from _string_faults(schema)


def _beside(schema: Schema, deciding: str) -> Iterator[str]:
    others = sorted(CONDITIONS & schema.keys() - {deciding})
    if deciding in ("const", "enum") and others == ["type"]:
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        values = schema["enum"] if deciding == "enum" else [schema["const"]]
        if isinstance(values, list) and all(any(kind in kinds for kind in _TYPES[type(value)]) for value in values):
            return
    if others:
        yield f"'{others[0]}' cannot be enforced beside '{deciding}'"


def _object_faults(schema: Schema) -> Iterator[str]:
    listed = schema.get("properties") or {}
    missing = [name for name in schema.get("required") or () if name not in listed]
    if missing:
        yield f"'required' names {missing[0]!r}, which 'properties' does not list"
    for pattern in schema.get("patternProperties") or ():
        try:
            both = [name for name in listed if re.search(pattern, name)]
        except re.error:
            continue  # the library says so
        if both:
            yield f"the property {both[0]!r} is listed and fits the pattern {pattern!r}: only one can be enforced"


def _string_faults(schema: Schema) -> Iterator[str]:
    pattern = schema.get("pattern")
    if isinstance(pattern, str) and _ESCAPED_IN_JSON.search(_NEGATED_CLASS.sub(".", pattern)):
        yield f"'pattern' {pattern!r} has characters that JSON escapes"
    if schema.get("format") in FORMATS_WITH_QUOTES:
        yield f"'format' {schema['format']} cannot be enforced"
