"""Constrained output over HTTP with OpenAI's client, against the built-in model with MTP on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

from tests.support.server import Server

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "likes": {"type": "array", "items": {"enum": ["tea", "chess"]}, "maxItems": 3},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]


@pytest.fixture(scope="module", params=["xgrammar", "llguidance"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server with each of the backends."""
    with Server("--grammar-backend", request.param, "--speculative-algorithm", "mtp") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    """OpenAI's client."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


def ask(client: openai.OpenAI, **asked: Any) -> Any:
    """A chat completion."""
    create: Any = client.chat.completions.create
    return create(**{"model": "default", "messages": QUESTION, "max_tokens": 400} | asked)


def said(text: str) -> str:
    """What an answer says behind its thinking."""
    return text.rpartition("</think>")[2]


def person(**more: Any) -> dict[str, Any]:
    """A `response_format`."""
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, **more}}


def test_answers_fit_the_schema_right_behind_the_thinking(client: openai.OpenAI) -> None:
    answers = ask(client, response_format=person(), temperature=1, seed=3, n=3)
    texts = [choice.message.content or "" for choice in answers.choices]
    assert [choice.finish_reason for choice in answers.choices] == ["stop"] * 3
    assert len(set(texts)) > 1
    for text in texts:
        assert text.startswith("{")
        jsonschema.validate(json.loads(said(text)), PERSON)


def test_a_stream_brings_the_same_answer(client: openai.OpenAI) -> None:
    asked = {"response_format": person(strict=True), "temperature": 0}
    whole = ask(client, **asked).choices[0]
    chunks = [chunk.choices[0] for chunk in ask(client, **asked, stream=True) if chunk.choices]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].finish_reason == whole.finish_reason == "stop"


@pytest.mark.parametrize(
    ("form", "fits"),
    [
        ({"regex": "(yes|no), [0-9]{3}"}, r"(yes|no), [0-9]{3}"),
        ({"ebnf": 'root ::= "a" rest\nrest ::= "b" rest | "c"'}, "ab*c"),
        ({"structured_outputs": {"choice": ["forty", "4 2"]}}, "forty|4 2"),
        ({"structured_outputs": {"grammar": 'root ::= [x-z]{4}'}}, "[x-z]{4}"),
        ({"response_format": {"type": "json_object"}}, r"\{(.|\n)*\}"),
    ],
)  # fmt: skip
def test_every_kind_of_constraint_is_obeyed(client: openai.OpenAI, form: dict[str, Any], fits: str) -> None:
    [choice] = ask(client, temperature=0.7, seed=1, extra_body=form, max_tokens=300).choices
    if choice.finish_reason == "stop":
        assert re.fullmatch(fits, said(choice.message.content or ""))
    else:
        assert form == {"response_format": {"type": "json_object"}}


def test_a_text_prompt_is_constrained_from_its_first_token(server: Server) -> None:
    params = {"json_schema": json.dumps(PERSON), "temperature": 0, "max_new_tokens": 400}
    answer = server.post("/generate", {"text": "<think>\n", "sampling_params": params}).json
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": None}
    jsonschema.validate(json.loads(answer["text"]), PERSON)


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({"regex": "(a"}, "'regex' cannot be obeyed"),
        ({"response_format": person(schema={"type": "person"})}, "'response_format' cannot be obeyed"),
        ({"ebnf": "root ::= nothing"}, "'ebnf' cannot be obeyed"),
        ({"structured_outputs": {"choice": []}}, "at least one"),
    ],
)  # fmt: skip
def test_what_cannot_be_obeyed_is_told_with_the_reason(client: openai.OpenAI, form: dict[str, Any], says: str) -> None:
    for _ in range(2):  # the second time from memory
        with pytest.raises(openai.BadRequestError, match=says):
            ask(client, extra_body=form)


def test_greedy_answers_are_the_same_without_guesses(client: openai.OpenAI) -> None:
    asked = {"response_format": person(), "temperature": 0}
    guessed = ask(client, **asked)
    plain = ask(client, **asked, extra_body={"speculative": "off"})
    assert guessed.choices[0].message.content == plain.choices[0].message.content
