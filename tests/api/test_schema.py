"""Any JSON for a body: a request, or one error that a client can read."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from srt.api.bodies import ChatBody, CompletionBody, GenerateBody, Parser
from srt.api.fields import FIELDS_OF, Body
from srt.api.schema import Schema
from srt.errors import ErrorCode, ServingError

SCHEMA = Schema(vocab_size=512, context_length=512, batch_limit=64)
PARSERS: list[tuple[Body, Parser, Any]] = [
    (Body.GENERATE, Parser(Body.GENERATE, GenerateBody), SCHEMA.generate),
    (Body.COMPLETION, Parser(Body.COMPLETION, CompletionBody), SCHEMA.completion),
    (Body.CHAT, Parser(Body.CHAT, ChatBody), SCHEMA.chat),
]

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "x"]), "content": SCALARS}, optional={"name": SCALARS}
    ),
    max_size=2,
)


def bodies(kind: Body) -> st.SearchStrategy[dict[str, Any]]:
    """Bodies of known fields with any values, and something that may be a prompt."""
    names = sorted(FIELDS_OF[kind])
    fields = st.dictionaries(st.sampled_from(names) | st.text(max_size=4), VALUES, max_size=4)
    prompt = {
        Body.GENERATE: st.fixed_dictionaries({"text": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=2)}),
        Body.COMPLETION: st.fixed_dictionaries(
            {"prompt": st.text(max_size=3) | st.lists(st.integers(-2, 600), max_size=3)}
        ),
        Body.CHAT: st.fixed_dictionaries({"messages": MESSAGES}),
    }[kind]
    return st.tuples(fields, prompt).map(lambda both: both[1] | both[0])


@given(data=st.data(), index=st.integers(0, 2))
@settings(max_examples=600, deadline=None)
def test_every_body_is_a_request_or_one_readable_error(data: st.DataObject, index: int) -> None:
    kind, parser, check = PARSERS[index]
    body = data.draw(bodies(kind))
    try:
        request = check(*parser.parse(msgspec.json.encode(body)))
    except ServingError as error:
        assert error.code in (ErrorCode.INVALID_REQUEST, ErrorCode.UNSUPPORTED_FIELD, ErrorCode.PROMPT_TOO_LONG)
        assert len(error.text) < 2000
        assert not any(word in error.text for word in ("msgspec", "Struct", "Expected `", "NoneType", "object at"))
        return
    assert len(request.prompts) == len(request.sampling) >= 1
    told = " ".join(notice.text for notice in request.notices)
    for name, value in body.items():
        # Nothing is ignored in silence: honoured, neutral, or told.
        field = FIELDS_OF[kind].get(name)
        assert (
            value is None
            or (field is not None and (field.handling.value == "honoured" or field.is_neutral(value)))
            or name in told
        )


@given(raw=st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_parsed_or_refused(raw: bytes) -> None:
    for _, parser, check in PARSERS:
        try:
            check(*parser.parse(raw))
        except ServingError as error:
            assert error.status == 400


@given(salts=st.tuples(*[st.none() | st.text(alphabet="a:1", max_size=3)] * 4))
@settings(max_examples=300, deadline=None)
def test_two_pairs_of_salt_and_key_never_share_a_namespace(salts: tuple[str | None, ...]) -> None:
    def namespace(salt: str | None, key: str | None) -> str:
        return SCHEMA.generate(GenerateBody(text="x", cache_salt=salt, extra_key=key), ()).namespace

    one, other = salts[:2], salts[2:]
    same = tuple(part or "" for part in one) == tuple(part or "" for part in other)
    assert (namespace(*one) == namespace(*other)) == same
