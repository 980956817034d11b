"""Chats with the built-in model through the real `openai` client: tools, their answers, effort, the same prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from srt.builtin.tasks import Example, evaluation_set, read_completion
from tests.support.server import Server
from tools.builtin import text

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server on the built-in model."""
    with Server() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    """A client without retries, so that each error is seen once."""
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def say(client: openai.OpenAI, messages: list[dict[str, Any]], **options: Any) -> str:
    """Content of a greedy answer, reasoning included."""
    done = client.chat.completions.create(model="builtin:tiny", messages=messages, temperature=0, **options)  # type: ignore[arg-type]
    assert done.choices[0].finish_reason == "stop"
    assert done.choices[0].message.content is not None
    return str(done.choices[0].message.content)


def test_a_tool_call_and_its_result_go_round(client: openai.OpenAI) -> None:
    user = {"role": "user", "content": "What is the weather in Paris and use the tool to add 4 and 5."}
    called = read_completion(say(client, [user], tools=[ADD, WEATHER]), [ADD, WEATHER])
    assert called.calls == (("get_weather", {"city": "Paris"}), ("add", {"a": 4, "b": 5}))
    # As an agent sends them: arguments as JSON text, results by the id of the call.
    calls = [
        {"id": "call_a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}},
        {"id": "call_b", "type": "function", "function": {"name": "add", "arguments": '{"a": 4, "b": 5}'}},
    ]
    rest: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_a", "content": '{"weather": "rainy"}'},
        {"role": "tool", "tool_call_id": "call_b", "content": '{"result": 9}'},
    ]
    replied = read_completion(say(client, [user, *rest], tools=[ADD, WEATHER]))
    assert replied.content == "It is rainy in Paris. The result is 9."


def test_an_answer_can_be_sent_back_as_it_came(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "What is 20 + 22?"}]
    first = say(client, messages)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "Reverse the word gate."}]
    assert read_completion(say(client, messages)).content == "etag"


def test_no_tool_is_shown_to_a_chat_that_wants_none_used(client: openai.OpenAI) -> None:
    question = [{"role": "user", "content": "What is 3 * 4?"}]
    shown = client.post("/tokenize", body={"messages": question, "tools": [ADD]}, cast_to=object, options={})
    hidden = client.post(
        "/tokenize", body={"messages": question, "tools": [ADD], "tool_choice": "none"}, cast_to=object, options={}
    )
    bare = client.post("/tokenize", body={"messages": question}, cast_to=object, options={})
    assert shown["count"] > bare["count"]  # type: ignore[index]
    assert hidden["tokens"] == bare["tokens"]  # type: ignore[index]


def test_more_effort_thinks_longer_and_answers_the_same(client: openai.OpenAI) -> None:
    question = [{"role": "user", "content": "Sort these numbers: 41 7 93 5"}]
    answers = [read_completion(say(client, question, reasoning_effort=effort)) for effort in ("low", "medium", "high")]
    assert [answer.content for answer in answers] == ["5 7 41 93"] * 3
    low, medium, high = (len(answer.reasoning) for answer in answers)
    assert low < medium < high


@pytest.mark.parametrize("family", ["recall_turns", "effort", "tool_joined", "tool_answer"])
def test_a_chat_becomes_the_prompt_that_the_model_was_trained_on(client: openai.OpenAI, family: str) -> None:
    tokenizer = text.build_tokenizer()
    for example in evaluation_set(family, 10, seed=103):
        found = client.post("/tokenize", body=_body(example), cast_to=object, options={})
        wanted = tokenizer.encode(text.render_prompt(example), add_special_tokens=False).ids
        assert found["tokens"] == wanted  # type: ignore[index]


def _body(example: Example) -> dict[str, Any]:
    body: dict[str, Any] = {"messages": example.openai_messages(), "tools": example.tools}
    body["reasoning_effort"] = example.effort
    return {name: value for name, value in body.items() if value is not None}
