"""Values of arguments: text as the model wrote it to JSON as the function's schema wants it.

A value whose schema says text (or nothing) is streamed as it comes. Any other waits until it is whole, because only
then it is known whether it is what the schema says; what is not stays text, so that nothing is lost.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

NULL: Final = "null"
MAX_NUMBER_CHARACTERS: Final = 1000
MAX_REFERENCES: Final = 16
"""References that are followed from one schema to the next."""

SCALARS: Final = ("boolean", "integer", "number")
CONTAINERS: Final = ("object", "array")
_NUMBER: Final = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_JSON_NUMBER: Final = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)


class ValueType(msgspec.Struct, frozen=True):
    """What a schema lets a value be: names of JSON types, and the values of an `enum` or `const`, if there is one."""

    types: tuple[str, ...] = ("string",)
    choices: tuple[Any, ...] = ()

    @property
    def is_text(self) -> bool:
        """Whether a value is text whatever it looks like (but for `null`)."""
        return self.types == ("string",) and all(isinstance(choice, str) for choice in self.choices)

    @property
    def may_be_text(self) -> bool:
        """Whether a value that is nothing else may stay text."""
        return "string" in self.types


TEXT: Final = ValueType()


def parameter_types(parameters: Mapping[str, Any]) -> tuple[dict[str, ValueType], ValueType]:
    """Types of a function's parameters by name, and of all others."""
    root = resolved(parameters, parameters)
    properties, others = root.get("properties"), root.get("additionalProperties")
    match properties:
        case dict():
            known = {str(name): _type_of(schema, parameters) for name, schema in properties.items()}
        case _:
            known = {}
    return known, _type_of(others, parameters)


def _type_of(schema: Any, root: Mapping[str, Any]) -> ValueType:
    types: dict[str, None] = {}
    choices: list[Any] = []
    _collect(schema, root, types, choices, MAX_REFERENCES)
    names = tuple(name for name in types if name != NULL)  # which is understood without being named
    return ValueType(names or ("string",), tuple(choices))


def _collect(schema: Any, root: Mapping[str, Any], types: dict[str, None], choices: list[Any], references: int) -> None:
    """Add what a schema and its alternatives allow."""
    match schema:
        case dict() if references > 0:
            schema = resolved(schema, root)
        case _:
            return
    match schema.get("type"):
        case str(name):
            types[name] = None
        case list() as names:
            types.update(dict.fromkeys(name for name in names if isinstance(name, str)))
        case _:
            pass
    match schema:
        case {"enum": [*values]}:
            choices += values
        case {"const": value}:
            choices.append(value)
        case _:
            pass
    for word in ("anyOf", "oneOf", "allOf"):
        match schema.get(word):
            case [*alternatives]:
                for alternative in alternatives:
                    _collect(alternative, root, types, choices, references - 1)
            case _:
                pass


def resolved(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema that a schema refers to within the same document; itself if it refers to none that is there."""
    for _ in range(MAX_REFERENCES):
        match schema.get("$ref"):
            case str(reference) if reference.startswith("#"):
                found = _looked_up(reference, root)
            case _:
                return schema
        match found:
            case dict():
                schema = found
            case _:
                return schema
    return {}


def _looked_up(reference: str, root: Mapping[str, Any]) -> Any:
    found: Any = root
    for part in reference[1:].split("/")[1:]:
        match found:
            case dict():
                found = found.get(part.replace("~1", "/").replace("~0", "~"))
            case _:
                return None
    return found


def json_text(text: str) -> str:
    """A text as JSON."""
    return json.dumps(text, ensure_ascii=False)


def json_value(text: str, kind: ValueType) -> tuple[str, str]:
    """A whole value as JSON, and what is wrong with it, if anything: then it is JSON text."""
    if text.lower() == NULL:
        return NULL, ""
    for choice in kind.choices:
        if text == choice or text.strip() == json.dumps(choice, ensure_ascii=False):
            return json.dumps(choice, ensure_ascii=False), ""
    for name in (*SCALARS, *CONTAINERS):
        if name in kind.types and (found := _as_type(text.strip(), name)) is not None:
            return found, ""
    if kind.may_be_text:
        return json_text(text), ""
    return json_text(text), f"the value is not of type {' or '.join(kind.types)} and stays text"


def _as_type(text: str, name: str) -> str | None:
    match name:
        case "boolean":
            return text.lower() if text.lower() in ("true", "false") else None
        case "integer":
            return _number(text, integral=True)
        case "number":
            return _number(text, integral=False)
        case _:
            return _container(text, dict if name == "object" else list)


def _number(text: str, *, integral: bool) -> str | None:
    """A number as JSON, digit by digit as it was written where JSON can say it so."""
    if len(text) > MAX_NUMBER_CHARACTERS or not _NUMBER.fullmatch(text):
        return None
    value = float(text)
    if not math.isfinite(value):
        return str(int(text)) if text.lstrip("+-").isdigit() else None
    if text.lstrip("+-").isdigit():
        return str(int(text))
    if integral:
        return str(int(value)) if value.is_integer() else None
    return text if _JSON_NUMBER.fullmatch(text) else repr(value)


def _container(text: str, kind: type[Any]) -> str | None:
    """An object or a list as JSON: as it was written if that is JSON, else read as a Python literal."""
    try:
        return text if isinstance(msgspec.json.decode(text), kind) else None
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        pass
    try:
        value = ast.literal_eval(text)
        return json.dumps(value, ensure_ascii=False, allow_nan=False) if isinstance(value, kind) else None
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


class ArgumentWriter:
    """One call's arguments as JSON, in pieces that join to a JSON object once the call is closed."""

    __slots__ = ("_held", "_in_text", "_keys", "_kind", "_known", "_others")

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self._known, self._others = parameter_types(parameters)
        self._keys: set[str] = set()
        self._kind = TEXT
        self._held: list[str] = []
        """Pieces of a value that is not written before it is whole, or of the beginning of a text."""
        self._in_text = False

    def knows(self, key: str) -> bool:
        """Whether a value of this parameter has come."""
        return key in self._keys

    def begin(self, key: str) -> str:
        """A parameter's value begins."""
        opening = ", " if self._keys else "{"
        self._keys.add(key)
        self._kind = self._known.get(key, self._others)
        self._held.clear()
        self._in_text = False
        return f"{opening}{json_text(key)}: "

    def add(self, piece: str) -> str:
        """More of the value."""
        if self._in_text:
            return json_text(piece)[1:-1]
        self._held.append(piece)
        if not self._kind.is_text:
            return ""
        text = "".join(self._held)
        if NULL.startswith(text.lower()):
            return ""
        self._in_text = True
        self._held.clear()
        return json_text(text)[:-1]

    def end(self) -> tuple[str, str]:
        """The value is whole: the rest of its JSON, and what is wrong with it, if anything."""
        if self._in_text:
            return '"', ""
        return json_value(self.rest(), self._kind)

    def rest(self) -> str:
        """What has come of the value and is in no piece."""
        text = "".join(self._held)
        self._held.clear()
        return text

    def close(self) -> str:
        """The call is whole."""
        return "}" if self._keys else "{}"
