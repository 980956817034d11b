"""Both backends: what they allow fits, what they cannot enforce they refuse."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest

from srt.grammar.backends import open_backend
from srt.grammar.contract import GrammarBackend, Matcher, Vocabulary
from srt.grammar.errors import GrammarError
from srt.payloads import Constraint, ConstraintKind
from tests.support.schemas import with_roots

EOS = 256
TOKENS = (*(bytes([byte]) for byte in range(256)), b"", b'{"', b'":', b'", "', b"12", b"true", b"null", b'"}', b"")
VOCABULARY = Vocabulary(TOKENS, (EOS,))
STEPS = 400


@pytest.fixture(scope="module", params=["xgrammar", "llguidance"])
def backend(request: pytest.FixtureRequest) -> GrammarBackend:
    """Each of the backends over bytes and a few longer tokens."""
    return open_backend(request.param, VOCABULARY)


def allowed(matcher: Matcher) -> list[int]:
    """Tokens that may come next."""
    mask = np.zeros(VOCABULARY.words, np.int32)
    matcher.fill(mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(TOKENS)]).tolist()


def matcher_of(backend: GrammarBackend, constraint: Constraint, stop_ids: Sequence[int] = (EOS,)) -> Matcher:
    """A matcher at the beginning, of the grammar as it comes out of its file."""
    return backend.load(backend.compile(constraint)).matcher(stop_ids)


def say(matcher: Matcher, rng: random.Random) -> bytes | None:
    """Something at random that is allowed, mostly readable and soon at its end; None if it finds none."""
    said = b""
    for _ in range(STEPS):
        ids = allowed(matcher)
        if EOS in ids and (len(ids) == 1 or rng.random() < 0.3):
            return said
        ids.remove(EOS) if EOS in ids else None
        assert ids, f"nothing may follow {said!r}"
        closing = [token for token in ids if TOKENS[token] in (b'"', b"}", b"]", b'"}')]
        readable = [token for token in ids if 32 <= TOKENS[token][0] < 127] or ids
        token = rng.choice(closing if closing and rng.random() < 0.25 else readable)
        assert matcher.accept(token)
        said += TOKENS[token]
    return None


def check(backend: GrammarBackend, schemas: Sequence[dict[str, Any]]) -> None:
    """What is said to each schema fits it. xgrammar takes all of them, llguidance knows no `propertyNames`."""
    rng = random.Random(1)
    taken = finished = 0
    for schema in schemas:
        try:
            matcher = matcher_of(backend, Constraint("json_schema", json.dumps(schema)))
        except GrammarError as error:
            assert "propertyNames" in str(error)
            assert "propertyNames" in json.dumps(schema)
            continue
        taken += 1
        said = say(matcher, rng)
        if said is not None:
            finished += 1
            jsonschema.validate(json.loads(said), schema, jsonschema.Draft202012Validator)
    assert taken == len(schemas) or type(backend).__name__ == "LLGuidance"
    assert taken >= 0.7 * len(schemas)
    assert finished >= 0.9 * taken


def test_what_a_schema_allows_fits_it(backend: GrammarBackend) -> None:
    check(backend, with_roots(60, seed=7))


@pytest.mark.suite
def test_what_any_of_400_schemas_allows_fits_it(backend: GrammarBackend) -> None:
    check(backend, with_roots(400, seed=8))


@pytest.mark.parametrize(
    ("kind", "text", "fits", "misfits"),
    [
        ("regex", "[0-9]+(a|b)", ["1a", "1212b"], ["a", "1c"]),
        ("choice", '["yes", "no", "say \\"no\\""]', ["yes", 'say "no"'], ["y", "nope"]),
        ("ebnf", 'root ::= "(" root ")" | "x"', ["x", "((x))"], ["(x", "y"]),
        ("json_object", "", ['{"a":[1,{"b":null}]}', "{}"], ["[1]", "1"]),
        (
            "structural_tag",
            '{"type":"structural_tag","triggers":["<f"],"structures":[{"begin":"<f>","schema":{"type":"integer"},"end":"</f>"}]}',
            ["free text", "so <f>12</f> it is"],
            ["<f>x</f>", "<f>1"],
        ),
    ],
)  # fmt: skip
def test_each_kind_takes_what_fits_and_nothing_else(
    backend: GrammarBackend, kind: ConstraintKind, text: str, fits: list[str], misfits: list[str]
) -> None:
    constraint = Constraint(kind, text)
    for said in fits + misfits:
        matcher = matcher_of(backend, constraint)
        taken = all(matcher.accept(byte) for byte in said.encode()) and matcher.can_end()
        assert taken == (said in fits), said


def test_stop_ids_are_those_of_the_request(backend: GrammarBackend) -> None:
    digits, stop = Constraint("regex", "[0-9]+"), len(TOKENS) - 1
    for stop_ids in ((EOS,), (stop,), (EOS, stop), ()):
        matcher = matcher_of(backend, digits, stop_ids)
        assert not {EOS, stop} & set(allowed(matcher))
        assert matcher.accept(ord("1"))
        assert {EOS, stop} & set(allowed(matcher)) == set(stop_ids)


def test_a_matcher_comes_back_from_where_it_went(backend: GrammarBackend) -> None:
    matcher = matcher_of(backend, Constraint("json_schema", '{"type":"array","items":{"type":"integer"},"maxItems":2}'))
    seen = []
    for token in b"[1,12]":
        seen.append(allowed(matcher))
        assert matcher.accept(token)
    assert matcher.can_end()
    for back in range(1, 6):
        matcher.rollback(back)
        assert allowed(matcher) == seen[-back]
        assert not matcher.accept(ord("x"))
        assert all(matcher.accept(token) for token in b"[1,12]"[-back:])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_schema", '{"type":"thing"}'), ("json_schema", '{"$ref":"#/$defs/none"}'), ("regex", "(a"),
        ("regex", "a(?=b)"), ("ebnf", "root ::= none"), ("ebnf", 'rest ::= "a"'), ("choice", "[]"), ("choice", "[1]"),
        ("structural_tag", '{"type":"structural_tag"}'),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_with_a_reason(backend: GrammarBackend, kind: ConstraintKind, text: str) -> None:
    with pytest.raises(GrammarError) as caught:
        backend.compile(Constraint(kind, text))
    assert str(caught.value)
    assert not re.search(r"\.cc|Traceback", str(caught.value))


UNENFORCED: list[dict[str, Any]] = [
    {"not": {"type": "string"}},
    {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    {"type": "array", "items": {"type": "integer"}, "contains": {"const": 1}},
    {"if": {"type": "string"}, "then": {"const": "a"}},
    {"type": "object", "properties": {"a": {}, "b": {}}, "dependentRequired": {"a": ["b"]}},
    {"type": "object", "properties": {"a": {"type": "object", "required": ["b"]}}},
]


@pytest.mark.parametrize("schema", UNENFORCED)
def test_conditions_that_cannot_be_enforced_are_refused_unless_that_is_asked_for(
    backend: GrammarBackend, schema: dict[str, Any]
) -> None:
    constraint = Constraint("json_schema", json.dumps(schema))
    lenient = Constraint("json_schema", json.dumps(schema), strict=False)
    try:
        compiled = backend.compile(constraint)
    except GrammarError:
        assert backend.compile(lenient)
        return
    said = say(backend.load(compiled).matcher((EOS,)), random.Random(2))
    assert said is not None, "what is not refused must be enforced"
    jsonschema.validate(json.loads(said), schema)


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"minimum": 5}, "'minimum' cannot be enforced without 'type'"),
        ({"items": {"$ref": "#", "minItems": 1}}, "beside '$ref' (at #/items)"),
        ({"type": "integer", "enum": [1, "a"]}, "beside 'enum'"),
        ({"type": "number", "multipleOf": 0.5}, "multipleOf"),
        ({"type": "string", "pattern": 'a"'}, "has characters that JSON escapes"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf with overlapping"),
        ({"allOf": [{"type": "integer"}, {"minimum": 1}]}, "allOf with multiple options"),
        ({"type": "string", "pattern": "^a", "maxLength": 3}, "pattern combined with"),
    ],
)  # fmt: skip
def test_xgrammar_is_not_believed_where_it_leaves_something_out(schema: dict[str, Any], says: str) -> None:
    with pytest.raises(GrammarError, match=re.escape(says)):
        open_backend("xgrammar", VOCABULARY).compile(Constraint("json_schema", json.dumps(schema)))
