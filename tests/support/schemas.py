"""JSON schemas over all the features that can be enforced, made at random from a seed."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]

FORMATS = ("date", "time", "date-time", "email", "uuid", "ipv4", "hostname", "duration")
PATTERNS = ("^[a-z]{2,4}$", "^\\d{3}-\\d{2}$", "^(red|green|blue)$", "^[A-F0-9]{4}$", '^[^"x]{1,3}$', "^.{0,3}$")
WORDS = ("tea", "chess", "go", "a b", "é", 'x"y', "")


def make_schemas(count: int, seed: int = 0) -> list[Schema]:
    """So many schemas; the first ones have one feature each, the others mix them."""
    rng = random.Random(seed)
    plain = [maker(rng, 0) for maker in (*LEAVES, *NESTED)]
    return (plain + [_object(rng, 2) for _ in range(count)])[:count]


def _string(rng: random.Random, depth: int) -> Schema:
    least = rng.randrange(3)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randrange(1, 5)}


def _pattern(rng: random.Random, depth: int) -> Schema:
    return {"type": "string", "pattern": rng.choice(PATTERNS)}


def _format(rng: random.Random, depth: int) -> Schema:
    return {"type": "string", "format": rng.choice(FORMATS)}


def _integer(rng: random.Random, depth: int) -> Schema:
    low = rng.randrange(-200, 200)
    return {"type": "integer", "minimum": low, rng.choice(("maximum", "exclusiveMaximum")): low + rng.randrange(2, 400)}


def _multiple(rng: random.Random, depth: int) -> Schema:
    return {"type": "integer", "multipleOf": rng.randrange(2, 9), "minimum": 0, "maximum": 500}


def _number(rng: random.Random, depth: int) -> Schema:
    low = rng.randrange(-20, 20) / 4
    return {"type": "number", rng.choice(("minimum", "exclusiveMinimum")): low, "maximum": low + rng.randrange(1, 9)}


def _enum(rng: random.Random, depth: int) -> Schema:
    return {"enum": rng.sample([*WORDS, 1, -2.5, None, True, [1, "a"], {"k": []}], 3)}


def _typed_enum(rng: random.Random, depth: int) -> Schema:
    return {"type": "string", "enum": rng.sample(WORDS, 2)}


def _const(rng: random.Random, depth: int) -> Schema:
    return {"const": rng.choice([*WORDS, 7, None, False, {"a": [1, {}]}])}


def _type_list(rng: random.Random, depth: int) -> Schema:
    return {"type": ["string", "null", "boolean"], "maxLength": 3}


def _array(rng: random.Random, depth: int) -> Schema:
    least = rng.randrange(2)
    return {"type": "array", "items": _any(rng, depth - 1), "minItems": least, "maxItems": least + rng.randrange(1, 3)}


def _tuple(rng: random.Random, depth: int) -> Schema:
    return {"type": "array", "prefixItems": [_any(rng, depth - 1) for _ in range(2)], "items": False, "minItems": 2}


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(("name", "age", "x-y", "größe", "a b", "id"), rng.randrange(1, 4))
    made: Schema = {
        "type": "object",
        "properties": {name: _any(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
    }
    if rng.random() < 0.5:
        made["additionalProperties"] = False
    return made


def _map(rng: random.Random, depth: int) -> Schema:
    return {
        "type": "object", "propertyNames": {"pattern": "^[a-z]{1,3}$"}, "additionalProperties": _any(rng, depth - 1),
        "minProperties": 1, "maxProperties": 2,
    }  # fmt: skip


def _by_pattern(rng: random.Random, depth: int) -> Schema:
    return {"type": "object", "patternProperties": {"^k[0-9]$": _any(rng, depth - 1)}, "additionalProperties": False}


def _any_of(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(rng, depth - 1) for _ in range(2)]}


def _one_of(rng: random.Random, depth: int) -> Schema:
    kinds = [
        {
            "type": "object",
            "properties": {"kind": {"const": kind}, "v": _any(rng, depth - 1)},
            "required": ["kind", "v"],
        }
        for kind in ("a", "b")
    ]
    return {"oneOf": kinds}


def _reference(rng: random.Random, depth: int) -> Schema:
    part = {"allOf": [{"$ref": "#/$defs/part"}], "description": "one", "default": None}
    return {"type": "object", "properties": {"p": part}, "required": ["p"], "$defs": {"part": _any(rng, depth - 1)}}


def _recursive(rng: random.Random, depth: int) -> Schema:
    node = {
        "type": "object",
        "properties": {"v": _any(rng, depth - 1), "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
        "required": ["v", "next"],
    }
    return {"$ref": "#/$defs/node", "$defs": {"node": node}}


LEAVES = (
    _string, _pattern, _format, _integer, _multiple, _number, _enum, _typed_enum, _const, _type_list,
)  # fmt: skip
NESTED = (_array, _tuple, _object, _map, _by_pattern, _any_of)
ROOTS_ONLY = (_one_of, _reference, _recursive)


def _any(rng: random.Random, depth: int) -> Schema:
    """Any feature that may stand within a schema."""
    return rng.choice(LEAVES if depth <= 0 else (*LEAVES, *NESTED))(rng, depth)


def with_roots(count: int, seed: int = 0) -> list[Schema]:
    """`make_schemas`, every fifth of them with references or exclusive alternatives at its root."""
    rng = random.Random(seed + 1)
    mixed = make_schemas(count, seed)
    return [rng.choice(ROOTS_ONLY)(rng, 2) if index % 5 == 4 else made for index, made in enumerate(mixed)]
