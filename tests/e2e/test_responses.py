"""The Responses API through the real `openai` client, against the built-in model."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from tests.support.server import Server

ADD: Any = {
    "type": "function",
    "name": "add",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
}
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALLS = "What is the weather in Paris and use the tool to add 4 and 5."
MODEL = "builtin:tiny"


@pytest.fixture(scope="module")
def client(builtin: Server) -> openai.OpenAI:
    """A client without retries, so that each error is seen once."""
    return openai.OpenAI(base_url=builtin.url + "/v1", api_key="none", max_retries=0)


def without_ids(value: Any) -> Any:
    """A value without what differs from call to call."""
    match value:
        case dict():
            names = {"id", "call_id", "item_id", "created_at", "completed_at", "cached_tokens"}
            return {name: without_ids(entry) for name, entry in value.items() if name not in names}
        case list():
            return [without_ids(entry) for entry in value]
        case _:
            return value


@pytest.mark.parametrize(
    ("question", "tools"), [("What is 17 + 25?", []), (CALLS, [ADD, WEATHER])], ids=["text", "calls"]
)
def test_the_events_of_a_stream_build_the_response_that_comes_whole(
    client: openai.OpenAI, question: str, tools: list[Any]
) -> None:
    asked: dict[str, Any] = {"model": MODEL, "input": question, "tools": tools, "temperature": 0}
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        built = stream.get_final_response()
    assert [item.type for item in built.output] == [item.type for item in whole.output]
    assert without_ids(client.responses.retrieve(built.id).to_dict()) == without_ids(whole.to_dict())
    assert (kinds[:2], kinds[-1]) == (["response.created", "response.in_progress"], "response.completed")
    assert whole.status == "completed"
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens


def test_every_event_is_to_the_letter_and_they_are_numbered(builtin: Server) -> None:
    body = {"model": MODEL, "input": CALLS, "tools": [ADD, WEATHER], "temperature": 0, "stream": True}
    text = builtin.post("/v1/responses", body).text
    assert "[DONE]" not in text
    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    numbers = []
    for block in text.strip().split("\n\n"):
        name, _, data = block.partition("\n")
        event = adapter.validate_json(data.removeprefix("data: "), strict=False)
        assert name == f"event: {event.type}"
        numbers.append(event.sequence_number)
    assert numbers == list(range(len(numbers)))


def test_calls_and_their_results_go_round_by_the_id_of_the_response(client: openai.OpenAI) -> None:
    first = client.responses.create(model=MODEL, input=CALLS, tools=[ADD, WEATHER], temperature=0)
    calls = [item for item in first.output if item.type == "function_call"]
    assert [(call.name, call.arguments) for call in calls] == [
        ("get_weather", '{"city": "Paris"}'),
        ("add", '{"a": 4, "b": 5}'),
    ]
    assert first.output[0].type == "reasoning"
    results: Any = [
        {"type": "function_call_output", "call_id": calls[0].call_id, "output": '{"weather": "rainy"}'},
        {"type": "function_call_output", "call_id": calls[1].call_id, "output": '{"result": 9}'},
    ]
    asked: dict[str, Any] = {"model": MODEL, "tools": [ADD, WEATHER], "temperature": 0}
    by_id = client.responses.create(**asked, previous_response_id=first.id, input=results)
    assert by_id.output_text == "It is rainy in Paris. The result is 9."
    # As a client does that keeps the conversation itself.
    own: Any = [{"role": "user", "content": CALLS}, *[item.to_dict() for item in first.output], *results]
    by_items = client.responses.create(**asked, input=own, store=False)
    assert by_items.output_text == by_id.output_text
    assert by_items.usage is not None
    assert by_id.usage is not None
    assert by_items.usage.input_tokens == by_id.usage.input_tokens
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(by_items.id)
    items = client.responses.input_items.list(by_id.id, order="asc")
    kinds = [item.type for item in items]
    assert kinds == ["message", "reasoning", *["function_call"] * 2, *["function_call_output"] * 2]
    assert [item.id for item in client.responses.input_items.list(by_id.id, limit=2)] == [
        item.id for item in reversed(list(items))
    ], "the client turns pages"


def test_reasoning_can_travel_sealed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "temperature": 0, "store": False}
    first = client.responses.create(**asked, input="What is 20 + 22?", include=["reasoning.encrypted_content"])
    items: Any = [item.to_dict() for item in first.output]
    opened = [{"role": "user", "content": "What is 20 + 22?"}, *items, {"role": "user", "content": "Reverse gate."}]
    sealed = [dict(item) for item in opened]
    del sealed[1]["content"]
    counts = [
        client.responses.input_tokens.count(model=MODEL, input=conversation).input_tokens  # type: ignore[arg-type]
        for conversation in (opened, sealed)
    ]
    assert counts[0] == counts[1]
    sealed[1]["encrypted_content"] = "gAAAA"
    with pytest.raises(openai.BadRequestError, match="not written by this server"):
        client.responses.create(**asked, input=sealed)  # type: ignore[arg-type]


def test_what_is_forgotten_or_wrong_is_told_as_the_clients_exceptions(client: openai.OpenAI) -> None:
    kept = client.responses.create(model=MODEL, input="Who are you?", max_output_tokens=3)
    assert kept.status == "incomplete"
    assert kept.incomplete_details is not None
    assert kept.incomplete_details.reason == "max_output_tokens"
    client.responses.delete(kept.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(kept.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=MODEL, input="x", previous_response_id=kept.id)
    assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")
    with pytest.raises(openai.NotFoundError, match="no-such-model"):
        client.responses.create(model="no-such-model", input="x")
    for wrong, word in (
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input_file"),
        ({"input": [{"type": "computer_call"}]}, r"input\[0\].type"),
        ({"tools": [{"type": "web_search"}]}, "only functions are supported"),
        ({"background": True}, "background"),
        ({"temperature": -1}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ):
        with pytest.raises(openai.BadRequestError, match=word):
            client.responses.create(**({"model": MODEL, "input": "x"} | wrong))


def test_the_text_can_be_held_to_a_schema_and_calls_can_be_required(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    form: Any = {
        "format": {"type": "json_schema", "name": "number", "schema": schema | {"additionalProperties": False}}
    }
    asked: dict[str, Any] = {"model": MODEL, "input": "What is 17 + 25?", "temperature": 0, "max_output_tokens": 200}
    held = client.responses.create(**asked, text=form)
    assert isinstance(json.loads(held.output_text)["n"], int)
    assert held.output[0].type == "reasoning"
    called = client.responses.create(**asked, tools=[ADD], tool_choice="required")
    assert called.output[-1].type == "function_call"
    unthought = client.responses.create(**asked, reasoning={"effort": "none"})
    assert [item.type for item in unthought.output] == ["message"]
    assert unthought.usage is not None
    assert unthought.usage.output_tokens_details.reasoning_tokens == 0
    assert held.usage is not None
    assert held.usage.output_tokens_details.reasoning_tokens > 0
