"""What makes a model call a function, tried with the library that holds answers to it."""

from __future__ import annotations

import pytest
import xgrammar

from srt.formats.answer import parse
from srt.formats.description import STEP, Function
from srt.formats.grammar import call_grammar
from srt.formats.reader import ReadOptions

END = 256
BOOK = Function(
    "book",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "nights": {"type": "integer"},
            "guest": {"type": "object", "properties": {"adult": {"$ref": "#/$defs/flag"}}, "required": ["adult"]},
            "room": {"enum": ["single", "double", 3]},
            "price": {"type": ["number", "null"]},
            "odd>name": {"type": "string"},
        },
        "required": ["city", "nights"],
        "$defs": {"flag": {"type": "boolean"}},
    },
)
NOW = Function("now")


def call(*parameters: tuple[str, str], name: str = "book") -> str:
    """A call as the chat template writes it."""
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


NEEDED = (("city", "Pa<ris\n x"), ("nights", "5"))
WHOLE = call(*NEEDED)


def compiled(*, single: bool) -> xgrammar.CompiledGrammar:
    """The grammar over bytes and an end."""
    grammar = xgrammar.Grammar.from_structural_tag(call_grammar(STEP, (BOOK, NOW), single=single))
    tokens = xgrammar.TokenizerInfo([bytes([value]) for value in range(END)] + [b"</s>"], stop_token_ids=[END])
    return xgrammar.GrammarCompiler(tokens).compile_grammar(grammar)


def allowed(grammar: xgrammar.CompiledGrammar, text: str) -> bool:
    """Whether an answer may be this text and nothing more."""
    matcher = xgrammar.GrammarMatcher(grammar)
    return bool(matcher.accept_string(text) and matcher.accept_token(END))


@pytest.fixture(scope="module")
def one() -> xgrammar.CompiledGrammar:
    """Exactly one call."""
    return compiled(single=True)


@pytest.mark.parametrize(
    "text",
    [
        WHOLE,
        "\n" + WHOLE,
        call(name="now"),
        call(*NEEDED, ("guest", '{"adult": true}'), ("room", "3"), ("price", "null")),
        call(("city", ""), ("nights", "-1")),
    ],
)
def test_calls_that_the_schema_allows_may_be_written_and_are_read(one: xgrammar.CompiledGrammar, text: str) -> None:
    assert allowed(one, text)
    answer = parse(text, STEP, (BOOK, NOW), ReadOptions(thinking=False))
    assert (len(answer.calls), answer.content, answer.problems) == (1, "", ())


@pytest.mark.parametrize(
    "text",
    [
        "Of course.", "", WHOLE + WHOLE, WHOLE + "\n" + WHOLE, call(("city", "Paris")), call(name="other"),
        call(("city", "Paris"), ("nights", "five")), call(*NEEDED, ("room", "suite")),
        call(*NEEDED, ("guest", '{"adult": 1}')), call(*NEEDED, ("odd>name", "x")), call(*reversed(NEEDED)),
        call(("city", "a</function>b"), ("nights", "5")),
    ],
)  # fmt: skip
def test_anything_else_may_not(one: xgrammar.CompiledGrammar, text: str) -> None:
    assert not allowed(one, text)


def test_several_calls_may_follow_each_other_where_they_may() -> None:
    several = compiled(single=False)
    text = f"{WHOLE}\n{call(name='now')}\n{WHOLE}"
    assert allowed(several, text)
    assert len(parse(text, STEP, (BOOK, NOW), ReadOptions(thinking=False)).calls) == 3
    assert not allowed(several, "")
