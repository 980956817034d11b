"""Chats with the built-in model through the real `openai` client: tools, their answers, effort, the same prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice

from srt.builtin.tasks import Example, evaluation_set
from tests.support.gpu import DEVICES
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


@pytest.fixture(scope="module", params=DEVICES)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server on the built-in model."""
    with Server(device=request.param) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    """A client without retries, so that each error is seen once."""
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def create(client: openai.OpenAI, messages: list[Any], **options: Any) -> Any:
    """Whatever a greedy call returns."""
    make: Any = client.chat.completions.create
    return make(**({"model": "builtin:tiny", "messages": messages, "temperature": 0} | options))


def answer(client: openai.OpenAI, messages: list[dict[str, Any]], **options: Any) -> Choice:
    """A greedy answer."""
    done: ChatCompletion = create(client, messages, **options)
    assert not (done.model_extra or {}).get("warnings")
    return done.choices[0]


def thought(choice: Choice) -> str:
    """The reasoning of an answer."""
    return str((choice.message.model_extra or {})["reasoning_content"])


def called(message: ChatCompletionMessage) -> list[tuple[str, Any]]:
    """The calls of a message."""
    calls = [call for call in message.tool_calls or [] if call.type == "function"]
    assert len({call.id for call in calls}) == len(calls)
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


def test_tool_calls_and_their_results_go_round(client: openai.OpenAI) -> None:
    user = {"role": "user", "content": "What is the weather in Paris and use the tool to add 4 and 5."}
    first = answer(client, [user], tools=[ADD, WEATHER])
    assert called(first.message) == [("get_weather", {"city": "Paris"}), ("add", {"a": 4, "b": 5})]
    assert (first.finish_reason, first.message.content) == ("tool_calls", None)
    assert thought(first) == "get_weather Paris add 4 5"
    # As an agent does it: the message goes back as it came, with results by the ids of the calls.
    results = ['{"weather": "rainy"}', '{"result": 9}']
    rest = [
        {"role": "tool", "tool_call_id": call.id, "content": result}
        for call, result in zip(first.message.tool_calls or [], results, strict=True)
    ]
    second = answer(client, [user, first.message.model_dump(), *rest], tools=[ADD, WEATHER])
    assert (second.finish_reason, second.message.content) == ("stop", "It is rainy in Paris. The result is 9.")


def test_a_streamed_answer_with_calls_is_the_whole_one(client: openai.OpenAI) -> None:
    user = {"role": "user", "content": "Use the tool to add 12 and 7 and what is the weather in Rome?"}
    whole = answer(client, [user], tools=[ADD, WEATHER])
    chunks = create(client, [user], tools=[ADD, WEATHER], stream=True, stream_options={"include_usage": True})
    reasoning, calls, reason = "", dict[int, list[str]](), None
    usage: Any = None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            reason = choice.finish_reason or reason
            reasoning += choice.delta.reasoning_content or ""
            assert not choice.delta.content
            for part in choice.delta.tool_calls or []:
                name, arguments = part.function.name, part.function.arguments
                assert (part.id is None) == (name is None) == (part.index in calls)
                calls.setdefault(part.index, [name, ""])[1] += arguments
    assert reasoning == thought(whole)
    assert [(name, json.loads(arguments)) for name, arguments in calls.values()] == called(whole.message)
    assert reason == whole.finish_reason == "tool_calls"
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens


def test_the_clients_own_helper_puts_a_streamed_answer_together(client: openai.OpenAI) -> None:
    user = {"role": "user", "content": "What is the weather in Paris?"}
    begin: Any = client.chat.completions.stream
    with begin(model="builtin:tiny", messages=[user], tools=[WEATHER], temperature=0) as stream:
        names = [event.type for event in stream]
        message = stream.get_final_completion().choices[0].message
    assert called(message) == [("get_weather", {"city": "Paris"})]
    assert "tool_calls.function.arguments.delta" in names
    assert "tool_calls.function.arguments.done" in names


def test_one_call_at_most_leaves_the_second_out_and_says_so(client: openai.OpenAI) -> None:
    user = {"role": "user", "content": "Use the tool to add 1 and 2 and use the tool to add 3 and 4."}
    done = create(client, [user], tools=[ADD], parallel_tool_calls=False)
    assert called(done.choices[0].message) == [("add", {"a": 1, "b": 2})]
    assert done.choices[0].finish_reason == "tool_calls"
    assert done.model_extra["warnings"] == [
        'choice 0: one call is wanted, a further one is left out: \'add {"a": 3, "b": 4}\''
    ]


