"""Constraints as texts: what is checked of them before any library sees them, and one from another."""

from __future__ import annotations

import json
from typing import Any, Final

import msgspec

from srt.grammar.errors import GrammarError
from srt.payloads import Constraint

MAX_BYTES: Final = 256 << 10
MAX_DEPTH: Final = 64
"""Most lists and objects within one another, in a constraint that is JSON."""

MOST_WHITESPACE: Final = 16
"""White space in a row within JSON: enough to indent, too little to be written for ever."""


def check(constraint: Constraint) -> None:
    """Raises: GrammarError if a constraint is empty, larger than any grammar should be, or no JSON where it must be."""
    if not constraint.text and constraint.kind != "json_object":
        raise GrammarError("it is empty")
    size = len(constraint.text.encode())
    if size > MAX_BYTES:
        raise GrammarError(f"it has {size} bytes, the limit is {MAX_BYTES}")
    if constraint.kind in ("json_schema", "structural_tag"):
        try:
            document = msgspec.json.decode(constraint.text)
        except RecursionError as error:
            raise GrammarError("it is nested too deeply") from error
        except msgspec.DecodeError as error:
            raise GrammarError(f"it is not JSON: {_lower(str(error))}") from error
        depth = _depth(document)
        if depth > MAX_DEPTH:
            raise GrammarError(f"it is nested {depth} levels deep, the limit is {MAX_DEPTH}")


def choice_grammar(text: str) -> str:
    """The EBNF of a choice, from its JSON list. Raises: GrammarError."""
    try:
        choices = msgspec.json.decode(text, type=list[str])
    except msgspec.DecodeError as error:
        raise GrammarError(f"it must be a list of texts: {_lower(str(error))}") from error
    if not choices or not all(choices):
        raise GrammarError("it must be a list of texts, at least one, none of them empty")
    return "root ::= " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in dict.fromkeys(choices))


def closed(schema: str) -> str:
    """A JSON schema in which objects have no properties but those that it lists."""
    document = msgspec.json.decode(schema)
    level = [document]
    while level:
        below: list[Any] = []
        for value in level:
            match value:
                case dict():
                    if isinstance(value.get("properties"), dict) and "additionalProperties" not in value:
                        value["additionalProperties"] = False
                    below += value.values()
                case list():
                    below += value
                case _:
                    pass
        level = below
    return msgspec.json.encode(document).decode()


def _depth(document: Any) -> int:
    """Levels of lists and objects; without recursion, for it is somebody else's depth."""
    depth, level = 0, [document]
    while level:
        below: list[Any] = []
        for value in level:
            match value:
                case dict():
                    below += value.values()
                case list():
                    below += value
                case _:
                    pass
        depth += any(isinstance(value, dict | list) for value in level)
        level = below
    return depth


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
