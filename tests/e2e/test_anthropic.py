"""The Messages API through the real `anthropic` client, against the built-in model."""

from __future__ import annotations

import base64
import json
from typing import Any

import anthropic
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from srt.builtin.tasks import evaluation_set
from tests.support.server import Server

ADD: Any = {
    "name": "add",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
}
WEATHER: Any = {
    "name": "get_weather",
    "description": "Get the weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALLS = "What is the weather in Paris and use the tool to add 4 and 5."
MODEL = "builtin:tiny"
GREEDY: Any = {"model": MODEL, "max_tokens": 200, "extra_body": {"temperature": 0}}
SHOWN: Any = {"type": "adaptive"}


@pytest.fixture(scope="module")
def client(builtin: Server) -> anthropic.Anthropic:
    """A client without retries, so that each error is seen once."""
    return anthropic.Anthropic(base_url=builtin.url, api_key="none", max_retries=0)


def content(message: Message) -> list[dict[str, Any]]:
    """Blocks of a message without what differs from call to call."""
    return [{name: value for name, value in block.to_dict().items() if name != "id"} for block in message.content]


def ask(text: str) -> Any:
    """One user message."""
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("question", "tools"), [("What is 17 + 25?", []), (CALLS, [ADD, WEATHER])], ids=["text", "calls"]
)
def test_a_message_is_the_same_streamed_and_whole(client: anthropic.Anthropic, question: str, tools: Any) -> None:
    whole = client.messages.create(**GREEDY, messages=ask(question), tools=tools, thinking=SHOWN)
    with client.messages.stream(**GREEDY, messages=ask(question), tools=tools, thinking=SHOWN) as stream:
        built = stream.get_final_message()
    assert content(built) == content(whole)
    assert built.stop_reason == whole.stop_reason
    assert built.usage.output_tokens == whole.usage.output_tokens
    assert whole.content[0].type == "thinking"
    assert built.usage.cache_read_input_tokens
    assert sum((built.usage.input_tokens, built.usage.cache_read_input_tokens)) == (
        client.messages.count_tokens(model=MODEL, messages=ask(question), tools=tools).input_tokens
    )


def test_every_event_is_to_the_letter_and_in_order(builtin: Server) -> None:
    body = {"model": MODEL, "max_tokens": 200, "messages": ask(CALLS), "temperature": 0, "stream": True}
    body |= {"tools": [ADD, WEATHER], "thinking": SHOWN}
    text = builtin.post("/v1/messages", body).text
    assert "[DONE]" not in text
    adapter: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
    kinds: list[str] = []
    for block in text.strip().split("\n\n"):
        name, _, data = block.partition("\n")
        kind = name.removeprefix("event: ")
        if kind != "ping":
            event = adapter.validate_json(data.removeprefix("data: "))
            assert event.type == kind
        if kinds[-1:] != [kind]:
            kinds.append(kind)
    blocks = ["content_block_start", "content_block_delta", "content_block_stop"] * 3
    assert kinds == ["message_start", "ping", *blocks, "message_delta", "message_stop"]