def test_a_model_that_must_call_a_tool_calls_one(client: openai.OpenAI) -> None:
    question = {"role": "user", "content": "What is 3 * 4?"}
    assert not answer(client, [question], tools=[ADD, WEATHER]).message.tool_calls
    called_any = answer(client, [question], tools=[ADD, WEATHER], tool_choice="required", max_tokens=400)
    assert called_any.finish_reason in ("tool_calls", "length"), "one call or more"
    for name, arguments in called(called_any.message)[:1]:
        assert name in ("add", "get_weather")
        assert set(arguments) <= {"a", "b", "city"}
    choice = {"type": "function", "function": {"name": "get_weather"}}
    called_one = answer(client, [question], tools=[ADD, WEATHER], tool_choice=choice)
    [(name, arguments)] = called(called_one.message)
    assert (name, list(arguments), called_one.finish_reason) == ("get_weather", ["city"], "tool_calls")
    assert called_one.message.content is None
    assert thought(called_one), "it thinks first, as it likes"


def test_a_call_that_must_be_comes_streamed_as_it_comes_whole(client: openai.OpenAI) -> None:
    question = {"role": "user", "content": "Use the tool to add 31 and 4."}
    options: Any = {"tools": [WEATHER, ADD], "tool_choice": "required", "parallel_tool_calls": False}
    whole = answer(client, [question], **options)
    assert called(whole.message) == [("add", {"a": 31, "b": 4})]
    chunks = [chunk.choices[0] for chunk in create(client, [question], stream=True, **options)]
    parts = [part.function for chunk in chunks for part in chunk.delta.tool_calls or []]
    assert "".join(part.arguments for part in parts) == '{"a": 31, "b": 4}'
    assert chunks[-1].finish_reason == "tool_calls"


def test_a_call_without_thinking_begins_at_once(client: openai.OpenAI) -> None:
    question = {"role": "user", "content": "Use the tool to add 31 and 4."}
    found = answer(client, [question], tools=[ADD], tool_choice="required", reasoning_effort="none", max_tokens=300)
    assert found.message.tool_calls
    assert found.message.model_dump()["reasoning_content"] is None


@pytest.mark.parametrize("name", ["thinking_budget", "max_thinking_tokens", "thinking_token_budget"])
def test_a_model_thinks_no_more_than_its_budget(client: openai.OpenAI, name: str) -> None:
    question = [{"role": "user", "content": "Sort these numbers: 41 7 93 5"}]
    free = create(client, question, reasoning_effort="high")
    assert free.usage.completion_tokens_details.reasoning_tokens > 12
    cut = create(client, question, reasoning_effort="high", extra_body={name: 5, "return_token_ids": True})
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens_details.reasoning_tokens == 6, "five, and the one that ends it"
    assert thought(free.choices[0]).startswith(thought(cut.choices[0]))
    assert (
        cut.choices[0].token_ids[:5]
        == create(client, question, reasoning_effort="high", extra_body={"return_token_ids": True})
        .choices[0]
        .token_ids[:5]
    )
    same = create(client, question, reasoning_effort="high", extra_body={name: 4000})
    assert same.choices[0].message == free.choices[0].message
    none = create(client, question, extra_body={name: 0}, temperature=1)
    assert none.usage.completion_tokens_details.reasoning_tokens == 1
    assert none.choices[0].message.reasoning_content is None


def test_an_answer_can_be_sent_back_as_it_came(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "What is 20 + 22?"}]
    first = answer(client, messages)
    assert (first.message.content, bool(thought(first))) == ("42", True)
    question = {"role": "user", "content": "Reverse the word gate."}
    assert answer(client, [*messages, first.message.model_dump(), question]).message.content == "etag"


def test_reasoning_is_told_apart_left_in_or_left_out_as_the_client_wants(client: openai.OpenAI) -> None:
    question = [{"role": "user", "content": "What is 20 + 22?"}]
    apart = answer(client, question)
    inside = answer(client, question, extra_body={"separate_reasoning": False})
    hidden = answer(client, question, extra_body={"include_reasoning": False})
    assert inside.message.content == f"{thought(apart)}\n</think>\n42"
    assert inside.message.model_dump()["reasoning_content"] is None
    assert (hidden.message.content, hidden.message.model_dump()["reasoning_content"]) == ("42", None)
    stream = create(client, question, stream=True, extra_body={"stream_reasoning": False})
    pieces = [chunk.choices[0].delta.model_dump().get("reasoning_content") for chunk in stream]
    assert [piece for piece in pieces if piece] == [thought(apart)]


@pytest.mark.parametrize(
    "options",
    [{"reasoning_effort": "none"}, {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}],
    ids=["effort", "template"],
)
def test_an_answer_without_thinking_is_content(client: openai.OpenAI, options: dict[str, Any]) -> None:
    found = answer(client, [{"role": "user", "content": "What is 3 * 4?"}], **options)
    assert found.message.content, "the model was not trained for it, so what it says is another matter"
    assert found.message.model_dump()["reasoning_content"] is None


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
    answers = [answer(client, question, reasoning_effort=effort) for effort in ("low", "medium", "high")]
    assert [found.message.content for found in answers] == ["5 7 41 93"] * 3
    low, medium, high = (len(thought(found)) for found in answers)
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
