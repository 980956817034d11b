"""Conversations of the Responses and the Messages API as those of chat completions."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from srt.api.anthropic.bodies import PromptBody
from srt.api.anthropic.prompt import chat_document as from_messages
from srt.api.responses.bodies import InputTokensBody
from srt.api.responses.prompt import chat_document as from_items
from srt.api.responses.prompt import input_items, sealed
from srt.api.responses.store import ResponseStore, Stored
from srt.errors import ServingError

CALL = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'}
CALLED = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def items(given: Any, **fields: Any) -> Any:
    """Messages of a conversation in items."""
    body = msgspec.convert({"input": given, **fields}, InputTokensBody)
    return from_items(body, input_items(body.input))["messages"]


def test_what_the_model_did_in_a_row_is_one_message() -> None:
    reasoning = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    said = {"role": "assistant", "content": [{"type": "output_text", "text": "Let me add."}]}
    result = {"type": "function_call_output", "call_id": "c1", "output": "2"}
    assert items([{"role": "user", "content": "1 + 1?"}, reasoning, said, CALL, CALL, result, said]) == [
        {"role": "user", "content": [{"type": "text", "text": "1 + 1?"}]},
        {
            "role": "assistant",
            "content": "Let me add.",
            "reasoning_content": "hm",
            "tool_calls": [CALLED, CALLED],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
        {"role": "assistant", "content": "Let me add."},
    ]


def test_two_turns_of_the_model_stay_two() -> None:
    thought = {"type": "reasoning", "summary": [], "encrypted_content": sealed("größer")}
    said = {"role": "assistant", "content": "yes"}
    assert items([thought, said, thought, CALL, said], instructions="Be brief.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": "yes", "reasoning_content": "größer"},
        {"role": "assistant", "content": "", "reasoning_content": "größer", "tool_calls": [CALLED]},
        {"role": "assistant", "content": "yes"},
    ]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([{"type": "item_reference", "id": "x"}], r"'input\[0\].type': invalid value 'item_reference'"),
        ([{"role": "user", "content": [{"type": "input_text"}]}], r"'input\[0\].content\[0\].text' is required"),
        ([{"type": "function_call", "name": "x"}], r"is required"),
        ([{"role": "tool", "content": "x"}], r"'input\[0\].role'"),
    ],
)
def test_an_item_that_is_wrong_is_named(given: Any, sentence: str) -> None:
    with pytest.raises(ServingError, match=sentence):
        items(given)


def test_results_of_calls_come_before_what_the_user_says_behind_them() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
    body = {
        "model": "m",
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": "1 + 1?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "x"},
                    {"type": "text", "text": "Let me add."},
                    {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c1", "content": [image], "is_error": True},
                    {"type": "text", "text": "Well?"},
                ],
            },
        ],
    }
    assert from_messages(msgspec.convert(body, PromptBody))["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {
            "role": "assistant",
            "content": "Let me add.",
            "reasoning_content": "hm",
            "tool_calls": [CALLED | {"function": {"name": "add", "arguments": '{"a":1}'}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "Error: "}, part]},
        {"role": "user", "content": [{"type": "text", "text": "Well?"}]},
    ]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "any"}, {"tool_choice": "required"}),
        (
            {"type": "auto", "disable_parallel_tool_use": True},
            {"tool_choice": "auto", "parallel_tool_calls": False},
        ),
        ({"type": "tool", "name": "add"}, {"tool_choice": {"type": "function", "function": {"name": "add"}}}),
    ],
)
def test_choices_of_tools_keep_their_meaning(choice: Any, expected: Any) -> None:
    body = msgspec.convert({"model": "m", "messages": [], "tool_choice": choice}, PromptBody)
    assert from_messages(body) == {"messages": []} | expected


def test_kept_responses_never_take_more_than_their_limit() -> None:
    store = ResponseStore(100)
    for name in "abc":
        store.keep(name, Stored(b"x" * 20, (b"y" * 10,), ()))
    assert store.get("a") is not None
    store.keep("d", Stored(b"x" * 30, (), ()))
    assert [store.get(name) is not None for name in "abcd"] == [True, False, True, True], "the longest unasked went"
    store.keep("huge", Stored(b"x" * 101, (), ()))
    assert store.get("huge") is None
    assert len(store) == 3
    assert store.drop("a")
    assert not store.drop("a")
    store.keep("e", Stored(b"x" * 40, (), ()))
    assert len(store) == 3