def test_calls_and_their_results_go_round(client: anthropic.Anthropic) -> None:
    asked = GREEDY | {"tools": [ADD, WEATHER], "thinking": SHOWN}
    first = client.messages.create(**asked, messages=ask(CALLS))
    calls = [block for block in first.content if block.type == "tool_use"]
    assert [(call.name, call.input) for call in calls] == [
        ("get_weather", {"city": "Paris"}),
        ("add", {"a": 4, "b": 5}),
    ]
    assert first.stop_reason == "tool_use"
    results: Any = [
        {"type": "tool_result", "tool_use_id": calls[0].id, "content": '{"weather": "rainy"}'},
        {"type": "tool_result", "tool_use_id": calls[1].id, "content": [{"type": "text", "text": '{"result": 9}'}]},
    ]
    turns: Any = [*ask(CALLS), {"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    second = client.messages.create(**(asked | {"thinking": {"type": "disabled"}}), messages=turns)
    assert content(second) == [{"type": "text", "text": "It is rainy in Paris. The result is 9.", "citations": None}]
    assert second.stop_reason == "end_turn"


def test_without_thinking_the_answer_comes_first(client: anthropic.Anthropic) -> None:
    plain = client.messages.create(**GREEDY, messages=ask("What is 17 + 25?"))
    assert content(plain) == [{"type": "text", "text": "42", "citations": None}]


def test_a_budget_ends_the_thinking(client: anthropic.Anthropic) -> None:
    asked = GREEDY | {"messages": ask("Sort these numbers: 41 7 93 5"), "output_config": {"effort": "high"}}
    free = client.messages.create(**asked, thinking={"type": "enabled", "budget_tokens": 1024})
    cut = client.messages.create(**asked, thinking={"type": "enabled", "budget_tokens": 5})
    assert (free.content[0].type, cut.content[0].type) == ("thinking", "thinking")
    whole, part = content(free)[0]["thinking"], content(cut)[0]["thinking"]
    assert whole.startswith(part)
    assert len(part) < len(whole)
    assert not (cut.model_extra or {}).get("warnings")


def test_an_image_is_seen(client: anthropic.Anthropic) -> None:
    example = evaluation_set("image_object", 1, seed=11)[0]
    data = base64.b64encode(example.pictures[0].to_bytes()).decode()
    source = {"type": "base64", "media_type": "image/png", "data": data}
    parts: Any = [{"type": "image", "source": source}, {"type": "text", "text": "What is in the image?"}]
    seen = client.messages.create(**GREEDY, messages=[{"role": "user", "content": parts}])
    assert content(seen)[0]["text"] == example.answer


def test_limits_and_stop_sequences_are_told_apart(client: anthropic.Anthropic) -> None:
    count = ask("Count from 1 to 9.")
    asked = GREEDY | {"thinking": SHOWN}
    whole = client.messages.create(**asked, messages=count)
    stopped = client.messages.create(**asked, messages=count, stop_sequences=["never", "7"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "7")
    assert content(stopped) != content(whole)
    assert client.messages.create(**(asked | {"max_tokens": 3}), messages=count).stop_reason == "max_tokens"
    roomy = client.messages.create(**(asked | {"max_tokens": 20_000}), messages=count)
    assert roomy.stop_reason == "end_turn", "a limit beyond the context is no error"


def test_errors_are_the_clients_own_exceptions(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(model="no-such-model", max_tokens=1, messages=ask("x"))
    assert caught.value.body == {
        "type": "error",
        "error": {
            "type": "not_found_error",
            "message": "the model 'no-such-model' does not exist, this is 'builtin:tiny'",
        },
    }
    assert caught.value.request_id
    for wrong, word in (
        ({"max_tokens": -1}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "document"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]}, "role user"),
        ({"tools": [{"type": "web_search_20260209", "name": "web_search"}]}, "only functions"),
        ({"stop_sequences": ["x"] * 33}, "the limit is 32"),
    ):
        with pytest.raises(anthropic.BadRequestError, match=word):
            client.messages.create(**({"model": MODEL, "max_tokens": 1, "messages": ask("x")} | wrong))


def test_the_text_can_be_held_to_a_schema_and_calls_can_be_required(client: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    form: Any = {"format": {"type": "json_schema", "schema": schema | {"additionalProperties": False}}}
    question = ask("What is 17 + 25?")
    held = client.messages.create(**GREEDY, messages=question, output_config=form)
    assert isinstance(json.loads(content(held)[0]["text"])["n"], int)
    called = client.messages.create(**GREEDY, messages=question, tools=[ADD], tool_choice={"type": "any"})
    assert (called.stop_reason, called.content[0].type) == ("tool_use", "tool_use")


def test_a_last_message_of_the_assistant_is_continued(client: anthropic.Anthropic) -> None:
    turns: Any = [*ask("Count from 1 to 9."), {"role": "assistant", "content": "1 2 3"}]
    continued = client.messages.create(**GREEDY, messages=turns, thinking=SHOWN)
    assert content(continued) == [{"type": "text", "text": " 4 5 6 7 8 9", "citations": None}]
